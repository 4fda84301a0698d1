"""Talk to the person: one-line errors, progress on stderr, and text that is safe to show."""

from __future__ import annotations

import re
import reprlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from kardia.core import distributed

# Escape sequences, marks that turn the direction of text, and half characters.
CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class UserError(click.ClickException):
    """A mistake that the user can mend: one line (value, rule, fix), exit 1, no traceback."""

    def format_message(self) -> str:
        # A shown value may come from a downloaded file: an escape sequence in it must not reach the terminal.
        return "\n".join(printable(line) for line in self.message.split("\n"))

    def show(self, file=None) -> None:
        distributed.speak_after_the_first()
        super().show(file)


def printable(value: Any, instead: str = " ") -> str:
    """Return `value` as text for a terminal; each control character and line end becomes a space."""
    return "".join(c if c.isprintable() else instead for c in str(value))


def one_line(error: BaseException) -> str:
    """Return the first line of an exception that another library raised, at most 200 characters."""
    lines = str(error).strip().splitlines() or [""]
    return shorten(lines[0], 200) or type(error).__name__


def shorten(value: Any, width: int = 60) -> str:
    """Return a value of any size for a message: one printable line of at most `width` characters."""
    text = value if isinstance(value, str) else _short.repr(value)
    text = printable(" ".join(text[: 4 * width].split()), "?")
    return text if len(text) <= width else text[: width - 3] + "..."


class _ShortRepr(reprlib.Repr):
    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write an integer of more than 4,300 digits.
        return repr(value) if value.bit_length() < 200 else f"an integer of {value.bit_length()} bits"


_short = _ShortRepr()
_short.maxlevel, _short.maxstring, _short.maxother = 3, 60, 60
_displays: list[Any] = []  # rich consoles whose last lines are redrawn just now, the newest last


@contextmanager
def show_above(console: Any) -> Iterator[None]:
    """Print what `say` says above the display that this rich console redraws, while the block runs."""
    _displays.append(console)
    try:
        yield
    finally:
        _displays.remove(console)


def say(text: str = "") -> None:
    """Print progress on stderr (stdout is for results), in the first of several processes only."""
    if distributed.rank():
        return
    if _displays:
        _displays[-1].print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        click.echo(text, err=True)


@contextmanager
def progress(title: str, total: float | None = None) -> Iterator[Callable[..., None]]:
    """Show how far a long task is: a bar with the time left on a terminal, else a line every tenth (stderr).

    Yields `on_progress(done, total=None)`; `done` is absolute, in any unit.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal or distributed.rank():
        yield _line_every_tenth(title, total)
        return
    columns = TextColumn("  {task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar, show_above(console):
        task = bar.add_task(title, total=total)
        yield lambda done, total=total: bar.update(task, completed=done, total=total)


def _line_every_tenth(title: str, total: float | None) -> Callable[..., None]:
    """Return an `on_progress` for logs: one line per tenth of the task, and at most one in 10 seconds."""
    last_tenth, last_time = 0, time.monotonic()

    def on_progress(done: float, total: float | None = total) -> None:
        nonlocal last_tenth, last_time
        tenth = int(done * 10 // total) if total else 0
        if tenth > last_tenth and time.monotonic() - last_time > 10:
            last_tenth, last_time = tenth, time.monotonic()
            say(f"  {title} {tenth * 10}%")

    return on_progress
