"""Choose the groups of replies that the report shows, and tint their tokens by how far a step moved them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from kardia.results.groups import (
    advantages_of,
    compared_of,
    groups_of,
    means_of,
    rewards_of,
    spread_of,
    why_pushed,
)
from kardia.results.run_files import mean_of, moves_of, number

CARDS = 16  # replies of one group


class Limits(NamedTuple):
    """How much of a run's texts the page shows."""

    groups: int  # of the browser; examples too
    clip: int  # characters of one text
    tokens: int  # tinted, of one reply


def _place_of(row: dict) -> tuple:
    return tuple(number(row.get(key)) or 0 for key in ("step", "group", "sample"))


def _even(found: list[int], n: int) -> list[int]:
    """Return n of the numbers at even distances, all of them if there are fewer."""
    return [found[round(i * (len(found) - 1) / max(1, n - 1))] for i in range(min(n, len(found)))]


def _tint(move: float, strongest: float) -> str:
    degree = min(5, math.ceil(5 * abs(move) / strongest - 0.5))
    return f"{'u' if move > 0 else 'd'}{degree}" if degree else ""


def _tokens(ranked: list[dict], traced: dict, most: int) -> dict[str, Any] | None:
    """Return the tokens of replies with their tint: u1..u5 became more likely, d1..d5 less likely.

    The strongest tint is the change that 19 of 20 tokens of the group stay below."""
    known = [(sample, traced[_place_of(sample)]) for sample in ranked if _place_of(sample) in traced]
    cards = []
    sizes = [abs(b - a) for _, row in known for _, a, b in moves_of(row) if a is not None and b is not None]
    strongest = max(sorted(sizes)[int(0.95 * (len(sizes) - 1))], 1e-4) if sizes else 1.0
    for sample, row in known:
        shown, moved, epsilon = [], [], number(row.get("epsilon"))
        for token, before, after in moves_of(row):
            if before is None or after is None:
                shown.append((token, None, None, ""))
                continue
            moved.append(after - before)
            shown.append((token, before, after, _tint(after - before, strongest)))
        ratios = [math.exp(min(move, 50.0)) for move in moved]
        card = {"sample": sample, "n": len(moved), "up": sum(move > 0 for move in moved), "epsilon": epsilon}
        card["clipped"] = sum(not 1 - (epsilon or 0) <= r <= 1 + (epsilon or 0) for r in ratios)
        cards.append(card | {"mean": mean_of(moved), "tokens": shown[:most], "left": len(shown) - most})
    return {"cards": cards, "strongest": strongest} if cards and most else None


def browse(data: dict, limits: Limits) -> dict[str, Any] | None:
    """Return the groups that are shown, each with its samples in order of advantage."""
    groups = groups_of(data["completions"])
    if not groups:
        return None
    traced, shown = {_place_of(row): row for row in data["tokens"]}, []
    inspected = [i for i, (*_, rows) in enumerate(groups) if any(_place_of(row) in traced for row in rows)]
    widest = max(range(len(groups)), key=lambda i: spread_of(groups[i][2]))
    every = list(range(len(groups)))
    # The widest spread, both ends, then inspected groups, then others over the whole run.
    wanted = [widest, 0, len(groups) - 1, *_even(inspected, limits.groups // 2), *_even(every, limits.groups)]
    for i in sorted(list(dict.fromkeys([*wanted, *every]))[: limits.groups]):
        step, group, samples = groups[i]
        rewards = rewards_of(samples)
        # Samples without a reward come last.
        by = [(r is not None, number(s.get("advantage")) or 0.0) for r, s in zip(rewards, samples)]
        ranked = [samples[j] for j in sorted(range(len(samples)), key=lambda j: by[j], reverse=True)][:CARDS]
        tokens = _tokens(ranked, traced, limits.tokens)
        view = {"step": step, "group": group, "first": samples[0], "size": len(samples), "tokens": tokens}
        view["means"] = {kind: means_of(samples, kind) for kind in ("components", "criteria")}
        compared = compared_of(groups, step, group)
        view["cards"] = [{"row": row, "why": why_pushed(row, samples, compared)} for row in ranked]
        view |= {"open": i == widest, "rewards": [r for r in rewards if r is not None]}
        shown.append(view | {"spread": spread_of(samples), "mean": advantages_of(rewards)[0]})
    rings = any(row.get("witness") for row in data["completions"])
    return {"shown": shown, "total": len(groups), "rings": rings}
