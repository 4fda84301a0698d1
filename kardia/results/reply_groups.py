"""Read the replies of a GRPO run, and measure how something in them changed and what it is linked with.

A group is one unit of evidence, since its answers share a prompt: intervals and tests count groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

from kardia.data.rows import WORD, find_span
from kardia.results.groups import groups_of
from kardia.results.no_signal import known_scores, warning_words
from kardia.results.run_files import fixed, mean_of, number

_WORDS = warning_words()
LIMITS = SimpleNamespace(**_WORDS["limits"])  # of all warnings; warnings.yaml gives their reasons


class RunWarning(NamedTuple):
    """One warning: a text with its numbers and what to do."""

    kind: str  # see warnings.yaml
    text: str


def warn(name: str, counts: tuple = (None, None), **numbers) -> RunWarning:
    """Return the warning that warnings.yaml calls `name`; counts are (replies, groups)."""
    entry, (n, groups) = _WORDS["texts"][name], counts
    return RunWarning(entry["kind"], entry["text"].format(**{"n": n, "groups": groups, **numbers}))


@dataclass(frozen=True)
class Answer:
    """One recorded answer: its reply and its scores."""

    text: str  # of the reply span, lower case; "" if there is none
    words: list[str]
    begs: bool  # a guard refused it because it speaks to the judge
    judged: bool  # a refused reply is 0 on everything, and says nothing about the judge
    rubric: float | None
    reward: float | None
    criteria: dict[str, float]
    witness: dict[str, float]


@dataclass(frozen=True)
class Group:
    """The answers to one prompt in one step."""

    at: float  # 0 = the run's first step, 1 = its last
    prompt: str  # all that the policy read, lower case; it also tells prompts apart
    answers: list[Answer]


def _answer(row: dict, reply: str) -> Answer:
    text = (find_span(str(row.get("completion") or ""), reply) or "").lower()
    words, refused = WORD.findall(text), row.get("refused")
    scores = [known_scores(row.get(key)) for key in ("criteria", "witness")]
    rubric, judged = known_scores(row.get("components")).get("rubric"), bool(words) and not refused
    reward = number(row.get("reward"))
    return Answer(text, words, refused == "speaks to the judge", judged, rubric, reward, *scores)


def groups_of_replies(rows: list[dict], reply: str) -> list[Group]:
    """Return the groups of recorded answers in order; reply: the span that the person reads."""
    recorded, out = groups_of(rows), []
    for step, _, samples in recorded:
        row, first, last = samples[0], recorded[0][0], recorded[-1][0]
        texts = [message.get("content") for message in row.get("messages") or []]
        texts = [text for text in (row.get("person"), row.get("situation"), *texts) if isinstance(text, str)]
        answers = [_answer(sample, reply) for sample in samples]
        out.append(Group((step - first) / max(1, last - first), "\n".join(texts).lower(), answers))
    return out


def ends_of(groups: list, fewest: int = LIMITS.text_quarter) -> tuple[list, list]:
    """Return the first and the last quarter; two empty lists if these hold fewer than `fewest`."""
    n = len(groups) // 4
    return (groups[:n], groups[-n:]) if n >= fewest else ([], [])


def judged_in(groups: list[Group], *values: Callable[[Answer], float | None]) -> list[tuple[float, list]]:
    """Return [(at, the values of each judged answer)] of the groups where an answer has all of them."""
    out = []
    for group in groups:
        known = [[value(answer) for value in values] for answer in group.answers if answer.judged]
        known = [each for each in known if None not in each]
        out += [(group.at, known)] if known else []
    return out


def means_in(groups: list[Group], value: Callable[[Answer], float | None]) -> list[tuple[float, float]]:
    """Return [(at, mean)] of the groups in which `value` of a judged answer is known."""
    return [(at, mean_of([x for (x,) in known])) for at, known in judged_in(groups, value)]


# ---------------------------------------------------------------------------------- intervals


class Estimate(NamedTuple):
    """A number with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{fixed(self.value)} ({fixed(self.low)} to {fixed(self.high)})"


def change_of(points: list[tuple[float, float]], level: float) -> Estimate | None:
    """Return the change of group means [(at, mean)] over the run, which is a slope: `at` runs from 0 to 1."""
    from scipy import stats

    if len(points) < LIMITS.enough or len({at for at, _ in points}) < 2:
        return None
    fit = stats.linregress(points)
    half = fit.stderr * stats.t.ppf((1 + level) / 2, len(points) - 2)
    return Estimate(fit.slope, fit.slope - half, fit.slope + half)


def link_of(groups: list[tuple[float, list]]) -> tuple[Estimate, int, int] | None:
    """Return (correlation inside groups with its 95% interval, replies, groups), None if there are too few.

    Each group gives one correlation, because GRPO sees only differences in a group."""
    import numpy as np
    from scipy import stats

    columns = [tuple(zip(*pairs)) for _, pairs in groups if len(pairs) > 2]
    columns = [(x, y) for x, y in columns if max(x) - min(x) > 1e-6 and max(y) - min(y) > 1e-6]
    n = sum(len(x) for x, _ in columns)
    if n < LIMITS.rows or len(columns) < LIMITS.enough:
        return None
    each = [float(np.corrcoef(x, y)[0, 1]) for x, y in columns]
    interval = stats.ttest_1samp(each, 0.0).confidence_interval(0.95)
    return Estimate(mean_of(each), float(interval.low), float(interval.high)), n, len(columns)


def share_rose(early: int, late: int, n: int) -> bool:
    """Return whether `late` of n groups is surely more than `early` of n (Boschloo 1970)."""
    from scipy import stats

    table = [[late, early], [n - late, n - early]]
    return late > early and stats.boschloo_exact(table, alternative="greater").pvalue < (1 - LIMITS.sure) / 2
