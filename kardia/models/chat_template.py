"""A chat template is a stranger's program (Jinja) that comes inside a GGUF or a tokenizer: it runs only once it was seen to behave.

jinja2's sandbox keeps a template from Python and from files, but not from running forever or filling the memory. So each is
first read and tried in a child process of small means (`check_template`; 0.1 s, once per template: the cache remembers), and
what renders here afterwards is watched (`limited`), for a template may behave on every text but one.

Run as a program, this file is that child: a template comes on stdin, the reason to refuse it (or null) goes to stdout.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path


def end_of_turn(tokenizer) -> str | None:
    """The special token that the chat template puts after an answer (<|im_end|>, <end_of_turn>, </s>); None if there is none."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "@@@"}], tokenize=False
    )
    tail = text.rpartition("@@@")[2].lstrip()
    return max(
        (
            t
            for t in {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
            if t and tail.startswith(t)
        ),
        key=len,
        default=None,
    )


def trained_template(tokenizer) -> str:
    """The chat template that renders by default what training rendered: where a template would open a thinking block unless
    told not to (Qwen3), it is told so in its first line, for no chat program will."""
    chat = [{"role": "user", "content": "x"}]
    default, trained = (
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **how)
        for how in ({}, {"enable_thinking": False})
    )
    template = tokenizer.get_chat_template()  # of several named ones the one that is used
    return template if default == trained else "{%- set enable_thinking = false -%}\n" + template


if __name__ == "__main__":
    LlamaError = RuntimeError  # the child needs jinja2 alone
else:
    from kardia.llama.errors import LlamaError

SECONDS = 10.0  # real templates take a millisecond
MEMORY = 1 << 30  # bytes beyond what the process has already; real templates take kilobytes
LENGTH = 1 << 20  # characters of a template; the longest in use have some 30,000
WRITTEN = 100_000  # characters that a template may add to a chat's own: default prompts, tool instructions, today's date
READERS = {
    "attr",
    "groupby",
    "map",
    "max",
    "min",
    "rejectattr",
    "selectattr",
    "sort",
    "sum",
    "unique",
}  # jinja2's filters that take the name of an attribute

SLOW, GREEDY, ENDLESS = (
    "did not finish in {:g} s",
    f"takes more than {MEMORY / (1 << 30):g} GB of memory",
    "recurses without end",
)

# What is rendered on trial, each with and without the prompt for an answer and with and without thinking turned off.
ODD = 'Ça va \U0001f642 {{ 7 * 7 }} {% raw %} <|im_end|> </s> <think>\n\n"it\'s" \\n %s {0} \u0001\u2028\t'
TALK = [
    ("user", "My dog died."),
    ("assistant", "I am so sorry."),
    ("user", "He was old."),
    ("assistant", "And you miss him."),
    ("user", "Yes."),
]
CHATS = [[("system", "Be kind."), *TALK[:1]], TALK[:1], TALK[:3], TALK, [("user", ODD)]]


class TemplateProblem(LlamaError):
    """A chat template that must not run, or was stopped: one line."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: its chat template {reason}; it is refused. Use another model")


# ------------------------------------------------------------------------------------------------ before a template runs here


def check_template(template: str | dict[str, str], special: dict[str, str], name: str) -> None:
    """Raise TemplateProblem unless the template, or each of several named ones, behaves. `special`: a tokenizer's special_tokens_map."""
    from kardia.core.files import cache_directory

    for which, text in template.items() if isinstance(template, dict) else [("", template)]:
        of = f"{which!r} " if which else ""
        if not isinstance(text, str):
            raise TemplateProblem(name, f"{of}is no text")
        if len(text) > LENGTH:
            raise TemplateProblem(name, f"{of}is longer than {LENGTH:,} characters")
        # 20 bytes: of a shorter hash its author could make two templates, and show the tame one first
        known = (
            cache_directory()
            / f"template-{blake2b(text.encode('utf-8', 'surrogatepass'), digest_size=20, key=_own_hash()).hexdigest()}.ok"
        )
        if not known.exists():
            if reason := _tried_in_a_child(text, special):
                raise TemplateProblem(name, of + reason)
            with suppress(OSError):
                known.touch()


@lru_cache
def _own_hash() -> bytes:
    return blake2b(Path(__file__).read_bytes(), digest_size=20).digest()


def _tried_in_a_child(template: str, special: dict[str, str]) -> str | None:
    """Why this template is refused, or None. A template cannot sleep, so the child's clock is its own CPU time: on a busy
    machine a good one is not refused. The clock on the wall is for Windows, which gives it no other."""
    # -I: nothing from the environment or the working directory; where jinja2 lies is told instead
    request = {
        "template": template,
        "special": special,
        "seconds": SECONDS,
        "path": [path for path in sys.path if path],
    }
    try:
        child = subprocess.run(
            [sys.executable, "-I", __file__],
            input=json.dumps(request, default=str),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=3 * SECONDS + 5,
        )
    except subprocess.TimeoutExpired:
        return SLOW.format(SECONDS)
    if child.returncode == 0:
        return json.loads(child.stdout)
    if child.returncode == -getattr(signal, "SIGPROF", 0):
        return SLOW.format(SECONDS)
    last = (child.stderr.strip().splitlines() or [""])[-1]
    return (
        f"cannot be rendered (it ended its process with {child.returncode}{': ' if last else ''}{last[:160]})"
    )


# ------------------------------------------------------------------------------------------------ while it runs here


@contextmanager
def limited(name: str, seconds: float | None = None) -> Iterator[None]:
    """Rendering inside takes at most `seconds` and MEMORY, else TemplateProblem. Costs 15 microseconds, may be nested.

    Time is watched on Unix in the main thread, memory on Linux there; elsewhere the trial must do. An alarm cannot interrupt a
    single step: one that needs memory the kernel stops, and powers were refused on reading.
    """
    seconds, armed = seconds or SECONDS, True
    watched = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()

    def stop(number, frame):
        if armed:
            raise TemplateProblem(name, SLOW.format(seconds))

    try:
        if watched:
            handler, give_back = signal.signal(signal.SIGALRM, stop), _less_memory()
            start = time.monotonic()
            before, every = signal.setitimer(
                signal.ITIMER_REAL, seconds, 1.0
            )  # again each second: what is raised inside a __del__ is dropped
        yield
    except MemoryError:
        raise TemplateProblem(name, GREEDY) from None
    except RecursionError:
        raise TemplateProblem(name, ENDLESS) from None
    except Exception as error:
        if type(error).__name__ == "SecurityError":  # jinja2's, whose import is not ours to wait for
            raise TemplateProblem(name, f"reaches for Python ({_line(error)})") from None
        raise
    finally:
        armed = False
        if watched:
            signal.setitimer(signal.ITIMER_REAL, 0)
            give_back()
            signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
            if before:  # somebody else's alarm goes on, late if it has to
                signal.setitimer(signal.ITIMER_REAL, max(before - (time.monotonic() - start), 1e-6), every)


def _less_memory():
    """The process (all its threads) may map MEMORY more than it has, until the returned function is called."""
    try:
        import resource

        with open("/proc/self/statm", "rb") as file:
            most = int(file.read().split()[0]) * resource.getpagesize() + MEMORY
    except (ImportError, OSError):
        return lambda: None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or most < soft:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def render_template(
    template: str, messages: list[dict[str, str]], bos: str, eos: str, name: str = "the judge"
) -> str:
    """A GGUF's chat template, tried once and then rendered under watch. Thinking is closed before the score."""
    from jinja2 import TemplateError

    try:
        compiled = _compiled(template, bos, eos, name)
        with limited(name):
            return compiled.render(
                messages=messages,
                add_generation_prompt=True,
                bos_token=bos,
                eos_token=eos,
                enable_thinking=False,
            )
    except (TemplateError, TypeError, ValueError) as error:
        raise TemplateProblem(name, f"cannot be rendered ({_line(error)})") from error


@lru_cache(4)
def _compiled(template: str, bos: str, eos: str, name: str):
    check_template(template, {"bos_token": bos, "eos_token": eos}, name)
    sandbox = environment()
    del sandbox.globals[
        "strftime_now"
    ]  # a judge's scores must not depend on the date; templates then say none, or one of their own
    with limited(name):
        return sandbox.from_string(template)


# ------------------------------------------------------------------------------------------------ the child


def environment():
    """Jinja as transformers (5.17) sets it up for chat templates, save that {% generation %} only passes its text on."""
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        def _said(self, caller):
            return caller()

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = tojson
    sandbox.globals.update(
        raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form)
    )
    return sandbox


def problem(template: str, special: dict[str, str]) -> str | None:
    """What is wrong with a template, read and rendered: the child's answer. It may refuse some chats (gemma: no system role), not all."""
    from jinja2.sandbox import SecurityError

    def unsafe(
        obj, attribute
    ):  # jinja2 hands out an undefined value, harmless until used; asking is enough here
        if attribute.startswith("__"):
            raise SecurityError(f"attribute {attribute!r}")
        return lenient(obj, attribute)

    sandbox, rendered, refused = environment(), 0, None
    lenient, sandbox.unsafe_undefined = sandbox.unsafe_undefined, unsafe
    try:
        if found := _forbidden(sandbox.parse(template)):
            return found
        compiled = sandbox.from_string(template)
        for chat in CHATS:
            for options in (
                {"add_generation_prompt": prompt, **thinking}
                for prompt in (True, False)
                for thinking in ({}, {"enable_thinking": False})
            ):
                messages = [{"role": role, "content": content} for role, content in chat]
                try:
                    text = compiled.render(
                        messages=messages, tools=None, documents=None, **{**special, **options}
                    )
                except (SecurityError, RecursionError, MemoryError):
                    raise
                except Exception as error:  # any error of a program that is not ours
                    refused = refused or _line(error)
                    continue
                rendered += 1
                if len(text) > WRITTEN + sum(len(content) for _, content in chat):
                    return f"writes more than {WRITTEN:,} characters of its own"
    except SecurityError as error:
        return f"reaches for Python ({_line(error)})"
    except RecursionError:
        return ENDLESS
    except MemoryError:
        return GREEDY
    except Exception as error:
        return f"cannot be rendered ({_line(error)})"
    return None if rendered else f"cannot be rendered ({refused})"


def _forbidden(tree) -> str | None:
    """What no chat template needs and the trial might not reach: it may stand in a branch for certain texts."""
    from jinja2 import nodes

    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        return f"wants other files ({{% {type(node).__name__.lower()} %}})"
    if tree.find(nodes.Pow):
        return "computes powers (**)"  # 9**9**9 is one step, which nothing in the same process could stop
    names = [node.attr for node in tree.find_all(nodes.Getattr)]
    names += [node.arg.value for node in tree.find_all(nodes.Getitem) if isinstance(node.arg, nodes.Const)]
    for node in tree.find_all(nodes.Filter):
        if node.name in READERS:
            names += [
                value.value
                for value in [*node.args, *(keyword.value for keyword in node.kwargs)]
                if isinstance(value, nodes.Const)
            ]
    private = next(
        (name for name in reversed(names) if isinstance(name, str) and re.fullmatch(r"__\w+__", name)), None
    )
    return f"reaches for Python (attribute {private!r})" if private else None


def _line(error: BaseException) -> str:
    """An error's first line, printable: its text is the template's to choose."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return "".join(c if c.isprintable() else " " for c in text)[:160]


def child() -> None:
    request = json.load(sys.stdin)
    sys.path += request["path"]
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401 (before anything is limited)

    if os.name == "posix":
        import resource

        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # kills, in the middle of a step, too
        for limit, most in (("AS", MEMORY), ("FSIZE", 0), ("NPROC", 0), ("CORE", 0)):
            with suppress(ValueError, OSError, AttributeError):  # macOS knows not all
                resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (most, most))
    print(json.dumps(problem(request["template"], request["special"])))


if __name__ == "__main__":
    child()
