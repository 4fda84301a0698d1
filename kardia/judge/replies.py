"""Read files of replies for the judge: people's own rows, or what a GRPO run drew."""

from __future__ import annotations

from pathlib import Path

from kardia.core.console import UserError, shorten
from kardia.core.files import json_lines
from kardia.data.rubric import AnswerFormat
from kardia.judge.judge import JudgedReply

ROW = "{messages: [{role: user or assistant, content}], response, persona?, situation?}, all texts"


def read_replies(file: Path, form: AnswerFormat) -> tuple[list[dict], list[JudgedReply]]:
    """Return (rows, what the judge reads of each); of a row of completions.jsonl the completion is the reply.

    Raises UserError with every bad line of the file.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected JSONL rows with messages and response")
    rows, replies, errors = [], [], []
    for number, row, problem in json_lines(file):
        drawn = {"response": row["completion"]} if isinstance(row, dict) and "completion" in row else {}
        try:
            replies.append(JudgedReply.from_row(drawn | row if drawn else row, form))
            rows.append(row)
        except ValueError:
            errors.append(f"{file}:{number}: found {problem or shorten(row)} / expected {ROW}")
    if errors or not rows:
        raise UserError("\n".join(errors[:50]) or f"{file}: no rows")
    return rows, replies
