"""A run that is not lost: checkpoints that are whole or not there, going on from the newest whole one, the end.

A checkpoint is written under a hidden name, sealed with the hashes of its files, brought to disk, and only then gets its name.
Whenever the process dies, what lies under `checkpoint-N` is whole; what a bad disk made of it later, the seal shows.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from kardia.core import distributed, machine
from kardia.core.console import UserError, one_line, say
from kardia.core.files import file_hash, json_lines, temporary_path, write_json
from kardia.core.run_directory import Run
from kardia.training import progress as progress_board
from kardia.training import recorder

SEAL = "seal.json"  # {file name: hash} of a checkpoint
KEPT = 2  # checkpoints; the older one is for the day when the newer one is damaged


def step_of(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def checkpoints(run: Run) -> list[Path]:
    """By step, not by time: a clock may jump."""
    return sorted(
        (path for path in run.path.glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0), key=step_of
    )


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be gone on from, in a few words; None if it is whole."""
    try:
        sealed = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        for name, digest in sealed.items():
            if not (file := checkpoint / Path(name).name).is_file():
                return f"{name} is missing"
            if file_hash(file) != digest:
                return f"{name} is damaged"
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return (
            None
            if isinstance(state["max_steps"], int) and state["global_step"] == step_of(checkpoint)
            else "its trainer_state.json is of another step"
        )
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its seal cannot be read: {one_line(error)}"


def newest(run: Run) -> Path | None:
    """The newest whole checkpoint; each damaged one is told of."""
    for path in reversed(checkpoints(run)):
        if (why := damage(path)) is None:
            return path
        say(f"{path.name} is skipped ({why})")
    return None


def to_disk(directory: Path) -> None:
    """Every file of a directory, and its names: a rename that outlives a power cut must not name empty files."""
    for path in (*(p for p in directory.rglob("*") if p.is_file()), directory):
        with contextlib.suppress(OSError):  # a directory cannot be opened everywhere
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def whole_checkpoints(run: Run, trainer) -> None:
    """Make a transformers Trainer save its checkpoints the way this module's first lines say."""
    save = trainer._save_checkpoint

    def save_whole(model, trial) -> None:
        name = f"checkpoint-{trainer.state.global_step}"
        distributed.first(lambda: temporary_path(run.path / "checkpoint"))
        hidden, target = run.path / ".checkpoint.part", run.path / name
        trainer._get_output_dir = lambda trial=None: str(hidden)
        try:
            save(model, trial)  # every process: each has a random state of its own
            distributed.wait()
            if distributed.rank():
                return
            (hidden / name / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads
            shutil.rmtree(
                hidden / name / "ref", ignore_errors=True
            )  # TRL's KL reference: beside it, transformers would not load the adapter itself
            write_json(
                hidden / name / SEAL,
                {p.name: file_hash(p) for p in sorted((hidden / name).iterdir()) if p.is_file()},
            )
            to_disk(hidden / name)
            if target.exists():  # a damaged one that was skipped
                shutil.rmtree(target)
            os.replace(hidden / name, target)
        except Exception as error:
            if not isinstance(error, OSError) and not any(
                word in f"{type(error).__name__} {error}"
                for word in ("SafetensorError", "PytorchStreamWriter", "iostream", "No space")
            ):
                raise
            left = shutil.disk_usage(run.path).free / machine.GB
            raise UserError(
                f"{target}: cannot be written ({one_line(error)}; {left:.2f} GB are free there); make room, then the same command with --resume goes on from the checkpoint before"
            ) from error
        finally:
            if distributed.rank() == 0:
                shutil.rmtree(hidden, ignore_errors=True)
        for old in [path for path in checkpoints(run) if step_of(path) <= trainer.state.global_step][:-KEPT]:
            shutil.rmtree(old)

    trainer._save_checkpoint = save_whole
    trainer.args.save_total_limit = None  # the Trainer's own choice goes by time stamps


def room_for_checkpoints(run: Run, trainer) -> None:
    """A disk that cannot hold what a run keeps is told of before its first step, not at its first checkpoint."""
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    needed = (
        (KEPT + 1) * trained * 12 + trained * 4 + 30e6
    )  # weights and two moments each, in float32; the adapter; tokenizer, logs
    if (free := shutil.disk_usage(run.path).free) < needed:
        raise UserError(
            f"{run.path}: checkpoints and logs need about {needed / machine.GB:.2f} GB there, {free / machine.GB:.2f} GB are free; make room or choose another --out"
        )


def finish(
    run: Run,
    trainer,
    checkpoint: Path | None,
    patience: int = 0,
    step_done: Callable[[int], dict] = lambda step: {},
    board: progress_board.Board | None = None,
    closing: Callable[[], dict] = dict,
) -> None:
    """Train (or go on), save the adapter under its final name, close the books. `board` shows how it goes, `patience` and
    `step_done` are GRPO's: see kardia/live.py. `closing()`: what else run.json says of a run that is done."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.create_model_card = lambda *_, **__: None  # a run directory holds what we put there
    whole_checkpoints(run, trainer)
    room_for_checkpoints(run, trainer)
    board = board or progress_board.Board(run.facts["command"].upper())
    callback = recorder.recorder(run, board, patience, step_done)
    trainer.add_callback(callback)
    trainer.on_rehearsed = callback.discount
    distributed.first(
        lambda: run.rewind(step_of(checkpoint) if checkpoint else 0)
    )  # the others read what is left
    if checkpoint:
        say(f"going on from step {step_of(checkpoint)}")
    logged = (
        [row for _, row, _ in json_lines(run.path / "log.jsonl")] if (run.path / "log.jsonl").exists() else []
    )
    gone, callback.tokens_before = (
        sum(row.get("seconds", 0.0) for row in logged),
        logged[-1].get("num_tokens") if logged else 0,
    )
    callback.idle = recorder.idle_steps(logged)
    if hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = callback.tokens_before or 0
    run.update(status="running")
    before, peak = {number: signal.getsignal(number) for number in recorder.STOPS}, machine.PeakSampler()
    began = time.monotonic()
    measured = lambda: dict(
        seconds=round(gone + time.monotonic() - began, 1),
        peak_memory_gb=round(max(peak.peak, run.facts.get("peak_memory_gb", 0.0)), 2),
        peak_memory_of=peak.of,
    )  # noqa: E731
    try:
        with peak:
            _train(trainer, checkpoint)
    except BaseException:
        with contextlib.suppress(OSError):
            run.update(status="interrupted", **measured())
        raise
    finally:
        board.end()
        for number, handler in before.items():
            signal.signal(number, handler)
    if distributed.rank() == 0:
        callback.warn()
    if callback.stuck:
        run.update(status="stopped", **measured())
        raise UserError(
            f"stopped at step {trainer.state.global_step}: {recorder.diagnosis(run, patience)} The same command with --resume and --patience 0 goes on regardless"
        )
    if callback.stopping and trainer.state.global_step < trainer.state.max_steps:
        run.update(status="interrupted", **measured())
        raise UserError(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; go on with the same command and --resume"
        )
    distributed.first(lambda: _close(run, trainer, {**measured(), **closing()}))


def _close(run: Run, trainer, facts: dict) -> None:
    """The adapter under its final name, and the last words in run.json."""
    target = temporary_path(run.path / "adapter")
    try:
        trainer.model.save_pretrained(target, selected_adapters=["default"])
        (target / "README.md").unlink(missing_ok=True)
        to_disk(target)
        shutil.rmtree(run.path / "adapter", ignore_errors=True)
        os.replace(target, run.path / "adapter")
    except Exception as error:  # safetensors' own class, on a full disk
        raise UserError(
            f"{run.path}/adapter: cannot be written ({one_line(error)}); make room, then the same command with --resume writes it"
        ) from error
    finally:
        shutil.rmtree(target, ignore_errors=True)
    run.update(status="done", ended=time.strftime("%Y-%m-%dT%H:%M:%S"), **facts)
    tidy(run)


def _train(trainer, checkpoint: Path | None) -> None:
    """The Trainer's loop, from a checkpoint or from the beginning. One of the last step is loaded only: the loop would take another."""
    try:
        if checkpoint:  # an older version kept TRL's reference in it
            distributed.first(lambda: shutil.rmtree(checkpoint / "ref", ignore_errors=True))
        state = (
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            if checkpoint
            else None
        )
        if state and state["global_step"] >= state["max_steps"]:
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state.global_step, trainer.state.max_steps = state["global_step"], state["max_steps"]
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{checkpoint}: holds something else than numbers ({one_line(error)}) and is not read; remove it, then --resume goes on from the one before"
        ) from error
    except Exception as error:
        if not machine.out_of_memory(error):
            raise
        told = one_line(error)
    raise UserError(
        f"out of memory outside of a pass ({told}); take away what else is in memory, then the same command with --resume goes on"
    )


def already_done(run: Run) -> bool:
    """Is there nothing left to do? A kill may have come between the last words in run.json and the clearing up."""
    if not distributed.same(run.done):
        return False
    if distributed.rank() == 0:
        tidy(run)
    say(f"{run.path}: finished already, {run.facts.get('ended', 'some time ago')}")
    return True


def tidy(run: Run) -> None:
    """A finished run keeps no checkpoints, and nothing that was being written when it was killed."""
    for leftover in (
        *run.path.glob("checkpoint-*"),
        *run.path.glob(".*.part"),
        *run.path.glob(".rollout-lora*.gguf"),
    ):
        shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
