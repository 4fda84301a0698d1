"""Compare a judge with people: AUC on replies that people rated, with an interval and the length baseline.

AUC is how often a reply that people rated high gets a higher score than one they rated low (ties count one
half): 0.5 is a coin. The model is asked without the guards, as in the exam.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kardia.core.console import UserError, progress, say
from kardia.core.files import cache_directory, digest, file_hash, file_lock, write_json
from kardia.data.people import OVERALL, load_rated
from kardia.judge.judge import Calibration, Judge, JudgedReply, weighted

DRAWS = 1000  # of the bootstrap


def auc(scores, rated_high) -> float | None:
    """Return the AUC of `scores` [replies] for `rated_high` [replies] of 1 and 0; None if one side is empty.

    It is Mann and Whitney's U over the number of pairs (Hanley and McNeil 1982).
    """
    import numpy as np
    from scipy.stats import rankdata

    # Ranks with ties averaged count a tie as one half.
    high = np.asarray(rated_high, bool)
    n, others = int(high.sum()), int((~high).sum())
    if not n or not others:
        return None
    return float((rankdata(scores)[high].sum() - n * (n + 1) / 2) / (n * others))


def auc_interval(scores, rated_high, draws: int = DRAWS) -> tuple[float | None, float | None]:
    """Return the 95% interval (low, high) of the AUC: percentile bootstrap over replies (Efron 1979)."""
    import numpy as np

    scores, high, rng = np.asarray(scores, float), np.asarray(rated_high, bool), np.random.default_rng(0)
    picks = rng.integers(0, len(scores), (draws, len(scores)))
    values = [value for pick in picks if (value := auc(scores[pick], high[pick])) is not None]
    if not values:
        return None, None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def rated_scores(judge: Judge, rows: list[dict], on_progress: Callable[[int], None]) -> list[float | None]:
    """Return the judge's score 0..1 of each rated reply on its criterion; None where it cannot tell."""
    by_name, plain, scores = {c.name: c for c in judge.rubric.criteria}, Calibration(), []
    for done, row in enumerate(rows, 1):
        # A rating of the whole reply is compared with the rubric, which needs every criterion.
        names = list(by_name) if row["criterion"] == OVERALL else [row["criterion"]]
        wanted = [(by_name[name], judge.chosen(by_name[name])) for name in names]
        try:
            reply = JudgedReply.from_row(row, judge.rubric.form)
        except ValueError as error:
            raise UserError(f"a rated reply of {row['set']} is {error}: {row['response'][:60]!r}") from error
        numbers = judge.numbers([reply], wanted, guarded=False)[0]
        each = {name: judge.calibration.get(name, plain)(raw) for (name, _), raw in numbers.items()}
        whole = row["criterion"] == OVERALL
        scores.append(weighted(each, judge.rubric.weights) if whole else each.get(row["criterion"]))
        on_progress(done)
    return scores


def agreement(rows: list[dict], scores: list[float | None]) -> list[dict[str, Any]]:
    """Return [{set, criterion, n, unknown, auc, low, high, length}], one per set and criterion of the rows.

    length: the AUC of "the longer reply is the better one".
    """
    results = []
    for name, criterion in dict.fromkeys((row["set"], row["criterion"]) for row in rows):
        of = [(s, r) for s, r in zip(scores, rows) if (r["set"], r["criterion"]) == (name, criterion)]
        known = [(score, row["y"]) for score, row in of if score is not None]
        entry = {"set": name, "criterion": criterion, "n": len(known), "unknown": len(of) - len(known)}
        values, rated = [score for score, _ in known], [y for _, y in known]
        low, high = auc_interval(values, rated) if known else (None, None)
        lengths = [len(row["response"]) for _, row in of]
        length = auc(lengths, [row["y"] for _, row in of])
        results.append(entry | {"auc": auc(values, rated), "low": low, "high": high, "length": length})
    return results


def compare_with_people(judge: Judge, exam_key: str, path: Path) -> list[dict[str, Any]]:
    """Return the agreement of an examined judge with a file of rated replies; read once, then kept.

    exam_key: the name of its exam in the cache, which says judge, rubric and chosen methods.
    """
    rows = load_rated(path, [c.name for c in judge.rubric.criteria])
    kept = cache_directory() / f"{_stem(exam_key)}-{file_hash(path)}.json"
    with file_lock(kept):
        if not kept.exists():
            say(f"comparing the judge with people on {len(rows)} rated replies of {path.name}")
            with progress("rated replies", len(rows)) as on_progress:
                write_json(kept, {"people": agreement(rows, rated_scores(judge, rows, on_progress))})
    return json.loads(kept.read_text(encoding="utf-8"))["people"]


def known_agreement(exam_key: str) -> list[dict[str, Any]]:
    """Return what `compare_with_people` has found about this judge so far, of all files, newest last."""
    kept = sorted(cache_directory().glob(f"{_stem(exam_key)}-*.json"), key=lambda path: path.stat().st_mtime)
    return merged(json.loads(path.read_text(encoding="utf-8"))["people"] for path in kept)


def merged(results: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return one entry per set and criterion: of a set that was measured again, the last one."""
    return list({(e["set"], e["criterion"]): e for entries in results for e in entries}.values())


def _stem(exam_key: str) -> str:
    return f"people-{digest(exam_key.encode())}"
