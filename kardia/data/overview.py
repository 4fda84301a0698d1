"""What a mix of data files holds, seen from outside: balance, lengths, repeats, and what leaks from one file into another.

Near-duplicates are found by the overlap of five-word runs (shingles). Each text keeps only its SKETCH smallest shingle
hashes, an unbiased sample of the set (Broder 1997, "On the resemblance and containment of documents"), so memory and time
grow with the number of texts and not with their pairs.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from statistics import mean, median
from typing import Any

from kardia.data.rows import NO_PROFILE, split_spans

RUN = 5  # words in a shingle
SKETCH = 128  # hashes kept per text: shorter texts are compared exactly, longer ones to about 0.04
ALIKE = 0.3  # Jaccard of shingles from which two texts count as near-duplicates: about half their words stand in shared runs
CROWD = 100  # at most so many earlier texts are looked up per shingle; a frame that thousands share would cost their square
CHARACTER = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"  # scripts written without spaces: each sign is a word
WORD = re.compile(rf"[{CHARACTER}]|[^\W{CHARACTER}]+(?:['\u2019][^\W{CHARACTER}]+)*")
MARKER = re.compile(r"<\|\w+?_(?:begin|end)\|>")


@dataclass(frozen=True)
class Pair:
    """Two texts that say nearly the same: their indices (first < second) and the Jaccard similarity of their shingles."""

    first: int
    second: int
    similarity: float


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; compatibility forms and typographic apostrophes folded."""
    return [word.replace("\u2019", "'") for word in WORD.findall(unicodedata.normalize("NFKC", text).lower())]


def shingles(text: str) -> set[int]:
    """64-bit hashes of every run of five words; a shorter text is one run."""
    found = words(text)
    runs = (" ".join(found[i : i + RUN]) for i in range(max(1, len(found) - RUN + 1)))
    return {int.from_bytes(blake2b(run.encode(), digest_size=8).digest(), "big") for run in runs if run}


def near_duplicates(texts: Iterable[str], threshold: float = ALIKE) -> list[Pair]:
    """For every text that has an earlier near-duplicate: the pair with the most similar one. Empty texts match nothing."""
    sketches: list[frozenset[int]] = []
    exact: dict[frozenset[int], int] = {}
    index: dict[int, list[int]] = defaultdict(list)
    pairs = []
    for number, text in enumerate(texts):
        sketch = frozenset(sorted(shingles(text))[:SKETCH])
        sketches.append(sketch)
        if not sketch:
            continue
        if sketch in exact:
            pairs.append(Pair(exact[sketch], number, 1.0))
            continue
        exact[sketch] = number
        shared = Counter(other for shingle in sketch for other in index[shingle])
        similar = [
            (resemblance(sketch, sketches[other]), -other)
            for other, n in shared.items()
            if n >= threshold / 2 * min(len(sketch), len(sketches[other]))
        ]
        if similar and max(similar)[0] >= threshold:
            best, other = max(similar)
            pairs.append(Pair(-other, number, best))
        for shingle in sketch:
            if len(index[shingle]) < CROWD:
                index[shingle].append(number)
    return pairs


def resemblance(a: frozenset[int], b: frozenset[int]) -> float:
    """Jaccard similarity of two shingle sets from their sketches: the share of common hashes among the smallest of the union."""
    smallest = sorted(a | b)[:SKETCH]
    return sum(hash_ in a and hash_ in b for hash_ in smallest) / len(smallest)


def question(row: Any) -> str:
    """What evaluation asks of a row: the situation and the first user turn."""
    return f"{row.situation}\n{row.messages[0][1]}"


def answers(row: Any) -> str:
    """All the assistant's spans of a row, without their markers."""
    return " ".join(MARKER.sub(" ", content) for role, content in row.messages if role == "assistant")


def file_of(row: Any) -> str:
    return row.where.rsplit(":", 1)[0]


def leaks(rows: Sequence[Any]) -> list[tuple[str, list[str]]]:
    """Persons who stand in more than one file, known by profile or by user name: (profile, the files)."""
    files: dict[str, set[str]] = defaultdict(set)
    known = [
        (
            row,
            [
                key
                for key in (" ".join(words(row.person)), "@" + row.anon_username.strip().lower())
                if key != "@"
            ],
        )
        for row in rows
        if row.person.strip() != NO_PROFILE
    ]
    for row, keys in known:
        for key in keys:
            files[key].add(file_of(row))
    out: dict[str, list[str]] = {}
    for row, keys in known:
        shared = max((files[key] for key in keys), key=len)
        if len(shared) > 1:
            out.setdefault(row.person, sorted(shared))
    return list(out.items())


# ---------------------------------------------------------------- the lines of `data check`


def describe(rows: Sequence[Any], labels: Sequence[str], named: str = "emotion") -> list[str]:
    """Balance and lengths, as lines: rows per file, label (`named`) and person; words per span; commonest openings. Rows have `where`."""
    out = []
    by_file: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        by_file[file_of(row)].append(row)
    width = max(map(len, by_file))
    out.append(
        f"{'file':<{width}}  {'rows':>6} {'dialogues':>9} {'prompts':>7} {'persons':>7} {named + 's':>8}"
    )
    for name, part in [*by_file.items(), *([("all", rows)] if len(by_file) > 1 else [])]:
        prompts = sum(row.is_prompt for row in part)
        out.append(
            f"{name:<{width}}  {len(part):>6} {len(part) - prompts:>9} {prompts:>7} {len({r.person for r in part}):>7} {len({r.label for r in part}):>8}"
        )
    counts = [Counter(row.label for row in part) for part in by_file.values()]
    if all(len(set(count.values())) == 1 and len(count) == len(labels) for count in counts):
        out.append(
            f"rows per {named}: "
            + ", ".join(
                f"{next(iter(count.values()))} of each of the {len(labels)} in {name}"
                for name, count in zip(by_file, counts)
            )
        )
    else:
        out.append(f"rows per {named}{' (' + ' + '.join(by_file) + ')' if len(by_file) > 1 else ''}:")
        total = sum(counts, Counter())
        for label, n in sorted(total.items(), key=lambda pair: (-pair[1], pair[0])):
            out.append(
                f"  {label:<14} {n:>6}{'  = ' + ' + '.join(str(count[label]) for count in counts) if len(by_file) > 1 else ''}"
            )
        if missing := [label for label in labels if label not in total]:
            out.append(f"  without any row: {', '.join(missing)}")
    people = Counter(row.person for row in rows)
    most, n = people.most_common(1)[0]
    out.append(
        f"rows per person: {min(people.values())} to {n}, median {median(people.values()):g}; the most: {shorten(most, 60)}"
    )
    spans: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for role, content in row.messages:
            if role == "assistant":
                for name, text in split_spans(content):
                    spans[name].append(text)
    lengths = {name: [len(text.split()) for text in texts] for name, texts in spans.items() if name != named}
    if lengths:
        out.append(
            "words per span, mean (shortest to longest): "
            + ", ".join(f"{name} {mean(n):.0f} ({min(n)} to {max(n)})" for name, n in lengths.items())
        )
    for name in lengths:
        opening, n = Counter(" ".join(words(text)[:4]) for text in spans[name]).most_common(1)[0]
        if n > max(2, 0.02 * len(spans[name])):
            out.append(
                f"warning: {n} of {len(spans[name])} {name} spans begin with {opening!r}; a model will learn the phrase, not the person"
            )
    other = sum(
        text.strip() != row.label
        for row in rows
        for role, content in row.messages
        if role == "assistant"
        for name, text in split_spans(content)
        if name == named
    )
    if other:
        out.append(
            f"note: {other} of {len(spans[named])} answers name another {named} than their row (fine where it changes; the {named} reward wants the row's)"
        )
    return out


def repeats(rows: Sequence[Any], shown: int = 3) -> list[str]:
    """Near-duplicate questions and answers and persons shared between files, as lines."""
    out = []
    for what, text in (("questions (situation and first turn)", question), ("answers", answers)):
        pairs = near_duplicates(map(text, rows))
        across = [pair for pair in pairs if file_of(rows[pair.first]) != file_of(rows[pair.second])]
        within = [pair for pair in pairs if file_of(rows[pair.first]) == file_of(rows[pair.second])]
        if pairs:
            files = f", {len(across)} of them between files" if across else ""
            out.append(f"warning: {len(pairs)} near-duplicate {what}{files}")
            for pair in [*across, *within][:shown]:
                out.append(
                    f"  {rows[pair.second].where} is like {rows[pair.first].where} ({pair.similarity:.2f} of five-word runs shared)"
                )
        else:
            out.append(f"near-duplicate {what}: none")
    if found := leaks(rows):
        out.append(
            f"warning: {len(found)} persons stand in more than one file; a person must not be in both training and evaluation"
        )
        out += [f"  {shorten(person, 60)} in {' and '.join(files)}" for person, files in found[:shown]]
    elif len({file_of(row) for row in rows}) > 1:
        out.append("persons shared between files: none")
    return out


def histogram(lengths: Sequence[int], limit: int, bins: int = 10) -> list[str]:
    """Token counts as text bars, one row per bin; the bin that holds the limit is marked."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // bins))
    out = []
    for start in range(low, high + 1, width):
        n = sum(start <= length < start + width for length in lengths)
        mark = "  <- limit" if start <= limit < start + width else ""
        out.append(f"  {start:>6}-{start + width - 1:<6} {n:>6} {'#' * -(-40 * n // len(lengths))}{mark}")
    return out


def shorten(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
