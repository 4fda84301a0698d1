"""Read rubrics.yaml into a checked record: answer format, criteria, reward weights, labels, guards."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from kardia.core.console import CONTROL, UserError, shorten
from kardia.core.files import digest

LARGEST = 256 << 10  # bytes: a minute of pure Python's YAML would pass for a hang
# How a criterion is read (kardia/judge/judge.py); the last two need something of the row.
METHODS = ("ask", "chat", "contrast", "pmi", "likelihood", "likert", "mix", "row", "reference")
OWN_METHODS = ("ask", "chat", "contrast")  # of a row's own criteria: log-odds, so that they add up
HELD_OUT = "held_out"  # `ask` with the criterion's other question: only a witness reads it
ROW_KEYS = set("person mbti situation anon_username messages".split())  # beside the label's key
GUARDS = tuple(  # what each refuses: kardia/judge/guards.py
    "too long to be read, empty, speaks to the judge, fakes a turn, markup, encoded, hides letters, "
    "insult, echo, repeats itself, gibberish, other script".split(", ")
)


@dataclass(frozen=True)
class Cue:
    """The words after a reply, and the good and bad words that may follow them."""

    text: str
    good: tuple[str, ...]
    bad: tuple[str, ...]


@dataclass(frozen=True)
class AnswerFormat:
    """What an answer looks like: Kardia-R1's four spans, or those of `answer` in rubrics.yaml."""

    spans: tuple[tuple[str, str], ...] = (  # (name, hint in the system prompt), in the order of an answer
        ("understanding", "who this is and what they need"),
        ("reasoning", "why they feel so and what helps"),
        ("emotion", "one word"),
        ("response", "your reply, about 30 words"),
    )
    label: str = "emotion"  # this span must be the row's label; a row's key and a reward component, too
    reply: str = "response"  # the span that the person reads, and the judge
    system: str = "You are a warm, attentive listener. Answer in four spans"

    @property
    def names(self) -> tuple[str, ...]:
        """Return the span names in the order of an answer."""
        return tuple(name for name, _ in self.spans)

    @cached_property
    def marker(self) -> re.Pattern:
        """Return the pattern of one begin or end marker."""
        return re.compile(rf"<\|({'|'.join(self.names)})_(begin|end)\|>")

    @cached_property
    def whole(self) -> re.Pattern:
        """Return the pattern of an answer: all spans in order, nothing but spaces outside them."""
        spans = [rf"<\|{name}_begin\|>(?P<{name}>.*?)<\|{name}_end\|>" for name in self.names]
        return re.compile(r"\s*".join(["", *spans, ""]), re.DOTALL)

    def facts(self) -> dict[str, Any]:
        """Return the format for run.json: a run is read by it, whatever rubrics.yaml says by then."""
        spans = {"spans": list(self.names), "hints": [hint for _, hint in self.spans]}
        return {**spans, "label": self.label, "reply": self.reply, "system": self.system}

    @classmethod
    def of(cls, facts: dict[str, Any] | None) -> AnswerFormat:
        """Return the format that `facts` gave; the default one for a run that has none."""
        if not facts:
            return cls()
        spans = tuple(zip(facts["spans"], facts["hints"]))
        return cls(spans, facts["label"], facts["reply"], facts["system"])


DEFAULT_FORMAT = AnswerFormat()


def check_same_format(source: Any, facts: dict[str, Any], form: AnswerFormat) -> None:
    """Raise UserError if a run (its run.json's facts) was trained on another answer format than `form`."""
    trained = AnswerFormat.of(facts.get("form"))
    if trained != form:
        spans = f"{', '.join(trained.names)} (label {trained.label}, reply {trained.reply})"
        fix = f"but the rubric asks for {', '.join(form.names)}; give the --rubric it was trained with"
        raise UserError(f"{source}: was trained on answers of {spans}, {fix}")


@dataclass(frozen=True)
class Criterion:
    """One thing the judge is asked about a reply."""

    name: str
    description: str
    weight: float
    methods: tuple[str, ...]  # candidates; the exam chooses, the first one wins a tie
    cues: tuple[Cue, ...] = ()  # of method contrast
    ask: str = ""  # the question of method ask
    mix: tuple[tuple[str, float], ...] = ()  # (method, weight): what method mix adds up
    held_out: str = ""  # the question to a witness, whose answers are never rewarded

    @property
    def taught(self) -> str:
        """Return the method that a judge's LoRA is trained on: the first that reads words after a cue."""
        parts = {"mix": [method for method, _ in self.mix]}
        read = [part for method in self.methods for part in parts.get(method, [method])]
        return next((method for method in read if method in ("ask", "contrast")), "")

    def cues_of(self, method: str) -> tuple[Cue, ...]:
        """Return what follows the reply before the judge is read: a question, or the contrast cues."""
        if method == "contrast":
            return self.cues
        plain = f"\nIs it true that {self.description}? Answer:"
        questions = {"ask": self.ask or plain, HELD_OUT: self.held_out}
        return (Cue(questions[method], (" yes",), (" no",)),) if method in questions else ()


@dataclass(frozen=True)
class NearLabels:
    """Which labels are near each other, and what a near one earns instead of the right one's 1."""

    credit: float
    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Rubric:
    """What is rewarded, and how."""

    criteria: tuple[Criterion, ...]
    given: dict[str, float]  # component (format, the label's span, rubric, own functions) -> weight
    emotions: dict[str, tuple[str, ...]]  # label -> aliases (labels are emotions where the task is empathy)
    hash: str
    form: AnswerFormat = DEFAULT_FORMAT
    guards: tuple[str, ...] | None = None  # the guards that apply; None: all
    gate: bool = False  # content counts only where the format holds; the format itself then weighs 0
    near: NearLabels | None = None
    functions: tuple[Any, ...] = ()  # the user's own rewards, RewardFunction each

    @property
    def rewards(self) -> dict[str, float]:
        """Return each component's weight, scaled so that all sum to 1."""
        total = sum(self.given.values()) or 1.0
        return {name: weight / total for name, weight in self.given.items()}

    def label_credit(self, word: str | None, right: str) -> float:
        """Return 1 for the right label, what a near one or another word for either earns, else 0."""
        if word == right or not self.near:
            return float(word == right)
        label = self.labels.get((word or "").lower())
        near = label == right or any(label in group and right in group for group in self.near.groups)
        return self.near.credit if near else 0.0

    @property
    def labels(self) -> dict[str, str]:
        """Return every label and alias in lower case -> label."""
        return {word.lower(): label for label, aliases in self.emotions.items() for word in (label, *aliases)}

    @property
    def weights(self) -> dict[str, float]:
        """Return each criterion's weight by name."""
        return {criterion.name: criterion.weight for criterion in self.criteria}

    def reads(self, method: str) -> bool:
        """Return whether a criterion may be read by a method."""
        return any(method in criterion.methods for criterion in self.criteria)

    def without(self, names) -> Rubric:
        """Return the same rubric with the weights of `names` set to 0 (criteria the judge cannot judge).

        If none is left, the rubric itself has no weight, and the other components share it.
        """
        criteria = tuple(dataclasses.replace(c, weight=0.0) if c.name in names else c for c in self.criteria)
        given, gate = self.given, self.gate
        if not any(c.weight for c in criteria):
            given = {**given, "rubric": 0.0}
            if gate and not any(given.values()):  # a gate before nothing
                given, gate = {**given, "format": 1.0}, False
        return dataclasses.replace(self, criteria=criteria, given=given, gate=gate)


@lru_cache(maxsize=4096)
def row_criteria(text: str, where: str = "rubric") -> tuple[Criterion, ...]:
    """Return the criteria of a row's own rubric (JSON text), in the words of the file. Raise UserError."""
    criteria = _Checks(Path(where)).criteria(json.loads(text), weighted=True)
    for i, criterion in enumerate(criteria):
        odd = [method for method in criterion.methods if method not in OWN_METHODS]
        expected = f"some of {', '.join(OWN_METHODS)} in a row's own rubric"
        _Checks(Path(where)).expect(not odd, f"criteria[{i}].method", ", ".join(odd), expected)
    return criteria


def load_rubric(path: Path) -> Rubric:
    """Read and check rubrics.yaml. Raises UserError: one line that names file and key."""
    check, root = _Checks(path), _read_yaml(path)
    labels = "labels" if isinstance(root, dict) and "labels" in root else "emotions"  # one of the two keys
    root = check.mapping("rubric", root, f"version rewards criteria {labels}", "answer guards near")
    check.expect(root["version"] == 1, "version", root["version"], "1")
    form = check.answer_format(root["answer"]) if "answer" in root else DEFAULT_FORMAT
    given, gate = check.rewards(root["rewards"], f"format {form.label} rubric")
    criteria = check.criteria(root["criteria"], weighted=given["rubric"] > 0)
    emotions = check.labels(labels, root[labels])
    near = check.near(root["near"], emotions) if "near" in root else None
    guards = check.names("guards", root["guards"], GUARDS) if "guards" in root else None
    # What a file does not use is not hashed: the hash of an older rubric, and its runs, stay what they were.
    facts = [dataclasses.asdict(criterion) for criterion in criteria]
    hashed: list = [{k: v for k, v in entry.items() if k != "mix" or v} for entry in facts]
    if guards is not None:  # without the key the hash is that of files that knew no guards: exams stay valid
        hashed.append({"guards": guards})
    hash = digest(json.dumps(hashed, sort_keys=True).encode())
    return Rubric(criteria, given, emotions, hash, form, guards, gate, near)


def _read_yaml(path: Path) -> Any:
    """Read plain YAML, without aliases (a few lines can stand for gigabytes) and control characters."""
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if getattr(self.peek_event(), "anchor", None) is not None:  # of an alias, or where one is defined
                raise yaml.YAMLError("anchors and aliases, & and *, are not read here: write it out twice")
            node = super().compose_node(parent, index)
            text = node.value if isinstance(node, yaml.ScalarNode) else ""
            if CONTROL.search(text):
                raise yaml.YAMLError(f"a control character in {shorten(text)!r}")
            if len(text) > 100 and not node.tag.endswith(":str"):
                raise yaml.YAMLError(f"a text without quotation marks: {shorten(text)!r}")
            return node

    # PyYAML's constructors raise whatever Python raises on odd dates, numbers and keys.
    mistakes = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise UserError(f"{path}: over {LARGEST >> 10} kB; a rubric has a few, rubrics.yaml shows one")
        return yaml.load(text.decode("utf-8-sig"), Plain)
    except OSError as error:
        hint = "--rubric names a YAML file such as rubrics.yaml"
        raise UserError(f"{path}: {error.strerror}; {hint}") from error
    except (*mistakes, RecursionError) as error:
        flaw = "nested too deeply" if isinstance(error, RecursionError) else shorten(str(error), 120)
        raise UserError(f"{path}: not valid YAML ({flaw})") from error


@dataclass(frozen=True)
class _Checks:
    """Check decoded YAML values; each mistake is one line that names file and key."""

    path: Path

    def expect(self, holds: Any, key: str, value: Any, expected: str) -> Any:
        if not holds:
            found = f"found {shorten(value)!r} / expected {shorten(expected, 300)}"
            raise UserError(f"{self.path}: {shorten(key, 100)}: {found}")
        return value

    def mapping(self, key: str, value: Any, required: str, optional: str = "") -> dict:
        self.expect(isinstance(value, dict), key, value, "a mapping")
        allowed = sorted({*required.split(), *optional.split()})
        for name in sorted({shorten(name) for name in value}.difference(allowed)):
            self.expect(False, f"{key}.{name}", "unknown key", ", ".join(allowed))
        for name in sorted(set(required.split()).difference(value)):
            self.expect(False, f"{key}.{name}", "nothing", "this key")
        return value

    def number(self, key: str, value: Any) -> float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e6
        return float(self.expect(number, key, value, "a number from 0 up"))

    def text(self, key: str, value: Any, expected: str = "a text") -> str:
        return self.expect(isinstance(value, str) and value.strip(), key, value, expected)

    def name(self, key: str, value: Any, taken: Sequence[str] = ()) -> str:
        valid = isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_]{0,40}", value)
        expected = "a name of lower-case letters, digits and underscores that is not taken"
        return self.expect(valid and value not in taken, key, value, expected)

    def words(self, key: str, value: Any) -> tuple[str, ...]:
        words = isinstance(value, list) and value and all(isinstance(word, str) and word for word in value)
        return tuple(self.expect(words, key, value, "a list of words"))

    def names(self, key: str, value: Any, known: tuple[str, ...]) -> tuple[str, ...]:
        """Return a list of `known` names, none twice."""
        self.expect(isinstance(value, list), key, value, f"a list of {', '.join(known)}")
        for name in value:
            self.expect(name in known, key, name, f"one of {', '.join(known)}")
        return tuple(self.expect(len(set(value)) == len(value), key, value, "each name once"))

    def answer_format(self, entry: Any) -> AnswerFormat:
        """Return the format of `answer`: {system, spans: {name: hint}, label, reply}."""
        entry = self.mapping("answer", entry, "system spans label reply")
        spans, label, reply = entry["spans"], entry["label"], entry["reply"]
        several, what = (
            isinstance(spans, dict) and len(spans) > 1,
            "at least two span names, each with a hint",
        )
        self.expect(several, "answer.spans", spans, f"a mapping of {what}, in the order of an answer")
        for name, hint in spans.items():
            self.name("answer.spans", name, taken=("format", "rubric"))  # components of the reward
            self.text(f"answer.spans.{name}", hint, "a few words for the system prompt")
        for key in ("label", "reply"):
            known = isinstance(entry[key], str) and entry[key] in spans
            self.expect(known, f"answer.{key}", entry[key], f"one of the spans ({', '.join(spans)})")
        expected = f"a name that is no key of every row ({', '.join(sorted(ROW_KEYS))})"
        self.expect(label not in ROW_KEYS, "answer.label", label, expected)
        self.expect(label != reply, "answer.reply", reply, "another span than answer.label")
        system = self.text("answer.system", entry["system"]).rstrip(" .:")
        return AnswerFormat(tuple(spans.items()), label, reply, system)

    def rewards(self, entry: Any, components: str) -> tuple[dict[str, float], bool]:
        """Return (the weights of the reward's components, whether the format is a gate)."""
        given = self.mapping("rewards", entry, components)
        gate = given["format"] == "gate"
        given = {**given, "format": 0} if gate else given
        weights = {name: self.number(f"rewards.{name}", given[name]) for name in components.split()}
        self.expect(any(weights.values()), "rewards", "all weights zero", "at least one weight above 0")
        return weights, gate

    def near(self, entry: Any, labels: dict[str, tuple[str, ...]]) -> NearLabels:
        """Return the near labels of {credit, labels: [[label, ..], ..]}."""
        entry = self.mapping("near", entry, "credit labels")
        credit = self.number("near.credit", entry["credit"])
        self.expect(0 < credit < 1, "near.credit", credit, "a number between 0 and 1: the right one earns 1")
        groups = entry["labels"]
        self.expect(isinstance(groups, list) and groups, "near.labels", groups, "a list of lists of labels")
        groups = tuple(self.names(f"near.labels[{i}]", each, tuple(labels)) for i, each in enumerate(groups))
        for i, group in enumerate(groups):
            self.expect(len(group) > 1, f"near.labels[{i}]", list(group), "two labels or more")
        return NearLabels(credit, groups)

    def criteria(self, entries: Any, weighted: bool) -> tuple[Criterion, ...]:
        self.expect(isinstance(entries, list) and entries, "criteria", entries, "a list of criteria")
        criteria: dict[str, Criterion] = {}
        for i, entry in enumerate(entries):
            criterion = self.criterion(f"criteria[{i}]", entry, criteria)
            criteria[criterion.name] = criterion
        carried = not weighted or any(c.weight for c in criteria.values())
        self.expect(carried, "criteria", "all weights zero", "a criterion with weight, or rewards.rubric: 0")
        return tuple(criteria.values())

    def criterion(self, key: str, entry: Any, others: dict[str, Criterion]) -> Criterion:
        entry = self.mapping(key, entry, "name description weight method", "cues ask held_out mix")
        # These two stand for other things where pairs and rated replies name their criterion.
        taken = (*others, "reference", "overall")
        name, methods = self.name(f"{key}.name", entry["name"], taken=taken), entry["method"]
        methods = methods if isinstance(methods, list) else [methods]
        self.expect(methods, f"{key}.method", methods, f"some of {', '.join(METHODS)}: the exam chooses one")
        methods, cues = self.names(f"{key}.method", methods, METHODS), entry.get("cues") or []
        self.expect(isinstance(cues, list), f"{key}.cues", cues, "a list of {text, good, bad}")
        cues = tuple(self.cue(f"{key}.cues[{j}]", cue) for j, cue in enumerate(cues))
        mix = self.mixture(f"{key}.mix", entry.get("mix"), "mix" in methods)
        answerable = cues or "contrast" not in (*methods, *dict(mix))
        self.expect(answerable, f"{key}.cues", "nothing", "at least one cue for method contrast")
        questions, expected = {q: entry[q] for q in ("ask", "held_out") if q in entry}, "a yes or no question"
        for question, text in questions.items():
            self.text(f"{key}.{question}", text, expected)
        description = self.text(f"{key}.description", entry["description"])
        weight = self.number(f"{key}.weight", entry["weight"])
        return Criterion(name, description, weight, methods, cues, mix=mix, **questions)

    def mixture(self, key: str, entry: Any, wanted: bool) -> tuple[tuple[str, float], ...]:
        """Return ((method, weight), ..) of {method: weight}; () if there is none and none is wanted."""
        if entry is None and not wanted:
            return ()
        readable = [method for method in METHODS if method not in ("mix", "row", "reference")]
        expected = f"a mapping of some of {', '.join(readable)} to weights"
        self.expect(isinstance(entry, dict) and entry, key, entry, expected)
        for method in entry:
            self.expect(method in readable, key, method, expected)
        weights = tuple((method, self.number(f"{key}.{method}", entry[method])) for method in entry)
        self.expect(any(weight for _, weight in weights), key, entry, "at least one weight above 0")
        return weights

    def cue(self, key: str, entry: Any) -> Cue:
        entry = self.mapping(key, entry, "text good bad")
        text = self.text(f"{key}.text", entry["text"], "the words that come before good and bad")
        return Cue(text, self.words(f"{key}.good", entry["good"]), self.words(f"{key}.bad", entry["bad"]))

    def labels(self, key: str, entry: Any) -> dict[str, tuple[str, ...]]:
        """Return label -> the other words that mean it; no word means two labels."""
        self.expect(isinstance(entry, dict), key, entry, "a mapping of labels to lists of words")
        self.expect(len(entry) > 1, key, entry, "at least two labels")
        labels = {str(x): self.words(f"{key}.{x}", words) if words else () for x, words in entry.items()}
        owner = {label.lower(): label for label in reversed(labels)}
        for label, aliases in labels.items():
            for word in (label, *aliases):
                taken = owner.setdefault(word.lower(), label)
                new = taken == label and (word == label or word.lower() != label.lower())
                self.expect(new, f"{key}.{label}", word, f"a word that does not already mean {taken!r}")
        return labels
