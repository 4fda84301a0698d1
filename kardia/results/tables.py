"""Tables of an evaluation, an exam and an export."""

from __future__ import annotations

from typing import Any

NOTHING = 1e-7  # KL under which training did not move the base at all


def export_table(book: dict) -> str:
    """The drift table: each thing that was written, how far it is from the trained model, and how its answers are judged."""
    judged = (book.get("trained") or {}).get("rubric")
    lines = [
        f"{'':<10} {'size':>9}  {'KL':>8}  {'of training':>11}  {'kept':>5}  {'same token':>10}  {'valid':>5}  {'rubric':>6}"
    ]
    if judged is not None:
        lines.append(
            f"{'(trained)':<10} {'':>9}  {'':>8}  {'':>11}  {'':>5}  {'':>10}  {book['trained']['valid']:>5.0%}  {judged:>6.2f}"
        )
    for name, entry in book["formats"].items():
        cells = (
            [f"{name:<10} {entry['bytes'] / 1e6:>6,.0f} MB"]
            if entry["verdict"] != "text"
            else [f"{name:<10}"]
        )
        if entry.get("kl") is not None:
            cells.append(
                f"{entry['kl']:>8.1e}  {entry['kl'] / max(entry['kl_base'], NOTHING):>11.2%}  {entry['kept']:>5.0%}  {entry['agreement']:>10.0%}"
            )
            cells.append(
                f"{entry['valid']:>5.0%}  {entry['rubric']:>6.2f}"
                if entry.get("rubric") is not None
                else f"{'-':>5}  {'-':>6}"
            )
        cells.append({"ok": "ok", "text": "", "noisy": "NOISY", "lost": "LOST"}[entry["verdict"]])
        lines.append("  ".join(cells).ljust(len(lines[0])) + f"  {entry['file']}")
    return "\n".join(lines)


def trend_sentence(trend: dict | None) -> str:
    if trend is None:
        return "  too few steps to tell whether the reward moved"
    verdict = (
        "rose"
        if trend["low"] > 0
        else "fell"
        if trend["high"] < 0
        else "did not rise by more than chance explains"
    )
    return (
        f"  mean reward of the rollouts {verdict}: {trend['first_quarter']:.3f} in the first quarter, {trend['last_quarter']:.3f} in the last; "
        f"slope {trend['slope_per_step']:+.4f} per step (95% interval {trend['low']:+.4f} to {trend['high']:+.4f})"
    )


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
            lines.append(
                f"{d['better']} minus {d['than']}, {d['metric']}: {d['mean']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f}){sure}"
            )
    for win in summary["win_rate"]:
        lines.append(
            f"{win['model']} wins against {win['against']} on the rubric in {win['rate']:.0%} of prompts ({win['low']:.0%} to {win['high']:.0%})"
        )
    return "\n".join(lines)


def exam_table(result: dict) -> str:
    """The exam as text: the chosen method of each criterion with its verdict, every method's accuracy, what was tried to fool the judge."""
    lines = [
        f"{'criterion':<20} {'method':<9} {'pairs':>5} {'right':>6} {'95% interval':>14} {'longer wins':>12}  verdict"
    ]
    for name, e in result["criteria"].items():
        lines.append(
            f"{name:<20} {e['method']:<9} {e['n']:>5} {e['accuracy']:>6.0%} {e['low']:>7.0%} to {e['high']:>4.0%} {e['length_baseline']:>11.0%}  {'fit' if e['fit'] else 'UNFIT: ' + e['why']}"
        )
    o = result["overall"]
    lines.append(
        f"{'overall':<20} {'':<9} {result['pairs']:>5} {o['accuracy']:>6.0%} {o['low']:>7.0%} to {o['high']:>4.0%} {o['length_baseline']:>11.0%}  {result['scores_per_second']:.0f} scores per second"
    )
    methods = list(dict.fromkeys(m for e in result["criteria"].values() for m in e["methods"]))
    lines += [
        "",
        f"{'every method':<20} "
        + "".join(f"{m:>22}" for m in methods)
        + f"{'longer is better':>20}{'shorter is better':>19}{'in other words':>22}",
    ]
    for name, e in result["criteria"].items():
        cells = (
            f"{t['accuracy']:.0%} ({t['low']:.0%} to {t['high']:.0%})" if (t := e["methods"].get(m)) else "-"
            for m in methods
        )
        bias = (
            f"{side['accuracy']:.0%} of {side['n']}" if side["n"] else "-" for side in e["length"].values()
        )
        lines.append(
            f"{name:<20} "
            + "".join(cell.rjust(22) for cell in cells)
            + "".join(cell.rjust(width) for cell, width in zip(bias, (20, 19)))
            + (
                f"{o['accuracy']:.0%} ({o['low']:.0%} to {o['high']:.0%})"
                if (o := e.get("held_out"))
                else "-"
            ).rjust(22)
        )
    c, r = result["canaries"], result["repeatability"]
    if c["n"]:
        failed = "".join(
            f"; {canary!r} raised {', '.join(sorted(set(names)))}" for canary, names in c["failed"].items()
        )
        lines += [
            "",
            f"begging for a grade: the model alone raised no score in {c['held']} of {c['n']} tries ({c['held'] / c['n']:.0%}); rules refuse {c['refused']} of them, with both {c['held_with_guards']} held ({c['held_with_guards'] / c['n']:.0%}){failed}",
        ]
    difference = r["largest_difference"]
    lines.append(
        f"read twice, in another order: {'bit-identical' if difference == 0 else f'up to {difference:.2g} apart'} ({r['replies']} replies, all criteria); each reply is read alone, so position plays no part"
    )
    return "\n".join(lines)
