"""Decide before any training whether a GGUF is fit to judge, by pairs of a better and a worse reply.

A criterion is fit when the judge beats chance (a permutation test, the choice of method included) and beats
the simplest rival: "the longer reply wins", and does not follow a cheap cue more than the answer key
(cues.py). The method of each criterion is chosen here, its accuracy estimated by cross-validation, its raw
numbers calibrated; training uses exactly what was examined. Position cannot bias a judge that reads one reply
at a time. Length, begging sentences and reading twice are measured.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kardia.core.console import UserError, shorten
from kardia.core.files import checked_rows
from kardia.data.rubric import Criterion, row_criteria
from kardia.judge.cues import cue_report, followed_cue
from kardia.judge.exam_statistics import chance, choose_method, fit_calibration, right_or_wrong, share
from kardia.judge.guards import rules
from kardia.judge.judge import Calibration, Judge, JudgedReply, Numbers

# Raise it when the code between a reply and its number changes: every exam is then taken again (minutes).
READING_VERSION = 3
FEWEST = 10  # pairs of a criterion that can tell anything
REFERENCE = "reference"  # instead of a criterion: a written reply and a small model's; all criteria are asked
Side = tuple[Numbers, Numbers]  # the judge's numbers of (better, worse)


class ExamError(UserError):
    """An exam file that cannot be used."""


def load_pairs(path: Path, criteria: list[str]) -> list[dict]:
    """Return exam rows {criterion, better, worse, person, situation, messages, ...} of these criteria.

    Raises UserError with every flaw of the file, one line each.
    """
    expected = "criterion, better, worse (texts) and messages [{role, content}]"
    hint = "exam file; data/judge_exam.jsonl is the one that comes with the project"
    rows = checked_rows(path, _flaw, expected, hint, ExamError)
    rows = [row for row in rows if row["criterion"] in criteria]
    if not rows:
        raise ExamError(f"{path}: no pair for the criteria {', '.join(criteria)}")
    return rows


def _flaw(row: Any) -> str:
    """Return what is not as an exam row must be, in a few words; "" if nothing is."""
    if not isinstance(row, dict):
        return type(row).__name__
    for key in ("criterion", "better", "worse", "person", "situation"):
        optional = key in ("person", "situation")
        value = row.get(key, "" if optional else None)
        if not isinstance(value, str) or not (optional or value.strip()):
            return f"{key} = {shorten(value, 40)}"
    try:
        texts = [message[key] for message in row["messages"] for key in ("role", "content")]
    except (KeyError, TypeError):
        texts = []
    if not texts or not all(isinstance(text, str) for text in texts):
        return f"messages = {shorten(row.get('messages'), 40)}"
    if "rubric" in row:
        try:
            row_criteria(json.dumps(row["rubric"]))
        except UserError as error:
            return error.message
    if not isinstance(row.get("reference", ""), str):
        return f"reference = {shorten(row['reference'], 40)}"
    return ""


def situation(pair: dict) -> str:
    """Return what tells two pairs' situations apart, whatever the case and spaces."""
    return " ".join(f"{pair.get('situation', '')} {pair['messages'][0].get('content', '')}".lower().split())


def run_exam(
    judge: Judge,
    pairs: list[dict],
    hashes: dict[str, str],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    methods: tuple[str, ...] = (),
) -> dict:
    """Examine a judge; return the exam that goes to the run.

    The model is examined without the guards: a judge gets no credit for what plain rules catch. `methods`
    adds candidates to every criterion (to see that likert fails on a small judge, say).
    """
    started, by_name = time.monotonic(), {c.name: c for c in judge.rubric.criteria}
    references = [row for row in pairs if row["criterion"] == REFERENCE]
    pairs = [row for row in pairs if row["criterion"] != REFERENCE]
    candidates = {}
    for name, c in by_name.items():
        needs = {"contrast": c.cues, "mix": c.mix, "row": (), "reference": ()}
        more = [m for m in methods if needs.get(m, True)]
        candidates[name] = tuple(dict.fromkeys((*judge.candidates(c), *more)))
    numbers = read_pairs(judge, pairs, candidates, on_progress)
    seconds = max(time.monotonic() - started, 1e-3)
    criteria = {name: verdict(c, candidates[name], numbers[name]) for name, c in by_name.items()}
    judge.method = {name: entry["method"] for name, entry in criteria.items()}
    for name, won in reference_test(judge, references).items() if references else []:
        criteria[name]["reference"] = won
        if criteria[name]["fit"] and won["high"] < 0.5:
            why = f"a small model's reply beats the written one in {1 - won['accuracy']:.0%} of {won['n']}"
            criteria[name].update(fit=False, why=why)
    rate = sum(2 * len(candidates[row["criterion"]]) for row in pairs) / seconds
    n = sum(entry["n"] for entry in criteria.values())
    longer = sum(entry["length_baseline"] * entry["n"] for entry in criteria.values())
    overall = share(sum(entry["correct"] for entry in criteria.values()), n)
    result = {"judge": Path(judge.path).name, **hashes, "pairs": len(pairs), "seconds": round(seconds, 2)}
    result |= {"scores_per_second": round(rate, 2), "criteria": criteria}
    result |= {"canaries": _canaries(judge, pairs), "repeatability": _repeatability(judge, pairs)}
    return {**result, "overall": {**overall, "length_baseline": longer / n if n else 0.0}}


def read_pairs(
    judge: Judge, pairs: list[dict], methods: dict[str, tuple[str, ...]], on_progress: Callable
) -> dict[str, list[tuple[dict, Side]]]:
    """Return {criterion: [(pair, numbers of its two replies)]}; methods: what each criterion is asked by."""
    by_name = {c.name: c for c in judge.rubric.criteria}
    numbers: dict[str, list[tuple[dict, Side]]] = {name: [] for name in by_name}
    for done, row in enumerate(pairs, 1):
        c = by_name[row["criterion"]]
        # Both replies in one call: their context is decoded once.
        sides = [JudgedReply.from_pair(row, key) for key in ("better", "worse")]
        asked = [(c, method) for method in methods[c.name]]
        if asked:
            numbers[c.name].append((row, judge.numbers(sides, asked, guarded=False)))
        on_progress(done, len(pairs) + 1)
    return numbers


def reference_test(judge: Judge, pairs: list[dict]) -> dict[str, dict[str, float]]:
    """Return {criterion: share of the pairs in which the written reply scores above the small model's}."""
    won: dict[str, list[float]] = {c.name: [] for c in judge.rubric.criteria}
    for row in pairs:
        sides = [JudgedReply.from_pair(row, key) for key in ("better", "worse")]
        written, own = judge.numbers(sides, judge.wanted, guarded=False)
        for name, method in written:
            won[name].append(right_or_wrong(written[name, method], own[name, method]))
    asked = {name: results for name, results in won.items() if results}
    return {name: {"n": len(results), **share(sum(results), len(results))} for name, results in asked.items()}


def verdict(criterion: Criterion, candidates: tuple[str, ...], rows: list[tuple[dict, Side]]) -> dict:
    """Return a criterion's entry: accuracy of every method, the choice, fit or unfit and why, calibration.

    rows: [(pair, numbers of (better, worse))], of which the candidates' are read.
    """

    def results_of(method: str) -> list[float]:
        # A pair without a rubric or a reference, where the method needs one, counts as wrong.
        return [right_or_wrong(good.get((name, method)), bad.get((name, method))) for _, (good, bad) in rows]

    n, name = len(rows), criterion.name
    right = {method: results_of(method) for method in candidates}
    method, held_out = choose_method(right) if n else (candidates[0], [])
    # The simplest rival reads nothing and takes the longer reply.
    lengths = [len(row["better"]) - len(row["worse"]) for row, _ in rows]
    longer = sum(right_or_wrong(length, 0) for length in lengths)
    result, baseline = share(sum(held_out), n), longer / n if n else 0.0
    # The permutation test takes most of the arithmetic's time: only what can pass gets it.
    p = chance(right, result["correct"]) if n >= FEWEST and result["accuracy"] > 0.5 else 1.0
    margins = [(good.get((name, method)), bad.get((name, method))) for _, (good, bad) in rows]
    cues = cue_report([row for row, _ in rows], margins)
    fit, why = _fit(result, n, p, baseline, cues)
    bias = {}
    for side, sign in (("longer_better", 1), ("shorter_better", -1)):
        mine = [r for r, length in zip(right[method], lengths) if length * sign > 0]
        bias[side] = {"n": len(mine), "accuracy": sum(mine) / len(mine) if mine else None}
    entry = {"method": method, "n": n, **result, "length_baseline": baseline, "p": p, "fit": fit, "why": why}
    entry |= {"weight": criterion.weight, **_calibrate(rows, name, method)}
    entry |= {"methods": {m: share(sum(results), n) for m, results in right.items()}, "length": bias}
    entry |= {"cues": cues}
    return entry


def _fit(result: dict[str, float], n: int, p: float, baseline: float, cues: dict) -> tuple[bool, str]:
    """Return (is the judge fit for the criterion?, why)."""
    right = f"{result['accuracy']:.0%} right"
    if n < FEWEST:
        return False, f"only {n} exam pairs; at least {FEWEST} are needed to tell"
    if p > 0.025:  # one-sided: the half of 5% above chance
        interval = f"{result['low']:.0%} to {result['high']:.0%}"
        return False, f"{right} ({interval}): not distinguishable from chance"
    if result["accuracy"] <= baseline:
        return False, f"{right}, but 'longer wins' gets {baseline:.0%}"
    if followed := followed_cue(cues):
        cue, side = followed
        entry = cues[cue]
        share_of_cue = entry["judge"] if side == "more" else 1 - entry["judge"]
        sides = f"it sides with {side} {cue} in {share_of_cue:.0%} of {entry['n']} pairs"
        return False, f"{sides}, with the better reply in {entry['right']:.0%}"
    return True, f"{right}, above chance and above 'longer wins' ({baseline:.0%})"


def _calibrate(rows: list[tuple[dict, Side]], name: str, method: str) -> dict[str, float]:
    """Return {slope, middle} of one method; pairs the judge could not score take no part."""
    raw = [(good.get((name, method)), bad.get((name, method))) for _, (good, bad) in rows]
    scored = [pair for pair in raw if None not in pair]
    return dataclasses.asdict(fit_calibration(*map(list, zip(*scored))) if scored else Calibration())


def _canaries(judge: Judge, pairs: list[dict], per_criterion: int = 2) -> dict:
    """Return what begging sentences do, over all criteria, with and without the guards' help.

    {n, held: no score rose by the model alone, refused: by a guard, held_with_guards, failed: {canary:
    criteria that rose although guarded}}.
    """
    wanted, canaries = judge.wanted, rules().canaries
    rows = [row for c, _ in wanted for row in [r for r in pairs if r["criterion"] == c.name][:per_criterion]]
    # Two pairs per criterion are enough: every sentence is asked about all criteria.
    out: dict = {"n": 0, "held": 0, "refused": 0, "held_with_guards": 0, "failed": {}}
    for row in rows:
        plain = JudgedReply.from_pair(row, "better")
        attacked = [dataclasses.replace(plain, reply=plain.reply + text) for text in canaries.values()]
        before, *after = judge.numbers([plain, *attacked], wanted, guarded=False)
        for canary, reply, numbers in zip(canaries, attacked, after):
            refused = judge.refused(reply) is not None
            read = [key for key, raw in before.items() if raw is not None and numbers[key] is not None]
            rose = [criterion for criterion, m in read if numbers[criterion, m] > before[criterion, m]]
            out["n"] += len(read)
            out["held"] += len(read) - len(rose)
            out["refused"] += refused * len(read)
            out["held_with_guards"] += len(read) if refused else len(read) - len(rose)
            if rose and not refused:
                out["failed"].setdefault(canary, []).extend(rose)
    return out


def _repeatability(judge: Judge, pairs: list[dict], rows: int = 4) -> dict:
    """Return the largest difference of a raw number read again, in another order (0: bit-identical)."""
    differences = [0.0]
    for row in pairs[:rows]:
        replies = [JudgedReply.from_pair(row, key) for key in ("better", "worse")]
        again = judge.numbers(replies[::-1], judge.wanted)[::-1]
        for first, second in zip(judge.numbers(replies, judge.wanted), again):
            read = [key for key in first if None not in (first[key], second[key])]
            differences += [abs(first[key] - second[key]) for key in read]
    return {"replies": 2 * min(rows, len(pairs)), "largest_difference": max(differences)}
