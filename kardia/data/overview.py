"""Describe a mix of data files: balance, lengths, near-duplicates, and persons in more than one file."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from statistics import mean, median
from typing import Any

from kardia.core.console import shorten
from kardia.data.rows import MARKER, NO_PROFILE, split_spans

RUN = 5  # words of a run
ALIKE = 0.3  # Jaccard index of runs: about half the words of two such texts stand in shared runs
NEIGHBOURS = 30  # a run that thousands share links a text with so many earlier ones and not with all
SIGN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"  # scripts without spaces: each sign is a word
WORD = re.compile(rf"[{SIGN}]|[^\W{SIGN}]+(?:['\u2019][^\W{SIGN}]+)*")


def words(text: str) -> list[str]:
    """Return lower-case words without punctuation; compatibility forms and apostrophes are folded."""
    return [word.replace("\u2019", "'") for word in WORD.findall(unicodedata.normalize("NFKC", text).lower())]


def near_duplicates(texts: Iterable[str], threshold: float = ALIKE) -> list[tuple[int, int, float]]:
    """Return (earlier text, text, Jaccard index of their five-word runs) of near-duplicates.

    The earlier text is the most similar one. Texts of the same words have 1.0, an empty text matches nothing,
    and a text of fewer than five words is one run.
    """
    first_with, holders, sizes, pairs = {}, {}, {}, []  # holders: run -> the last texts with it
    for number, text in enumerate(texts):
        found = words(text)
        first = first_with.setdefault(" ".join(found), number)
        if found and first < number:
            pairs.append((first, number, 1.0))
        if not found or first < number:
            continue
        # Hashes, not runs, are kept: 20,000 texts of 60 words have a million.
        runs = {hash(run) for run in zip(*(found[i:] for i in range(RUN)))} or {hash(tuple(found))}
        shared, mine, sizes[number] = Counter(), (number,), len(runs)
        for run in runs:
            earlier = holders.get(run, ())
            shared.update(earlier)
            holders[run] = earlier[1 - NEIGHBOURS :] + mine if earlier else mine
        alike = {i: n / (sizes[i] + len(runs) - n) for i, n in shared.items()}
        first = max(alike, key=lambda i: (alike[i], -i), default=number)  # the earliest of equals
        if alike.get(first, -1.0) >= threshold:
            pairs.append((first, number, alike[first]))
    return pairs


def question(row: Any) -> str:
    """Return what evaluation asks of a row: the situation and the first user turn."""
    return f"{row.situation}\n{row.messages[0][1]}"


def answers(row: Any) -> str:
    """Return all the assistant's spans of a row, without their markers."""
    return " ".join(MARKER.sub(" ", content) for role, content in row.messages if role == "assistant")


def file_of(row: Any) -> str:
    """Return the file name of a row's `where`, which is `file:line`."""
    return row.where.rsplit(":", 1)[0]


def leaks(rows: Sequence[Any]) -> list[tuple[str, list[str]]]:
    """Return (profile, files) of the persons in more than one file, known by profile or by user name."""
    files, shared, known = defaultdict(set), {}, [row for row in rows if row.person.strip() != NO_PROFILE]
    for row in known:
        # One person may be written in two ways, or have a profile that grew: either key is enough.
        for key in _keys(row):
            files[key].add(file_of(row))
    for row in known:
        most = max((files[key] for key in _keys(row)), key=len)
        if len(most) > 1:
            shared.setdefault(row.person, sorted(most))
    return list(shared.items())


def _keys(row: Any) -> list[str]:
    name = row.anon_username.strip().lower()
    return [" ".join(words(row.person)), *([f"@{name}"] if name else [])]


def describe(rows: Sequence[Any], labels: Sequence[str], named: str = "emotion") -> list[str]:
    """Return the lines of balance and lengths: rows per file, label (`named`) and person; words per span."""
    by_file = defaultdict(list)
    for row in rows:
        by_file[file_of(row)].append(row)
    people = Counter(row.person for row in rows)
    (most, n), fewest, middle = people.most_common(1)[0], min(people.values()), median(people.values())
    person = f"rows per person: {fewest} to {n}, median {middle:g}; the most: {shorten(most)}"
    return [*_files(by_file, rows, named), *_labels(by_file, labels, named), person, *_spans(rows, named)]


def _files(by_file: dict[str, list], rows: Sequence[Any], named: str) -> Iterator[str]:
    width = max(map(len, by_file))
    yield f"{'file':<{width}}  {'rows':>6} {'dialogues':>9} {'prompts':>7} {'persons':>7} {named + 's':>8}"
    parts = [*by_file.items(), ("all", rows)]
    for name, part in parts if len(by_file) > 1 else parts[:1]:
        prompts = sum(row.is_prompt for row in part)
        persons, labels = len({row.person for row in part}), len({row.label for row in part})
        numbers = f"{len(part):>6} {len(part) - prompts:>9} {prompts:>7} {persons:>7} {labels:>8}"
        yield f"{name:<{width}}  {numbers}"


def _labels(by_file: dict[str, list], labels: Sequence[str], named: str) -> Iterator[str]:
    counts = {name: Counter(row.label for row in part) for name, part in by_file.items()}
    if all(len(set(n.values())) == 1 and len(n) == len(labels) for n in counts.values()):
        parts = [f"{max(n.values())} of each of the {len(labels)} in {name}" for name, n in counts.items()]
        yield f"rows per {named}: {', '.join(parts)}"
        return
    names = f" ({' + '.join(counts)})" if len(counts) > 1 else ""
    yield f"rows per {named}{names}:"
    total = sum(counts.values(), Counter())
    for label, n in sorted(total.items(), key=lambda pair: (-pair[1], pair[0])):
        parts = " + ".join(str(part[label]) for part in counts.values())
        yield f"  {label:<14} {n:>6}" + (f"  = {parts}" if len(counts) > 1 else "")
    if missing := [label for label in labels if label not in total]:
        yield f"  without any row: {', '.join(missing)}"


def _spans(rows: Sequence[Any], named: str) -> Iterator[str]:
    spans, other = defaultdict(list), 0
    for row in rows:
        for role, content in row.messages:
            for name, text in split_spans(content) if role == "assistant" else []:
                spans[name].append(text)
                other += name == named and text != row.label
    answered = len(spans.pop(named, []))
    if spans:
        lengths = {name: [len(text.split()) for text in texts] for name, texts in spans.items()}
        parts = [f"{name} {mean(n):.0f} ({min(n)} to {max(n)})" for name, n in lengths.items()]
        yield f"words per span, mean (shortest to longest): {', '.join(parts)}"
    for name, texts in spans.items():
        opening, n = Counter(" ".join(words(text)[:4]) for text in texts).most_common(1)[0]
        if n > max(2, 0.02 * len(texts)):  # two of a kind happen by chance
            learned = "a model will learn the phrase, not the person"
            yield f"warning: {n} of {len(texts)} {name} spans begin with {opening!r}; {learned}"
    if other:
        fine = f"fine where it changes; the {named} reward wants the row's"
        yield f"note: {other} of {answered} answers name another {named} than their row ({fine})"


def repeats(rows: Sequence[Any], shown: int = 3) -> list[str]:
    """Return the lines of near-duplicate questions and answers and of persons shared between files."""
    out = []
    for what, text in (("questions (situation and first turn)", question), ("answers", answers)):
        pairs = near_duplicates(map(text, rows))
        across = [pair for pair in pairs if file_of(rows[pair[0]]) != file_of(rows[pair[1]])]
        within = [pair for pair in pairs if file_of(rows[pair[0]]) == file_of(rows[pair[1]])]
        files = f", {len(across)} of them between files" if across else ""
        some, none = f"warning: {len(pairs)} near-duplicate {what}{files}", f"near-duplicate {what}: none"
        out.append(some if pairs else none)
        for first, second, similarity in [*across, *within][:shown]:
            share = f"{similarity:.2f} of five-word runs shared"
            out.append(f"  {rows[second].where} is like {rows[first].where} ({share})")
    if persons := leaks(rows):
        rule = "a person must not be in both training and evaluation"
        out.append(f"warning: {len(persons)} persons stand in more than one file; {rule}")
        out += [f"  {shorten(person)} in {' and '.join(files)}" for person, files in persons[:shown]]
    elif len({file_of(row) for row in rows}) > 1:
        out.append("persons shared between files: none")
    return out


def histogram(lengths: Sequence[int], limit: int, bins: int = 10) -> list[str]:
    """Return token counts as text bars, one line per bin; the bin that holds the limit is marked."""
    low, high, out = min(lengths), max(lengths), []
    width = max(1, -(-(high - low + 1) // bins))
    for start in range(low, high + 1, width):
        n = sum(start <= length < start + width for length in lengths)
        mark = "  <- limit" if start <= limit < start + width else ""
        out.append(f"  {start:>6}-{start + width - 1:<6} {n:>6} {'#' * -(-40 * n // len(lengths))}{mark}")
    return out
