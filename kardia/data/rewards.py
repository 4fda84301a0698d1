"""Set what counts in a reward: weights of the components, the format as a gate, the user's own functions.

`--reward` names one of these at a time, on top of what rubrics.yaml says:

    --reward format=gate           content counts only where the format holds
    --reward emotion=0             logged, never rewarded
    --reward rewards.py:brief      a function of your own, as heavy as a component of weight 1
    --reward rewards.py:brief=0.5

A function gets a row (a dict with the keys of its JSONL line, `messages` up to the prompt) and the group's
answers, and returns a number or None (not known) for each.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kardia.core.console import UserError, one_line, shorten
from kardia.core.files import digest, file_hash
from kardia.core.options import option
from kardia.data.rows import find_span
from kardia.data.rubric import Rubric

REWARD = re.compile(r"(?P<target>.+?)(?:=(?P<weight>[^=/\\]*))?", re.DOTALL)
FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)", re.DOTALL)

# What else stands beside a component where a run writes its measurements down.
TAKEN = "step n reward wins written witness witness_of_written seconds".split()


@dataclass
class RewardOptions:
    """Hold what changes the reward that rubrics.yaml describes."""

    reward: tuple[str, ...] = option(
        (),
        "FILE.py:FUNCTION[=WEIGHT]: your own; COMPONENT=WEIGHT: of rubrics.yaml; format=gate. Repeatable.",
        metavar="WHAT",
    )


class Answer(str):
    """An answer's whole text; `span(name)` is one of its spans, "" where it is missing."""

    def span(self, name: str) -> str:
        """Return the text of a span such as "response"."""
        return find_span(self, name) or ""


@dataclass(frozen=True)
class RewardFunction:
    """A reward of the user's own: function(row, answers) -> a number or None for each answer."""

    name: str
    path: Path
    function: Callable = dataclasses.field(compare=False)

    def values(self, row: dict[str, Any], answers: list[str]) -> list[float | None]:
        """Return one value per answer. Raise UserError, with the line of the user's file, if it fails."""
        try:
            values = self.function(row, [Answer(text) for text in answers])
            counted = isinstance(values, Iterable) and not isinstance(values, (str, bytes, dict, set))
            values = list(values) if counted else values  # the body of a generator runs here
        except (Exception, SystemExit) as error:
            raise UserError(f"{_place(self.path, error)}: in {self.name}: {_named(error)}") from error
        if not counted or len(values) != len(answers):
            found = f"{len(values)} value{'' if len(values) == 1 else 's'}" if counted else shorten(values)
            expected = f"a list of {len(answers)}, one for each answer"
            raise UserError(f"{self.path}: {self.name} returned {found} / expected {expected}")
        return [self._number(value) for value in values]

    def _number(self, value: Any) -> float | None:
        if value is None:
            return None
        try:
            number = float(value)  # a bool, and what numpy and torch return
        except Exception:  # whatever numpy and torch raise for what is no number
            number = math.nan
        # "1" would pass for a number.
        if isinstance(value, (str, bytes)) or not math.isfinite(number):
            expected = "a finite number, or None where it is not known"
            raise UserError(f"{self.path}: {self.name} returned {shorten(value)!r} / expected {expected}")
        return number


def with_rewards(rubric: Rubric, specs: tuple[str, ...]) -> Rubric:
    """Return the rubric with the rewards that `--reward` asks for. Raise UserError for one it cannot have."""
    weights, gate, functions = dict(rubric.given), rubric.gate, list(rubric.functions)
    for spec in specs:
        match = REWARD.fullmatch(spec)
        target, given = (match["target"], match["weight"]) if match else (spec, None)
        own = FUNCTION.fullmatch(target)
        if own:
            taken = {*weights, *TAKEN, f"{rubric.form.label}_or_near", *rubric.weights}
            functions.append(_load(spec, Path(own["file"]), own["name"], taken))
            weights[own["name"]] = _weight(spec, "1" if given is None else given)
        elif target not in rubric.given or given is None:
            names = ", ".join(f"{name}=WEIGHT" for name in rubric.given)
            raise UserError(f"--reward {shorten(spec)}: expected FILE.py:FUNCTION, {names} or format=gate")
        elif target == "format":
            gate, weights[target] = given == "gate", 0.0 if given == "gate" else _weight(spec, given)
        else:
            weights[target] = _weight(spec, given)
    if not any(weights.values()):
        raise UserError("--reward: all weights are zero; give one component or function a weight above 0")
    if weights["rubric"] and not any(criterion.weight for criterion in rubric.criteria):
        raise UserError("--reward rubric: every criterion of the rubric has weight 0; give one a weight")
    return dataclasses.replace(rubric, given=weights, gate=gate, functions=tuple(functions))


def own_rewards(rubric: Rubric, answers: list[tuple[Any, str]]) -> list[dict[str, float | None]]:
    """Return {function: value} of each (dialogue, answer); answers to one dialogue that stand together are a
    group."""
    rewards: list[dict[str, float | None]] = [{} for _ in answers]
    if not rubric.functions:
        return rewards
    start = 0
    for _, group in itertools.groupby(answers, key=lambda pair: id(pair[0])):
        pairs = list(group)
        for function in rubric.functions:
            values = function.values(pairs[0][0].as_row(), [text for _, text in pairs])
            for reward, value in zip(rewards[start:], values):
                reward[function.name] = value
        start += len(pairs)
    return rewards


def check_functions(rubric: Rubric, dialogue: Any, render_answer: Callable) -> None:
    """Call each function once on a good answer, a bad one and none at all, before anything is trained.

    render_answer: the script's.
    """
    good = render_answer({**dict(rubric.form.spans), rubric.form.label: dialogue.label}, rubric.form)
    for function in rubric.functions:
        function.values(dialogue.as_row(), [good, "I am sorry to hear that.", ""])


def rewards_hash(rubric: Rubric) -> str:
    """Return a hash of all that a reward depends on beside criteria and judge."""
    own = {function.name: file_hash(function.path) for function in rubric.functions}
    facts = [rubric.given, rubric.gate, own, rubric.near and dataclasses.asdict(rubric.near)]
    return digest(json.dumps(facts, sort_keys=True).encode())


def reward_facts(rubric: Rubric) -> dict[str, Any]:
    """Return the reward for run.json: weights that sum to 1, gate, files of the user's own functions."""
    own = {function.name: str(function.path) for function in rubric.functions}
    return {"weights": rubric.rewards, "gate": rubric.gate, "functions": own}


def _weight(spec: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < 1e6:
        raise UserError(f"--reward {shorten(spec)}: weight {shorten(text)!r} / expected a number from 0 up")
    return weight


def _load(spec: str, path: Path, name: str, taken: set[str]) -> RewardFunction:
    if name in taken or not re.fullmatch(r"[A-Za-z]\w{0,40}", name):
        expected = "a name of letters, digits and underscores that no other reward, criterion or number has"
        raise UserError(f"--reward {shorten(spec)}: the name {shorten(name)!r} / expected {expected}")
    if not path.is_file():
        raise UserError(f"--reward {shorten(spec)}: {path}: no such file; give FILE.py:FUNCTION")
    function = getattr(_module(path), name, None)
    if not callable(function):
        raise UserError(f"--reward {shorten(spec)}: {path} has no function {name}")
    return RewardFunction(name, path, function)


def _module(path: Path) -> Any:
    """Import a file under a name of its own; it may import what lies beside it."""
    name = f"kardia_reward_{digest(str(path.resolve()).encode())}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(found)
    # Dataclasses look their module up; under a name of its own it hides no package.
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"{_place(path, error)}: {_named(error)}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _place(path: Path, error: BaseException) -> str:
    """Return file:line of the last line of the user's file that the error passed."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}:{error.lineno}"
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if _is_of(frame, path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _is_of(frame: Any, path: Path) -> bool:
    return Path(frame.f_code.co_filename).resolve() == path.resolve()


def _named(error: BaseException) -> str:
    text = one_line(error)
    return text if text == type(error).__name__ else f"{type(error).__name__}: {text}"
