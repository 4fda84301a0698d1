"""Name the errors of llama.cpp that a person can mend."""

from kardia.core.console import UserError


class LlamaError(UserError):
    """A broken file, a prompt that does not fit, or another mistake that llama.cpp reports."""


class LlamaOutOfMemory(LlamaError):
    """The worker found no memory, or died of the lack of it."""

    out_of_memory = True  # core.machine.out_of_memory asks for this; that folder cannot import the class
