"""Chat templates are programs of others: harmful ones are refused, those in use render as in transformers."""

import itertools
import json
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from kardia.core.console import UserError
from kardia.models import chat_template
from kardia.models.chat_template import (
    CHATS,
    check_template,
    environment,
    prepare_tokenizer,
    problem,
    render_chat,
    render_template,
    trained_template,
)

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
FOREVER = "did not finish in 2 s"
GREEDY = "1 GB of memory"

# (template, what the line must say); these end by themselves and can be tried in this process
PYTHON = {  # all reach for an attribute; ESCAPES has more
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "__class__",
    "{{ lipsum['__globals__'] }}": "__globals__",
    "{{ ''|attr('__cla' ~ 'ss__') }}": "__class__",
    "{{ messages|map(attribute='__cl' ~ 'ass__')|list }}": "__class__",
    "{{ '{0.__class__}'.format(messages) }}": "__class__",
    "{% if 'sesame' in messages[-1].content %}{{ lipsum.__globals__ }}{% endif %}": "__globals__",
}
REFUSED = {
    **{template: rf"reaches for Python \(attribute '{name}'\)" for template, name in PYTHON.items()},
    "{{ (messages|map('upper')).gi_frame.f_globals }}": "reaches for Python",
    "{{ messages.append(1) }}": "reaches for Python",
    "{% include 'x' %}": r"wants other files \({% include %}\)",
    "{% import 'x' as x %}{% from 'x' import y %}": "wants other files",
    "{% extends 'x' %}": "wants other files",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recurses without end",
    "{{ " + "(" * 50_000: "recurses without end",
    "{{ 9 ** 9 ** 9 }}": r"computes powers",
    "{{ range(10000000000)|list }}": "Range too big",
    "{% for i in range(99999) %}two {% endfor %}": "writes more than 100,000 characters",
    "{% for i in x %}" * 50 + "{% endfor %}" * 50: "cannot be rendered",
    "{% for": "cannot be rendered",
    "{{ raise_exception('not\n\x1b[31mtoday') }}": r"cannot be rendered \(not\)",
}
# These would take all time or memory: only the child's limits end them.
STATE = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}"
FAN_OUT = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}"
HUGE = "{{ 'a' * 10000000000 }}"
ENDLESS = {
    LOOP: FOREVER,
    HUGE: GREEDY,
    FAN_OUT: FOREVER,
    "{{ lipsum(n=1000000000) }}": FOREVER,
    STATE.replace("START", "7").replace("STEP", "ns.x * ns.x"): FOREVER,
    STATE.replace("START", "'a' * 99999999").replace("STEP", "ns.x ~ ns.x"): f"{GREEDY}|did not finish",
    "{{ [0] * 10000000000 }}": GREEDY,
    "{{ '%9999999999d'|format(1) }}": GREEDY,
    "{{ '%9999999999d' % 1 }}": GREEDY,
    "{{ 'a'|center(10000000000) }}": GREEDY,
    "{{ 'a'.ljust(10000000000) }}": GREEDY,
}
LONG = "a" * 2_000_000

# The shapes of the families' templates (not the originals), with what those use of Jinja.
HERE = Path(__file__).resolve().parent
LEGIT = {path.stem: path.read_text(encoding="utf-8") for path in (HERE / "chat_templates").glob("*.jinja")}
ENDS = {"smollm2": "<|im_end|>", "qwen3-closed-thinking": "<|im_end|>", "llama3.1": "<|eot_id|>"}
ENDS |= {"gemma": "<end_of_turn>", "mistral-system-first": "</s>"}


def options():
    for generate, thinking in itertools.product((True, False), ({}, {"enable_thinking": False})):
        yield {"add_generation_prompt": generate, **thinking}


def tokenizer_of(template):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE({chr(i): i - 32 for i in range(32, 127)}, []))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    specials = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    specials += ["<start_of_turn>", "<end_of_turn>", "</s>", "<s>"]
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **settings)


def outcome(render, *arguments, **more):
    """What came out, or the name of the error: a template that refuses a chat must refuse it either way."""
    try:
        return render(*arguments, **more)
    except Exception as error:
        return type(error).__name__


# ------------------------------------------------------------------------------------------------ refused


def test_harmful_templates_are_refused_for_what_they_do():
    reasons = {template: problem(template, SPECIAL) for template in REFUSED}
    assert not {t: reason for t, reason in reasons.items() if not re.search(REFUSED[t], reason or "none")}


MANY = pytest.param([*REFUSED, *ENDLESS, LONG], marks=pytest.mark.slow)


@pytest.mark.parametrize("templates", [[next(iter(REFUSED)), LOOP, HUGE, LONG], MANY], ids=["some", "all"])
def test_a_child_refuses_at_first_contact(templates, monkeypatch):
    """Each in a child of its own, with one line and in bounded time."""
    monkeypatch.setattr(chat_template, "SECONDS", 2.0)
    says = {**REFUSED, **ENDLESS, LONG: "longer than 1,048,576 characters"}
    form = r"models/x\.gguf: its chat template .*; it is refused\. Use another model"
    for template in templates:
        start = time.monotonic()
        with pytest.raises(UserError) as error:
            check_template(template, SPECIAL, "models/x.gguf")
        line = str(error.value)
        assert re.fullmatch(form, line) and re.search(says[template], line), line
        assert "\x1b" not in line and len(line) < 400 and time.monotonic() - start < 10, line


ESCAPES = [
    "{{ cycler.__init__.__globals__.os.system(COMMAND) }}",
    "{{ self.__init__.__globals__.__builtins__.open(FILE, 'w') }}",
    "{{ lipsum.__globals__['os'].popen(COMMAND).read() }}",
    "{{ lipsum['__glo' ~ 'bals__'].os.popen(COMMAND).read() }}",
    "{{ (lipsum|attr('__glo' ~ 'bals__')).os.system(COMMAND) }}",
    "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{% if c.__name__ == 'Popen' %}"
    "{{ c(COMMAND, shell=true) }}{% endif %}{% endfor %}",
    "{% for c in messages.__class__.__base__.__subclasses__() %}"
    "{{ c.__init__.__globals__.os.system(COMMAND) }}{% endfor %}",
    "{{ ([''] | map(attribute='__cl' ~ 'ass__') | list)[0].mro()[-1].__subclasses__() }}",
    "{{ raise_exception.__globals__.os.system(COMMAND) }}",
    "{{ ('{0._' ~ '_globals__[os]}').format(strftime_now) }}",
    "{{ ('{f._' ~ '_globals__[os]}').format_map({'f': strftime_now}) }}",
    "{% set f = '{0.__' ~ 'class__}'|attr('format') %}{{ f(messages) }}",
    "{{ joiner|attr('__init__')|attr('__globals__') }}",
    "{{ namespace.mro()[1].__subclasses__() }}",
    "{% include FILE %}{% import FILE as x %}{% extends FILE %}",
    "{% include FILE ignore missing %}x",
]


def test_nothing_is_reached(tmp_path, monkeypatch):
    """Refused on trial; and if one ran in this process all the same, the sandbox keeps it from what it
    reaches for."""
    made, secret = tmp_path / "made", tmp_path / "secret"
    secret.write_text("SECRET")
    monkeypatch.chdir(tmp_path)
    for template in ESCAPES:
        file = secret.name if "include" in template else made
        template = template.replace("COMMAND", f"'touch {made}'").replace("FILE", f"'{file}'")
        reason = problem(template, SPECIAL)
        assert re.search("reaches for Python|wants other files|str' object is not callable", reason), template
        tokenizer = tokenizer_of(template)
        for render in (
            lambda: environment().from_string(template).render(messages=CHATS[0]),  # noqa: B023
            lambda: tokenizer.apply_chat_template(CHATS[0], tokenize=False),  # noqa: B023
        ):
            text = outcome(render)
            assert not re.search("SECRET|<class|<module|<built-in|uid=", text), template
            assert not made.exists(), template


def test_the_child_has_small_limits_and_imports_nothing_heavy():
    """Even a template out of the sandbox could write no file there, start no process and take no memory."""
    look = (
        chat_template.CHILD + "; import resource as r; print([r.getrlimit(x)[0] for x in "
        "(r.RLIMIT_FSIZE, r.RLIMIT_NPROC, r.RLIMIT_CORE, r.RLIMIT_AS)], "
        "[m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    request = {"template": "x", "special": {}, "seconds": 5, "path": [p for p in sys.path if p]}
    command = [sys.executable, "-I", "-c", look]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True)
    verdict, limits = done.stdout.splitlines()
    assert verdict == "null" and limits.endswith("[]")
    if sys.platform == "linux":
        assert limits == f"[0, 0, 0, {chat_template.MEMORY}] []"


def test_this_process_is_never_limited():
    """A CUDA process maps memory in strides: a limit around a render once looked like a driver's failure."""
    resource, signal = pytest.importorskip("resource"), pytest.importorskip("signal")
    seen = []

    class Content(str):
        def __str__(self):
            seen.append((resource.getrlimit(resource.RLIMIT_AS), signal.getitimer(signal.ITIMER_REAL)))
            return "hi"

    before = resource.getrlimit(resource.RLIMIT_AS), signal.getitimer(signal.ITIMER_REAL)
    template = "{{ messages[0].content|string }}{{ messages[0].content ~ '' }}"
    render_template(template, [{"role": "user", "content": Content()}], "<s>", "</s>")
    assert seen and set(seen) == {before}


# ------------------------------------------------------------------------------------------------ in use


def test_templates_in_use_are_accepted_and_render_as_in_transformers():
    for family, template in LEGIT.items():
        assert problem(template, SPECIAL) is None, family
        tokenizer, compiled, rendered = tokenizer_of(template), environment().from_string(template), 0
        for chat in CHATS:
            for option in options():
                expected = outcome(tokenizer.apply_chat_template, chat, tokenize=False, **option)
                more = {"messages": chat, "tools": None, "documents": None, **SPECIAL, **option}
                assert outcome(compiled.render, **more) == expected, family
                rendered += expected != "TemplateError"
            if family != "llama3.1" and expected != "TemplateError":  # a judge's template is given no date
                assert render_template(template, chat, "<s>", "</s>") == render_chat(tokenizer, chat, True)
        assert rendered >= 4, family
    text = render_template(LEGIT["llama3.1"], [{"role": "user", "content": "hi"}], "<s>", "</s>")
    assert text.startswith("<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024")


TRLS = sorted((Path(find_spec("trl").origin).parent / "chat_templates").glob("*.jinja"))
ALL = pytest.param(TRLS, marks=pytest.mark.slow)


@pytest.mark.parametrize("files", [TRLS[::12], ALL], ids=["some", "all"])
def test_the_families_own_templates_are_accepted(files):
    """TRL ships the originals of some thirty families, and variants for training."""
    assert len(TRLS) >= 60
    option = next(options())
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert problem(text, SPECIAL) is None, file.name
        more = {"messages": CHATS[3], "tools": None, "documents": None, **SPECIAL, **option}
        ours = outcome(environment().from_string(text).render, **more)
        theirs = outcome(tokenizer_of(text).apply_chat_template, CHATS[3], tokenize=False, **option)
        assert ours == theirs or "strftime_now" in text, file.name


def test_what_a_template_raises_later_is_one_line():
    """A template may behave on every text but one."""
    odd = "{% if 'sesame' in messages[-1].content %}HARM{% endif %}{{ messages[-1].content }}"
    chat = [{"role": "user", "content": "open sesame"}]
    for harm, says in (
        ("{{ lipsum['__glo' ~ 'bals__'].os }}", "reaches for Python"),
        ("{{ messages[1].content.x }}", "cannot be rendered"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurses without end"),
        ("{{ raise_exception('not today') }}", r"cannot be rendered \(not today\)"),
    ):
        template = odd.replace("HARM", harm)
        for render in (
            lambda: render_template(template, chat, "<s>", "</s>", "x"),  # noqa: B023
            lambda: render_chat(tokenizer_of(template), chat, True, "x"),  # noqa: B023
        ):
            with pytest.raises(UserError, match=f"x: its chat template {says}") as error:
                render()
            assert "\n" not in str(error.value)


def test_each_of_several_named_templates_is_tried():
    check_template({"default": LEGIT["smollm2"], "tool_use": LEGIT["qwen2.5"]}, SPECIAL, "x")
    with pytest.raises(UserError, match="x: its chat template 'tool_use' reaches for Python"):
        check_template({"default": LEGIT["smollm2"], "tool_use": "{{ x.__class__ }}"}, SPECIAL, "x")
    with pytest.raises(UserError, match="'rag' is no text"):
        check_template({"rag": 7}, SPECIAL, "x")


def test_a_good_template_is_tried_once(cache, monkeypatch):
    template = LEGIT["smollm2"] + "{# once #}"
    check_template(template, SPECIAL, "x")

    def no_child(*_, **__):
        raise AssertionError("a child was started")

    monkeypatch.setattr(chat_template.subprocess, "run", no_child)
    check_template(template, SPECIAL, "x")
    monkeypatch.setattr(chat_template, "__file__", __file__)  # tried by other code, tried again
    with pytest.raises(AssertionError, match="a child was started"):
        check_template(template, SPECIAL, "x")
    verdicts = list(cache.glob("template-*.ok"))
    assert verdicts and not any(file.stat().st_size for file in verdicts)


# ------------------------------------------------------------------------------------------------ tokenizers


def test_the_turn_ends_where_the_template_says():
    """gemma's tokenizer ends a text with <eos>, its chat a turn with <end_of_turn>: that one is trained."""
    import kardia_lite as k

    dialogue = k.Dialogue("Ana", "", "sad", "x", "e", (("user", "hi"), ("assistant", "oh")))
    for family, end in ENDS.items():
        tokenizer = prepare_tokenizer(tokenizer_of(LEGIT[family]), family)
        assert tokenizer.eos_token == end and tokenizer.pad_token
        ((_, labels),) = k.Renderer(tokenizer).examples(dialogue, 4096)
        trained = [i for i in labels if i != -100]
        text = tokenizer.decode(trained, skip_special_tokens=False).replace(" ", "")
        assert text == f"oh{end}" and tokenizer.eos_token_id == trained[-1], family
    with pytest.raises(UserError, match="x: its tokenizer has no chat template; use an instruct model"):
        prepare_tokenizer(tokenizer_of(None), "x")


def test_a_thinking_template_renders_as_trained_by_default():
    """Training renders Qwen3 with thinking off. No chat program does, so the exported template itself turns
    it off."""
    tokenizer, ask = tokenizer_of(LEGIT["qwen3"]), [{"role": "user", "content": "hi"}]
    trained = render_chat(tokenizer, ask, generate=True)
    default = tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
    assert trained.endswith("</think>\n\n") and default != trained
    tokenizer.chat_template = trained_template(tokenizer)
    assert tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True) == trained
    assert trained_template(tokenizer_of(LEGIT["gemma"])) == LEGIT["gemma"]  # others stay as they are
    named = tokenizer_of({"default": LEGIT["gemma"], "tool_use": "x"})
    assert trained_template(named) == LEGIT["gemma"]  # of several named ones, the one that is used
