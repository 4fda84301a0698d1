"""rubrics.yaml as a checked record: criteria, judge wording, reward weights, emotion labels."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kardia.exam import digest as short_hash
from kardia.runs import UserError


@dataclass(frozen=True)
class Cue:
    text: str
    good: tuple[str, ...]
    bad: tuple[str, ...]


@dataclass(frozen=True)
class Criterion:
    name: str
    description: str
    weight: float
    method: str
    cues: tuple[Cue, ...] = ()


@dataclass(frozen=True)
class Rubric:
    criteria: tuple[Criterion, ...]
    rewards: dict[str, float]  # component -> weight, summing to 1
    emotions: dict[str, tuple[str, ...]]  # label -> aliases
    hash: str

    @property
    def labels(self) -> dict[str, str]:
        """Every label and alias, lower case -> label."""
        return {word: label for label, aliases in self.emotions.items() for word in (label, *aliases)}

    @property
    def weights(self) -> dict[str, float]:
        return {criterion.name: criterion.weight for criterion in self.criteria}

    def without(self, names) -> "Rubric":
        """The same rubric with the weights of `names` set to 0 (criteria the judge cannot judge)."""
        criteria = tuple(dataclasses.replace(c, weight=0.0) if c.name in names else c for c in self.criteria)
        return dataclasses.replace(self, criteria=criteria)


def load_rubric(path: Path) -> Rubric:
    """rubrics.yaml, validated: every mistake is one line naming file and key."""
    import yaml

    def bad(key: str, found: Any, expected: str):
        return UserError(f"{path}: {key}: found {str(found)[:60]!r} / expected {expected}")

    def mapping(key: str, value: Any, required: set[str], optional: set[str] = frozenset()) -> dict:
        if not isinstance(value, dict):
            raise bad(key, value, "a mapping")
        if unknown := set(map(str, value)) - required - optional:
            raise bad(f"{key}.{sorted(unknown)[0]}", "unknown key", ", ".join(sorted(required | optional)))
        if missing := required - set(value):
            raise bad(f"{key}.{sorted(missing)[0]}", "nothing", "this key")
        return value

    def number(key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6:
            raise bad(key, value, "a number from 0 up")
        return float(value)

    def words(key: str, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not value or not all(isinstance(word, str) and word for word in value):
            raise bad(key, value, "a list of words")
        return tuple(value)

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        root = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; --rubric names a YAML file such as rubrics.yaml") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())[:120]})") from error
    root = mapping("rubric", root, {"version", "rewards", "criteria", "emotions"})
    if root["version"] != 1:
        raise bad("version", root["version"], "1")
    rewards = {name: number(f"rewards.{name}", value) for name, value in mapping("rewards", root["rewards"], {"format", "emotion", "rubric"}).items()}
    if not sum(rewards.values()):
        raise bad("rewards", "all weights zero", "at least one weight above 0")
    criteria = []
    if not isinstance(root["criteria"], list) or not root["criteria"]:
        raise bad("criteria", root["criteria"], "a list of criteria")
    for i, entry in enumerate(root["criteria"]):
        key = f"criteria[{i}]"
        entry = mapping(key, entry, {"name", "description", "weight", "method"}, {"cues"})
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,40}", str(entry["name"])):
            raise bad(f"{key}.name", entry["name"], "lower-case letters, digits and underscores")
        if entry["name"] in {c.name for c in criteria}:
            raise bad(f"{key}.name", entry["name"], "a name that is not used twice")
        if entry["method"] not in ("contrast", "pmi", "likert"):
            raise bad(f"{key}.method", entry["method"], "contrast, pmi or likert")
        cues = []
        for j, cue in enumerate(entry.get("cues") or []):
            cue = mapping(f"{key}.cues[{j}]", cue, {"text", "good", "bad"})
            if not isinstance(cue["text"], str) or not cue["text"].strip():
                raise bad(f"{key}.cues[{j}].text", cue["text"], "the words that come before good and bad")
            cues.append(Cue(cue["text"], words(f"{key}.cues[{j}].good", cue["good"]), words(f"{key}.cues[{j}].bad", cue["bad"])))
        if entry["method"] == "contrast" and not cues:
            raise bad(f"{key}.cues", "nothing", "at least one cue for method contrast")
        criteria.append(Criterion(entry["name"], str(entry["description"]), number(f"{key}.weight", entry["weight"]), entry["method"], tuple(cues)))
    if rewards["rubric"] and not sum(c.weight for c in criteria):
        raise bad("criteria", "all weights zero", "a criterion with weight, or rewards.rubric: 0")
    emotions = mapping("emotions", root["emotions"], set(), set(map(str, root["emotions"] or {})))
    if len(emotions) < 2:
        raise bad("emotions", emotions, "at least two labels")
    labels: dict[str, tuple[str, ...]] = {}
    for label, aliases in emotions.items():
        labels[str(label)] = words(f"emotions.{label}", aliases) if aliases else ()
    total = sum(rewards.values())
    digest = short_hash(json.dumps([dataclasses.asdict(c) for c in criteria], sort_keys=True).encode())
    return Rubric(tuple(criteria), {name: weight / total for name, weight in rewards.items()}, labels, digest)
