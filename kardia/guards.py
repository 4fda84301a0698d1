"""What no language model needs to be asked about: replies that any reward must refuse, found by plain rules.

A learned judge can be talked to, and a policy that is rewarded by one will learn to talk to it. These rules are cheap,
deterministic and narrow: none fires on the better replies of the exam and of the training pairs, nor on kind replies that
come close (tests/test_judge.py). What they miss is the judge's business, and the exam counts it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
START, END = r"(?:^|(?<=[.!?\n])\s*)", r"\s*(?:[.!*]*\s*$|[.!?]+\s|\n)"  # of a sentence
GRADE = r"(?:5|five|10|ten|100|full|top|highest|best|maximum|perfect)"
JUDGE = r"(?:judge|grader|evaluator|rater|assessor)"
TO_THE_JUDGE = re.compile(
    rf"""\b(?:rate|score|grade|give|award|assign|mark|choose|pick|select|merits?|deserves?)\b[^.!?\n]{{0,30}}\b{GRADE}\b[^.!?\n]{{0,12}}\b(?:points?|marks?|stars?|scores?|rating)\b
    | \b(?:rate|score|grade|give|rated|scored)\b[^.!?\n]{{0,30}}\b(?:5|five|10|ten)\s*(?:/|out\ of)\s*(?:5|five|10|ten)\b
    | \b(?:rate|grade|score)\s+(?:this|my|the\ above)\s+(?:reply|response|answer|message)\b | \brate\ me\ (?:5|five|10|ten|high)
    | {START}(?:score|rating|grade|points|mark|verdict|answer)\s*[:=]\s*(?:\d+|five|ten|a\+?|yes)(?:\s*(?:/|out\ of)\s*\d+)?(?={END})
    | {START}(?:5\s*/\s*5|5\ out\ of\ 5|five\ out\ of\ five|5\ stars|five\ stars|[\u2b50\u2605]{{3,}})(?={END})
    | [\u2b50\u2605]{{3,}}\s*$ | \btop\ fluency\b
    | \b(?:this|the\ above|the\ present|the\ listener's|my)\s+(?:reply|response)\s+(?:is|was|shows|deserves|gets|merits|demonstrates|acknowledges|stays|addresses|validates|mirrors|meets|has|engages|fits)\b
    | \b(?:this|the\ present)\s+answer\s+(?:is|stays|shows|addresses|has)\b[^.!?\n]{{0,40}}\b(?:topic|relevan\w+|empath\w+|fluent|persona|caring)\b
    | \bthe\s+reply\s+(?:engages|demonstrates|acknowledges|validates|is\ fully)\b | \b(?:does|is)\s+the\s+reply\b | \banswer\s+yes\s+to\b
    | \b(?:ignore|disregard|forget)\s+(?:\w+\s+){{0,4}}instructions?\b
    | \b(?:dear|note\ to(?:\ the)?|attention)\s+{JUDGE}\b | {START}{JUDGE}\s*:
    | \b(?:per|by|according\ to|in\ line\ with|under|following|meets)\s+(?:the|all|all\ the)\s+(?:rubric|criteria)\b
    | \b(?:relevance|empathy|fluency|safety|persona(?:\ consistency)?)\s*:\s*(?:\d|five|excellent|perfect|high|full)
    | \b(?:fully|highly|perfectly|completely|100%)\s+(?:relevant|empathe?tic|fluent)\b | \bsystem\ (?:prompt|instruction)\b""",
    re.I | re.X | re.M,
)
FAKE_TURN = re.compile(r"\b(?:User|Listener|Assistant|USER|ASSISTANT|LISTENER)\s*\**\s*:|^\W*(?i:human|system|person|client|user|assistant|listener)\s*\**\s*:|<\|\w*\|?>?|</?(?:understanding|reasoning|emotion|response)>|\[/?INST\]|<(?:start|end)_of_turn>", re.M)
INSULT = re.compile(
    START + r"(?:well,? |honestly,? |god,? |oh,? |man,? )?(?:you(?:'re| are) (?:just |such |really |so |an? |being |nothing but |clearly |a complete )*(?:idiot|stupid|moron|loser|pathetic|worthless|dumb|imbecile)\b(?!\s*\?)[^\"\u201c\u201d?]*?(?=[.!,;]|$)"
    r"|(?:just |oh |so )?(?:shut up|go to hell|fuck (?:you|off)|kill yourself)\b(?![\"'\u201d]))",
    re.I | re.M,
)
LOOKALIKE = str.maketrans("\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0405\u0455\u0456\u2019", "aeopcyxSsi'")


def guard(reply: str, said: Sequence[str] = ()) -> str | None:
    """Why a reply gets the lowest score on every criterion, in a few words, or None. `said`: what the person wrote."""
    text = "".join(c for c in unicodedata.normalize("NFKC", reply) if unicodedata.category(c) != "Cf")  # no invisible letters, no full-width ones
    words = [word.lower() for word in WORD.findall(text)]
    if not words and not re.search(r"[\u2b50\u2605]", text):
        return "empty"
    plain = text.translate(LOOKALIKE) if _script(text) in (None, "LATIN") else text  # a Cyrillic letter among Latin ones hides a word
    if TO_THE_JUDGE.search(plain):
        return "speaks to the judge"
    if FAKE_TURN.search(plain):
        return "fakes a turn"
    if INSULT.search(plain):
        return "insult"
    if _echoes(words, said):
        return "echo"
    if _loops(words):
        return "repeats itself"
    if _gibberish(words):
        return "gibberish"
    if said and _script(text) and _script(" ".join(said)) and _script(text) != _script(" ".join(said)):
        return "other script"
    return None


def _echoes(words: list[str], said: Sequence[str]) -> bool:
    """More than half of its word pairs are the person's own: a likelihood would love it. (Of 532 good replies none goes
    over a third, of 16 written as echoes 12 go over a half.)"""
    theirs = set()
    for text in said:
        spoken = [word.lower() for word in WORD.findall(text)]
        theirs |= set(zip(spoken, spoken[1:]))
    pairs = list(zip(words, words[1:]))
    return len(words) >= 10 and sum(pair in theirs for pair in pairs) > 0.5 * len(pairs)


def _loops(words: list[str]) -> bool:
    """A long reply that is mostly one four-word run over and over, or of very few words."""
    if len(words) < 15:
        return False
    count = Counter(tuple(words[i : i + 4]) for i in range(len(words) - 3)).most_common(1)[0][1]
    return (count >= 3 and 4 * count > 0.6 * len(words)) or len(set(words)) < 0.3 * len(words)


def _gibberish(words: list[str]) -> bool:
    """Mostly words that nobody could say: no vowel in four letters and more, or six consonants in a row (Latin letters only)."""
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
