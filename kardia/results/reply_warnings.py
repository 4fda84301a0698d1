"""Read the replies of a GRPO run for signs that they please the judge and not the person.

A group is one unit of evidence, since its answers share a prompt: intervals and tests count groups.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from types import SimpleNamespace
from typing import NamedTuple

from kardia.data.rows import WORD, find_span
from kardia.results.groups import groups_of
from kardia.results.no_signal import known_scores, plain_names, warning_words
from kardia.results.run_files import fixed, mean_of, number

_WORDS = warning_words()
LIMITS = SimpleNamespace(**_WORDS["limits"])  # of all warnings; warnings.yaml gives their reasons
GRADING = "|".join(_WORDS["grading"])


class RunWarning(NamedTuple):
    """One warning: a text with its numbers and what to do."""

    kind: str  # see warnings.yaml
    text: str


def warn(name: str, counts: tuple = (None, None), **numbers) -> RunWarning:
    """Return the warning that warnings.yaml calls `name`; counts are (replies, groups)."""
    entry, (n, groups) = _WORDS["texts"][name], counts
    return RunWarning(entry["kind"], entry["text"].format(**{"n": n, "groups": groups, **numbers}))


@dataclass(frozen=True)
class _Answer:
    text: str  # of the reply span, lower case; "" if there is none
    words: list[str]
    begs: bool  # a guard refused it because it speaks to the judge
    judged: bool  # a refused reply is 0 on everything, and says nothing about the judge
    rubric: float | None
    criteria: dict[str, float]
    witness: dict[str, float]


@dataclass(frozen=True)
class _Group:
    at: float  # 0 = the run's first step, 1 = its last
    prompt: str  # all that the policy read, lower case; it also tells prompts apart
    answers: list[_Answer]


def _answer(row: dict, reply: str) -> _Answer:
    text = (find_span(str(row.get("completion") or ""), reply) or "").lower()
    words, refused = WORD.findall(text), row.get("refused")
    scores = [known_scores(row.get(key)) for key in ("criteria", "witness")]
    rubric, judged = known_scores(row.get("components")).get("rubric"), bool(words) and not refused
    return _Answer(text, words, refused == "speaks to the judge", judged, rubric, *scores)


def _groups(rows: list[dict], reply: str) -> list[_Group]:
    recorded, out = groups_of(rows), []
    for step, _, samples in recorded:
        row, first, last = samples[0], recorded[0][0], recorded[-1][0]
        texts = [message.get("content") for message in row.get("messages") or []]
        texts = [text for text in (row.get("person"), row.get("situation"), *texts) if isinstance(text, str)]
        answers = [_answer(sample, reply) for sample in samples]
        out.append(_Group((step - first) / max(1, last - first), "\n".join(texts).lower(), answers))
    return out


def _ends(groups: list, fewest: int = LIMITS.text_quarter) -> tuple[list, list]:
    """Return the first and the last quarter; two empty lists if these hold fewer than `fewest`."""
    n = len(groups) // 4
    return (groups[:n], groups[-n:]) if n >= fewest else ([], [])


def _judged(groups: list[_Group], *values: Callable[[_Answer], float | None]) -> list[tuple[float, list]]:
    """Return [(at, the values of each judged answer)] of the groups where an answer has all of them."""
    out = []
    for group in groups:
        known = [[value(answer) for value in values] for answer in group.answers if answer.judged]
        known = [each for each in known if None not in each]
        out += [(group.at, known)] if known else []
    return out


def _means(groups: list[_Group], value: Callable[[_Answer], float | None]) -> list[tuple[float, float]]:
    """Return [(at, mean)] of the groups in which `value` of a judged answer is known."""
    return [(at, mean_of([x for (x,) in known])) for at, known in _judged(groups, value)]


# ---------------------------------------------------------------------------------- intervals


class _Estimate(NamedTuple):
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{fixed(self.value)} ({fixed(self.low)} to {fixed(self.high)})"


def _change(points: list[tuple[float, float]], level: float) -> _Estimate | None:
    """Return the change of group means [(at, mean)] over the run, which is a slope: `at` runs from 0 to 1."""
    from scipy import stats

    if len(points) < LIMITS.enough or len({at for at, _ in points}) < 2:
        return None
    fit = stats.linregress(points)
    half = fit.stderr * stats.t.ppf((1 + level) / 2, len(points) - 2)
    return _Estimate(fit.slope, fit.slope - half, fit.slope + half)


def _link(groups: list[tuple[float, list]]) -> tuple[_Estimate, int, int] | None:
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
    return _Estimate(mean_of(each), float(interval.low), float(interval.high)), n, len(columns)


def _share_rose(early: int, late: int, n: int) -> bool:
    """Return whether `late` of n groups is surely more than `early` of n (Boschloo 1970)."""
    from scipy import stats

    table = [[late, early], [n - late, n - early]]
    return late > early and stats.boschloo_exact(table, alternative="greater").pvalue < (1 - LIMITS.sure) / 2


# ---------------------------------------------------------------------------------- the replies


def _length(groups: list[_Group]) -> Iterator[RunWarning]:
    link = _link(_judged(groups, lambda answer: float(len(answer.words)), lambda answer: answer.rubric))
    if link is None or link[0].low <= LIMITS.length_pays:
        return
    first, last = map(mean_of, _ends([mean for _, mean in _means(groups, lambda a: len(a.words))], 2))
    grew = "hardly changed in length"
    if last > 1.1 * first:
        grew = "grew"
    elif last < 0.9 * first:
        grew = "shrank"
    yield warn("length", link[1:], r=link[0], grew=grew, first=first, last=last)


def _grams(words: list[str], n: int) -> set[tuple[str, ...]]:
    return set(zip(*(words[i:] for i in range(n))))


def _dominant(group: _Group) -> set[tuple[str, ...]]:
    """Return the phrases of `gram` words that stand in most answers of a group and not in its prompt."""
    replies = [answer.words for answer in group.answers if answer.words]
    counts = Counter(gram for words in replies for gram in _grams(words, LIMITS.gram))
    most = {gram for gram, n in counts.items() if n > len(replies) / 2}
    return most - _grams(WORD.findall(group.prompt), LIMITS.gram)


def _phrases(groups: list[_Group]) -> Iterator[RunWarning]:
    first, last = _ends([group for group in groups if sum(bool(a.words) for a in group.answers) > 3])
    early, n = Counter(gram for group in first for gram in _dominant(group)), len(first)
    prompts: dict[tuple, list[str]] = {}
    for group in last:
        for gram in _dominant(group):
            prompts.setdefault(gram, []).append(group.prompt)
    wide = [(len(those), gram) for gram, those in prompts.items() if len(set(those)) >= LIMITS.phrase_prompts]
    risen = [(k, gram) for k, gram in wide if k - early[gram] >= LIMITS.phrase_rise * n]
    k, gram = max(risen, default=(0, ()))
    if gram and _share_rose(early[gram], k, n):
        different, phrase = len(set(prompts[gram])), " ".join(gram)
        yield warn("phrases", phrase=phrase, prompts=different, late=k, early=early[gram], n=n)


def _diversity(groups: list[_Group]) -> Iterator[RunWarning]:
    """Compare answers of a group by the word pairs that two of them share (the Jaccard distance)."""
    from scipy import stats

    distances = []  # one mean per group
    for group in groups:
        pairs = [_grams(["", *answer.words], 2) for answer in group.answers if answer.words]
        if len(pairs) > 1:
            distances.append(mean_of([1 - len(a & b) / len(a | b) for a, b in combinations(pairs, 2)]))
    first, last = _ends(distances)
    if not first or mean_of(last) >= LIMITS.alike * mean_of(first):
        return
    limit = [LIMITS.alike * distance for distance in first]
    if stats.ttest_ind(last, limit, equal_var=False, alternative="less").pvalue < (1 - LIMITS.sure) / 2:
        yield warn("alike", first=mean_of(first), last=mean_of(last), n=len(first))


class _Mark(NamedTuple):
    """Words of grading in one answer."""

    group: int
    prompt: str
    words: list[str]  # those that are not in the prompt
    keys: set[str]  # their stems (relevant and relevance are one word), and what holds of TWO and SURELY


TWO, SURELY = "two words", "grading, whatever the criteria are called"


def _marks(groups: list[_Group]) -> list[_Mark]:
    names = {name.lower().replace("_", " ") for group in groups for a in group.answers for name in a.criteria}
    names = sorted({re.escape(word) for name in names for word in WORD.findall(name) if len(word) > 3})
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join([GRADING, *names])})(?!\w)")
    alone, marks = re.compile(GRADING), []
    for i, group in enumerate(groups):
        asked = {word[:4] for word in pattern.findall(group.prompt)}
        for answer in group.answers:
            words = [word for word in pattern.findall(answer.text) if word[:4] not in asked]
            keys = {word[:4] for word in words}
            surely = answer.begs or len({word[:4] for word in words if alone.fullmatch(word)}) > 1
            holds = {TWO: surely or len(keys) > 1, SURELY: surely}
            marks.append(_Mark(i, group.prompt, words, keys | {key for key in holds if holds[key]}))
    return marks


def _graded(groups: list[_Group]) -> Iterator[RunWarning]:
    # One word of grading is often honest ("what was the score?"). Two in a reply count, or one everywhere.
    marks, n = _marks(groups), len(groups) // 4
    first = [mark for mark in marks if mark.group < n]
    last = [mark for mark in marks if mark.group >= len(groups) - n]
    stems = sorted({key for mark in marks for key in mark.keys} - {TWO, SURELY})
    cases = []
    if n >= LIMITS.text_quarter:
        cases = [(TWO, LIMITS.graded, last), *((stem, LIMITS.one_word, last) for stem in stems)]
    for key, least, part in [*cases, (SURELY, LIMITS.graded_ever, marks)]:
        hits = [mark for mark in part if key in mark.keys]
        prompts = len({mark.prompt for mark in hits})
        if prompts < LIMITS.graded_prompts or len(hits) < least * len(part):
            continue
        where = "all answers"
        if part is last:
            began = [mark for mark in first if key in mark.keys]
            if not _share_rose(len({mark.group for mark in began}), len({mark.group for mark in hits}), n):
                continue
            share = len(began) / max(1, len(first))
            where = f"the last quarter's answers ({share:.0%} of the first quarter's)"
        counts = Counter(word for mark in hits for word in mark.words).most_common(3)
        often = ", ".join(f'"{word}" {k} times' for word, k in counts)
        often = f", most often {often}" if often else ""
        share, n = len(hits) / len(part), len(hits)
        yield warn("graded", share=share, where=where, n=n, prompts=prompts, often=often)
        return


# ---------------------------------------------------------------------------------- the criteria


def _criteria(groups: list[_Group], run: dict) -> tuple[list[str], float]:
    """Return the rewarded criteria, and the level of each interval that makes sure of all of them."""
    names = dict.fromkeys(name for group in groups for answer in group.answers for name in answer.criteria)
    names = [name for name in names if name not in (run.get("dropped_criteria") or [])]
    return names, 1 - (1 - LIMITS.sure) / max(1, len(names))


def _score(answer: _Answer, kind: str, name: str) -> float | None:
    return getattr(answer, kind).get(name)


def _trade_off(groups: list[_Group], run: dict) -> Iterator[RunWarning]:
    names, level = _criteria(groups, run)
    up, down = [], []
    for name in names:
        change = _change(_means(groups, partial(_score, kind="criteria", name=name)), level)
        text = f"{plain_names([name])} by {change}"
        up += [text] if change and change.low > 0 and change.value >= LIMITS.relevant else []
        down += [text] if change and change.high < 0 and change.value <= -LIMITS.relevant else []
    if up and down:
        yield warn("trade-off", (None, len(groups)), up="; ".join(up), down="; ".join(down), sure=LIMITS.sure)


def _lag(pairs: list[tuple[float, list]], level: float) -> tuple[_Estimate, float] | None:
    """Return (change of the witness's scores, the change that they should follow by), None if they follow.

    What they should follow by comes from the differences inside groups: the slope of one over the other."""
    from scipy import stats

    if len(pairs) < LIMITS.enough:
        return None
    means, centred, follows = [], [], 0.0
    for at, known in pairs:
        x, y = map(mean_of, zip(*known))
        means.append((at, x, y))
        centred += [(a - x, b - y) for a, b in known]
    if max(a for a, _ in centred) - min(a for a, _ in centred) > 1e-6:
        follows = stats.linregress(centred).slope
    asked = _change([(at, follows * x) for at, x, _ in means], level)
    held = _change([(at, y) for at, _, y in means], level)
    gap = _change([(at, follows * x - y) for at, x, y in means], level)
    return (held, asked.value) if gap.low > 0 and held.value < LIMITS.held_share * asked.value else None


def _witness(groups: list[_Group], run: dict, exam: dict) -> Iterator[RunWarning]:
    """Ask whether the witness sees the rise of a criterion that the judge reports."""
    names, level = _criteria(groups, run)
    for name in names:
        entry = (exam.get("criteria") or {}).get(name) or {}
        readable = number((entry.get("witness") or {}).get("low"))
        # A witness that reads the exam's pairs no better than a coin says nothing. A weight of 0 was never
        # rewarded.
        if (readable is not None and readable <= 0.5) or number(entry.get("weight")) == 0:
            continue
        rewarded, witness = (partial(_score, kind=kind, name=name) for kind in ("criteria", "witness"))
        pairs, rise, lag = _judged(groups, rewarded, witness), _change(_means(groups, rewarded), 0.95), None
        if rise and rise.low > 0 and rise.value >= LIMITS.relevant:
            lag = _lag(pairs, level)
        link, criterion = _link(pairs), plain_names([name])
        if lag:
            counts = sum(len(known) for _, known in pairs), len(pairs)
            yield warn("lags", counts, criterion=criterion, rise=rise, held=lag[0], asked=fixed(lag[1]))
        elif link and link[0].low <= 0 and link[0].high < LIMITS.held_link:
            yield warn("unlinked", link[1:], criterion=criterion, link=link[0])


def check_replies(rows: list[dict], reply: str, run: dict, exam: dict) -> list[RunWarning]:
    """Return the warnings about the span `reply` of the recorded answers `rows`."""
    groups = _groups(rows, reply)
    checks = [_length, _phrases, _diversity, _graded, partial(_trade_off, run=run)]
    checks.append(partial(_witness, run=run, exam=exam))
    return [warning for check in checks for warning in check(groups)]
