"""What a run did, told from its directory alone, as one HTML page.

`write_report` makes a single file that needs no network and no script: charts are SVG, long parts fold with <details>.
Runs given together share their curves and a table of what differs; the rest stands side by side.
Every text of a run is untrusted (a model wrote it): it reaches the page through `charts.text` only.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from kardia.results import warnings
from kardia.results.plots import (
    STYLE,
    bars,
    cards_row,
    interval,
    listed,
    logged_names,
    looks,
    place,
    plural,
    run_curves,
    score_cell,
    spanned,
    stacked,
    swatch,
    table,
    text,
    token_fold,
    track,
)
from kardia.results.run_files import (
    ReportError,
    advantages_of,
    fixed,
    form_of,
    groups_of,
    is_grpo,
    mean_of,
    means_of,
    number,
    quarters,
    read_run,
    rewards_of,
    series,
    spread_of,
    why_pushed,
)

PAGE_LIMIT = 2_900_000  # bytes; mail and chat tools start to refuse or to lag above 3 MB
MOST = 50  # rows and columns of a table of models and metrics


class Limits(NamedTuple):
    """How much of a run's texts the page shows."""

    groups: int  # of the browser; examples too
    clip: int  # characters of one text
    tokens: int  # tinted, of one reply


def duration(seconds) -> str:
    seconds = number(seconds)
    return (
        ""
        if not seconds
        else f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


# ---------------------------------------------------------------------------------- headline


def _trained(data: dict) -> str:
    run, steps = data["run"] or {}, [x for x, _ in series(data["log"], "step")]
    memory = number(run.get("peak_memory_gb"))
    words = [
        f"<b>{text(str(run.get('command') or 'run').upper())}</b>",
        run.get("base")
        and f"of <b>{text(run.get('model') or Path(str(run['base'])).name)}</b>"
        + (f" ({text(run['bits'])}-bit)" if run.get("bits") else ""),
        run.get("parent") and f"starting from {text(run['parent'])}",
        steps and f"for {max(steps):.0f} steps",
        duration(run.get("seconds")) and f"in {duration(run.get('seconds'))}",
        run.get("machine") and f"on {text(run['machine'])}",
        memory and f"(peak memory {memory:.1f} GB)",
    ]
    state = {
        "running": " It was still running when this page was written.",
        "interrupted": " It was interrupted before its end.",
    }
    return f"<p class=lead>{' '.join(word for word in words if word)}.{state.get(run.get('status'), '')}</p>"


def _trend(trend: dict | None) -> str:
    low, high = number((trend or {}).get("low")), number((trend or {}).get("high"))
    if low is None or high is None:
        return "Whether GRPO's reward rose is not recorded: the trend is computed at the end of a run, from at least a few steps."
    verdict = (
        "<b>rose</b>"
        if low > 0
        else "<b>fell</b>"
        if high < 0
        else "<b>shows no change that the interval can tell from zero</b>"
    )
    return (
        f"GRPO's reward {verdict}: {fixed(trend.get('first_quarter'), 3)} in the first quarter of the {text(trend.get('steps', '?'))} steps, "
        f"{fixed(trend.get('last_quarter'), 3)} in the last; slope {fixed(trend.get('slope_per_step'), 5, True)} per step, interval {fixed(low, 5, True)} to {fixed(high, 5, True)}."
    )


def _verdicts(data: dict) -> list[str]:
    run, log, exam = data["run"] or {}, data["log"], data["exam"] or {}
    out = [_trend(run.get("reward_trend"))] if is_grpo(data) else []
    loss = None if is_grpo(data) else quarters(log, "loss")
    out += (
        [f"The SFT loss went from {fixed(loss[0])} (first quarter) to {fixed(loss[1])} (last quarter)."]
        if loss
        else []
    )
    pairs: dict[tuple, list] = {}
    for row in (data["evaluation"] or {}).get("differences", []):
        pairs.setdefault((row.get("better"), row.get("than")), []).append(row)
    for pair, rows in list(pairs.items())[:MOST]:
        up = [row.get("metric") for row in rows if (number(row.get("low")) or 0) > 0]
        down = [row.get("metric") for row in rows if (number(row.get("high")) or 0) < 0]
        told = [f"better on {listed(up)}"] * bool(up) + [f"<b>worse</b> on {listed(down)}"] * bool(down)
        rest = len(rows) - len(up) - len(down)
        told += [
            f"not told apart on {'any metric' if rest == len(rows) else f'{rest} of {len(rows)} metrics'}"
        ] * bool(rest)
        out.append(f"On held-out prompts, {text(pair[0])} against {text(pair[1])}: {'; '.join(told)}.")
    criteria = exam.get("criteria") or {}
    if criteria:
        fit = [name for name, entry in criteria.items() if entry.get("fit")]
        out.append(
            f"The judge passed its exam on {len(fit)} of {len(criteria)} criteria"
            + (f" ({listed(fit)})." if fit else ".")
        )
    formats = (data["export"] or {}).get("formats") or {}
    lost = [name for name, entry in formats.items() if not entry.get("ok")]
    proved = [
        name
        for name, entry in formats.items()
        if entry.get("ok") and entry.get("verdict") != "noisy" and number(entry.get("kl")) is not None
    ]
    noisy = [name for name, entry in formats.items() if entry.get("ok") and entry.get("verdict") == "noisy"]
    out += [f"<b>Exports that do not match the trained model: {text(', '.join(lost))}.</b>"] if lost else []
    out += (
        [f"Exports measured against the trained model and found to match it: {text(', '.join(proved))}."]
        if proved
        else []
    )
    out += (
        [f"Exports that hold the training but with much rounding: {text(', '.join(noisy))}."] if noisy else []
    )
    return out


def _alarms(data: dict) -> str:
    """What a careful reader would have noticed in the numbers, before anything else is claimed."""
    found = warnings.check(data)
    if found:
        told = "".join(f"<li><b>{listed([alarm.kind])}</b>: {text(alarm.text, 2000)}</li>" for alarm in found)
        return f"<aside class=alarm><b>{plural(len(found), 'warning')}: read the numbers with care</b><ul>{told}</ul></aside>"
    checked = "Checked for a reward that misleads (no signal, length, stock phrases, sameness, trade-offs, words of grading, one wording): none fired."
    return f"<p class=note>{checked}</p>" if is_grpo(data) else ""


def _headline(data: dict, *_) -> str:
    if not any(value for key, value in data.items() if key != "name"):
        return "<p>This directory holds no record of a run yet.</p>"
    verdicts = "".join(f"<li>{line}</li>" for line in _verdicts(data))
    return f"{_trained(data)}<div class=head>{_alarms(data)}{f'<ul class=verdicts>{verdicts}</ul>' if verdicts else ''}</div>"


# ---------------------------------------------------------------------------------- several runs: what differs


def _last_quarter(log: list[dict], key: str) -> float | None:
    values = [y for _, y in series(log, key)]
    return mean_of(values[-max(1, len(values) // 4) :])


def _figures(runs: list[dict]) -> list[list[str]]:
    """How each run ended: rows of [what, one cell per run]."""
    logs = [run["log"] for run in runs]
    components = dict.fromkeys(name for log in logs for name in logged_names(log, "rewards/", "/mean"))
    rewards = {"reward": "reward", **{f"reward, {name}": f"rewards/{name}/mean" for name in components}}
    sft = [[] if is_grpo(run) else run["log"] for run in runs]  # GRPO logs a loss too, of another kind
    rows = [
        [listed([title]), *(fixed(_last_quarter(log, key), 3) for log in logs)]
        for title, key in rewards.items()
    ]
    rows += [
        [title, *(fixed(_last_quarter(log, key), 3) for log in sft)]
        for title, key in (("SFT loss", "loss"), ("token accuracy", "mean_token_accuracy"))
    ]
    rows += [["steps", *(f"{max((x for x, _ in series(log, 'step')), default=0):.0f}" for log in logs)]]
    rows += [
        [title, *(tell((run["run"] or {}).get(key)) for run in runs)]
        for title, key, tell in (("time", "seconds", duration), ("peak memory, GB", "peak_memory_gb", fixed))
    ]
    return [row for row in rows if any(cell not in ("–", "", "0") for cell in row[1:])]


def _differing(runs: list[dict], values: list[dict]) -> list[list[str]]:
    """Rows of the keys whose values differ. A key that only some runs of one command have differs too; what a whole command
    does not know (an option of GRPO, beside an SFT run) is no difference."""
    rows, commands = [], [(run["run"] or {}).get("command") for run in runs]
    for name in dict.fromkeys(name for each in values for name in each):
        held = [name in each for each in values]
        known = {command for command, has in zip(commands, held) if has}
        told = {json.dumps(each[name], sort_keys=True) for each, has in zip(values, held) if has}
        if len(told) > 1 or any(command in known and not has for command, has in zip(commands, held)):
            rows.append(
                [
                    listed([name]),
                    *(f"<code>{text(each[name])}</code>" if has else "–" for each, has in zip(values, held)),
                ]
            )
    return rows


def _differs(runs: list[dict]) -> str:
    facts = [run["run"] or {} for run in runs]
    plain = [
        {
            name: fact[name]
            for name in ("machine", "model", "bits", "engine", "rollout")
            if fact.get(name) is not None
        }
        for fact in facts
    ]
    kept = {part: [fact.get(part, {}) for fact in facts] for part in ("options", "versions", "hashes")}
    parts = [
        (title, _differing(runs, values))
        for title, values in (
            ("Options", kept["options"]),
            ("Machine and model", plain),
            ("Versions", kept["versions"]),
            ("Hashes", kept["hashes"]),
        )
    ]
    head = [f"{swatch(look)}{text(run['name'])}" for look, run in zip(looks(runs), runs)]
    note = "Reward, its components, loss and accuracy are means of the last quarter of the steps."
    note += " What only one command knows is left out; “Options, versions, hashes” has everything." * (
        len({fact.get("command") for fact in facts}) > 1
    )
    ended, asked = _figures(runs), [row for title, part in parts if part for row in ([title], *part)]
    tables = [
        table([title, *head], rows)
        for title, rows in (("How they ended", ended), ("What was asked", asked))
        if rows
    ]
    return (
        f"<div class='side differs'>{''.join(f'<div>{each}</div>' for each in tables)}</div><p class=note>{note}</p>"
        if tables
        else ""
    )


# ---------------------------------------------------------------------------------- before and after


def _before_after(runs: list[dict]) -> str:
    """Every evaluated model of every run as a column; then differences and win rates."""
    scored = [(run, run["evaluation"]) for run in runs if (run["evaluation"] or {}).get("metrics")]
    if not scored:
        return ""
    tag = lambda run: f"<small>{text(run['name'])}</small><br>" if len(scored) > 1 else ""  # noqa: E731
    columns = [
        (run, model, ev["metrics"].get(model) or {})
        for run, ev in scored
        for model in (ev.get("models") or list(ev["metrics"]))[:MOST]
    ]
    metrics = list(dict.fromkeys(metric for *_, values in columns for metric in values))[:MOST]
    rows = [
        [listed([metric])] + [score_cell(values.get(metric) or {}) for _, _, values in columns]
        for metric in metrics
    ]
    names = [f"{text(run['name'])}: " * (len(scored) > 1) for run, _ in scored]
    about = "; ".join(
        f"{name}{text(ev.get('prompts', '?'))} held-out prompts, judge {text(ev.get('judge', '?'))}"
        for name, (_, ev) in zip(names, scored)
    )
    note = f"<p class=note>{about}. Scores from 0 to 1, mean with its 95% bootstrap interval.</p>"
    out = f"<div><h3>Scores</h3>{table(['Metric'] + [tag(run) + text(model) for run, model, _ in columns], rows)}</div>"
    pairs: dict[tuple, dict] = {}
    for index, (_, ev) in enumerate(scored):
        for row in ev.get("differences") or []:
            pairs.setdefault((index, row.get("better"), row.get("than")), {})[row.get("metric")] = row
    if pairs:
        pairs = dict(list(pairs.items())[:MOST])
        metrics = list(dict.fromkeys(metric for rows in pairs.values() for metric in rows))[:MOST]
        out += (
            "<div><h3>Paired differences, the same prompts</h3>"
            + table(
                ["Metric"] + [f"{tag(scored[i][0])}{text(a)} − {text(b)}" for i, a, b in pairs],
                [
                    [listed([metric])] + [_difference(rows.get(metric) or {}) for rows in pairs.values()]
                    for metric in metrics
                ],
            )
            + "</div>"
        )
    wins = [(run, row) for run, ev in scored for row in ev.get("win_rate") or []]
    if wins:
        out += (
            "<div><h3>Win rates, 0.5 is a draw</h3>"
            + table(
                ["Comparison", "Share of prompts", "Ties"],
                [
                    [
                        f"{tag(run)}{text(row.get('model'))} against {text(row.get('against'))}",
                        score_cell(row, "rate", 0.5),
                        text(row.get("ties")),
                    ]
                    for run, row in wins
                ],
            )
            + "</div>"
        )
    return f"{note}<div class=side>{out}</div>"


def _difference(row: dict) -> str:
    low, high = number(row.get("low")), number(row.get("high"))
    kind, word = (
        ("up", "better")
        if low is not None and low > 0
        else ("down", "worse")
        if high is not None and high < 0
        else ("", "not told apart")
    )
    return (
        f"<span class=score><b class='{kind}'>{fixed(row.get('mean'), sign=True)}</b> <small>{interval(row, True)}</small><br><small class='{kind}'>{word}</small></span>"
        if row
        else "–"
    )


# ---------------------------------------------------------------------------------- memory


def _memory(data: dict, *_) -> str:
    """The plan made before loading, term by term, against the measured peak."""
    run = data["run"] or {}
    plan = {
        name: number(size) for name, size in run.get("memory_plan", {}).items() if number(size) is not None
    }
    peak, total = number(run.get("peak_memory_gb")), sum(plan.values())
    if not plan:
        return ""
    told = (
        f"Measured {fixed(peak)} GB of {fixed(total)} GB planned: {fixed(peak / total)} times the plan."
        if peak is not None and total
        else "The peak was not measured."
    )
    of = f"of {text(run['peak_memory_of'])}" if run.get("peak_memory_of") else ""
    setting = run.get("setting") or {}
    chosen = (
        ", ".join(
            f"{name.replace('_', ' ')} {text(setting[name])}"
            for name in ("micro", "rollout", "rollout_type", "judge_on_gpu", "host_embedding")
            if name in setting
        )
        if setting.get("cuda")
        else ""
    )
    rungs = "".join(
        f"<li>from step {text(rung.get('step'))}: {text(rung.get('why'))}</li>"
        for rung in run.get("ladder") or []
    )
    return (
        f"<p>{told}</p>{stacked(plan, peak, of)}"
        + (f"<p class=note>What fitted: {chosen}.</p>" if chosen else "")
        + (f"<p>Memory ran out, and this was given up:</p><ul>{rungs}</ul>" if rungs else "")
    )


# ---------------------------------------------------------------------------------- judge exam


def _exam(data: dict, *_) -> str:
    exam = data["exam"] or {}
    rows, others = [], any("held_out" in entry for entry in exam.get("criteria", {}).values())
    for name, entry in [
        *(exam.get("criteria") or {}).items(),
        *([("overall", exam["overall"])] if exam.get("overall") else []),
    ]:
        right = number(entry.get("correct"))  # half a point for a tie
        count = (
            f"{'–' if right is None else f'{right:g}'}&nbsp;of&nbsp;{text(entry.get('n'))}"
            if "n" in entry
            else text(exam.get("pairs"))
        )
        kind, word = ("up", "fit") if entry.get("fit") else ("down", "unfit")
        fit = (
            f"<b class={kind}>{word}</b> <small class=prose>{text(entry.get('why'))}</small>"
            if "fit" in entry
            else ""
        )
        held = entry.get("held_out", {})
        in_other_words = [
            score_cell(held, "accuracy", 0.5) + f"<small class=prose>{text(held.get('text'))}</small>"
            if held
            else ""
        ] * others
        rows.append(
            [
                listed([name]),
                text(entry.get("method")),
                fixed(entry.get("weight"), none=""),
                count,
                score_cell(entry, "accuracy", 0.5, entry.get("length_baseline")),
                fixed(entry.get("length_baseline")),
                *in_other_words,
                fit,
            ]
        )
    if not rows:
        return ""
    speed = (
        f", {fixed(exam['scores_per_second'], 1)} scores per second"
        if number(exam.get("scores_per_second"))
        else ""
    )
    lora = f" with {text(exam['lora'])}" if exam.get("lora") else ""
    return (
        f"<p class=note>Judge {text(exam.get('judge', '?'))}{lora}, {text(exam.get('pairs', '?'))} pairs{speed}. Accuracy is cross-validated: the method is chosen on other pairs than those it is counted on.</p>"
        + table(
            [
                "Criterion",
                "Method",
                "Weight",
                "Correct",
                "Accuracy",
                "“Longer wins”",
                *["In other words"] * others,
                "Verdict",
            ],
            rows,
        )
        + _exam_methods(exam)
    )


def _exam_methods(exam: dict) -> str:
    """Every method's accuracy, length bias, and what was tried to fool the judge."""
    criteria = {name: entry for name, entry in exam.get("criteria", {}).items() if entry.get("methods")}
    methods = list(dict.fromkeys(method for entry in criteria.values() for method in entry["methods"]))[:MOST]
    rows = []
    for name, entry in criteria.items():
        cells = [
            score_cell(entry["methods"].get(method, {}), "accuracy", 0.5, entry.get("length_baseline"))
            for method in methods
        ]
        bias = [
            fixed(entry.get("length", {}).get(side, {}).get("accuracy"))
            for side in ("longer_better", "shorter_better")
        ]
        rows.append([listed([name]), *cells, *bias])
    out = (
        table(
            ["Criterion", *(text(method) for method in methods), "longer is better", "shorter is better"],
            rows,
        )
        if rows
        else ""
    )
    canaries, repeat, notes = exam.get("canaries", {}), exam.get("repeatability", {}), []
    if canaries.get("n"):
        failed = "; ".join(
            f"“{text(canary)}” raised {listed(sorted(set(map(str, raised))))}"
            for canary, raised in canaries.get("failed", {}).items()
        )
        notes.append(
            f"Begging for a grade raised no score of the model alone in {text(canaries.get('held'))} of {text(canaries['n'])} tries, "
            f"and in {text(canaries.get('held_with_guards'))} with the rules that refuse such replies{': ' + failed if failed else ''}."
        )
    if number(repeat.get("largest_difference")) is not None:
        notes.append(
            "Read twice, in another order, scores were "
            + (
                "bit-identical."
                if repeat["largest_difference"] == 0
                else f"up to {fixed(repeat['largest_difference'], 4)} apart."
            )
        )
    return out + (f"<p class=note>{' '.join(notes)}</p>" if notes else "")


# ---------------------------------------------------------------------------------- groups, example answers


def _prompt(row: dict, clip: int, form: dict) -> str:
    facts = [
        ("Persona", row.get("person")),
        ("Situation", row.get("situation")),
        (f"{form['label'].capitalize()} to find", row.get("label", row.get("emotion"))),
    ]
    out = "".join(f"<dt>{listed([name])}</dt><dd>{text(value, clip)}</dd>" for name, value in facts if value)
    told = []
    for turn in row.get("messages") or []:
        content = (
            spanned(turn.get("content"), clip, form["spans"])
            if turn.get("role") == "assistant"
            else text(turn.get("content"), clip)
        )
        told.append(f"<dt>{text(turn.get('role'))}</dt><dd>{content}</dd>")
    earlier = (
        f"<details><summary>{plural(len(told) - 1, 'earlier turn')}</summary><dl>{''.join(told[:-1])}</dl></details>"
        if len(told) > 1
        else ""
    )
    return f"<dl class=prompt>{out}</dl>{earlier}<dl class=prompt>{''.join(told[-1:])}</dl>"


def _card(sample: dict, samples: list[dict], clip: int, spans: list[str]) -> str:
    advantage, before, after = (number(sample.get(key)) for key in ("advantage", "logprob", "logprob_after"))
    kind = "up" if (advantage or 0) > 0 else "down" if (advantage or 0) < 0 else ""
    held = sample.get("held_out")
    scores = "".join(
        bars(sample.get(part), means_of(samples, part), part, held) for part in ("components", "criteria")
    )
    head = (
        "<div class=head><span></span><span></span><span>score</span><span>in other<br>words</span></div>"
        if held
        else ""
    )
    facts = [
        sample.get("tokens") is not None and f"{text(sample['tokens'])} tokens",
        sample.get("truncated") and "cut at the limit",
        sample.get("problem") and f"invalid: {text(sample['problem'])}",
        sample.get("refused") and f"not put to the judge: {text(sample['refused'])}",
        before is not None
        and f"log-prob per token {fixed(before, 3)}"
        + (f" → {fixed(after, 3)} after the update" if after is not None else ""),
    ]
    return (
        f'<article class="card {kind}"><header><b>Sample {text(sample.get("sample", "?"))}</b><span>reward <b>{fixed(sample.get("reward"), 3, none="none")}</b>, '
        f'advantage <b class="{kind}">{fixed(advantage, 2, True)}</b></span></header><p class=why>{text(why_pushed(sample, samples))}</p>'
        f'<div>{spanned(sample.get("completion"), clip, spans)}</div><div class="bars{" two" * bool(held)}">{head}{scores}</div><p class=note>{" · ".join(fact for fact in facts if fact)}</p></article>'
    )


def _chosen(groups: list, inspected: set[int], limit: int) -> list[int]:
    """Which groups to show: the widest, the first and the last, then inspected ones, then others, spread over the run."""
    even = lambda found, n: [
        found[round(i * (len(found) - 1) / max(1, n - 1))] for i in range(min(n, len(found)))
    ]  # noqa: E731
    widest = max(range(len(groups)), key=lambda i: spread_of(groups[i][2]))
    wanted = [
        widest,
        0,
        len(groups) - 1,
        *even(sorted(inspected), limit // 2),
        *even(range(len(groups)), limit),
        *range(len(groups)),
    ]
    return sorted(list(dict.fromkeys(wanted))[:limit])


def _browser(data: dict, limits: Limits) -> str:
    groups, form = groups_of(data["completions"]), form_of(data)
    if not groups:
        return ""
    place_of = lambda row: tuple(number(row.get(key)) or 0 for key in ("step", "group", "sample"))  # noqa: E731
    tokens = {place_of(row): row for row in data["tokens"]}
    inspected = {
        i for i, (*_, samples) in enumerate(groups) if any(place_of(sample) in tokens for sample in samples)
    }
    chosen, widest = (
        _chosen(groups, inspected, limits.groups),
        max(range(len(groups)), key=lambda i: spread_of(groups[i][2])),
    )
    ring = ", the ring the judge's answer when it is asked about the same reply in other words" * any(
        row.get("held_out") for row in data["completions"]
    )
    out = f"<p class=note>{len(chosen)} of {plural(len(groups), 'group')}. Replies are ordered by advantage; the tick on a bar is the group's mean{ring}.</p>"
    for index in chosen:
        step, group, samples = groups[index]
        dots = track(
            "".join(
                f'<i class=dot style="left:{place(reward)}"></i>'
                for reward in rewards_of(samples)
                if reward is not None
            )
        )
        ranked = sorted(
            samples,
            key=lambda s: (number(s.get("reward")) is not None, number(s.get("advantage")) or 0.0),
            reverse=True,
        )
        more = (
            f"<p class=note>{plural(len(ranked) - 16, 'more sample')} in completions.jsonl.</p>"
            if len(ranked) > 16
            else ""
        )
        cards = cards_row(
            [_card(sample, samples, limits.clip, form["spans"]) for sample in ranked[:16]],
            f"Replies of step {step}, group {group}",
        )
        fold = token_fold(
            [(sample, tokens[place_of(sample)]) for sample in ranked[:16] if place_of(sample) in tokens],
            limits.tokens,
        )
        marks = ["widest spread"] * (index == widest) + ["tokens"] * bool(fold)
        out += (
            f"<details class=group{' open' * (index == widest)}><summary><span class=what><b>Step {step}</b>, group {group}{f' <small>{listed(marks)}</small>' if marks else ''}</span>{dots}"
            f"<small>mean {fixed(advantages_of(rewards_of(samples))[0])}, spread {fixed(spread_of(samples))}</small></summary>"
            f"{_prompt(samples[0], limits.clip, form)}{cards}{more}{fold}</details>"
        )
    return out


def _examples(data: dict, limits: Limits) -> str:
    out, form = "", form_of(data)
    for number_, example in enumerate(((data["evaluation"] or {}).get("examples") or [])[: limits.groups], 1):
        cards = []
        for model, answer in (example.get("answers") or {}).items():
            state = (
                "valid format"
                if answer.get("valid")
                else f"invalid: {text(answer.get('problem') or 'format')}"
            )
            cards.append(
                f"<article class=card><header><b>{text(model)}</b><span>{state}</span></header>"
                f"<div>{spanned(answer.get('text'), limits.clip, form['spans'])}</div><div class=bars>{bars(answer.get('scores'), {})}</div></article>"
            )
        hint = text(
            ([turn.get("content") for turn in example.get("messages") or []] or [example.get("situation")])[
                -1
            ],
            90,
        )
        out += (
            f"<details class=group{' open' * (number_ == 1)}><summary><b>Example {number_}</b> <small>{hint}</small></summary>"
            f"{_prompt(example, limits.clip, form)}{cards_row(cards, f'Answers to example {number_}')}</details>"
        )
    return out


# ---------------------------------------------------------------------------------- export, details, page


VERDICTS = {
    "ok": "<b class=up>matches</b>",
    "noisy": "<b>matches, with rounding</b>",
    "lost": "<b class=down>does not match</b>",
}


def _export(data: dict, *_) -> str:
    book, rows, notes = data["export"] or {}, [], []
    trained = book.get("trained", {})
    share = lambda value, digits=0: f"{number(value):.{digits}%}" if number(value) is not None else "–"  # noqa: E731
    score = lambda entry: (
        f"{number(entry.get('rubric')):.2f}" if number(entry.get("rubric")) is not None else "–"
    )  # noqa: E731
    if number(trained.get("rubric")) is not None:
        rows.append(
            ["the trained model", "", "", "", "", "", share(trained.get("valid")), score(trained), "", ""]
        )
    for name, entry in (book.get("formats") or {}).items():
        kl, base = number(entry.get("kl")), number(entry.get("kl_base"))
        measured = (
            VERDICTS.get(entry.get("verdict"), VERDICTS["ok"])
            if kl is not None
            else "text"
            if entry.get("loader") == "text"
            else "not measured"
        )
        verdict = measured if entry.get("ok") else VERDICTS["lost"]
        rows.append(
            [
                text(name),
                f"{(number(entry.get('bytes')) or 0) / 1e6:,.1f}\u00a0MB",
                f"{kl:.1e}".replace("-", "−") if kl is not None else "–",
                share(kl / base if kl is not None and base else None, 2),
                share(entry.get("kept")),
                share(entry.get("agreement")),
                share(entry.get("valid")),
                score(entry),
                verdict,
                f"<small class=prose>{text(entry.get('path'))}</small>",
            ]
        )
        notes += [f"<li>{text(name)}: {text(entry['why'])}.</li>"] if entry.get("why") else []
    if not rows:
        return ""
    base = next(
        (
            number(entry.get("kl_base"))
            for entry in book["formats"].values()
            if number(entry.get("kl_base")) is not None
        ),
        None,
    )
    told = (
        f"<p>Training moved the base by KL {base:.2g}, over {text(book.get('prompts'))} places in answers.</p>"
        if base is not None
        else ""
    )
    head = [
        "Format",
        "Size",
        "KL to trained",
        "of what training did",
        "training kept",
        "same next token",
        "valid answers",
        "judge's score",
        "Verdict",
        "Path",
    ]
    return (
        told
        + table(head, rows)
        + (f"<ul class=verdicts>{''.join(notes)}</ul>" if notes else "")
        + _export_answers(book)
    )


def _export_answers(book: dict) -> str:
    """The first question's answer by the trained model and by each export."""
    named = [("the trained model", book.get("trained") or {}), *(book.get("formats") or {}).items()]
    rows = [
        [text(name), f"<small class=prose>{text(entry['answers'][0])}</small>"]
        for name, entry in named
        if entry.get("answers")
    ]
    return (
        f"<details><summary>What each answers to the first question</summary>{table(['', 'Answer'], rows)}</details>"
        if len(rows) > 1
        else ""
    )


def _details(data: dict, *_) -> str:
    run, out = data["run"] or {}, ""
    facts = {
        key: value for key, value in run.items() if value is not None and not isinstance(value, (dict, list))
    }
    for title, values in (
        ("Run", facts),
        ("Options", run.get("options")),
        ("Versions", run.get("versions")),
        ("Hashes", run.get("hashes")),
    ):
        if values:
            out += (
                f"<div><h4>{title}</h4><dl>"
                + "".join(
                    f"<dt>{text(key)}</dt><dd><code>{text(value)}</code></dd>"
                    for key, value in values.items()
                )
                + "</dl></div>"
            )
    return f"<details><summary>Show all</summary><div class=facts>{out}</div></details>" if out else ""


SECTIONS = (
    (
        "memory",
        "Memory, planned and measured",
        "Planned before anything was loaded, from the model's shape and the options.",
        _memory,
    ),
    (
        "exam",
        "Is the judge fit to judge?",
        "Before training, the judge picks the better of two replies whose order is known. Chance is 50%; "
        "the ticks mark chance and what “the longer reply wins” would score. A judge below either teaches nothing good.",
        _exam,
    ),
    (
        "groups",
        "Groups, reply by reply",
        "GRPO compares replies to one prompt with each other: above the group's mean is made more likely, below it less.",
        _browser,
    ),
    ("examples", "Example answers", "The same held-out prompt, answered by each model.", _examples),
    (
        "export",
        "Export",
        "How far each exported file is from the model that was trained, measured in its real loader. Its KL must be far below "
        "what training did. A type of few bits rounds; “training kept” says how much of the training is in the file, rounding or not.",
        _export,
    ),
    ("details", "Options, versions, hashes", "", _details),
)


def _side_by_side(bodies: list[tuple[str, str, str]], several: bool) -> str:
    """[(look and name of a run, HTML)] in columns, headed by the run's name where there are several; what runs have in common is shown once."""
    if not several:
        return "".join(body for *_, body in bodies)
    shared: dict[str, list] = {}
    for look, name, body in bodies:
        shared.setdefault(body, []).append(f"{swatch(look)}<h3>{text(name)}</h3>")
    columns = (f"<div><div class=name>{' '.join(heads)}</div>{body}</div>" for body, heads in shared.items())
    return f"<div class=runs>{''.join(columns)}</div>"


def _page(runs: list[dict], limits: Limits) -> str:
    several, styles = len(runs) > 1, looks(runs)
    title = "kardia-lite: " + ", ".join(text(run["name"]) for run in runs)
    head = _side_by_side([(look, run["name"], _headline(run)) for look, run in zip(styles, runs)], several)
    sections = [
        ("differs", "What differs", _differs(runs) if several else ""),
        ("evaluation", "Before and after", _before_after(runs)),
        ("curves", "Curves", run_curves(runs)),
    ]
    for name, heading, lead, render in SECTIONS:
        bodies = [
            (look, run["name"], body) for look, run in zip(styles, runs) if (body := render(run, limits))
        ]
        sections.append(
            (name, heading, f"<p>{lead}</p>" * bool(lead) + _side_by_side(bodies, several) if bodies else "")
        )
    sections = [section for section in sections if section[2]]
    nav = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections)
    body = "".join(
        f'<section id="{name}"{" class=whole" * (name in ("exam", "examples", "export"))}><h2>{heading}</h2>{content}</section>'
        for name, heading, content in sections
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title><style>{STYLE}</style></head>'
        f'<body{" class=several" * several}><h1>{title}</h1><nav aria-label="Sections">{nav}</nav><main>{head}{body}</main></body></html>\n'
    )


def write_report(runs: list[Path], target: Path) -> Path:
    """Write one self-contained HTML page about the run directories `runs` to `target` (replaced in one step) and return it.

    Under 3 MB: where texts are long, fewer groups and shorter excerpts are shown. Raises ReportError for a run that cannot be
    read, and when even the shortest page is too large."""
    data = [read_run(path) for path in runs]
    if not data:
        raise ReportError("no run directory given; report needs at least one")
    names = [run["name"] for run in data]
    for path, run in zip(runs, data):
        if names.count(run["name"]) > 1:
            run["name"] = str(path)
    for limits in (
        Limits(12, 3000, 600),
        Limits(12, 3000, 200),
        Limits(12, 1000, 80),
        Limits(6, 400, 40),
        Limits(3, 150, 0),
    ):
        page = _page(data, limits).encode(
            "utf-8", "replace"
        )  # a lone surrogate in a reply must not stop the report
        if len(page) <= PAGE_LIMIT:
            break
    else:
        raise ReportError(
            f"{len(data)} runs make a page of {len(page) / 1e6:.1f} MB, the limit is {PAGE_LIMIT / 1e6:.1f}; report fewer runs at once"
        )
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    temporary.write_bytes(page)
    os.replace(temporary, target)
    return target
