"""What a training run shows while it runs, and the callback that writes it down.

On a terminal: one board that is redrawn (progress and time left, what the step is doing, every metric with its course and
trend, one of the answers). Anywhere else: one plain line per step. Both on stderr. `METRICS` is what is logged and what it
means; the board and the README's table are made of it.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from kardia.core import console as console_
from kardia.core import distributed
from kardia.core.console import say


@dataclass(frozen=True)
class Metric:
    """One number per step. `shape` formats it; `side`: left on the board (what is learned) or right (how the run fares)."""

    name: str
    meaning: str
    shape: str = "{:.3f}"
    side: str = "left"
    short: str = ""  # its name in a plain line; not shown there without one


METRICS = {
    "loss": Metric(
        "loss",
        "SFT: mean negative log-probability of the trained tokens, nats. GRPO: near 0 by construction (advantages of a group sum to 0); it says nothing about progress.",
        short="loss",
    ),
    "mean_token_accuracy": Metric(
        "token accuracy", "share of trained tokens that are the model's first choice", short="accuracy"
    ),
    "reward": Metric(
        "reward", "mean reward of the step's answers: the weighted sum of the components", short="reward"
    ),
    "rewards/{component}/mean": Metric(
        "{component}", "mean of one component (format, emotion, rubric), unweighted", short="{component}"
    ),
    "criteria/{criterion}": Metric(
        "{criterion}",
        "mean of one criterion of the rubric: the probability, after the judge, that the reply is the better one of an exam pair",
    ),
    "reward_std": Metric(
        "deviation",
        "standard deviation of the rewards inside a group; advantages are divided by it",
        side="hidden",
    ),
    "frac_reward_zero_std": Metric(
        "groups with signal",
        "log: share of groups whose answers all got the same reward, from which nothing is learned; shown as its opposite",
        "{:.0%}",
        "right",
        "signal",
    ),
    "completions/mean_length": Metric(
        "tokens per answer", "mean length of an answer, tokens", "{:.0f}", "right", "tokens"
    ),
    "completions/clipped_ratio": Metric(
        "cut at the limit", "share of answers that reached --max-tokens", "{:.0%}", "right", "cut"
    ),
    "clip_ratio/region_mean": Metric(
        "tokens clipped",
        "share of tokens whose probability ratio left 1 +- epsilon, so that the loss ignored them; 0 while there is one update per rollout and 16-bit weights",
        "{:.1%}",
        "right",
    ),
    "entropy": Metric(
        "entropy",
        "mean entropy of the next token, nats; near 0 means that all answers become alike",
        "{:.2f}",
        "right",
    ),
    "kl": Metric(
        "KL to the SFT model",
        "mean KL divergence per token from the SFT adapter, nats (only with --beta above 0)",
        "{:.4f}",
        "right",
    ),
    "grad_norm": Metric("gradient norm", "norm of the gradient before clipping at 1", "{:.2f}", "right"),
    "learning_rate": Metric("learning rate", "of this step", "{:.1e}", "hidden"),
    "num_tokens": Metric("tokens seen", "tokens processed since the start", "{:,.0f}", "hidden"),
    "tokens_per_second": Metric(
        "tokens per second",
        "SFT: tokens trained on; GRPO: tokens drawn, while rollouts run",
        "{:.0f}",
        "right",
        "tok/s",
    ),
    "judge_scores_per_second": Metric(
        "judge, scores per second",
        "criteria x answers read, over the time it took",
        "{:.0f}",
        "right",
        "judge/s",
    ),
    "memory_gb": Metric(
        "memory, GB",
        "this process and the llama.cpp worker; on a GPU: what is in use there",
        "{:.1f}",
        "right",
        "GB",
    ),
    "time/rollout": Metric("rollouts, s", "seconds of this step spent drawing answers", "{:.1f}", "hidden"),
    "time/judge": Metric("judging, s", "seconds spent on rewards", "{:.1f}", "hidden"),
    "time/update": Metric(
        "update, s",
        "seconds spent on the gradient step (all that is not another of the times)",
        "{:.1f}",
        "hidden",
    ),
    "time/inspect": Metric(
        "inspection, s",
        "seconds spent on what only explains (every --inspect-every steps)",
        "{:.1f}",
        "hidden",
    ),
    "seconds": Metric("step, s", "seconds of the whole step", "{:.1f}", "right"),
}


def metric_of(key: str) -> Metric | None:
    """The metric a log key belongs to; components and criteria by their pattern."""
    if key in METRICS:
        return METRICS[key]
    for pattern, kind in METRICS.items():
        head, brace, tail = pattern.partition("{")
        tail = tail.partition("}")[2]
        if (
            brace
            and key.startswith(head)
            and key.endswith(tail)
            and "/" not in (name := key[len(head) : len(key) - len(tail)])
        ):
            return Metric(
                name.replace("_", " "), kind.meaning, kind.shape, kind.side, name if kind.short else ""
            )
    return None


def shown_value(key: str, value: float) -> float:
    return 1 - value if key == "frac_reward_zero_std" else value


def trend(values: list[float]) -> float:
    """Which way a series goes: the change over its length by least squares if it is more than two standard errors, else 0."""
    n = len(values)
    if n < 5:
        return 0.0
    middle, mean = (n - 1) / 2, sum(values) / n
    spread = sum((i - middle) ** 2 for i in range(n))
    slope = sum((i - middle) * (v - mean) for i, v in enumerate(values)) / spread
    error = math.sqrt(
        sum((v - mean - slope * (i - middle)) ** 2 for i, v in enumerate(values)) / (n - 2) / spread
    )
    return slope * (n - 1) if abs(slope) > 2 * error else 0.0


def sparkline(values: list[float], width: int = 20) -> str:
    """The course of a series as one line of blocks, from its smallest to its largest value; long series are averaged."""
    size = max(1, math.ceil(len(values) / width))
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(means, default=0), max(means, default=0)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / (high - low)) if high > low else 0] for v in means)


def clock(seconds: float) -> str:
    minutes, s = divmod(int(max(0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


class Board:
    """The live view of one run. `step(row)` once per step, `phase` while one is going on, `sample` now and then."""

    def __init__(self, title: str, console=None) -> None:
        from rich.console import Console

        self.title, self.console = title, console or Console(stderr=True)
        self.plain = not self.console.is_terminal or self.console.is_dumb_terminal or distributed.rank() > 0
        self.courses: dict[str, list[float]] = {}
        self.total = self.done = self.first = 0
        self.doing, self.said, self.live = "", "", None
        self.began = self.told = time.monotonic()

    def begin(self, total: int, first: int) -> None:
        from rich.live import Live

        self.total, self.done, self.first, self.began = total, first, first, time.monotonic()
        if not self.plain:
            self.live = Live(
                get_renderable=self.render, console=self.console, refresh_per_second=2, transient=False
            )
            self.live.start()
            console_.SCREEN.append(self.console)  # what is said meanwhile goes above the board

    def end(self) -> None:
        if self.live:
            self.doing = ""
            self.live.stop()
            self.live = None
            console_.SCREEN.remove(self.console)

    @property
    def left(self) -> float:
        """Seconds to go, by the mean of the steps of this process."""
        return (time.monotonic() - self.began) / max(1, self.done - self.first) * (self.total - self.done)

    def phase(self, what: str, done: int = 0, of: int = 0) -> None:
        self.doing = f"{what} {done}/{of}" if of else what

    def step(self, row: dict[str, Any]) -> None:
        self.done, self.doing = row["step"], ""
        values = {
            key: shown_value(key, float(v))
            for key, v in row.items()
            if isinstance(v, (int, float)) and key != "step" and math.isfinite(v)
        }
        for key, value in values.items():
            self.courses.setdefault(key, []).append(value)
        if self.plain:
            parts = [
                f"{m.short} {m.shape.format(values[key])}"
                for key in self._ordered()
                if key in values and (m := metric_of(key)).short
            ]
            say(
                f"  step {self.done:>3}/{self.total}  {'  '.join(parts)}  {row['seconds']:.1f} s  {clock(self.left)} left"
            )

    def sample(self, text: str, reward: float | None, every: float = 60.0) -> None:
        """One answer of the step, on a single line; in a plain log at most one a minute."""
        clean = " ".join(console_.printable(text).split())
        self.said = f"reward {reward:.2f}: {clean}" if reward is not None else clean
        if self.plain and clean and time.monotonic() - self.told > every:
            self.told = time.monotonic()
            say(f"  it says ({self.said[:160]}{'..' if len(self.said) > 160 else ''})")

    def render(self):
        """The whole board as one rich renderable."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 2))
        elapsed, left = (
            clock(time.monotonic() - self.began),
            clock(self.left) if self.done > self.first else "?",
        )
        head.add_row(
            Text(self.title, style="bold"),
            ProgressBar(self.total, self.done, width=24),
            f"step {self.done}/{self.total}",
            f"{elapsed} gone, {left} left",
            Text(self.doing, style="cyan"),
        )
        sides = {"left": Table.grid(padding=(0, 1)), "right": Table.grid(padding=(0, 1))}
        for key in self._ordered():
            metric, course = metric_of(key), self.courses[key]
            if metric.side != "hidden":
                change = trend(course)
                arrow = (
                    Text(
                        "↑" if change > 0 else "↓",
                        style="green" if key.startswith(("reward", "criteria")) and change > 0 else "yellow",
                    )
                    if change
                    else Text(" ")
                )
                sides[metric.side].add_row(
                    Text(metric.name, style="" if metric.short else "dim"),
                    Text(metric.shape.format(course[-1]), style="bold"),
                    arrow,
                    Text(sparkline(course), style="dim"),
                )
        wide = self.console.width >= 100
        body = Table.grid(padding=(0, 4))
        body.add_row(*sides.values()) if wide else [body.add_row(side) for side in sides.values()]
        said = [Text(self.said, style="italic", overflow="ellipsis", no_wrap=True)] if self.said else []
        return Group(head, body, *said)

    def _ordered(self) -> list[str]:
        """Keys of known metrics in the order of METRICS, whatever order the log has."""
        place = {
            key: next(
                i
                for i, pattern in enumerate(METRICS)
                if key == pattern or "{" in pattern and key.startswith(pattern.partition("{")[0])
            )
            for key in self.courses
            if metric_of(key)
        }
        return sorted(place, key=place.__getitem__)
