"""Decide before any training whether a GGUF is fit to judge, by pairs of a better and a worse reply.

A criterion is fit when the judge beats chance (a permutation test, the choice of method included) and beats
the simplest rival: "the longer reply wins". The method of each criterion is chosen here, its accuracy
estimated by cross-validation, its raw numbers calibrated; training uses exactly what was examined. Position
cannot bias a judge that reads one reply at a time. Length, begging sentences and reading twice are measured.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kardia.core import distributed, machine
from kardia.core.console import UserError, progress, say, shorten
from kardia.core.files import cache_directory, file_hash, file_lock, json_lines, write_json
from kardia.data.rubric import HELD_OUT, Criterion, Rubric
from kardia.judge.exam_statistics import chance, choose_method, fit_calibration, right_or_wrong, share
from kardia.judge.guards import rules
from kardia.judge.judge import Calibration, Judge, JudgedReply, Numbers, resolve_judge, resolve_judge_lora
from kardia.llama.worker import Worker
from kardia.models.base import EMBEDDED

# Raise it when the code between a reply and its number changes: every exam is then taken again (minutes).
READING_VERSION = 1
FEWEST = 10  # pairs of a criterion that can tell anything
Side = tuple[Numbers, Numbers]  # the judge's numbers of (better, worse)


class ExamError(UserError):
    """An exam file that cannot be used."""


def load_pairs(path: Path, criteria: list[str]) -> list[dict]:
    """Return exam rows {criterion, better, worse, person, situation, messages, ...} of these criteria.

    Raises UserError with every flaw of the file, one line each.
    """
    path = Path(path)
    if not path.is_file():
        shipped = "data/judge_exam.jsonl is the one that comes with the project"
        raise ExamError(f"{path}: no such exam file; {shipped}")
    rows, errors = [], []
    for number, row, flaw in json_lines(path):
        expected = "one JSON object"
        if not flaw:
            flaw, expected = _flaw(row), "criterion, better, worse (texts) and messages [{role, content}]"
        if flaw:
            errors.append(f"{path}:{number}: found {flaw} / expected {expected}")
        elif row["criterion"] in criteria:
            rows.append(row)
    if errors:
        raise ExamError("\n".join(errors[:20]))
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
    candidates = {}
    for name, c in by_name.items():
        more = [m for m in methods if m != "contrast" or c.cues]
        candidates[name] = tuple(dict.fromkeys((*judge.candidates(c), *more)))
    numbers: dict[str, list[tuple[dict, Side]]] = {name: [] for name in by_name}
    for done, row in enumerate(pairs, 1):
        c = by_name[row["criterion"]]
        asked = [*candidates[c.name], *([HELD_OUT] if c.held_out else [])]
        # Both replies in one call: their context is decoded once.
        sides = [JudgedReply.from_pair(row, key) for key in ("better", "worse")]
        numbers[c.name].append((row, judge.numbers(sides, [(c, m) for m in asked], guarded=False)))
        on_progress(done, len(pairs) + 1)
    seconds = max(time.monotonic() - started, 1e-3)
    criteria = {name: _verdict(c, candidates[name], numbers[name]) for name, c in by_name.items()}
    judge.method = {name: entry["method"] for name, entry in criteria.items()}
    rate = sum(2 * len(candidates[row["criterion"]]) for row in pairs) / seconds
    n = sum(entry["n"] for entry in criteria.values())
    longer = sum(entry["length_baseline"] * entry["n"] for entry in criteria.values())
    overall = share(sum(entry["correct"] for entry in criteria.values()), n)
    result = {"judge": Path(judge.path).name, **hashes, "pairs": len(pairs), "seconds": round(seconds, 2)}
    result |= {"scores_per_second": round(rate, 2), "criteria": criteria}
    result |= {"canaries": _canaries(judge, pairs), "repeatability": _repeatability(judge, pairs)}
    return {**result, "overall": {**overall, "length_baseline": longer / n if n else 0.0}}


def _verdict(criterion: Criterion, candidates: tuple[str, ...], rows: list[tuple[dict, Side]]) -> dict:
    """Return a criterion's entry: accuracy of every method, the choice, fit or unfit and why, calibration."""

    def results_of(method: str) -> list[float]:
        return [right_or_wrong(good[name, method], bad[name, method]) for _, (good, bad) in rows]

    n, name = len(rows), criterion.name
    right = {method: results_of(method) for method in candidates}
    method, held_out = choose_method(right) if n else (candidates[0], [])
    # The simplest rival reads nothing and takes the longer reply.
    lengths = [len(row["better"]) - len(row["worse"]) for row, _ in rows]
    longer = sum(right_or_wrong(length, 0) for length in lengths)
    result, baseline = share(sum(held_out), n), longer / n if n else 0.0
    # The permutation test takes most of the arithmetic's time: only what can pass gets it.
    p = chance(right, result["correct"]) if n >= FEWEST and result["accuracy"] > 0.5 else 1.0
    fit, why = _fit(result, n, p, baseline)
    bias = {}
    for side, sign in (("longer_better", 1), ("shorter_better", -1)):
        mine = [r for r, length in zip(right[method], lengths) if length * sign > 0]
        bias[side] = {"n": len(mine), "accuracy": sum(mine) / len(mine) if mine else None}
    entry = {"method": method, "n": n, **result, "length_baseline": baseline, "p": p, "fit": fit, "why": why}
    entry |= {"weight": criterion.weight, **_calibrate(rows, name, method)}
    entry |= {"methods": {m: share(sum(results), n) for m, results in right.items()}, "length": bias}
    if criterion.held_out:  # a wording the judge cannot read would be no witness against the rewarded one
        witness = {**share(sum(results_of(HELD_OUT)), n), **_calibrate(rows, name, HELD_OUT)}
        entry["held_out"] = {"text": criterion.held_out, "n": n, **witness}
    return entry


def _fit(result: dict[str, float], n: int, p: float, baseline: float) -> tuple[bool, str]:
    """Return (is the judge fit for the criterion?, why)."""
    right = f"{result['accuracy']:.0%} right"
    if n < FEWEST:
        return False, f"only {n} exam pairs; at least {FEWEST} are needed to tell"
    if p > 0.025:  # one-sided: the half of 5% above chance
        interval = f"{result['low']:.0%} to {result['high']:.0%}"
        return False, f"{right} ({interval}): not distinguishable from chance"
    if result["accuracy"] <= baseline:
        return False, f"{right}, but 'longer wins' gets {baseline:.0%}"
    return True, f"{right}, above chance and above 'longer wins' ({baseline:.0%})"


def _calibrate(rows: list[tuple[dict, Side]], name: str, method: str) -> dict[str, float]:
    """Return {slope, middle} of one method; pairs the judge could not score take no part."""
    raw = [(good[name, method], bad[name, method]) for _, (good, bad) in rows]
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


def apply(judge: Judge, exam: dict) -> None:
    """Give the judge each criterion's method and calibration: from here on it speaks in probabilities."""
    judge.method, judge.calibration, judge.other_words = {}, {}, {}
    for name, entry in exam["criteria"].items():
        judge.method[name] = entry["method"]
        judge.calibration[name] = Calibration(entry["slope"], entry["middle"])
        other = entry.get("held_out")
        if other and other["low"] > 0.5:  # a witness must itself beat chance
            judge.other_words[name] = Calibration(other["slope"], other["middle"])


def unfit(result: dict) -> dict[str, str]:
    """Return {criterion: why} of the criteria that carry weight and failed."""
    entries = result["criteria"].items()
    return {name: entry["why"] for name, entry in entries if entry["weight"] > 0 and not entry["fit"]}


def open_judge(
    worker: Worker, judge: str, rubric: Rubric, gpu_layers: int, pairs_path: Path, lora="auto", methods=()
) -> tuple[Judge, dict]:
    """Return (the judge, its exam), methods and calibration applied. The exam is taken once and cached."""
    path, adapter = resolve_judge(judge), resolve_judge_lora(judge, lora)
    examined = Judge(worker, path, rubric, gpu_layers, lora=adapter)
    hashes = {
        "judge_hash": file_hash(path) + (f"+{file_hash(adapter)}" if adapter else ""),
        "rubric_hash": rubric.hash,
        "exam_hash": file_hash(pairs_path) if pairs_path.is_file() else "missing",
    }
    key = "-".join((*hashes.values(), f"v{READING_VERSION}", *sorted(methods)))
    cached = cache_directory() / f"exam-{key}.json"
    if not cached.exists():
        with file_lock(cached):  # of several processes one examines, the others wait for its result
            if not cached.exists():
                pairs = load_pairs(pairs_path, [c.name for c in rubric.criteria])
                count = f"{len(pairs)} pairs (once per judge, rubric and exam)"
                say(f"examining the judge {path.name} on {count}")
                with progress("pairs", len(pairs)) as on_progress:
                    result = run_exam(examined, pairs, hashes, on_progress, methods)
                if judge == EMBEDDED:
                    result["judge"] = EMBEDDED  # not the cache's name for it
                write_json(cached, {**result, "lora": adapter.name if adapter else None})
    # One verdict for all processes, wherever their caches are.
    result = distributed.same(json.loads(cached.read_text()))
    apply(examined, result)
    if machine.has_gpu() and gpu_layers and not examined.info["gpu"]:
        why = "because llama.cpp was built for no GPU: `doctor` prints the line that mends it"
        say(f"  the judge runs on the CPU, {why}")
    return examined, result


def drop_unfit_criteria(rubric: Rubric, result: dict, policy: str, force: bool) -> tuple[Rubric, list[str]]:
    """Return (the rubric to train with, names of dropped criteria).

    policy: refuse or drop what the judge failed; force keeps it. Raises UserError if criteria are refused, or
    if none is left.
    """
    failed, name = unfit(result), result["judge"]
    reasons = "; ".join(f"{criterion}: {why}" for criterion, why in failed.items())
    if force:
        for criterion, why in failed.items():
            say(f"  FORCED: the judge is unfit for {criterion}: {why}")
        return rubric, []
    if failed and policy == "refuse":
        fix = "Give a better --judge, drop these criteria with --unfit drop, or insist with --force-judge"
        raise UserError(f"the judge {name} is unfit for {', '.join(failed)} ({reasons}). {fix}")
    left = rubric.without(failed)
    if failed and not any(left.weights.values()):
        raise UserError(f"the judge {name} is unfit for every criterion ({reasons}); give a better --judge")
    for criterion, why in failed.items():
        say(f"  dropped from the reward: {criterion} ({why})")
    return left if failed else rubric, list(failed)
