"""Check rows, report all their errors at once, and find the spans of an answer.

A row is one line of JSON: `{person, mbti, emotion, situation, anon_username, messages[{role, content}]}`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from kardia.core.console import UserError, say, shorten
from kardia.core.files import json_lines
from kardia.data.rubric import row_criteria

NO_PROFILE = "No profile is given."  # imports write it where a data set has no persons; the judge drops it
NO_SITUATION = "Not told yet."
MOST_ERRORS = 10_000  # of all files: a file of the wrong kind has as many errors as lines
LONGEST_TEXT = 100_000  # characters of one text of a row; no model here reads as much
WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
MARKER = re.compile(r"<\|(\w+)_(begin|end)\|>")


def read_rows(paths: list, rubric: Any, parse_answer: Callable, kind: str = "any") -> list[tuple[dict, str]]:
    """Return (row, `file:line`) of all rows of JSONL files. Raise one UserError with the errors of all files.

    `kind` is "any", "dialogue" (a row ends with assistant) or "prompt" (it ends with user).
    """
    rows, errors = [], []
    for path in map(Path, paths):
        if not path.is_file():
            schema = "give a JSONL file of dialogues (data/dialogues.jsonl shows the schema)"
            raise UserError(f"{path}: no such file; {schema}")
        for number, value, problem in json_lines(path):
            where = f"{path}:{number}"
            if problem:
                errors.append(f"{where}: found {problem} / expected one JSON object per line")
            else:
                errors += row_errors(value, rubric, where, parse_answer, kind)
                rows.append((value, where))
            if len(errors) > MOST_ERRORS:  # each is a string in memory
                break
    if errors:
        over, count = "over " if len(errors) > MOST_ERRORS else "", min(len(errors), MOST_ERRORS)
        title = f"{over}{count} problem{'' if count == 1 else 's'} in the data:"
        more = [f"... and {over}{count - 50} more"] if count > 50 else []
        raise UserError("\n".join([title, *errors[:50], *more]))
    if not rows:
        raise UserError(f"{', '.join(map(str, paths))}: no rows; expected JSONL dialogues")
    if any(isinstance(row.get("rubric"), list) for row, _ in rows) and not rubric.reads("row"):
        say("  rows carry a rubric of their own, which nothing reads: no criterion has method row")
    return rows


def row_errors(row: Any, rubric: Any, where: str, parse_answer: Callable, kind: str = "any") -> list[str]:
    """Return the errors of one decoded JSON value as `where: found .. / expected ..`; [] for a valid row.

    `parse_answer(text, format)` raises ValueError with the reason where a text is not a whole answer.
    """
    if not isinstance(row, dict):
        expected = f"a JSON object with person, {rubric.form.label}, situation and messages"
        return [f"{where}: found {type(row).__name__} / expected {expected}"]
    pairs = list(islice(_errors(row, rubric, parse_answer), 25))  # a list of a million numbers has a million
    end = "" if pairs else row["messages"][-1]["role"]
    wanted = {"dialogue": "assistant", "prompt": "user"}.get(kind, end)
    if not pairs and end != wanted:
        pairs = [(f"a row that ends with {end}", f"a {kind} (ends with {wanted})")]
    return [f"{where}: found {found} / expected {expected}" for found, expected in pairs]


def _errors(row: dict, rubric: Any, parse_answer: Callable) -> Iterator[tuple[str, str]]:
    """Yield (found, expected) of everything that is wrong in a row."""
    form, labels = rubric.form, rubric.labels
    for key in (form.label, "person", "situation", "mbti", "anon_username"):
        optional = key in ("mbti", "anon_username")
        value = row.get(key, "" if optional else None)
        if not isinstance(value, str) or not (optional or value.strip()):
            yield f"{key} = {shorten(value)}", f"{key}: a text"
        elif len(value) > LONGEST_TEXT:
            yield f"{key} of {len(value):,} characters", f"at most {LONGEST_TEXT:,}"
        elif key == form.label and value not in labels.values():
            hint = f" (is it {labels[value.lower()]!r}?)" if value.lower() in labels else ""
            yield f"{key} {shorten(value)!r}", f"one of the labels in rubrics.yaml{hint}"
    yield from _own_errors(row, rubric)
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        yield f"messages = {shorten(messages, 40)}", "a list of {role, content}"
        return
    for number, message in enumerate(messages):
        name, role = f"messages[{number}]", "user" if number % 2 == 0 else "assistant"
        message = message if isinstance(message, dict) else {}
        content, found = message.get("content"), message.get("role")
        if found != role and message:
            yield f"{name}.role {shorten(found)!r}", f"{role!r} (roles alternate and the user begins)"
        if not isinstance(content, str) or not content.strip():
            yield f"{name} without content", "{role, content} with a text"
        elif len(content) > LONGEST_TEXT:
            yield f"{name} of {len(content):,} characters", f"at most {LONGEST_TEXT:,}"
        elif role == "assistant":
            try:
                label = parse_answer(content, form)[form.label]
                if label not in labels.values():
                    expected = f"one of the labels in rubrics.yaml, usually the row's {form.label}"
                    yield f"{name} {form.label} span {shorten(label)!r}", expected
            except ValueError as error:
                yield f"{name}: {error}", f"{', '.join(form.names)}, each once, in this order"


def _own_errors(row: dict, rubric: Any) -> Iterator[tuple[str, str]]:
    """Yield what is wrong in a row's own rubric and reference, where a criterion reads them."""
    reference = row.get("reference", "x")
    if rubric.reads("reference") and (not isinstance(reference, str) or not reference.strip()):
        yield f"reference = {shorten(reference)}", "reference: a good reply, as a text"
    if rubric.reads("row") and "rubric" in row:
        try:
            row_criteria(json.dumps(row["rubric"]))
        except UserError as error:
            found, _, expected = error.message.removeprefix("rubric: ").partition(" / expected ")
            yield f"rubric: {found.removeprefix('found ')}", expected


def find_span(text: str, name: str) -> str | None:
    """Return the first span of that name in a text, which may be invalid as a whole; None if it is absent."""
    _, begin, rest = text.partition(f"<|{name}_begin|>")
    inside, end, _ = rest.partition(f"<|{name}_end|>")
    return inside.strip() if begin and end else None


def split_spans(text: Any) -> list[tuple[str, str]]:
    """Return [(span name, its text)] of a reply; the name is "" for text outside every well-formed span."""
    parts, position, text = [], 0, str(text or "")
    marks = list(MARKER.finditer(text))
    last_end = {mark[1]: mark.start() for mark in marks if mark[2] == "end"}
    for mark in marks:
        # A model may repeat a marker 100,000 times: each search moves `position`, so all take linear time.
        if mark[2] == "begin" and position <= mark.start() < last_end.get(mark[1], 0):
            end = text.index(f"<|{mark[1]}_end|>", mark.end())
            parts += [("", text[position : mark.start()].strip()), (mark[1], text[mark.end() : end].strip())]
            position = end + len(f"<|{mark[1]}_end|>")
    parts.append(("", text[position:].strip()))
    return [(name, piece) for name, piece in parts if name or piece]
