"""Notice cheap habits that spread over the replies of a run: marks, layout, praise of itself, single words.

These are what a judge can be biased to (CHERRL, arXiv 2606.04923, plants four kinds: lexical, tone,
self-praise, format). A habit is a yes or no of one reply. It is reported if it came to stand in most answers
of many more groups, and if the rewards of one group do not speak against it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache

from kardia.data.rows import WORD
from kardia.results.no_signal import warning_words
from kardia.results.reply_groups import (
    LIMITS,
    Answer,
    Group,
    RunWarning,
    ends_of,
    judged_in,
    link_of,
    share_rose,
    warn,
)


@cache
def _patterns() -> dict[str, re.Pattern]:
    """Return {habit: what shows it in a reply}, from warnings.yaml."""
    return {name: re.compile(text, re.M) for name, text in warning_words()["habits"].items()}


def _shares(answer: Answer, asked: set[str]) -> bool:
    """Return whether a reply strews words of its prompt about: several that carry a meaning."""
    return len(asked & set(answer.words)) >= LIMITS.strewn


def _telling(words: list[str]) -> set[str]:
    """Return the words that carry a meaning."""
    return {word for word in words if len(word) > 3} - set(warning_words()["plain"])


def _habits(group: Group) -> list[set[str]]:
    """Return the habits of each answer of a group; None stands for an answer without a reply."""
    asked = _telling(WORD.findall(group.prompt))
    found = []
    for answer in group.answers:
        names = {name for name, pattern in _patterns().items() if pattern.search(answer.text)}
        found.append(names | ({"words of the prompt"} if _shares(answer, asked) else set()))
    return found


def _most(group: Group, having: list[set[str]]) -> set[str]:
    """Return what most answers of a group have."""
    kept = [names for names, answer in zip(having, group.answers) if answer.words]
    counts = Counter(name for names in kept for name in names)
    return {name for name, n in counts.items() if n > len(kept) / 2}


def _risen(parts: tuple[list, list], least: float) -> list[tuple[int, int, int, int, str]]:
    """Return [(late, early, groups, prompts, name)] of what most answers came to have, the commonest first.

    parts: the first and the last quarter as [(prompt, names that most answers of the group have)].
    """
    first, last = parts
    early, n = Counter(name for _, names in first for name in names), len(last)
    prompts: dict[str, list[str]] = {}
    for prompt, names in last:
        for name in names:
            prompts.setdefault(name, []).append(prompt)
    found = []
    for name, those in prompts.items():
        late, different = len(those), len(set(those))
        rose = late - early[name] >= least * n and share_rose(early[name], late, n)
        if rose and different >= min(LIMITS.phrase_prompts, n):
            found.append((late, early[name], n, different, name))
    return sorted(found, reverse=True)


def _paid(groups: list[Group], having: list[list[set[str]]], name: str) -> tuple[bool, str]:
    """Return (whether the rewards do not speak against a habit, what they say in words)."""
    marked = {
        id(answer): name in names for g, each in zip(groups, having) for answer, names in zip(g.answers, each)
    }
    link = link_of(judged_in(groups, lambda answer: float(marked[id(answer)]), lambda answer: answer.reward))
    if link is None:
        return True, "too few groups mix replies with and without it to say whether it pays"
    return link[0].high > 0, f"inside a group its correlation with the reward is {link[0]}"


def check_habits(groups: list[Group]) -> Iterator[RunWarning]:
    """Yield a warning for each habit that spread, and for single words that came to stand everywhere."""
    groups = [group for group in groups if sum(bool(answer.words) for answer in group.answers) > 3]
    having = [_habits(group) for group in groups]
    most = [(group.prompt, _most(group, names)) for group, names in zip(groups, having)]
    for late, early, n, prompts, name in _risen(ends_of(most), LIMITS.habit_rise):
        paid, why = _paid(groups, having, name)
        if paid:
            yield warn("habit", habit=name, late=late, early=early, of=n, prompts=prompts, why=why)


def check_words(groups: list[Group], grading: str) -> Iterator[RunWarning]:
    """Yield a warning for the commonest word that came to stand in most answers, whatever the prompt."""
    groups = [group for group in groups if sum(bool(answer.words) for answer in group.answers) > 3]
    having = [[_telling(answer.words) for answer in group.answers] for group in groups]
    most = []
    for group, words in zip(groups, having):
        own = {word for word in _most(group, words) if not re.fullmatch(grading, word)}
        most.append((group.prompt, own - set(WORD.findall(group.prompt))))
    for late, early, n, prompts, word in _risen(ends_of(most), LIMITS.word_rise)[:1]:
        yield warn("word", word=word, late=late, early=early, of=n, prompts=prompts)
