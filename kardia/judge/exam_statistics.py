"""Estimate how right a judge is: intervals, calibration, choice of a method, a permutation test."""

from __future__ import annotations

import math
import random

from kardia.judge.judge import Calibration


def right_or_wrong(better: float | None, worse: float | None) -> float:
    """Return 1, 0, or one half for a tie; a pair the judge could not score counts as wrong."""
    if better is None or worse is None:
        return 0.0
    return 0.5 if better == worse else float(better > worse)


def share(correct: float, n: int) -> dict[str, float]:
    """Return {correct, accuracy, low, high}: a share of n pairs with its Wilson interval."""
    low, high = wilson(correct, n)
    return {"correct": correct, "accuracy": correct / n if n else 0.0, "low": low, "high": high}


def wilson(correct: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion (Wilson 1927): (low, high).

    Ours and not scipy.stats.binomtest's, which takes whole numbers only: a tie counts one half.
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = correct / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def fit_calibration(better: list[float], worse: list[float]) -> Calibration:
    """Return the logistic regression of "is the better one" on raw numbers: Newton's method, a light ridge.

    The middle is the point where better and worse are equally likely.
    """
    import numpy as np

    x, y = np.array(better + worse, float), np.array([1.0] * len(better) + [0.0] * len(worse))  # [replies]
    scale = float(x.std()) or 1.0
    middle = float(np.median(x))
    z = (x - middle) / scale  # [replies]
    a, b = 1.0, 0.0

    def loss(a: float, b: float) -> float:
        return float(np.logaddexp(0, np.where(y == 1, -(a * z + b), a * z + b)).sum() + 0.25 * a * a)

    for _ in range(50):
        # Beyond 30 p is 0 or 1 in float64 and exp may overflow; 1e-6 keeps the Hessian invertible then.
        p = 1 / (1 + np.exp(-np.clip(a * z + b, -30, 30)))
        w = np.maximum(p * (1 - p), 1e-6)
        gradient = np.array([((p - y) * z).sum() + 0.5 * a, (p - y).sum()])
        hessian = np.array([[(w * z * z).sum() + 0.5, (w * z).sum()], [(w * z).sum(), w.sum() + 1e-6]])
        step = np.linalg.solve(hessian, gradient)
        while loss(a - step[0], b - step[1]) > loss(a, b) + 1e-9 and abs(step).max() > 1e-6:
            step = step / 2  # an outlier would throw the plain step far out
        a, b = a - float(step[0]), b - float(step[1])
        if abs(step).max() < 1e-6:
            break
    # Nothing learned, or the wrong way round: a negative slope would reward worse replies. The slope of one
    # standard deviation still spreads the scores over 0..1.
    if a < 0.2:
        a, b = 1.0, 0.0
    return Calibration(slope=a / scale, middle=middle - b / a * scale)


def choose_method(right: dict[str, list[float]], folds: int = 5) -> tuple[str, list[float]]:
    """Return (the method best on all pairs, right or wrong per pair under cross-validation).

    right: {method: 1, 0 or one half per pair}. In each fold the method is chosen on the other folds and
    counted on this one, so choosing does not flatter the estimate. Ties go to the method that stands first.
    """
    n = len(next(iter(right.values())))
    total, held_out = {method: sum(results) for method, results in right.items()}, [0.0] * n
    for fold in range(min(folds, n)):
        others = {method: total[method] - sum(results[fold::folds]) for method, results in right.items()}
        held_out[fold::folds] = right[max(others, key=others.get)][fold::folds]
    return max(total, key=total.get), held_out


def chance(right: dict[str, list[float]], correct: float, draws: int = 2000) -> float:
    """Return a p-value: how often a judge that tosses coins does as well, the choice of method included.

    A permutation test: in every draw a coin decides for each pair whether better and worse are swapped, for
    all methods at once, and the whole procedure is repeated. (scipy's repeats no choice; Wilson's interval
    alone knows nothing of the choosing: of judges that toss coins it would pass 7 to 10% of the time.)
    """
    rng, n = random.Random(0), len(next(iter(right.values())))
    as_good = 0
    for _ in range(draws):
        swap = [rng.random() < 0.5 for _ in range(n)]
        flipped = {m: [1 - r if s else r for r, s in zip(results, swap)] for m, results in right.items()}
        as_good += sum(choose_method(flipped)[1]) >= correct
    return (as_good + 1) / (draws + 1)
