"""Talk to a model: an answer printed as it grows, and the few commands of an open-ended conversation.

What a model writes and what a person pastes are both untrusted: neither may send escape sequences to the
terminal, and a person's text cannot carry span markers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from kardia.core.console import CONTROL, UserError, say
from kardia.core.files import as_json_lines
from kardia.data.rows import MARKER, find_span
from kardia.data.rubric import AnswerFormat

CRISIS = """\
This is a small language model, not a counsellor. If you or somebody near you is in danger, call your local
emergency number or a crisis line."""
HELP = """\
/new               forget this conversation and begin another
/back              take the last turn back
/inner             show or hide the spans that are not for the person
/profile TEXT      who is talking     /situation TEXT   what happened
/save FILE.jsonl   add this conversation to a file, as a row that `data check` takes
/quit              end (so does an empty line, or Ctrl-D); Ctrl-C stops an answer"""


def harmless(text: str) -> str:
    """Return what a person typed, without escape sequences and span markers.

    A space replaces a marker: the text on its two sides cannot join into a new one.
    """
    return MARKER.sub(" ", CONTROL.sub(" ", text)).strip()


class Printer:
    """Writes one answer as it grows: the reply on stdout, the other spans dim on stderr."""

    def __init__(self, form: AnswerFormat, inner: bool = True) -> None:
        self.form, self.inner = form, inner
        self.span: str | None = None  # the span that is being written
        self.position = 0  # what stands before it is written
        self.replied, self.at_start = False, True

    def feed(self, text: str, last: bool = False) -> None:
        """Write what is certain of `text`, which is the whole text so far."""
        text = CONTROL.sub(" ", text)
        while self._next_piece(text, last):
            pass

    def close(self, text: str) -> None:
        """Write the rest. An answer without a reply span is shown as it is, so that nothing is hidden."""
        self.feed(text, last=True)
        if not self.replied:
            click.echo(click.style(f"(no {self.form.reply} span; shown as it is)", dim=True), err=True)
            click.echo(self.form.marker.sub(" ", CONTROL.sub(" ", text)).strip())

    def _next_piece(self, text: str, last: bool) -> bool:
        """Write up to the end of a span, or open the next one. Return whether there may be more."""
        if self.span is None:
            marks = self.form.marker.finditer(text, self.position)
            begin = next((mark for mark in marks if mark[2] == "begin"), None)
            if begin is None:
                return False
            self.span, self.position, self.at_start = begin[1], begin.end(), True
            return True
        marker = f"<|{self.span}_end|>"
        end = text.find(marker, self.position)
        if end < 0 and not last:
            # hold back what may be the beginning of the marker, half a character, or a space before the end
            half = next((n for n in range(len(marker) - 1, 0, -1) if text.endswith(marker[:n])), 0)
            certain = text[self.position : len(text) - half].rstrip("\ufffd").rstrip()
            self._write(certain)
            self.position += len(certain)
            return False
        self._write(text[self.position : end if end >= 0 else None].rstrip())
        if not self.at_start and (self.inner or self.span == self.form.reply):
            click.echo(err=self.span != self.form.reply)
        if end < 0:
            return False
        self.position, self.span = end + len(marker), None
        return True

    def _write(self, piece: str) -> None:
        if self.at_start:
            piece = piece.lstrip()
        if not piece:
            return
        if self.span == self.form.reply:
            self.replied = True
            click.echo(piece, nl=False)
            sys.stdout.flush()
        elif self.inner:
            label = f"[{self.span}] " if self.at_start else ""
            click.echo(click.style(label + piece, dim=True), nl=False, err=True)
            sys.stderr.flush()
        self.at_start = False


@dataclass
class Conversation:
    """A conversation with one model."""

    answer: Callable[[Any, int, Callable], str]  # (dialogue, seed, show the text so far) -> the whole answer
    stop: Callable[[], None]  # ends an answer that Ctrl-C broke off
    form: AnswerFormat
    dialogue: Any  # a frozen record with person, mbti, situation, anon_username, messages
    seed: int = 0
    inner: bool = True  # show the spans that are not for the person
    turns: int = 0

    def turn(self, text: str) -> None:
        """Say `text`, print the answer as it grows, and add both to the dialogue."""
        messages = (*self.dialogue.messages, ("user", harmless(text)))
        asked = dataclasses.replace(self.dialogue, messages=messages)
        printer = Printer(self.form, self.inner)
        answer = self.answer(asked, self.seed + self.turns, printer.feed)
        printer.close(answer)
        self._change(messages=(*messages, ("assistant", CONTROL.sub(" ", answer))))
        self.turns += 1

    def run(self) -> None:
        """Read lines from the person until they end the conversation."""
        with contextlib.suppress(AttributeError, ValueError):
            sys.stdin.reconfigure(errors="replace")  # another encoding must not end the conversation
        say(f"{CRISIS}\nType /help for commands.")
        while (line := (ask_person() or "").strip()) not in ("", "/quit"):
            if line.startswith("/"):
                self._command(line)
                continue
            try:
                self.turn(line)
            except KeyboardInterrupt:
                self.stop()
                say("\n(stopped; the turn is forgotten)")

    def _change(self, **fields) -> None:
        self.dialogue = dataclasses.replace(self.dialogue, **fields)

    def _command(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/new":
            self._change(messages=())
        elif command == "/back":
            self._change(messages=self.dialogue.messages[:-2])
        elif command == "/inner":
            self.inner = not self.inner
        elif command == "/profile" and rest:
            self._change(person=harmless(rest))
        elif command == "/situation" and rest:
            self._change(situation=harmless(rest))
        elif command == "/save" and rest and self.dialogue.messages:
            save_row(Path(rest), self.dialogue, self.form)
        else:
            say(HELP)


def ask_person() -> str | None:
    """Return one line from the person, edited as the terminal allows; None at the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() uses it once it is there
    try:
        click.echo(click.style("you> ", bold=True), nl=False, err=True)
        return input()
    except (EOFError, KeyboardInterrupt):
        click.echo(err=True)
        return None


def save_row(path: Path, dialogue, form: AnswerFormat) -> None:
    """Add a conversation to a JSONL file that `data check` takes, labelled as its last answer is.

    Raises UserError if the file cannot be written.
    """
    row = {"person": dialogue.person, "mbti": dialogue.mbti}
    row[form.label] = find_span(dialogue.messages[-1][1], form.label) or "?"
    row |= {"situation": dialogue.situation, "anon_username": dialogue.anon_username}
    row["messages"] = [{"role": role, "content": content} for role, content in dialogue.messages]
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(as_json_lines([row]))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    say(f"added to {path}")
