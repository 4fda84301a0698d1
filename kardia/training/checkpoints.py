"""Keep a run from being lost: checkpoints that are whole or not there, resuming from the newest whole one,
the end.

A checkpoint is written under a hidden name, sealed with the hashes of its files, synced to disk, and only
then gets its name. Whenever the process dies, what lies under `checkpoint-N` is whole; damage by a bad disk
shows in the seal.
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
from kardia.training import recorder
from kardia.training.out_of_memory import recorded_changes
from kardia.training.progress import Board

SEAL = "seal.json"  # {file name: hash} of a checkpoint
KEPT = 2  # checkpoints; the older one is for the day when the newer one is damaged
# How libraries name a full disk.
DISK_ERRORS = ("SafetensorError", "PytorchStreamWriter", "iostream", "No space")


def step_of(checkpoint: Path) -> int:
    """Return a checkpoint's step, -1 for what is no checkpoint."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def checkpoints(run: Run) -> list[Path]:
    """Return the checkpoints by step. (Not by time: a clock may jump.)"""
    found = [path for path in run.path.glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(found, key=step_of)


def damage(checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be resumed from, in a few words; None if it is whole."""
    try:
        sealed = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        for name, digest in sealed.items():
            file = checkpoint / Path(name).name
            if not file.is_file():
                return f"{name} is missing"
            if file_hash(file) != digest:
                return f"{name} is damaged"
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        right = isinstance(state["max_steps"], int) and state["global_step"] == step_of(checkpoint)
        return None if right else "its trainer_state.json is of another step"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its seal cannot be read: {one_line(error)}"


def newest(run: Run) -> Path | None:
    """Return the newest whole checkpoint, and say which damaged ones are skipped."""
    for path in reversed(checkpoints(run)):
        problem = damage(path)
        if problem is None:
            return path
        say(f"{path.name} is skipped ({problem})")
    return None


def sync_to_disk(directory: Path) -> None:
    """Sync every file of a directory, and its names: a rename that outlives a power cut must not name empty
    files."""
    for path in (*(p for p in directory.rglob("*") if p.is_file()), directory):
        with contextlib.suppress(OSError):  # a directory cannot be opened everywhere
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def save_whole_checkpoints(run: Run, trainer) -> None:
    """Make a transformers Trainer save its checkpoints whole or not at all."""
    save = trainer._save_checkpoint

    def save_whole(model, trial) -> None:
        name = f"checkpoint-{trainer.state.global_step}"
        distributed.first(lambda: temporary_path(run.path / "checkpoint"))
        hidden, target = run.path / ".checkpoint.part", run.path / name
        trainer._get_output_dir = lambda trial=None: str(hidden)
        try:
            save(model, trial)  # every process: each has a random state of its own
            distributed.wait()
            if distributed.rank() == 0:
                _seal(hidden / name, target)
        except Exception as error:
            if not isinstance(error, OSError) and not any(
                word in f"{type(error).__name__} {error}" for word in DISK_ERRORS
            ):
                raise
            free = shutil.disk_usage(run.path).free / machine.GB
            raise UserError(
                f"{target}: cannot be written ({one_line(error)}; {free:.2f} GB are free there); make room, "
                f"then "
                "the same command with --resume goes on from the checkpoint before"
            ) from error
        finally:
            if distributed.rank() == 0:
                shutil.rmtree(hidden, ignore_errors=True)
        if distributed.rank() == 0:
            old = [path for path in checkpoints(run) if step_of(path) <= trainer.state.global_step]
            for path in old[:-KEPT]:
                shutil.rmtree(path)

    trainer._save_checkpoint = save_whole
    trainer.args.save_total_limit = None  # the Trainer's own choice goes by time stamps


def _seal(written: Path, target: Path) -> None:
    """Give a written checkpoint its seal and its name."""
    (written / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads
    # TRL's KL reference: beside it, transformers would not load the adapter itself.
    shutil.rmtree(written / "ref", ignore_errors=True)
    files = [path for path in sorted(written.iterdir()) if path.is_file()]
    write_json(written / SEAL, {path.name: file_hash(path) for path in files})
    sync_to_disk(written)
    if target.exists():  # a damaged one that was skipped
        shutil.rmtree(target)
    os.replace(written, target)


def check_disk_room(run: Run, trainer) -> None:
    """Raise UserError before the first step if the disk cannot hold the run's checkpoints."""
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    # Weights and two moments of each checkpoint in float32; the adapter; tokenizer and logs.
    needed = (KEPT + 1) * trained * 12 + trained * 4 + 30e6
    free = shutil.disk_usage(run.path).free
    if free < needed:
        raise UserError(
            f"{run.path}: checkpoints and logs need about {needed / machine.GB:.2f} GB there, "
            f"{free / machine.GB:.2f} GB are free; make room or choose another --out"
        )


def prepare_resume(run: Run, trainer) -> Path | None:
    """Return the checkpoint to resume from, and give the trainer the pass size that held there."""
    checkpoint = newest(run)
    size, step = trainer.pass_size, step_of(checkpoint) if checkpoint else 0
    size.changes = recorded_changes(run.facts)
    for change in size.changes:
        if change["step"] <= step:
            size.set_for(change["step"])
    trainer.on_shrink = lambda changes: run.update(ladder=changes)
    if distributed.size() > 1 and trainer.args.device.type == "cpu":
        import torch

        trainer.args.__dict__["_setup_devices"] = torch.device("cpu")  # "cpu:0" cannot load a checkpoint
    return checkpoint


def train(
    run: Run,
    trainer,
    board: Board,
    patience: int = 0,
    step_done: Callable[[int], dict] = recorder.nothing_more,
    last_facts: Callable[[], dict] = dict,
) -> None:
    """Train (or resume from the newest checkpoint), save the adapter under its final name, complete run.json.

    patience and step_done are GRPO's (see `recorder`). last_facts() returns what else run.json says of a
    finished run.
    """
    from transformers import PrinterCallback

    checkpoint = prepare_resume(run, trainer)
    trainer.remove_callback(PrinterCallback)  # it prints on stdout, which is kept for the product
    trainer.create_model_card = lambda *_, **__: None  # a run directory holds what we put there
    save_whole_checkpoints(run, trainer)
    check_disk_room(run, trainer)
    callback = recorder.recorder(run, board, patience, step_done)
    trainer.add_callback(callback)
    trainer.on_rehearsed = callback.discount  # the rehearsal belongs to no step
    seconds_before = _rewind(run, trainer, checkpoint, callback)
    run.update(status="running")
    # The callback takes these signals over; the next run in this process gets them back.
    handlers = {number: signal.getsignal(number) for number in recorder.STOP_SIGNALS}
    peak, began = machine.PeakSampler(), time.monotonic()

    def measured() -> dict:
        highest = max(peak.peak, run.facts.get("peak_memory_gb", 0.0))
        seconds = seconds_before + time.monotonic() - began
        facts = {"seconds": round(seconds, 1), "peak_memory_gb": round(highest, 2)}
        return {**facts, "peak_memory_of": peak.of}

    try:
        with peak:
            _loop(trainer, checkpoint)
    except BaseException:
        with contextlib.suppress(OSError):
            run.update(status="interrupted", **measured())
        raise
    finally:
        board.end()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if distributed.rank() == 0:
        callback.warn()
    _raise_if_stopped(run, trainer, callback, patience, measured)
    distributed.first(lambda: _finish(run, trainer, {**measured(), **last_facts()}))


def _rewind(run: Run, trainer, checkpoint: Path | None, callback) -> float:
    """Forget what was recorded after the checkpoint. Return the seconds that the run took up to it."""
    step = step_of(checkpoint) if checkpoint else 0
    distributed.first(lambda: run.rewind(step))  # the others read what is left
    if checkpoint:
        say(f"going on from step {step}")
    path = run.path / "log.jsonl"
    logged = [row for _, row, _ in json_lines(path)] if path.exists() else []
    callback.tokens_before = logged[-1].get("num_tokens") if logged else 0
    callback.idle = recorder.idle_steps(logged)
    if hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = callback.tokens_before or 0
    return sum(row.get("seconds", 0.0) for row in logged)


def _raise_if_stopped(run: Run, trainer, callback, patience: int, measured: Callable[[], dict]) -> None:
    """Raise UserError if the run stopped before its end, with the way to go on."""
    step, last = trainer.state.global_step, trainer.state.max_steps
    if callback.stuck:
        run.update(status="stopped", **measured())
        raise UserError(
            f"stopped at step {step}: {recorder.diagnosis(run, patience)} The same command with --resume and "
            "--patience 0 goes on regardless"
        )
    if callback.stopping and step < last:
        run.update(status="interrupted", **measured())
        raise UserError(f"stopped at step {step} of {last}; go on with the same command and --resume")


def _loop(trainer, checkpoint: Path | None) -> None:
    """Run the Trainer's loop. A checkpoint of the last step is only loaded: the loop would take one more
    step."""
    try:
        state = None
        if checkpoint:
            # Version 0.1.0 kept TRL's reference in a checkpoint.
            distributed.first(lambda: shutil.rmtree(checkpoint / "ref", ignore_errors=True))
            state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if state and state["global_step"] >= state["max_steps"]:
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state.global_step, trainer.state.max_steps = state["global_step"], state["max_steps"]
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{checkpoint}: holds something else than numbers ({one_line(error)}) and is not read; remove "
            f"it, "
            "then --resume goes on from the one before"
        ) from error
    except Exception as error:
        if not machine.out_of_memory(error):
            raise
        reason = one_line(error)
    raise UserError(
        f"out of memory outside of a pass ({reason}); end what else is in memory, then the same command with "
        "--resume goes on"
    )


def save_adapter(model, path: Path) -> None:
    """Write the trained adapter to the directory `path`, whole or not at all. Raise UserError if the disk is
    full."""
    target = temporary_path(path)
    try:
        model.save_pretrained(target, selected_adapters=["default"])
        (target / "README.md").unlink(missing_ok=True)
        config = json.loads((target / "adapter_config.json").read_text(encoding="utf-8"))
        if isinstance(config["target_modules"], list):  # not Unsloth's pattern
            # A set in PEFT, whose order is another one in every process: equal runs are to be equal files.
            config["target_modules"].sort()
            write_json(target / "adapter_config.json", config)
        sync_to_disk(target)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(target, path)
    except Exception as error:  # on a full disk safetensors raises its own class
        fix = "make room, then the same command with --resume writes it"
        raise UserError(f"{path}: cannot be written ({one_line(error)}); {fix}") from error
    finally:
        shutil.rmtree(target, ignore_errors=True)


def save_best(run: Run, model, step: int) -> None:
    """Write the adapter that did best on held-out prompts so far as a run of its own, run/best.

    Whatever takes a run takes it: `evaluate`, `export`, `chat`, `grpo --from`.
    """
    if distributed.rank() == 0:
        path = run.path / "best"
        path.mkdir(exist_ok=True)
        save_adapter(model, path / "adapter")
        facts = {**run.facts, "best_of": str(run.path), "best_step": step, "status": "done"}
        write_json(path / "run.json", facts)


def _finish(run: Run, trainer, facts: dict) -> None:
    """Write the adapter under its final name, complete run.json and remove the checkpoints."""
    save_adapter(trainer.model, run.path / "adapter")
    run.update(status="done", ended=time.strftime("%Y-%m-%dT%H:%M:%S"), **facts)
    tidy(run)


def already_done(run: Run) -> bool:
    """Return whether nothing is left to do. A kill may have come between the last words in run.json and
    `tidy`."""
    if not distributed.same(run.done):
        return False
    if distributed.rank() == 0:
        tidy(run)
    say(f"{run.path}: finished already, {run.facts.get('ended', 'some time ago')}")
    return True


def tidy(run: Run) -> None:
    """Remove a finished run's checkpoints, and what was being written when it was killed."""
    patterns = ("checkpoint-*", ".*.part", ".rollout-lora*.gguf")
    for leftover in (path for pattern in patterns for path in run.path.glob(pattern)):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
