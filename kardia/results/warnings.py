"""Notice what a careful reader would: signs that the policy pleases the judge and not the person.

GRPO raises whatever raises the reward. If the judge can be pleased cheaply (by length, a stock phrase, words
of its own rubric), the policy learns that, and the reward's curve looks the same. No warning proves it: each
gives its numbers and says what to read or change. The texts hold a model's words; whoever makes HTML escapes
them. This file reads exam, log and rewards; `reply_warnings` reads the replies.
"""

from __future__ import annotations

from collections.abc import Iterator

from kardia.results.groups import groups_of, rewards_of, spread_of
from kardia.results.no_signal import diagnose, plain_names
from kardia.results.reply_groups import LIMITS, RunWarning, warn
from kardia.results.reply_warnings import check_replies
from kardia.results.run_files import answer_format_of, is_grpo, mean_of, number, quarters, series
from kardia.results.statistics import well_read


def rubric_counts(run: dict) -> bool:
    """Return whether the rubric carries weight in a run's reward; it does where nothing else is recorded."""
    weights = (run.get("reward") or {}).get("weights") or {}
    return number(weights.get("rubric")) != 0


def _exam(data: dict, run: dict, rows: list[dict]) -> Iterator[RunWarning]:
    dropped = run.get("dropped_criteria") or []
    if dropped:
        yield warn("dropped", names=plain_names(dropped))
    criteria = (data.get("exam") or {}).get("criteria") or {}
    failed = {name: entry for name, entry in criteria.items() if not entry.get("fit")}
    unfit = [name for name, entry in failed.items() if number(entry.get("weight")) and name not in dropped]
    if unfit and rubric_counts(run):
        yield warn("unfit", names=plain_names(unfit))
    unknown = sum(number(row.get("reward")) is None for row in rows)
    if unknown > LIMITS.unknown * len(rows):
        yield warn("unknown", n=unknown, of=len(rows))


def _rates(row: dict) -> dict[str, float | None]:
    """Return how often the written replies win, per criterion, at one measurement of enough answers."""
    return {name: number(entry.get("rate")) for name, entry in well_read(row.get("wins")).items()}


def _over_optimized(measured: list[dict], run: dict, exam: dict) -> Iterator[RunWarning]:
    """Yield a warning if the policy scores above written replies on held-out prompts, and did not before.

    What carries no weight was not optimized, and what was lost before the first step is the judge's failing.
    """
    # The measurement before the first step is a test of the judge, not of the policy.
    later = [row for row in measured if number(row.get("step"))]
    for row in later[-1:] if rubric_counts(run) else []:
        won, criteria = _rates(row), exam.get("criteria") or {}
        idle = {name for name, entry in criteria.items() if number(entry.get("weight")) == 0}
        idle |= set(run.get("dropped_criteria") or [])
        before = [_rates(first) for first in measured if number(first.get("step")) == 0]
        idle |= {name for rates in before for name, rate in rates.items() if rate is not None and rate < 0.5}
        lost = [name for name, rate in won.items() if rate is not None and rate < 0.5 and name not in idle]
        if lost:
            step, first = number(row["step"]), row["wins"][lost[0]]
            facts = {"names": plain_names(lost), "step": step, "share": won[lost[0]], "of": first["n"]}
            yield warn("over-optimized", **facts)


def _signal(rows: list[dict], log: list[dict]) -> Iterator[RunWarning]:
    groups = [group for group in groups_of(rows) if sum(r is not None for r in rewards_of(group[2])) > 1]
    silent = [share for _, share in series(log, "frac_reward_zero_std")]
    silent = silent or [float(spread_of(group[2]) < 1e-6) for group in groups]
    n = len(silent) // 4
    # Two quarters are looked at, because a quarter of two groups may be silent by chance.
    if n < 2 or mean_of(silent[-n:]) <= LIMITS.no_signal or mean_of(silent[-2 * n :]) <= 0.5:
        return
    late = [group for group in groups[-(len(groups) // 4) :] if spread_of(group[2]) < 1e-6]
    why = f". {diagnose(late)}" if late else ": try harder prompts or a higher temperature."
    yield warn("no signal", share=mean_of(silent[-n:]), why=why)


def _log(log: list[dict]) -> Iterator[RunWarning]:
    keys = {"cut": "completions/clipped_ratio", "entropy": "entropy", "tokens": "completions/mean_length"}
    ends = {name: quarters(log, key) or (0.0, 0.0) for name, key in keys.items()}
    fires = {"cut": ends["cut"][1] > LIMITS.cut}
    fires["entropy"] = ends["entropy"][1] < LIMITS.entropy * ends["entropy"][0]
    fires["tokens"] = ends["tokens"][1] > LIMITS.grew * ends["tokens"][0]
    yield from (warn(name, early=ends[name][0], late=ends[name][1]) for name in keys if fires[name])


def check(data: dict) -> list[RunWarning]:
    """Return the warnings of a run as `read_run` returns it; none for SFT, whose entropy should fall."""
    run, rows, log = data.get("run") or {}, data.get("completions") or [], data.get("log") or []
    if not is_grpo({"run": run, "completions": rows, "log": log}):
        return []
    reply = answer_format_of({"run": run})["reply"]
    exam = data.get("exam") or {}
    counts = rubric_counts(run)
    if not counts:  # the judge and its witness are both onlookers
        exam = {"criteria": {name: {"weight": 0.0} for name in exam.get("criteria") or {}}}
    replies = check_replies(rows, reply, run, exam, counts)
    measured = _over_optimized(data.get("held_out") or [], run, data.get("exam") or {})
    return [*_exam(data, run, rows), *_signal(rows, log), *_log(log), *measured, *replies]
