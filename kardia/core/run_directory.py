"""A run directory: what was asked, with what, from where; its records; who may write to it."""

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
    json_lines,
    lock_directory,
    unlock_directory,
    write_json,
    write_text,
)
from kardia.core.machine import describe_machine, versions

STEP_FILES = ("log.jsonl", "completions.jsonl", "tokens.jsonl")  # a run's records, each line of one step


class Run:
    """A run directory: run.json (what was asked, with what, from where), log.jsonl, completions.jsonl, adapter/, ...

    Reading needs no lock. Who writes has it (`create`, and `with` gives it back): a second process is refused. Of processes that
    train together the first one writes.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = Path(path), None
        if not (self.path / "run.json").is_file():
            raise UserError(
                f"{self.path}: not a run directory (no run.json); `sft` and `grpo` make one with --out"
            )
        stay_inside(self.path)
        try:
            self.facts: dict[str, Any] = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}/run.json: damaged ({str(error)[:100]})") from error
        if wrong := _wrong_facts(self.facts):
            raise UserError(f"{self.path}/run.json: damaged ({wrong})")

    @classmethod
    def create(cls, path: Path, command: str, options: Any, resume: bool, **facts: Any) -> Run:
        """A new run directory, or with `resume` the one that is there, if it was asked for the same with the same files."""
        made = distributed.first(lambda: cls._create(Path(path), command, options, resume, facts))
        return made or cls(path)  # of another machine: the directory must be one that all of them see

    @classmethod
    def _create(cls, path: Path, command: str, options: Any, resume: bool, facts: dict[str, Any]) -> Run:
        new = not path.is_dir() or all(
            name.startswith(".") for name in os.listdir(path)
        )  # a killed start leaves hidden files only
        if not resume and (path.exists() and not path.is_dir() or not new):
            raise UserError(f"{path}: exists already; choose another --out, or --resume to go on with it")
        try:
            path.mkdir(parents=True, exist_ok=True)
            stay_inside(path)
            lock = lock_directory(
                path / ".lock", f"{path}: another process is working on this run; wait for it, or stop it"
            )
        except OSError as error:
            raise UserError(f"{path}: cannot be made or written to ({error.strerror})") from error
        try:
            asked = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items()}
            if resume and new:
                say(f"{path}: nothing to go on with there; beginning")
            if new:
                write_json(
                    path / "run.json",
                    {
                        "command": command,
                        "options": asked,
                        "seed": options.seed,
                        "versions": versions(),
                        "machine": describe_machine(),
                        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
                        "status": "running",
                        **facts,
                    },
                )
            run = cls(path)
            run._same(options, asked, facts.get("hashes", {}))
        except BaseException:
            unlock_directory(lock)
            raise
        run._lock = lock
        return run

    def _same(self, options: Any, asked: dict[str, Any], hashes: dict[str, str]) -> None:
        """Raises UserError unless the run was asked for the same, with the same files."""
        free = {
            f.name for f in dataclasses.fields(options) if f.metadata.get("free")
        }  # what changes no number of the run
        had = {
            f.name: str(f.default) if isinstance(f.default, Path) else f.default
            for f in dataclasses.fields(options)
        } | self.facts["options"]  # an older version knew fewer
        if changed := [k for k, v in asked.items() if had[k] != v and k not in free]:
            raise UserError(
                f"{self.path}: --resume with another --{changed[0].replace('_', '-')} ({asked[changed[0]]!r}; the run has {had[changed[0]]!r}); repeat the run's own options"
            )
        before = self.facts.get("hashes") or {}
        if other := [name for name, value in hashes.items() if before.get(name, value) != value]:
            raise UserError(
                f"{self.path}: --resume, but the {other[0]} is not what it was when the run began ({before[other[0]]}, now {hashes[other[0]]}); put the old one back, or begin another run"
            )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        if self._lock is not None:
            unlock_directory(self._lock)
            self._lock = None

    @property
    def done(self) -> bool:
        return (
            self.facts.get("status") == "done"
            and (self.path / "adapter" / "adapter_model.safetensors").is_file()
        )

    def update(self, **facts: Any) -> None:
        self.facts.update(facts)
        if distributed.rank() == 0:
            write_json(self.path / "run.json", self.facts)

    def append(self, name: str, records: list[dict]) -> None:
        """Add lines to a .jsonl file: all of them, or (a full disk) none."""
        if distributed.rank():
            return
        path, data = (
            self.path / name,
            "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode(
                "utf-8", errors="replace"
            ),
        )
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(size)
                raise UserError(
                    f"{path}: cannot be written ({error.strerror}); make room, then the same command with --resume goes on"
                ) from error

    def rewind(self, step: int) -> None:
        """Before going on from `step`: forget what was recorded after it (it will be recorded again), and lines that a kill tore."""
        if distributed.rank():
            return
        for name in STEP_FILES:
            if (path := self.path / name).exists():
                kept = [
                    json.dumps(row, ensure_ascii=False) + "\n"
                    for _, row, _ in json_lines(path, strict=False)
                    if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step
                ]
                write_text(path, "".join(kept))

    @property
    def adapter(self) -> Path:
        if not (self.path / "adapter" / "adapter_config.json").is_file():
            raise UserError(
                f"{self.path}: no adapter/ (the run is {self.facts.get('status', 'unfinished')}); finish it with --resume"
            )
        return self.path / "adapter"


def _wrong_facts(facts: Any) -> str | None:
    """What of a run.json cannot be, in a few words."""
    if not isinstance(facts, dict):
        return "not a JSON object"
    kinds = {
        "command": str,
        "options": dict,
        "model": str,
        "base": str,
        "base_hash": str,
        "bits": int,
        "hashes": (dict, type(None)),
        "base_gguf": (str, type(None)),
        "ladder": (list, type(None)),
        "setting": (dict, type(None)),
    }
    facts.setdefault("options", {})
    if odd := [
        key
        for key, kind in kinds.items()
        if (key in facts or key == "command") and not isinstance(facts.get(key), kind)
    ]:
        return f"{odd[0]} is {'missing' if odd[0] not in facts else type(facts[odd[0]]).__name__}"
    form = facts.get("form")
    texts = isinstance(form, dict) and [
        *(form.get("spans") or ["?"]),
        *(form.get("hints") or ["?"]),
        form.get("label"),
        form.get("reply"),
        form.get("system"),
    ]
    if form is not None and not (
        texts
        and all(isinstance(t, str) for t in texts)
        and len(form["spans"]) == len(form["hints"])
        and all(re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name) for name in form["spans"])
    ):
        return "form is not one of spans, hints, label, reply and system"
    return None


def stay_inside(directory: Path) -> None:
    """A link in a run directory that leads out of it would have us write or delete there: refused."""
    home = directory.resolve()
    for path in directory.iterdir():
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise UserError(f"{path}: a link that leads out of the directory; put the thing itself there")
