"""Fill the Jinja templates of this folder: the report as HTML, `explain` and the toy lesson as plain text."""

from __future__ import annotations

import functools
import json
import math
import textwrap
from pathlib import Path

from kardia.core.console import CONTROL, printable
from kardia.data.rows import split_spans
from kardia.results.run_files import fixed, number

WIDTH = 100  # columns of a text


def clip(value, most: int = 600) -> str:
    """Return any value of a run as text without control characters, cut after `most` characters."""
    text = "" if value is None else CONTROL.sub(" ", str(value)[: most + 1])
    return text if len(text) <= most else text[:most].rstrip() + " […]"


def place(value) -> str:
    """Return the position on a track from 0 to 1, in percent."""
    return f"{100 * min(1.0, max(0.0, number(value) or 0.0)):.1f}%"


def duration(seconds) -> str:
    """Return seconds as "50 s", "10 min" or "2.5 h"; "" if unknown."""
    seconds = number(seconds) or 0.0
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds else ""
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _line(text: str, label="", most: int = 100_000) -> str:
    """Return `label` and the text in lines of at most WIDTH columns, without control characters."""
    clean = printable(f"{label:<11} {text}"[:most])
    return textwrap.fill(clean, WIDTH, initial_indent="  ", subsequent_indent=" " * 14)


def _quoted(token: str) -> str:
    clean = "".join(c if c.isprintable() or c == "\n" else "?" for c in token)
    return json.dumps(clean, ensure_ascii=False)


def ratio(move: float) -> float:
    """Return p(after) / p(before) of one token, without overflow on a damaged number."""
    return math.exp(min(50.0, move))


@functools.cache  # compiling takes longer than printing a small run
def template(name: str):
    """Return a template. HTML escapes every value that it prints and cuts it at 4,000 characters."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    html = name.endswith(".html.j2")

    def shown(value):
        return clip(value, 4000) if html and not isinstance(value, Markup) else value

    style = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": not html}
    # `finalize` sees every value that the template prints, before it is escaped.
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=html, finalize=shown, **style
    )
    page.filters.update(fixed=fixed, clip=clip, place=place, duration=duration, spans=split_spans, svg=Markup)
    page.filters.update(line=_line, quoted=_quoted, ratio=ratio)
    page.globals.update(number=number)
    return page.get_template(name)
