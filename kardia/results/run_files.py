"""What a run wrote down, read back: its files, its groups, and the arithmetic of one group.

Everything told about a run (report, explain, alarms) starts here, and reads only run.json, log.jsonl, completions.jsonl,
tokens.jsonl, evaluation.json, exam.json and export.json. Whatever is absent reads as nothing.

    advantage_i = (reward_i - mean(rewards of the group)) / (std(rewards of the group) + 1e-4)       std with n - 1, as TRL
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from kardia.core.console import shorten

EPSILON = 1e-4  # TRL's, in the denominator of the advantage


class ReportError(RuntimeError):
    """A run that cannot be reported: one line for the user, naming the file."""


# ---------------------------------------------------------------------------------- reading a run


# What is read of a run, and of which kind: {key: kind}, "*" any other key, [kind] a list of them, None a text, a number or a
# bool. A file may be damaged or a stranger's: what is of another kind is left out, so nothing after this needs to ask again.
FLAT, MEASURED = {"*": None}, {"*": {"*": None}}
ANSWER = {"answers": [None], "*": None}
EXAM = {
    "criteria": {"*": {"methods": MEASURED, "length": MEASURED, "held_out": FLAT, "*": None}},
    "canaries": {"failed": {"*": [None]}, "*": None},
    "repeatability": FLAT,
    "overall": FLAT,
    "*": None,
}
RUN = {
    **dict.fromkeys(("options", "versions", "hashes", "memory_plan", "setting", "reward_trend"), FLAT),
    "judge_exam": EXAM,
    "form": {"spans": [None], "*": None},
    "dropped_criteria": [None],
    "ladder": [FLAT],
    "*": None,
}
PROMPT = {"messages": [FLAT], "*": None}
COMPLETION = {**PROMPT, **dict.fromkeys(("components", "criteria", "weights", "held_out"), FLAT)}
TOKENS = {"tokens": [None], "before": [None], "after": [None], "*": None}
EVALUATION = {
    "models": [None],
    "metrics": {"*": MEASURED},
    "differences": [FLAT],
    "win_rate": [FLAT],
    "examples": [{**PROMPT, "answers": {"*": {"scores": FLAT, "*": None}}}],
    "*": None,
}
EXPORT = {"formats": {"*": ANSWER}, "trained": ANSWER, "*": None}
TEXT, NAMES, ITEMS = (
    100_000,
    200,
    10_000,
)  # characters of a text, keys of a record, items of a list: far above what a run writes


def _of_kind(value, kind):
    if isinstance(kind, dict):
        kinds = (
            (str(key)[:NAMES], each, kind.get(key, kind.get("*")))
            for key, each in list(value.items())[:NAMES]
        )
        return {key: _of_kind(each, wanted) for key, each, wanted in kinds if _is(each, wanted)}
    if isinstance(kind, list):
        return [
            _of_kind(each, kind[0]) if _is(each, kind[0]) else None
            for each in value[:ITEMS]
            if _is(each, kind[0]) or kind[0] is None
        ]
    return value[:TEXT] if isinstance(value, str) else value


def _is(value, kind) -> bool:
    return isinstance(value, type(kind)) if kind is not None else not isinstance(value, (dict, list))


def _parse(text: bytes, where: str, kind: dict) -> dict:
    try:
        value = json.loads(text.decode("utf-8"), parse_constant=lambda _: None)  # NaN is "unknown" here
    except RecursionError:
        raise ReportError(f"{where}: not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise ReportError(f"{where}: not valid JSON ({shorten(str(error), 80)})") from None
    if not isinstance(value, dict):
        raise ReportError(f"{where}: found a {type(value).__name__}, expected an object")
    return _of_kind(value, kind)


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror})") from error


def _object(path: Path, kind: dict) -> dict | None:
    text = _bytes(path)
    return None if text is None else _parse(text, str(path), kind)


def _lines(path: Path, kind: dict) -> list[dict]:
    lines = [(n, line) for n, line in enumerate((_bytes(path) or b"").split(b"\n"), 1) if line.strip()]
    rows = []
    for number, line in lines:
        try:
            rows.append(_parse(line, f"{path}:{number}", kind))
        except ReportError:
            if number != lines[-1][0]:
                raise  # only the last line can be one that a killed run did not finish
    return rows


def read_run(path: Path) -> dict:
    """Everything recorded in the run directory `path`, as {name, run, log, completions, tokens, evaluation, exam, export}.

    log, completions and tokens are lists of dicts in file order ([] where the file is absent; a torn last line is skipped);
    the others are dicts or None, and all are of the kinds named above. exam is exam.json, or else the one stored in run.json.
    Raises ReportError when `path` is no directory or a file is malformed."""
    path = Path(path)
    if not path.is_dir():
        raise ReportError(f"{path}: no such run directory")
    run = _object(path / "run.json", RUN)
    return {
        "name": path.resolve().name,
        "run": run,
        "log": _lines(path / "log.jsonl", FLAT),
        "completions": _lines(path / "completions.jsonl", COMPLETION),
        "tokens": _lines(path / "tokens.jsonl", TOKENS),
        "evaluation": _object(path / "evaluation.json", EVALUATION),
        "exam": _object(path / "exam.json", EXAM) or (run or {}).get("judge_exam"),
        "export": _object(path / "export.json", EXPORT),
    }


def form_of(data: dict) -> dict:
    """{spans, label, reply} of a run's answers; Kardia's four spans where the run does not say."""
    told = (data["run"] or {}).get("form")
    told = told if isinstance(told, dict) else {}
    spans = (
        told.get("spans")
        if isinstance(told.get("spans"), list)
        else ["understanding", "reasoning", "emotion", "response"]
    )
    return {
        "spans": [str(span) for span in spans],
        "label": str(told.get("label") or "emotion"),
        "reply": str(told.get("reply") or "response"),
    }


def is_grpo(data: dict) -> bool:
    return (
        (data["run"] or {}).get("command") == "grpo"
        or bool(data["completions"])
        or any("reward" in row for row in data["log"])
    )


# ---------------------------------------------------------------------------------- numbers


def number(value) -> float | None:
    """A measured number. NaN, infinity and what is larger than anything a run measures (its square might be no number) are unknown."""
    return (
        float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15
        else None
    )


def mean_of(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def groups_of(completions: list[dict]) -> list[tuple[int, int, list[dict]]]:
    """[(step, group, samples)] in order of step. A resumed run rewrites its steps: the later record of a sample wins."""
    groups: dict[tuple[int, int], dict] = {}
    for row in completions:
        samples = groups.setdefault(
            (int(number(row.get("step")) or 0), int(number(row.get("group")) or 0)), {}
        )
        samples[number(row.get("sample", len(samples)))] = row
    return [(step, group, list(samples.values())) for (step, group), samples in sorted(groups.items())]


def rewards_of(samples: list[dict]) -> list[float | None]:
    return [number(sample.get("reward")) for sample in samples]


def spread_of(samples: list[dict]) -> float:
    known = [reward for reward in rewards_of(samples) if reward is not None]
    return max(known) - min(known) if known else 0.0


def advantages_of(rewards: list[float | None]) -> tuple[float | None, float, list[float]]:
    """(mean, std, advantages) of one group [G]; None takes no part and gets 0, as does everyone where fewer than two are known."""
    known = [reward for reward in rewards if reward is not None]
    mean = mean_of(known)
    if mean is None or len(known) < 2:
        return mean, 0.0, [0.0] * len(rewards)
    std = math.sqrt(sum((reward - mean) ** 2 for reward in known) / (len(known) - 1))
    return mean, std, [0.0 if reward is None else (reward - mean) / (std + EPSILON) for reward in rewards]


def parts_of(sample: dict) -> list[tuple[str, float, float | None]]:
    """[(component, weight, value)] of one sample: reward = sum of weight x value over the known ones."""
    weights, components = sample.get("weights") or {}, sample.get("components") or {}
    return [
        (name, number(weights.get(name)) or 0.0, number(components.get(name)))
        for name in {**weights, **components}
    ]


def series(log: list[dict], key: str) -> list[tuple[float, float]]:
    pairs = [(number(row.get("step", i + 1)), number(row.get(key))) for i, row in enumerate(log)]
    return sorted((x, y) for x, y in pairs if x is not None and y is not None)


def quarters(log: list[dict], key: str) -> tuple[float, float] | None:
    """Mean of the first and of the last quarter of the steps, None under eight steps."""
    values = [y for _, y in series(log, key)]
    n = len(values) // 4
    return (mean_of(values[:n]), mean_of(values[-n:])) if n >= 2 else None


def fixed(value, digits: int = 2, sign: bool = False, none: str = "–") -> str:
    known = number(value)
    return none if known is None else f"{known:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def means_of(samples: list[dict], kind: str) -> dict[str, float]:
    """Mean of each component or criterion over the samples that take part."""
    rows = [sample.get(kind) or {} for sample in samples if number(sample.get("reward")) is not None]
    known = {
        name: [v for v in (number(row.get(name)) for row in rows) if v is not None]
        for name in dict.fromkeys(n for row in rows for n in row)
    }
    return {name: mean_of(values) for name, values in known.items() if values}


def why_pushed(sample: dict, samples: list[dict]) -> str:
    """One plain sentence of numbers: which component carries this sample away from its group's mean."""
    reward, (mean, std, advantages) = number(sample.get("reward")), advantages_of(rewards_of(samples))
    if reward is None:
        return "Took no part: it has no reward, so its advantage is 0."
    if std < 1e-6:
        return "Not pushed: no two rewards of the group differ."
    advantage = next(value for other, value in zip(samples, advantages) if other is sample)
    means, sign = means_of(samples, "components"), 1 if advantage > 0 else -1
    moves = [
        (sign * weight * (value - means[name]), name, value)
        for name, weight, value in parts_of(sample)
        if value is not None and name in means
    ]
    if abs(advantage) < 0.05 or not moves or max(moves)[0] <= 0:
        return f"Hardly pushed: reward {fixed(reward)} against the group's mean {fixed(mean)}."
    gain, name, value = max(moves)
    out = f"Pushed {'up' if sign > 0 else 'down'} mostly by {name}: {fixed(value)} against a mean of {fixed(means[name])}, worth {fixed(sign * gain, sign=True)} of reward"
    base = means_of(samples, "criteria")
    tilts = [
        (sign * (number(score) - base[key]), key)
        for key, score in (sample.get("criteria") or {}).items()
        if number(score) is not None and key in base
    ]
    if name == "rubric" and tilts and max(tilts)[0] > 0:
        key = max(tilts)[1]
        out += f" (most of all {key.replace('_', ' ')}, {fixed(sample['criteria'][key])} against {fixed(base[key])})"
    return out + "."
