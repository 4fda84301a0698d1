"""Hold a run directory: what was asked, with what, from where; its records; and who may write to it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from kardia.core import distributed
from kardia.core.console import UserError, say
from kardia.core.files import (
    as_json_lines,
    json_lines,
    lock_directory,
    unlock_directory,
    write_json,
    write_text,
)
from kardia.core.machine import describe_machine, versions

# Each line of them belongs to one step.
STEP_FILES = ("log.jsonl", "completions.jsonl", "tokens.jsonl", "held_out.jsonl")


class Run:
    """A run directory: run.json (what was asked, with what, from where), log.jsonl, adapter/ and so on.

    Reading needs no lock. A writer holds one (`create` takes it, the end of a `with` block releases it), and
    a second process is refused. Of several processes that train one model, only the first one writes.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = Path(path), None
        file = self.path / "run.json"
        if not file.is_file():
            raise UserError(f"{path}: not a run directory (no run.json); sft and grpo make one with --out")
        _check_links(self.path)
        try:
            self.facts = _checked_facts(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: damaged ({str(error)[:100]})") from error

    @classmethod
    def create(cls, path: Path, command: str, options: Any, resume: bool, **facts: Any) -> Run:
        """Return a new run, or with `resume` the existing one if options and files are the same."""
        run = distributed.first(lambda: cls._create(Path(path), command, options, resume, facts))
        return run or cls(path)  # the other processes must see the same directory

    @classmethod
    def _create(cls, path: Path, command: str, options: Any, resume: bool, facts: dict[str, Any]) -> Run:
        # A start that was killed leaves only hidden files.
        new = not path.exists() or path.is_dir() and all(file.name.startswith(".") for file in path.iterdir())
        if not new and not (resume and path.is_dir()):
            raise UserError(f"{path}: exists already; choose another --out, or --resume to go on with it")
        lock = _lock_for_writing(path)
        try:
            if resume and new:
                say(f"{path}: nothing to go on with there; beginning")
            asked = _as_json(dataclasses.asdict(options))
            if new:
                started = time.strftime("%Y-%m-%dT%H:%M:%S")
                first = {"command": command, "options": asked, "seed": options.seed, "versions": versions()}
                first |= {"machine": describe_machine(), "started": started, "status": "running"}
                write_json(path / "run.json", first | facts)
            run = cls(path)
            run._check_same(options, asked, facts.get("hashes", {}))
        except BaseException:
            unlock_directory(lock)
            raise
        run._lock = lock
        return run

    def _check_same(self, options: Any, asked: dict[str, Any], hashes: dict[str, str]) -> None:
        """Raise UserError unless the run was asked for the same, with the same files."""
        # An older version had fewer options: their defaults hold. A free option changes no number of the run.
        fields = {field.name: field for field in dataclasses.fields(options)}
        recorded = _as_json({name: field.default for name, field in fields.items()}) | self.facts["options"]
        for name, value in asked.items():
            if recorded[name] != value and not fields[name].metadata.get("free"):
                flag = f"--{name.replace('_', '-')} ({value!r}; the run has {recorded[name]!r})"
                raise UserError(f"{self.path}: --resume with another {flag}; repeat the run's own options")
        before = self.facts.get("hashes") or {}
        for name, value in hashes.items():
            if before.get(name, value) != value:
                changed = f"the {name} is not what it was when the run began ({before[name]}, now {value})"
                fix = "put the old one back, or begin another run"
                raise UserError(f"{self.path}: --resume, but {changed}; {fix}")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._lock is not None:
            unlock_directory(self._lock)
            self._lock = None

    @property
    def done(self) -> bool:
        """Return whether training ended and its adapter is there."""
        has_adapter = (self.path / "adapter" / "adapter_model.safetensors").is_file()
        return self.facts.get("status") == "done" and has_adapter

    @property
    def adapter(self) -> Path:
        """Return the directory of the trained adapter. Raises UserError if there is none yet."""
        path = self.path / "adapter"
        if not (path / "adapter_config.json").is_file():
            status = self.facts.get("status", "unfinished")
            raise UserError(f"{self.path}: no adapter/ (the run is {status}); finish it with --resume")
        return path

    def update(self, **facts: Any) -> None:
        """Set facts of run.json and write it."""
        self.facts.update(facts)
        if distributed.rank() == 0:
            write_json(self.path / "run.json", self.facts)

    def append(self, name: str, records: list[dict]) -> None:
        """Add lines to a .jsonl file: all of them, or none if the disk is full (UserError)."""
        if distributed.rank():
            return
        path = self.path / name
        data = as_json_lines(records).encode("utf-8", errors="replace")
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                while data:  # unbuffered writing may take only a part
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(size)
                fix = "make room, then the same command with --resume goes on"
                raise UserError(f"{path}: cannot be written ({error.strerror}); {fix}") from error

    def rewind(self, step: int) -> None:
        """Remove what was recorded after `step` (it is recorded again) and lines that a kill cut short."""
        if distributed.rank():
            return
        for path in (self.path / name for name in STEP_FILES if (self.path / name).exists()):
            rows = [row for _, row, _ in json_lines(path, strict=False) if isinstance(row, dict)]
            rows = [row for row in rows if isinstance(row.get("step"), int) and row["step"] <= step]
            write_text(path, as_json_lines(rows))


def _as_json(options: dict[str, Any]) -> dict[str, Any]:
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def _lock_for_writing(path: Path):
    try:
        path.mkdir(parents=True, exist_ok=True)
        _check_links(path)
        busy = f"{path}: another process is working on this run; wait for it, or stop it"
        return lock_directory(path / ".lock", busy)
    except OSError as error:
        raise UserError(f"{path}: cannot be made or written to ({error.strerror})") from error


def _check_links(directory: Path) -> None:
    # We would write or delete at the other end of a link.
    home = directory.resolve()
    for path in directory.iterdir():
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise UserError(f"{path}: a link that leads out of the directory; put the thing itself there")


# The type of each value of run.json that the code relies on; all but `command` may be missing. Of version 1:
# `form` (the answer format), `ladder` (what was lowered for want of memory), `setting` (the memory plan).
FACT_TYPES = {"command": str, "options": dict, "model": str, "base": str, "base_hash": str, "bits": int}
FACT_TYPES |= dict.fromkeys(("hashes", "setting", "form"), (dict, type(None)))
FACT_TYPES |= {"base_gguf": (str, type(None)), "ladder": (list, type(None))}


def _checked_facts(facts: Any) -> dict[str, Any]:
    """Return the value of run.json. Raises ValueError, in a few words, if no run can have written it."""
    if not isinstance(facts, dict) or "command" not in facts:
        raise ValueError("not a JSON object with a command")
    facts.setdefault("options", {})
    for name, kind in FACT_TYPES.items():
        if name in facts and not isinstance(facts[name], kind):
            raise ValueError(f"{name} is {type(facts[name]).__name__}")
    if facts.get("form") is not None and not _is_answer_format(facts["form"]):
        raise ValueError("form is not one of spans, hints, label, reply and system")
    return facts


def _is_answer_format(form: dict[str, Any]) -> bool:
    spans, hints = form.get("spans"), form.get("hints")
    if not isinstance(spans, list) or not isinstance(hints, list) or not spans or len(spans) != len(hints):
        return False
    texts = [*spans, *hints, form.get("label"), form.get("reply"), form.get("system")]
    if not all(isinstance(text, str) for text in texts):
        return False
    # The names of spans become part of regular expressions.
    return all(re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name) for name in spans)
