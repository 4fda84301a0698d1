"""The numbers behind a claim: bootstrap intervals, paired differences, the trend of a run's reward, tables for the terminal."""

from __future__ import annotations

import json
from typing import Any


def bootstrap(values, rng, n: int = 2000) -> dict[str, float]:
    """Mean of `values` [prompts] with a percentile bootstrap 95% interval over prompts (Efron 1979)."""
    import numpy as np

    values = np.asarray(values, float)
    means = values[rng.integers(0, len(values), (n, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}


def reward_trend(run) -> dict[str, Any] | None:
    """Slope of the groups' mean reward over steps, with a bootstrap 95% interval over groups; None with too few groups."""
    import numpy as np

    groups: dict[tuple[int, int], list[float]] = {}
    path = run.path / "completions.jsonl"
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        if not line:
            continue
        record = json.loads(line)
        if record["reward"] is not None:
            groups.setdefault((record["step"], record["group"]), []).append(record["reward"])
    if len({step for step, _ in groups}) < 4:
        return None
    steps, means = (
        np.array([step for step, _ in groups], float),
        np.array([np.mean(r) for r in groups.values()]),
    )
    rng = np.random.default_rng(0)
    slopes = []
    while len(slopes) < 2000:
        pick = rng.integers(0, len(steps), len(steps))
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


def summarize(dialogues, answers, scores, rubric, seed: int) -> dict[str, Any]:
    """Means with intervals per model, paired differences between neighbours and to the first model, win rates, examples."""
    import numpy as np

    metrics = ["format", rubric.form.label, "rubric", *(c.name for c in rubric.criteria)]
    table = {
        name: {
            m: np.array(
                [np.nan if (v := {**r.components, **r.criteria}.get(m)) is None else v for r in rewards]
            )
            for m in metrics
        }
        for name, rewards in scores.items()
    }
    names, rng = list(table), np.random.default_rng(seed)
    summary: dict[str, Any] = {
        "models": names,
        "rewards": metrics[:3],
        "prompts": len(dialogues),
        "metrics": {},
        "differences": [],
        "win_rate": [],
        "examples": [],
    }
    for name in names:
        summary["metrics"][name] = {
            m: bootstrap(v[~np.isnan(v)], rng) for m, v in table[name].items() if (~np.isnan(v)).any()
        }
    for i, name in enumerate(names[1:], 1):
        for other in dict.fromkeys([names[i - 1], names[0]]):
            for m in metrics:
                difference = table[name][m] - table[other][m]
                if (known := difference[~np.isnan(difference)]).size:
                    summary["differences"].append(
                        {"better": name, "than": other, "metric": m, **bootstrap(known, rng)}
                    )
            gap = table[name]["rubric"] - table[other]["rubric"]
            gap = gap[~np.isnan(gap)]
            if gap.size:
                wins = bootstrap((gap > 0) + 0.5 * (gap == 0), rng)
                summary["win_rate"].append(
                    {
                        "model": name,
                        "against": other,
                        "rate": wins["mean"],
                        "low": wins["low"],
                        "high": wins["high"],
                        "ties": int((gap == 0).sum()),
                    }
                )
    for i in range(min(6, len(dialogues))):
        d = dialogues[i]
        shown = {
            name: {
                "text": answers[name][i],
                "valid": scores[name][i].problem is None,
                "problem": scores[name][i].problem,
                "scores": scores[name][i].criteria,
            }
            for name in names
        }
        summary["examples"].append(
            {
                "person": d.person,
                "situation": d.situation,
                "label": d.label,
                "messages": [{"role": r, "content": c} for r, c in d.messages],
                "answers": shown,
            }
        )
    return summary
