"""What a judge sees of a reply: the dialogue before it, and what the row says of a good one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kardia.core.console import UserError
from kardia.data.rows import NO_PROFILE, find_span
from kardia.data.rubric import DEFAULT_FORMAT, AnswerFormat, Criterion, row_criteria


def _own(row: Mapping[str, Any], form: AnswerFormat = DEFAULT_FORMAT) -> tuple[tuple[Criterion, ...], str]:
    """Return (a row's own criteria, its reference); () and "" for what means something else in other data."""
    entries, reference = row.get("rubric"), row.get("reference")
    text = reference if isinstance(reference, str) else ""
    try:
        criteria = row_criteria(json.dumps(entries)) if isinstance(entries, list) else ()
    except UserError:  # nothing reads it: where something does, the row was refused when it was loaded
        criteria = ()
    return criteria, find_span(text, form.reply) or text


@dataclass(frozen=True)
class JudgedReply:
    """One reply in its dialogue. `messages` is the history, plain texts, ending with the user's turn."""

    person: str
    situation: str
    messages: tuple[tuple[str, str], ...]  # (role, text)
    reply: str
    criteria: tuple[Criterion, ...] = ()  # of the row alone
    reference: str = ""  # a good reply, as the row gives it

    @classmethod
    def from_dialogue(cls, dialogue, reply: str, form: AnswerFormat = DEFAULT_FORMAT) -> JudgedReply:
        """Return what the judge sees of a Dialogue: of earlier answers only the span the person read."""
        turns = tuple((role, find_span(text, form.reply) or text) for role, text in dialogue.messages)
        return cls(dialogue.person, dialogue.situation, turns, reply, *_own(dialogue.row, form))

    @classmethod
    def from_pair(cls, pair: Mapping[str, Any], key: str) -> JudgedReply:
        """Return one side, "better" or "worse", of an exam pair."""
        turns = tuple((message["role"], message["content"]) for message in pair["messages"])
        return cls(pair.get("person", ""), pair.get("situation", ""), turns, pair[key], *_own(pair))

    @classmethod
    def from_row(cls, row: Any, form: AnswerFormat = DEFAULT_FORMAT) -> JudgedReply:
        """Return the reply of other people's row {messages, response, persona or person?, situation?}.

        Raises ValueError if the row is something else.
        """
        try:
            person, situation = row.get("persona") or row.get("person") or "", row.get("situation") or ""
            turns = [(message["role"], message["content"]) for message in row["messages"]]
            roles, texts = {role for role, _ in turns}, [row["response"], *(text for _, text in turns)]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError("not a row") from error
        if not all(isinstance(text, str) for text in (person, situation, *texts)):
            raise ValueError("not texts")
        if not roles <= {"user", "assistant", "system"} or "user" not in roles:
            raise ValueError("unknown roles")
        reply, *texts = [find_span(text, form.reply) or text for text in texts]
        plain = [(role, text) for (role, _), text in zip(turns, texts) if role != "system"]
        return cls(person, situation, tuple(plain), reply)

    @property
    def said(self) -> list[str]:
        """Return the person's own turns."""
        return [text for role, text in self.messages if role == "user"]

    @property
    def known(self) -> list[str]:
        """Return what else stands before the reply."""
        return [self.person, self.situation]

    @property
    def context(self) -> str:
        """Return the text before the reply; what is not known is not mentioned."""
        person = "" if self.person == NO_PROFILE else self.person
        known = {"Profile": person, "Situation": self.situation}
        lines = [f"{name}: {text}" for name, text in known.items() if text]
        blank = [""] if lines else []
        turns = [f"{'User' if role == 'user' else 'Listener'}: {text}" for role, text in self.messages]
        return "\n".join([*lines, *blank, *turns, "Listener:"])
