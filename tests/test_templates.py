"""Chat templates as strangers' programs: what must not run is refused in one line, what is in use renders as before."""

import json
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from kardia.judge.judge import Judge
from kardia.llama.errors import LlamaError
from kardia.models import chat_template
from kardia.models.chat_template import (
    TemplateProblem,
    check_template,
    environment,
    limited,
    problem,
    render_template,
)

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

# (template, what the line must say)
HOSTILE = {
    # Python
    "class": (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        r"reaches for Python \(attribute '__class__'\)",
    ),
    "messages": ("{{ messages.__class__.__init__.__globals__ }}", "attribute '__class__'"),
    "self": ("{{ self.__init__.__globals__ }}", "attribute '__init__'"),
    "cycler": ("{{ cycler.__init__.__globals__.os }}", "attribute '__init__'"),
    "subscript": ("{{ lipsum['__globals__'] }}", "attribute '__globals__'"),
    "filter": ("{{ ''|attr('__class__') }}", "attribute '__class__'"),
    "in pieces": ("{{ ''|attr('__cla' ~ 'ss__') }}", "attribute '__class__'"),
    "map": ("{{ messages|map(attribute='__cl' ~ 'ass__')|list }}", "attribute '__class__'"),
    "format": ("{{ '{0.__class__}'.format(messages) }}", "attribute '__class__'"),
    "for one text only": (
        "{% if 'sesame' in messages[-1].content %}{{ lipsum.__globals__ }}{% endif %}",
        "attribute '__globals__'",
    ),
    "frame": ("{{ (messages|map('upper')).gi_frame.f_globals }}", "reaches for Python"),
    "changes the chat": ("{{ messages.append(1) }}", "reaches for Python"),
    "include": ("{% include 'x' %}", r"wants other files \({% include %}\)"),
    "import": ("{% import 'x' as x %}{% from 'x' import y %}", "wants other files"),
    "extends": ("{% extends 'x' %}", "wants other files"),
    # time
    "loops": (LOOP, "did not finish in 0.5 s"),
    "fan-out": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "did not finish in 0.5 s",
    ),
    "lipsum": ("{{ lipsum(n=1000000000) }}", "did not finish in 0.5 s"),
    "one step": (
        "{% set ns = namespace(x=7) %}{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "did not finish in 0.5 s",
    ),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurses without end"),
    "nesting": ("{{ " + "(" * 50_000, "recurses without end"),
    "power": ("{{ 9 ** 9 ** 9 }}", r"computes powers"),
    "range": ("{{ range(10000000000)|list }}", "Range too big"),
    # memory
    "doubling": (
        "{% set ns = namespace(x='a' * 99999999) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "1 GB of memory|did not finish",
    ),
    "times": ("{{ 'a' * 10000000000 }}", "1 GB of memory"),
    "list": ("{{ [0] * 10000000000 }}", "1 GB of memory"),
    "width": ("{{ '%9999999999d'|format(1) }}", "1 GB of memory"),
    "percent": ("{{ '%9999999999d' % 1 }}", "1 GB of memory"),
    "center": ("{{ 'a'|center(10000000000) }}", "1 GB of memory"),
    "ljust": ("{{ 'a'.ljust(10000000000) }}", "1 GB of memory"),
    # size, sense
    "much text": ("{% for i in range(99999) %}two {% endfor %}", "writes more than 100,000 characters"),
    "long": ("a" * 2_000_000, "longer than 1,048,576 characters"),
    "blocks": ("{% for i in x %}" * 50 + "{% endfor %}" * 50, "cannot be rendered"),
    "syntax": ("{% for", "cannot be rendered"),
    "refuses all": ("{{ raise_exception('not\n\x1b[31mtoday') }}", r"cannot be rendered \(not\)"),
}

# The shapes of the families' templates (not the originals), with what those use of Jinja.
TOOLS = "{% macro say(m) %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}{% for call in m.tool_calls %}{{ call|tojson }}{% endfor %}{% endif %}<|im_end|>\n{% endmacro %}"
LEGIT = {
    "smollm2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nDEFAULT<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "qwen2.5": TOOLS
    + "{%- if tools %}\n    {{- tools | tojson }}\n{%- endif %}\n{%- for m in messages %}\n    {{- say(m) }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n",
    "qwen3": "{%- set ns = namespace(last=messages|length - 1, open=true) %}\n{%- for m in messages[::-1] %}\n{%- set index = (messages|length - 1) - loop.index0 %}\n{%- if ns.open and m.role == 'user' and not(m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}{%- set ns.open = false %}{%- set ns.last = index %}{%- endif %}\n{%- endfor %}\n{%- for m in messages %}\n{%- set content = m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content %}\n{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}",
    "llama3.1": "{{- bos_token }}\n{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}{%- endif %}\n{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}\n{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' + system_message + '<|eot_id|>' }}\n{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{%- endfor %}\n{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "mistral": "{%- if messages[0].role == 'system' %}{%- set system_message = messages[0].content %}{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}{%- for m in loop_messages %}{%- if m.role == 'user' %}{%- if loop.last and system_message is defined %}{{- '[INST] ' + system_message + '\\n\\n' + m.content + '[/INST]' }}{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}",
    "loopcontrols": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% if loop.index > 9 %}{% break %}{% endif %}{{ ' ' * 2 }}{{ m.role|upper }}: {{ m.content|replace('__image__', '') }}\n{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}",
    "call, filter": "{% macro turn(role) %}[{{ role }}]{{ caller() }}{% endmacro %}{% for m in messages %}{% call turn(m.role) %}{% filter trim %} {{ m.content|tojson(indent=2) }} {% endfilter %}{% endcall %}{% endfor %}",
    "wants a system message": "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
}
OPTIONS = [
    {"add_generation_prompt": prompt, **thinking}
    for prompt in (True, False)
    for thinking in ({}, {"enable_thinking": False})
]


def tokenizer_of(template):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE({chr(i): i - 32 for i in range(32, 127)}, []))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def chats():
    return [[{"role": role, "content": content} for role, content in chat] for chat in chat_template.CHATS]


def outcome(render, *arguments, **options):
    """What came out, or the name of the error: a template that refuses a chat must refuse it either way."""
    try:
        return render(*arguments, **options)
    except Exception as error:
        return type(error).__name__


def hang_on(word):
    return "{% if '" + word + "' in messages[-1].content %}" + LOOP + "{% endif %}{{ messages[-1].content }}"


# ------------------------------------------------------------------------------------------------ hostile


@pytest.mark.parametrize("case", HOSTILE)
def test_what_must_not_run_is_one_line_in_bounded_time(case, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    template, says = HOSTILE[case]
    start = time.monotonic()
    with pytest.raises(TemplateProblem, match=says) as error:
        check_template(template, SPECIAL, "models/x.gguf")
    line = str(error.value)
    assert (
        isinstance(error.value, LlamaError)
        and line.startswith("models/x.gguf: its chat template ")
        and line.endswith("; it is refused. Use another model")
    )
    assert "\n" not in line and "\x1b" not in line and len(line) < 400
    assert time.monotonic() - start < 3 * chat_template.SECONDS + 7


GREEDY = ("range", "doubling", "times", "list", "width", "percent", "center", "ljust", "one step")
MEASURE = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
from kardia import templates
templates.SECONDS = 0.5
print(sum(templates._tried_in_a_child(template, {}) is not None for template in json.load(sys.stdin)), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is not limited, or counted otherwise")
def test_no_child_takes_more_memory_than_it_may():
    """In a process of their own: what is known of a process's children is the most that any of them ever took."""
    asked = json.dumps([HOSTILE[name][0] for name in GREEDY])
    refused, kilobytes = subprocess.run(
        [sys.executable, "-c", MEASURE, str(Path(chat_template.__file__).parent.parent)],
        input=asked,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert int(refused) == len(GREEDY) and int(kilobytes) * 1024 < chat_template.MEMORY * 1.2


ESCAPES = [
    "{{ cycler.__init__.__globals__.os.system(COMMAND) }}",
    "{{ self.__init__.__globals__.__builtins__.open(FILE, 'w') }}",
    "{{ lipsum.__globals__['os'].popen(COMMAND).read() }}",
    "{{ lipsum['__glo' ~ 'bals__'].os.popen(COMMAND).read() }}",
    "{{ (lipsum|attr('__glo' ~ 'bals__')).os.system(COMMAND) }}",
    "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{% if c.__name__ == 'Popen' %}{{ c(COMMAND, shell=true) }}{% endif %}{% endfor %}",
    "{% for c in messages.__class__.__base__.__subclasses__() %}{{ c.__init__.__globals__.os.system(COMMAND) }}{% endfor %}",
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


@pytest.mark.parametrize("template", ESCAPES)
def test_nothing_is_reached(template, tmp_path, monkeypatch):
    """Refused on trial; and should one run in this process all the same, the sandbox keeps it from what it reaches for."""
    made, secret = tmp_path / "made", tmp_path / "secret"
    secret.write_text("SECRET")
    monkeypatch.chdir(tmp_path)
    template = template.replace("COMMAND", f"'touch {made}'").replace(
        "FILE", f"'{secret.name if 'include' in template else made}'"
    )
    with pytest.raises(
        TemplateProblem, match="reaches for Python|wants other files|str' object is not callable"
    ):
        check_template(template, SPECIAL, "x")
    compiled = outcome(environment().from_string, template)
    for render in (
        lambda: compiled.render(messages=chats()[0]),
        lambda: tokenizer_of(template).apply_chat_template(chats()[0], tokenize=False),
    ):
        text = outcome(render)
        assert not re.search("SECRET|<class|<module|<built-in|uid=", text) and not made.exists()


def test_the_child_has_small_means():
    """Even a template out of the sandbox could write no file there, start no process and take no memory; and nothing heavy is imported."""
    look = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__'); import resource as r; print([r.getrlimit(x)[0] for x in (r.RLIMIT_FSIZE, r.RLIMIT_NPROC, r.RLIMIT_CORE, r.RLIMIT_AS)], [m for m in ('torch', 'transformers', 'numpy', 'kardia', 'click') if m in sys.modules])"
    request = {"template": "x", "special": {}, "seconds": 5, "path": [p for p in sys.path if p]}
    start = time.monotonic()
    said = subprocess.run(
        [sys.executable, "-I", "-c", look, chat_template.__file__],
        input=json.dumps(request),
        capture_output=True,
        text=True,
    ).stdout
    assert (
        said.splitlines()[0] == "null"
        and said.splitlines()[1].endswith("[]")
        and time.monotonic() - start < 4
    )  # 0.1 s alone
    if sys.platform == "linux":
        assert said.splitlines()[1] == f"[0, 0, 0, {chat_template.MEMORY}] []"


# ------------------------------------------------------------------------------------------------ in use


@pytest.mark.parametrize("family", LEGIT)
def test_templates_in_use_are_accepted_and_render_as_before(family):
    tokenizer = tokenizer_of(LEGIT[family])
    check_template(tokenizer.chat_template, tokenizer.special_tokens_map, family)
    compiled, rendered = environment().from_string(LEGIT[family]), 0
    for chat in chats():
        for options in OPTIONS:
            expected = outcome(tokenizer.apply_chat_template, chat, tokenize=False, **options)
            with limited(family):
                assert outcome(tokenizer.apply_chat_template, chat, tokenize=False, **options) == expected
            assert (
                outcome(compiled.render, messages=chat, tools=None, documents=None, **SPECIAL, **options)
                == expected
            )
            rendered += expected != "TemplateError"
        if family != "llama3.1" and expected != "TemplateError":  # a judge's template is told no date
            asked = tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            assert render_template(LEGIT[family], chat, "<s>", "</s>") == asked
    assert rendered >= 4


def test_the_families_own_templates_are_fit():
    """TRL brings the originals of some thirty families: none is refused, and each renders here as in transformers."""
    files = [
        f
        for f in sorted((Path(find_spec("trl").origin).parent / "chat_templates").glob("*.jinja"))
        if not f.stem.endswith("_training")
    ]
    if not files:
        pytest.skip("this TRL brings no templates")
    chat = chats()[3]
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert problem(text, SPECIAL) is None, file.name
        assert outcome(
            environment().from_string(text).render,
            messages=chat,
            tools=None,
            documents=None,
            **SPECIAL,
            **OPTIONS[0],
        ) == outcome(tokenizer_of(text).apply_chat_template, chat, tokenize=False, **OPTIONS[0]), file.name


def test_a_judge_is_told_no_date():
    text = render_template(LEGIT["llama3.1"], [{"role": "user", "content": "hi"}], "<s>", "</s>")
    assert text.startswith("<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024")


def test_each_of_several_named_templates_is_tried():
    check_template({"default": LEGIT["smollm2"], "tool_use": LEGIT["qwen2.5"]}, SPECIAL, "x")
    with pytest.raises(TemplateProblem, match="x: its chat template 'tool_use' reaches for Python"):
        check_template({"default": LEGIT["smollm2"], "tool_use": "{{ x.__class__ }}"}, SPECIAL, "x")
    with pytest.raises(TemplateProblem, match="'rag' is no text"):
        check_template({"rag": 7}, SPECIAL, "x")


def test_a_fit_template_is_tried_once(cache, monkeypatch):
    template = LEGIT["smollm2"] + "{# once #}"
    check_template(template, SPECIAL, "x")

    def no_child(*_, **__):
        raise AssertionError("a child was started")

    monkeypatch.setattr(chat_template.subprocess, "run", no_child)
    check_template(template, SPECIAL, "x")
    monkeypatch.setattr(chat_template, "_own_hash", lambda: b"other code")  # tried by other code, tried again
    with pytest.raises(AssertionError, match="a child was started"):
        check_template(template, SPECIAL, "x")
    assert list(cache.glob("template-*.ok")) and not any(
        file.stat().st_size for file in cache.glob("template-*.ok")
    )


# ------------------------------------------------------------------------------------------------ the watch


def test_a_template_that_hangs_on_one_text_is_stopped():
    tokenizer = tokenizer_of(hang_on("sesame"))
    check_template(tokenizer.chat_template, tokenizer.special_tokens_map, "x")
    start = time.monotonic()
    with pytest.raises(TemplateProblem, match=r"x: its chat template did not finish in 0.2 s"):
        with limited("x", 0.2):
            tokenizer.apply_chat_template([{"role": "user", "content": "open sesame"}], tokenize=False)
    assert time.monotonic() - start < 3 and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ messages[0].content * 10000000000 }}", "1 GB of memory"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurses"),
        ("{{ lipsum['__glo' ~ 'bals__'].os }}", "reaches for Python"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="memory is watched on Linux")
def test_other_harm_done_here_is_the_same_line(template, says):
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(TemplateProblem, match=says):
        with limited("x"):
            environment().from_string(template).render(messages=chats()[0])
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_judges_template_goes_the_same_way(rubric, monkeypatch):
    class Worker:
        def load(self, role, path, gpu_layers):
            return {"template": template, "bos_piece": "<s>", "eos_piece": "</s>", "bos": 1, "add_bos": False}

        def set_lora(self, role, lora):
            pass

    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    for template, says in (
        (LOOP, "did not finish in 0.5 s"),
        ("{{ ''.__class__ }}", "reaches for Python"),
        (hang_on("conversation"), "did not finish"),
        ("{{ messages[1].content.x }}", "cannot be rendered"),
    ):
        with pytest.raises(LlamaError, match=says) as error:
            Judge(Worker(), "judge.gguf", rubric)._template("User: hi\nListener:")
        assert "\n" not in str(error.value)


def test_somebody_elses_alarm_goes_on():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with limited("outer", 5):
            with limited("inner", 5):
                time.sleep(0.2)
            assert not rung and 4 < signal.getitimer(signal.ITIMER_REAL)[0] < 5  # the outer one watches on
        time.sleep(0.05)
        assert rung == [1]
        with pytest.raises(ZeroDivisionError), limited("x"):
            1 / 0
        with pytest.raises(TemplateProblem, match="outer"):
            with limited("outer", 0.05):
                with limited("inner", 5):
                    time.sleep(0.1)
                time.sleep(5)  # late, but it rings
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    finally:
        signal.signal(signal.SIGALRM, before)


def test_other_threads_are_left_alone():
    seen = []

    def render():
        with limited("x", 0.05):
            time.sleep(0.1)
            seen.append(signal.getitimer(signal.ITIMER_REAL)[0])

    thread = threading.Thread(target=render)
    thread.start()
    thread.join()
    assert seen == [0.0]


def test_the_watch_costs_microseconds():
    def once():
        start = time.perf_counter()
        for _ in range(500):
            with limited("x"):
                pass
        return (time.perf_counter() - start) / 500

    assert min(once() for _ in range(3)) < 300e-6  # 15 on an idle machine
