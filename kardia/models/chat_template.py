"""Try and render chat templates: Jinja programs that somebody else wrote, inside a GGUF or a tokenizer.

jinja2's sandbox keeps a template from Python and from files, but not from running forever or filling the
memory. So each is first tried in a child process with small limits (`check_template`, 0.2 s; the cache
remembers the verdict). Then it renders here in the sandbox, where Ctrl-C ends one that hangs on a rare text.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

from kardia.core.console import UserError, printable
from kardia.core.files import cache_directory

SECONDS = 10.0  # real templates take a millisecond
MEMORY = 1 << 30  # bytes of the child; real templates take kilobytes
LENGTH = 1 << 20  # characters of a template; the longest in use have some 30,000
WRITTEN = 100_000  # characters a template may add to a chat's own (default prompts, tools, the date)
# jinja2's filters that take the name of an attribute
READERS = {"attr", "groupby", "map", "max", "min", "rejectattr", "selectattr", "sort", "sum", "unique"}
GREEDY, ENDLESS = "takes more than 1 GB of memory", "recurses without end"

# The chats of the trial, each rendered with and without the prompt for an answer, with and without thinking.
ODD = 'Ça va \U0001f642 {{ 7 * 7 }} {% raw %} <|im_end|> </s> <think>\n\n"it\'s" \\n %s {0} \u0001\u2028\t'
TALK = [("user", "My dog died."), ("assistant", "I am so sorry."), ("user", "He was old.")]
TALK += [("assistant", "And you miss him."), ("user", "Yes.")]
CHATS = [
    [{"role": role, "content": content} for role, content in chat]
    for chat in ([("system", "Be kind."), TALK[0]], TALK[:1], TALK[:3], TALK, [("user", ODD)])
]


def prepare_tokenizer(tokenizer, name: str):
    """Return the tokenizer with the chat's end of turn as EOS. Raise UserError without a fit template."""
    if not tokenizer.chat_template:
        raise UserError(f"{name}: its tokenizer has no chat template; use an instruct model")
    check_template(tokenizer.chat_template, tokenizer.special_tokens_map, name)
    # A chat's turn often ends in another token than a text (gemma: <end_of_turn>, not <eos>).
    # That one is trained, and answers stop at it.
    with rendering(name):
        tokenizer.eos_token = end_of_turn(tokenizer) or tokenizer.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_of_turn(tokenizer) -> str | None:
    """Return the special token that the chat template puts after an answer (<|im_end|>, </s>), or None."""
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "@@@"}]
    tail = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("@@@")[2].lstrip()
    tokens = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return max((token for token in tokens if token and tail.startswith(token)), key=len, default=None)


def trained_template(tokenizer) -> str:
    """Return the chat template that renders by default what training rendered, with thinking off.

    Qwen3's opens a thinking block unless a variable, which chat programs do not set, says otherwise.
    """
    chat = [{"role": "user", "content": "x"}]
    default = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    trained = render_chat(tokenizer, chat, generate=True)
    template = tokenizer.get_chat_template()  # of several named ones the one that is used
    return template if default == trained else "{%- set enable_thinking = false -%}\n" + template


def render_chat(tokenizer, chat: list[dict[str, str]], generate: bool, name: str = "this model") -> str:
    """Return a chat as training and evaluation render it. Raise UserError if the template refuses it."""
    options = {"add_generation_prompt": generate, "enable_thinking": False}
    with rendering(name):
        return tokenizer.apply_chat_template(chat, tokenize=False, **options)


def render_template(
    template: str, messages: list[dict[str, str]], bos: str, eos: str, name="the judge"
) -> str:
    """Return a chat rendered by a GGUF's own template. Raise UserError if that is refused or fails."""
    options = {"bos_token": bos, "eos_token": eos, "add_generation_prompt": True, "enable_thinking": False}
    with rendering(name):
        return _compiled(template, bos, eos, name).render(messages=messages, **options)


@lru_cache(4)
def _compiled(template: str, bos: str, eos: str, name: str):
    check_template(template, {"bos_token": bos, "eos_token": eos}, name)
    sandbox = environment()
    # A judge's scores must not depend on the date. Without this function templates name none, or a fixed one.
    del sandbox.globals["strftime_now"]
    return sandbox.from_string(template)


@contextmanager
def rendering(name: str) -> Iterator[None]:
    """Turn whatever a template raises inside into one UserError line."""
    from jinja2 import TemplateError

    try:
        yield
    except (TemplateError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise _refused(name, _reason(error)) from error


def _refused(name: str, reason: str) -> UserError:
    return UserError(f"{name}: its chat template {reason}; it is refused. Use another model")


def _reason(error: Exception) -> str:
    """Return an error in words. Its text is the template's to choose: one line, printable."""
    from jinja2.sandbox import SecurityError

    if isinstance(error, (RecursionError, MemoryError)):
        return ENDLESS if isinstance(error, RecursionError) else GREEDY
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = printable(text)[:160]
    return f"{'reaches for Python' if isinstance(error, SecurityError) else 'cannot be rendered'} ({text})"


# ---------------------------------------------------------------------------------- the trial


def check_template(template: str | dict[str, str], special: dict[str, str], name: str) -> None:
    """Raise UserError unless the template, or each of several named ones, behaves."""
    named = template if isinstance(template, dict) else {"": template}
    for which, text in named.items():
        prefix = f"{which!r} " if which else ""
        if not isinstance(text, str):
            raise _refused(name, f"{prefix}is no text")
        if len(text) > LENGTH:
            raise _refused(name, f"{prefix}is longer than {LENGTH:,} characters")
        # 20 bytes: of a shorter hash its author could make two templates, and show the tame one first.
        # The key is this file: other code tries again.
        key = blake2b(Path(__file__).read_bytes(), digest_size=20).digest()
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=20, key=key).hexdigest()
        passed = cache_directory() / f"template-{digest}.ok"
        if not passed.exists():
            if reason := _tried_in_a_child(text, special):
                raise _refused(name, prefix + reason)
            with suppress(OSError):
                passed.touch()


CHILD = (
    "import json, sys; request = json.load(sys.stdin); sys.path += request.pop('path'); "
    "from kardia.models.chat_template import child; child(**request)"
)


def _tried_in_a_child(template: str, special: dict[str, str]) -> str | None:
    """Return why this template is refused, or None."""
    # -I takes nothing from the environment or the working directory, so the paths are passed on.
    path = [*(path for path in sys.path if path), str(Path(__file__).parents[2])]
    request = {"template": template, "special": special, "seconds": SECONDS, "path": path}
    slow = f"did not finish in {SECONDS:g} s"
    command = [sys.executable, "-I", "-c", CHILD]
    settings = {"encoding": "utf-8", "errors": "replace", "capture_output": True}
    # The timeout is for Windows. Elsewhere the child's CPU time counts, also on a busy machine.
    settings |= {"input": json.dumps(request, default=str), "timeout": 3 * SECONDS + 5}
    try:
        done = subprocess.run(command, **settings)
    except subprocess.TimeoutExpired:
        return slow
    if done.returncode == 0:
        return json.loads(done.stdout)
    if done.returncode == -getattr(signal, "SIGPROF", 0):
        return slow
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"cannot be rendered (its process ended with {done.returncode}: {last[:160]})"


def child(template: str, special: dict[str, str], seconds: float) -> None:
    """Print the reason to refuse a template (JSON, null for none), under limits of this whole process."""
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401 (imported before anything is limited)

    if os.name == "posix":
        import resource

        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # kills in the middle of a step, too
        for limit, most in (("AS", MEMORY), ("FSIZE", 0), ("NPROC", 0), ("CORE", 0)):
            with suppress(ValueError, OSError, AttributeError):  # macOS lacks some
                resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (most, most))
    print(json.dumps(problem(template, special)))


def problem(template: str, special: dict[str, str]) -> str | None:
    """Return what is wrong with a template, or None. It may refuse some chats, not all."""
    from jinja2.sandbox import SecurityError

    sandbox, refused, rendered = environment(), None, 0
    lenient = sandbox.unsafe_undefined

    def strict(obj, attribute):
        # jinja2 returns an undefined value, harmless until it is used. Here asking is enough to be refused.
        if attribute.startswith("__"):
            raise SecurityError(f"attribute {attribute!r}")
        return lenient(obj, attribute)

    sandbox.unsafe_undefined = strict
    try:
        if reason := _forbidden(sandbox.parse(template)):
            return reason
        compiled = sandbox.from_string(template)
        for chat, generate, thinking in itertools.product(CHATS, (True, False), (None, False)):
            options = {**special, "add_generation_prompt": generate}
            if thinking is not None:
                options["enable_thinking"] = thinking
            try:
                text = compiled.render(messages=chat, tools=None, documents=None, **options)
            except (SecurityError, RecursionError, MemoryError):
                raise
            except Exception as error:  # any error of a program that is not ours
                refused = refused or _reason(error)
                continue
            rendered += 1
            if len(text) > WRITTEN + sum(len(message["content"]) for message in chat):
                return f"writes more than {WRITTEN:,} characters of its own"
    except Exception as error:
        return _reason(error)
    return None if rendered else refused


def _forbidden(tree) -> str | None:
    """Return what no chat template needs. The trial might miss it in a branch for certain texts."""
    from jinja2 import nodes

    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        return f"wants other files ({{% {type(node).__name__.lower()} %}})"
    if tree.find(nodes.Pow):
        return "computes powers (**)"  # 9**9**9 is one step, which nothing in the same process could stop
    values = [node.arg for node in tree.find_all(nodes.Getitem)]
    for node in tree.find_all(nodes.Filter):
        if node.name in READERS:
            values += [*node.args, *(keyword.value for keyword in node.kwargs)]
    names = [node.attr for node in tree.find_all(nodes.Getattr)]
    names += [value.value for value in values if isinstance(value, nodes.Const)]
    for name in reversed(names):
        if isinstance(name, str) and re.fullmatch(r"__\w+__", name):
            return f"reaches for Python (attribute {name!r})"
    return None


def environment():
    """Return jinja2 as transformers (5.17) sets it up; {% generation %} only passes its text on."""
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise TemplateError(message)

    def strftime_now(form):
        return datetime.now().strftime(form)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        settings = {"ensure_ascii": ensure_ascii, "indent": indent, "sort_keys": sort_keys}
        return json.dumps(x, separators=separators, **settings)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.filters["tojson"] = tojson
    sandbox.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return sandbox
