"""Write what runs did as one HTML page, from their directories alone.

The page needs no network and no script: figures are inline SVG, long parts fold with <details>. Runs share
their curves and a table of what differs; the rest stands side by side. Every text of a run is untrusted (a
model wrote it): it reaches the page through report.html.j2 only, which escapes all that it prints.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kardia.core.files import temporary_path
from kardia.results import tables, warnings
from kardia.results.browser import Limits, browse
from kardia.results.plots import charts_of, logged_names, write_png
from kardia.results.run_files import (
    ReportError,
    answer_format_of,
    fixed,
    is_grpo,
    mean_of,
    quarters,
    read_run,
    series,
)
from kardia.results.templates import duration, template

EXAMPLES = 6  # prompts of an evaluation whose answers are shown
PAGE_LIMIT = 2_900_000  # bytes; mail and chat tools start to refuse or to lag above 3 MB
# The first limits whose page is small enough are taken.
LIMITS = [Limits(12, 3000, 600), Limits(12, 3000, 200), Limits(12, 1000, 80), Limits(6, 400, 40)]
LIMITS.append(Limits(3, 150, 0))


# ---------------------------------------------------------------------------------- several runs


def _last_quarter(log: list[dict], key: str) -> str:
    values = [y for _, y in series(log, key)]
    return fixed(mean_of(values[-max(1, len(values) // 4) :]), 3)


def _ended(runs: list[dict]) -> list[list[str]]:
    """Return how each run ended: rows of [what, one cell per run]. Loss and accuracy are those of SFT."""
    logs, facts = [run["log"] for run in runs], [run["run"] or {} for run in runs]
    sft = [[] if is_grpo(run) else run["log"] for run in runs]  # GRPO's loss is another quantity
    names = dict.fromkeys(name for log in logs for name in logged_names(log, "rewards/", "/mean"))
    asked = [("reward", "reward", logs)]
    asked += [(f"reward, {name}".replace("_", " "), f"rewards/{name}/mean", logs) for name in names]
    asked += [("SFT loss", "loss", sft), ("token accuracy", "mean_token_accuracy", sft)]
    rows = [[title, *(_last_quarter(log, key) for log in each)] for title, key, each in asked]
    rows.append(["steps", *(f"{max((x for x, _ in series(log, 'step')), default=0):.0f}" for log in logs)])
    rows.append(["time", *(duration(fact.get("seconds")) or "–" for fact in facts)])
    rows.append(["peak memory, GB", *(fixed(fact.get("peak_memory_gb")) for fact in facts)])
    return [row for row in rows if any(cell not in ("–", "0") for cell in row[1:])]


def _differing(commands: list, values: list[dict]) -> list[list[str]]:
    """Return rows of the keys whose values differ.

    A key that only some runs of one command have differs too. What a whole command does not know (an option
    of GRPO, beside an SFT run) is no difference."""
    rows = []
    for name in dict.fromkeys(name for each in values for name in each):
        has = [name in each for each in values]
        known = {command for command, it_has in zip(commands, has) if it_has}
        different = {json.dumps(each[name], sort_keys=True) for each in values if name in each}
        absent = any(command in known and not it_has for command, it_has in zip(commands, has))
        if len(different) > 1 or absent:
            rows.append([name.replace("_", " "), *(str(each.get(name, "–")) for each in values)])
    return rows


def _differs(runs: list[dict]) -> list[tables.Table]:
    facts = [run["run"] or {} for run in runs]
    commands = [fact.get("command") for fact in facts]
    plain = ("machine", "model", "bits", "engine", "rollout")
    parts = {"Machine and model": [{k: f[k] for k in plain if f.get(k) is not None} for f in facts]}
    parts |= {key.capitalize(): [f.get(key) or {} for f in facts] for key in ("versions", "hashes")}
    parts = {"Options": [fact.get("options") or {} for fact in facts], **parts}
    rows = {"How they ended": _ended(runs)}
    rows |= {title: _differing(commands, values) for title, values in parts.items()}
    names = [run["name"] for run in runs]
    return [tables.Table(title, ["", *names], found) for title, found in rows.items() if found]


# ---------------------------------------------------------------------------------- the page


def _view(data: dict, look: int) -> dict[str, Any]:
    """Return what the template shows of one run, but for the groups: these depend on the limits."""
    run, evaluation, exam, export = (data[key] or {} for key in ("run", "evaluation", "exam", "export"))
    facts = {key: value for key, value in run.items() if not isinstance(value, (dict, list, type(None)))}
    parts = {"Run": facts} | {part.capitalize(): run.get(part) for part in ("options", "versions", "hashes")}
    formats, empty = (
        (export.get("formats") or {}).items(),
        not any(data[key] for key in data if key != "name"),
    )
    view = {"name": data["name"], "look": look, "run": run, "judge": exam, "book": export, "empty": empty}
    view |= {
        "base": Path(str(run.get("base") or "")).name,
        "grpo": is_grpo(data),
        "form": answer_format_of(data),
    }
    view["steps"] = max((x for x, _ in series(data["log"], "step")), default=0)
    view |= {"warnings": warnings.check(data), "trend": tables.trend_sentence(run.get("reward_trend"))}
    view |= {"loss": quarters(data["log"], "loss"), "pairs": tables.pairs_of(evaluation)}
    view |= {"evaluation": tables.evaluation_table(evaluation), "exam": tables.exam_table(exam)}
    view |= {"export": tables.export_table(export), "examples": (evaluation.get("examples") or [])[:EXAMPLES]}
    view["export_verdicts"] = {name: tables.export_verdict(entry)[0] for name, entry in formats}
    return {**view, "details": {title: values for title, values in parts.items() if values}}


def _columns(views: list[dict], body) -> list[tuple[list[dict], str]]:
    """Return [(views, HTML)] of the runs that have this part; runs with the same content share a column."""
    columns: dict[str, list] = {}
    for view in views:
        html = body(view)
        if html.strip():
            columns.setdefault(html, []).append(view)
    return [(those, html) for html, those in columns.items()]


def write_report(runs: list[Path], target: Path, png: Path | None = None) -> Path:
    """Write one self-contained HTML page about the run directories `runs` to `target`, and return `target`.

    With `png` the curves are written to that folder too. The page stays under 3 MB: of long texts it shows
    fewer groups and shorter excerpts. Raises ReportError for an unreadable run or too many runs."""
    data = [read_run(path) for path in runs]
    if not data:
        raise ReportError("no run directory given; report needs at least one")
    names = [run["name"] for run in data]
    for path, run in zip(runs, data):
        if names.count(run["name"]) > 1:
            run["name"] = str(path)
    charts, views = charts_of(data), [_view(run, i) for i, run in enumerate(data)]
    shared = {"curves": charts, "title": ", ".join(run["name"] for run in data), "differs": []}
    shared |= {"columns": _columns, "tone_of": tables.tone_of, "tones": tables.TONES}
    if len(data) > 1:
        shared["differs"] = _differs(data)
    for limits in LIMITS:
        views = [{**view, "groups": browse(run, limits)} for view, run in zip(views, data)]
        # A lone surrogate in a reply must not stop the report.
        text = template("report.html.j2").render(views=views, limits=limits, **shared)
        page = text.encode("utf-8", "replace")
        if len(page) <= PAGE_LIMIT:
            break
    else:
        size = f"{len(page) / 1e6:.1f} MB, the limit is {PAGE_LIMIT / 1e6:.1f}"
        raise ReportError(f"{len(data)} runs make a page of {size}; report fewer runs at once")
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target)
    temporary.write_bytes(page)
    os.replace(temporary, target)
    if png:
        write_png(charts, Path(png))
    return target
