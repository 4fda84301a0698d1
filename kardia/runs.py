"""A run's bookkeeping: options declared once, the run directory, files that are never half-written, what machine this was."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any

import click

from kardia import memory
from kardia.llama import default_threads


class UserError(click.ClickException):
    """A mistake the user can mend: one line (value, rule, fix), exit 1, no traceback."""


SCREEN: list[Any] = []  # the rich console of what is being redrawn, if something is


def say(text: str = "") -> None:
    """Progress for a person, on stderr; stdout is kept for the product."""
    if SCREEN:
        SCREEN[-1].print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        click.echo(text, err=True)


@contextmanager
def progress(title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Something long is going on: a bar with the time left on a terminal, else a line every tenth, at most every 10 s (stderr).

    Yields `at(done, total=None)`; `done` is in any unit, absolute.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console, told = Console(stderr=True), [0, time.time()]
    if not console.is_terminal:

        def tell(done: float, of: float | None = None) -> None:
            of = of or total
            if of and done * 10 // of > told[0] and time.time() - told[1] > 10:
                told[:] = int(done * 10 // of), time.time()
                say(f"  {title} {told[0] * 10}%")

        yield tell
        return
    columns = TextColumn("  {task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        SCREEN.append(console)
        task = bar.add_task(title, total=total)
        try:
            yield lambda done, of=None: bar.update(task, completed=done, **({"total": of} if of else {}))
        finally:
            SCREEN.remove(console)


def knob(default: Any, help: str, **extra: Any) -> Any:
    """One option, declared once: its field name, type and default make the command line, run.json and the manual."""
    return field(default=default, metadata={"help": help, **extra})


def options(cls: type) -> Any:
    """A dataclass of knobs as click options; the command receives one `options` record."""

    def decorate(function):
        @functools.wraps(function)
        def command(**kwargs):
            record = cls(**{f.name: kwargs.pop(f.name) for f in dataclasses.fields(cls)})
            return function(options=record, **kwargs)

        own = [f for f in dataclasses.fields(cls) if f.name in cls.__annotations__]
        shared = [f for f in dataclasses.fields(cls) if f.name not in cls.__annotations__]
        for f in reversed([*own, *shared]):  # in the manual: what is special to the command first, seed and rubric last
            meta, kind = f.metadata, {"Path": click.Path(path_type=Path), "Path | None": click.Path(path_type=Path), "int": int, "float": float, "str": str}.get(f.type)
            if f.type == "bool":
                command = click.option(f"--{f.name.replace('_', '-')}", is_flag=True, help=meta["help"])(command)
                continue
            if "choices" in meta and f.type == "str":
                kind = click.Choice(meta["choices"])
            elif "choices" in meta:
                kind = click.Choice([str(c) for c in meta["choices"]])
                command = _as_int(command, f.name)
            elif "min" in meta:
                kind = (click.IntRange if f.type == "int" else click.FloatRange)(min=meta["min"], max=meta.get("max"))
            default = os.path.relpath(f.default, Path.cwd()) if isinstance(f.default, Path) and f.default.is_relative_to(Path.cwd()) else f.default
            metavar = None if "choices" in meta else {"int": "N", "float": "X", "str": "TEXT"}.get(f.type, "FILE")
            command = click.option(f"--{f.name.replace('_', '-')}", type=kind, default=str(default) if "choices" in meta else default, help=meta["help"], show_default=True, metavar=metavar)(command)
        return command

    return decorate


def _as_int(function, name):
    @functools.wraps(function)
    def command(**kwargs):
        return function(**{**kwargs, name: int(kwargs[name])})

    return command


class Run:
    """A run directory: run.json (what was asked, with what, from where), log.jsonl, completions.jsonl, adapter/, ..."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not (self.path / "run.json").is_file():
            raise UserError(f"{self.path}: not a run directory (no run.json); `sft` and `grpo` make one with --out")
        try:
            self.facts: dict[str, Any] = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self.path}/run.json: damaged ({error})") from error

    @classmethod
    def create(cls, path: Path, command: str, options: Any, resume: bool, **facts: Any) -> "Run":
        path = Path(path)
        if resume:
            run = cls(path)
            asked = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items()}
            free = {f.name for f in dataclasses.fields(options) if f.metadata.get("free")}  # what changes no number of the run
            if changed := [k for k, v in asked.items() if run.facts["options"].get(k) != v and k not in free]:
                raise UserError(f"{path}: --resume with another --{changed[0].replace('_', '-')} ({asked[changed[0]]!r}; the run has {run.facts['options'].get(changed[0])!r}); repeat the run's own options")
            return run
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path}: exists already; choose another --out, or --resume to go on with it")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be made ({error.strerror})") from error
        record = {"command": command, "options": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items()},
                  "seed": options.seed, "versions": versions(), "machine": machine(), "started": time.strftime("%Y-%m-%dT%H:%M:%S"), "status": "running", **facts}  # fmt: skip
        write_json(path / "run.json", record)
        return cls(path)

    def update(self, **facts: Any) -> None:
        self.facts.update(facts)
        write_json(self.path / "run.json", self.facts)

    def append(self, name: str, records: list[dict]) -> None:
        """Add lines to a .jsonl file, in one write."""
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    def rewind(self, step: int) -> None:
        """Before a resume from `step`: forget what was logged after it, it will be logged again."""
        for name in ("log.jsonl", "completions.jsonl", "tokens.jsonl"):
            path = self.path / name
            if path.exists():
                kept = [line for line in path.read_text(encoding="utf-8").split("\n") if line.endswith("}") and json.loads(line)["step"] <= step]
                write_text(path, "".join(f"{line}\n" for line in kept))

    def checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole."""
        found = sorted(self.path.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]) if p.name.split("-")[1].isdigit() else -1)
        for path in reversed(found):
            if (path / "trainer_state.json").is_file() and (path / "adapter_model.safetensors").is_file() and (path / "optimizer.pt").is_file():
                return path
            say(f"{path.name} is incomplete and skipped")
        return None

    @property
    def adapter(self) -> Path:
        if not (self.path / "adapter" / "adapter_config.json").is_file():
            raise UserError(f"{self.path}: no adapter/ (the run is {self.facts.get('status', 'unfinished')}); finish it with --resume")
        return self.path / "adapter"


def write_text(path: Path, text: str) -> None:
    """To a temporary name, then renamed: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "gguf", "llama-cpp-python", "unsloth"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def machine() -> str:
    total = memory.system_memory_gb()
    return f"{default_threads()} x {memory.cpu_name()}, {total:.0f} GB memory, {memory.gpu_line()}"


def file_hash(path: Path) -> str:
    """sha256 of a file, first 16 digits; of a directory: of its config and weights."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors")) if path.is_dir() else [path]
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]
