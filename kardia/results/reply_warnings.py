"""Read the replies of a GRPO run for signs that they please the judge and not the person."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import combinations
from typing import NamedTuple

from kardia.data.rows import WORD
from kardia.results.no_signal import plain_names, warning_words
from kardia.results.reply_groups import (
    LIMITS,
    Answer,
    Estimate,
    Group,
    RunWarning,
    change_of,
    ends_of,
    groups_of_replies,
    judged_in,
    link_of,
    means_in,
    share_rose,
    warn,
)
from kardia.results.reply_habits import check_habits, check_words
from kardia.results.run_files import fixed, mean_of, number

GRADING = "|".join(warning_words()["grading"])


def _length(groups: list[Group]) -> Iterator[RunWarning]:
    link = link_of(judged_in(groups, lambda answer: float(len(answer.words)), lambda answer: answer.rubric))
    if link is None or link[0].low <= LIMITS.length_pays:
        return
    first, last = map(mean_of, ends_of([mean for _, mean in means_in(groups, lambda a: len(a.words))], 2))
    grew = "hardly changed in length"
    if last > 1.1 * first:
        grew = "grew"
    elif last < 0.9 * first:
        grew = "shrank"
    yield warn("length", link[1:], r=link[0], grew=grew, first=first, last=last)


def _grams(words: list[str], n: int) -> set[tuple[str, ...]]:
    return set(zip(*(words[i:] for i in range(n))))


def _dominant(group: Group) -> set[tuple[str, ...]]:
    """Return the phrases of `gram` words that stand in most answers of a group and not in its prompt."""
    replies = [answer.words for answer in group.answers if answer.words]
    counts = Counter(gram for words in replies for gram in _grams(words, LIMITS.gram))
    most = {gram for gram, n in counts.items() if n > len(replies) / 2}
    return most - _grams(WORD.findall(group.prompt), LIMITS.gram)


def _phrases(groups: list[Group]) -> Iterator[RunWarning]:
    first, last = ends_of([group for group in groups if sum(bool(a.words) for a in group.answers) > 3])
    early, n = Counter(gram for group in first for gram in _dominant(group)), len(first)
    prompts: dict[tuple, list[str]] = {}
    for group in last:
        for gram in _dominant(group):
            prompts.setdefault(gram, []).append(group.prompt)
    wide = [(len(those), gram) for gram, those in prompts.items() if len(set(those)) >= LIMITS.phrase_prompts]
    risen = [(k, gram) for k, gram in wide if k - early[gram] >= LIMITS.phrase_rise * n]
    k, gram = max(risen, default=(0, ()))
    if gram and share_rose(early[gram], k, n):
        different, phrase = len(set(prompts[gram])), " ".join(gram)
        yield warn("phrases", phrase=phrase, prompts=different, late=k, early=early[gram], n=n)


def _diversity(groups: list[Group]) -> Iterator[RunWarning]:
    """Compare answers of a group by the word pairs that two of them share (the Jaccard distance)."""
    from scipy import stats

    distances = []  # one mean per group
    for group in groups:
        pairs = [_grams(["", *answer.words], 2) for answer in group.answers if answer.words]
        if len(pairs) > 1:
            distances.append(mean_of([1 - len(a & b) / len(a | b) for a, b in combinations(pairs, 2)]))
    first, last = ends_of(distances)
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


def _marks(groups: list[Group]) -> list[_Mark]:
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


def _graded(groups: list[Group]) -> Iterator[RunWarning]:
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
            if not share_rose(len({mark.group for mark in began}), len({mark.group for mark in hits}), n):
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


def _criteria(groups: list[Group], run: dict) -> tuple[list[str], float]:
    """Return the rewarded criteria, and the level of each interval that makes sure of all of them."""
    names = dict.fromkeys(name for group in groups for answer in group.answers for name in answer.criteria)
    names = [name for name in names if name not in (run.get("dropped_criteria") or [])]
    return names, 1 - (1 - LIMITS.sure) / max(1, len(names))


def _score(answer: Answer, kind: str, name: str) -> float | None:
    return getattr(answer, kind).get(name)


def _trade_off(groups: list[Group], run: dict) -> Iterator[RunWarning]:
    names, level = _criteria(groups, run)
    up, down = [], []
    for name in names:
        change = change_of(means_in(groups, partial(_score, kind="criteria", name=name)), level)
        text = f"{plain_names([name])} by {change}"
        up += [text] if change and change.low > 0 and change.value >= LIMITS.relevant else []
        down += [text] if change and change.high < 0 and change.value <= -LIMITS.relevant else []
    if up and down:
        yield warn("trade-off", (None, len(groups)), up="; ".join(up), down="; ".join(down), sure=LIMITS.sure)


def _lag(pairs: list[tuple[float, list]], level: float) -> tuple[Estimate, float] | None:
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
    asked = change_of([(at, follows * x) for at, x, _ in means], level)
    held = change_of([(at, y) for at, _, y in means], level)
    gap = change_of([(at, follows * x - y) for at, x, y in means], level)
    return (held, asked.value) if gap.low > 0 and held.value < LIMITS.held_share * asked.value else None


def _witness(groups: list[Group], run: dict, exam: dict) -> Iterator[RunWarning]:
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
        pairs, rise, lag = (
            judged_in(groups, rewarded, witness),
            change_of(means_in(groups, rewarded), 0.95),
            None,
        )
        if rise and rise.low > 0 and rise.value >= LIMITS.relevant:
            lag = _lag(pairs, level)
        link, criterion = link_of(pairs), plain_names([name])
        if lag:
            counts = sum(len(known) for _, known in pairs), len(pairs)
            yield warn("lags", counts, criterion=criterion, rise=rise, held=lag[0], asked=fixed(lag[1]))
        elif link and link[0].low <= 0 and link[0].high < LIMITS.held_link:
            yield warn("unlinked", link[1:], criterion=criterion, link=link[0])


def check_replies(rows: list[dict], reply: str, run: dict, exam: dict, judged=True) -> list[RunWarning]:
    """Return the warnings about the span `reply` of the recorded answers `rows`.

    judged: whether the judge's scores were rewarded.
    """
    groups = groups_of_replies(rows, reply)
    checks = [_stock, _spread, _graded]
    if judged:
        checks += [_length, partial(_trade_off, run=run)]
    checks.append(partial(_witness, run=run, exam=exam))
    return [warning for check in checks for warning in check(groups)]


def _spread(groups: list[Group]) -> Iterator[RunWarning]:
    """Yield a warning for answers that became alike, which then share their habits too; else for habits."""
    found = list(_diversity(groups))
    yield from found or check_habits(groups)


def _stock(groups: list[Group]) -> Iterator[RunWarning]:
    """Yield a warning for a phrase that stands everywhere; without one, for a single word."""
    found = list(_phrases(groups))
    yield from found or check_words(groups, GRADING)
