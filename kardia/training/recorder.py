"""Write a run down while it trains: a line per step, alarms, Ctrl-C."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

from kardia.core import distributed, machine
from kardia.core.console import UserError, say
from kardia.core.run_directory import Run
from kardia.results import run_files, warnings
from kardia.training.progress import Board

STOPS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what a batch system sends before it kills


def log_row(step: int, logs: dict[str, Any], seconds: float, tokens: float | None) -> dict[str, Any]:
    """What TRL logged of a step and what it did not: memory, seconds and their parts, SFT's rate. `tokens`: seen before the step
    (None: not known, the first step after a resume). Without NaN, which is no JSON."""
    row = {
        "step": step,
        **{k: v for k, v in logs.items() if not isinstance(v, float) or v == v},
        "memory_gb": round(machine.used_gb(age=10), 3),
        "seconds": round(seconds, 3),
    }
    if "time/rollout" in row:
        row["time/update"] = round(
            row["seconds"] - sum(row.get(f"time/{part}", 0.0) for part in ("rollout", "judge", "inspect")), 3
        )
    elif "num_tokens" in row and tokens is not None:
        row["tokens_per_second"] = round((row["num_tokens"] - tokens) / max(1e-9, seconds), 1)
    return row


def recorder(run: Run, board: Board, patience: int = 0, step_done: Callable[[int], dict] = lambda step: {}):
    """A TrainerCallback: one line per step to log.jsonl and to the board. Ctrl-C (or SIGTERM) saves a checkpoint, then stops; so does GRPO
    after `patience` steps in which no group had two different rewards (`stuck`). `step_done(step)` is called once the weights
    have moved and may add to the step's record. Alarms (kardia/alarms.py) are raised, each once, when a checkpoint was saved and the run
    has grown by a fifth since the last look."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def __init__(self) -> None:
            self.stopping, self.idle, self.stuck, self.more, self.looked = False, 0, False, {}, 0
            self.last, self.tokens, self.told = time.monotonic(), None, set()
            self.tokens_before: float | None = 0  # seen before this process began

        def on_train_begin(self, args, state, control, **_):
            self.last, self.tokens = time.monotonic(), self.tokens_before
            board.begin(state.max_steps, state.global_step)
            try:
                for number in STOPS:
                    signal.signal(number, self.interrupt)
            except ValueError:  # not in the main thread: Ctrl-C is somebody else's business
                pass

        def discount(self, seconds: float) -> None:
            """Time that belongs to no step."""
            self.last += seconds

        def on_train_end(self, args, state, control, **_):
            board.end()

        def interrupt(self, *_):
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            say("\nfinishing this step, then saving (Ctrl-C again: stop at once)")

        def on_step_begin(self, args, state, control, **_):
            self.passes = 0

        def on_substep_end(self, args, state, control, **_):
            self.passes += 1
            board.phase("update", self.passes, args.gradient_accumulation_steps)

        def on_step_end(self, args, state, control, **_):
            self.more = step_done(state.global_step)
            self.stopping = distributed.any_of(
                self.stopping
            )  # the signal may have reached one process a step before another
            if self.stopping:
                control.should_save = control.should_training_stop = True

        def on_log(self, args, state, control, logs=None, **_):
            if "train_runtime" in (logs or {}) or not logs:
                return
            now = time.monotonic()
            row = log_row(state.global_step, {**logs, **self.more}, now - self.last, self.tokens)
            self.last, self.tokens = now, row.get("num_tokens")
            run.append("log.jsonl", [row])
            board.step(row)
            self.idle = idle_steps([row], self.idle)
            if distributed.any_of(bool(patience) and self.idle >= patience):
                self.stuck = control.should_save = control.should_training_stop = True

        def on_save(self, args, state, control, **_):
            if (
                distributed.rank() == 0 and state.global_step >= 1.2 * self.looked
            ):  # reading a long run back takes its time: the longer it is, the rarer
                self.looked = state.global_step
                self.warn()

        def warn(self) -> None:
            for alarm in warnings.check(run_files.read_run(run.path)):
                if alarm.kind not in self.told:
                    self.told.add(alarm.kind)
                    say(f"  ! {alarm.text}")

    return Recorder()


def idle_steps(rows: list[dict[str, Any]], before: int = 0) -> int:
    """How many steps in a row, the last one included, had no group with two different rewards."""
    for row in rows:
        before = before + 1 if row.get("frac_reward_zero_std") == 1 else 0
    return before


def diagnosis(run: Run, steps: int) -> str:
    """Why the last `steps` steps taught nothing."""
    groups = run_files.groups_of(run_files.read_run(run.path)["completions"])
    return f"in {steps} steps no group had two different rewards. {warnings.diagnose([group for group in groups if group[0] > groups[-1][0] - steps])}"


def check_tracker(name: str) -> None:
    """A tracker of TRL's that is not installed is told before anything is loaded."""
    from importlib.util import find_spec

    if name != "none" and not any(
        find_spec(module) for module in ((name, "tensorboardX") if name == "tensorboard" else (name,))
    ):
        raise UserError(f"--track {name} needs a package that is not installed: pip install {name}")
