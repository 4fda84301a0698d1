"""Write a run down while it trains: a line per step, warnings, Ctrl-C, a stop where nothing is learned."""

from __future__ import annotations

import importlib.util
import signal
import time
from collections.abc import Callable
from typing import Any

from kardia.core import distributed, machine
from kardia.core.console import UserError, say
from kardia.core.run_directory import Run
from kardia.results import run_files, warnings
from kardia.results.groups import groups_of
from kardia.training.progress import Board

GROWN = 1.1  # times the memory after the first step: what was freed since goes back to the system
OTHER_TIMES = ("rollout", "judge", "inspect", "held_out")  # of a step, beside its update
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what a batch system sends before it kills


def log_row(step: int, logs: dict[str, Any], seconds: float, tokens_before: float | None) -> dict[str, Any]:
    """Return a step's line of log.jsonl: what TRL logged, and memory, seconds and their parts, SFT's rate.

    tokens_before: tokens seen before the step; None if that is not known (the first step after a resume).
    """
    numbers = {key: v for key, v in logs.items() if v == v}  # NaN is no JSON
    row = {
        "step": step,
        **numbers,
        "memory_gb": round(machine.used_gb(age=10), 3),
        "seconds": round(seconds, 3),
    }
    if "time/rollout" in row:
        other = sum(row.get(f"time/{part}", 0.0) for part in OTHER_TIMES)
        row["time/update"] = round(row["seconds"] - other, 3)
    elif "num_tokens" in row and tokens_before is not None:
        row["tokens_per_second"] = round((row["num_tokens"] - tokens_before) / max(1e-9, seconds), 1)
    return row


class Recording:
    """The state of a recorder, and what it does at each event; `recorder` makes a TrainerCallback of it."""

    def __init__(self, run: Run, board: Board, patience: int, step_done: Callable[[int], dict]) -> None:
        self.run, self.board, self.patience, self.step_done = run, board, patience, step_done
        self.stopping, self.stuck = False, False
        self.idle = 0  # steps in a row without two different rewards in any group
        self.extra: dict[str, float] = {}  # what `step_done` adds to the step's line
        self.warned: set[str] = set()
        self.last_check = 0  # the step of the last look for warnings
        self.last, self.tokens, self.passes = time.monotonic(), None, 0
        self.tokens_before: float | None = 0  # seen before this process began
        self.settled = 0.0  # GB in use after this process's first step

    def on_train_begin(self, args, state, control, **_):
        self.last, self.tokens = time.monotonic(), self.tokens_before
        self.board.begin(state.max_steps, state.global_step)
        try:
            for number in STOP_SIGNALS:
                signal.signal(number, self.interrupt)
        except ValueError:  # not in the main thread, which alone may set handlers
            pass

    def discount(self, seconds: float) -> None:
        """Take time out of the current step that belongs to no step."""
        self.last += seconds

    def on_train_end(self, args, state, control, **_):
        self.board.end()

    def interrupt(self, *_) -> None:
        """Finish the step and save at the first signal, stop at once at the second."""
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        say("\nfinishing this step, then saving (Ctrl-C again: stop at once)")

    def on_step_begin(self, args, state, control, **_):
        self.passes = 0

    def on_substep_end(self, args, state, control, **_):
        self.passes += 1
        self.board.phase("update", self.passes, args.gradient_accumulation_steps)

    def on_step_end(self, args, state, control, **_):
        self.extra = self.step_done(state.global_step)
        self._trim()
        # The signal may reach one process a step before another.
        self.stopping = distributed.any_of(self.stopping)
        if self.stopping:
            control.should_save = control.should_training_stop = True

    def _trim(self) -> None:
        """Give freed memory back when it has grown: rows of ever other lengths break up what glibc keeps."""
        used = machine.used_gb()
        if not self.settled:
            self.settled = used
        elif used > GROWN * self.settled and not machine.has_gpu():
            machine.release_memory()
            self.settled = max(self.settled, machine.used_gb())

    def on_log(self, args, state, control, logs=None, **_):
        if not logs or "train_runtime" in logs:
            return
        now = time.monotonic()
        row = log_row(state.global_step, {**logs, **self.extra}, now - self.last, self.tokens)
        self.last, self.tokens = now, row.get("num_tokens")
        self.run.append("log.jsonl", [row])
        self.board.step(row)
        self.idle = idle_steps([row], self.idle)
        if distributed.any_of(bool(self.patience) and self.idle >= self.patience):
            self.stuck = control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **_):
        # Reading a run back takes the longer the longer it is, so it is read when it has grown by a fifth.
        if distributed.rank() == 0 and state.global_step >= 1.2 * self.last_check:
            self.last_check = state.global_step
            self.warn()

    def warn(self) -> None:
        """Print each kind of warning once."""
        for warning in warnings.check(run_files.read_run(self.run.path)):
            if warning.kind not in self.warned:
                self.warned.add(warning.kind)
                say(f"  ! {warning.text}")


def nothing_more(step: int) -> dict[str, float]:
    """Add nothing to a step's line."""
    return {}


def recorder(
    run: Run, board: Board, patience: int = 0, step_done: Callable[[int], dict] = nothing_more
) -> Any:
    """Return a TrainerCallback that writes log.jsonl, feeds the board and stops the run in good order.

    Ctrl-C or SIGTERM saves a checkpoint, then stops; so does GRPO after `patience` steps in which no group
    had two different rewards (`stuck`). step_done(step) is called once the weights have moved and may add to
    the step's line. Warnings are printed when a checkpoint is saved, each kind once.
    """
    from transformers import TrainerCallback

    class Recorder(Recording, TrainerCallback):
        pass

    return Recorder(run, board, patience, step_done)


def idle_steps(rows: list[dict[str, Any]], before: int = 0) -> int:
    """Return how many steps in a row, the last one included, had no group with two different rewards."""
    for row in rows:
        before = before + 1 if row.get("frac_reward_zero_std") == 1 else 0
    return before


def diagnosis(run: Run, steps: int) -> str:
    """Return why the last `steps` steps taught nothing."""
    groups = groups_of(run_files.read_run(run.path)["completions"])
    last = [group for group in groups if group[0] > groups[-1][0] - steps]
    return f"in {steps} steps no group had two different rewards. {warnings.diagnose(last)}"


def check_tracker(name: str) -> None:
    """Raise UserError if the packages of a tracker are not installed, before anything is loaded."""
    modules = {"none": ["sys"], "tensorboard": ["tensorboard", "tensorboardX"]}.get(name, [name])
    if not any(importlib.util.find_spec(module) for module in modules):
        raise UserError(f"--track {name} needs a package that is not installed: pip install {name}")
