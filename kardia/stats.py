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
    steps, means = np.array([step for step, _ in groups], float), np.array([np.mean(r) for r in groups.values()])
    rng = np.random.default_rng(0)
    slopes = []
    while len(slopes) < 2000:
        pick = rng.integers(0, len(steps), len(steps))
        if np.ptp(steps[pick]) > 0:
            slopes.append(np.polyfit(steps[pick], means[pick], 1)[0])
    low, high = np.percentile(slopes, [2.5, 97.5])
    quarter = max(1, int(steps.max()) // 4)
    return {"slope_per_step": float(np.polyfit(steps, means, 1)[0]), "low": float(low), "high": float(high), "first_quarter": float(means[steps <= quarter].mean()),
            "last_quarter": float(means[steps > steps.max() - quarter].mean()), "steps": int(steps.max())}  # fmt: skip


def trend_sentence(trend: dict | None) -> str:
    if trend is None:
        return "  too few steps to tell whether the reward moved"
    verdict = "rose" if trend["low"] > 0 else "fell" if trend["high"] < 0 else "did not rise by more than chance explains"
    return (f"  mean reward of the rollouts {verdict}: {trend['first_quarter']:.3f} in the first quarter, {trend['last_quarter']:.3f} in the last; "
            f"slope {trend['slope_per_step']:+.4f} per step (95% interval {trend['low']:+.4f} to {trend['high']:+.4f})")  # fmt: skip


def summarize(dialogues, answers, scores, rubric, seed: int) -> dict[str, Any]:
    """Means with intervals per model, paired differences between neighbours and to the first model, win rates, examples."""
    import numpy as np

    metrics = ["format", rubric.form.label, "rubric", *(c.name for c in rubric.criteria)]
    table = {name: {m: np.array([np.nan if (v := {**r.components, **r.criteria}.get(m)) is None else v for r in rewards]) for m in metrics} for name, rewards in scores.items()}
    names, rng = list(table), np.random.default_rng(seed)
    summary: dict[str, Any] = {"models": names, "rewards": metrics[:3], "prompts": len(dialogues), "metrics": {}, "differences": [], "win_rate": [], "examples": []}
    for name in names:
        summary["metrics"][name] = {m: bootstrap(v[~np.isnan(v)], rng) for m, v in table[name].items() if (~np.isnan(v)).any()}
    for i, name in enumerate(names[1:], 1):
        for other in dict.fromkeys([names[i - 1], names[0]]):
            for m in metrics:
                difference = table[name][m] - table[other][m]
                if (known := difference[~np.isnan(difference)]).size:
                    summary["differences"].append({"better": name, "than": other, "metric": m, **bootstrap(known, rng)})
            gap = table[name]["rubric"] - table[other]["rubric"]
            gap = gap[~np.isnan(gap)]
            if gap.size:
                wins = bootstrap((gap > 0) + 0.5 * (gap == 0), rng)
                summary["win_rate"].append({"model": name, "against": other, "rate": wins["mean"], "low": wins["low"], "high": wins["high"], "ties": int((gap == 0).sum())})
    for i in range(min(6, len(dialogues))):
        d = dialogues[i]
        shown = {name: {"text": answers[name][i], "valid": scores[name][i].problem is None, "problem": scores[name][i].problem, "scores": scores[name][i].criteria} for name in names}
        summary["examples"].append({"person": d.person, "situation": d.situation, "label": d.label, "messages": [{"role": r, "content": c} for r, c in d.messages], "answers": shown})
    return summary


def evaluation_table(summary: dict[str, Any]) -> str:
    """Models as columns, metrics as rows: mean (95% interval). Criteria also on the paper's 1 to 5 scale (1 + 4 x score)."""
    names = summary["models"]
    lines = ["metric".ljust(20) + "".join(name.rjust(26) for name in names)]
    for metric in summary["metrics"][names[0]]:
        cells = []
        for name in names:
            v = summary["metrics"][name].get(metric)
            five = "" if metric in summary["rewards"][:2] or not v else f" = {1 + 4 * v['mean']:.2f}/5"
            cells.append(f"{v['mean']:.2f} ({v['low']:.2f}-{v['high']:.2f}){five}" if v else "-")
        lines.append(metric.ljust(20) + "".join(cell.rjust(26) for cell in cells))
    for d in summary["differences"]:
        if d["metric"] in summary["rewards"]:
            sure = "" if d["low"] > 0 or d["high"] < 0 else "  (the interval includes 0)"
            lines.append(f"{d['better']} minus {d['than']}, {d['metric']}: {d['mean']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f}){sure}")
    for win in summary["win_rate"]:
        lines.append(f"{win['model']} wins against {win['against']} on the rubric in {win['rate']:.0%} of prompts ({win['low']:.0%} to {win['high']:.0%})")
    return "\n".join(lines)


def exam_table(result: dict) -> str:
    """The exam as text: the chosen method of each criterion with its verdict, every method's accuracy, what was tried to fool the judge."""
    lines = [f"{'criterion':<20} {'method':<9} {'pairs':>5} {'right':>6} {'95% interval':>14} {'longer wins':>12}  verdict"]
    for name, e in result["criteria"].items():
        lines.append(f"{name:<20} {e['method']:<9} {e['n']:>5} {e['accuracy']:>6.0%} {e['low']:>7.0%} to {e['high']:>4.0%} {e['length_baseline']:>11.0%}  {'fit' if e['fit'] else 'UNFIT: ' + e['why']}")
    o = result["overall"]
    lines.append(f"{'overall':<20} {'':<9} {result['pairs']:>5} {o['accuracy']:>6.0%} {o['low']:>7.0%} to {o['high']:>4.0%} {o['length_baseline']:>11.0%}  {result['scores_per_second']:.0f} scores per second")
    methods = list(dict.fromkeys(m for e in result["criteria"].values() for m in e["methods"]))
    lines += ["", f"{'every method':<20} " + "".join(f"{m:>22}" for m in methods) + f"{'longer is better':>20}{'shorter is better':>19}{'in other words':>22}"]
    for name, e in result["criteria"].items():
        cells = (f"{t['accuracy']:.0%} ({t['low']:.0%} to {t['high']:.0%})" if (t := e["methods"].get(m)) else "-" for m in methods)
        bias = (f"{side['accuracy']:.0%} of {side['n']}" if side["n"] else "-" for side in e["length"].values())
        lines.append(f"{name:<20} " + "".join(cell.rjust(22) for cell in cells) + "".join(cell.rjust(width) for cell, width in zip(bias, (20, 19))) + (f"{o['accuracy']:.0%} ({o['low']:.0%} to {o['high']:.0%})" if (o := e.get("held_out")) else "-").rjust(22))
    c, r = result["canaries"], result["repeatability"]
    if c["n"]:
        failed = "".join(f"; {canary!r} raised {', '.join(sorted(set(names)))}" for canary, names in c["failed"].items())
        lines += ["", f"begging for a grade: the model alone raised no score in {c['held']} of {c['n']} tries ({c['held'] / c['n']:.0%}); rules refuse {c['refused']} of them, with both {c['held_with_guards']} held ({c['held_with_guards'] / c['n']:.0%}){failed}"]
    difference = r["largest_difference"]
    lines.append(f"read twice, in another order: {'bit-identical' if difference == 0 else f'up to {difference:.2g} apart'} ({r['replies']} replies, all criteria); each reply is read alone, so position plays no part")
    return "\n".join(lines)
