"""rubrics.yaml as a checked record: what an answer looks like, criteria, judge wording, reward weights, labels."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kardia.core.console import CONTROL, UserError, shorten
from kardia.core.files import digest as short_hash

LARGEST = 256 << 10  # bytes: a minute of pure Python's YAML would pass for a hang


@dataclass(frozen=True)
class Cue:
    text: str
    good: tuple[str, ...]
    bad: tuple[str, ...]


@dataclass(frozen=True)
class AnswerFormat:
    """What an answer looks like. The default is Kardia-R1's four spans; `answer` in rubrics.yaml gives another."""

    spans: tuple[tuple[str, str], ...] = (  # (name, hint in the system prompt), in the order of an answer
        ("understanding", "who this is and what they need"),
        ("reasoning", "why they feel so and what helps"),
        ("emotion", "one word"),
        ("response", "your reply, about 30 words"),
    )
    label: str = "emotion"  # the span that must be exactly the row's label; also the row's key, and a component of the reward
    reply: str = "response"  # the span that the person reads, and the judge
    system: str = "You are a warm, attentive listener. Answer in four spans"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.spans)

    @cached_property
    def marker(self) -> re.Pattern:
        return re.compile(rf"<\|({'|'.join(self.names)})_(begin|end)\|>")

    @cached_property
    def whole(self) -> re.Pattern:
        """All spans in order, nothing but spaces outside them."""
        return re.compile(
            r"\s*"
            + r"\s*".join(rf"<\|{name}_begin\|>(?P<{name}>.*?)<\|{name}_end\|>" for name in self.names)
            + r"\s*",
            re.DOTALL,
        )

    def facts(self) -> dict[str, Any]:
        """For run.json: what reads a run later must know its form, whatever rubrics.yaml says by then."""
        return {
            "spans": list(self.names),
            "label": self.label,
            "reply": self.reply,
            "hints": [hint for _, hint in self.spans],
            "system": self.system,
        }

    @classmethod
    def of(cls, facts: dict[str, Any] | None) -> AnswerFormat:
        return (
            cls(tuple(zip(facts["spans"], facts["hints"])), facts["label"], facts["reply"], facts["system"])
            if facts
            else cls()
        )


DEFAULT_FORMAT = AnswerFormat()


METHODS = ("ask", "contrast", "pmi", "likert")  # what each does: kardia/judge.py


@dataclass(frozen=True)
class Criterion:
    name: str
    description: str
    weight: float
    methods: tuple[str, ...]  # candidates; the exam chooses, the first one wins a tie
    cues: tuple[Cue, ...] = ()  # of method contrast
    ask: str = ""  # the question of method ask
    held_out: str = ""  # the same criterion in other words: asked now and then, never rewarded

    def cues_of(self, method: str) -> tuple[Cue, ...]:
        """What follows the reply before the judge is read: a yes-or-no question, or the contrast cues."""
        if method == "ask":
            return (Cue(self.ask or f"\nIs it true that {self.description}? Answer:", (" yes",), (" no",)),)
        if method == HELD_OUT:
            return (Cue(self.held_out, (" yes",), (" no",)),)
        return self.cues if method == "contrast" else ()


@dataclass(frozen=True)
class Rubric:
    criteria: tuple[Criterion, ...]
    rewards: dict[str, float]  # component (format, the label's span, rubric) -> weight, summing to 1
    emotions: dict[
        str, tuple[str, ...]
    ]  # label -> aliases (the labels are emotions where the task is empathy)
    hash: str
    form: AnswerFormat = DEFAULT_FORMAT

    @property
    def labels(self) -> dict[str, str]:
        """Every label and alias, lower case -> label."""
        return {word.lower(): label for label, aliases in self.emotions.items() for word in (label, *aliases)}

    @property
    def weights(self) -> dict[str, float]:
        return {criterion.name: criterion.weight for criterion in self.criteria}

    def without(self, names) -> Rubric:
        """The same rubric with the weights of `names` set to 0 (criteria the judge cannot judge)."""
        criteria = tuple(dataclasses.replace(c, weight=0.0) if c.name in names else c for c in self.criteria)
        return dataclasses.replace(self, criteria=criteria)


ROW_KEYS = {
    "person",
    "mbti",
    "situation",
    "anon_username",
    "messages",
}  # of every task; the label's key comes on top


@dataclass(frozen=True)
class _Checks:
    """Checks of decoded YAML values; each mistake is one line naming file and key."""

    path: Path

    def bad(self, key: str, found: Any, expected: str) -> UserError:
        return UserError(
            f"{self.path}: {shorten(key, 100)}: found {shorten(found)!r} / expected {shorten(expected, 300)}"
        )

    def mapping(self, key: str, value: Any, required: set[str], optional: set[str] = frozenset()) -> dict:
        if not isinstance(value, dict):
            raise self.bad(key, value, "a mapping")
        if unknown := {shorten(name) for name in value} - required - optional:
            raise self.bad(
                f"{key}.{sorted(unknown)[0]}", "unknown key", ", ".join(sorted(required | optional))
            )
        if missing := required - set(value):
            raise self.bad(f"{key}.{sorted(missing)[0]}", "nothing", "this key")
        return value

    def number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6:
            raise self.bad(key, value, "a number from 0 up")
        return float(value)

    def text(self, key: str, value: Any, expected: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self.bad(key, value, expected)
        return value

    def words(self, key: str, value: Any) -> tuple[str, ...]:
        if (
            not isinstance(value, list)
            or not value
            or not all(isinstance(word, str) and word for word in value)
        ):
            raise self.bad(key, value, "a list of words")
        return tuple(value)

    def criterion(self, key: str, entry: Any, taken) -> Criterion:
        entry = self.mapping(
            key, entry, {"name", "description", "weight", "method"}, {"cues", "ask", "held_out"}
        )
        if not isinstance(entry["name"], str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,40}", entry["name"]):
            raise self.bad(f"{key}.name", entry["name"], "lower-case letters, digits and underscores")
        if entry["name"] in taken:
            raise self.bad(f"{key}.name", entry["name"], "a name that is not used twice")
        methods = tuple(entry["method"]) if isinstance(entry["method"], list) else (entry["method"],)
        if (
            not methods
            or any(method not in METHODS for method in methods)
            or len(set(methods)) < len(methods)
        ):
            raise self.bad(
                f"{key}.method",
                entry["method"],
                f"one of {', '.join(METHODS)}, or a list of them for the exam to choose from",
            )
        cues = []
        if not isinstance(entry.get("cues") or [], list):
            raise self.bad(f"{key}.cues", entry["cues"], "a list of {text, good, bad}")
        for j, cue in enumerate(entry.get("cues") or []):
            at = f"{key}.cues[{j}]"
            cue = self.mapping(at, cue, {"text", "good", "bad"})
            cues.append(
                Cue(
                    self.text(f"{at}.text", cue["text"], "the words that come before good and bad"),
                    self.words(f"{at}.good", cue["good"]),
                    self.words(f"{at}.bad", cue["bad"]),
                )
            )
        if "contrast" in methods and not cues:
            raise self.bad(f"{key}.cues", "nothing", "at least one cue for method contrast")
        questions = {
            name: self.text(f"{key}.{name}", entry[name], "a question that yes or no answers")
            for name in ("ask", "held_out")
            if name in entry
        }
        return Criterion(
            entry["name"],
            self.text(f"{key}.description", entry["description"], "a text"),
            self.number(f"{key}.weight", entry["weight"]),
            methods,
            tuple(cues),
            **questions,
        )

    def form(self, entry: Any) -> AnswerFormat:
        """`answer`: {system, spans: {name: hint}, label, reply}."""
        entry = self.mapping("answer", entry, {"system", "spans", "label", "reply"})
        spans = entry["spans"]
        if not isinstance(spans, dict) or len(spans) < 2:
            raise self.bad(
                "answer.spans",
                spans,
                "a mapping of at least two span names to hints, in the order of an answer",
            )
        for name, hint in spans.items():
            if (
                not isinstance(name, str)
                or not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name)
                or name in ("format", "rubric")
            ):
                raise self.bad(
                    "answer.spans",
                    name,
                    "names of lower-case letters, digits and underscores (not format or rubric)",
                )
            self.text(f"answer.spans.{name}", hint, "a few words for the system prompt")
        for key in ("label", "reply"):
            if not isinstance(entry[key], str) or entry[key] not in spans:
                raise self.bad(f"answer.{key}", entry[key], f"one of the spans ({', '.join(spans)})")
        if entry["label"] in ROW_KEYS:
            raise self.bad(
                "answer.label",
                entry["label"],
                f"a name that is no key of every row ({', '.join(sorted(ROW_KEYS))})",
            )
        if entry["label"] == entry["reply"]:
            raise self.bad("answer.reply", entry["reply"], "another span than answer.label")
        return AnswerFormat(
            tuple(spans.items()),
            entry["label"],
            entry["reply"],
            self.text("answer.system", entry["system"], "a text").rstrip(" .:"),
        )


def _yaml(text: str) -> Any:
    """Plain YAML: what refers to another place (a few lines of it stand for gigabytes), a number of a thousand digits and characters
    that a terminal would obey are errors."""
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if getattr(self.peek_event(), "anchor", None) is not None:  # of an alias, or where one is defined
                raise yaml.YAMLError("anchors and aliases, & and *, are not read here: write it out twice")
            node = super().compose_node(parent, index)
            if isinstance(node, yaml.ScalarNode) and CONTROL.search(node.value):
                raise yaml.YAMLError(f"a control character in {shorten(node.value)!r}")
            if isinstance(node, yaml.ScalarNode) and not node.tag.endswith(":str") and len(node.value) > 100:
                raise yaml.YAMLError(f"a text without quotation marks: {shorten(node.value)!r}")
            return node

    return yaml.load(text, Plain)


def load_rubric(path: Path) -> Rubric:
    """rubrics.yaml, validated: every mistake is one line naming file and key."""
    import yaml

    check = _Checks(path)
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise UserError(f"{path}: over {LARGEST >> 10} kB; a rubric has a few, rubrics.yaml shows one")
        root = _yaml(text.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; --rubric names a YAML file such as rubrics.yaml"
        ) from error
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:  # its constructors raise what Python raises
        raise UserError(
            f"{path}: not valid YAML ({'nested too deeply' if isinstance(error, RecursionError) else shorten(str(error), 120)})"
        ) from error
    named = "labels" if isinstance(root, dict) and "labels" in root else "emotions"  # one of the two
    root = check.mapping("rubric", root, {"version", "rewards", "criteria", named}, {"answer"})
    if root["version"] != 1:
        raise check.bad("version", root["version"], "1")
    form = check.form(root["answer"]) if "answer" in root else DEFAULT_FORMAT
    given = check.mapping("rewards", root["rewards"], {"format", form.label, "rubric"})
    rewards = {
        name: check.number(f"rewards.{name}", given[name]) for name in ("format", form.label, "rubric")
    }
    if not sum(rewards.values()):
        raise check.bad("rewards", "all weights zero", "at least one weight above 0")
    if not isinstance(root["criteria"], list) or not root["criteria"]:
        raise check.bad("criteria", root["criteria"], "a list of criteria")
    found: dict[str, Criterion] = {}
    for i, entry in enumerate(root["criteria"]):
        criterion = check.criterion(f"criteria[{i}]", entry, found.keys())
        found[criterion.name] = criterion
    criteria = tuple(found.values())
    if rewards["rubric"] and not sum(c.weight for c in criteria):
        raise check.bad("criteria", "all weights zero", "a criterion with weight, or rewards.rubric: 0")
    emotions = root[named]
    if not isinstance(emotions, dict):
        raise check.bad(named, emotions, "a mapping of labels to lists of words")
    if len(emotions) < 2:
        raise check.bad(named, emotions, "at least two labels")
    labels = {
        str(label): check.words(f"{named}.{label}", aliases) if aliases else ()
        for label, aliases in emotions.items()
    }
    owner, named_so = {}, {label.lower() for label in labels}
    for label, aliases in labels.items():
        for word in (label, *aliases):
            if owner.setdefault(word.lower(), label) != label or (word != label and word.lower() in named_so):
                raise check.bad(
                    f"{named}.{label}", word, f"a word that does not already mean {owner[word.lower()]!r}"
                )
    total = sum(rewards.values())
    digest = short_hash(json.dumps([dataclasses.asdict(c) for c in criteria], sort_keys=True).encode())
    return Rubric(criteria, {name: weight / total for name, weight in rewards.items()}, labels, digest, form)


HELD_OUT = "held_out"  # `ask` with the criterion's other question: no method to choose, a witness
