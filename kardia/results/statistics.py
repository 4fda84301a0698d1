"""Compute the numbers behind a claim: bootstrap intervals, paired differences, the trend of a run's reward,
curves."""

from __future__ import annotations

from typing import Any

from kardia.results.groups import groups_of, rewards_of
from kardia.results.run_files import number, read_run


def bootstrap(values, rng, n: int = 2000) -> dict[str, float]:
    """Return the mean of `values` [prompts] with a percentile bootstrap 95% interval (Efron 1979)."""
    import numpy as np

    values = np.asarray(values, float)
    means = values[rng.integers(0, len(values), (n, len(values)))].mean(1)  # [n]
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def reward_trend(run) -> dict[str, Any] | None:
    """Return the slope of the groups' mean reward over steps, with a bootstrap 95% interval over groups.

    `run` has a `path`. Returns None with fewer than four steps that have a reward."""
    import numpy as np

    points = []  # (step, mean reward) of each group
    for step, _, samples in groups_of(read_run(run.path)["completions"]):
        known = [reward for reward in rewards_of(samples) if reward is not None]
        if known:
            points.append((step, np.mean(known)))
    if len({step for step, _ in points}) < 4:
        return None
    steps, means = np.array(points, float).T  # [groups] each
    rng, slopes = np.random.default_rng(0), []
    while len(slopes) < 2000:
        pick = rng.integers(0, len(steps), len(steps))
        # A sample that drew one step only has no slope.
        if np.ptp(steps[pick]) > 0:
            slopes.append(np.polyfit(steps[pick], means[pick], 1)[0])
    low, high = np.percentile(slopes, [2.5, 97.5])
    quarter = max(1, int(steps.max()) // 4)
    return {
        "slope_per_step": float(np.polyfit(steps, means, 1)[0]),
        "low": float(low),
        "high": float(high),
        "first_quarter": float(means[steps <= quarter].mean()),
        "last_quarter": float(means[steps > steps.max() - quarter].mean()),
        "steps": int(steps.max()),
    }


def smooth(points: list[tuple[float, float]]) -> list[tuple[float, float, float]]:
    """Return [(x, level, half width)] of a line fitted around each x; a moving mean would bend at both ends.

    The weights are Gaussian. The half width is that of a 95% interval in which each point is independent (a
    GRPO group is one: its samples share a prompt); NaN where fewer than three points carry the value."""
    import numpy as np

    x, y = np.array(points, float).T  # [points] each
    width, out = max(1.0, np.ptp(x) / 10), []
    for at in np.linspace(x.min(), x.max(), 61):
        near = np.abs(x - at) < 4 * width
        d, v = x[near] - at, y[near]
        w = np.exp(-0.5 * (d / width) ** 2)
        s0, s1, s2 = w.sum(), (w * d).sum(), (w * d * d).sum()
        determinant = s0 * s2 - s1 * s1
        if determinant < 1e-9:
            continue  # there is no line through a single step
        share = w * (s2 - s1 * d) / determinant  # of each point in the fitted value
        level, slope = (share * v).sum(), (w * (s0 * d - s1) * v).sum() / determinant
        effective = 1 / (share**2).sum()
        error = np.sqrt(((share * (v - level - slope * d)) ** 2).sum())
        half = 1.96 * error * np.sqrt(effective / (effective - 1)) if effective >= 3 else np.nan
        out.append((float(at), float(level), float(half)))
    return out


NEAR = "_or_near"  # after the label's name: the share of labels that are right or near the right one


def _scores_of(rewards, metric: str, label: str = ""):
    """Return one metric of each prompt [prompts]; NaN where the judge could not read the answer.

    Of the label it is whether it is exactly right, whatever a near one earns in training."""
    import numpy as np

    if label and metric in (label, f"{label}{NEAR}"):
        credits = np.array([reward.components[label] for reward in rewards], float)
        return (credits == 1 if metric == label else credits > 0).astype(float)
    values = [{**reward.components, **reward.criteria}.get(metric) for reward in rewards]
    return np.array([np.nan if value is None else value for value in values], float)


def _witness_columns(rewards) -> dict[str, Any]:
    """Return {"criterion (witness)": scores [prompts]}; NaN where it could not read the answer."""
    import numpy as np

    names = dict.fromkeys(name for reward in rewards for name in reward.witness)
    known = {name: [reward.witness.get(name) for reward in rewards] for name in names}
    unknown = {name: [np.nan if x is None else x for x in values] for name, values in known.items()}
    return {f"{name} (witness)": np.array(values, float) for name, values in unknown.items()}


def _gap(table: dict, name: str, other: str, metric: str):
    """Return the paired differences of two models on one metric, without unknown ones."""
    import numpy as np

    gap = table[name][metric] - table[other][metric]
    return gap[~np.isnan(gap)]


def _compare(summary: dict, table: dict, name: str, other: str, rng) -> None:
    """Add the paired differences of two models, and how often the first wins on the rubric, to `summary`.

    table: {model: {metric: [prompts]}}."""
    for metric in [metric for metric in table[name] if metric in table[other]]:
        gap = _gap(table, name, other, metric)
        if gap.size:
            entry = {"better": name, "than": other, "metric": metric, **bootstrap(gap, rng)}
            summary["differences"].append(entry)
    gap = _gap(table, name, other, "rubric")
    if gap.size:
        wins = bootstrap((gap > 0) + 0.5 * (gap == 0), rng)
        entry = {"model": name, "against": other, "rate": wins["mean"], "low": wins["low"]}
        summary["win_rate"].append(entry | {"high": wins["high"], "ties": int((gap == 0).sum())})


def _example(i: int, dialogue, answers: dict, scores: dict) -> dict[str, Any]:
    example = {"person": dialogue.person, "situation": dialogue.situation, "label": dialogue.label}
    example["messages"] = [{"role": role, "content": content} for role, content in dialogue.messages]
    example["answers"] = {}
    for name, reward in ((name, rewards[i]) for name, rewards in scores.items()):
        answer = {"text": answers[name][i], "valid": reward.problem is None, "problem": reward.problem}
        answer |= {"components": reward.components, "scores": reward.criteria, "refused": reward.refused}
        example["answers"][name] = {**answer, "witness": reward.witness}
    return example


FEWEST = 8  # answers that the judge read: fewer say nothing of it


def reference_wins(scores, references: dict[int, Any], names: list[str], seed: int = 0) -> dict[str, dict]:
    """Return {model: {metric: {rate, low, high, n}}}: how often the written reply scores above the model's.

    references: {number of the dialogue: reward of its written reply}. A tie counts one half. Only pairs that
    the judge read count, n of them: a reply that a guard refused loses without it, and a policy that learns
    the form would seem to gain on the written replies."""
    import numpy as np

    wins: dict[str, dict] = {}
    rng = np.random.default_rng(seed)
    for model, rewards in scores.items():
        pairs = [(reference, rewards[i]) for i, reference in references.items()]
        pairs = [pair for pair in pairs if not any(side.refused for side in pair)]
        for name in names if pairs else []:
            written, own = (_scores_of(side, name) for side in zip(*pairs))
            gap = (written - own)[~np.isnan(written - own)]
            if gap.size:
                found = bootstrap((gap > 0) + 0.5 * (gap == 0), rng)
                entry = {"rate": found["mean"], "low": found["low"], "high": found["high"], "n": found["n"]}
                wins.setdefault(model, {})[name] = entry
    return wins


def witness_means(scores, rng) -> dict[str, dict]:
    """Return {model: {criterion: mean with interval}} of what the witness reads; {} without one."""
    means: dict[str, dict] = {}
    for model, rewards in scores.items():
        for name in rewards[0].witness if rewards else []:
            known = [r.witness[name] for r in rewards if r.witness.get(name) is not None]
            if known:
                means.setdefault(model, {})[name] = bootstrap(known, rng)
    return means


def well_read(wins: dict[str, dict] | None) -> dict[str, dict]:
    """Return those entries of a model's `reference_wins` that rest on enough answers; {} of none."""
    entries = {name: entry or {} for name, entry in (wins or {}).items()}
    return {name: entry for name, entry in entries.items() if (number(entry.get("n")) or 0) >= FEWEST}


def summarize(dialogues, answers, scores, rubric, seed: int, references=None) -> dict[str, Any]:
    """Return what evaluation.json holds: means with intervals, paired differences, win rates, all answers.

    `answers` and `scores` are {model: [one per dialogue]}. Each meets the one before it and the first.
    references: {number of the dialogue: reward of its written reply}, for the reference test."""
    import numpy as np

    label, shares = rubric.form.label, list(rubric.rewards)
    if rubric.near:
        shares.insert(shares.index(label) + 1, f"{label}{NEAR}")
    judged = ["rubric", *(c.name for c in rubric.criteria)]
    metrics = list(dict.fromkeys([*shares, *judged]))
    table = {name: {m: _scores_of(rewards, m, label) for m in metrics} for name, rewards in scores.items()}
    names, rng = list(table), np.random.default_rng(seed)
    summary: dict[str, Any] = {"models": names, "rewards": shares, "prompts": len(dialogues)}
    summary |= {"metrics": {}, "differences": [], "win_rate": []}
    for name in names:
        known = {m: values[~np.isnan(values)] for m, values in table[name].items()}
        summary["metrics"][name] = {m: bootstrap(values, rng) for m, values in known.items() if values.size}
    for name, rewards in scores.items():
        table[name] |= _witness_columns(rewards)  # compared, too
    for i, name in enumerate(names[1:], 1):
        for other in dict.fromkeys([names[i - 1], names[0]]):
            _compare(summary, table, name, other, rng)
    if references:
        summary["reference"] = reference_wins(scores, references, judged, seed)
    read = {**scores, "written": list(references.values())} if references else scores
    summary["witness"] = witness_means(read, rng)
    summary["examples"] = [_example(i, each, answers, scores) for i, each in enumerate(dialogues)]
    return summary
