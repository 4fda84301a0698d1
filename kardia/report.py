"""What a run did, told from its directory alone: one HTML page, and one GRPO group worked by hand.

`write_report` makes a single file that needs no network and no script: charts are SVG, long parts fold with <details>.
`explain` prints the arithmetic of one group as text. Both read only run.json, log.jsonl, completions.jsonl,
evaluation.json, exam.json and export.json; whatever is absent leaves its section out. Every text of a run is untrusted
(a model wrote it): it reaches the page through `_text` only, and the terminal without control characters.

    advantage_i = (reward_i - mean(rewards of the group)) / (std(rewards of the group) + 1e-4)       std with n - 1, as TRL
"""

from __future__ import annotations

import html
import json
import math
import os
import re
import textwrap
from pathlib import Path

SPANS = ("understanding", "reasoning", "emotion", "response")
SPAN = re.compile(r"<\|(%s)_begin\|>(.*?)<\|\1_end\|>" % "|".join(SPANS), re.DOTALL)
PAGE_LIMIT = 2_900_000  # bytes; mail and chat tools start to refuse or to lag above 3 MB
EPSILON = 1e-4  # TRL's, in the denominator of the advantage
WIDTH = 100  # columns of `explain`


class ReportError(RuntimeError):
    """A run that cannot be reported: one line for the user, naming the file."""


# ---------------------------------------------------------------------------------- reading a run


def _parse(text: bytes, where: str) -> dict:
    try:
        value = json.loads(text.decode("utf-8"), parse_constant=lambda _: None)  # NaN is "unknown" here
    except ValueError as error:
        raise ReportError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ReportError(f"{where}: found a {type(value).__name__}, expected an object")
    return value


def _object(path: Path) -> dict | None:
    return _parse(path.read_bytes(), str(path)) if path.exists() else None


def _lines(path: Path) -> list[dict]:
    lines = [(n, line) for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()] if path.exists() else []
    rows = []
    for number, line in lines:
        try:
            rows.append(_parse(line, f"{path}:{number}"))
        except ReportError:
            if number != lines[-1][0]:
                raise  # only the last line can be one that a killed run did not finish
    return rows


def read_run(path: Path) -> dict:
    """Everything recorded in the run directory `path`, as {name, run, log, completions, evaluation, exam, export}.

    log and completions are lists of dicts in file order ([] where the file is absent; a torn last line is skipped);
    the others are dicts or None. exam is exam.json, or else the one stored in run.json.
    Raises ReportError when `path` is no directory or a file is malformed."""
    path = Path(path)
    if not path.is_dir():
        raise ReportError(f"{path}: no such run directory")
    run = _object(path / "run.json")
    exam = _object(path / "exam.json") or (run or {}).get("judge_exam")
    return {
        "name": path.resolve().name,
        "run": run,
        "log": _lines(path / "log.jsonl"),
        "completions": _lines(path / "completions.jsonl"),
        "evaluation": _object(path / "evaluation.json"),
        "exam": exam if isinstance(exam, dict) else None,
        "export": _object(path / "export.json"),
    }


# ---------------------------------------------------------------------------------- numbers


def _number(value) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _groups(completions: list[dict]) -> list[tuple[int, int, list[dict]]]:
    """[(step, group, samples)] in order of step. A resumed run rewrites its steps: the later record of a sample wins."""
    groups: dict[tuple[int, int], dict] = {}
    for row in completions:
        samples = groups.setdefault((int(_number(row.get("step")) or 0), int(_number(row.get("group")) or 0)), {})
        samples[_number(row.get("sample", len(samples)))] = row
    return [(step, group, list(samples.values())) for (step, group), samples in sorted(groups.items())]


def _rewards(samples: list[dict]) -> list[float | None]:
    return [_number(sample.get("reward")) for sample in samples]


def _spread(samples: list[dict]) -> float:
    known = [reward for reward in _rewards(samples) if reward is not None]
    return max(known) - min(known) if known else 0.0


def _advantages(rewards: list[float | None]) -> tuple[float | None, float, list[float]]:
    """(mean, std, advantages) of one group [G]; None takes no part and gets 0, as does everyone where fewer than two are known."""
    known = [reward for reward in rewards if reward is not None]
    mean = _mean(known)
    if mean is None or len(known) < 2:
        return mean, 0.0, [0.0] * len(rewards)
    std = math.sqrt(sum((reward - mean) ** 2 for reward in known) / (len(known) - 1))
    return mean, std, [0.0 if reward is None else (reward - mean) / (std + EPSILON) for reward in rewards]


def _parts(sample: dict) -> list[tuple[str, float, float | None]]:
    """[(component, weight, value)] of one sample: reward = sum of weight x value over the known ones."""
    weights, components = sample.get("weights") or {}, sample.get("components") or {}
    return [(name, _number(weights.get(name)) or 0.0, _number(components.get(name))) for name in {**weights, **components}]


def _series(log: list[dict], key: str) -> list[tuple[float, float]]:
    pairs = [(_number(row.get("step", i + 1)), _number(row.get(key))) for i, row in enumerate(log)]
    return sorted((x, y) for x, y in pairs if x is not None and y is not None)


def _quarters(log: list[dict], key: str) -> tuple[float, float] | None:
    """Mean of the first and of the last quarter of the steps, None under eight steps."""
    values = [y for _, y in _series(log, key)]
    n = len(values) // 4
    return (_mean(values[:n]), _mean(values[-n:])) if n >= 2 else None


def _smooth(units: list[tuple[float, float]]) -> list[tuple[float, float, float | None]]:
    """[(x, value, half width)]: a line fitted around each x with Gaussian weights (a plain mean would bend at both ends),
    and its 95% interval with each unit independent: a GRPO group is one unit, its samples share a prompt. The half width
    is None below three effective units."""
    first, last, out = min(x for x, _ in units), max(x for x, _ in units), []
    width = max(1.0, (last - first) / 10)
    for x in [first + (last - first) * i / 60 for i in range(61)]:
        near = [(math.exp(-0.5 * ((u - x) / width) ** 2), u - x, v) for u, v in units if abs(u - x) < 4 * width]
        s0, s1, s2 = (sum(w * d**k for w, d, _ in near) for k in range(3))
        if s0 * s2 - s1 * s1 < 1e-9:
            continue  # a hole in the record: no line through a single step
        share = [w * (s2 - s1 * d) / (s0 * s2 - s1 * s1) for w, d, _ in near]  # of each unit in the fitted value
        level, slope = sum(part * v for part, (*_, v) in zip(share, near)), sum(w * (s0 * d - s1) * v for w, d, v in near) / (s0 * s2 - s1 * s1)
        effective = 1 / sum(part * part for part in share)
        error = math.sqrt(sum((part * (v - level - slope * d)) ** 2 for part, (_, d, v) in zip(share, near)))
        out.append((x, level, 1.96 * error * math.sqrt(effective / (effective - 1)) if effective >= 3 else None))
    return out


# ---------------------------------------------------------------------------------- words and small pieces of HTML


def _text(value, clip: int = 600) -> str:
    """Any value of a run as HTML text: the only way in."""
    value = "" if value is None else str(value)
    return html.escape(value if len(value) <= clip else value[:clip].rstrip() + " […]")


def _f(value, digits: int = 2, sign: bool = False, none: str = "–") -> str:
    number = _number(value)
    return none if number is None else f"{number:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def _interval(entry: dict, sign: bool = False) -> str:
    known = _number(entry.get("low")) is not None and _number(entry.get("high")) is not None
    return f"{_f(entry['low'], sign=sign)} to {_f(entry['high'], sign=sign)}" if known else ""


def _place(value) -> str:
    """Position on a 0..1 track, in percent."""
    return f"{100 * min(1.0, max(0.0, _number(value) or 0.0)):.1f}%"


def _cell(entry: dict, mean="mean", *marks) -> str:
    """Mean, interval, and both drawn on a 0..1 track with other values as ticks (decoration: the numbers stand beside it)."""
    if _number(entry.get(mean)) is None:
        return "–"
    track = "".join(f'<i class=tick style="left:{_place(mark)}"></i>' for mark in marks if _number(mark) is not None)
    track += f'<i class=bar style="left:{_place(entry["low"])};right:{_place(1 - entry["high"])}"></i>' if _interval(entry) else ""
    track += f'<i class=dot style="left:{_place(entry[mean])}"></i>'
    return f"<b>{_f(entry[mean])}</b> <small>{_interval(entry)}</small><span class=track aria-hidden=true>{track}</span>"


def _bars(scores: dict | None, means: dict, kind: str = "") -> str:
    """One bar per 0..1 score, with a tick at the group's mean where there is one."""
    rows = ""
    for name, value in (scores or {}).items():
        tick = f'<i class=tick style="left:{_place(means[name])}"></i>' if name in means else ""
        track = f'<span class=track aria-hidden=true><i class=fill style="width:{_place(value)}"></i>{tick}</span>'
        rows += f'<div class="{kind}"><span>{_names([name])}</span>{track}<span>{_f(value)}</span></div>'
    return rows


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML already. The first column is the row's header; wide tables scroll inside their own box."""
    body = "".join(f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{"".join(f"<th scope=col>{cell}</th>" for cell in head)}</tr></thead><tbody>{body}</tbody></table></div>'


def _names(names: list) -> str:
    return ", ".join(_text(str(name).replace("_", " ")) for name in names)


def _split(text) -> list[tuple[str, str]]:
    """[(span name, its text)] of a reply, in order; "" names what stands outside every well-formed span."""
    parts, end, text = [], 0, str(text or "")
    for match in SPAN.finditer(text):
        parts += [("", text[end:match.start()].strip()), (match[1], match[2].strip())]
        end = match.end()
    return [(name, piece) for name, piece in [*parts, ("", text[end:].strip())] if name or piece]


# ---------------------------------------------------------------------------------- headline


def _trained(data: dict) -> str:
    run, steps = data["run"] or {}, [x for x, _ in _series(data["log"], "step")]
    seconds, memory = _number(run.get("seconds")), _number(run.get("peak_memory_gb"))
    words = [
        f"<b>{_text(str(run.get('command') or 'run').upper())}</b>",
        run.get("base") and f"of <b>{_text(run.get('model') or Path(str(run['base'])).name)}</b>" + (f" ({_text(run['bits'])}-bit)" if run.get("bits") else ""),
        run.get("parent") and f"starting from {_text(run['parent'])}",
        steps and f"for {max(steps):.0f} steps",
        seconds and f"in {f'{seconds:.0f} s' if seconds < 120 else f'{seconds / 60:.0f} min' if seconds < 7200 else f'{seconds / 3600:.1f} h'}",
        run.get("machine") and f"on {_text(run['machine'])}",
        memory and f"(peak memory {memory:.1f} GB)",
    ]
    state = {"running": " It was still running when this page was written.", "interrupted": " It was interrupted before its end."}
    return f"<p class=lead>{' '.join(word for word in words if word)}.{state.get(run.get('status'), '')}</p>"


def _trend(trend: dict | None) -> str:
    low, high = _number((trend or {}).get("low")), _number((trend or {}).get("high"))
    if low is None or high is None:
        return "Whether GRPO's reward rose is not recorded: the trend is computed at the end of a run, from at least a few steps."
    verdict = "<b>rose</b>" if low > 0 else "<b>fell</b>" if high < 0 else "<b>shows no change that the interval can tell from zero</b>"
    return (f"GRPO's reward {verdict}: {_f(trend.get('first_quarter'), 3)} in the first quarter of the {_text(trend.get('steps', '?'))} steps, "
            f"{_f(trend.get('last_quarter'), 3)} in the last; slope {_f(trend.get('slope_per_step'), 5, True)} per step, interval {_f(low, 5, True)} to {_f(high, 5, True)}.")


def _verdicts(data: dict) -> list[str]:
    run, log, exam = data["run"] or {}, data["log"], data["exam"] or {}
    is_grpo = run.get("command") == "grpo" or any("reward" in row for row in log)
    out = [_trend(run.get("reward_trend"))] if is_grpo else []
    loss = None if is_grpo else _quarters(log, "loss")
    out += [f"The SFT loss went from {_f(loss[0])} (first quarter) to {_f(loss[1])} (last quarter)."] if loss else []
    differences = (data["evaluation"] or {}).get("differences") or []
    for pair in dict.fromkeys((row.get("better"), row.get("than")) for row in differences):
        rows = [row for row in differences if (row.get("better"), row.get("than")) == pair]
        up = [row.get("metric") for row in rows if (_number(row.get("low")) or 0) > 0]
        down = [row.get("metric") for row in rows if (_number(row.get("high")) or 0) < 0]
        told = [f"better on {_names(up)}"] * bool(up) + [f"<b>worse</b> on {_names(down)}"] * bool(down)
        rest = len(rows) - len(up) - len(down)
        told += [f"not told apart on {'any metric' if rest == len(rows) else f'{rest} of {len(rows)} metrics'}"] * bool(rest)
        out.append(f"On held-out prompts, {_text(pair[0])} against {_text(pair[1])}: {'; '.join(told)}.")
    criteria = exam.get("criteria") or {}
    if criteria:
        fit = [name for name, entry in criteria.items() if entry.get("fit")]
        out.append(f"The judge passed its exam on {len(fit)} of {len(criteria)} criteria" + (f" ({_names(fit)})." if fit else "."))
    formats = (data["export"] or {}).get("formats") or {}
    lost = [name for name, entry in formats.items() if not entry.get("ok")]
    proved = [name for name, entry in formats.items() if entry.get("ok") and entry.get("verdict") != "noisy" and _number(entry.get("kl")) is not None]
    noisy = [name for name, entry in formats.items() if entry.get("ok") and entry.get("verdict") == "noisy"]
    out += [f"<b>Exports that do not match the trained model: {_text(', '.join(lost))}.</b>"] if lost else []
    out += [f"Exports measured against the trained model and found to match it: {_text(', '.join(proved))}."] if proved else []
    out += [f"Exports that hold the training but with much rounding: {_text(', '.join(noisy))}."] if noisy else []
    return out


def _alarms(data: dict) -> list[str]:
    """What a careful reader would have noticed in the numbers; each line says why it matters."""
    run, log, out = data["run"] or {}, data["log"], []
    dropped = run.get("dropped_criteria") or []
    out += [f"Left out of the reward, because the judge failed its exam on them: {_names(dropped)}."] if dropped else []
    criteria = ((data["exam"] or {}).get("criteria") or {}).items() if data["completions"] or run.get("command") == "grpo" else []
    unfit = [name for name, entry in criteria if not entry.get("fit") and _number(entry.get("weight")) and name not in dropped]
    out += [f"Rewarded although the judge failed its exam on them: {_names(unfit)}. A rise of these scores is no evidence."] if unfit else []
    for key, alarming, words in (
        ("frac_reward_zero_std", lambda a, b: b > 0.7, "In the last quarter {b:.0%} of the groups had equal rewards and taught nothing: try harder prompts or a higher temperature."),
        ("completions/clipped_ratio", lambda a, b: b > 0.2, "In the last quarter {b:.0%} of the replies were cut at the token limit."),
        ("entropy", lambda a, b: b < 0.3 * a, "Entropy fell from {a:.2f} to {b:.2f}: replies to one prompt become alike."),
        ("completions/mean_length", lambda a, b: b > 1.5 * a, "Replies grew from {a:.0f} to {b:.0f} tokens: see that the judge does not pay for length."),
    ):
        ends = _quarters(log, key)
        out += [words.format(a=ends[0], b=ends[1])] if ends and alarming(*ends) else []
    unknown = [row for row in data["completions"] if _number(row.get("reward")) is None]
    if len(unknown) > 0.05 * len(data["completions"]):
        out.append(f"{len(unknown)} of {len(data['completions'])} replies could not be judged and took no part.")
    return out


def _headline(data: dict, *_) -> str:
    if not any(value for key, value in data.items() if key != "name"):
        return "<p>This directory holds no record of a run yet.</p>"
    verdicts, alarms = ("".join(f"<li>{line}</li>" for line in lines) for lines in (_verdicts(data), _alarms(data)))
    warning = f"<div class=alarm><b>Read with care</b><ul>{alarms}</ul></div>" if alarms else ""
    return _trained(data) + (f"<ul class=verdicts>{verdicts}</ul>" if verdicts else "") + warning


# ---------------------------------------------------------------------------------- before and after


def _before_after(runs: list[dict]) -> str:
    """Every evaluated model of every run as a column; then differences and win rates."""
    scored = [(run, run["evaluation"]) for run in runs if (run["evaluation"] or {}).get("metrics")]
    if not scored:
        return ""
    tag = lambda run: f"<small>{_text(run['name'])}</small><br>" if len(scored) > 1 else ""  # noqa: E731
    columns = [(run, model, ev["metrics"].get(model) or {}) for run, ev in scored for model in ev.get("models") or list(ev["metrics"])]
    metrics = dict.fromkeys(metric for *_, values in columns for metric in values)
    rows = [[_names([metric])] + [_cell(values.get(metric) or {}) for _, _, values in columns] for metric in metrics]
    names = [f"{_text(run['name'])}: " * (len(scored) > 1) for run, _ in scored]
    about = "; ".join(f"{name}{_text(ev.get('prompts', '?'))} held-out prompts, judge {_text(ev.get('judge', '?'))}" for name, (_, ev) in zip(names, scored))
    note = f"<p class=note>{about}. Scores from 0 to 1, mean with its 95% bootstrap interval.</p>"
    out = f"<div><h3>Scores</h3>{_table(['Metric'] + [tag(run) + _text(model) for run, model, _ in columns], rows)}</div>"
    pairs: dict[tuple, dict] = {}
    for index, (_, ev) in enumerate(scored):
        for row in ev.get("differences") or []:
            pairs.setdefault((index, row.get("better"), row.get("than")), {})[row.get("metric")] = row
    if pairs:
        metrics = dict.fromkeys(metric for rows in pairs.values() for metric in rows)
        out += "<div><h3>Paired differences, the same prompts</h3>" + _table(
            ["Metric"] + [f"{tag(scored[i][0])}{_text(a)} − {_text(b)}" for i, a, b in pairs],
            [[_names([metric])] + [_difference(rows.get(metric) or {}) for rows in pairs.values()] for metric in metrics]) + "</div>"
    wins = [(run, row) for run, ev in scored for row in ev.get("win_rate") or []]
    if wins:
        out += "<div><h3>Win rates, 0.5 is a draw</h3>" + _table(
            ["Comparison", "Share of prompts", "Ties"],
            [[f"{tag(run)}{_text(row.get('model'))} against {_text(row.get('against'))}", _cell(row, "rate", 0.5), _text(row.get("ties"))]
             for run, row in wins]) + "</div>"
    return f"{note}<div class=side>{out}</div>"


def _difference(row: dict) -> str:
    low, high = _number(row.get("low")), _number(row.get("high"))
    kind, word = ("up", "better") if low is not None and low > 0 else ("down", "worse") if high is not None and high < 0 else ("", "not told apart")
    return f"<b class='{kind}'>{_f(row.get('mean'), sign=True)}</b> <small>{_interval(row, True)}</small><br><small class='{kind}'>{word}</small>" if row else "–"


# ---------------------------------------------------------------------------------- curves


def _ticks(low: float, high: float) -> list[float]:
    raw = ((high - low) or abs(high) * 0.1 or 1.0) / 3
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _chart(title: str, points: list, units: list | None = None, unit_scale: bool = False, wide: bool = False) -> str:
    """One figure: dots for steps [(step, value)], line smoothed over `units` (groups where known) with its band.
    The SVG stretches to its box with strokes of constant width; labels are HTML, so they stay readable at any size."""
    if not points:
        return ""
    size = math.ceil(len(points) / 400)
    dots = [(_mean([x for x, _ in part]), _mean([y for _, y in part])) for part in (points[i:i + size] for i in range(0, len(points), size))]
    line = _smooth(units or points) if len(points) > 2 else []
    inside = unit_scale and all(0 <= y <= 1 for _, y in dots)
    ticks = [0.0, 0.5, 1.0] if inside else _ticks(min(y for _, y in dots), max(y for _, y in dots))
    left, right, bottom, top = points[0][0], max(points[-1][0], points[0][0] + 1e-9), ticks[0], ticks[-1]
    at = lambda x, y: f"{100 * (x - left) / (right - left):.1f} {100 * min(1, max(0, (top - y) / (top - bottom))):.1f}"  # noqa: E731
    band = [(x, m, h) for x, m, h in line if h is not None] if units else []
    shapes = "".join(f'<path class=grid d="M0 {100 * (top - t) / (top - bottom):.1f}H100"/>' for t in ticks)
    if band:
        shapes += f'<path class=band d="M{"L".join([at(x, m + h) for x, m, h in band] + [at(x, m - h) for x, m, h in reversed(band)])}Z"/>'
    shapes += f'<path class=dots d="{"".join(f"M{at(x, y)}h0" for x, y in dots)}"/>'
    shapes += f'<path class=line d="M{"L".join(at(x, m) for x, m, _ in line)}"/>' if line else ""
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    labels = "".join(f'<span style="top:{100 * (top - t) / (top - bottom):.1f}%">{_f(t, digits)}</span>' for t in ticks)
    ends = (line[0][1], line[-1][1]) if line else (dots[0][1], dots[-1][1])
    change = " → ".join(_f(min(top, max(bottom, y)), digits + 1) for y in ends)  # a fitted line can leave the scale at its ends
    name = _text(title.replace("_", " "))
    return (f'<figure class="chart{" wide" * wide}"><figcaption><b>{name}</b> <span>{change}</span></figcaption><div class=plot><div class=y>{labels}</div>'
            f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{name} by step: {change}">{shapes}</svg></div>'
            f'<div class=x><span>step {left:.0f}</span><span>{right:.0f}</span></div></figure>')


def _curves(data: dict, *_) -> str:
    log, groups = data["log"], _groups(data["completions"])
    if not groups and not _series(log, "reward"):
        out = _chart("Loss", _series(log, "loss"), wide=True) + _chart("Token accuracy", _series(log, "mean_token_accuracy"), unit_scale=True)
        return f"<div class=charts>{out}</div>" if out else ""

    def figure(kind: str, name: str, key: str, **style) -> str:
        per_group = [(step, [_number((row.get(kind) or {}).get(name) if kind else row.get(name)) for row in samples]) for step, _, samples in groups]
        units = [(step, _mean([v for v in values if v is not None])) for step, values in per_group if any(v is not None for v in values)]
        return _chart(name if kind else "Total reward", _series(log, key) or units, units, **style)

    band = "The band is the line's 95% interval; a group of replies counts once, because it shares a prompt. " * bool(groups)
    note = f"<p class=note>{band}Components and criteria share one scale, 0 to 1.</p>"
    out = figure("", "reward", "reward", wide=True)
    for kind, key, title in (("components", "rewards/{}/mean", "Reward components"), ("criteria", "criteria/{}", "Criteria of the rubric, as the judge scores them")):
        prefix, _, suffix = key.partition("{}")
        logged = [name[len(prefix):len(name) - len(suffix)] for row in log for name in row if name.startswith(prefix) and name.endswith(suffix)]
        names = dict.fromkeys(logged + [name for row in data["completions"] for name in row.get(kind) or {}])
        cells = "".join(figure(kind, name, key.format(name), unit_scale=True) for name in names)
        out += f"<h4>{title}</h4>{cells}" if cells else ""
    health = _chart("Groups with signal", [(x, 1 - y) for x, y in _series(log, "frac_reward_zero_std")], unit_scale=True)
    health += _chart("Replies cut at the limit", _series(log, "completions/clipped_ratio"), unit_scale=True)
    for key, title in (("completions/mean_length", "Tokens per reply"), ("entropy", "Entropy"), ("kl", "KL to the SFT model")):
        health += _chart(title, _series(log, key))
    return f"{note}<div class=charts>{out}{'<h4>Health of the run</h4>' * bool(health)}{health}</div>"


# ---------------------------------------------------------------------------------- judge exam


def _exam(data: dict, *_) -> str:
    exam = data["exam"] or {}
    rows = []
    for name, entry in [*(exam.get("criteria") or {}).items(), *([("overall", exam["overall"])] if exam.get("overall") else [])]:
        count = f"{_text(entry.get('correct'))} of {_text(entry.get('n'))}" if "n" in entry else _text(exam.get("pairs"))
        kind, word = ("up", "fit") if entry.get("fit") else ("down", "unfit")
        fit = f"<b class={kind}>{word}</b> <small class=prose>{_text(entry.get('why'))}</small>" if "fit" in entry else ""
        rows.append([_names([name]), _text(entry.get("method")), _f(entry.get("weight"), none=""), count,
                     _cell(entry, "accuracy", 0.5, entry.get("length_baseline")), _f(entry.get("length_baseline")), fit])
    if not rows:
        return ""
    speed = f", {_f(exam['scores_per_second'], 1)} scores per second" if _number(exam.get("scores_per_second")) else ""
    lora = f" with {_text(exam['lora'])}" if exam.get("lora") else ""
    return f"<p class=note>Judge {_text(exam.get('judge', '?'))}{lora}, {_text(exam.get('pairs', '?'))} pairs{speed}. Accuracy is cross-validated: the method is chosen on other pairs than those it is counted on.</p>" + _table(
        ["Criterion", "Method", "Weight", "Correct", "Accuracy", "“Longer wins”", "Verdict"], rows) + _exam_methods(exam)


def _exam_methods(exam: dict) -> str:
    """Every method's accuracy, length bias, and what was tried to fool the judge."""
    table = lambda value: value if isinstance(value, dict) else {}  # noqa: E731 - a damaged record leaves its part out
    criteria = {name: entry for name, entry in table(exam.get("criteria")).items() if table(table(entry).get("methods"))}
    methods = list(dict.fromkeys(method for entry in criteria.values() for method in entry["methods"]))
    rows = []
    for name, entry in criteria.items():
        cells = [_cell(table(entry["methods"].get(method)), "accuracy", 0.5, entry.get("length_baseline")) for method in methods]
        bias = [_f(table(table(entry.get("length")).get(side)).get("accuracy")) for side in ("longer_better", "shorter_better")]
        rows.append([_names([name]), *cells, *bias])
    out = _table(["Criterion", *(_text(method) for method in methods), "longer is better", "shorter is better"], rows) if rows else ""
    canaries, repeat, notes = table(exam.get("canaries")), table(exam.get("repeatability")), []
    if canaries.get("n"):
        failed = "; ".join(f"“{_text(canary)}” raised {_names(sorted(set(map(str, names))))}" for canary, names in table(canaries.get("failed")).items() if isinstance(names, list))
        notes.append(f"Begging for a grade raised no score of the model alone in {_text(canaries.get('held'))} of {_text(canaries['n'])} tries, "
                     f"and in {_text(canaries.get('held_with_guards'))} with the rules that refuse such replies{': ' + failed if failed else ''}.")
    if _number(repeat.get("largest_difference")) is not None:
        notes.append("Read twice, in another order, scores were " + ("bit-identical." if repeat["largest_difference"] == 0 else f"up to {_f(repeat['largest_difference'], 4)} apart."))
    return out + (f"<p class=note>{' '.join(notes)}</p>" if notes else "")


# ---------------------------------------------------------------------------------- groups, example answers


def _answer(text, clip: int) -> str:
    """A reply with its four spans coloured and named; what stands outside them is shown too, marked as such."""
    pieces = [(name or "stray", name or "outside the spans", _text(piece, clip)) for name, piece in _split(text)]
    return "".join(f'<div class="span {kind}"><small>{name}</small>{piece or "<em>empty</em>"}</div>' for kind, name, piece in pieces) or "<p class=note>Empty reply.</p>"


def _prompt(row: dict, clip: int) -> str:
    facts = [("Persona", row.get("person")), ("Situation", row.get("situation")), ("Emotion to find", row.get("emotion"))]
    out = "".join(f"<dt>{name}</dt><dd>{_text(value, clip)}</dd>" for name, value in facts if value)
    told = []
    for turn in row.get("messages") or []:
        content = _answer(turn.get("content"), clip) if turn.get("role") == "assistant" else _text(turn.get("content"), clip)
        told.append(f"<dt>{_text(turn.get('role'))}</dt><dd>{content}</dd>")
    earlier = f"<details><summary>{len(told) - 1} earlier turn{'s' * (len(told) > 2)}</summary><dl>{''.join(told[:-1])}</dl></details>" if len(told) > 1 else ""
    return f"<dl class=prompt>{out}</dl>{earlier}<dl class=prompt>{''.join(told[-1:])}</dl>"


def _means(samples: list[dict], kind: str) -> dict[str, float]:
    """Mean of each component or criterion over the samples that take part."""
    rows = [sample.get(kind) or {} for sample in samples if _number(sample.get("reward")) is not None]
    known = {name: [v for v in (_number(row.get(name)) for row in rows) if v is not None] for name in dict.fromkeys(n for row in rows for n in row)}
    return {name: _mean(values) for name, values in known.items() if values}


def _why(sample: dict, samples: list[dict]) -> str:
    """One plain sentence of numbers: which component carries this sample away from its group's mean."""
    reward, (mean, std, advantages) = _number(sample.get("reward")), _advantages(_rewards(samples))
    if reward is None:
        return "Took no part: it has no reward, so its advantage is 0."
    if std < 1e-6:
        return "Not pushed: no two rewards of the group differ."
    advantage = next(value for other, value in zip(samples, advantages) if other is sample)
    means, sign = _means(samples, "components"), 1 if advantage > 0 else -1
    moves = [(sign * weight * (value - means[name]), name, value) for name, weight, value in _parts(sample) if value is not None and name in means]
    if abs(advantage) < 0.05 or not moves or max(moves)[0] <= 0:
        return f"Hardly pushed: reward {_f(reward)} against the group's mean {_f(mean)}."
    gain, name, value = max(moves)
    out = f"Pushed {'up' if sign > 0 else 'down'} mostly by {name}: {_f(value)} against a mean of {_f(means[name])}, worth {_f(sign * gain, sign=True)} of reward"
    base = _means(samples, "criteria")
    tilts = [(sign * (_number(score) - base[key]), key) for key, score in (sample.get("criteria") or {}).items() if _number(score) is not None and key in base]
    if name == "rubric" and tilts and max(tilts)[0] > 0:
        key = max(tilts)[1]
        out += f" (most of all {key.replace('_', ' ')}, {_f(sample['criteria'][key])} against {_f(base[key])})"
    return out + "."


def _card(sample: dict, samples: list[dict], clip: int) -> str:
    advantage, before, after = (_number(sample.get(key)) for key in ("advantage", "logprob", "logprob_after"))
    kind = "up" if (advantage or 0) > 0 else "down" if (advantage or 0) < 0 else ""
    bars = "".join(_bars(sample.get(part), _means(samples, part), part) for part in ("components", "criteria"))
    facts = [
        sample.get("tokens") is not None and f"{_text(sample['tokens'])} tokens",
        sample.get("truncated") and "cut at the limit",
        sample.get("problem") and f"invalid: {_text(sample['problem'])}",
        sample.get("refused") and f"not put to the judge: {_text(sample['refused'])}",
        before is not None and f"log-prob per token {_f(before, 3)}" + (f" → {_f(after, 3)} after the update" if after is not None else ""),
    ]
    return (f'<article class="card {kind}"><header><span>Sample {_text(sample.get("sample", "?"))}</span><span>reward <b>{_f(sample.get("reward"), 3, none="none")}</b></span>'
            f'<span>advantage <b class="{kind}">{_f(advantage, 2, True)}</b></span></header><p class=why>{_text(_why(sample, samples))}</p>'
            f'{_answer(sample.get("completion"), clip)}<div class=bars>{bars}</div><p class=note>{" · ".join(fact for fact in facts if fact)}</p></article>')


def _browser(data: dict, limit: int, clip: int) -> str:
    groups = _groups(data["completions"])
    if not groups:
        return ""
    widest = max(range(len(groups)), key=lambda i: _spread(groups[i][2]))
    spaced = {round(i * (len(groups) - 1) / (limit - 2)) for i in range(limit - 1)}  # the first and the last are among them
    chosen = range(len(groups)) if len(groups) <= limit else sorted({widest, *spaced})
    out = f"<p class=note>{len(chosen)} of {len(groups)} groups. Samples are ordered by advantage; the tick on a bar is the group's mean.</p>"
    for index in chosen:
        step, group, samples = groups[index]
        dots = "".join(f'<i class=dot style="left:{_place(reward)}"></i>' for reward in _rewards(samples) if reward is not None)
        ranked = sorted(samples, key=lambda s: (_number(s.get("reward")) is not None, _number(s.get("advantage")) or 0.0), reverse=True)
        more = f"<p class=note>{len(ranked) - 16} more samples are in completions.jsonl.</p>" if len(ranked) > 16 else ""
        out += (f'<details class=group{" open" * (index == widest)}><summary><b>Step {step}</b>, group {group}{", widest spread" * (index == widest)} '
                f'<span class=track aria-hidden=true>{dots}</span> <small>mean reward {_f(_advantages(_rewards(samples))[0])}, spread {_f(_spread(samples))}</small></summary>'
                f'{_prompt(samples[0], clip)}<div class=cards>{"".join(_card(sample, samples, clip) for sample in ranked[:16])}</div>{more}</details>')
    return out


def _examples(data: dict, limit: int, clip: int) -> str:
    out = ""
    for number, example in enumerate(((data["evaluation"] or {}).get("examples") or [])[:limit], 1):
        cards = ""
        for model, answer in (example.get("answers") or {}).items():
            state = "valid format" if answer.get("valid") else f"invalid: {_text(answer.get('problem') or 'format')}"
            cards += (f"<article class=card><header><b>{_text(model)}</b><span>{state}</span></header>{_answer(answer.get('text'), clip)}"
                      f"<div class=bars>{_bars(answer.get('scores'), {})}</div></article>")
        hint = _text(([turn.get("content") for turn in example.get("messages") or []] or [example.get("situation")])[-1], 90)
        out += (f'<details class=group{" open" * (number == 1)}><summary><b>Example {number}</b> <small>{hint}</small></summary>'
                f"{_prompt(example, clip)}<div class=cards>{cards}</div></details>")
    return out


# ---------------------------------------------------------------------------------- export, details, page


VERDICTS = {"ok": "<b class=up>matches</b>", "noisy": "<b>matches, with rounding</b>", "lost": "<b class=down>does not match</b>"}


def _export(data: dict, *_) -> str:
    book, rows, notes = data["export"] or {}, [], []
    trained = book.get("trained") if isinstance(book.get("trained"), dict) else {}
    share = lambda value, digits=0: f"{_number(value):.{digits}%}" if _number(value) is not None else "–"  # noqa: E731
    score = lambda entry: f"{_number(entry.get('rubric')):.2f}" if _number(entry.get("rubric")) is not None else "–"  # noqa: E731
    if _number(trained.get("rubric")) is not None:
        rows.append(["the trained model", "", "", "", "", "", share(trained.get("valid")), score(trained), "", ""])
    for name, entry in (book.get("formats") or {}).items():
        kl, base = _number(entry.get("kl")), _number(entry.get("kl_base"))
        measured = VERDICTS.get(entry.get("verdict"), VERDICTS["ok"]) if kl is not None else "text" if entry.get("loader") == "text" else "not measured"
        verdict = measured if entry.get("ok") else VERDICTS["lost"]
        rows.append([
            _text(name), f"{(_number(entry.get('bytes')) or 0) / 1e6:,.1f}\u00a0MB", f"{kl:.1e}".replace("-", "−") if kl is not None else "–", share(kl / base if kl is not None and base else None, 2),
            share(entry.get("kept")), share(entry.get("agreement")), share(entry.get("valid")), score(entry), verdict, f"<small class=prose>{_text(entry.get('path'))}</small>",
        ])  # fmt: skip
        notes += [f"<li>{_text(name)}: {_text(entry['why'])}.</li>"] if entry.get("why") else []
    if not rows:
        return ""
    base = next((_number(entry.get("kl_base")) for entry in book["formats"].values() if _number(entry.get("kl_base")) is not None), None)
    told = f"<p>Training moved the base by KL {base:.2g}, over {_text(book.get('prompts'))} places in answers.</p>" if base is not None else ""
    head = ["Format", "Size", "KL to trained", "of what training did", "training kept", "same next token", "valid answers", "judge's score", "Verdict", "Path"]
    return told + _table(head, rows) + (f"<ul class=verdicts>{''.join(notes)}</ul>" if notes else "") + _export_answers(book)


def _export_answers(book: dict) -> str:
    """The first question's answer by the trained model and by each export."""
    named = [("the trained model", book.get("trained") or {}), *(book.get("formats") or {}).items()]
    rows = [[_text(name), f"<small class=prose>{_text(entry['answers'][0])}</small>"] for name, entry in named if isinstance(entry.get("answers"), list) and entry["answers"]]
    return f"<details><summary>What each answers to the first question</summary>{_table(['', 'Answer'], rows)}</details>" if len(rows) > 1 else ""


def _details(data: dict, *_) -> str:
    run, out = data["run"] or {}, ""
    facts = {key: value for key, value in run.items() if value is not None and not isinstance(value, (dict, list))}
    for title, values in (("Run", facts), ("Options", run.get("options")), ("Versions", run.get("versions")), ("Hashes", run.get("hashes"))):
        if values:
            out += f"<div><h4>{title}</h4><dl>" + "".join(f"<dt>{_text(key)}</dt><dd><code>{_text(value)}</code></dd>" for key, value in values.items()) + "</dl></div>"
    return f"<details><summary>Show all</summary><div class=facts>{out}</div></details>" if out else ""


SECTIONS = (
    ("curves", "Curves", "Dots are steps, the line is their smoothed course.", _curves),
    ("exam", "Is the judge fit to judge?", "Before training, the judge picks the better of two replies whose order is known. Chance is 50%; "
     "the ticks mark chance and what “the longer reply wins” would score. A judge below either teaches nothing good.", _exam),
    ("groups", "Groups, reply by reply", "GRPO compares replies to one prompt with each other: above the group's mean is made more likely, below it less.", _browser),
    ("examples", "Example answers", "The same held-out prompt, answered by each model.", _examples),
    ("export", "Export", "How far each exported file is from the model that was trained, measured in its real loader. Its KL must be far below "
     "what training did. A type of few bits rounds; “training kept” says how much of the training is in the file, rounding or not.", _export),
    ("details", "Options, versions, hashes", "", _details),
)


STYLE = """
:root{color-scheme:light dark;--bg:#fdfdfc;--ink:#1d2126;--soft:#5a626c;--rule:#dcdfe3;--wash:#f4f5f4;--line:#1f5f9e;--up:#0a6a58;--down:#a53a17;--u:#2a62a8;--r:#7347a3;--e:#8d6100;--a:#0a6a58}
@media (prefers-color-scheme:dark){:root{--bg:#15181b;--ink:#e4e6e8;--soft:#a0a8b1;--rule:#343a41;--wash:#1d2125;--line:#79b2ec;--up:#5fc4ab;--down:#f0956f;--u:#86b5f0;--r:#c3a0ea;--e:#dfb15a;--a:#5fc4ab}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:70rem;padding:2rem 1.1rem 5rem;background:var(--bg);color:var(--ink);font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 .4rem}h2{font-size:1.25rem;margin:3rem 0 .3rem;padding-top:.8rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.6rem 0 .3rem}h4{font-size:.9rem;margin:.6rem 0 0;grid-column:1/-1}p{margin:.3rem 0;max-width:46rem}
nav{font-size:.9rem;margin-bottom:1.2rem;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem}a{color:var(--line)}small,.note{color:var(--soft);font-size:.82rem}.lead{font-size:1.08rem}
.up{color:var(--up)}.down{color:var(--down)}.verdicts{padding-left:1.1rem;max-width:46rem}.verdicts li{margin:.3rem 0}
.alarm{border-left:3px solid var(--down);padding:.1rem 0 .1rem .9rem;max-width:46rem;font-size:.92rem}.alarm ul{margin:.2rem 0;padding-left:1.1rem}
.scroll{overflow-x:auto;margin:.6rem 0}table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{text-align:left;vertical-align:top;padding:.4rem .8rem .4rem 0;border-bottom:1px solid var(--rule);min-width:4.5rem}thead th{color:var(--soft);font-weight:500;vertical-align:bottom}
tbody th{font-weight:500}td>small{white-space:nowrap}td>small.prose{display:block;white-space:normal;min-width:9rem;max-width:22rem}.side{display:flex;flex-wrap:wrap;gap:0 2rem}.side>div{min-width:0}
.track{display:block;position:relative;height:.55rem;min-width:6rem;margin:.25rem 0;background:linear-gradient(var(--rule),var(--rule)) center/100% 1px no-repeat}.track i{position:absolute;top:0;bottom:0}
.track .bar{top:.16rem;bottom:.16rem;background:var(--line);opacity:.4}.track .dot{top:.08rem;width:.4rem;height:.4rem;margin-left:-.2rem;border-radius:50%;background:var(--line)}.track .tick{width:1px;background:var(--ink)}
.track .fill{left:0;top:.1rem;bottom:.1rem;background:var(--line);opacity:.6}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(15rem,100%),1fr));gap:1rem 1.6rem;margin-top:.8rem}.chart{margin:0;font-size:.78rem;color:var(--soft);font-variant-numeric:tabular-nums}
.chart figcaption{display:flex;justify-content:space-between;gap:.8rem;margin-bottom:.6rem}.chart figcaption b{color:var(--ink);font-weight:600}.wide{grid-column:1/-1;font-size:.85rem;max-width:52rem}
.plot{position:relative;margin-left:2.6rem}.plot svg{display:block;width:100%;height:6.5rem;overflow:visible}.wide svg{height:13rem}.y span{position:absolute;right:100%;margin-right:.5rem;white-space:nowrap;transform:translateY(-50%)}
.x{display:flex;justify-content:space-between;margin:.3rem 0 0 2.6rem}svg path{fill:none;vector-effect:non-scaling-stroke}.grid{stroke:var(--rule)}svg .band{fill:var(--line);opacity:.2}
svg .dots{stroke:var(--soft);stroke-width:4;stroke-linecap:round;opacity:.45}svg .line{stroke:var(--line);stroke-width:2;stroke-linejoin:round}
details.group{border-bottom:1px solid var(--rule);padding:.5rem 0}summary{cursor:pointer}summary .track{display:inline-block;width:8rem;margin:0 .6rem;vertical-align:middle}details details{margin:.4rem 0;font-size:.92rem}
dl{margin:.4rem 0;font-size:.92rem;display:grid;grid-template-columns:minmax(7rem,max-content) 1fr;gap:.2rem .9rem}dt{color:var(--soft)}dd{margin:0;max-width:46rem;white-space:pre-line}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(19rem,100%),1fr));gap:1rem;margin:.8rem 0}.card{background:var(--wash);border-top:3px solid var(--rule);padding:.7rem .9rem;font-size:.92rem}
.card.up{color:inherit;border-color:var(--up)}.card.down{color:inherit;border-color:var(--down)}.card header{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 .6rem;font-size:.84rem;font-variant-numeric:tabular-nums}
.why{font-size:.86rem;color:var(--soft)}.span{border-left:3px solid var(--rule);padding-left:.6rem;margin:.45rem 0;white-space:pre-line}.span small{display:block;line-height:1.2}.span.stray{border-left-style:dashed;color:var(--soft)}
.understanding{border-color:var(--u)}.reasoning{border-color:var(--r)}.emotion{border-color:var(--e)}.response{border-color:var(--a)}.understanding small{color:var(--u)}.reasoning small{color:var(--r)}.emotion small{color:var(--e)}.response small{color:var(--a)}
.bars{font-size:.82rem;margin-top:.7rem}.bars div{display:grid;grid-template-columns:9.6rem 1fr 2.2rem;gap:.5rem;align-items:center}.bars .track{min-width:0}.bars span:last-child{text-align:right;font-variant-numeric:tabular-nums}
.bars .criteria span:first-child{padding-left:.8rem;color:var(--soft)}.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr));gap:1rem 2rem}
@media (max-width:34rem){body{padding:1.2rem .9rem 4rem}table{font-size:.84rem}th,td{padding-right:.7rem;min-width:0}.side .track{min-width:4.6rem}td>small{font-size:.76rem}dl{grid-template-columns:5.5rem 1fr}summary small{display:block}}
"""


def _page(runs: list[dict], limit: int, clip: int) -> str:
    several = len(runs) > 1
    title = "kardia-lite: " + ", ".join(_text(run["name"]) for run in runs)
    parts = [f'<h3>{_text(run["name"])}</h3>' * several + _headline(run) for run in runs]
    compared = _before_after(runs)
    sections = [("evaluation", "Before and after", compared)] if compared else []
    for key, heading, lead, render in SECTIONS:
        bodies = [(run["name"], render(run, limit, clip)) for run in runs]
        body = "".join(f"<h3>{_text(name)}</h3>" * several + text for name, text in bodies if text)
        if body:
            sections.append((key, heading, f"<p>{lead}</p>" * bool(lead) + body))
    nav = "".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{heading}</h2>{text}</section>' for key, heading, text in sections)
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title>'
            f"<style>{STYLE}</style></head><body><h1>{title}</h1><nav>{nav}</nav>{''.join(parts)}{body}</body></html>\n")


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
    for limit, clip in ((12, 3000), (12, 1000), (6, 400), (3, 150)):
        page = _page(data, limit, clip).encode("utf-8", "replace")  # a lone surrogate in a reply must not stop the report
        if len(page) <= PAGE_LIMIT:
            break
    else:
        raise ReportError(f"{len(data)} runs make a page of {len(page) / 1e6:.1f} MB, the limit is {PAGE_LIMIT / 1e6:.1f}; report fewer runs at once")
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    temporary.write_bytes(page)
    os.replace(temporary, target)
    return target


# ---------------------------------------------------------------------------------- one group by hand


def _say(label: str, text, clip: int = 100_000) -> list[str]:
    """`label` and wrapped text, at most WIDTH columns; control characters (escape sequences, direction marks) become spaces."""
    clean = "".join(c if c.isprintable() else " " for c in f"{label:<11} {text}"[:clip])
    return textwrap.wrap(clean, WIDTH, initial_indent="  ", subsequent_indent=" " * 14)


def _marked(text) -> str:
    """A message on one line, its spans named in brackets."""
    parts = _split(text)
    return " ".join(f"[{name or 'outside the spans'}] {piece}" for name, piece in parts) if any(name for name, _ in parts) else str(text or "")


def _sum_by_hand(sample: dict) -> str:
    """'weight x value component + ... = reward' of one sample, and a word where the stored reward is another number."""
    reward, parts = _number(sample.get("reward")), _parts(sample)
    known = [(name, weight, value) for name, weight, value in parts if value is not None]
    unknown = ", ".join(name for name, _, value in parts if value is None)
    if reward is None:
        return f"no reward: {unknown or 'it'} could not be judged; takes no part"
    terms, total, weights = " + ".join(f"{w:.4f} x {v:.4f} {name}" for name, w, v in known), sum(w * v for _, w, v in known), sum(w for _, w, _ in known)
    if unknown and weights and abs(total / weights - reward) <= 1e-3:
        return f"({terms}) / {weights:.4f} = {total / weights:.4f}   ({unknown} not judged)"
    return f"{terms} = {total:.4f}" + (f"   ({unknown} not judged)" if unknown else "") + (f"   (the run stored {reward:.4f})" if abs(total - reward) > 1e-3 else "")


def _group_by_hand(samples: list[dict]) -> list[str]:
    rewards = _rewards(samples)
    known, (mean, std, advantages) = [r for r in rewards if r is not None], _advantages(rewards)
    label = [f"sample {sample.get('sample', i)}" for i, sample in enumerate(samples)]
    lines = ["", f"GROUP: {len(known)} of {len(samples)} samples take part"]
    if len(known) < 2:
        return lines + _say("", "fewer than two rewards: nothing to compare, every advantage is 0")
    lines += _say("mean", f"({' + '.join(f'{r:.4f}' for r in known)}) / {len(known)} = {mean:.4f}")
    lines += _say("std", f"sqrt(({' + '.join(f'({r:.4f} - {mean:.4f})^2' for r in known)}) / ({len(known)} - 1)) = {std:.4f}")
    lines += ["", "ADVANTAGE = (reward - mean) / (std + 0.0001)"]
    stored = [_number(sample.get("advantage")) for sample in samples]
    off = [0.0 if kept is None else abs(kept - advantage) for kept, advantage in zip(stored, advantages)]
    for name, reward, advantage, kept, gap in zip(label, rewards, advantages, stored, off):
        terms = "no reward, takes no part: 0" if reward is None else f"({reward:.4f} - {mean:.4f}) / ({std:.4f} + 0.0001) = {advantage:+.4f}"
        lines += _say(name, terms + ("   not stored" if kept is None else f"   stored {kept:+.4f}" + "   DIFFERS" * (gap > 1e-3)))
    if max(off) > 1e-3:
        lines += _say("check", f"the stored advantages differ by up to {max(off):.4f}: the run scaled its rewards in another way")
    elif None not in stored:
        lines += _say("check", "equal to the stored advantages within 0.001")
    lines += ["", "WHAT IS PUSHED: the log-prob of every token of a reply, in proportion to its advantage"]
    for advantage, i in sorted(((a, i) for i, a in enumerate(advantages)), key=lambda pair: -pair[0]):
        lines += _say(label[i], _why(samples[i], samples).replace("−", "-"))  # a Windows console may not know the minus sign
        before, after = (_number(samples[i].get(key)) for key in ("logprob", "logprob_after"))
        if before is not None and after is not None:
            moved = "" if not advantage else ", with the push" if (after - before) * advantage > 0 else ", not with the push: replies share tokens and weights"
            lines += _say("", f"mean log-prob per token {before:.4f} -> {after:.4f} ({after - before:+.4f}{moved})")
    return lines


def explain(run: Path, step: int | None = None) -> str:
    """One GRPO group of `run`, number by number, as text of at most 100 columns: of `step` the first group, else of the
    whole run the one with the widest spread of rewards. Raises ReportError without completions or without that step."""
    groups = _groups(read_run(run)["completions"])
    if not groups:
        raise ReportError(f"{run}: no completions recorded; explain needs the directory of a GRPO run")
    found = [group for group in groups if step in (None, group[0])]
    if not found:
        steps = sorted({number for number, _, _ in groups})
        ranges = zip([s for s in steps if s - 1 not in steps], [s for s in steps if s + 1 not in steps])
        raise ReportError(f"{run}: no step {step} in completions.jsonl; it has {', '.join(f'{a}-{b}' if b > a else str(a) for a, b in ranges)}")
    number, group, samples = found[0] if step is not None else max(found, key=lambda item: _spread(item[2]))
    why = "the first group of the step" if step is not None else f"the widest spread of rewards in {len(groups)} groups"
    lines = [f"STEP {number}, GROUP {group}: {len(samples)} samples ({why})", "", "PROMPT"]
    for name, key in (("persona", "person"), ("situation", "situation"), ("emotion", "emotion")):
        lines += _say(name, samples[0][key], 400) if samples[0].get(key) else []
    for turn in samples[0].get("messages") or []:
        lines += _say(str(turn.get("role"))[:11], _marked(turn.get("content")), 400)
    lines += ["", "SAMPLES: reward = sum of weight x component"]
    for i, sample in enumerate(samples):
        lines += _say(f"sample {sample.get('sample', i)}", _sum_by_hand(sample))
        criteria = ", ".join(f"{name} {_f(value, 4, none='not judged')}" for name, value in (sample.get("criteria") or {}).items())
        criteria += f" (not put to the judge: {sample['refused']})" if criteria and sample.get("refused") else ""
        lines += (_say("", f"criteria: {criteria}") if criteria else []) + _say("", f"reply: {_marked(sample.get('completion'))}", 600)
    return "\n".join(lines + _group_by_hand(samples)) + "\n"
