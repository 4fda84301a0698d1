"""Refuse replies that no language model needs to be asked about, by plain rules.

A policy that a learned judge rewards will learn to talk to it. An attack is text that is meant for whoever
grades the reply, or for the program that reads it, and not for the person: orders and verdicts, turns and
markup of another format, letters that only hide such text, and more text than the judge reads. The rules are
cheap, deterministic and narrow: they spare kind replies that come close. Warm words beside a bad reply are no
attack. guards.yaml holds what the rules look for; `guards` in rubrics.yaml names the ones that apply.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from kardia.data.rows import WORD
from kardia.data.rubric import GUARDS

ACCENTS = r"\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff"


@cache
def rules() -> SimpleNamespace:
    """Read guards.yaml once; patterns and stems are compiled."""
    import yaml

    data = yaml.safe_load(Path(__file__).with_name("guards.yaml").read_text(encoding="utf-8"))
    words: dict[str, str] = {}

    def expression(text: str) -> str:
        joined = "".join(line.strip() for line in text.splitlines())
        return re.sub(r"\{([A-Z]+)\}", lambda name: words[name[1]], joined)

    for name, text in data.pop("words").items():
        words[name] = expression(text)
    find = SimpleNamespace(**data)  # orders, alphabets, canaries and begging are lists of plain texts
    find.limits, find.stems = SimpleNamespace(**data["limits"]), {}
    for name, topics in data["patterns"].items():
        flags = f"(?{topics.pop('flags')})" if "flags" in topics else ""
        setattr(find, name, re.compile(flags + "|".join(map(expression, topics.values()))))
    for name, stem in data["stems"].items():
        whole = rf"(?<![^\W\d_])(?:{expression(stem['words'])})(?![^\W\d_])"
        find.stems[name] = re.compile(f"{whole}|(?:{expression(stem['signs'])})", re.I)
    for name in ("lookalikes", "leet"):
        setattr(find, name, str.maketrans(*map(expression, data[name].values())))
    return find


def guard(
    reply: str, said: Sequence[str] = (), known: Sequence[str] = (), names: Sequence[str] | None = None
) -> str | None:
    """Return the name of the guard that gives a reply the lowest score on every criterion, or None.

    said: what the person wrote; known: what else stands before the reply (profile, situation) and must not be
    handed back either; names: the guards that apply (None: all). A reply is decided in milliseconds whatever
    its length: nothing is read past the longest, and no rule is more than linear.
    """
    names = GUARDS if names is None else names
    reasons = _reasons(reply.strip(), said, known) if names else ()
    return next((reason for reason in reasons if reason in names), None)


def _reasons(reply: str, said: Sequence[str], known: Sequence[str]) -> Iterator[str]:
    """Yield every guard's name that refuses the reply, in order; the caller takes the first that applies."""
    find, limits, theirs = rules(), rules().limits, " ".join(said)
    if len(reply) > limits.longest:
        yield "too long to be read"
        reply = reply[: limits.longest]
    text = visible(reply)  # the rules read what a person sees, and `_hides` reads what is behind it
    words = [word.lower() for word in WORD.findall(text)]
    if not words and not re.search(r"[\u2b50\u2605]", text):
        yield "empty"
    for reading in _readings(text):
        if _speaks_to_the_judge(reading, theirs):
            yield "speaks to the judge"
        if find.fake_turn.search(reading):
            yield "fakes a turn"
    plain = find.url.sub("", text)
    many = len(find.signs.findall(plain)) > max(limits.signs, limits.signs_share * len(plain))
    if (many or find.markup.search(text)) and not find.code.search(theirs):
        yield "markup"
    if find.encoded.search(text):  # base64, hex and the like
        yield "encoded"
    if _hides(reply, text, words):
        yield "hides letters"
    if find.insult.search(text.translate(find.lookalikes)):
        yield "insult"
    if _echoes(words, [*said, *known]):
        yield "echo"
    if _loops(words):
        yield "repeats itself"
    # More signs and blanks than letters: padding moves the words away from the judge's question.
    letters = sum(c.isalnum() or unicodedata.category(c)[0] == "M" for c in reply)
    if len(reply) - letters - len(words) > max(limits.blank_signs, letters) or _gibberish(words):
        yield "gibberish"
    if said and _foreign(text, theirs):
        yield "other script"


def visible(text: str) -> str:
    """Return the text as a person sees it: no invisible or dressed-up letters, one space for many."""
    find, seen = rules(), []
    longest = 4 * find.limits.longest  # NFKC makes one character into up to 18
    for c in unicodedata.normalize("NFKC", text[:longest]):
        kind = unicodedata.category(c)
        if kind in ("Cf", "Me") or find.invisible.match(c):
            continue
        if "\U0001f1e6" <= c <= "\U0001f1ff":  # the letters that make flags
            c = chr(ord("A") + ord(c) - 0x1F1E6)
        elif "\U0001f150" <= c <= "\U0001f189" and (ord(c) - 0x1F150) % 32 < 26:  # white letters on black
            c = chr(ord("A") + (ord(c) - 0x1F150) % 32)
        elif kind == "No" and unicodedata.digit(c, None) is not None:
            c = str(unicodedata.digit(c))
        seen.append(c)
    text = re.sub(r"\s*\n\s*", "\n", "".join(seen)[:longest])
    return re.sub(r"[^\S\n]{3,}", "  ", text)  # two spaces part the words of a text that is spelt out


def _readings(text: str) -> list[str]:
    """Return what the letters may stand for: without accents, look-alikes, spelt-out words and leet."""
    find = rules()
    plain = re.sub(rf"(?<=[A-Za-z])[{ACCENTS}]+", "", unicodedata.normalize("NFD", text))
    plain = unicodedata.normalize("NFC", plain)
    # A Cyrillic letter among Latin ones hides a word.
    bare = plain.translate(find.lookalikes) if _script(plain) in (None, "LATIN") else plain
    joined = find.spaced.sub(lambda run: re.sub(r"[\W_]", "", run[0]), bare)

    def letters(word: re.Match) -> str:
        return word[0].translate(find.leet) if re.search(r"[\d@$]", word[0]) else word[0]

    meant = re.sub(r"[A-Za-z\d@$]*[A-Za-z][A-Za-z\d@$]*", letters, joined)
    tidy = [re.sub(r"[*_~`]+", "", re.sub(r"[^\S\n]+", " ", reading)) for reading in (plain, bare, meant)]
    return list(dict.fromkeys(tidy))


def _speaks_to_the_judge(text: str, theirs: str) -> bool:
    """Return whether a sentence grades the reply or gives orders about it, in English or another language."""
    find = rules()
    named = {stem.lower() for stem in find.rubric_words.findall(text)}
    if find.to_the_judge.search(text) or len(named) >= find.limits.rubric_words:
        return True
    # Of other languages only stems are known: some that a reply has no reason to join in one sentence (grade,
    # its height, the reply; a judge; an order to drop something). What the person spoke of does not count.
    for sentence in re.split(r"[.!?\n\u3002\u0964;]+", text):
        has = {name for name, stem in find.stems.items() if stem.search(sentence)}
        if len(has) > 1:
            has -= {name for name in has & {"grade", "judge", "orders"} if find.stems[name].search(theirs)}
        if any(has.issuperset(order) for order in find.orders):
            return True
    return False


def _hides(reply: str, text: str, words: list[str]) -> bool:
    """Return whether letters are invisible, turned, of two alphabets, spelt out, or leet."""
    find = rules()
    if find.unseen.search(unicodedata.normalize("NFC", reply)):
        return True
    turned = re.search(r"[\u202a\u202b\u2066-\u2069]", reply)
    if turned and not any(unicodedata.bidirectional(c) in ("R", "AL") for c in reply):
        return True
    latin = _script(text) in (None, "LATIN")
    if any(_mixes_alphabets(word, latin) for word in WORD.findall(text)):
        return True
    # One spelt-out word is emphasis ("C O N G R A T S"); two telling ones are a message.
    spelt = re.sub(r"[\W_]", "", "".join(run[0] for run in find.spaced.finditer(text)))
    leet = {word for word in words if len(re.findall(r"[a-z](?=[013457])|[013457](?=[a-z])", word)) >= 2}
    return len(find.spelt.findall(spelt)) >= find.limits.spelt_words or len(leet) >= find.limits.leet_words


def _mixes_alphabets(word: str, latin: bool) -> bool:
    """Return whether a word has Latin letters and others that look like them (\u03bcm and \u03c0r pass)."""
    if word.isascii() or not re.search(r"[A-Za-z]", word):
        return False
    names = [unicodedata.name(c, "?").split()[0] for c in word if c.isalpha()]
    if len(names) <= 3 or not set(names).intersection(rules().alphabets):
        return False
    switches = sum(a[0] != b[0] for a, b in zip(names, names[1:]))
    return (switches > 1 or latin) and not re.fullmatch(r"\d*[\u03bc\u03c9\u03c0]\w{1,3}", word)


def _echoes(words: list[str], said: Sequence[str]) -> bool:
    """Return whether most word pairs, or a whole passage, are the person's own; pmi would love it."""
    limits = rules().limits
    texts = [[word.lower() for word in WORD.findall(text)] for text in said]

    def shared(length: int) -> list[bool]:
        theirs = {run for text in texts for run in _runs(text, length)}
        return [run in theirs for run in _runs(words, length)]

    pairs = shared(2)
    mostly = len(words) >= limits.echo_words and sum(pairs) > limits.echo_share * len(pairs)
    return mostly or (len(words) >= limits.copied_words and any(shared(limits.copied_words)))


def _runs(words: list[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]


def _loops(words: list[str]) -> bool:
    """Return whether a reply is mostly one four-word run over and over, or of very few words."""
    limits = rules().limits
    if len(words) < limits.loop_words:
        return False
    # Three times at least: a refrain of two is a figure of speech.
    count = Counter(_runs(words, 4)).most_common(1)[0][1]
    looped = count >= 3 and 4 * count > limits.loop_share * len(words)
    return looped or len(set(words)) < limits.distinct_share * len(words)


def _gibberish(words: list[str]) -> bool:
    """Return whether most Latin words cannot be said: four letters without vowel, six consonants in a row."""
    latin = [word for word in words if re.fullmatch(r"[a-z]{4,}", word)]
    odd = [w for w in latin if not re.search(r"[aeiouy]", w) or re.search(r"[bcdfghjklmnpqrstvwxz]{6,}", w)]
    return len(latin) >= 3 and len(odd) > rules().limits.odd_share * len(latin)


def _scripts(text: str) -> Counter:
    """Count the letters of each script; Chinese signs and Japanese kana count as one."""
    names = (unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())
    return Counter("CJK" if name in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA") else name for name in names)


def _script(text: str) -> str | None:
    """Return the script most letters belong to (LATIN, CYRILLIC, CJK, ..); None if they are few or mixed."""
    count, limits = _scripts(text), rules().limits
    if count.total() < limits.script_letters:
        return None
    name, n = count.most_common(1)[0]
    return name if n > limits.script_share * count.total() else None


def _foreign(text: str, theirs: str) -> bool:
    """Return whether most of a reply, or more than a phrase, is in a script that the person never used."""
    mine, other, limits = _script(text), _script(theirs), rules().limits
    if other is None or (mine and mine != other):
        return other is not None
    strange = {name: n for name, n in _scripts(text).items() if name not in {*_scripts(theirs), "LATIN"}}
    signs = max(strange.pop("CJK", 0), strange.pop("HANGUL", 0))
    return signs > limits.foreign_signs or max(strange.values(), default=0) > limits.foreign_letters
