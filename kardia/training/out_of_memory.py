"""When memory runs out: what is given up, in which order, and the same step once more.

    micro-batch -> logits chunk -> completion length -> group size

The first two change no number of the step, only how much of it is in memory at once. The others change what is trained, so
they come last; a group always stays whole: its answers are drawn together and its advantages come from all of them.

Nothing of a step takes effect before its last pass, so a step that ran out of memory is forgotten (its gradients, its counts) and
done again one rung lower, in the same process. run.json says which rung holds from which step on: --resume goes by it. Processes
that train together go down together (`together.all_or_none`), for they wait for each other at many places of a step.
The largest pass that can occur is rehearsed before the first step, for what does not fit shall show in the first minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kardia.core import distributed, machine
from kardia.core.console import UserError, one_line, say

LEAST_CHUNK = 8
PARTS = {
    "passes": "micro-batch",
    "chunk": "logits chunk",
    "tokens": "completion length",
    "group": "group size",
}  # in the order in which they are given up
ORDER = ", ".join(PARTS.values())


@dataclass
class Ladder:
    """Where a run stands. `passes`: answers (SFT: dialogues) per forward pass; `chunk`: rows of logits at once, None where an
    engine's own loss decides; `tokens`: longest answer and `group`: answers per prompt, None in SFT."""

    passes: int
    chunk: int | None = 128
    tokens: int | None = None
    group: int | None = None
    rungs: list[dict[str, Any]] = field(
        default_factory=list
    )  # {"step", "passes", "chunk", "tokens", "group", "why"}: what holds from a step on
    least_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.least_tokens = max(
            8, (self.tokens or 0) // 2
        )  # in less than half of what was asked for no answer has room

    def down(self, step: int, drawing: bool, why: str) -> str | None:
        """One rung lower, from `step` on; what changed, in words, or None at the bottom. `drawing`: memory ran out while answers
        were drawn or judged, where smaller passes are no help."""
        if not drawing and self.passes > 1:
            told, self.passes = f"micro-batch {self.passes} -> {self.passes // 2}", self.passes // 2
        elif not drawing and self.chunk and self.chunk > LEAST_CHUNK:
            told, self.chunk = (
                f"logits chunk {self.chunk} -> {max(LEAST_CHUNK, self.chunk // 4)}",
                max(LEAST_CHUNK, self.chunk // 4),
            )
        elif self.tokens and self.tokens > self.least_tokens:
            shorter = max(self.least_tokens, self.tokens - self.least_tokens // 2)
            told, self.tokens = f"completion length {self.tokens} -> {shorter}", shorter
        elif self.group and self.group > 2:
            told, self.group = (
                f"group size {self.group} -> {max(2, self.group // 2)}",
                max(2, self.group // 2),
            )
            self.passes = min(self.passes, self.group)
        else:
            return None
        self.rungs.append({"step": step, **self.here(), "why": f"{told} ({why})"})
        return told

    def recall(self, step: int) -> None:
        """The rung of a step that was done before a resume: it is done again where it was."""
        for rung in self.rungs:
            if rung["step"] == step:
                self.stand_on(rung)

    def stand_on(self, rung: dict[str, Any]) -> None:
        self.passes, self.chunk, self.tokens, self.group = (rung.get(name) for name in PARTS)

    def here(self) -> dict[str, int | None]:
        return {name: getattr(self, name) for name in PARTS}


def rungs_of(facts: dict[str, Any], step: int) -> tuple[list[dict], dict | None]:
    """(rungs in a run.json, the one that holds at `step`). Raises UserError for what is no rung."""
    rungs = facts.get("ladder") or []
    if not all(
        isinstance(rung, dict)
        and all(
            rung.get(key) is None or isinstance(rung.get(key), int) and 0 < rung[key] < 2**31
            for key in ("step", *PARTS)
        )
        and rung.get("step")
        and rung.get("passes")
        for rung in rungs
    ):
        raise UserError("run.json: damaged (ladder)")
    return rungs, max(
        (rung for rung in rungs if rung["step"] <= step), key=lambda rung: rung["step"], default=None
    )


class RetryOnOutOfMemory:
    """Mixin of a transformers Trainer: the steps of `ladder`. The trainer says what a micro-batch's passes are (`passes_of`) and what
    the largest pass looks like (`largest_pass`)."""

    ladder: Ladder | None = None
    on_rung: Callable[[list[dict]], None] = staticmethod(lambda rungs: None)  # told whenever a rung was left
    on_rehearsed: Callable[[float], None] = staticmethod(lambda seconds: None)
    drawing = False  # are answers being drawn or judged?
    longest: Any = ()  # what the largest pass is made of; without it nothing is rehearsed
    _step_begun, _rehearsed, _drawn = -1, False, None

    def passes_of(self, inputs, index: int) -> Iterator[Any]:
        """The inputs of each forward pass of the step's micro-batch number `index`."""
        raise NotImplementedError

    def largest_pass(self) -> tuple[Any, Any]:
        """(inputs, items in batch) of a pass as large as any that can come, with `ladder.passes` rows."""
        raise NotImplementedError

    def rung_left(self) -> bool:
        """Take over what the ladder says now. True if the step's answers were of another length or number and must be drawn anew."""
        return False

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.ladder is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._step_begun < 0:
            distributed.start_alike(p for p in model.parameters() if p.requires_grad)
        if self._step_begun != self.state.global_step:
            self._step_begun, self._given = self.state.global_step, []
            self.ladder.recall(self.state.global_step + 1)
            self.rung_left()
            self._kept, self._drawn = self._counts(), None
            if self.longest and not self._rehearsed:
                self._rehearse(model)
        self._given.append(inputs)
        todo = [len(self._given) - 1]  # micro-batches; after a failure all of the step so far

        def work():
            loss = 0
            for index in todo:
                loss = sum(
                    self._pass(model, part, num_items_in_batch)
                    for part in self.passes_of(self._given[index], index)
                )
            return loss

        def again():
            todo[:] = range(len(self._given))

        loss = self._until_it_fits(model, work, again)
        if self.accelerator.sync_gradients:  # the step's last micro-batch
            distributed.mean_gradients(p for p in model.parameters() if p.requires_grad)
        return loss

    def _pass(self, model, inputs, num_items_in_batch):
        return distributed.all_or_none(
            lambda: super(RetryOnOutOfMemory, self).training_step(model, inputs, num_items_in_batch),
            machine.out_of_memory,
        )

    def _until_it_fits(self, model, work: Callable[[], Any], again: Callable[[], None]):
        while True:
            try:
                return work()
            except Exception as error:
                if not machine.out_of_memory(error):
                    raise
                problem = one_line(error)
            # Here and not in the except clause, whose traceback holds on to the tensors of the pass.
            step, drawing, self.drawing = self.state.global_step + 1, self.drawing, False
            model.zero_grad(set_to_none=True)
            machine.release_memory()
            if (told := self.ladder.down(step, drawing, problem)) is None:
                raise UserError(
                    f"step {step}: out of memory ({problem}), and nothing is left to give up: {self._here()}. --bits 4, a smaller model, shorter data (--max-length), a smaller --judge or one on the CPU (--judge-gpu-layers 0) take less"
                )
            say(
                f"  step {step}: out of memory {'drawing' if drawing else 'in the update'} ({problem}); {told}, and the step once more"
            )
            self._forget(everything=self.rung_left())
            self.on_rung(self.ladder.rungs)
            again()

    def _here(self) -> str:
        return ", ".join(f"{PARTS[name]} {value}" for name, value in self.ladder.here().items() if value)

    def _rehearse(self, model) -> None:
        self._rehearsed, began = True, time.monotonic()

        def work():
            inputs, items = self.largest_pass()
            self._pass(model, inputs, items)
            if "completion_ids" not in inputs:
                return inputs["input_ids"].numel()
            prompts = (
                inputs["prompt_ids"][:1] if getattr(self, "share_prefix", False) else inputs["prompt_ids"]
            )  # shared: computed once
            return prompts.numel() + inputs["completion_ids"].numel()

        tokens = self._until_it_fits(model, work, lambda: None)
        model.zero_grad(set_to_none=True)
        self._forget(everything=True)
        if hasattr(self, "_current_train_step_time"):
            self._current_train_step_time = 0.0
        seconds = time.monotonic() - began
        say(
            f"  the largest pass first: {self._here()}; {tokens:,} tokens fit, {machine.used_gb():.1f} GB in use, {seconds:.1f} s"
        )
        self.on_rehearsed(seconds)

    def _counts(self) -> dict[str, Any]:
        """How far each of TRL's lists of numbers has come."""
        return {
            "metrics": {name: len(values) for name, values in self._metrics["train"].items()},
            "tokens": getattr(self, "_total_train_tokens", None),
            "step": getattr(self, "_step", None),
        }

    def _forget(self, everything: bool) -> None:
        """Numbers of a pass that did not count. `everything`: of the step's answers, too."""
        kept = self._kept if everything else self._drawn or self._kept
        for name in list(self._metrics["train"]):
            del self._metrics["train"][name][kept["metrics"].get(name, 0) :]
            if not self._metrics["train"][name]:
                del self._metrics["train"][name]
        if kept["tokens"] is not None:
            self._total_train_tokens = kept["tokens"]
        if kept["step"] is not None:
            self._step = self._kept["step"]
