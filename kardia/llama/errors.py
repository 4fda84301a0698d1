"""Errors of llama.cpp that a person can mend."""

from __future__ import annotations


class LlamaError(RuntimeError):
    """Something the user can mend (a broken file, a prompt that does not fit): one line, no traceback."""


class LlamaOutOfMemory(LlamaError):
    """The worker found no memory, or died of the lack of it."""
