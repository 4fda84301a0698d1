"""Never trust an input: whatever a file or a model holds is accepted, or refused in the project's own short lines. No traceback,
no hang, no flood.

Values are drawn by hypothesis (the same ones in every run), bytes of real files are changed by seeded generators. Each case runs
under a limit of CPU time. What is valid must still be accepted, or refusing everything would pass.
"""

import functools
import io
import json
import random
import re
import signal
import struct
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_report import rollout, write_run

import kardia_lite as k
from kardia.cli import chat as chat_cli
from kardia.core.console import UserError, shorten
from kardia.data import rows
from kardia.data.importers import CSV_HEADER, ImportProblem, import_dataset
from kardia.data.rubric import DEFAULT_FORMAT
from kardia.export import formats, proof
from kardia.judge import exam
from kardia.llama import errors, gguf_header
from kardia.models import gguf as gguf_files
from kardia.models import gguf_tokenizer, weights
from kardia.models.weights import ExportError
from kardia.results import explain, plots, report, run_files, tables
from kardia.results.run_files import ReportError

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="POSIX timers")

OURS = (UserError, exam.ExamError, ExportError, errors.LlamaError, ImportProblem, ReportError, k.SpanError)
CASES = [0]


def fuzz(n):
    return settings(
        derandomize=True,
        database=None,
        deadline=timedelta(seconds=60),
        max_examples=n,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def limit(seconds):
    """More CPU time than this is a hang."""

    def stop(*_):
        raise AssertionError(f"still busy after {seconds} seconds of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def ask(function, *arguments, lines=1, seconds=10):
    """(result, None), or (None, the message) of a refusal: at most so many lines, each short and harmless to a terminal."""
    CASES[0] += 1
    with limit(seconds):
        try:
            return function(*arguments), None
        except OURS as error:
            message = str(error)
    assert message and message.count("\n") < lines and len(message) < 1200 * lines, message[:300]
    for line in message.split("\n"):
        assert len(line) < 1200 and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", line), line[
            :300
        ]
    return None, message


def refused(*arguments, **how):
    result, message = ask(*arguments, **how)
    assert message is not None, f"accepted: {shorten(result)}"
    return message


def accepted(*arguments, **how):
    result, message = ask(*arguments, **how)
    assert message is None, message
    return result


# ---------------------------------------------------------------------------------- what is put into files

NASTY = [
    "",
    " ",
    "\x00",
    "\x1b[31mred",
    "\x9b2J",
    "\u202etxet",
    "\ud800",
    "a\nb",
    "\u2028",
    "<script>alert(1)</script>",
    '" onload=x ',
    "../../x",
    "/etc/passwd",
    "-1",
    "NaN",
    "%s{}",
    "<|response_begin|>",
    "x" * 5000,
    "(a+)+$",
    "e\u0301" * 50,
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-10, 10),
    st.sampled_from([2**31, 2**63, 10**400, -1, 0]),
    st.floats(),
    st.sampled_from(NASTY),
    st.text(st.characters(exclude_categories=()), max_size=12),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["", "a", "role", "content", "\x1b[0m", "n", "mean"]), inner, max_size=3
        ),
    ),
    max_leaves=8,
)


def deep(n=900):
    """Lists in lists: deeper than Python prints."""
    return functools.reduce(lambda inner, _: [inner], range(n), "x")


def places(value, path=()):
    """The path of every value inside a value, itself first."""
    yield path
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from places(inner, (*path, key))


def put(value, path, new):
    """`value` with the thing at `path` replaced (`...`: taken out)."""
    if not path:
        return {} if new is ... else new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and new is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


@st.composite
def damaged(draw, value):
    """A valid value with one or two things in it replaced or taken out."""
    for _ in range(draw(st.integers(1, 2))):
        value = put(
            value, draw(st.sampled_from(list(places(value)))), draw(st.one_of(ANYTHING, st.just(...)))
        )
    return value


def mutated(data: bytes, seed: int, most: int | None = None) -> bytes:
    """Bytes flipped, replaced by telling numbers, taken out, put in twice or cut off, within the first `most`."""
    rng, data = random.Random(seed), bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, how = rng.randrange(max(1, min(len(data), most or len(data)))), rng.randrange(7)
        if how == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            data[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 9, 255, 2**16, 2**31 - 1, 2**32 - 1)))
        elif how == 2:
            data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**20, 2**32, 2**63 - 1, 2**64 - 1)))
        elif how == 3:
            del data[at : at + rng.randrange(1, 40)]
        elif how == 4:
            data[at:at] = data[at : at + rng.randrange(1, 200)]
        elif how == 5:
            data[at:at] = rng.choice(
                (
                    b"\x00",
                    b"\xff\xfe",
                    b"\xef\xbb\xbf",
                    b"\r",
                    b'"',
                    b"[" * 50,
                    b"{",
                    b"\\ud800",
                    b"NaN",
                    b"1e999",
                    b"9" * 40,
                    b"&a *a",
                    b"<<: ",
                    b"!!int ",
                )
            )
        else:
            data = data[: max(1, at)] if rng.random() < 0.3 else data
    return bytes(data)


# ---------------------------------------------------------------------------------- rows of text files

ANSWER = "<|understanding_begin|>u<|understanding_end|><|reasoning_begin|>r<|reasoning_end|><|emotion_begin|>sad<|emotion_end|><|response_begin|>p<|response_end|>"
ROW = {
    "person": "Ana, 9",
    "mbti": "ISFP",
    "emotion": "sad",
    "situation": "Her dog died.",
    "anon_username": "u",
    "messages": [{"role": "user", "content": "I miss him."}, {"role": "assistant", "content": ANSWER}],
}
PAIR = {
    "criterion": "safety",
    "better": "Call a doctor.",
    "worse": "Never mind.",
    "person": "Ana",
    "situation": "Ill.",
    "messages": [{"role": "user", "content": "I am ill."}],
}
SEEK = {
    "emotion_type": "sadness",
    "situation": "A dog died.",
    "dialog": [
        {"speaker": "seeker", "content": "I miss him."},
        {"speaker": "supporter", "content": "I see."},
    ],
}
SPOKEN = f"{CSV_HEADER}\nhit:0_conv:1,1,sad,A dog died.,1,I miss him_comma_ so.,5|5|5,\nhit:0_conv:1,2,sad,A dog died.,2,I see.,5|5|5,\n"


@pytest.fixture(scope="module")
def shipped():
    return k.load_rubric(k.HERE / "rubrics.yaml")


@pytest.fixture(scope="module")
def readers(shipped, tmp_path_factory):
    """{name: (a valid value, what reads a JSONL file of such)}."""
    labels, target = shipped.labels, tmp_path_factory.mktemp("imported") / "rows.jsonl"
    imported = lambda kind: lambda path: import_dataset(path, kind, target, labels).rows  # noqa: E731
    return {
        "rows": (ROW, lambda path: len(k.load_rows([path], shipped))),
        "pairs": (PAIR, lambda path: len(exam.load_pairs(path, ["safety"]))),
        "kardiabench": (ROW, imported("kardiabench")),
        "esconv": (SEEK, imported("esconv")),
    }


READERS = ("rows", "pairs", "kardiabench", "esconv")


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@fuzz(90)
def test_a_damaged_row_is_used_or_told(readers, tmp_path, name, data):
    valid, read = readers[name]
    value = data.draw(damaged(valid))
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(valid)}\n{json.dumps(value)}\n")
    rows, message = ask(read, path, lines=60)
    assert rows in (1, 2) if message is None else "rows.jsonl" in message


@pytest.mark.parametrize("name", READERS)
def test_damaged_bytes_of_rows(readers, tmp_path, name):
    valid, read = readers[name]
    whole = "".join(
        json.dumps({**valid, "situation": f"Number {i}: Zoë's dog."}, ensure_ascii=False) + "\n"
        for i in range(4)
    ).encode()
    told = set()
    for seed in range(90):
        (tmp_path / "rows.jsonl").write_bytes(mutated(whole, seed))
        told.add(ask(read, tmp_path / "rows.jsonl", lines=60)[1] is None)
    assert told == {True, False}  # some are harmless, some are not


def line(value, **more):
    return json.dumps({**value, **more}, ensure_ascii=False)


# bytes of a file made from a valid row `r` -> True: all of it is used, False: refused, None: either
FILES = {
    "plain": (lambda r: line(r).encode(), True),
    "BOM": (lambda r: b"\xef\xbb\xbf" + line(r).encode(), True),
    "CRLF": (lambda r: f"{line(r)}\r\n{line(r)}\r\n".encode(), True),
    "U+2028 inside a text ends no line": (lambda r: line(r, situation="a\u2028b").encode(), True),
    "UTF-16": (lambda r: line(r).encode("utf-16"), False),
    "UTF-16 without BOM": (lambda r: line(r).encode("utf-16-le"), False),
    "Latin-1": (lambda r: line(r, situation="Zoë").encode("latin-1"), False),
    "NUL bytes": (lambda r: b"\0" * 100 + line(r).encode(), False),
    "NUL in a text": (lambda r: line(r).encode().replace(b"dog", b"d\0g").replace(b"Ill", b"I\0l"), False),
    "NaN": (lambda r: line(r, situation=float("nan")).encode(), False),
    "Infinity": (lambda r: line(r, situation=float("-inf")).encode(), False),
    "a number beyond floats": (
        lambda r: line(r, situation=0).replace('"situation": 0', '"situation": 1e999').encode(),
        False,
    ),
    "half a surrogate pair": (lambda r: json.dumps({**r, "situation": "\ud83d"}).encode(), False),
    "a whole surrogate pair": (lambda r: json.dumps({**r, "situation": "\U0001f600"}).encode(), True),
    "an integer of 4,000 digits": (lambda r: line(r, situation=10**4000).encode(), False),
    "an integer of 400,000 digits": (lambda r: b'{"situation": ' + b"9" * 400_000 + b"}", False),
    "900 lists deep": (lambda r: line(r, messages=deep(), dialog=deep()).encode(), False),
    "900 lists deep in a text's place": (
        lambda r: line(r, criterion=deep(), situation=deep(), person=deep()).encode(),
        False,
    ),
    "a long list in a text's place": (
        lambda r: line(r, criterion=["x"] * 100_000, situation=["x"] * 100_000).encode(),
        False,
    ),
    "a long list for a person": (lambda r: line({**ROW, **r}, person=["x"] * 100_000).encode(), None),
    "100,000 lists deep": (lambda r: b"[" * 100_000, False),
    "100,000 objects deep": (lambda r: b'{"a":' * 100_000, False),
    "a text of 10 MB": (lambda r: line(r, situation="x" * 10_000_000).encode(), None),
    "a line of 10 MB": (lambda r: line(r).encode() + b" " * 10_000_000, True),
    "a line of 10 MB that is no JSON": (lambda r: b"x" * 10_000_000, False),
    "a list of 10 MB": (
        lambda r: line(r, messages=["x"] * 1_000_000, dialog=["x"] * 1_000_000).encode(),
        False,
    ),
    "100,000 open spans": (
        lambda r: line(
            r,
            messages=[
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "<|response_begin|>" * 100_000},
            ],
            emotion_type="?",
        ).encode(),
        False,
    ),
    "empty": (lambda r: b"", False),
    "blank lines": (lambda r: b"\n\n \n", False),
    "a list": (lambda r: b"[1, 2]", False),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("what", FILES)
def test_odd_files(readers, tmp_path, name, what):
    valid, read = readers[name]
    make, fine = FILES[what]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(make(valid))
    rows, message = ask(read, path, lines=60)
    if fine is not None and not (fine is False and name == "pairs" and rows):
        assert (message is None) == fine, message or rows


@pytest.mark.parametrize("seed", range(60))
def test_damaged_conversations(shipped, tmp_path, seed):
    """EmpatheticDialogues is no JSON: a table of its own."""
    path, target = tmp_path / "train.csv", tmp_path / "rows.jsonl"
    path.write_bytes(
        SPOKEN.encode()
        if seed == 0
        else SPOKEN.replace(",1,", "," + "9" * 5000 + ",", 1).encode()
        if seed == 1
        else mutated(SPOKEN.encode(), seed)
    )
    done, message = ask(lambda: import_dataset(path, "empatheticdialogues", target, shipped.labels).rows)
    assert seed or done == 1
    assert message or done == 1 and json.loads(target.read_text())["messages"]


# ---------------------------------------------------------------------------------- rubrics.yaml

RUBRIC = yaml.safe_load((k.HERE / "rubrics.yaml").read_text())
SMALL = {**RUBRIC, "criteria": RUBRIC["criteria"][:1], "emotions": {"sad": ["blue"], "glad": []}}


@given(value=damaged(SMALL))
@fuzz(150)
def test_a_damaged_rubric_is_used_or_told(tmp_path, value):
    path = tmp_path / "mine.yaml"
    try:
        text = yaml.safe_dump(value, allow_unicode=True)
        path.write_text(text)
    except (yaml.YAMLError, UnicodeEncodeError):
        return  # not to be written down
    found, message = ask(k.load_rubric, path)
    assert (
        "mine.yaml" in message
        if message
        else abs(sum(found.rewards.values()) - 1) < 1e-9 and all(c.description for c in found.criteria)
    )


def test_damaged_bytes_of_a_rubric(tmp_path):
    whole, path = yaml.safe_dump(SMALL, width=1000).encode(), tmp_path / "mine.yaml"
    path.write_bytes(whole)
    accepted(k.load_rubric, path)
    told = set()
    for seed in range(150):
        path.write_bytes(mutated(whole, seed))
        told.add(ask(k.load_rubric, path)[1] is None)
    assert told == {True, False}


LAUGHS = (
    "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghij", "bcdefghijk"))
    + "version: *k\n"
)
BOMBS = {
    "a billion laughs": LAUGHS,
    "a billion laughs in the rewards": "version: 1\n" + LAUGHS.replace("version: *k", "rewards: *k"),
    "merges of merges": "a: &a {x: 1}\n"
    + "".join(
        f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefghij", "bcdefghijk")
    ),
    "an alias of itself": "version: &a [*a]",
    "an anchor nobody uses": "version: &a 1",
    "numbers of base 60": "version: " + "1:" * 60_000 + "1",
    "a float of base 60": "version: " + "1:" * 60_000 + "1.5",
    "a hexadecimal number": "version: 0x" + "f" * 200_000,
    "a decimal number": "version: " + "9" * 5000,
    "200,000 lists deep": "[" * 200_000,
    "sequences in sequences": "- " * 100_000,
    "keys that are lists": "? [a, b]\n: c",
    "a python object": "!!python/object/apply:os.system ['true']",
    "a date that is none": "version: 2024-99-99",
    "tags without a value": "version: !!int ''",
    "a timestamp without one": "version: !!timestamp x",
    "an escape in a text": 'version: "\\e[31m"',
    "half a surrogate pair": 'version: "\\ud800"',
    "NaN": "version: .nan",
    "a large file": "#\n" * 600_000,
    "UTF-16": "version: 1".encode("utf-16"),
    "Latin-1": "version: ë".encode("latin-1"),
    "NUL": b"version: \0",
    "two documents": "version: 1\n---\nversion: 1\n",
    "nothing": "",
}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_bombs(tmp_path, name):
    path, text = tmp_path / "mine.yaml", BOMBS[name]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(k.load_rubric, path)
    assert "mine.yaml" in message and len(message) < 600
    if any(word in name for word in ("laughs", "merges", "alias", "anchor")):
        assert "anchors and aliases" in message
    if "base 60" in name or "hexadecimal" in name:
        assert "quotation marks" in message  # nobody computed it


def test_a_rubric_may_have_BOM_and_CRLF_and_its_description_must_be_a_text(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(SMALL).replace("\n", "\r\n").encode())
    assert accepted(k.load_rubric, path).labels["blue"] == "sad"
    for value in ({"a": 1}, 5, [], None, " "):
        path.write_text(yaml.safe_dump(put(SMALL, ("criteria", 0, "description"), value)))
        assert "criteria[0].description" in refused(k.load_rubric, path)
    path.write_text(yaml.safe_dump({**SMALL, "emotions": {f"label{i}": [f"word{i}"] for i in range(4000)}}))
    assert (
        len(accepted(k.load_rubric, path, seconds=20).labels) == 8000
    )  # each word is looked up, not searched for


# ---------------------------------------------------------------------------------- values shown in messages


@given(value=ANYTHING, width=st.integers(10, 100))
@fuzz(150)
def test_a_value_in_a_message_is_one_short_line(value, width):
    shown = accepted(shorten, value, width)
    assert len(shown) <= width and shown.isprintable()
    assert (
        not isinstance(value, str)
        or len(value) >= width
        or not value.isprintable()
        or shown == " ".join(value.split())
    )


@pytest.mark.parametrize(
    "value",
    [
        deep(),
        {"a": deep()},
        "x" * 10_000_000,
        list(range(10**6)),
        1 << 10**7,
        [1 << 10**7],
        b"x" * 10**6,
        {i: i for i in range(10**6)},
        {1, "a", None},
        float("nan"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_value_is_too_large_or_too_deep_to_show(value):
    shown = accepted(shorten, value, seconds=3)
    assert 0 < len(shown) <= 60 and shown.isprintable()


# ---------------------------------------------------------------------------------- spans

PIECES = [f"<|{name}_{side}|>" for name in (*DEFAULT_FORMAT.names, "other") for side in ("begin", "end")] + [
    "<|",
    "|>",
    "_begin|>",
    "<|response",
    " ",
    "\n",
    "x",
    "sad",
    "\x1b[0m",
    "<|response_begin_end|>",
]


@given(text=st.lists(st.sampled_from(PIECES), max_size=24).map("".join))
@fuzz(300)
def test_spans_of_any_text(text):
    spans, message = ask(k.parse_answer, text)
    assert message or set(spans) == set(DEFAULT_FORMAT.names) and all(spans.values())
    for name in DEFAULT_FORMAT.names:
        match = re.search(
            rf"<\|{name}_begin\|>(.*?)<\|{name}_end\|>", text, re.DOTALL
        )  # slow, and obviously right
        assert k.find_span(text, name) == (match[1].strip() if match else None)
    parts, end = [], 0
    for match in re.finditer(r"<\|(\w+)_begin\|>(.*?)<\|\1_end\|>", text, re.DOTALL):
        parts += [("", text[end : match.start()].strip()), (match[1], match[2].strip())]
        end = match.end()
    assert rows.split_spans(text) == [
        (name, piece) for name, piece in [*parts, ("", text[end:].strip())] if name or piece
    ]


@given(
    inner=st.lists(
        st.text(max_size=20).filter(lambda text: text.strip() and "<|" not in text), min_size=4, max_size=4
    ),
    space=st.sampled_from(["", "\n\n", " "]),
)
@fuzz(100)
def test_every_whole_answer_is_accepted(inner, space):
    text = space.join(
        f"<|{name}_begin|>{piece}<|{name}_end|>" for name, piece in zip(DEFAULT_FORMAT.names, inner)
    )
    assert accepted(k.parse_answer, text) == {
        name: piece.strip() for name, piece in zip(DEFAULT_FORMAT.names, inner)
    }


@pytest.mark.parametrize(
    "text",
    [
        "<|response_begin|>" * 100_000,
        ANSWER[:-1] * 10_000,
        "<|" * 500_000,
        "<|" + "a" * 10**6,
        ANSWER + " " * 10**7,
        "<|response_begin|>" + "x" * 10**7,
        "".join(f"<|s{i}_begin|>" for i in range(100_000)),
        "<|a_begin|>" * 50_000 + "<|a_end|>" * 50_000,
    ],
    ids=lambda text: f"{text[:12]!a} x {len(text)}",
)
def test_long_answers_take_no_time(text):
    ask(k.parse_answer, text, seconds=5)
    accepted(k.find_span, text, "response", seconds=5)
    accepted(rows.split_spans, text, seconds=5)
    accepted(chat_cli.coloured, text, DEFAULT_FORMAT, seconds=5)


# ---------------------------------------------------------------------------------- talking

HOSTILE = [
    "\x1b[31m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "\x9d8;;http://x\x9c",
    "\u202e",
    "\u2066",
    "\x00",
    "\r",
    "\x08",
    "\ud800",
    "hi ",
    "\n",
    *PIECES[:12],
]
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@given(pieces=st.lists(st.sampled_from(HOSTILE), max_size=16), cuts=st.lists(st.integers(0, 200), max_size=6))
@fuzz(150)
def test_no_escape_of_a_model_reaches_the_terminal(pieces, cuts):
    text, out, err = "".join(pieces), io.StringIO(), io.StringIO()

    def show():
        printer = chat_cli.Printer(DEFAULT_FORMAT)
        for cut in sorted(cut % (len(text) + 1) for cut in cuts):
            printer.feed(text[:cut])
        printer.close(text)

    with redirect_stdout(out), redirect_stderr(err):
        accepted(show)
    styles = re.compile(r"\x1b\[[02]m")  # ours: dim, and its end
    assert not UNPRINTABLE.search(styles.sub("", out.getvalue()) + styles.sub("", err.getvalue()))
    assert out.getvalue().endswith("\n")


class Mute:
    """An answerer that hears what is asked and says nothing."""

    renderer = type("R", (), {"form": DEFAULT_FORMAT})

    def answer(self, dialogues, *_, **__):
        self.asked = dialogues[0].messages[-1][1]
        return [""]


@given(
    text=st.lists(st.sampled_from([*HOSTILE, *PIECES, "<|respon", "se_begin|>"]), max_size=12).map("".join)
)
@fuzz(150)
def test_a_person_cannot_write_markers(text):
    mute = Mute()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        accepted(k.chat_turn, mute, k.Dialogue("", "", "", "", "", ()), text, 8, 0.0, 0)
    for said in (mute.asked, chat_cli.harmless(text)):
        assert not DEFAULT_FORMAT.marker.search(said) and not UNPRINTABLE.search(said)


def test_a_marker_inside_a_marker_leaves_none():
    for text in ("<|respon<|emotion_begin|>se_begin|>", "<|<|response_end|>response_begin|>"):
        assert not rows.MARKER.search(chat_cli.harmless(text))
    assert chat_cli.harmless("I said <3 | and <|x|>") == "I said <3 | and <|x|>"


# ---------------------------------------------------------------------------------- GGUF


def write_model(path, vocabulary=97, **changes):
    """A llama of two small layers as GGUF; `changes` of its header, None leaves a key out."""
    import gguf
    import numpy as np

    said = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 8,
        "vocab_size": vocabulary,
        **changes,
    }
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    for key, value in said.items():
        if value is not None:
            writer.add_uint32(f"llama.{key}", value) if isinstance(value, int) else writer.add_array(
                f"llama.{key}", value
            )
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(vocabulary - 3))])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([2, 3, 3] + [1] * (vocabulary - 3))
    for name, number in (("bos", 1), ("eos", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(number)
    shapes = {"token_embd": (vocabulary, 32), "output_norm": (32,)}
    for i in range(2):
        shapes |= {
            f"blk.{i}.attn_{letter}": shape
            for letter, shape in (
                ("norm", (32,)),
                ("q", (32, 32)),
                ("k", (16, 32)),
                ("v", (16, 32)),
                ("output", (32, 32)),
            )
        }
        shapes |= {
            f"blk.{i}.ffn_{part}": shape
            for part, shape in (("norm", (32,)), ("gate", (48, 32)), ("up", (48, 32)), ("down", (32, 48)))
        }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_all(path):
    """Everything that is read of a GGUF before a model is built."""
    gguf_header.check_gguf(path)
    gguf_files.check_sizes(path)
    return gguf_tokenizer.import_tokenizer(path)


def test_a_whole_gguf_is_imported(tmp_path):
    path = write_model(tmp_path / "whole.gguf")
    accepted(read_all, path)
    directory = accepted(gguf_files.import_gguf, path, tmp_path / "imported", seconds=60)
    assert json.loads((directory / "config.json").read_text())["num_hidden_layers"] == 2


LIES = {
    "block_count": [0, 1, 3, 10**6, 2**32 - 1],
    "embedding_length": [0, 31, 2**20],
    "feed_forward_length": [0, 47, 2**24],
    "attention.head_count": [0, 3, 8, 2**20],
    "attention.head_count_kv": [1, 4, 2**20],
    "rope.dimension_count": [4, 2**20],
    "vocab_size": [96, 10**6, 2**32 - 1],
    "context_length": [2**31],
    "expert_count": [4, 10**6],
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in LIES.items() for value in values])
def test_a_header_must_say_what_its_tensors_are(tmp_path, key, value):
    """transformers builds what the header says: a model of terabytes from a file of kilobytes."""
    path = write_model(tmp_path / "lie.gguf", **{key: value})
    message = refused(gguf_files.import_gguf, path, tmp_path / "imported", seconds=20)
    assert "damaged GGUF" in message and not (tmp_path / "imported").exists()


def test_lists_where_numbers_belong_and_missing_tensors(tmp_path):
    for key in ("block_count", "attention.head_count", "feed_forward_length"):
        ask(
            gguf_files.import_gguf,
            write_model(tmp_path / f"{key}.gguf", **{key: [2, 2]}),
            tmp_path / "imported",
            seconds=30,
        )
    data = write_model(tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "other.gguf").write_bytes(data.replace(b"blk.1.attn_q.weight", b"blk.1.attn_z.weight"))
    refused(
        gguf_files.import_gguf, tmp_path / "other.gguf", tmp_path / "imported", seconds=30
    )  # else its weights would be random numbers


def test_damaged_bytes_of_a_gguf(tmp_path):
    whole = write_model(tmp_path / "whole.gguf").read_bytes()
    header = whole.index(b"blk.1.ffn_down.weight") + 60
    path, told = tmp_path / "damaged.gguf", {True: 0, False: 0}
    for seed in range(400):
        path.write_bytes(mutated(whole, seed, header))
        weights._reader.cache_clear()
        fine = ask(read_all, path)[1] is None
        told[fine] += 1
        if fine and told[True] <= 12:
            ask(gguf_files.import_gguf, path, tmp_path / f"imported-{seed}", seconds=30)
    assert told[True] > 20 and told[False] > 200


def header(*pairs, tensors=0, version=3, more=b""):
    """The bytes of a GGUF with metadata (key, type, value's bytes)."""
    text = lambda name: struct.pack("<Q", len(name)) + name  # noqa: E731
    return (
        b"GGUF"
        + struct.pack("<IQQ", version, tensors, len(pairs))
        + b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in pairs)
        + more
    )


def tensor(dimensions=(32,), kind=0, offset=0, name=b"t"):
    return (
        struct.pack("<Q", len(name))
        + name
        + struct.pack("<I", len(dimensions))
        + b"".join(struct.pack("<Q", n) for n in dimensions)
        + struct.pack("<IQ", kind, offset)
    )


GGUFS = {
    "empty": b"",
    "the name only": b"GGUF",
    "another file": b"PK\x03\x04" * 20,
    "an old version": header(version=1, tensors=1, more=tensor()),
    "of the other byte order": header(version=3 << 24),
    "no tensors": header(),
    "alignment 0": header(
        (b"general.alignment", 4, struct.pack("<I", 0)), tensors=1, more=tensor() + bytes(200)
    ),
    "alignment 3": header(
        (b"general.alignment", 4, struct.pack("<I", 3)), tensors=1, more=tensor() + bytes(200)
    ),
    "arrays in arrays": header((b"a", 9, struct.pack("<IQ", 9, 1) * 5000)),
    "an array longer than the file": header((b"a", 9, struct.pack("<IQ", 8, 2**60))),
    "an array of 2^63 bytes": header((b"a", 9, struct.pack("<IQ", 0, 2**63))),
    "an unknown type": header((b"a", 77, b"")),
    "a text longer than the file": header((b"a", 8, struct.pack("<Q", 2**63))),
    "2^60 tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(10**6),
    "2^60 metadata": b"GGUF" + struct.pack("<IQQ", 3, 1, 2**60) + bytes(10**6),
    "2^64 elements, four times": header(tensors=1, more=tensor((2**64 - 1,) * 4)),
    "4 billion dimensions": header(
        tensors=1, more=struct.pack("<Q", 1) + b"t" + struct.pack("<I", 2**32 - 1)
    ),
    "an unknown tensor type": header(tensors=1, more=tensor(kind=999) + bytes(200)),
    "an offset beyond": header(tensors=1, more=tensor(offset=2**63) + bytes(200)),
    "tensors that share their bytes": header(
        tensors=64, more=b"".join(tensor((1000,), name=b"%d" % i) for i in range(64)) + bytes(5000)
    ),
}


@pytest.mark.parametrize("name", GGUFS)
def test_odd_ggufs(tmp_path, name):
    path = tmp_path / "odd.gguf"
    path.write_bytes(GGUFS[name])
    assert "odd.gguf" in refused(gguf_header.check_gguf, path, seconds=5)
    refused(weights.read_gguf, path, seconds=5)
    refused(gguf_files.import_gguf, path, tmp_path / "imported", seconds=5)


def test_what_is_no_file_is_no_gguf(tmp_path):
    (tmp_path / "directory.gguf").mkdir()
    (tmp_path / "link.gguf").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.gguf").symlink_to(tmp_path / "loop.gguf")
    for name in ("directory", "link", "loop", "absent"):
        refused(gguf_header.check_gguf, tmp_path / f"{name}.gguf")
    refused(gguf_header.check_gguf, Path("/dev/zero"))
    tiny = tmp_path / "tiny.gguf"
    tiny.write_bytes(header(tensors=1, more=tensor() + bytes(400)))
    accepted(gguf_header.check_gguf, tiny)
    refused(gguf_files.import_gguf, tiny, tmp_path / "imported")


# ---------------------------------------------------------------------------------- adapters

CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "use_rslora": False,
    "target_modules": ["q_proj"],
    "alpha_pattern": {},
    "rank_pattern": {},
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "megatron_core": "megatron.core",
}


def write_adapter(
    path,
    config=CONFIG,
    shapes=((4, 16), (8, 4)),
    modules=("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
    dtype=None,
):
    import torch
    from safetensors.torch import save_file

    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(
        {
            f"base_model.model.{module}.lora_{side}.weight": torch.ones(shape).to(dtype or torch.float32)
            for module in modules
            for side, shape in zip("AB", shapes)
        },
        path / "adapter_model.safetensors",
    )
    return path


def safe_adapter(path):
    config, pairs = weights.read_adapter(path)
    assert set(config) == {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}
    assert (
        type(config["r"]) is int
        and 0 < config["r"] <= 65536
        and 0 < config["lora_alpha"] <= 1e6
        and config["use_rslora"] in (True, False)
    )
    assert {*config["alpha_pattern"], *config["rank_pattern"]} <= set(pairs) == set(config["target_modules"])
    assert all(
        0 < weights.lora_scale(config, module, a.shape[0]) < float("inf") for module, (a, _) in pairs.items()
    )
    return config


def test_an_adapter_is_read_as_peft_reads_it(tmp_path):
    from peft.utils.other import get_pattern_key

    assert accepted(safe_adapter, write_adapter(tmp_path / "plain")) == {
        **{key: CONFIG[key] for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")},
        "target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"],
    }
    for pattern in (
        "q_proj",
        "layers.1.self_attn.q_proj",
        r"layers\.1\.self_attn\.q_proj",
        r"^model\.layers\.\d+\.self_attn\.q_proj",
        r"model.layers.[0-9].self_attn.q_proj$",
        "k_proj",
        "proj",
    ):
        found = accepted(
            safe_adapter, write_adapter(tmp_path / "patterned", {**CONFIG, "alpha_pattern": {pattern: 3}})
        )
        theirs = {
            module for module in found["target_modules"] if get_pattern_key([pattern], module) == pattern
        }
        assert set(found["alpha_pattern"]) == theirs, pattern


@given(config=damaged({**CONFIG, "alpha_pattern": {"q_proj": 2.0}, "init_lora_weights": True}))
@fuzz(200)
def test_a_damaged_adapter_config_is_safe_or_told(tmp_path, config):
    path = tmp_path / "adapter"
    if not path.exists():
        write_adapter(path)
    (path / "adapter_config.json").write_text(json.dumps(config))
    ask(safe_adapter, path)


def test_damaged_bytes_of_an_adapter(tmp_path):
    path = write_adapter(tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        whole, told = (path / name).read_bytes(), set()
        for seed in range(120):
            (path / name).write_bytes(mutated(whole, seed, 600))
            told.add(ask(safe_adapter, path)[1] is None)
        (path / name).write_bytes(whole)
        assert told == {True, False}


ADAPTERS = {
    "r as text": {"r": "16"},
    "r as bool": {"r": True},
    "r NaN": {"r": float("nan")},
    "r infinite": {"r": float("inf")},
    "r 1e300": {"r": 1e300},
    "r half": {"r": 4.5},
    "r 0": {"r": 0},
    "r negative": {"r": -4},
    "r huge": {"r": 10**400},
    "r a billion": {"r": 10**9},
    "alpha NaN": {"lora_alpha": float("nan")},
    "alpha infinite": {"lora_alpha": float("inf")},
    "alpha as bool": {"lora_alpha": True},
    "alpha 0": {"lora_alpha": 0},
    "alpha 1e300": {"lora_alpha": 1e300},
    "alpha huge": {"lora_alpha": 10**400},
    "alpha_pattern a list": {"alpha_pattern": ["q_proj"]},
    "alpha_pattern a text": {"alpha_pattern": "q_proj"},
    "alpha NaN in a pattern": {"alpha_pattern": {"q_proj": float("nan")}},
    "a regular expression without end": {"alpha_pattern": {"(a+)+$": 1}},
    "alternatives": {"alpha_pattern": {"(.*|x)*q": 1}},
    "stars": {"alpha_pattern": {".*" * 30 + "x": 1}},
    "many numbers": {"alpha_pattern": {r"\d+" * 30 + "x": 1}},
    "a broken pattern": {"alpha_pattern": {"(": 1}},
    "a long pattern": {"alpha_pattern": {"a" * 10**6: 1}},
    "a module by name": {"megatron_config": {"a": 1}, "megatron_core": "os"},
    "another kind": {"peft_type": "IA3"},
    "a kind without end": {"peft_type": "x" * 10**6},
    "biases": {"bias": ["x" * 10**6]},
    "PiSSA": {"init_lora_weights": "PiSSA_niter_4"},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_odd_adapter_configs(tmp_path, name):
    path = write_adapter(tmp_path / "adapter", {**CONFIG, **ADAPTERS[name]})
    assert len(refused(safe_adapter, path, seconds=5)) < 600


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "null",
        '"LORA"',
        "NaN",
        "[" * 100_000,
        '{"r": ' + "9" * 5000 + "}",
        "{" + " " * 2_000_000 + "}",
        "\ud7ff",
        '{"peft_type": "LORA"',
    ],
    ids=lambda text: f"{text[:12]!a} x {len(text)}",
)
def test_what_is_no_adapter_config(tmp_path, text):
    refused(safe_adapter, write_adapter(tmp_path / "adapter", text))


def test_what_cannot_harm_is_ignored(tmp_path):
    for more in (
        {"target_modules": "(a+)+$"},
        {"rank_pattern": {"(a+)+$": 5}},
        {"auto_mapping": {"parent_library": "os", "base_model_class": "system"}},
        {"layers_pattern": "(x*)*"},
        {"alpha_pattern": None},
        {"base_model_name_or_path": "../../x"},
    ):
        accepted(safe_adapter, write_adapter(tmp_path / "adapter", {**CONFIG, **more}))


def test_tensors_that_are_no_lora(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    for i, how in enumerate(
        [
            {"shapes": ((0, 16), (8, 0))},
            {"shapes": ((4,), (8, 4))},
            {"shapes": ((4, 16), (8, 5))},
            {"modules": ()},
            {"modules": ("a" * 100,)},
            {"modules": ("a b",)},
            {"modules": ("x.1234567.q",)},
            {"modules": ("a" * 10**6,)},
            {"dtype": torch.int64},
            {"dtype": torch.bool},
            {"dtype": torch.float8_e4m3fn},
            {"dtype": torch.complex64},
        ]
    ):
        assert len(refused(safe_adapter, write_adapter(tmp_path / f"a{i}", **how))) < 600
    assert (
        accepted(safe_adapter, write_adapter(tmp_path / "half", dtype=torch.float16))
        and accepted(safe_adapter, write_adapter(tmp_path / "other", {**CONFIG, "r": 7}))["rank_pattern"]
    )
    path = write_adapter(tmp_path / "large")
    tensors = load_file(path / "adapter_model.safetensors")
    save_file(
        {name: tensor.double() * 1e300 for name, tensor in tensors.items()},
        path / "adapter_model.safetensors",
    )
    assert "NaN or infinite" in refused(safe_adapter, path)
    save_file(
        {**tensors, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 16)},
        path / "adapter_model.safetensors",
    )
    refused(safe_adapter, path)  # one module twice


def test_pickles_and_links(tmp_path):
    path = write_adapter(tmp_path / "adapter")
    for name in ("adapter_model.bin", "adapter_model.pt", "adapter_model-00001-of-00002.bin"):
        (path / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        accepted(safe_adapter, path)  # beside good weights: never looked at
        (path / "adapter_model.safetensors").rename(tmp_path / "aside")
        assert "pickle" in refused(safe_adapter, path)
        (tmp_path / "aside").rename(path / "adapter_model.safetensors")
        (path / name).unlink()
    (path / "adapter_model.safetensors").rename(tmp_path / "blob")
    (path / "adapter_model.safetensors").symlink_to(tmp_path / "blob")  # as the hub's cache does
    accepted(safe_adapter, path)
    for target in ("/dev/zero", tmp_path / "nowhere", tmp_path, "adapter_model.safetensors"):
        (path / "adapter_model.safetensors").unlink()
        (path / "adapter_model.safetensors").symlink_to(target)
        refused(safe_adapter, path)
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.bin").write_bytes(b"x")
    assert "pickle" in refused(safe_adapter, path)


@pytest.mark.parametrize(
    "found",
    [
        "../../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        ".safetensors",
        "x.bin",
        5,
        None,
        ["model.safetensors"],
        "x\n.safetensors",
        "a\\..\\b.safetensors",
    ],
)
def test_an_index_names_files_beside_it(tmp_path, found):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": found}}))
    (tmp_path.parent / "x.safetensors").write_bytes(b"")
    assert "weight_map" in refused(weights.shards, tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "[" * 100_000, b"\xff\xfe"],
    ids=lambda text: f"{text[:12]!a} x {len(text)}",
)
def test_a_damaged_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_bytes(
        text if isinstance(text, bytes) else text.encode()
    )
    assert "index.json: damaged" in refused(weights.shards, tmp_path)


def test_an_index_of_files_that_are_there(tmp_path):
    write_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"absent": "model-00001-of-00001.safetensors"}})
    )
    assert set(accepted(weights.shards, tmp_path)) == {"absent"}
    assert "damaged" in refused(weights.Weights(tmp_path).shape, "absent")


# ---------------------------------------------------------------------------------- the book of an export

IDENTITY = {"adapter": "a", "base": "b", "bits": 16, "llama_cpp": False}
ENTRY = {
    "format": "f16",
    "kl": 1e-6,
    "kl_base": 0.1,
    "kept": 1.0,
    "agreement": 1.0,
    "same_tokens": 1.0,
    "answers": ["hi"],
    "verdict": "ok",
    "why": "",
    "ok": True,
    "valid": 1.0,
    "rubric": 0.5,
    "seconds": 1.0,
    "file": "m-f16.gguf",
    "path": "out/m-f16.gguf",
    "loader": "llama.cpp",
    "bytes": 10,
}
BOOK = {
    "identity": IDENTITY,
    "run": "runs/grpo",
    "formats": {
        "f16": ENTRY,
        "lora gguf": {**ENTRY, "kl_on_template": 0.1, "verdict": "noisy"},
        "modelfile": {
            "format": "modelfile",
            "file": "Modelfile",
            "path": "x",
            "loader": "text",
            "bytes": 9,
            "verdict": "text",
            "ok": True,
            "why": "",
        },
    },
    "trained": {"answers": ["hi"], "valid": 1.0, "rubric": 0.4},
}


def use_book(target):
    book = formats.book_of(target, IDENTITY)
    for entry in book["formats"].values():
        assert (target / entry["file"]).parent == target
    return tables.export_table(book), proof.advice(book, target), formats.best_gguf(book, target)


@given(book=damaged(BOOK))
@fuzz(200)
def test_a_damaged_book_is_used_or_told(tmp_path, book):
    (tmp_path / "export.json").write_text(json.dumps(book))
    (tmp_path / "m-f16.gguf").write_bytes(b"x")
    found, message = ask(use_book, tmp_path)
    assert message or (not UNPRINTABLE.search(found[0]) and found[2] in (None, tmp_path / "m-f16.gguf"))


def test_a_book_is_read_and_its_paths_cannot_escape(tmp_path):
    (tmp_path / "m-f16.gguf").write_bytes(b"x")
    (tmp_path / "export.json").write_text(json.dumps(BOOK))
    assert accepted(use_book, tmp_path)[2] == tmp_path / "m-f16.gguf"
    for file in ("../../x", "/etc/passwd", "a/b", "..", ".", "", "-\n", ".part", "x\0", "x" * 5000):
        (tmp_path / "export.json").write_text(json.dumps(put(BOOK, ("formats", "f16", "file"), file)))
        assert "export.json: damaged" in refused(use_book, tmp_path)
    for text in ("", "[]", "[" * 100_000, '{"identity": {}, "formats": []}', "9" * 5000):
        (tmp_path / "export.json").write_text(text)
        refused(use_book, tmp_path)


# ---------------------------------------------------------------------------------- a run's directory

TOKENS = {
    "step": 1,
    "group": 0,
    "sample": 0,
    "tokens": ["I", " am", " here"],
    "before": [-1.0, -2.0, -0.5],
    "after": [-0.5, -2.5, -0.5],
    "epsilon": 0.2,
}
SCORES = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
METHODS = {"ask": {"correct": 5, "accuracy": 0.5, "low": 0.2, "high": 0.8}}
CRITERION = {
    "method": "ask",
    "correct": 5,
    "n": 10,
    "accuracy": 0.5,
    "low": 0.2,
    "high": 0.8,
    "length_baseline": 0.6,
    "fit": False,
    "why": "not above chance",
    "weight": 1.0,
    "methods": METHODS,
    "length": {"longer_better": {"n": 5, "accuracy": 0.5}},
    "held_out": {"text": "Is it kind?", "accuracy": 0.6, "low": 0.4, "high": 0.7},
}
EXAM = {
    "judge": "tiny",
    "lora": "lora.gguf",
    "pairs": 10,
    "scores_per_second": 5.0,
    "criteria": {"empathy": CRITERION},
    "overall": {"accuracy": 0.5, "low": 0.2, "high": 0.8, "length_baseline": 0.6},
    "canaries": {"n": 8, "held": 7, "refused": 4, "held_with_guards": 8, "failed": {"begs": ["empathy"]}},
    "repeatability": {"largest_difference": 0.0},
}
FILES_OF_A_RUN = {
    "run.json": {
        "command": "grpo",
        "base": "/models/tiny",
        "model": "tiny",
        "bits": 16,
        "status": "done",
        "parent": "runs/sft",
        "machine": "2 x CPU",
        "seconds": 60.0,
        "peak_memory_gb": 2.0,
        "peak_memory_of": "all",
        "rollout": "llama",
        "options": {"group_size": 2, "data": "d.jsonl"},
        "versions": {"torch": "2"},
        "hashes": {"data": "abc"},
        "memory_plan": {"base weights": 1.0},
        "dropped_criteria": ["fluency"],
        "judge_exam": EXAM,
        "form": {
            "spans": ["understanding", "response"],
            "label": "emotion",
            "reply": "response",
            "hints": ["a", "b"],
            "system": "s",
        },
        "reward_trend": {
            "slope_per_step": 0.01,
            "low": -0.1,
            "high": 0.1,
            "first_quarter": 0.4,
            "last_quarter": 0.6,
            "steps": 8,
        },
    },
    "log.jsonl": [
        {
            "step": step,
            "reward": 0.1 * step,
            "rewards/format/mean": 0.5,
            "criteria/empathy": 0.5,
            "entropy": 1.0,
            "frac_reward_zero_std": 0.1,
            "completions/mean_length": 20.0,
        }
        for step in range(1, 9)
    ],
    "completions.jsonl": [
        rollout(
            1 + i // 2,
            i % 2,
            0.3 + 0.05 * i,
            0.5 - i % 2,
            completion=ANSWER,
            held_out={"empathy": 0.4},
            refused="begs" if i == 3 else None,
            logprob_after=-0.9,
        )
        for i in range(16)
    ],
    "tokens.jsonl": [TOKENS, {**TOKENS, "sample": 1}],
    "evaluation.json": {
        "models": ["base", "sft"],
        "prompts": 9,
        "judge": "tiny",
        "metrics": {"base": {"format": SCORES}, "sft": {"format": SCORES}},
        "differences": [{"better": "sft", "than": "base", "metric": "format", **SCORES}],
        "win_rate": [{"model": "sft", "against": "base", "rate": 0.7, "ties": 1, **SCORES}],
        "examples": [
            {
                "person": "Mara",
                "situation": "s",
                "messages": [{"role": "user", "content": "Hello."}],
                "answers": {
                    "base": {
                        "text": ANSWER,
                        "valid": False,
                        "problem": "no spans",
                        "scores": {"empathy": 0.5},
                    }
                },
            }
        ],
    },
    "export.json": BOOK,
}


def put_run(path, files=FILES_OF_A_RUN):
    path.mkdir(exist_ok=True)
    for name, value in files.items():
        text = (
            "".join(json.dumps(row) + "\n" for row in value)
            if name.endswith("l") and isinstance(value, list)
            else json.dumps(value)
        )
        (path / name).write_text(text)
    return path


class Page(HTMLParser):
    """What a browser would make of a page; asserts that nothing in it acts or loads."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.words, self.style, self.inside = [], [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.inside = tag if tag == "style" else self.inside
        assert re.fullmatch(
            "html|head|meta|title|style|body|h[1-4]|nav|a|main|section|p|b|i|em|small|br|div|span|code|ul|li|dl|dt|dd|aside|details|summary|article|header|figure|figcaption|svg|path|table|thead|tbody|tr|th|td",
            tag,
        ), tag
        for name, value in attributes:
            assert not name.startswith("on") and name not in (
                "src",
                "srcset",
                "srcdoc",
                "action",
                "formaction",
                "background",
                "data",
                "poster",
                "ping",
                "xlink:href",
            ), (tag, name)
            assert name != "href" or value.startswith("#"), value
            assert name != "style" or re.fullmatch(
                r"(?:left|right|top|width):[\d.-]+%(?:;(?:left|right|top|width):[\d.-]+%)*", value
            ), value
            assert name != "http-equiv" or value == "Content-Security-Policy"

    def handle_endtag(self, tag):
        self.inside = None if tag == "style" else self.inside

    def handle_data(self, data):
        (self.style if self.inside else self.words).append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data[:50]}")

    unknown_decl = handle_pi = handle_comment


def told(path, out):
    """What is told of a run: the page and the words of `explain`. Every refusal but one's own is a failure."""
    page = report.write_report([path], out).read_text(encoding="utf-8")
    seen = Page(page)
    assert "".join(seen.style) == plots.STYLE and len(page) < 3_000_000
    try:
        text = explain.explain(path)
    except ReportError:
        text = ""
    assert all(c.isprintable() or c == "\n" for c in text) and len(text) < 2_000_000
    return "".join(seen.words), text


@given(data=st.data())
@fuzz(150)
def test_a_damaged_run_is_told_or_refused(tmp_path, data):
    name = data.draw(st.sampled_from(sorted(FILES_OF_A_RUN)))
    path = put_run(tmp_path / "run", {**FILES_OF_A_RUN, name: data.draw(damaged(FILES_OF_A_RUN[name]))})
    found, message = ask(told, path, tmp_path / "report.html")
    assert message or "Options, versions, hashes" in found[0] or name == "run.json"


def test_damaged_bytes_of_a_run(tmp_path):
    path = put_run(tmp_path / "run")
    seen = set()
    for name in FILES_OF_A_RUN:
        whole = (path / name).read_bytes()
        for seed in range(25):
            (path / name).write_bytes(mutated(whole, seed))
            seen.add(ask(told, path, tmp_path / "report.html")[1] is None)
        (path / name).write_bytes(whole)
    assert seen == {True, False}


EVIL = """<script>alert("x")</script><img src=x onerror=alert(1)>"onload="x' onfocus='x</style></title><!--<a href="javascript:x">\x1b[31m\x9b2J\u202e]]>&lt;"""
SEEN = EVIL.replace("\x1b", " ").replace("\x9b", " ").replace("\u202e", " ")


def planted(value, evil, keys=True):
    """`value` with `evil` in place of every text, and of the names of what a run may name as it likes."""
    fixed = {
        *FILES_OF_A_RUN["run.json"],
        *CRITERION,
        *EXAM,
        *BOOK,
        *ENTRY,
        *TOKENS,
        *FILES_OF_A_RUN["evaluation.json"],
        *rollout(),
        *SCORES,
        *FILES_OF_A_RUN["log.jsonl"][0],
        "content",
        "answers",
        "text",
        "problem",
        "scores",
        "better",
        "than",
        "metric",
        "model",
        "against",
        "rate",
        "ties",
        "spans",
        "label",
        "reply",
        "held_out",
        "accuracy",
        "longer_better",
        "failed",
        "largest_difference",
        "held",
        "held_with_guards",
        "refused",
        "low",
        "high",
        "slope_per_step",
        "steps",
        "first_quarter",
        "last_quarter",
        "logprob_after",
        "overall",
        "messages",
        "role",
    }
    if isinstance(value, dict):
        return {key if key in fixed else evil: planted(inner, evil) for key, inner in value.items()}
    if isinstance(value, list):
        return [planted(inner, evil) for inner in value]
    return evil if isinstance(value, str) else value


def test_nothing_planted_in_a_run_acts(tmp_path):
    files = {name: planted(value, EVIL) for name, value in FILES_OF_A_RUN.items()}
    for row in files["completions.jsonl"]:
        row["components"], row["weights"] = {"format": 1.0, EVIL: row["reward"]}, {"format": 0.1, EVIL: 0.9}
        row["completion"] = f"{EVIL}<|response_begin|>{EVIL}<|response_end|>"
    files["log.jsonl"] = [
        {**row, f"rewards/{EVIL}/mean": 0.5, f"criteria/{EVIL}": 0.5} for row in files["log.jsonl"]
    ]
    files["run.json"]["command"] = "grpo"
    words, text = accepted(
        told, put_run(tmp_path / '<img src=x onerror="x">', files), tmp_path / "report.html", seconds=30
    )
    assert words.count(SEEN) > 60 and "<img src=x onerror" in words
    assert text.count("<script>alert") > 10 and "STEP" in text and "TOKENS" in text


@pytest.mark.parametrize(
    "evil",
    [
        "x" * 10_000_000,
        "<|response_begin|>" * 3000,
        "-" * 200_000,
        "\n" * 200_000,
        "<&>\"'" * 200_000,
        "\ud800",
        "e\u0301" * 100_000,
    ],
    ids=lambda evil: f"{evil[:5]!a} x {len(evil)}",
)
def test_long_texts_everywhere(tmp_path, evil):
    """One at a time is enough: ten megabytes in every text would be a directory of gigabytes."""
    files = {
        name: planted(value, evil if len(evil) < 1000 else evil[: 20_000 if name.endswith("l") else 2000])
        for name, value in FILES_OF_A_RUN.items()
    }
    files["completions.jsonl"][0]["completion"] = files["run.json"]["machine"] = files["tokens.jsonl"][0][
        "tokens"
    ][0] = evil
    files["run.json"]["command"], files["completions.jsonl"] = "grpo", files["completions.jsonl"][:4]
    words, text = accepted(told, put_run(tmp_path / "run", files), tmp_path / "report.html", seconds=30)
    assert "Groups, reply by reply" in words and "STEP" in text


NUMBERS = [
    float("nan"),
    float("inf"),
    -float("inf"),
    1e300,
    -1e300,
    5e-324,
    10**400,
    0,
    -1,
    True,
    1e15,
    0.1 + 1e-17,
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: shorten(number, 24))
def test_odd_numbers_everywhere(tmp_path, number):
    swap = lambda value: (
        {key: swap(inner) for key, inner in value.items()}
        if isinstance(value, dict)
        else [swap(v) for v in value]
        if isinstance(value, list)
        else number
        if isinstance(value, float)
        else value
    )  # noqa: E731
    words, text = accepted(
        told, put_run(tmp_path / "run", swap(FILES_OF_A_RUN)), tmp_path / "report.html", seconds=30
    )
    assert "NaN" not in words and "inf" not in re.findall(r"\b\w+\b", words) and "STEP" in text


@pytest.mark.parametrize("epsilon", [0, 1, -1, 5, 1e9, "x", None])
def test_an_odd_clip_range(tmp_path, epsilon):
    path = put_run(
        tmp_path / "run",
        {**FILES_OF_A_RUN, "tokens.jsonl": [{**TOKENS, "sample": i, "epsilon": epsilon} for i in (0, 1)]},
    )
    assert "CLIP: min(r A, clip(r, 0.8, 1.2) A)" in accepted(told, path, tmp_path / "report.html")[1]


@pytest.mark.parametrize(
    "values", [(0.3, 0.30000000000000004), (1e15, 1e15 + 0.125), (0.0, 5e-324), (-1e14, 1e14), (1e-13, 2e-13)]
)
def test_a_chart_of_any_numbers_has_a_scale(values):
    found = plots.ticks(*values)
    assert (
        2 <= len(found) <= 7
        and found == sorted(set(found))
        and found[0] <= values[0] + 1e-9
        and found[-1] >= values[1] - 1e-9
    )
    assert "<svg" in accepted(plots.chart, "x", [plots.Curve("r0 l0", "", list(enumerate(values * 3)))])


@pytest.mark.parametrize("name", FILES_OF_A_RUN)
@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b"\xff\xfe{\0}\0",
        b"\0" * 100,
        b'"x"',
        json.dumps({"a": deep()}).encode(),
        b'{"a": "\\ud800"}',
        b"\xef\xbb\xbf{}",
        b"{}\r\n",
    ],
    ids=lambda content: repr(content[:8]),
)
def test_odd_files_of_a_run(tmp_path, name, content):
    path = put_run(tmp_path / "run")
    (path / name).write_bytes(content + b"\n" + content)
    message = ask(told, path, tmp_path / "report.html")[1]
    assert message is None or f"run/{name}" in message


def test_records_without_end(tmp_path):
    """A thousand names, a hundred thousand items: more than a run ever writes, and no reason to hang."""
    names = {f"name{i}": 0.5 for i in range(3000)}
    rows = [
        rollout(step, i, 0.1 * i, criteria=names, components=names, weights=names, held_out=names)
        for step in (1, 2)
        for i in range(2)
    ]
    differences = [{"better": f"a{i}", "than": "b", "metric": f"m{i}", **SCORES} for i in range(20_000)]
    path = write_run(
        tmp_path / "run",
        rows,
        log=[{"step": s, **{f"criteria/{name}": 0.5 for name in names}} for s in range(1, 4)],
        evaluation={"metrics": {f"m{i}": {f"k{i}": SCORES} for i in range(3000)}, "differences": differences},
    )
    ask(told, path, tmp_path / "report.html", seconds=60)
    crowd = write_run(tmp_path / "crowd", [rollout(1, i) for i in range(3000)])
    assert "group of 3000 samples" in refused(explain.explain, crowd)
    steps = write_run(tmp_path / "steps", [rollout(2 * i) for i in range(5000)])
    assert "it has 0, 2, 4" in refused(explain.explain, steps, 3)


def test_what_is_no_file_of_a_run(tmp_path):
    path = put_run(tmp_path / "run")
    for name, target in (
        ("log.jsonl", "/dev/zero"),
        ("tokens.jsonl", tmp_path),
        ("exam.json", tmp_path / "nowhere"),
    ):
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(target)
    assert (
        "Options, versions, hashes" in accepted(told, path, tmp_path / "report.html")[0]
    )  # as if they were not there
    refused(run_files.read_run, tmp_path / "run" / "run.json")


def test_two_thousand_cases(request):
    here = [item for item in request.session.items if item.fspath == request.fspath]
    if len(here) < 300:
        pytest.skip("only with all of this file's tests")
    print(f"{CASES[0]} cases")
    assert CASES[0] >= 2000
