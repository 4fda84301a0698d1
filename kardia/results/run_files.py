"""Read what a run wrote down.

The report, `explain` and the warnings start here. They read only the files named in run_files.yaml. An absent
file reads as nothing. A file may be damaged or come from somebody else: a value of another kind than
run_files.yaml says is left out, so no later code has to ask again.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import yaml

from kardia.core.console import UserError, shorten
from kardia.data.rubric import DEFAULT_FORMAT

# Characters of a text, keys of a record, items of a list: more than any run writes.
TEXT, NAMES, ITEMS = 100_000, 200, 10_000


@functools.cache
def _kinds() -> dict[str, dict]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


class ReportError(UserError):
    """Raise for a run that cannot be read: one line that names the file."""


def _is(value, kind) -> bool:
    return isinstance(value, type(kind)) if kind is not None else not isinstance(value, (dict, list))


def _of_kind(value, kind):
    """Return `value` without its parts that are not of `kind`."""
    if isinstance(kind, dict):
        entries = [
            (str(key)[:NAMES], value[key], kind.get(key, kind.get("*"))) for key in list(value)[:NAMES]
        ]
        return {key: _of_kind(each, wanted) for key, each, wanted in entries if _is(each, wanted)}
    if kind == [None]:
        # The columns of tokens.jsonl must stay aligned, so an odd entry is kept as unknown.
        return [_of_kind(each, None) if _is(each, None) else None for each in value[:ITEMS]]
    if isinstance(kind, list):
        return [_of_kind(each, kind[0]) for each in value[:ITEMS] if _is(each, kind[0])]
    return value[:TEXT] if isinstance(value, str) else value


def _parse(text: bytes, where: str, kind: dict) -> dict:
    try:
        value = json.loads(text.decode("utf-8"), parse_constant=lambda _: None)  # NaN means "unknown" here
    except RecursionError:
        raise ReportError(f"{where}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise ReportError(f"{where}: not valid JSON ({shorten(str(error), 80)})") from None
    if not isinstance(value, dict):
        raise ReportError(f"{where}: found a {type(value).__name__}, expected an object")
    return _of_kind(value, kind)


def _read(path: Path, kind: dict) -> dict | list[dict] | None:
    """Return the object of a .json file (None if absent), or the objects of a .jsonl file ([] if absent)."""
    try:
        text = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror})") from error
    if path.suffix == ".json":
        return None if text is None else _parse(text, str(path), kind)
    lines = [(n, line) for n, line in enumerate((text or b"").split(b"\n"), 1) if line.strip()]
    rows = []
    for n, line in lines:
        try:
            rows.append(_parse(line, f"{path}:{n}", kind))
        except ReportError:
            # A killed run may leave its last line unfinished. Any other torn line is damage.
            if n != lines[-1][0]:
                raise
    return rows


def read_run(path: Path) -> dict:
    """Read the run directory `path` as {name, run, log, completions, tokens, evaluation, exam, export}.

    log, completions, tokens and held_out (also in it) are lists of dicts in file order; the others are dicts
    or None. exam is exam.json, or else what run.json stores. Raises ReportError for no directory or a damaged
    file."""
    path = Path(path)
    if not path.is_dir():
        raise ReportError(f"{path}: no such run directory")
    data = {name.split(".")[0]: _read(path / name, kind) for name, kind in _kinds().items()}
    exam = data["exam"] or (data["run"] or {}).get("judge_exam")
    for row in [*data["completions"], *((exam or {}).get("criteria") or {}).values()]:
        if "held_out" in row:  # runs of 0.1 asked the judge itself in other words
            row.setdefault("witness", row.pop("held_out"))
    return {"name": path.resolve().name, **data, "exam": exam}


def answer_format_of(data: dict) -> dict:
    """Return {spans, label, reply} of a run's answers; those of Kardia-R1 if the run names none."""
    form = (data["run"] or {}).get("form")
    form = form if isinstance(form, dict) else {}
    spans = form.get("spans")
    spans = spans if isinstance(spans, list) else DEFAULT_FORMAT.names
    label, reply = form.get("label") or DEFAULT_FORMAT.label, form.get("reply") or DEFAULT_FORMAT.reply
    return {"spans": list(map(str, spans)), "label": str(label), "reply": str(reply)}


def is_grpo(data: dict) -> bool:
    """Return whether the run is GRPO, also when run.json is missing."""
    named = (data["run"] or {}).get("command") == "grpo"
    return named or bool(data["completions"]) or any("reward" in row for row in data["log"])


# ---------------------------------------------------------------------------------- numbers


def number(value) -> float | None:
    """Return a measured number as a float, None if it is none. Above 1e15 its square might overflow."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e15:
        return None
    return float(value)


def mean_of(values: list[float]) -> float | None:
    """Return the mean, None of an empty list."""
    return sum(values) / len(values) if values else None


def fixed(value, digits: int = 2, sign: bool = False, none: str = "–") -> str:
    """Return a number as text with `digits` decimals and a true minus sign; `none` if it is unknown."""
    known = number(value)
    if known is None:
        return none
    return f"{known:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def series(log: list[dict], key: str) -> list[tuple[float, float]]:
    """Return [(step, value)] of one key of the log, in order of step."""
    pairs = [(number(row.get("step", i + 1)), number(row.get(key))) for i, row in enumerate(log)]
    return sorted((x, y) for x, y in pairs if x is not None and y is not None)


def quarters(log: list[dict], key: str) -> tuple[float, float] | None:
    """Return the means of the first and of the last quarter of the steps; None under eight steps."""
    values = [y for _, y in series(log, key)]
    n = len(values) // 4
    return (mean_of(values[:n]), mean_of(values[-n:])) if n >= 2 else None


def moves_of(row: dict) -> list[tuple[str, float | None, float | None]]:
    """Return [(token, log-prob before, after)] of one line of tokens.jsonl."""
    columns = (row.get(key, []) for key in ("tokens", "before", "after"))
    return [(str(token), number(before), number(after)) for token, before, after in zip(*columns)]
