"""Talking to a model: an answer printed as it comes, and the few commands of an open-ended talk.

What a model says and what a person pastes are both untrusted: neither may send escape sequences to the terminal, and a
person's text cannot carry span markers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kardia.core.console import CONTROL, UserError, say
from kardia.data.rows import MARKER
from kardia.data.rubric import AnswerFormat

CRISIS = "This is a small language model, not a counsellor. If you or somebody near you is in danger, call your local emergency number or a crisis line."
HELP = """\
/new               forget this talk and begin another
/back              take the last turn back
/inner             show or hide the spans that are not for the person
/profile TEXT      who is talking     /situation TEXT   what happened
/save FILE.jsonl   add this talk to a file, as a row that `data check` takes
/quit              end (so does an empty line, or Ctrl-D); Ctrl-C stops an answer"""


def harmless(text: str) -> str:
    """What a person typed or pasted, without escapes and without span markers. A space takes a marker's place: what stood around it makes no new one."""
    return MARKER.sub(" ", CONTROL.sub(" ", text)).strip()


class Printer:
    """Writes one answer as it grows: inner spans dim on stderr, the reply on stdout. `feed` takes the whole text so far."""

    def __init__(self, form: AnswerFormat, inner: bool = True) -> None:
        self.form, self.inner = form, inner
        self.open: str | None = None  # the span that is being written
        self.at, self.replied, self.fresh = 0, False, True

    def feed(self, text: str, last: bool = False) -> None:
        text = CONTROL.sub(" ", text)
        while True:
            if self.open is None:
                begin = next(
                    (mark for mark in self.form.marker.finditer(text, self.at) if mark[2] == "begin"), None
                )
                if not begin:
                    return
                self.open, self.at, self.fresh = begin[1], begin.end(), True
            end = text.find(f"<|{self.open}_end|>", self.at)
            if end >= 0:
                self._write(text[self.at : end].rstrip())
                self._finish()
                self.at = end + len(f"<|{self.open}_end|>")
                self.open = None
                continue
            if last:
                self._write(text[self.at :].rstrip())
                self._finish()
                return
            marker = f"<|{self.open}_end|>"
            half = next(
                (n for n in range(len(marker) - 1, 0, -1) if text.endswith(marker[:n])), 0
            )  # perhaps its beginning
            stop = len(
                text[: len(text) - half].rstrip("\ufffd").rstrip()
            )  # nor half a character, nor a space before the end
            if stop > self.at:
                self._write(text[self.at : stop])
                self.at = stop
            return

    def close(self, text: str) -> None:
        """The answer is whole; one without a reply span is shown as it is, so that nothing is hidden."""
        self.feed(text, last=True)
        if not self.replied:
            click.echo(click.style(f"(no {self.form.reply} span; shown as it is)", dim=True), err=True)
            click.echo(self.form.marker.sub(" ", CONTROL.sub(" ", text)).strip())

    def _write(self, piece: str) -> None:
        piece = piece.lstrip() if self.fresh else piece
        if not piece:
            return
        reply = self.open == self.form.reply
        if reply:
            self.replied = True
            click.echo(piece, nl=False)
        elif self.inner:
            click.echo(
                click.style((f"[{self.open}] " if self.fresh else "") + piece, dim=True), nl=False, err=True
            )
        (sys.stdout if reply else sys.stderr).flush()
        self.fresh = False

    def _finish(self) -> None:
        if not self.fresh:
            if self.open == self.form.reply:
                click.echo()
            elif self.inner:
                click.echo(err=True)


def converse(dialogue, turn: Callable, stop: Callable[[], None], row: Callable[[Any], str]) -> None:
    """An open-ended talk. turn(dialogue, what was said, number, inner spans shown?) -> the longer dialogue; `stop()` ends an answer
    that Ctrl-C broke off; row(dialogue) -> its line for /save. `dialogue` is a record with person, situation and messages."""
    with contextlib.suppress(AttributeError, ValueError):
        sys.stdin.reconfigure(errors="replace")  # a line in another encoding is no end of the talk
    say(f"{CRISIS}\nType /help for commands.")
    inner, turns = True, 0
    while (said := (ask_person() or "").strip()) not in ("", "/quit"):
        command, _, rest = said.partition(" ")
        if command == "/new":
            dialogue = dataclasses.replace(dialogue, messages=())
        elif command == "/back":
            dialogue = dataclasses.replace(dialogue, messages=dialogue.messages[:-2])
        elif command == "/inner":
            inner = not inner
        elif command in ("/profile", "/situation") and rest:
            dialogue = dataclasses.replace(
                dialogue, **{"person" if command == "/profile" else "situation": harmless(rest)}
            )
        elif command == "/save" and rest and dialogue.messages:
            save_row(Path(rest), row(dialogue))
            say(f"added to {rest}")
        elif said.startswith("/"):
            say(HELP)
        else:
            try:
                dialogue, turns = turn(dialogue, said, turns, inner), turns + 1
            except KeyboardInterrupt:
                stop()
                say("\n(stopped; the turn is forgotten)")


def coloured(text: str, form: AnswerFormat) -> str:
    """An answer with each span in a colour of its own and its markers dim; control characters made harmless."""
    colours = dict(zip(form.names, itertools.cycle(("cyan", "magenta", "yellow", "green", "blue"))))
    pieces, at, inside = [], 0, None
    text = CONTROL.sub(" ", text)
    for mark in [*form.marker.finditer(text), None]:
        between = text[at : mark.start() if mark else len(text)]
        pieces.append(click.style(between, fg=colours[inside]) if inside else between)
        if mark:
            pieces.append(click.style(mark[0], dim=True))
            at, inside = mark.end(), mark[1] if mark[2] == "begin" else None
    return "".join(pieces)


def ask_person() -> str | None:
    """One line from the person, with editing and history where the terminal has them; None at the end of input."""
    try:
        import readline  # noqa: F401 - input() uses it once it is there
    except ImportError:
        pass
    try:
        click.echo(click.style("you> ", bold=True), nl=False, err=True)
        return input()
    except (EOFError, KeyboardInterrupt):
        click.echo(err=True)
        return None


def save_row(path: Path, row: str) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(row + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
