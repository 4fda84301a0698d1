"""Show a training run while it runs, and define every number that it logs.

On a terminal: a board that is redrawn (progress, time left, what the step is doing, every metric with its
course and trend, one of the answers). Anywhere else: one plain line per step. Both on stderr. `METRICS`
defines what is logged; board and docs use it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kardia.core import distributed
from kardia.core.console import printable, say, show_above


@dataclass(frozen=True)
class Metric:
    """Define one number per step.

    shape formats it. side: left on the board (what is learned), right (how the run fares) or hidden. short:
    its name in a plain line; a metric without one is not shown there.
    """

    name: str
    meaning: str
    shape: str = "{:.3f}"
    side: str = "left"
    short: str = ""


def _load_metrics() -> dict[str, Metric]:
    import yaml

    text = Path(__file__).with_name("metrics.yaml").read_text(encoding="utf-8")
    return {key: Metric(**facts) for key, facts in yaml.safe_load(text).items()}


METRICS = _load_metrics()


def _matches(pattern: str, key: str) -> str | None:
    """Return what a key has in place of a pattern's {..}; "" for a pattern without one; None if they do not
    match."""
    head, brace, rest = pattern.partition("{")
    if not brace:
        return "" if key == pattern else None
    tail = rest.partition("}")[2]
    name = key[len(head) : len(key) - len(tail)]
    return name if key == head + name + tail and name and "/" not in name else None


def metric_of(key: str) -> Metric | None:
    """Return the metric of a log key; components and criteria match by their pattern."""
    for pattern, metric in METRICS.items():
        name = _matches(pattern, key)
        if name == "":
            return metric
        if name:
            short = name if metric.short else ""
            return Metric(name.replace("_", " "), metric.meaning, metric.shape, metric.side, short)
    return None


def in_order(keys) -> list[str]:
    """Return the keys of known metrics in the order of METRICS, whatever order the log has."""
    # A key may match a general pattern beside its own, which comes first.
    return list(
        dict.fromkeys(key for pattern in METRICS for key in keys if _matches(pattern, key) is not None)
    )


def shown_value(key: str, value: float) -> float:
    """Return a logged number as a person sees it."""
    return 1 - value if key == "frac_reward_zero_std" else value


def trend(values: list[float]) -> float:
    """Return a series' change over its length by least squares if it exceeds two standard errors, else 0."""
    if len(values) < 5 or max(values) == min(values):
        return 0.0
    from scipy.stats import linregress

    fit = linregress(range(len(values)), values)
    return float(fit.slope * (len(values) - 1)) if abs(fit.slope) > 2 * fit.stderr else 0.0


def sparkline(values: list[float], width: int = 20) -> str:
    """Return a series as one line of blocks, from its smallest to its largest value; a long series is
    averaged."""
    size = max(1, math.ceil(len(values) / width))
    parts = [values[i : i + size] for i in range(0, len(values), size)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means, default=0), max(means, default=0)
    spread = (high - low) or 1
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / spread)] for value in means)


def clock(seconds: float) -> str:
    """Return seconds as h:mm:ss or m:ss."""
    minutes, s = divmod(int(max(0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


class Board:
    """Show one run live: `step` once per step, `phase` while a step is going on, `sample` now and then."""

    def __init__(self, title: str, console=None) -> None:
        from rich.console import Console

        self.title, self.console = title, console or Console(stderr=True)
        terminal = self.console.is_terminal and not self.console.is_dumb_terminal
        self.plain = not terminal or distributed.rank() > 0
        self.courses: dict[str, list[float]] = {}  # every value of every metric
        self.rows: list[tuple[str, tuple]] = []  # (side, cells) of every metric that is shown
        self.total = self.done = self.first = 0
        self.doing, self.answer, self.live = "", "", None
        self.began = self.last_answer = time.monotonic()

    def begin(self, total: int, first: int) -> None:
        """Start the view of steps first+1..total."""
        from rich.live import Live

        self.total, self.done, self.first, self.began = total, first, first, time.monotonic()
        if not self.plain:
            self.live = Live(get_renderable=self.render, console=self.console, refresh_per_second=2)
            self.live.start()
            self.above = show_above(self.console)
            self.above.__enter__()

    def end(self) -> None:
        """Stop redrawing; what stands there stays."""
        if self.live:
            self.doing = ""
            self.live.stop()
            self.live = None
            self.above.__exit__(None, None, None)

    @property
    def left(self) -> float:
        """Seconds to go, by the mean of this process's steps."""
        per_step = (time.monotonic() - self.began) / max(1, self.done - self.first)
        return per_step * (self.total - self.done)

    def phase(self, name: str, done: int = 0, of: int = 0) -> None:
        """Show what the step is doing."""
        self.doing = f"{name} {done}/{of}" if of else name

    def step(self, row: dict[str, Any]) -> None:
        """Take a line of log.jsonl over."""
        self.done, self.doing = row["step"], ""
        numbers = {key: v for key, v in row.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        values = {key: shown_value(key, float(v)) for key, v in numbers.items() if key != "step"}
        for key, value in values.items():
            self.courses.setdefault(key, []).append(value)
        if not self.plain:
            # Made once per step: rich draws twice a second, in a thread beside the training.
            shown = [(key, metric_of(key)) for key in in_order(self.courses)]
            shown = [(key, metric) for key, metric in shown if metric.side != "hidden"]
            self.rows = [(m.side, self._cells(key, m, self.courses[key])) for key, m in shown]
            return
        known = [(metric_of(key), values[key]) for key in in_order(values)]
        line = "  ".join(f"{m.short} {m.shape.format(value)}" for m, value in known if m.short)
        say(f"  step {self.done:>3}/{self.total}  {line}  {row['seconds']:.1f} s  {clock(self.left)} left")

    def sample(self, text: str, reward: float | None, every: float = 60.0) -> None:
        """Show one answer of the step on a single line; in a plain log at most one in `every` seconds."""
        clean = " ".join(printable(text).split())
        self.answer = clean if reward is None else f"reward {reward:.2f}: {clean}"
        if self.plain and clean and time.monotonic() - self.last_answer > every:
            self.last_answer = time.monotonic()
            dots = ".." if len(self.answer) > 160 else ""
            say(f"  it says ({self.answer[:160]}{dots})")

    def render(self):
        """Return the whole board as one rich renderable. rich calls this in a thread of its own."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        sides = {"left": Table.grid(padding=(0, 1)), "right": Table.grid(padding=(0, 1))}
        for side, cells in self.rows:
            sides[side].add_row(*cells)
        body = Table.grid(padding=(0, 4))
        if self.console.width >= 100:
            body.add_row(*sides.values())
        else:
            for side in sides.values():
                body.add_row(side)
        parts = [self._head(), body]
        if self.answer:
            parts.append(Text(self.answer, style="italic", overflow="ellipsis", no_wrap=True))
        return Group(*parts)

    def _head(self):
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        elapsed = clock(time.monotonic() - self.began)
        left = clock(self.left) if self.done > self.first else "?"
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self.title, style="bold"),
            ProgressBar(self.total, self.done, width=24),
            f"step {self.done}/{self.total}",
            f"{elapsed} elapsed, {left} left",
            Text(self.doing, style="cyan"),
        )
        return head

    def _cells(self, key: str, metric: Metric, course: list[float]):
        from rich.text import Text

        change, arrow = trend(course), Text(" ")
        if change:
            good = change > 0 and key.startswith(("reward", "criteria"))
            arrow = Text("↑" if change > 0 else "↓", style="green" if good else "yellow")
        return (
            Text(metric.name, style="" if metric.short else "dim"),
            Text(metric.shape.format(course[-1]), style="bold"),
            arrow,
            Text(sparkline(course), style="dim"),
        )
