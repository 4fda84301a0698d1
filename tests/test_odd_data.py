"""Odd data files: a row is used, refused in short lines that name the place, or skipped and counted.

No traceback, no hang, no flood. What is valid must still be accepted, or refusing everything would pass.
"""

import functools
import json
import re
import time

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import kardia_lite as k
from kardia.core.console import UserError
from kardia.data import rows
from kardia.data.importers import CSV_HEADER, import_dataset

ANSWER = k.render_answer({"understanding": "u", "reasoning": "r", "emotion": "sad", "response": "p"})
TURNS = [{"role": "user", "content": "I miss him."}, {"role": "assistant", "content": ANSWER}]
ROW = {"person": "Ana, 9", "mbti": "ISFP", "emotion": "sad", "situation": "A dog died.", "messages": TURNS}
TALK = [{"speaker": "seeker", "content": "I miss him."}, {"speaker": "supporter", "content": "Oh."}]
SEEK = {"emotion_type": "sadness", "situation": "A dog died.", "dialog": TALK}
SPOKEN = f"{CSV_HEADER}\nhit:0_conv:1,1,sad,A dog died.,1,I miss him_comma_ so.,5|5|5,\n"
READERS = {"rows": ROW, "kardiabench": ROW, "esconv": SEEK}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def read(name, path, rubric):
    """(rows, None), or (0, the refusal), which names the file, is short, and is harmless to a terminal."""
    began = time.process_time()
    target = path.parent / "imported" / "rows.jsonl"
    try:
        if name == "rows":
            return len(k.load_rows([path], rubric)), None
        return import_dataset(path, name, target, rubric.labels).rows, None
    except UserError as error:
        message = str(error)
        lines = message.split("\n")
        assert path.name in message and len(lines) < 60, message[:300]
        assert all(len(line) < 1200 and not CONTROL.search(line) for line in lines), message[:300]
        return 0, message
    finally:
        assert time.process_time() - began < 10
        assert not list(path.parent.glob("imported/.*"))


def deep(n=900):
    """Lists in lists: deeper than Python prints."""
    return functools.reduce(lambda inner, _: [inner], range(n), "x")


def line(value, **more):
    return json.dumps({**value, **more}, ensure_ascii=False)


def spans(text):
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]
    return {"messages": turns, "emotion_type": "?"}


# what stands in a file made from a valid row `r`, and whether it is used (None: either)
FILES = {
    "plain": (lambda r: line(r).encode(), True),
    "BOM": (lambda r: b"\xef\xbb\xbf" + line(r).encode(), True),
    "CRLF": (lambda r: f"{line(r)}\r\n{line(r)}\r\n".encode(), True),
    "U+2028 inside a text ends no line": (lambda r: line(r, situation="a\u2028b").encode(), True),
    "a whole surrogate pair": (lambda r: json.dumps({**r, "situation": "\U0001f600"}).encode(), True),
    "a key twice": (lambda r: line(r).encode()[:-1] + b', "situation": "The last one counts."}', True),
    "a line of 3 MB": (lambda r: line(r).encode() + b" " * 3_000_000, True),
    "a text of 10 MB": (lambda r: line(r, situation="x" * 10_000_000).encode(), None),
    "UTF-16": (lambda r: line(r).encode("utf-16"), False),
    "UTF-16 without BOM": (lambda r: line(r).encode("utf-16-le"), False),
    "Latin-1": (lambda r: line(r, situation="Zoë").encode("latin-1"), False),
    "NUL bytes": (lambda r: b"\0" * 100 + line(r).encode(), False),
    "NUL in a text": (lambda r: line(r).encode().replace(b"dog", b"d\0g"), False),
    "NaN": (lambda r: line(r, situation=float("nan")).encode(), False),
    "a number beyond floats": (lambda r: line(r, situation=0).replace(": 0", ": 1e999").encode(), False),
    "half a surrogate pair": (lambda r: json.dumps({**r, "situation": "\ud83d"}).encode(), False),
    "an integer of 4,000 digits": (lambda r: line(r, situation=10**4000).encode(), False),
    "an integer of 400,000 digits": (lambda r: b'{"situation": ' + b"9" * 400_000 + b"}", False),
    "900 lists deep": (lambda r: line(r, messages=deep(), dialog=deep()).encode(), False),
    "900 lists deep in a text's place": (lambda r: line(r, situation=deep(), person=deep()).encode(), False),
    "a long list in a text's place": (lambda r: line(r, situation=["x"] * 100_000).encode(), False),
    "100,000 lists deep": (lambda r: b"[" * 100_000, False),
    "100,000 objects deep": (lambda r: b'{"a":' * 100_000, False),
    "10 MB that are no JSON": (lambda r: b"x" * 10_000_000, False),
    "a list of 3 MB": (lambda r: line(r, messages=["x"] * 600_000, dialog=["x"] * 600_000).encode(), False),
    "100,000 open spans": (lambda r: line(r, **spans("<|response_begin|>" * 100_000)).encode(), False),
    "10,000 answers": (lambda r: line(r, **spans(ANSWER * 10_000)).encode(), False),
    "empty": (lambda r: b"", False),
    "blank lines": (lambda r: b"\n\n \n", False),
    "a list": (lambda r: b"[1, 2]", False),
}


@pytest.mark.parametrize("name", READERS)
def test_odd_files(name, tmp_path, rubric):
    failures, valid = [], READERS[name]
    for what, (make, fine) in FILES.items():
        path = tmp_path / "rows.jsonl"
        path.write_bytes(make(valid))
        count, message = read(name, path, rubric)
        if fine is not None and (count > 0) != fine:
            failures.append((what, count, message))
        if name != "rows" and fine and what != "CRLF":  # the same as the element of a JSON list
            path.write_bytes(b" [" + make(valid).removeprefix(b"\xef\xbb\xbf") + b"]")
            if read(name, path, rubric)[0] != count:
                failures.append((what, "in a list"))
    assert not failures


SOURCES = [  # format, the bytes of a.file, what the refusal says
    ("kardiabench", b"\n \n", "a.file: no rows in it"),
    ("esconv", b" []", "a.file: no rows in it"),
    ("esconv", b"PK\x03\x04zip", "a.file: a binary file"),
    ("kardiabench", b"PAR1 and nothing more", "a.file: row 1: not a readable parquet file"),
    ("kardiabench", b'{"a": 1}\n\n{"b": "caf\xe9"}\n', "none of its 2 records can be used"),
    ("empatheticdialogues", b"id,text\n1,x\n", f"a.file:1: expected header {CSV_HEADER}, found id,text"),
    ("empatheticdialogues", b"\xef\xbb\xbf", "found nothing"),
    ("kardiabench", b"{torn\n{torn\n[1]", "of its 3 records can be used: 2 x malformed JSON (a.file:1: "),
    ("goemotions", b"x", "unknown format 'goemotions': use one of kardiabench, empatheticdialogues, esconv"),
    ("kardiabench", b"{}\n" + b"x" * 5_000_000, "a.file:2: a line over 4 MB"),
    ("esconv", b'[{},\n{"b": "cut', "a.file: malformed JSON list (Unterminated string starting at: line 2"),
    ("esconv", b'[{"a": 1},\n{"b": 2}', "malformed JSON list (Expecting ',' delimiter: line 2"),
    ("esconv", b'[1, {"b": 2 "c": 3}]', "malformed JSON list (Expecting ',' delimiter: line 1 column 13"),
    ("esconv", b'[{"a": 1}]\n[{"b": 2}]', "malformed JSON list (Extra data: line 2"),
    ("esconv", b"[1,]", "malformed JSON list"),
    ("esconv", b"[" + b"9" * 5000 + b"]", "malformed JSON list"),
    ("esconv", b"[" * 200_000, "malformed JSON list"),
    ("esconv", b'[{}, {"a": "caf\xe9"}]', "none of its 2 records can be used"),
]


def test_unusable_sources_are_one_line(tmp_path, rubric):
    source, failures = tmp_path / "a.file", []
    for format, content, expected in SOURCES:
        source.write_bytes(content)
        with pytest.raises(UserError) as caught:
            import_dataset(source, format, tmp_path / "rows.jsonl", rubric.labels)
        message = str(caught.value)
        if expected not in message or "\n" in message or len(message) > 700:
            failures.append((expected, message[:300]))
    assert not failures and [path.name for path in tmp_path.iterdir()] == ["a.file"]
    assert "no such file" in read("kardiabench", tmp_path / "x", rubric)[1]


def test_a_byte_that_is_no_utf8_costs_one_record(tmp_path, rubric):
    bad = line(SEEK, situation="Zoë").encode("latin-1")
    for whole in (b"\n".join([line(SEEK).encode(), bad]), b"[" + line(SEEK).encode() + b"," + bad + b"]"):
        (tmp_path / "a.json").write_bytes(whole)
        report = import_dataset(tmp_path / "a.json", "esconv", tmp_path / "rows.jsonl", rubric.labels)
        assert report.rows == 1 and report.skipped.total() == 1
        assert "a.json:" in report.skipped_list.read_text() and "not UTF-8" in report.skipped_list.read_text()


def test_a_parquet_field_of_gigabytes(tmp_path, rubric):
    """A parquet file holds a repeated text once; in memory it would stand in every row."""
    table = pyarrow.table({"person": ["x" * (2 << 20)] * 64})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    assert "row 1: 16 rows of over 16 MB" in read("kardiabench", tmp_path / "a.parquet", rubric)[1]


# ---------------------------------------------------------------- damaged by chance


TELLING = b'\x00 \xff\xfe \xef\xbb\xbf \r " [[[[[[[[ { \\ud800 NaN 1e999 ,'.split(b" ")


def damaged(data, step):
    """The data cut off, without three bytes, or with something telling inside, at every `step`th byte."""
    for at in range(1, len(data), step):
        for piece in (b"", *TELLING):
            yield data[:at] + piece + data[at + 3 * (not piece) :]
        yield data[:at]


def test_damaged_bytes(tmp_path, rubric):
    path, outcomes = tmp_path / "rows.jsonl", set()
    for name, valid in READERS.items():
        whole = "".join(line(valid, situation=f"Number {i}: Zoë's dog.") + "\n" for i in range(4)).encode()
        for content in damaged(whole, 149):
            path.write_bytes(content)
            outcomes.add((name, read(name, path, rubric)[0]))
    assert {("rows", 0), ("rows", 4), ("kardiabench", 3), ("esconv", 3), ("esconv", 4)} <= outcomes
    for content in damaged(SPOKEN.encode(), 11):
        path.write_bytes(content)
        count, message = read("empatheticdialogues", path, rubric)
        assert message or count == 1
    path.write_bytes(SPOKEN.replace(",1,", "," + "9" * 5000 + ",", 1).encode())
    assert "malformed line" in read("empatheticdialogues", path, rubric)[1]


NASTY = [None, True, 1.5, 2**63, 10**400, -1, float("nan"), [], {}, [{}], {"\x1b[0m": [1]}, deep()]
NASTY += ["", " ", "a\nb", "\x00", "\x1b[31m", "\x9b2J", "\u202e", "\ud800", "\u2028", ANSWER * 2]


def replaced(value, new):
    """Every copy of `value` in which one thing is `new` or, for `...`, missing."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        for damaged in [new, *replaced(inner, new)]:
            copy = value.copy()
            copy[key] = damaged
            if damaged is ...:
                del copy[key]
            yield copy


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_row_is_used_or_refused(name, tmp_path, rubric):
    path, outcomes = tmp_path / "rows.jsonl", set()
    for value in (value for new in [..., *NASTY] for value in replaced(READERS[name], new)):
        path.write_text(f"{json.dumps(READERS[name])}\n{json.dumps(value)}\n")
        count, message = read(name, path, rubric)
        assert count in (1, 2) or "rows.jsonl:2: " in message
        outcomes.add(count)
    assert len(outcomes) == 2  # some are harmless, some are not


PIECES = [f"<|{name}_{side}|>" for name in ("understanding", "emotion", "other") for side in ("begin", "end")]
PIECES += ["<|", "|>", "_begin|>", "<|response", " ", "\n", "x", "\x1b[0m", "<|emotion_begin_end|>"]


@settings(derandomize=True, database=None, max_examples=100, deadline=None)
@given(text=st.lists(st.sampled_from(PIECES), max_size=24).map("".join))
def test_spans_of_any_text(text):
    for name in ("understanding", "emotion"):
        match = re.search(rf"<\|{name}_begin\|>(.*?)<\|{name}_end\|>", text, re.DOTALL)  # slow, and right
        assert rows.find_span(text, name) == (match[1].strip() if match else None)
    parts, end = [], 0
    for match in re.finditer(r"<\|(\w+)_begin\|>(.*?)<\|\1_end\|>", text, re.DOTALL):
        parts += [("", text[end : match.start()].strip()), (match[1], match[2].strip())]
        end = match.end()
    parts.append(("", text[end:].strip()))
    assert rows.split_spans(text) == [(name, piece) for name, piece in parts if name or piece]


def test_long_answers_take_no_time():
    texts = ["<|response_begin|>" * 100_000, ANSWER[:-1] * 10_000, "<|" * 500_000, "<|" + "a" * 10**6]
    texts.append("".join(f"<|s{i}_begin|>" for i in range(100_000)))
    texts.append("<|a_begin|>" * 50_000 + "<|a_end|>" * 50_000)
    for text in texts:
        began = time.process_time()
        rows.find_span(text, "response")
        rows.split_spans(text)
        assert time.process_time() - began < 5
