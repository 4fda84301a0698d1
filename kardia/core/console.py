"""Talk to the person: one-line errors, progress on stderr, options declared once, text made safe for a terminal."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import reprlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any

import click

from kardia.core import distributed


class UserError(click.ClickException):
    """A mistake the user can mend: one line (value, rule, fix), exit 1, no traceback."""

    def format_message(self) -> str:
        """Without control characters: the value shown may come from a stranger's file."""
        return "\n".join(
            "".join(c if c.isprintable() else " " for c in line) for line in self.message.split("\n")
        )

    def show(self, file=None) -> None:
        distributed.speak_after_the_first()
        super().show(file)


SCREEN: list[Any] = []  # the rich console of what is being redrawn, if something is


def say(text: str = "") -> None:
    """Progress for a person, on stderr; stdout is kept for the product. Of several processes the first one speaks."""
    if distributed.rank():
        return
    if SCREEN:
        SCREEN[-1].print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        click.echo(text, err=True)


@contextmanager
def progress(title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Something long is going on: a bar with the time left on a terminal, else a line every tenth, at most every 10 s (stderr).

    Yields `at(done, total=None)`; `done` is in any unit, absolute.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console, told = Console(stderr=True), [0, time.monotonic()]
    if not console.is_terminal or distributed.rank():

        def tell(done: float, of: float | None = None) -> None:
            of = of or total
            if of and done * 10 // of > told[0] and time.monotonic() - told[1] > 10:
                told[:] = int(done * 10 // of), time.monotonic()
                say(f"  {title} {told[0] * 10}%")

        yield tell
        return
    columns = TextColumn("  {task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        SCREEN.append(console)
        task = bar.add_task(title, total=total)
        try:
            yield lambda done, of=None: bar.update(task, completed=done, **({"total": of} if of else {}))
        finally:
            SCREEN.remove(console)


def option(default: Any, help: str, **extra: Any) -> Any:
    """One option, declared once: its field name, type and default make the command line, run.json and the manual."""
    return field(default=default, metadata={"help": help, **extra})


class Finite(click.FloatRange):
    """A number: neither NaN, which is not smaller than any minimum, nor infinite."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def options(cls: type) -> Any:
    """A dataclass of knobs as click options; the command receives one `options` record."""

    def decorate(function):
        @functools.wraps(function)
        def command(**kwargs):
            record = cls(**{f.name: kwargs.pop(f.name) for f in dataclasses.fields(cls)})
            return function(options=record, **kwargs)

        own = [f for f in dataclasses.fields(cls) if f.name in cls.__annotations__]
        shared = [f for f in dataclasses.fields(cls) if f.name not in cls.__annotations__]
        for f in reversed(
            [*own, *shared]
        ):  # in the manual: what is special to the command first, seed and rubric last
            meta, kind = (
                f.metadata,
                {
                    "Path": click.Path(path_type=Path),
                    "Path | None": click.Path(path_type=Path),
                    "int": int,
                    "float": float,
                    "str": str,
                }.get(f.type),
            )
            if f.type == "bool":
                command = click.option(f"--{f.name.replace('_', '-')}", is_flag=True, help=meta["help"])(
                    command
                )
                continue
            if "choices" in meta and f.type == "str":
                kind = click.Choice(meta["choices"])
            elif "choices" in meta:
                kind = click.Choice([str(c) for c in meta["choices"]])
                command = _as_int(command, f.name)
            elif "min" in meta and f.type == "int":
                kind = click.IntRange(min=meta["min"], max=meta.get("max", 2**31 - 1))
            elif "min" in meta:
                kind = Finite(min=meta["min"], max=meta.get("max"))
            default = (
                os.path.relpath(f.default, Path.cwd())
                if isinstance(f.default, Path) and f.default.is_relative_to(Path.cwd())
                else f.default
            )
            metavar = (
                None if "choices" in meta else {"int": "N", "float": "X", "str": "TEXT"}.get(f.type, "FILE")
            )
            command = click.option(
                f"--{f.name.replace('_', '-')}",
                type=kind,
                default=str(default) if "choices" in meta else default,
                help=meta["help"],
                show_default=True,
                metavar=metavar,
            )(command)
        return command

    return decorate


def _as_int(function, name):
    @functools.wraps(function)
    def command(**kwargs):
        return function(**{**kwargs, name: int(kwargs[name])})

    return command


def one_line(error: BaseException) -> str:
    """The first line of an exception of somebody else's library."""
    return shorten((str(error).strip().splitlines() or [""])[0], 200) or type(error).__name__


CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)  # escapes, what turns the direction of text, half characters


def printable(value) -> str:
    """Text of a run for a terminal: control characters (escape sequences, direction marks, line ends) become spaces."""
    return "".join(c if c.isprintable() else " " for c in str(value))


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 60, 60

    def repr_int(self, value, level) -> str:  # a text of over 4,300 digits Python refuses to make
        return repr(value) if value.bit_length() < 200 else f"an integer of {value.bit_length()} bits"


def shorten(value, width: int = 60) -> str:
    """A found value for a message: one line of at most `width` characters without control characters, however large or deep it is."""
    text = value[: 4 * width] if isinstance(value, str) else _Shown().repr(value)
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text[: 4 * width].split()))
    return text if len(text) <= width else text[: width - 3] + "..."
