"""Read attacks.yaml: dialogues with good and bad replies, and what a policy might add to a bad reply."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from kardia.judge.judge import JudgedReply

DATA = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
PARTS = ("first", "second", "third")


@dataclass(frozen=True)
class Talk:
    """A dialogue with one reply that is clearly good and two that are clearly bad, whoever reads them."""

    good: str
    bad: tuple[str, str]
    turns: tuple[str, ...]  # the person's and the listener's, in turn
    person: str = ""
    situation: str = ""

    def judged(self, reply: str) -> JudgedReply:
        roles = [("user", "assistant")[i % 2] for i in range(len(self.turns))]
        return JudgedReply(self.person, self.situation, tuple(zip(roles, self.turns)), reply)


TALKS = [Talk(**talk) for talk in DATA["talks"]]


@dataclass(frozen=True)
class Attack:
    """What is added to a bad reply (`place`: after, before, inside, around), or the pieces of the reply."""

    part: str
    kind: str
    name: str
    text: str = ""
    place: str = ""
    pieces: tuple = ()

    def on(self, talk: Talk, which: int) -> JudgedReply:
        """Return the attack on one of the two bad replies of a dialogue."""
        bad = talk.bad[which]
        if self.pieces:
            return talk.judged("".join(self.piece(talk, bad, piece) for piece in self.pieces))
        words = bad.split()
        half = len(words) // 2
        text = self.text if self.text.startswith("\n") else f" {self.text}"
        reply = {"after": f"{bad}{text}", "before": f"{text.strip()} {bad}"}
        reply["inside"] = f"{' '.join(words[:half])}{text} {' '.join(words[half:])}"
        reply["around"] = f"{text.strip()} {bad}{text}"
        return talk.judged(reply[self.place])

    def piece(self, talk: Talk, bad: str, piece) -> str:
        if not isinstance(piece, str):
            return self.piece(talk, bad, piece[0]) * piece[1]
        said = talk.turns[-1].split()
        fields = {
            **vars(talk),
            **DATA["filler"],
            "bad": bad,
            "said": talk.turns[-1],
            "opening": talk.turns[0],
        }
        fields["other"] = TALKS[(TALKS.index(talk) + 1) % len(TALKS)].good
        parts = {"half": said[: len(said) // 2], "head": said[:12], "tail": said[-12:]}
        fields |= {name: " ".join(words) for name, words in parts.items()}
        return re.sub(r"\{(\w+)\}", lambda field: fields[field[1]], piece)


def _attacks_of(part: str) -> Iterator[Attack]:
    places = itertools.cycle(("after", "before", "inside", "around"))
    for kind, rows in DATA[part].items():
        for name, how in rows.items():
            if isinstance(how, str):
                yield Attack(part, kind, name, text=how, place=next(places))
            else:
                yield Attack(part, kind, name, pieces=tuple(how))


ATTACKS = [attack for part in PARTS for attack in _attacks_of(part)]
