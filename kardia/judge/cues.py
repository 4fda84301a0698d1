"""Measure whether a judge follows a cheap cue (length, a question mark, warm words) more than the answer key.

A cue is a number of a reply that a reader could count without understanding it. On the exam pairs in which
the two replies differ in it, the answer key sides with the cue about half of the time; a judge that sides
with it (or against it) more often than with the key has learned the cue.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from kardia.judge.exam_statistics import right_or_wrong, wilson

SURE = 2.81  # standard deviations: 0.5% on both sides together, a tenth of 5%
FEWEST = 20  # pairs with a difference that can tell anything about a cue
WORD = re.compile(r"[\w']+")
NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+|\d+")  # inside a sentence, where a capital means a name
# Words that a sentence needs whatever it is about: sharing them with the turn says nothing.
PLAIN = set(
    "the a an and or but of to in on at for with is are was were be been it its that this i you he she they "
    "we my your his her their our me him them us so not no do does did have has had as if just then than "
    "what when how who why about up out from by into over after too very can will would there here".split()
)
WARM = set(
    "sorry hug hugs love care caring glad proud happy sad hard tough awful terrible heart warm gentle hope "
    "understand feel feeling feelings hurts hurt painful".split()
)
HEDGES = set("maybe perhaps might could possibly seems guess probably".split())
FIRST_PERSON = set("i i'm i've my me i'd i'll".split())
SECOND_PERSON = set("you your you're you've you'll you'd yours".split())


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _shared(reply: str, turn: str) -> int:
    return len((set(_words(turn)) - PLAIN) & set(_words(reply)))


def _count(wanted: set[str]) -> Callable[[str, str], int]:
    def count(reply: str, turn: str) -> int:
        return sum(word in wanted for word in _words(reply))

    return count


CUES: dict[str, Callable[[str, str], float]] = {  # name -> number of (reply, the person's last turn)
    "length": lambda reply, turn: len(reply),
    "question mark": lambda reply, turn: reply.count("?"),
    "ends in a question": lambda reply, turn: reply.rstrip().endswith("?"),
    "words of the turn": _shared,
    "names and numbers": lambda reply, turn: len(NAME.findall(reply)),
    "first person": _count(FIRST_PERSON),
    "second person": _count(SECOND_PERSON),
    "exclamation mark": lambda reply, turn: reply.count("!"),
    "hedges": _count(HEDGES),
    "warm words": _count(WARM),
}


def cue_report(pairs: list[dict], margins: list[tuple[float | None, float | None]]) -> dict[str, dict]:
    """Return {cue: {n, key, judge, right}} of one criterion's pairs and the judge's (better, worse).

    Of the n pairs in which the cue differs: key, the share in which the better reply has more of it; judge,
    the share in which the judge prefers the one with more; right, the share in which it prefers the better
    one. Pairs the judge could not score take no part; a tie counts one half.
    """
    report = {}
    for name, number in CUES.items():
        key, judge, right = [], [], []
        for pair, (better, worse) in zip(pairs, margins):
            turn = pair["messages"][-1]["content"]
            gap = number(pair["better"], turn) - number(pair["worse"], turn)
            if gap and better is not None and worse is not None:
                result = right_or_wrong(better, worse)
                key.append(float(gap > 0))
                right.append(result)
                judge.append(result if gap > 0 else 1 - result)
        entry: dict[str, Any] = {"n": len(key)}
        if key:
            means = {"key": key, "judge": judge, "right": right}
            entry |= {name: sum(values) / len(values) for name, values in means.items()}
        report[name] = entry
    return report


def followed_cue(report: dict[str, dict]) -> tuple[str, str] | None:
    """Return (the cue that the judge follows most, more or less) if it follows one more than the key.

    That is: it sides with the cue, or against it, on more pairs than with the better reply, and surely on
    more than the key's share: 95% for all cues together (Bonferroni), for one of ten is easily 5%.
    """
    worst, found = 0.0, None
    for name, entry in report.items():
        # Of few pairs a cue and the key differ by chance.
        if entry["n"] < FEWEST:
            continue
        for side, share, key in (
            ("more", entry["judge"], entry["key"]),
            ("less", 1 - entry["judge"], 1 - entry["key"]),
        ):
            low, _ = wilson(share * entry["n"], entry["n"], SURE)
            if share > entry["right"] and low > max(key, 0.5) and share > worst:
                worst, found = share, (name, side)
    return found
