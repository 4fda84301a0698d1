"""Rows and the answers in them: span markers, one span of a text, a profile that is not given."""

from __future__ import annotations

import bisect
import re
from collections import defaultdict

NO_PROFILE = (
    "No profile is given."  # what imports write where a data set has no persons: nobody's, so it cannot leak
)

WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
MARKER = re.compile(r"<\|(\w+)_(begin|end)\|>")


def find_span(text: str, name: str) -> str | None:
    """One span of a text that need not be valid as a whole; None if it is not there. The first one counts."""
    _, begun, rest = text.partition(f"<|{name}_begin|>")
    inside, ended, _ = rest.partition(f"<|{name}_end|>")
    return inside.strip() if begun and ended else None


def split_spans(text) -> list[tuple[str, str]]:
    """[(span name, its text)] of a reply, in order; "" names what stands outside every well-formed span. A model may repeat a
    marker a thousand times: each is looked at once."""
    parts, end, text = [], 0, str(text or "")
    marks, ends = list(MARKER.finditer(text)), defaultdict(list)
    for mark in marks:
        if mark[2] == "end":
            ends[mark[1]].append(mark.start())
    for mark in marks:
        closing = ends[mark[1]]
        if (
            mark[2] == "begin"
            and mark.start() >= end
            and (i := bisect.bisect(closing, mark.start())) < len(closing)
        ):
            parts += [
                ("", text[end : mark.start()].strip()),
                (mark[1], text[mark.end() : closing[i]].strip()),
            ]
            end = closing[i] + len(f"<|{mark[1]}_end|>")
    return [(name, piece) for name, piece in [*parts, ("", text[end:].strip())] if name or piece]
