"""Do a step again in smaller passes when memory runs out in the update.

    micro-batch -> logits chunk

Both change only how much of a step is in memory at once, no number of it. They shrink by themselves, in the
same process. Completion length and group size change what is trained: where they decide (answers are drawn,
or the smallest pass does not fit), the run stops and names the options to go on with.

Nothing of a step takes effect before its last pass, so a step that ran out of memory is forgotten (its
gradients, its counts) and done again. run.json records which pass size holds from which step on; --resume
goes by it. The largest pass that can occur is rehearsed before the first step: what does not fit shows in the
first minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kardia.core import distributed, machine
from kardia.core.console import UserError, one_line, say

LEAST_CHUNK = 8  # rows of logits; below, the loop over chunks costs more than the logits


@dataclass
class PassSize:
    """Hold how much one forward pass takes: answers (SFT: dialogues), and rows of logits at once.

    chunk: None where TRL's own loss decides. changes: one record per step from which a smaller size holds.
    """

    passes: int
    chunk: int | None = 128
    changes: list[dict[str, Any]] = field(default_factory=list)  # {"step", "passes", "chunk", "why"}

    def shrink(self, step: int, why: str) -> str | None:
        """Halve the micro-batch, then quarter the chunk, from `step` on. Return the change in words, None at
        the least."""
        if self.passes > 1:
            change = f"micro-batch {self.passes} -> {self.passes // 2}"
            self.passes //= 2
        elif self.chunk and self.chunk > LEAST_CHUNK:
            smaller = max(LEAST_CHUNK, self.chunk // 4)
            change = f"logits chunk {self.chunk} -> {smaller}"
            self.chunk = smaller
        else:
            return None
        self.changes.append(
            {"step": step, "passes": self.passes, "chunk": self.chunk, "why": f"{change} ({why})"}
        )
        return change

    def set_for(self, step: int) -> None:
        """Take the size that held at `step`: a step that is done again after a resume is done as it was."""
        for change in self.changes:
            if change["step"] == step:
                self.passes, self.chunk = change["passes"], change.get("chunk")

    def __str__(self) -> str:
        chunk = f", logits chunk {self.chunk}" if self.chunk else ""
        return f"micro-batch {self.passes}{chunk}"


def recorded_changes(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the changes of pass size in a run.json. Raise UserError for what is no such record."""
    changes = facts.get("ladder") or []
    for change in changes:
        numbers = [change.get(key) for key in ("step", "passes")] if isinstance(change, dict) else [None]
        chunk = change.get("chunk") if isinstance(change, dict) else None
        numbers += [] if chunk is None else [chunk]
        if not all(isinstance(n, int) and 0 < n < 2**31 for n in numbers):
            raise UserError("run.json: damaged (ladder)")
    return changes


class RetryOnOutOfMemory:
    """Mixin of a transformers Trainer: do a step's passes, and on out of memory the whole step again in
    smaller ones.

    The trainer implements `passes_of` (a micro-batch's passes) and `largest_pass` (the largest that can
    occur).
    """

    pass_size: PassSize | None = None
    on_shrink: Callable[[list[dict]], None] = staticmethod(lambda changes: None)  # called after each change
    on_rehearsed: Callable[[float], None] = staticmethod(lambda seconds: None)
    longest: Any = ()  # what the largest pass is made of; without it nothing is rehearsed
    # What else takes less memory, as a sentence for the user.
    smaller_options = "--bits 4, a smaller model or shorter data (--max-length) take less"
    packed = True  # does the model take packed rows?
    _step_begun, _rehearsed = -1, False

    def set_passes(self, unpacked_reason: str | None, passes: int, longest: Any = ()) -> None:
        """Take over how large a pass is and what the largest is made of."""
        self.packed, self.longest = unpacked_reason is None, longest
        self.pass_size = PassSize(passes, 128 if self.packed else None)

    def passes_of(self, micro_batch) -> Iterator[Any]:
        """Yield the inputs of each forward pass of a micro-batch."""
        raise NotImplementedError

    def largest_pass(self) -> tuple[Any, Any, int]:
        """Return (inputs, items in batch, tokens of its row) of a pass of `pass_size.passes` rows, as large
        as any."""
        raise NotImplementedError

    def begin_step(self, model) -> None:
        """Note where a step begins, once per step, and rehearse the largest pass before the first."""
        if self._step_begun == self.state.global_step:
            return
        self._step_begun, self._micro_batches = self.state.global_step, []
        self.pass_size.set_for(self.state.global_step + 1)
        self._counts = self._count_metrics()
        if self.longest and not self._rehearsed:
            self._rehearse(model)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.pass_size is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self.begin_step(model)
        self._micro_batches.append(inputs)
        todo = [inputs]

        def work():
            losses = [
                super(RetryOnOutOfMemory, self).training_step(model, part, num_items_in_batch)
                for micro_batch in todo
                for part in self.passes_of(micro_batch)
            ]
            return sum(losses)

        def start_over():
            self._forget_metrics()
            todo[:] = self._micro_batches

        return self._until_it_fits(model, work, start_over)

    def _until_it_fits(self, model, work: Callable[[], Any], start_over: Callable[[], None]):
        while True:
            try:
                return work()
            except Exception as error:
                if not machine.out_of_memory(error):
                    raise
                reason = one_line(error)
            # Outside of the except clause, whose traceback holds on to the tensors of the pass.
            step = self.state.global_step + 1
            model.zero_grad(set_to_none=True)
            machine.release_memory()
            if distributed.size() > 1:  # the others wait inside the exchange of gradients
                fix = "begin again, in another --out, with a smaller --micro-batch"
                raise UserError(f"step {step}: out of memory ({reason}); {fix}")
            change = self.pass_size.shrink(step, reason)
            if change is None:
                raise UserError(
                    f"step {step}: out of memory ({reason}) with the smallest pass ({self.pass_size}). "
                    f"{self.smaller_options}"
                )
            say(f"  step {step}: out of memory in the update ({reason}); {change}, and the step once more")
            self.on_shrink(self.pass_size.changes)
            start_over()

    def _rehearse(self, model) -> None:
        """Compute the largest pass forwards and backwards, and leave no trace of it."""
        self._rehearsed, began = True, time.monotonic()

        def work():
            inputs, items, tokens = self.largest_pass()
            super(RetryOnOutOfMemory, self).training_step(model, inputs, items)
            return tokens

        tokens = self._until_it_fits(model, work, lambda: None)
        model.zero_grad(set_to_none=True)
        self._forget_metrics()
        if hasattr(self, "_current_train_step_time"):
            self._current_train_step_time = 0.0
        seconds = time.monotonic() - began
        say(
            f"  the largest pass first: {self.pass_size}; {tokens:,} tokens fit, "
            f"{machine.used_gb():.1f} GB in use, {seconds:.1f} s"
        )
        self.on_rehearsed(seconds)

    def _count_metrics(self) -> dict[str, Any]:
        """Return how long each of TRL's lists of numbers is."""
        return {
            "metrics": {name: len(values) for name, values in self._metrics["train"].items()},
            "tokens": getattr(self, "_total_train_tokens", None),
            "step": getattr(self, "_step", None),
        }

    def _forget_metrics(self) -> None:
        """Drop the numbers of passes that did not count."""
        metrics, before = self._metrics["train"], self._counts
        for name in list(metrics):
            del metrics[name][before["metrics"].get(name, 0) :]
            if not metrics[name]:
                del metrics[name]
        if before["tokens"] is not None:
            self._total_train_tokens = before["tokens"]
        if before["step"] is not None:
            self._step = before["step"]
