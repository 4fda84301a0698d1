"""Say why GRPO groups have no signal: equal rewards teach nothing, and the remedy depends on what is
stuck."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import yaml

from kardia.core.console import printable
from kardia.results.run_files import number


@cache
def warning_words() -> dict:
    """Return warnings.yaml: the limits, texts and remedies of all warnings."""
    words = yaml.safe_load(Path(__file__).with_name("warnings.yaml").read_text(encoding="utf-8"))
    return {**words, "plain": words["plain"].split()}


def known_scores(scores: dict | None) -> dict[str, float]:
    """Return the known ones of {name: score}; a number outside of 0 to 1 is no score."""
    known = {str(name): number(score) for name, score in (scores or {}).items()}
    return {name: score for name, score in known.items() if score is not None and 0 <= score <= 1}


def plain_names(names: Iterable) -> str:
    """Return names of a run as one line for a person, without underscores and control characters."""
    return ", ".join(printable(str(name)[:200]).replace("_", " ") for name in names)


def _own(components: dict | None) -> list[str]:
    """Return the names of the user's own rewards: they stand behind the rubric, and have any size."""
    names = [str(name) for name in components or {}]
    return names[names.index("rubric") + 1 :] if "rubric" in names else []


def _known_components(row: dict) -> dict[str, float | None]:
    """Return the known components of an answer."""
    components = row.get("components") or {}
    return known_scores(components) | {name: number(components.get(name)) for name in _own(components)}


def _stuck(name: str, groups: list[list[float | None]]) -> str:
    """Return where one component stands in groups without signal."""
    values = [value for group in groups for value in group]
    known = [value for value in values if value is not None]
    if 2 * len(known) < len(values):
        return f"{name} unknown in {len(values) - len(known)} of {len(values)} answers"
    value, n = Counter(round(value, 2) for value in known).most_common(1)[0]
    if n >= 0.9 * len(known):
        return f"{name} {value:g} in {n} of {len(values)} answers"
    equal = all(len(set(group)) == 1 for group in groups)
    how = "equal inside each group" if equal else "not equal"
    return f"{name} {how} ({min(known):.2f} to {max(known):.2f})"


def _commonest(texts: list) -> dict:
    """Return {most, n}: the commonest of these texts of a run, and how often it stands there."""
    [(most, n)] = Counter(printable(str(text)[:200]) for text in texts).most_common(1)
    return {"most": most, "n": n}


def _remedy(groups: list[list[dict]], values: dict[str, list[float | None]]) -> str:
    """Return the cause and its remedy. `values` are the components, one value per answer."""
    # The first cause that holds counts: without a valid format nothing else of a reply can be right.
    rows, remedies = [row for group in groups for row in group], warning_words()["remedies"]
    if 2 * values.get("rubric", []).count(None) >= len(rows):
        return remedies["unjudged"]
    if 2 * values.get("format", []).count(0.0) >= len(rows):
        invalid = [row for row, value in zip(rows, values["format"]) if value == 0]
        cut = sum(bool(row.get("truncated")) for row in invalid)
        why = _commonest([row.get("problem") or "not recorded" for row in invalid])
        return remedies["cut" if 2 * cut >= len(invalid) else "invalid"].format(cut=cut, **why)
    same = sum(len(group) > 1 and len({str(row.get("completion")) for row in group}) == 1 for group in groups)
    if 2 * same >= len(groups):
        return remedies["identical"].format(same=same)
    refused = [row["refused"] for row in rows if row.get("refused")]
    if 2 * len(refused) >= len(rows):
        return remedies["refused"].format(refused=len(refused), **_commonest(refused))
    own = set(_own(rows[0].get("components")))
    labels = [name for name in values if name not in {"format", "rubric"} | own]
    wrong = [name for name in labels if values[name].count(0.0) >= 0.9 * len(rows)]
    if wrong:
        return remedies["label"].format(labels=plain_names(wrong))
    if "rubric" in values:
        return remedies["judge"]
    return remedies["own"].format(own=plain_names(name for name in values if name in own))


def diagnose(groups: list[tuple[int, int, list[dict]]]) -> str:
    """Return why `groups` [(step, group, samples)] have no signal, and the remedy; "" without samples."""
    answers = [samples for _, _, samples in groups if samples]
    rows = [row for samples in answers for row in samples]
    if not rows:
        return ""
    components = [[_known_components(row) for row in samples] for samples in answers]
    idle = {name for row in rows for name, weight in known_scores(row.get("weights")).items() if not weight}
    if any(row.get("gate") for row in rows):
        idle.discard("format")  # it weighs nothing, and decides everything
    names = dict.fromkeys(str(name) for row in rows for name in row.get("components") or {})
    by_group = {n: [[each.get(n) for each in group] for group in components] for n in names if n not in idle}
    stuck = [_stuck(plain_names([name]), values) for name, values in by_group.items()]
    values = {name: [value for group in each for value in group] for name, each in by_group.items()}
    where = f"{len(answers)} groups without signal: {', '.join(stuck) or 'no components recorded'}"
    return f"{where}. {_remedy(answers, values)}"
