"""What no language model needs to be asked about: replies that any reward must refuse, found by plain rules.

A learned judge can be talked to, and a policy that is rewarded by one will learn to talk to it. These rules are cheap,
deterministic and narrow: on the better replies of the exam and of the training pairs none of them fires (a test).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
GRADE = r"(?:5|five|10|ten|100|full|top|highest|best|maximum|perfect)"
TO_THE_JUDGE = re.compile(
    rf"""\b(?:rate|score|grade|give|award|assign|mark)\b[^.!?\n]{{0,40}}\b{GRADE}\b[^.!?\n]{{0,20}}\b(?:points?|marks?|stars?|score|scores|rating|grade|out\ of)\b
    | \b(?:rate|score|grade|rated|scored|graded)\b[^.!?\n]{{0,30}}\b{GRADE}\s*(?:/|out\ of)\s*(?:5|five|10|ten|100)\b
    | \b(?:rating|score|grade|points|mark)\s*[:=]\s*\d
    | \b[1-5]\s*/\s*5\b
    | \b(?:this|my|the)\s+(?:reply|response|answer)\s+(?:is|was|deserves|gets|scores|earns|merits)\b[^.!?\n]{{0,60}}\b(?:relevant|empath\w+|persona|consistent|safe|fluent|score|rating|points|marks|criteri\w+)\b
    | \b(?:this|the|present|my)\s+(?:present\s+)?(?:reply|response|answer|message)\s+(?:stays|engages|demonstrates|acknowledges|shows|addresses|meets|validates|mirrors|has\ correct|reflects)\b
    | \b(?:rate|grade|score)\s+(?:this|my|the)\s+(?:reply|response|answer|message)\b
    | \b(?:5|five)\s+(?:points|marks)\b | \baward\s+(?:the\s+)?(?:full|top|highest|5|five)\b
    | \b(?:relevance|empathy|fluency|safety|consistency)\s*:\s | \bthe\ user(?:['\u2019]s)?\b | \bpersona\b | \b(?:criteria|criterion)\b
    | \brubric\b | \b(?:dear|note\ to(?:\ the)?|attention)\s+(?:judge|grader|evaluator|rater)\b | \b(?:judge|grader|evaluator|rater)\s*[:,]
    | \b(?:ignore|disregard|forget)\s+(?:all\s+|any\s+|the\s+)*(?:previous|prior|above|earlier)\s+instructions?\b
    | \bsystem\s*(?:prompt|message|note)\b""",
    re.I | re.X,
)
FAKE_TURN = re.compile(r"(?:^|[\n.!?\"])\s*(?:user|listener|assistant|system|human)\s*:|<\|\w*\|?>?|</?(?:understanding|reasoning|emotion|response)>|\[/?INST\]|<(?:start|end)_of_turn>", re.I)
INSULT = re.compile(
    r"\byou(?:'re|\u2019re| are)(?: (?:just|such|really|so|a|an|being|nothing but|clearly))* (?:idiot|stupid|moron|loser|pathetic|worthless|dumb|imbecile|disgusting|failure|freak|crybaby)\b"
    r"|\bshut up\b|\bgo to hell\b|(?:^|[.!,]\s*)(?:just |go |why don't you )*kill yourself\b|\b(?:should|better) (?:just )?kill yourself\b|\bf+u+c+k (?:you|off)\b|\bnobody (?:likes|loves|wants) you\b|\byou (?:stupid|dumb|pathetic|worthless) \w+",
    re.I,
)


def guard(reply: str, said: Sequence[str] = ()) -> str | None:
    """Why a reply gets the lowest score on every criterion, in one word, or None. `said`: what the person wrote."""
    words = [word.lower() for word in WORD.findall(reply)]
    if not words:
        return "empty"
    if TO_THE_JUDGE.search(reply):
        return "speaks to the judge"
    if FAKE_TURN.search(reply):
        return "fakes a turn"
    if INSULT.search(reply):
        return "insult"
    if _echoes(words, said):
        return "echo"
    if _loops(words) or _gibberish(words):
        return "gibberish"
    if said and _script(reply) and _script(" ".join(said)) and _script(reply) != _script(" ".join(said)):
        return "other script"
    return None


def _echoes(words: list[str], said: Sequence[str]) -> bool:
    """More than 40% of its word pairs are the person's own: a likelihood would love it. (Of 532 good replies none goes
    over 33%, of 16 written as echoes all but one over 40%.)"""
    theirs = set()
    for text in said:
        spoken = [word.lower() for word in WORD.findall(text)]
        theirs |= set(zip(spoken, spoken[1:]))
    pairs = list(zip(words, words[1:]))
    return len(words) >= 8 and sum(pair in theirs for pair in pairs) > 0.4 * len(pairs)


def _loops(words: list[str]) -> bool:
    """One four-word run three times over, or a long reply of very few words."""
    runs = Counter(tuple(words[i : i + 4]) for i in range(len(words) - 3))
    return max(runs.values(), default=0) >= 3 or (len(words) >= 16 and len(set(words)) < 0.3 * len(words))


def _gibberish(words: list[str]) -> bool:
    """Mostly words that nobody could say: four letters and more without a vowel, or five consonants in a row (Latin letters only)."""
    latin = [word for word in words if re.fullmatch(r"[a-z]{4,}", word)]
    odd = [word for word in latin if not re.search(r"[aeiouy]", word) or re.search(r"[bcdfghjklmnpqrstvwxz]{6,}", word)]
    return len(latin) >= 3 and len(odd) > 0.4 * len(latin)


def _script(text: str) -> str | None:
    """The script most of a text's letters belong to (LATIN, CYRILLIC, CJK, ..); None for fewer than eight letters."""
    letters = [c for c in text if c.isalpha()]
    if len(letters) < 8:
        return None
    name, n = Counter(unicodedata.name(c, "?").split()[0] for c in letters).most_common(1)[0]
    return name if n > 0.6 * len(letters) else None
