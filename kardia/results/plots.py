"""Draw the curves of runs with matplotlib: inline SVG for the report, and PNG files on request.

Nothing that a run or a model wrote enters an SVG: it holds numbers only, and the page prints the names around
it. Runs that share a figure differ by colour and by dash pattern: nobody has to see colours.
"""

from __future__ import annotations

import functools
import io
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import yaml

from kardia.results.groups import groups_of
from kardia.results.run_files import fixed, is_grpo, mean_of, number, series
from kardia.results.statistics import smooth

# A seventh run looks like the first. In an SVG each colour becomes a variable of the page (--c0 and so on),
# which has another value in dark mode.
COLORS = ["#1f5f9e", "#b1540e", "#0a7a62", "#86408f", "#7d6a00", "#a8304f"]
DASHES = ["-", (0, (8, 4)), (0, (2, 3)), (0, (10, 3, 2, 3)), (0, (14, 5)), (0, (5, 2, 1, 2, 1, 2))]
PAGE = {"#1d2126": "ink", "#5a626c": "soft", "#dcdfe3": "rule", "#fdfdfc": "bg"}
INK, SOFT, RULE, PAPER = PAGE
DOTS = 150  # of one curve; above that, neighbours are averaged
CRITERIA = 24  # figures of components, and of criteria: a rubric has a handful


@functools.cache
def _figures() -> dict[str, dict[str, list[str]]]:
    return yaml.safe_load(Path(__file__).with_name("figures.yaml").read_text(encoding="utf-8"))


@dataclass
class Curve:
    """One run's record of one quantity."""

    run: str  # its name, "" if it is alone in the figures of its command
    look: int  # of the run: its colour
    dash: int  # its place among the runs of this figure
    points: list[tuple[float, float]]  # (step, value)
    units: list[tuple[float, float]] = field(default_factory=list)  # one per group: these give the band
    rings: list[tuple[float, float]] = field(default_factory=list)  # a second measurement

    def dots(self) -> list[tuple[float, float]]:
        """Return at most DOTS points."""
        size = -(-len(self.points) // DOTS)
        parts = [self.points[i : i + size] for i in range(0, len(self.points), size)]
        return [(mean_of([x for x, _ in part]), mean_of([y for _, y in part])) for part in parts]


@dataclass
class Chart:
    """One figure: its words for the page, and what draws it."""

    title: str
    curves: list[Curve]
    unit: str = ""
    hint: str = ""
    wide: bool = False
    number: int = 0  # on the page; it keeps the ids of its SVG apart from those of other figures
    scale: bool = False  # fix the scale to 0..1 (0..100%) if all values are inside

    def __post_init__(self) -> None:
        factor = 100.0 if self.unit == "%" else 1.0
        self.curves = [curve for curve in self.curves if curve.points]
        for i, it in enumerate(self.curves):
            sides = [[(x, factor * y) for x, y in side] for side in (it.points, it.units, it.rings)]
            self.curves[i] = Curve(it.run, it.look, it.dash, *sides)
        values = [y for curve in self.curves for _, y in [*curve.points, *curve.rings]]
        self.top = factor if self.scale and all(0 <= value <= factor for value in values) else None
        # A share of 1% would be a line on the floor of a scale to 100%.
        self.low_share = self.unit == "%" and 0 < max(values, default=0) < 20
        floor, top = (float("-inf"), float("inf")) if self.top is None else (0.0, self.top)
        self.lines = []  # of each curve: [(x, level, low, high)]
        for curve in self.curves:
            line = smooth(curve.units or curve.points) if len(curve.points) > 2 else []
            line = [(x, level, level - half, level + half) for x, level, half in line]
            # A fitted line can leave a fixed scale at its ends. NaN (no width) stays: no comparison holds.
            bands = [(x, *(y if y != y else min(top, max(floor, y)) for y in ys)) for x, *ys in line]
            self.lines.append(bands)

    def changes(self) -> list[str]:
        """Return "first → last" of each curve, of its line if there is one."""
        percent, out = "%" if self.unit == "%" else "", []
        for curve, line in zip(self.curves, self.lines):
            ends = [pair[1] for pair in (line or curve.points)]
            largest = max(map(abs, ends))
            digits = 2 if largest < 10 else 1
            if 0 < largest < 0.1:
                digits = 4
            out.append(f"{fixed(ends[0], digits)}{percent} → {fixed(ends[-1], digits)}{percent}")
        return out

    def figure(self, named: bool):
        """Return the matplotlib figure; `named` adds title and legend, which the page prints itself."""
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        # Fixed margins keep the axes of neighbours in line, and cost half the time of a computed layout.
        width, height = (9.0, 2.6) if self.wide else (3.1, 1.85)
        figure = Figure(figsize=(width, height))
        with matplotlib.rc_context(_figures()["style"]):
            axes = figure.add_axes((0.5 / width, 0.42 / height, 1 - 0.62 / width, 1 - 0.66 / height))
        for curve, line in zip(self.curves, self.lines):
            color, dash = COLORS[curve.look % len(COLORS)], DASHES[curve.dash % len(DASHES)]
            dot = {"color": color, "clip_on": False, "linestyle": "none", "marker": "o"}
            axes.plot(*zip(*curve.dots()), markersize=2.6, alpha=0.4, markeredgewidth=0, **dot)
            if line:
                x, level, low, high = zip(*line)
                style = {"color": color, "linestyle": dash, "label": curve.run}
                axes.plot(x, level, linewidth=1.4, clip_on=False, **style)
            if line and curve.units:
                axes.fill_between(x, low, high, color=color, alpha=0.17, linewidth=0)
            if curve.rings:
                axes.plot(*zip(*curve.rings), markersize=5, markerfacecolor=PAPER, markeredgewidth=1.4, **dot)
        if self.top is not None:
            axes.set_ylim(0, None if self.low_share else self.top)
        axes.xaxis.set_major_locator(MaxNLocator(8 if self.wide else 4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
        if self.unit == "%":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}%"))
        axes.set_xlabel("step", fontsize=8.5, color=SOFT, loc="right", labelpad=1)
        if named:
            unit = f" ({self.unit})" if self.unit else ""
            axes.set_title(f"{self.title}{unit}"[:80], fontsize=9, loc="left", color=INK, parse_math=False)
            if len(self.curves) > 1 and axes.get_legend_handles_labels()[1]:
                for text in axes.legend(fontsize=7, frameon=False).get_texts():
                    text.set_parse_math(False)
        return figure

    @cached_property
    def svg(self) -> str:
        """The figure for a page."""
        import matplotlib

        out = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"figure {self.number}"}):
            self.figure(False).savefig(out, format="svg", transparent=True, metadata={"Date": None})
        text = out.getvalue()
        text = text[text.index("<svg") :]
        # matplotlib's style sheet would hold for the whole page; its group ids are the same in every figure.
        text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>|<!--.*?-->", "", text, flags=re.S)
        text = re.sub(r'<g id="[^"]*"', "<g", text)
        names = {**PAGE, **{color: f"c{i}" for i, color in enumerate(COLORS)}}
        text = re.sub(r"\n\s*", "\n", text)
        return re.sub("|".join(names), lambda match: f"var(--{names[match[0]]})", text)


# ---------------------------------------------------------------------------------- the figures of runs


def logged_names(log: list[dict], prefix: str, suffix: str = "") -> list[str]:
    """Return the names of what is logged as prefix + name + suffix, in order of appearance."""
    keys = dict.fromkeys(key for row in log for key in row if key.startswith(prefix) and key.endswith(suffix))
    return [key[len(prefix) : len(key) - len(suffix)] for key in keys]


def _logged(runs: list[tuple[int, int, dict]], *kinds: str) -> list[Chart]:
    """Return figures of keys of the log, one curve per run."""
    out = []
    for title, (key, unit, hint) in [entry for kind in kinds for entry in _figures()[kind].items()]:
        curves = []
        for look, dash, run in runs:
            points = series(run["log"], key)
            if key == "frac_reward_zero_std":
                points = [(x, 1 - y) for x, y in points]
            curves.append(Curve(run["name"], look, dash, points))
        out.append(Chart(title, curves, unit, hint, wide=title == "Loss", scale=unit == "%"))
    return out


def _means(data: dict, kind: str, name: str) -> list[tuple[float, float]]:
    """Return [(step, mean of the group)] of a component or criterion (of the reward: kind ""), if known."""
    out = []
    for step, _, samples in groups_of(data["completions"]):
        values = [number((row.get(kind) or {}).get(name) if kind else row.get(name)) for row in samples]
        values = [value for value in values if value is not None]
        out += [(step, mean_of(values))] if values else []
    return out


def _scored(look: int, dash: int, data: dict, kind: str, name: str, key: str) -> Curve:
    """Return the curve of a component or criterion: per step as logged, else as recorded."""
    units, rings = _means(data, kind, name), {}
    for step, mean in _means(data, "witness", name) if kind == "criteria" else []:
        rings.setdefault(step, []).append(mean)
    rings = [(step, mean_of(means)) for step, means in rings.items()]
    return Curve(data["name"], look, dash, series(data["log"], key) or units, units, rings)


def _held_out(runs: list[tuple[int, int, dict]]) -> list[tuple[int, int, dict]]:
    """Return the runs with their measurements on held-out prompts in place of the log."""
    measured = []
    for look, dash, run in runs:
        rows = []
        for row in run["held_out"]:
            seen = [number(score) for score in (row.get("witness") or {}).values()]
            won = ((row.get("wins") or {}).get("rubric") or {}).get("rate")
            known = [score for score in seen if score is not None]
            rows.append({**row, "wins": won, "witness_mean": mean_of(known)})
        measured.append((look, dash, {**run, "log": rows}))
    return measured


def _held_out_charts(runs: list[tuple[int, int, dict]]) -> list[Chart]:
    """Return the figures of held-out prompts, those of the label and of the user's own rewards included."""
    measured = _held_out(runs)
    known = {key for key, *_ in _figures()["held_out"].values()} | {"step", "n", "written", "seconds"}
    names = dict.fromkeys(
        key for *_, run in measured for row in run["log"] for key in row if number(row[key]) is not None
    )
    charts = _logged(measured, "held_out")
    for name in [name for name in names if name not in known][:CRITERIA]:
        curves = [Curve(run["name"], look, dash, series(run["log"], name)) for look, dash, run in measured]
        charts.append(Chart(f"{name}, held out".replace("_", " "), curves))
    return charts


def _reward_charts(runs: list[tuple[int, int, dict]]) -> list[tuple[str, list[Chart]]]:
    total = Chart("Total reward", [_scored(*run, "", "reward", "reward") for run in runs], wide=True)
    blocks = [("", [total])]
    parts = [("components", "rewards/", "/mean", "Reward components")]
    parts.append(("criteria", "criteria/", "", "Criteria of the rubric, as the judge scores them"))
    for kind, prefix, suffix, heading in parts:
        names = [name for *_, run in runs for name in logged_names(run["log"], prefix, suffix)]
        names += [name for *_, run in runs for row in run["completions"] for name in row.get(kind) or {}]
        charts = []
        for name in list(dict.fromkeys(names))[:CRITERIA]:
            curves = [_scored(*run, kind, name, f"{prefix}{name}{suffix}") for run in runs]
            charts.append(Chart(name.replace("_", " "), curves, scale=True))
        blocks.append((heading, charts))
    return blocks


def charts_of(runs: list[dict]) -> list[tuple[str, list[tuple[str, list[Chart]]]]]:
    """Return [(SFT or GRPO, [(heading, charts)])]: all runs of one command share their figures."""
    kinds, out = [is_grpo(run) for run in runs], []
    for grpo in sorted(set(kinds)):
        mine = [i for i, kind in enumerate(kinds) if kind == grpo]
        named = [runs[i] if len(mine) > 1 else {**runs[i], "name": ""} for i in mine]
        mine = [(i, dash, run) for dash, (i, run) in enumerate(zip(mine, named))]
        blocks = [("", _logged(mine, "sft", "speed"))]
        if grpo:
            blocks = [*_reward_charts(mine), ("Held-out prompts", _held_out_charts(mine))]
            blocks.append(("Health of the run", _logged(mine, "health")))
            blocks.append(("Speed and memory", _logged(mine, "speed")))
        blocks = [(heading, [chart for chart in charts if chart.curves]) for heading, charts in blocks]
        out.append(("GRPO" if grpo else "SFT", [block for block in blocks if block[1]]))
    every = [chart for _, blocks in out for _, charts in blocks for chart in charts]
    for i, chart in enumerate(every, 1):
        chart.number = i
    return [(kind, blocks) for kind, blocks in out if blocks]


def write_png(charts: list[tuple[str, list[tuple[str, list[Chart]]]]], folder: Path) -> None:
    """Write each figure to `folder` as NUMBER-NAME.png, white behind it."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, blocks in charts:
        for chart in [chart for _, each in blocks for chart in each]:
            name = re.sub(r"[^a-z0-9]+", "-", f"{kind} {chart.title}".lower()).strip("-")[:60]
            chart.figure(True).savefig(folder / f"{chart.number:02}-{name}.png", dpi=160)
