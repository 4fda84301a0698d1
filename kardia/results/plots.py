"""The drawing half of the report: escaped text, tables, scores on a track, curves, tinted tokens; HTML and SVG, no script.

Every text of a run is untrusted (a model wrote it): it reaches a page through `text` only. Charts stretch to their box with
strokes of constant width, and their labels are HTML, so they stay readable at any size. Runs that share a chart differ by
colour and by dash pattern, and what stands for a number by colour or length has the number beside it.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

from kardia.core.console import CONTROL
from kardia.data.rows import split_spans
from kardia.results.run_files import fixed, groups_of, is_grpo, mean_of, number, series

LOOKS = 6  # colours, and patterns of dashes; a seventh run looks like the first

# ---------------------------------------------------------------------------------- words and tables


def text(value, clip: int = 600) -> str:
    """Any value of a run as HTML text: the only way in."""
    value = "" if value is None else CONTROL.sub(" ", str(value))
    return html.escape(value if len(value) <= clip else value[:clip].rstrip() + " […]")


def listed(words) -> str:
    return ", ".join(text(str(word).replace("_", " ")) for word in words)


def plural(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML already. The first column is the row's header; a row of one cell is a heading for those below it.
    Wide tables scroll inside their own box, by keyboard too."""
    body = ""
    for first, *cells in rows:
        part = "" if cells else f' colspan="{len(head)}" class=part'
        body += (
            f'<tr><th scope="{"row" if cells else "rowgroup"}"{part}>{first}</th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{"".join(f"<th scope=col>{cell}</th>" for cell in head)}</tr></thead><tbody>{body}</tbody></table></div>'


# ---------------------------------------------------------------------------------- scores from 0 to 1 on a track


def interval(entry: dict, sign: bool = False) -> str:
    known = number(entry.get("low")) is not None and number(entry.get("high")) is not None
    return f"{fixed(entry['low'], sign=sign)} to {fixed(entry['high'], sign=sign)}" if known else ""


def place(value) -> str:
    """Position on a 0..1 track, in percent."""
    return f"{100 * min(1.0, max(0.0, number(value) or 0.0)):.1f}%"


def track(marks: str) -> str:
    return f"<span class=track aria-hidden=true>{marks}</span>"  # hidden from a screen reader: the numbers stand beside it


def score_cell(entry: dict, mean="mean", *marks) -> str:
    """Mean, interval, and both drawn on a track with other values as ticks."""
    if number(entry.get(mean)) is None:
        return "–"
    drawn = "".join(
        f'<i class=tick style="left:{place(mark)}"></i>' for mark in marks if number(mark) is not None
    )
    drawn += (
        f'<i class=bar style="left:{place(entry["low"])};right:{place(1 - entry["high"])}"></i>'
        if interval(entry)
        else ""
    )
    return f'<span class=score><b>{fixed(entry[mean])}</b> <small>{interval(entry)}</small></span>{track(drawn + f"""<i class=dot style="left:{place(entry[mean])}"></i>""")}'


def bars(scores: dict | None, means: dict, kind: str = "", held: dict | None = None) -> str:
    """One bar per score, with a tick at the group's mean and a ring at the score `held` has for it, where there are such."""
    rows, others = "", held or {}
    for name, value in (scores or {}).items():
        drawn = f'<i class=fill style="width:{place(value)}"></i>' + (
            f'<i class=tick style="left:{place(means[name])}"></i>' if name in means else ""
        )
        drawn += (
            f'<i class=ring style="left:{place(others[name])}"></i>'
            if number(others.get(name)) is not None
            else ""
        )
        other = f"<span>{fixed(others.get(name), none='')}</span>" if others else ""
        rows += f'<div class="{kind}"><span>{listed([name])}</span>{track(drawn)}<span>{fixed(value)}</span>{other}</div>'
    return rows


def stacked(terms: dict[str, float], measured: float | None, of: str = "") -> str:
    """The memory plan: each term's bar begins where the one before ended, so that the last one ends at the total; below it what was measured."""
    total = sum(terms.values())
    scale, at, rows = max(total, measured or 0.0) or 1.0, 0.0, []
    for name, size in terms.items():
        rows.append(
            [
                text(name),
                fixed(size),
                track(f'<i class=fill style="left:{place(at / scale)};width:{place(size / scale)}"></i>'),
            ]
        )
        at += size
    rows.append(
        [
            "<b>planned in all</b>",
            f"<b>{fixed(total)}</b>",
            track(f'<i class="fill sum" style="width:{place(total / scale)}"></i>'),
        ]
    )
    if measured is not None:
        rows.append(
            [
                f"<b>measured peak</b> <small class=prose>{of}</small>",
                f"<b>{fixed(measured)}</b>",
                track(f'<i class="fill real" style="width:{place(measured / scale)}"></i>'),
            ]
        )
    return f"<div class=stack>{table(['Part', 'GB', ''], rows)}</div>"


# ---------------------------------------------------------------------------------- curves


@dataclass
class Curve:
    """One run's record of one quantity."""

    look: str  # of the run: classes of its colour and its dashes, see `looks`
    name: str  # of the run, "" where nothing else is in the chart's neighbourhood
    points: list[tuple[float, float]]  # (step, value): a dot each
    units: list[tuple[float, float]] | None = (
        None  # (step, value) of what is independent, groups of replies: gives the band
    )
    rings: tuple | list = ()  # (step, value) of a second measurement

    def scaled(self, factor: float) -> Curve:
        points, units, rings = (
            [(x, factor * y) for x, y in pairs or ()] for pairs in (self.points, self.units, self.rings)
        )
        return Curve(self.look, self.name, points, units or None, rings)

    def dots(self) -> list[tuple[float, float]]:
        """The points, neighbours averaged above four hundred."""
        size = math.ceil(len(self.points) / 400)
        parts = (self.points[i : i + size] for i in range(0, len(self.points), size))
        return [(mean_of([x for x, _ in part]), mean_of([y for _, y in part])) for part in parts]


def smooth(units: list[tuple[float, float]]) -> list[tuple[float, float, float | None]]:
    """[(x, value, half width)]: a line fitted around each x with Gaussian weights (a plain mean would bend at both ends),
    and its 95% interval with each unit independent: a GRPO group is one unit, its samples share a prompt. The half width
    is None below three effective units."""
    first, last, out = min(x for x, _ in units), max(x for x, _ in units), []
    width = max(1.0, (last - first) / 10)
    for x in [first + (last - first) * i / 60 for i in range(61)]:
        near = [
            (math.exp(-0.5 * ((u - x) / width) ** 2), u - x, v) for u, v in units if abs(u - x) < 4 * width
        ]
        s0, s1, s2 = (sum(w * d**k for w, d, _ in near) for k in range(3))
        if s0 * s2 - s1 * s1 < 1e-9:
            continue  # a hole in the record: no line through a single step
        share = [
            w * (s2 - s1 * d) / (s0 * s2 - s1 * s1) for w, d, _ in near
        ]  # of each unit in the fitted value
        level, slope = (
            sum(part * v for part, (*_, v) in zip(share, near)),
            sum(w * (s0 * d - s1) * v for w, d, v in near) / (s0 * s2 - s1 * s1),
        )
        effective = 1 / sum(part * part for part in share)
        error = math.sqrt(sum((part * (v - level - slope * d)) ** 2 for part, (_, d, v) in zip(share, near)))
        out.append(
            (x, level, 1.96 * error * math.sqrt(effective / (effective - 1)) if effective >= 3 else None)
        )
    return out


def ticks(low: float, high: float) -> list[float]:
    """Round values, about four, the first at or below `low` and the last at or above `high`."""
    size = max(abs(low), abs(high))
    raw = max(high - low if high - low > 1e-9 * size else 0.1 * size or 1.0, 1e-9) / 3
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def step_labels(left: float, right: float, most: int) -> list[float]:
    """Both ends, and between them round steps that leave room for their labels."""
    width = max(1.0, ticks(0, 3 * (right - left) / most)[1]) if right > left else 1.0
    inner = [i * width for i in range(math.ceil(left / width), math.floor(right / width) + 1)]
    return [
        left,
        *(x for x in inner if x - left > 0.6 * width and right - x > 0.6 * width),
        *([right] if right > left else []),
    ]


@dataclass
class Frame:
    """The box of a chart: what it spans, its labelled values, and where a point lies in it, in percent from the upper left."""

    left: float
    right: float
    marks: list[float]
    percent: bool

    @property
    def digits(self) -> int:
        return max(0, -math.floor(math.log10(self.marks[1] - self.marks[0]) + 1e-9))

    def inside(self, y: float) -> float:
        return min(self.marks[-1], max(self.marks[0], y))  # a fitted line can leave the scale at its ends

    def x(self, step: float) -> float:
        return 100 * (step - self.left) / ((self.right - self.left) or 1.0)

    def y(self, value: float) -> float:
        return 100 * (self.marks[-1] - self.inside(value)) / (self.marks[-1] - self.marks[0])

    def at(self, step: float, value: float) -> str:
        return f"{self.x(step):.1f} {self.y(value):.1f}"

    def told(self, value: float, more: int = 0) -> str:
        return fixed(value, self.digits + more) + "%" * self.percent


def _frame(curves: list[Curve], percent: bool, unit_scale: bool) -> Frame:
    seen, whole = [y for curve in curves for _, y in [*curve.dots(), *curve.rings]], 100.0 if percent else 1.0
    if not unit_scale or any(not 0 <= y <= whole for y in seen):
        marks = ticks(min(seen), max(seen))
    else:
        marks = (
            ticks(0.0, max(seen)) if percent and max(seen) < 20 else [0.0, whole / 2, whole]
        )  # 1% would be a line on the floor
    return Frame(
        min(curve.points[0][0] for curve in curves),
        max(curve.points[-1][0] for curve in curves),
        marks,
        percent,
    )


def _shapes(curve: Curve, line: list, frame: Frame) -> str:
    """The SVG of one run: band, dots, line, rings. Dots are lines of no length, whose round caps no stretching can distort."""
    at, look = frame.at, curve.look
    band = [(x, m, h) for x, m, h in line if h is not None] if curve.units else []
    out = (
        f'<path class="band {look}" d="M{"L".join([at(x, m + h) for x, m, h in band] + [at(x, m - h) for x, m, h in reversed(band)])}Z"/>'
        if band
        else ""
    )
    out += f'<path class="dots {look}" d="{"".join(f"M{at(x, y)}h0" for x, y in curve.dots())}"/>'
    out += f'<path class="line {look}" d="M{"L".join(at(x, m) for x, m, _ in line)}"/>' if line else ""
    rings = "".join(f"M{at(x, y)}h0" for x, y in curve.rings)
    return out + (f'<path class="rings {look}" d="{rings}"/><path class=holes d="{rings}"/>' if rings else "")


def chart(
    title: str,
    curves: list[Curve],
    unit: str = "",
    unit_scale: bool = False,
    wide: bool = False,
    hint: str = "",
) -> str:
    """One figure: per run the dots of its steps and a line smoothed over its units (groups where known) with their band.

    `unit` "%" shows shares in percent; `unit_scale` fixes the scale to 0..1 where all values are inside. "" without a point."""
    percent = unit == "%"
    curves = [curve.scaled(100.0 if percent else 1.0) for curve in curves if curve.points]
    if not curves:
        return ""
    frame, changes = _frame(curves, percent, unit_scale), []
    labels = step_labels(frame.left, frame.right, 8 if wide else 4)
    shapes = "".join(f'<path class=grid d="M0 {frame.y(mark):.1f}H100"/>' for mark in frame.marks) + "".join(
        f'<path class=grid d="M{frame.x(step):.1f} 100v3"/>' for step in labels
    )
    for curve in curves:
        line = smooth(curve.units or curve.points) if len(curve.points) > 2 else []
        ends = (line[0][1], line[-1][1]) if line else (curve.points[0][1], curve.points[-1][1])
        changes.append(
            " → ".join(frame.told(frame.inside(y), more=frame.marks[-1] < 100 or not percent) for y in ends)
        )
        shapes += _shapes(curve, line, frame)
    y_axis = "".join(
        f'<span style="top:{frame.y(mark):.1f}%">{frame.told(mark)}</span>' for mark in frame.marks
    )
    x_axis = "<em>step</em>" + "".join(
        f'<span style="left:{frame.x(step):.1f}%">{step:.0f}</span>' for step in labels
    )
    name, named = listed([title]), any(curve.name for curve in curves)
    spoken = f"{name} by step. " + "; ".join(
        f"{text(curve.name)}: {change}" if named else change for curve, change in zip(curves, changes)
    )
    keys = (
        "".join(
            f"<div class=keyed>{swatch(curve.look)}<span>{text(curve.name)}</span><span>{change}</span></div>"
            for curve, change in zip(curves, changes)
        )
        if named
        else ""
    )
    about = f" <small>{text(unit)}</small>" if unit and not percent else ""
    caption = f"<div class=title><span><b>{name}</b>{about}</span>{'' if named else f'<span>{changes[0]}</span>'}</div>{keys}"
    svg = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{spoken}">{shapes}</svg>'
    return (
        f'<figure class="chart{" wide" * wide}"><figcaption>{caption}</figcaption><div class=plot><div class=y>{y_axis}</div>{svg}<div class=x>{x_axis}</div></div>'
        f"<p>{hint}</p></figure>"
    )


def swatch(look: str) -> str:
    """A piece of the run's line, to stand before its name."""
    return f'<svg class=key viewBox="0 0 30 8" aria-hidden=true><path class="line {look}" d="M1 4H29"/></svg>'


# ---------------------------------------------------------------------------------- the curves of runs


def logged_names(log: list[dict], prefix: str, suffix: str = "") -> list[str]:
    """Names of what is logged as prefix + name + suffix, in order of appearance."""
    return list(
        dict.fromkeys(
            key[len(prefix) : len(key) - len(suffix)]
            for row in log
            for key in row
            if key.startswith(prefix) and key.endswith(suffix)
        )
    )


GRPO_HEALTH = {  # title: (key of the log, unit, what to see in it)
    "Groups with signal": (
        "frac_reward_zero_std",
        "%",
        "Groups whose rewards differ; the others teach nothing.",
    ),
    "Replies cut at the limit": ("completions/clipped_ratio", "%", "A cut reply has no valid format."),
    "Tokens per reply": (
        "completions/mean_length",
        "",
        "If they grow with the reward: does the judge pay for length?",
    ),
    "Entropy": ("entropy", "nats per token", "If it falls far, replies to one prompt become alike."),
    "KL to the SFT model": ("kl", "nats per token", "How far the policy has moved from where it began."),
    "Tokens clipped": (
        "clip_ratio/region_mean",
        "%",
        "Tokens whose probability left the trusted range, 1 ± ε.",
    ),
}
SFT = {
    "Loss": ("loss", "nats per token", ""),
    "Token accuracy": ("mean_token_accuracy", "%", ""),
    "Entropy": ("entropy", "nats per token", ""),
    "Gradient norm": ("grad_norm", "", ""),
}
SPEED = {
    "Tokens per second": ("tokens_per_second", "", ""),
    "Judge scores per second": ("judge_scores_per_second", "", ""),
    "Memory": ("memory_gb", "GB", ""),
}


def looks(runs: list[dict]) -> list[str]:
    """Classes of each run: a colour of its own on the page, and dashes of its own among the runs it shares charts with."""
    kinds = [is_grpo(run) for run in runs]
    return [f"r{i % LOOKS} l{kinds[:i].count(kind) % LOOKS}" for i, kind in enumerate(kinds)]


def _logged(runs: list[tuple[str, str, dict]], entries: dict) -> str:
    """Charts of keys of the log: one curve per run."""
    out = ""
    for title, (key, unit, hint) in entries.items():
        turned = lambda y, key=key: 1 - y if key == "frac_reward_zero_std" else y  # noqa: E731
        curves = [
            Curve(look, name, [(x, turned(y)) for x, y in series(run["log"], key)])
            for look, name, run in runs
        ]
        out += chart(title, curves, unit, unit_scale=unit == "%", wide=title == "Loss", hint=hint)
    return out


def _scored(look: str, run_name: str, data: dict, kind: str, name: str, key: str) -> Curve:
    """The curve of the reward (`kind` ""), of a component or of a criterion: per step as logged, or else as recorded, with groups as units."""
    value_of = lambda row, kind=kind: number((row.get(kind) or {}).get(name) if kind else row.get(name))  # noqa: E731
    mean = lambda values: mean_of([v for v in values if v is not None])  # noqa: E731
    groups = groups_of(data["completions"])
    units = [
        (step, value) for step, _, samples in groups if (value := mean(map(value_of, samples))) is not None
    ]
    held = [
        (step, value)
        for step, _, samples in groups
        if kind == "criteria" and (value := mean(value_of(row, "held_out") for row in samples)) is not None
    ]
    rings = [
        (step, mean([v for s, v in held if s == step])) for step in dict.fromkeys(step for step, _ in held)
    ]
    return Curve(look, run_name, series(data["log"], key) or units, units, rings)


def _reward_curves(runs: list[tuple[str, str, dict]]) -> str:
    blocks, rings = (
        [("", chart("Total reward", [_scored(*run, "", "reward", "reward") for run in runs], wide=True))],
        False,
    )
    for kind, prefix, suffix, title in (
        ("components", "rewards/", "/mean", "Reward components"),
        ("criteria", "criteria/", "", "Criteria of the rubric, as the judge scores them"),
    ):
        found = dict.fromkeys(
            name
            for *_, run in runs
            for name in [
                *logged_names(run["log"], prefix, suffix),
                *(n for row in run["completions"] for n in row.get(kind) or {}),
            ]
        )
        curves = {
            name: [_scored(*run, kind, name, f"{prefix}{name}{suffix}") for run in runs]
            for name in list(found)[:50]
        }  # a rubric has a handful
        blocks.append((title, "".join(chart(name, each, unit_scale=True) for name, each in curves.items())))
        rings = rings or any(curve.rings for each in curves.values() for curve in each)
    told = (
        ["The band is the line's 95% interval; a group of replies counts once, because it shares a prompt."]
        if any(run["completions"] for *_, run in runs)
        else []
    )
    told += ["Components and criteria share one scale, 0 to 1."] + [
        "Rings: the same replies, asked of the judge in other words, which are never rewarded."
    ] * rings
    return f"<p class=note>{' '.join(told)}</p>{_blocks(blocks)}"


def _blocks(blocks: list[tuple[str, str]]) -> str:
    return "".join(
        (f"<h4>{title}</h4>" if title else "") + f"<div class=charts>{cells}</div>"
        for title, cells in blocks
        if cells
    )


def run_curves(runs: list[dict]) -> str:
    """All runs of one command in the same charts."""
    out, styles, kinds = "", looks(runs), [is_grpo(run) for run in runs]
    for grpo in sorted(set(kinds)):
        mine = [
            (look, run["name"] * (kinds.count(grpo) > 1), run)
            for look, run, kind in zip(styles, runs, kinds)
            if kind == grpo
        ]
        blocks = (
            [("Health of the run", _logged(mine, GRPO_HEALTH)), ("Speed and memory", _logged(mine, SPEED))]
            if grpo
            else [("", _logged(mine, {**SFT, **SPEED}))]
        )
        body = (_reward_curves(mine) if grpo else "") + _blocks(blocks)
        out += (
            f"<h3>{'GRPO' if grpo else 'SFT'}</h3>" * (len(set(kinds)) > 1) + body
            if "<figure" in body
            else ""
        )
    return out


# ---------------------------------------------------------------------------------- replies, and tokens tinted by how they moved


def spanned(reply, clip: int, spans: list[str]) -> str:
    """A reply with its spans named and coloured in the order of the form; what stands outside them is shown too, marked as such."""
    out = ""
    for name, piece in split_spans(reply):
        look = f"s{spans.index(name) % 6}" if name in spans else "stray"
        out += f'<div class="span {look}"><small>{text(name) or "outside the spans"}</small>{text(piece, clip) or "<em>empty</em>"}</div>'
    return out or "<p class=note>Empty reply.</p>"


def cards_row(cards: list[str], label: str) -> str:
    """Answers side by side, in a row that scrolls by itself, by keyboard too."""
    return f'<div class=cards tabindex="0" role="group" aria-label="{label}">{"".join(cards)}</div>'


def moves(row: dict) -> list[tuple[str, float | None, float | None]]:
    """[(token, log-prob before, after)] of a line of tokens.jsonl."""
    columns = (row.get(key, []) for key in ("tokens", "before", "after"))
    return [(str(token), number(a), number(b)) for token, a, b in zip(*columns)]


def strength(rows: list[dict]) -> float:
    """The change in log-prob that gets the strongest tint: 19 of 20 tokens of these rows moved less."""
    sizes = sorted(abs(b - a) for row in rows for _, a, b in moves(row) if a is not None and b is not None)
    return max(sizes[int(0.95 * (len(sizes) - 1))], 1e-4) if sizes else 1.0


def tinted(row: dict, strongest: float, most: int) -> str:
    """The tokens of one reply, tinted in five degrees: u1..u5 became more likely, d1..d5 less. The numbers are in each one's title."""
    out, found = "", moves(row)
    for token, before, after in found[:most]:
        move = None if before is None or after is None else after - before
        degree = 0 if move is None else min(5, math.ceil(5 * abs(move) / strongest - 0.5))
        look = f" class={'u' if move > 0 else 'd'}{degree}" if degree else ""
        out += (
            text(token)
            if move is None
            else f'<i{look} title="{fixed(before, 3)} → {fixed(after, 3)} ({fixed(move, 3, True)})">{text(token)}</i>'
        )
    left = len(found) - most
    return f"<div class=tokens>{out}{f' <small>[{left} more]</small>' if left > 0 else ''}</div>"


def tint_legend(strongest: float) -> str:
    steps = lambda side, order: "".join(f"<i class={side}{degree}>&nbsp;&nbsp;</i>" for degree in order)  # noqa: E731
    return (
        f'<p class="note tokens">{steps("d", (5, 4, 3, 2, 1))} less likely after the step, underlined · {steps("u", (1, 2, 3, 4, 5))} more likely. '
        f"The strongest tint is a change of {fixed(strongest, 3)} in log-prob or more; each token's numbers show on pointing at it.</p>"
    )


def _token_card(sample: dict, row: dict, strongest: float, most: int) -> str:
    """One reply's tokens, and in words how they moved: with the push or not, and how many further than the clip range."""
    moved = [after - before for _, before, after in moves(row) if before is not None and after is not None]
    epsilon, told = number(row.get("epsilon")), []
    if moved:
        told.append(
            f"{sum(move > 0 for move in moved) / len(moved):.0%} of {plural(len(moved), 'token')} more likely, {fixed(mean_of(moved), 3, True)} on average"
        )
    if moved and epsilon:
        beyond = sum(not 1 - epsilon <= math.exp(min(move, 50.0)) <= 1 + epsilon for move in moved)
        told.append(f"{beyond} left the clip range of {fixed(1 - epsilon)} to {fixed(1 + epsilon)}")
    return (
        f"<article class=card><header><b>Sample {text(sample.get('sample', '?'))}</b><span>advantage <b>{fixed(sample.get('advantage'), 2, True)}</b></span></header>"
        f"<p class=why>{'; '.join(told)}{'.' * bool(told)}</p>{tinted(row, strongest, most)}</article>"
    )


def token_fold(pairs: list[tuple[dict, dict]], most: int) -> str:
    if not pairs or not most:
        return ""
    strongest = strength([row for _, row in pairs])
    cards = [_token_card(sample, row, strongest, most) for sample, row in pairs]
    return f"<details><summary>What the step did to each token</summary>{tint_legend(strongest)}{cards_row(cards, 'Tokens of the replies')}</details>"


# ---------------------------------------------------------------------------------- the looks

STYLE = """
:root{color-scheme:light dark;--bg:#fdfdfc;--ink:#1d2126;--soft:#5a626c;--rule:#dcdfe3;--wash:#fbf3ef;--line:#1f5f9e;--up:#0a6a58;--down:#a53a17;--s0:#2a62a8;--s1:#7347a3;--s2:#8d6100;--s3:#0a6a58;--s4:#a8304f;--s5:#4d6470}
@media (prefers-color-scheme:dark){:root{--bg:#15181b;--ink:#e4e6e8;--soft:#a0a8b1;--rule:#343a41;--wash:#2a201c;--line:#79b2ec;--up:#5fc4ab;--down:#f0956f;--s0:#86b5f0;--s1:#c3a0ea;--s2:#dfb15a;--s3:#5fc4ab;--s4:#f2909f;--s5:#9fb4c0}}
*{box-sizing:border-box}html{scroll-padding-top:3.2rem}
body{margin:0 auto;max-width:76rem;padding:2rem 1.4rem 5rem;background:var(--bg);color:var(--ink);font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}body.several{max-width:88rem}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 .4rem}h2{font-size:1.3rem;margin:3.4rem 0 .3rem;padding-top:.9rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:1.6rem 0 .3rem}h4{font-size:.9rem;margin:1.4rem 0 0;grid-column:1/-1}p{margin:.3rem 0;max-width:46rem}
nav{font-size:.9rem;margin:0 -1.4rem 1.4rem;padding:.5rem 1.4rem;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;background:var(--bg)}a{color:var(--line);text-decoration-thickness:1px;text-underline-offset:3px}
small,.note{color:var(--soft);font-size:.82rem}.lead{font-size:1.08rem}:focus-visible{outline:2px solid var(--line);outline-offset:2px}
.up{color:var(--up)}.down{color:var(--down)}.verdicts{padding-left:1.1rem;max-width:46rem}.verdicts li{margin:.3rem 0}
.head{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(30rem,100%),1fr));gap:0 2.6rem}
.alarm{border-left:4px solid var(--down);background:var(--wash);padding:.6rem 1rem;margin:.8rem 0;max-width:46rem;align-self:start}.alarm>b{color:var(--down)}.alarm ul{margin:.3rem 0 0;padding-left:1.1rem;font-size:.94rem}
.alarm li{margin:.25rem 0}
.side{display:flex;flex-wrap:wrap;gap:0 2.4rem}.side>div{min-width:0}.differs svg.key{display:inline-block;vertical-align:middle}.differs th>svg{margin-right:.4rem}.differs code{overflow-wrap:anywhere}
.differs td{max-width:26rem}code{font:.92em ui-monospace,monospace}
.runs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));gap:0 2.6rem}.runs>div{min-width:0}.whole .runs{grid-template-columns:minmax(0,1fr)}
.name{display:flex;align-items:center;margin-top:1.2rem}.name h3{margin:0}.name h3+svg{margin-left:1.4rem}
details.group{border-bottom:1px solid var(--rule);padding:.5rem 0}summary{cursor:pointer}.what{display:inline-block;min-width:19rem}.several .what{min-width:17rem}.several summary .track{width:6rem}
summary .track{display:inline-block;width:8rem;margin:0 .8rem 0 .3rem;vertical-align:middle}details details{margin:.5rem 0;font-size:.92rem}
dl{margin:.4rem 0;font-size:.92rem;display:grid;grid-template-columns:minmax(7rem,max-content) minmax(0,1fr);gap:.2rem .9rem}dt{color:var(--soft)}dd{margin:0;max-width:46rem;white-space:pre-wrap}
.cards{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(min(16.5rem,80vw),1fr);grid-template-rows:auto auto 1fr auto auto;gap:.4rem 1.6rem;overflow-x:auto;margin:1rem 0 .4rem;padding-bottom:.5rem;scroll-snap-type:x proximity}
.card{display:grid;grid-row:1/-1;grid-template-rows:subgrid;align-content:start;border-top:3px solid var(--rule);padding-top:.5rem;font-size:.92rem;max-width:30rem;scroll-snap-align:start;min-width:0}
.card.up{color:inherit;border-color:var(--up)}.card.down{color:inherit;border-color:var(--down)}.card header{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 .6rem;font-size:.84rem;font-variant-numeric:tabular-nums}
.why{font-size:.86rem;color:var(--soft)}.span{border-left:3px solid var(--s);padding-left:.6rem;margin:.45rem 0;white-space:pre-line}.span small{display:block;line-height:1.2;color:var(--s)}
.stray{--s:var(--rule);border-left-style:dashed;color:var(--soft)}.span.stray small{color:var(--soft)}.s0{--s:var(--s0)}.s1{--s:var(--s1)}.s2{--s:var(--s2)}.s3{--s:var(--s3)}.s4{--s:var(--s4)}.s5{--s:var(--s5)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr));gap:1rem 2rem}.facts>div{min-width:0}
:root{--c0:#1f5f9e;--c1:#b1540e;--c2:#0a7a62;--c3:#86408f;--c4:#7d6a00;--c5:#a8304f;--tu:20 140 110;--td:205 80 40}
@media (prefers-color-scheme:dark){:root{--c0:#79b2ec;--c1:#f0a266;--c2:#5fc4ab;--c3:#d0a2e4;--c4:#d9c35c;--c5:#f2909f;--tu:70 200 165;--td:245 125 85}}
.r0{--c:var(--c0)}.r1{--c:var(--c1)}.r2{--c:var(--c2)}.r3{--c:var(--c3)}.r4{--c:var(--c4)}.r5{--c:var(--c5)}
.scroll{overflow-x:auto;margin:.6rem 0}table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{text-align:left;vertical-align:top;padding:.4rem 1rem .4rem 0;border-bottom:1px solid var(--rule);min-width:4.5rem}thead th{color:var(--soft);font-weight:500;vertical-align:bottom}
tbody th{font-weight:500}th.part{padding-top:1.1rem;color:var(--soft);font-size:.82rem}.score{white-space:nowrap}td .track{max-width:9rem}small.prose{display:block;white-space:normal;font-weight:400;min-width:9rem;max-width:18rem}
.track{display:block;position:relative;height:.55rem;min-width:6rem;margin:.25rem 0;background:linear-gradient(var(--rule),var(--rule)) center/100% 1px no-repeat}.track i{position:absolute;top:0;bottom:0}
.track .bar{top:.16rem;bottom:.16rem;background:var(--c0);opacity:.4}.track .dot{top:.08rem;width:.4rem;height:.4rem;margin-left:-.2rem;border-radius:50%;background:var(--c0)}.track .tick{width:1px;background:var(--ink)}
.track .fill{left:0;top:.1rem;bottom:.1rem;background:var(--c0);opacity:.6}.track .ring{top:.02rem;bottom:auto;width:.5rem;height:.5rem;margin-left:-.24rem;border-radius:50%;border:1.5px solid var(--ink);background:var(--bg)}
.stack table{width:100%;max-width:46rem}.stack td:last-child{width:60%;padding-right:0}.stack td,.stack th{padding-top:.25rem;padding-bottom:.25rem;min-width:0}.stack .track{max-width:none;height:1rem;margin:.2rem 0;background:none}
.stack .fill{top:.15rem;bottom:.15rem}.stack .sum{opacity:1}.stack .real{opacity:1;background:var(--c1)}
.bars{font-size:.82rem}.bars div{display:grid;grid-template-columns:minmax(6.4rem,9.4rem) 1fr 2.2rem;gap:.5rem;align-items:center}.bars.two div{grid-template-columns:minmax(5.4rem,7.6rem) 1fr 2.1rem 2.7rem}
.bars .track{min-width:0}.bars span:nth-child(n+3){text-align:right;font-variant-numeric:tabular-nums}.bars .criteria span:first-child{padding-left:.8rem;color:var(--soft)}
.bars .head span{white-space:nowrap;color:var(--soft);font-size:.72rem;line-height:1.15;align-self:end}.bars div>span:nth-child(4){color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(15.5rem,100%),1fr));gap:0 2rem;margin-top:.7rem}
.chart{display:grid;grid-row:span 3;grid-template-rows:subgrid;margin:0;padding-bottom:1.3rem;font-size:.78rem;color:var(--soft);font-variant-numeric:tabular-nums}
.chart figcaption{margin-bottom:.7rem}.chart .title,.chart .keyed{display:flex;justify-content:space-between;gap:.6rem}.chart .title b{color:var(--ink);font-weight:600;font-size:.84rem}.chart small{font-size:.74rem}
.chart .keyed{justify-content:start;align-items:center;gap:0;line-height:1.5}.keyed span:last-child{margin-left:auto;padding-left:.6rem;white-space:nowrap}.chart p{margin:.35rem 0 0 2.8rem;font-size:.76rem;line-height:1.35}
.wide{grid-column:1/-1;font-size:.84rem}.wide .keyed span:last-child{margin-left:.6rem}.plot{position:relative;margin-left:2.8rem}.plot svg{display:block;width:100%;height:6.5rem;overflow:visible}
.plot .y{position:absolute;inset:0 auto 1.5rem 0}
.y span{position:absolute;right:100%;margin-right:.5rem;white-space:nowrap;transform:translateY(-50%)}.x{position:relative;height:1.5rem}.x span{position:absolute;top:.3rem;transform:translateX(-50%);white-space:nowrap}
.x em{position:absolute;right:100%;margin-right:.5rem;top:.3rem;font-style:normal;white-space:nowrap}.x em+span{transform:none}.x span:last-child:not(em+span){transform:translateX(-100%)}.wide svg{height:14rem}
svg path{fill:none;vector-effect:non-scaling-stroke}svg .grid{stroke:var(--rule)}svg .band{fill:var(--c);opacity:.17}svg .dots{stroke:var(--c);stroke-width:4;stroke-linecap:round;opacity:.42}
svg .line{stroke:var(--c);stroke-width:2;stroke-linejoin:round}.line.l1{stroke-dasharray:8 4}.line.l2{stroke-dasharray:2 3}.line.l3{stroke-dasharray:10 3 2 3}.line.l4{stroke-dasharray:14 5}.line.l5{stroke-dasharray:5 2 1 2 1 2}
svg .rings{stroke:var(--c);stroke-width:8;stroke-linecap:round}svg .holes{stroke:var(--bg);stroke-width:4.5;stroke-linecap:round}svg.key{flex:none;width:30px;height:8px;margin-right:.5rem}
.tokens i{font-style:normal}.tokens{overflow-wrap:anywhere}div.tokens{font:.8rem/1.65 ui-monospace,monospace;white-space:pre-wrap}
@media (min-width:60rem){nav{position:sticky;top:0;z-index:1}}
@media (max-width:34rem){body{padding:1.2rem .9rem 4rem}nav{margin:0 0 1rem;padding:0}html{scroll-padding-top:0}table{font-size:.84rem}th,td{padding-right:.7rem;min-width:0}.side .track{min-width:4.6rem}
td small{font-size:.76rem}dl{grid-template-columns:5.5rem minmax(0,1fr)}summary>small{display:block}.what{min-width:0}.wide svg{height:10rem}tbody th[scope=row]{position:sticky;left:0;z-index:1;background:var(--bg)}}
@media print{body{max-width:none;padding:0;font-size:10pt}nav{display:none}.scroll,.cards{overflow:visible}.cards{display:block;columns:2;column-gap:1.6rem}.card{display:block;break-inside:avoid;margin-bottom:1rem}
.chart,tr,.alarm{break-inside:avoid}h2,h3,h4,summary{break-after:avoid}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
STYLE += "".join(
    f".u{n}{{background:rgb(var(--tu)/{0.11 * n:.2f})}}.d{n}{{background:rgb(var(--td)/{0.11 * n:.2f});text-decoration:underline;text-decoration-color:rgb(var(--td));text-underline-offset:2px}}"
    for n in range(1, 6)
)
