"""Declare an option once: a dataclass field gives the command line, run.json and the manual."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

PROJECT = Path(__file__).resolve().parents[2]  # the directory of kardia_lite.py
DATA = PROJECT / "data"
RUBRIC = PROJECT / "rubrics.yaml"


def option(default: Any, help: str, **limits: Any) -> Any:
    """Return a field that is an option. Limits: min, max, choices; `free` if a resumed run may change it."""
    return field(default=default, metadata={"help": help, **limits})


class Finite(click.FloatRange):
    """Accept a finite number. (NaN passes every comparison with a minimum.)"""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


@dataclass
class CommonOptions:
    """Hold the options that every command shares."""

    seed: int = option(0, "Seed of everything random.", min=0, max=2**32 - 1)
    rubric: Path = option(RUBRIC, "Criteria, judge wording, reward weights, emotion labels.")
    offline: bool = option(False, "Never ask the hub (always so when model and judge are local).")


def options(cls: type) -> Any:
    """Return a decorator that adds a dataclass's fields as options; the command gets one record of them."""

    def decorate(function):
        @functools.wraps(function)
        def command(**values):
            own = {f.name: values.pop(f.name) for f in dataclasses.fields(cls)}
            return function(options=cls(**own), **values)

        # The manual shows the command's own options first, the inherited ones (seed, rubric) last.
        fields = sorted(dataclasses.fields(cls), key=lambda f: f.name not in cls.__annotations__)
        for f in reversed(fields):
            command = _click_option(f)(command)
        return command

    return decorate


def _click_option(f: dataclasses.Field):
    name, limits = f"--{f.name.replace('_', '-')}", f.metadata
    if f.type == "bool":
        return click.option(name, is_flag=True, help=limits["help"])
    if f.type.startswith("tuple"):
        return click.option(name, multiple=True, help=limits["help"], metavar=limits["metavar"])
    default, metavar = f.default, {"int": "N", "float": "X", "str": "TEXT"}.get(f.type, "FILE")
    if isinstance(default, Path) and default.is_relative_to(Path.cwd()):
        default = os.path.relpath(default, Path.cwd())
    if "choices" in limits:
        kind, metavar = click.Choice(limits["choices"]), None
    elif f.type == "int":
        kind = click.IntRange(limits.get("min"), limits.get("max", 2**31 - 1))
    elif f.type == "float":
        kind = Finite(limits.get("min"), limits.get("max"))
    else:
        kind = str if f.type == "str" else click.Path(path_type=Path)
    shown = {"help": limits["help"], "show_default": True, "metavar": metavar}
    return click.option(name, type=kind, default=default, **shown)
