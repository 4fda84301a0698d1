"""What a careful reader would have noticed in a run: signs that the policy pleases the judge and not the person.

GRPO raises whatever raises the reward. Where the judge can be pleased cheaply (by length, a stock phrase, words of its own
rubric), that is what is learned, and the reward's curve looks the same. No alarm proves it: each gives the numbers, and says
what to read or change. A GRPO group is one unit of evidence, since its answers share a prompt. An interval is the bootstrap's
standard error over groups times Student's quantile: percentiles are too narrow for few groups (Efron and Tibshirani 1993).
Texts are plain and hold a model's words: whoever makes HTML of them escapes them.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import NormalDist, stdev
from typing import NamedTuple

from kardia.core.console import printable
from kardia.data.rows import WORD, find_span
from kardia.results.run_files import (
    fixed,
    form_of,
    groups_of,
    is_grpo,
    mean_of,
    number,
    quarters,
    rewards_of,
    series,
    spread_of,
)

ENOUGH = 8  # groups for an interval, as steps for quarters of two; under that Student's quantile is anybody's guess
ROWS = 100  # replies for a correlation inside groups: of fewer it is off by more than 0.1, one time in three
TEXT_QUARTER = 3  # groups in a quarter before texts are compared: two prompts of one topic are no trend
DRAWS, UNITS = (
    200,
    100,
)  # of the bootstrap: a standard error to 5%; more groups than that are drawn in blocks of consecutive ones
SURE = 0.99  # of an interval, over all criteria together: a report asks a dozen questions, and a clean run should raise no alarm
LENGTH_PAYS = 0.3  # correlation. In the pairs that people wrote (data/judge_exam.jsonl, judge_train.jsonl) better and longer go together by -0.24 to 0.15
GREW = 1.5  # mean tokens, last quarter over first: half as long again is worth a look, and proves nothing
CUT = 0.2  # share of replies cut at the limit: each of them is invalid, whatever it says
NO_SIGNAL = 0.7  # share of groups with equal rewards: over two thirds of the time is spent for nothing
UNKNOWN = 0.05  # share of replies without a reward
GRAM = 5  # words of a phrase: fewer are grammar ("I can hear that"), more lose its variants
PHRASE_RISE, PHRASE_PROMPTS = (
    0.3,
    4,
)  # of the share of groups where most answers hold the phrase; different prompts among these
ALIKE = 0.5  # distance between answers to one prompt, last quarter over first: half of the differences that GRPO learns from are gone
ENTROPY = 0.3  # last quarter over first: with less than a third left, few tokens are still a choice
RELEVANT = (
    0.05  # change of a score over the run that is worth a sentence: a fifth of a point on the scale of 1 to 5
)
GRADED, GRADED_EVER, ONE_WORD, GRADED_PROMPTS = (
    0.1,
    0.2,
    0.3,
    3,
)  # share of answers: two words in the last quarter; all along; a single word; and different prompts. No two such words stand in one of 820 replies that people wrote
HELD_SHARE = 0.5  # of the change that a held-out score should follow by: a reading near its ceiling follows less, and honestly
HELD_LINK = (
    0.25  # correlation that two readings of one thing should exceed: 6% of variance in common is next to none
)
GRADING = (
    r"rubrics?|criteri(?:on|a)|scor(?:e[ds]?|ing)|ratings?|grad(?:e[ds]?|ing|ers?)|judg(?:es?|ed|ing)|evaluat\w+|relevan(?:t|ce|cy)|fluen(?:t|cy|tly)|empath(?:y|ic|etic|etically)"
    r"|persona|5/5|10/10|out of (?:five|ten)|(?:five|5) stars|(?:full|top) marks"
)


@dataclass(frozen=True)
class Alarm:
    kind: str  # dropped, unfit, unknown, no signal, cut, length, phrases, diversity, trade-off, rubric words, wording
    text: str


@dataclass(frozen=True)
class _Answer:
    text: str  # of the reply span, lower case; "" where there is none
    words: list[str]
    begs: bool  # a guard refused it because it speaks to the judge
    judged: (
        bool  # the judge read it: what any guard refused is 0 on everything, and says nothing about the judge
    )
    rubric: float | None
    criteria: dict[str, float]
    held_out: dict[str, float]


@dataclass(frozen=True)
class _Group:
    at: float  # 0 = the run's first step, 1 = its last
    prompt: str  # all the policy was told, lower case: also what tells prompts apart
    answers: list[_Answer]


# ---------------------------------------------------------------------------------- what was recorded


def _of(kind: type, value):
    """`value` where it is a `kind`, else an empty one: a record may hold anything."""
    return value if isinstance(value, kind) else kind()


def _scores(value) -> dict[str, float]:
    """The known ones of {name: score}; what is not from 0 to 1 is no score."""
    return {
        str(name): known
        for name, score in _of(dict, value).items()
        if (known := number(score)) is not None and 0 <= known <= 1
    }


def _plain(value) -> str:
    """Words of a run in one line, without control characters."""
    return printable(str(value)[:200])


def _names(names: Iterable) -> str:
    return ", ".join(_plain(name).replace("_", " ") for name in names)


def _groups(rows: list[dict], reply: str) -> list[_Group]:
    found, out = groups_of(rows), []
    for step, _, samples in found:
        answers = []
        for row in samples:
            text = (find_span(str(row.get("completion") or ""), reply) or "").lower()
            words, refused, scores = (
                WORD.findall(text),
                row.get("refused"),
                (_scores(row.get(key)) for key in ("components", "criteria", "held_out")),
            )
            answers.append(
                _Answer(
                    text,
                    words,
                    refused == "speaks to the judge",
                    bool(words) and not refused,
                    next(scores).get("rubric"),
                    *scores,
                )
            )
        told = [
            samples[0].get("person"),
            samples[0].get("situation"),
            *(_of(dict, turn).get("content") for turn in _of(list, samples[0].get("messages"))),
        ]
        out.append(
            _Group(
                (step - found[0][0]) / max(1, found[-1][0] - found[0][0]),
                "\n".join(text for text in told if isinstance(text, str)).lower(),
                answers,
            )
        )
    return out


def _ends(groups: list, fewest: int = TEXT_QUARTER) -> tuple[list, list] | None:
    """The first and the last quarter, None where these hold fewer than `fewest`."""
    n = len(groups) // 4
    return (groups[:n], groups[-n:]) if n >= fewest else None


def _means(groups: list[_Group], value: Callable[[_Answer], float | None]) -> list[tuple[float, float]]:
    """[(at, mean)] of the groups where `value` of a judged answer is known."""
    known = [
        (group.at, [v for answer in group.answers if answer.judged and (v := value(answer)) is not None])
        for group in groups
    ]
    return [(at, mean_of(values)) for at, values in known if values]


# ---------------------------------------------------------------------------------- intervals


class _Estimate(NamedTuple):
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{fixed(self.value)} ({fixed(self.low)} to {fixed(self.high)})"


def _student(level: float, df: int) -> float:
    """Two-sided quantile of Student's t (Abramowitz and Stegun 26.7.5): 2.45 for 95% and 6 degrees of freedom."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / df**i for i, term in enumerate(terms, 1))


def _interval(
    rows: list[tuple[float, ...]], statistic: Callable[..., float | None], level: float, fewest: int = ENOUGH
) -> _Estimate | None:
    """`statistic` of the column sums of `rows`, one row per group; None for fewer than `fewest`, or where it is not defined."""
    value = statistic(*map(sum, zip(*rows))) if len(rows) >= fewest else None
    if value is None:
        return None
    size, rng = -(-len(rows) // UNITS), random.Random(0)
    rows = [tuple(map(sum, zip(*rows[i : i + size]))) for i in range(0, len(rows), size)]
    n = len(rows)
    draws = [
        draw for _ in range(DRAWS) if (draw := statistic(*map(sum, zip(*rng.choices(rows, k=n))))) is not None
    ]
    if len(draws) < DRAWS / 2:
        return None
    half = _student(level, n - 2) * stdev(draws) * math.sqrt(n / (n - 2))
    return _Estimate(value, value - half, value + half)


def _centred(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Sums of xy, xx and yy of one group about its own means: GRPO sees only differences inside a group."""
    x, y = (sum(side) / len(pairs) for side in zip(*pairs))
    return (
        sum((a - x) * (b - y) for a, b in pairs),
        sum((a - x) ** 2 for a, _ in pairs),
        sum((b - y) ** 2 for _, b in pairs),
    )


def _correlation(xy: float, xx: float, yy: float) -> float | None:
    return xy / math.sqrt(xx * yy) if xx > 1e-9 and yy > 1e-9 else None


def _change(points: list[tuple[float, float]], level: float) -> _Estimate | None:
    """Change over the run of group means [(at, mean)]: the slope of a line through them, as `at` runs from 0 to 1."""
    slope = lambda n, x, y, xy, xx: (n * xy - x * y) / (n * xx - x * x) if n * xx - x * x > 1e-9 else None  # noqa: E731
    return _interval([(1.0, x, y, x * y, x * x) for x, y in points], slope, level)


def _share_rose(early: int, late: int, n: int) -> bool:
    """late of n groups is surely more than early of n (Agresti and Caffo 2000; a bootstrap sees no chance in 4 of 4 against 0 of 4)."""
    p, q = (early + 1) / (n + 2), (late + 1) / (n + 2)
    return q - p > NormalDist().inv_cdf((1 + SURE) / 2) * math.sqrt((p * (1 - p) + q * (1 - q)) / (n + 2))


# ---------------------------------------------------------------------------------- the run's own books


def _books(data: dict, run: dict, rows: list[dict], log: list[dict]) -> Iterable[Alarm]:
    """What exam, log and rewards say without a reply being read."""
    dropped = _of(list, run.get("dropped_criteria"))
    if dropped:
        yield Alarm(
            "dropped",
            f"Left out of the reward, because the judge failed its exam on them: {_names(dropped)}.",
        )
    entries = {
        name: _of(dict, entry)
        for name, entry in _of(dict, _of(dict, data.get("exam")).get("criteria")).items()
    }
    unfit = [
        name
        for name, entry in entries.items()
        if not entry.get("fit") and number(entry.get("weight")) and name not in dropped
    ]
    if unfit:
        yield Alarm(
            "unfit",
            f"Rewarded although the judge failed its exam on them: {_names(unfit)}. A rise of these scores is no evidence.",
        )
    unknown = sum(number(row.get("reward")) is None for row in rows)
    if unknown > UNKNOWN * len(rows):
        yield Alarm(
            "unknown",
            f"{unknown} of {len(rows)} replies could not be judged and took no part. If the judge's context is too short for them, shorten the prompts or lower --max-tokens.",
        )
    groups = [
        group for group in groups_of(rows) if sum(reward is not None for reward in rewards_of(group[2])) > 1
    ]
    silent = [share for _, share in series(log, "frac_reward_zero_std")] or [
        float(spread_of(group[2]) < 1e-6) for group in groups
    ]
    n = len(silent) // 4
    if (
        n > 1 and mean_of(silent[-n:]) > NO_SIGNAL and mean_of(silent[-2 * n :]) > 0.5
    ):  # where a quarter is two groups, both may be silent by chance
        late = [group for group in groups[-(len(groups) // 4) :] if spread_of(group[2]) < 1e-6]
        why = f". {diagnose(late)}" if late else ": try harder prompts or a higher temperature."
        yield Alarm(
            "no signal",
            f"In the last quarter {mean_of(silent[-n:]):.0%} of the groups had equal rewards and taught nothing{why}",
        )
    for kind, key, alarming, words in (
        (
            "cut",
            "completions/clipped_ratio",
            lambda a, b: b > CUT,
            "In the last quarter {b:.0%} of the replies were cut at the token limit. Raise --max-tokens, unless they ramble.",
        ),
        (
            "diversity",
            "entropy",
            lambda a, b: b < ENTROPY * a,
            "Entropy fell from {a:.2f} to {b:.2f}: replies to one prompt become alike. Try a lower --learning-rate, or --beta above 0.",
        ),
        (
            "length",
            "completions/mean_length",
            lambda a, b: b > GREW * a,
            "Replies grew from {a:.0f} to {b:.0f} tokens: see that the judge does not pay for length.",
        ),
    ):
        ends = quarters(log, key)
        if ends and alarming(*ends):
            yield Alarm(kind, words.format(a=ends[0], b=ends[1]))


# ---------------------------------------------------------------------------------- the replies


def _length(groups: list[_Group]) -> Iterable[Alarm]:
    pairs = [
        [(float(len(a.words)), a.rubric) for a in group.answers if a.judged and a.rubric is not None]
        for group in groups
    ]
    rows = [
        (_centred(known), len(known))
        for known in pairs
        if len({x for x, _ in known}) > 1 and len({y for _, y in known}) > 1
    ]
    found, words = (
        _interval([sums for sums, _ in rows], _correlation, 0.95)
        if sum(n for _, n in rows) >= ROWS
        else None,
        [mean for _, mean in _means(groups, lambda a: len(a.words))],
    )
    if found and found.low > LENGTH_PAYS:
        first, last = map(mean_of, _ends(words, 2))
        grew = (
            "grew" if last > 1.1 * first else "shrank" if last < 0.9 * first else "hardly changed in length"
        )
        yield Alarm(
            "length",
            f"Inside a group the longer reply gets the better rubric score: correlation {fixed(found.value)} (95% interval {fixed(found.low)} to {fixed(found.high)}; "
            f"{sum(n for _, n in rows)} replies in {len(rows)} groups); replies {grew}, from {first:.0f} words in the first quarter to {last:.0f} in the last. "
            "See whether the longer ones are better to read; if not, take another --judge.",
        )


def _grams(words: list[str], n: int) -> set[tuple[str, ...]]:
    return set(zip(*(words[i:] for i in range(n))))


def _dominant(group: _Group) -> set[tuple[str, ...]]:
    """The phrases of GRAM words that stand in most answers of a group and not in its prompt."""
    replies = [answer.words for answer in group.answers if answer.words]
    counts = Counter(gram for words in replies for gram in _grams(words, GRAM))
    most = {gram for gram, n in counts.items() if n > len(replies) / 2}
    return most - _grams(WORD.findall(group.prompt), GRAM) if most else most


def _phrases(groups: list[_Group]) -> Iterable[Alarm]:
    first, last = _ends(
        [group for group in groups if sum(bool(answer.words) for answer in group.answers) > 3]
    ) or ([], [])
    early, late, prompts, n = (
        Counter(gram for group in first for gram in _dominant(group)),
        Counter(),
        {},
        len(first),
    )
    for group in last:
        for gram in _dominant(group):
            late[gram] += 1
            prompts.setdefault(gram, set()).add(group.prompt)
    risen = [
        (k, gram)
        for gram, k in late.items()
        if len(prompts[gram]) >= PHRASE_PROMPTS
        and k - early[gram] >= PHRASE_RISE * n
        and _share_rose(early[gram], k, n)
    ]
    if risen:
        k, gram = max(risen)
        yield Alarm(
            "phrases",
            f'"{" ".join(gram)}" stands in most answers of {k} of the last quarter\'s {n} groups ({len(prompts[gram])} different prompts), of {early[gram]} of {n} in the first quarter, '
            "and in none of these prompts: a phrase that fits everybody is rewarded. Read these replies; take another --judge, or --beta above 0.",
        )


def _diversity(groups: list[_Group]) -> Iterable[Alarm]:
    """The distance of two answers is 1 - shared / all word pairs (Jaccard), of a group the mean over its pairs of answers."""
    texts = [[_grams(["", *answer.words], 2) for answer in group.answers if answer.words] for group in groups]
    ends = _ends(
        [
            mean_of([1 - len(a & b) / len(a | b) for i, a in enumerate(pairs) for b in pairs[:i]])
            for pairs in texts
            if len(pairs) > 1
        ]
    )
    if ends:
        rows = [(1.0, value, 0.0, 0.0) for value in ends[0]] + [(0.0, 0.0, 1.0, value) for value in ends[1]]
        fallen = _interval(
            rows, lambda n, a, m, b: b / m - ALIKE * a / n if n and m else None, SURE, 2 * TEXT_QUARTER
        )
        if fallen and fallen.high < 0:
            yield Alarm(
                "diversity",
                f"Answers to one prompt became alike: the mean distance between two of a group (1: no word pair in common, 0: identical) fell from {mean_of(ends[0]):.2f} in the first quarter "
                f"to {mean_of(ends[1]):.2f} in the last ({len(ends[0])} groups each). Try a higher --temperature, a lower --learning-rate, or --beta above 0.",
            )


def _graded(groups: list[_Group]) -> Iterable[Alarm]:
    """Words of grading in replies. One such word is often honest ("what was the score?"): two in a reply count, or one in replies everywhere."""
    names = {
        word
        for group in groups
        for answer in group.answers
        for name in answer.criteria
        for word in WORD.findall(name.lower().replace("_", " "))
        if len(word) > 3
    }
    pattern, alone = (
        re.compile(rf"(?<!\w)(?:{'|'.join([GRADING, *map(re.escape, sorted(names))])})(?!\w)"),
        re.compile(GRADING),
    )
    stem = lambda word: word[:4]  # noqa: E731  relevant and relevance are one word
    marks = []  # (index of the group, its prompt, words of an answer that are not in the prompt, their stems; "!" where it grades whatever the criteria are called)
    for i, group in enumerate(groups):
        told = set(map(stem, pattern.findall(group.prompt)))
        for answer in group.answers:
            words = [word for word in pattern.findall(answer.text) if stem(word) not in told]
            sure = answer.begs or len({stem(word) for word in words if alone.fullmatch(word)}) > 1
            marks.append((i, group.prompt, words, {*map(stem, words), *["!"] * sure}))
    n, seen = len(groups) // 4, sorted({stem for *_, stems in marks for stem in stems} - {"!"})
    risen = [
        (lambda stems: "!" in stems or len(stems) > 1, GRADED, False),
        *((lambda stems, one=one: one in stems, ONE_WORD, False) for one in seen),
    ]
    for test, least, ever in [*risen * (n >= TEXT_QUARTER), (lambda stems: "!" in stems, GRADED_EVER, True)]:
        early, late = (
            [mark for mark in marks if mark[0] < n],
            [mark for mark in marks if ever or mark[0] >= len(groups) - n],
        )
        began, hits = ([mark for mark in part if test(mark[3])] for part in (early, late))
        prompts = len({prompt for _, prompt, *_ in hits})
        if (
            prompts >= GRADED_PROMPTS
            and len(hits) >= least * len(late)
            and (ever or _share_rose(len({i for i, *_ in began}), len({i for i, *_ in hits}), n))
        ):
            where = (
                "all answers"
                if ever
                else f"the last quarter's answers ({len(began) / max(1, len(early)):.0%} of the first quarter's)"
            )
            common = ", ".join(
                f'"{word}" {k} times'
                for word, k in Counter(word for _, _, words, _ in hits for word in words).most_common(3)
            )
            yield Alarm(
                "rubric words",
                f"Replies speak of the grading and not to the person in {len(hits) / len(late):.0%} of {where}: {len(hits)} replies to {prompts} prompts{common and f', most often {common}'}. "
                "Read these replies: what the judge likes in them helps nobody; take another --judge.",
            )
            return


# ---------------------------------------------------------------------------------- the criteria


def _criteria(groups: list[_Group], run: dict) -> tuple[list[str], float]:
    """The criteria that the judge was admitted for, and the level of an interval that makes SURE of all of them together."""
    names = dict.fromkeys(name for group in groups for answer in group.answers for name in answer.criteria)
    names = [name for name in names if name not in _of(list, run.get("dropped_criteria"))]
    return names, 1 - (1 - SURE) / max(1, len(names))


def _trade_off(groups: list[_Group], run: dict) -> Iterable[Alarm]:
    names, level = _criteria(groups, run)
    changes = [
        (_names([name]), change)
        for name in names
        if (change := _change(_means(groups, lambda a: a.criteria.get(name)), level))
    ]
    up = [f"{name} by {change}" for name, change in changes if change.low > 0 and change.value >= RELEVANT]
    down = [
        f"{name} by {change}" for name, change in changes if change.high < 0 and change.value <= -RELEVANT
    ]
    if up and down:
        yield Alarm(
            "trade-off",
            f"Over the run's {len(groups)} groups some scores rose ({'; '.join(up)}) while others fell ({'; '.join(down)}; {SURE:.0%} intervals, all criteria together). "
            "Read early and late replies side by side; what fell may need a larger weight in rubrics.yaml.",
        )


def _wording(groups: list[_Group], run: dict, exam: dict) -> Iterable[Alarm]:
    """Does the held-out wording of a criterion see the rise that the rewarded one reports?"""
    names, level = _criteria(groups, run)
    for name in names:
        entry = _of(dict, _of(dict, exam.get("criteria")).get(name))
        readable = number(_of(dict, entry.get("held_out")).get("low"))
        if (readable is not None and readable <= 0.5) or number(entry.get("weight")) == 0:
            continue  # no better than a coin on the exam's pairs; or never rewarded
        pairs = [
            (
                g.at,
                [
                    (a.criteria[name], a.held_out[name])
                    for a in g.answers
                    if a.judged and name in a.criteria and name in a.held_out
                ],
            )
            for g in groups
        ]
        pairs = [(at, known) for at, known in pairs if known]
        sums, n = [_centred(known) for _, known in pairs], sum(len(known) for _, known in pairs)
        follows = sum(s[0] for s in sums) / max(
            1e-9, sum(s[1] for s in sums)
        )  # inside groups the held-out score changes by so much for 1 of the rewarded
        means = [(at, mean_of([r for r, _ in known]), mean_of([h for _, h in known])) for at, known in pairs]
        rise, gap, name = _change(_means(groups, lambda a: a.criteria.get(name)), 0.95), None, _names([name])
        if rise and rise.low > 0 and rise.value >= RELEVANT:
            asked, held, gap = (
                _change([(at, value(r, h)) for at, r, h in means], level)
                for value in (lambda r, h: follows * r, lambda r, h: h, lambda r, h: follows * r - h)
            )
        if gap and gap.low > 0 and held.value < HELD_SHARE * asked.value:
            yield Alarm(
                "wording",
                f"Over the run the score of {name} rose by {rise}, but by {held} where the judge is asked in other words, which are never rewarded ({n} replies in {len(means)} groups). "
                f"By the differences inside groups it should have followed by {fixed(asked.value)}: the rise may belong to the wording. Read late replies, and ask otherwise in rubrics.yaml.",
            )
        elif (
            n >= ROWS
            and (link := _interval(sums, _correlation, 0.95))
            and link.low <= 0
            and link.high < HELD_LINK
        ):
            yield Alarm(
                "wording",
                f"Inside a group the score of {name} and the same criterion in other words do not go together: correlation {link}, 95% interval ({n} replies in {len(sums)} groups). "
                "The reward depends on the wording: ask otherwise in rubrics.yaml, or take another --judge.",
            )


def check(data: dict) -> list[Alarm]:
    """The alarms of a run as `record.read_run` returns it, those of its own books first; [] for a clean run and for SFT, whose entropy falls as it should."""
    run, rows, log = (
        _of(dict, data.get("run")),
        *(
            [row for row in _of(list, data.get(key)) if isinstance(row, dict)]
            for key in ("completions", "log")
        ),
    )
    if not is_grpo({"run": run, "completions": rows, "log": log}):
        return []
    groups = _groups(rows, form_of({"run": run})["reply"])
    return [
        *_books(data, run, rows, log),
        *_length(groups),
        *_phrases(groups),
        *_diversity(groups),
        *_graded(groups),
        *_trade_off(groups, run),
        *_wording(groups, run, _of(dict, data.get("exam"))),
    ]


# ---------------------------------------------------------------------------------- no signal


def _stuck(name: str, groups: list[list[float | None]]) -> str:
    """Where one component stands in groups without signal, in words."""
    values = [value for group in groups for value in group]
    known = [value for value in values if value is not None]
    if 2 * len(known) < len(values):
        return f"{name} unknown in {len(values) - len(known)} of {len(values)} answers"
    value, n = Counter(round(value, 2) for value in known).most_common(1)[0]
    if n >= 0.9 * len(known):
        return f"{name} {value:g} in {n} of {len(values)} answers"
    return f"{name} {'equal inside each group' if all(len(set(group)) == 1 for group in groups) else 'not equal'} ({min(known):.2f} to {max(known):.2f})"


def diagnose(groups: list[tuple[int, int, list[dict]]]) -> str:
    """Why `groups` [(step, group, samples)] have no signal: which component is stuck where, and the remedy; "" without samples."""
    answers = [[_of(dict, row) for row in rows] for _, _, rows in groups if rows]
    rows = [row for group in answers for row in group]
    if not rows:
        return ""
    idle = {name for row in rows for name, weight in _scores(row.get("weights")).items() if not weight}
    names = [
        name
        for name in dict.fromkeys(str(name) for row in rows for name in _of(dict, row.get("components")))
        if name not in idle
    ]
    values = {
        name: [[_scores(row.get("components")).get(name) for row in group] for group in answers]
        for name in names
    }
    found = f"{len(answers)} groups without signal: {', '.join(_stuck(_names([name]), each) for name, each in values.items()) or 'no components recorded'}"
    mostly = lambda name, value, share=0.5: (
        sum(group.count(value) for group in values.get(name, [])) >= share * len(rows)
    )  # noqa: E731
    invalid = [row for row in rows if _scores(row.get("components")).get("format") == 0]
    refused = Counter(_plain(row["refused"]) for row in rows if row.get("refused"))
    same = sum(
        len(group) > 1 and len({str(row.get("completion")) for row in group}) == 1 for group in answers
    )
    wrong = [name for name in names if name not in ("format", "rubric") and mostly(name, 0.0, 0.9)]
    if mostly("rubric", None):
        return f"{found}. The judge's context is too short for these prompts: shorten them, lower --max-tokens, or take another --judge."
    if mostly("format", 0.0):
        (problem, n), cut = (
            Counter(_plain(row.get("problem") or "not recorded") for row in invalid).most_common(1)[0],
            sum(bool(row.get("truncated")) for row in invalid),
        )
        remedy = (
            f"{cut} were cut at the token limit: raise --max-tokens"
            if 2 * cut >= len(invalid)
            else "train SFT longer, until most answers are valid"
        )
        return f"{found}. Commonest problem: {problem} ({n} answers); {remedy}."
    if 2 * same >= len(answers):
        return f"{found}. In {same} groups all answers are identical: raise --temperature."
    if 2 * sum(refused.values()) >= len(rows):
        why, n = refused.most_common(1)[0]
        return f"{found}. Guards refused {sum(refused.values())} of them, most often because: {why} ({n}). Read these answers; train SFT longer, or on other data."
    if wrong:
        return f"{found}. The {_names(wrong)} is hardly ever right: train SFT longer, or see that --data has the labels that SFT was trained on."
    return f"{found}. The judge cannot tell the answers apart: try a higher --temperature, harder prompts or another --judge."
