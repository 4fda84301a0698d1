"""Work one GRPO group of a run by hand, as text: rewards, mean, deviation, advantages, and what the step did
to the tokens.

`toy` does the same without any run: its numbers are small enough to be redone on paper.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from kardia.results.groups import (
    advantages_of,
    compared_of,
    groups_of,
    is_closed,
    parts_of,
    rewards_of,
    spread_of,
    why_pushed,
)
from kardia.results.run_files import ReportError, answer_format_of, fixed, moves_of, number, read_run
from kardia.results.templates import ratio, template

MOST = 256  # samples of a group: a page of text for each


def _ranges(steps: set[int], most: int = 20) -> str:
    """Return {1, 2, 3, 7} as "1-3, 7"; of more than `most` stretches the first."""
    starts = sorted(s for s in steps if s - 1 not in steps)
    ends = sorted(s for s in steps if s + 1 not in steps)
    parts = [f"{a}-{b}" if b > a else str(a) for a, b in zip(starts, ends)]
    return ", ".join(parts[:most] + (["..."] if len(parts) > most else []))


def _choose(run: Path, data: dict, step: int | None) -> tuple[int, int, list[dict], str]:
    """Return (step, group, samples, why this one)."""
    groups = groups_of(data["completions"])
    if not groups:
        raise ReportError(f"{run}: no completions recorded; explain needs the directory of a GRPO run")
    wanted = [group for group in groups if step in (None, group[0])]
    if not wanted:
        steps = _ranges({number_ for number_, _, _ in groups})
        raise ReportError(f"{run}: no step {step} in completions.jsonl; it has {steps}")
    recorded = {(number(row.get("step")), number(row.get("group"))) for row in data["tokens"]}
    inspected, why = [group for group in wanted if group[:2] in recorded], "of the step"
    chosen = wanted[0]
    if step is None or inspected:
        chosen = max(inspected or wanted, key=lambda group: spread_of(group[2]))
    if step is None:
        kind = "inspected groups" if inspected else "groups"
        why = f"the widest spread of rewards in {len(inspected or wanted)} {kind}"
    if len(chosen[2]) > MOST:
        text = f"step {chosen[0]} has a group of {len(chosen[2])} samples; explain works through"
        raise ReportError(f"{run}: {text} {MOST} at most")
    return (*chosen, why)


def _numbers(i: int, row: dict, samples: list[dict], advantage: float, compared: Any) -> dict[str, Any]:
    """Return the numbers of one sample, for the template."""
    parts = [part for part in parts_of(row) if part[1] or part[2] is not None]  # rubric=0: nobody judged
    known = [(name, weight, value) for name, weight, value in parts if value is not None]
    scores = [(name, fixed(v, 4, none="not judged")) for name, v in (row.get("criteria") or {}).items()]
    numbers = {"row": row, "name": f"sample {row.get('sample', i)}", "advantage": advantage, "known": known}
    numbers["unknown"] = ", ".join(name for name, _, value in parts if value is None)
    numbers["total"] = sum(weight * value for _, weight, value in known)
    numbers["weights"] = sum(weight for _, weight, _ in known)
    numbers["criteria"] = ", ".join(f"{name} {score}" for name, score in scores)
    keys = {"reward": "reward", "stored": "advantage", "before": "logprob", "after": "logprob_after"}
    numbers |= {name: number(row.get(key)) for name, key in keys.items()}
    gap = 0.0 if numbers["stored"] is None else abs(numbers["stored"] - advantage)
    if compared:
        numbers["sum"] = compared.sums[i]
        numbers["parts"] = [(name, w, compared.parts[name][i]) for name, w in compared.weights.items()]
    witness = {name: fixed(v, 4) for name, v in (row.get("witness") or {}).items()}
    numbers["witness"] = ", ".join(f"{name} {score}" for name, score in witness.items())
    numbers["closed"] = is_closed(row)
    return {**numbers, "gap": gap, "why": why_pushed(row, samples, compared)}


def _moved(it: dict, moves: list[tuple], epsilon: float) -> dict[str, Any]:
    """Return the tokens of one reply that moved most, and how many moved with the push."""
    advantage, most = it["advantage"], []
    for token, before, after in sorted(moves, key=lambda move: -abs(move[2] - move[1]))[:6]:
        move = after - before
        past = (advantage > 0 and ratio(move) > 1 + epsilon) or (advantage < 0 and ratio(move) < 1 - epsilon)
        most.append((token, before, after, move, past))
    changes = [after - before for _, before, after in moves]
    right = sum(change * advantage > 0 for change in changes)
    return {**it, "moves": moves, "most": most, "right": right, "average": sum(changes) / len(changes)}


def _tokens(samples: list[dict], rows: list[dict]) -> dict[str, Any]:
    """Return which tokens moved and how much; `rows` are the group's lines of tokens.jsonl."""
    recorded, known = {number(row.get("sample")): row for row in rows}, []
    for it in samples:
        moves = moves_of(recorded.get(number(it["row"].get("sample")), {}))
        moves = [(token, a, b) for token, a, b in moves if a is not None and b is not None]
        if moves:
            known.append((it, moves))
    if not known:
        return {}
    epsilon = number(next(iter(recorded.values())).get("epsilon")) or 0.2
    if not 0 < epsilon < 1:
        epsilon = 0.2
    best, worst = (which(known, key=lambda pair: pair[0]["advantage"]) for which in (max, min))
    pushed = [_moved(it, moves, epsilon) for it, moves in ([best] if best is worst else [best, worst])]
    every = [(token, b - a, it["advantage"]) for it, moves in known for token, a, b in moves]
    up, down = math.log(1 + epsilon), math.log(1 - epsilon)
    traced = {"n": len(every), "largest": max(every, key=lambda move: abs(move[1]))[:2]}
    traced["k3"] = sum(ratio(m) - 1 - m for _, m, _ in every)
    traced["out"] = sum((a > 0 and m > up) or (a < 0 and m < down) for _, m, a in every)
    return {"epsilon": epsilon, "pushed": pushed, "traced": traced}


def explain(run: Path, step: int | None = None) -> str:
    """Return one GRPO group of `run`, number by number, as text of at most 100 columns.

    Of a step it is the inspected group (else the first); without a step, the one with the widest spread of
    rewards among the inspected groups (else among all). Raises ReportError if there is no such group."""
    data = read_run(run)
    number_, group, rows, why = _choose(run, data, step)
    first, rewards = rows[0], rewards_of(rows)
    mean, std, advantages = advantages_of(rewards)
    compared = compared_of(groups_of(data["completions"]), number_, group)
    if compared:
        advantages = compared.advantages
    samples = [_numbers(i, row, rows, a, compared) for i, (row, a) in enumerate(zip(rows, advantages))]
    here = [row for row in data["tokens"] if (row.get("step"), row.get("group")) == (number_, group)]
    logged = next((row for row in reversed(data["log"]) if row.get("step") == number_), {})
    steps = {int(row["step"]) for row in data["tokens"] if number(row.get("step")) is not None}
    facts = {"persona": first.get("person"), "situation": first.get("situation")}
    facts[answer_format_of(data)["label"]] = first.get("label") or first.get("emotion")
    text = {"step": number_, "group": group, "why": why, "samples": samples, "mean": mean, "std": std}
    text |= {"facts": facts, "messages": first.get("messages") or [], "other_steps": _ranges(steps)}
    text |= {"rewards": [r for r in rewards if r is not None], **_tokens(samples, here)}
    text["compared"] = compared
    return template("explain.txt.j2").render(text, clipped=number(logged.get("clip_ratio/region_mean")))
