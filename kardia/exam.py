"""Is this GGUF fit to judge? Pairs of a better and a worse reply, one criterion each, decide before any training does.

A criterion is fit when the judge beats chance (the lower end of its Wilson 95% interval is above one half) and beats
the dumbest rival there is: "the longer reply wins". The exam also calibrates the raw numbers (see judge.Calibration).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path

from kardia.judge import KNOWN_BAD, Calibration, Item, Judge


class ExamError(RuntimeError):
    """An exam file that cannot be used: one line for the user."""


def load_pairs(path: Path, criteria: list[str]) -> list[dict]:
    """Exam rows {criterion, better, worse, person, situation, messages, ...}; every error of the file at once."""
    if not Path(path).is_file():
        raise ExamError(f"{path}: no such exam file; data/judge_exam.jsonl is the one that comes with the project")
    rows, errors = [], []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            missing = [key for key in ("criterion", "better", "worse", "messages") if not row.get(key)]
            if missing:
                errors.append(f"{path}:{number}: found no {missing[0]} / expected criterion, better, worse and messages")
            elif row["criterion"] in criteria:
                rows.append(row)
        except (ValueError, AttributeError) as error:
            errors.append(f"{path}:{number}: found {str(error)[:60]} / expected one JSON object")
    if errors:
        raise ExamError("\n".join(errors[:20]))
    if not rows:
        raise ExamError(f"{path}: no pair for the criteria {', '.join(criteria)}")
    return rows


def wilson(correct: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927): (low, high)."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = correct / n, z * z
    middle, half = (p + z2 / (2 * n)) / (1 + z2 / n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def fit_calibration(better: list[float], worse: list[float]) -> Calibration:
    """Logistic regression of "is the better one" on the raw number: Newton's method, a light ridge on the slope.

    The middle is the point where better and worse are equally likely; with too little to go on (or a judge that is
    wrong more often than right) the slope is that of one standard deviation, so scores still spread over 0..1.
    """
    import numpy as np

    x, y = np.array(better + worse, float), np.array([1.0] * len(better) + [0.0] * len(worse))
    scale = float(x.std()) or 1.0
    middle = float(np.median(x))
    z = (x - middle) / scale
    a, b = 1.0, 0.0
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(a * z + b, -30, 30)))
        w = np.maximum(p * (1 - p), 1e-6)
        gradient = np.array([((p - y) * z).sum() + 0.5 * a, (p - y).sum()])
        hessian = np.array([[(w * z * z).sum() + 0.5, (w * z).sum()], [(w * z).sum(), w.sum() + 1e-6]])
        step = np.linalg.solve(hessian, gradient)
        a, b = a - float(step[0]), b - float(step[1])
        if abs(step).max() < 1e-6:
            break
    if a < 0.2:
        a, b = 1.0, 0.0
    return Calibration(slope=a / scale, middle=middle - b / a * scale)


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def run_exam(judge: Judge, pairs: list[dict], judge_hash: str, rubric_hash: str, exam_hash: str, progress=lambda done, total: None) -> dict:
    """Judge every pair; returns the exam dict that goes to the run (accuracy, interval, baseline, verdict, calibration per criterion)."""
    started, numbers = time.time(), []
    for done, row in enumerate(pairs, 1):
        history = tuple((m["role"], m["content"]) for m in row["messages"])
        items = [Item(row.get("person", ""), row.get("situation", ""), history, row[key]) for key in ("better", "worse")]
        numbers.append(judge.raw(items, only=row["criterion"]))
        progress(done, len(pairs))
    seconds = time.time() - started
    criteria = {}
    for criterion in judge.rubric.criteria:
        chosen = [(row, raw) for row, raw in zip(pairs, numbers) if row["criterion"] == criterion.name]
        criteria[criterion.name] = _verdict(criterion, chosen)
    n = sum(c["n"] for c in criteria.values())
    correct = sum(c["correct"] for c in criteria.values())
    low, high = wilson(correct, n)
    longer = sum(c["length_baseline"] * c["n"] for c in criteria.values())
    return {
        "judge": Path(judge.path).name, "judge_hash": judge_hash, "rubric_hash": rubric_hash, "exam_hash": exam_hash, "pairs": len(pairs), "seconds": round(seconds, 2),
        "scores_per_second": round(2 * len(pairs) / seconds, 2), "criteria": criteria,
        "overall": {"accuracy": correct / n if n else 0.0, "low": low, "high": high, "length_baseline": longer / n if n else 0.0},
    }  # fmt: skip


def _verdict(criterion, chosen: list[tuple[dict, list[dict]]]) -> dict:
    """Accuracy of one criterion on its own pairs; a tie counts half, a pair the judge could not score counts as wrong."""
    better, worse, correct, longer = [], [], 0.0, 0.0
    for row, (good, bad) in chosen:
        a, b = good[criterion.name], bad[criterion.name]
        if a is not None and b is not None:
            better += [a] * (a != KNOWN_BAD)
            worse += [b] * (b != KNOWN_BAD)
            correct += 1.0 if a > b else 0.5 if a == b else 0.0
        length = len(row["better"]) - len(row["worse"])
        longer += 1.0 if length > 0 else 0.5 if length == 0 else 0.0
    n = len(chosen)
    low, high = wilson(correct, n)
    accuracy, baseline = (correct / n, longer / n) if n else (0.0, 0.0)
    fit, why = True, f"{accuracy:.0%} right, above chance and above 'longer wins' ({baseline:.0%})"
    if n < 10:
        fit, why = False, f"only {n} exam pairs; at least 10 are needed to tell"
    elif low <= 0.5:
        fit, why = False, f"{accuracy:.0%} right ({low:.0%} to {high:.0%}): not distinguishable from chance"
    elif accuracy <= baseline:
        fit, why = False, f"{accuracy:.0%} right, but 'longer wins' gets {baseline:.0%}"
    calibration = fit_calibration(better, worse) if better and worse else Calibration()
    return {"method": criterion.method, "correct": correct, "n": n, "accuracy": accuracy, "low": low, "high": high, "length_baseline": baseline, "fit": fit,
            "why": why, "weight": criterion.weight, "slope": calibration.slope, "middle": calibration.middle}  # fmt: skip


def apply(judge: Judge, exam: dict) -> None:
    """Give the judge the exam's calibration: from here on `judge.scores` speaks in probabilities."""
    judge.calibration = {name: Calibration(entry["slope"], entry["middle"]) for name, entry in exam["criteria"].items()}


def unfit(exam: dict) -> dict[str, str]:
    """{criterion: why} of the criteria that carry weight and failed."""
    return {name: entry["why"] for name, entry in exam["criteria"].items() if entry["weight"] > 0 and not entry["fit"]}
