"""A run's bookkeeping: options declared once, the run directory, files that are never half-written, what machine this was.

Whatever is read back here may have been damaged or made by a stranger: it is checked, and nothing leads out of a run directory.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any

import click

from kardia import memory, together
from kardia.llama import default_threads


class UserError(click.ClickException):
    """A mistake the user can mend: one line (value, rule, fix), exit 1, no traceback."""

    def format_message(self) -> str:
        """Without control characters: the value shown may come from a stranger's file."""
        return "\n".join("".join(c if c.isprintable() else " " for c in line) for line in self.message.split("\n"))

    def show(self, file=None) -> None:
        together.speak_after_the_first()
        super().show(file)


SCREEN: list[Any] = []  # the rich console of what is being redrawn, if something is


def say(text: str = "") -> None:
    """Progress for a person, on stderr; stdout is kept for the product. Of several processes the first one speaks."""
    if together.rank():
        return
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

    console, told = Console(stderr=True), [0, time.monotonic()]
    if not console.is_terminal or together.rank():

        def tell(done: float, of: float | None = None) -> None:
            of = of or total
            if of and done * 10 // of > told[0] and time.monotonic() - told[1] > 10:
                told[:] = int(done * 10 // of), time.monotonic()
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


class Finite(click.FloatRange):
    """A number: neither NaN, which is not smaller than any minimum, nor infinite."""

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


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
            elif "min" in meta and f.type == "int":
                kind = click.IntRange(min=meta["min"], max=meta.get("max", 2**31 - 1))
            elif "min" in meta:
                kind = Finite(min=meta["min"], max=meta.get("max"))
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


STEP_FILES = ("log.jsonl", "completions.jsonl", "tokens.jsonl")  # a run's records, each line of one step


class Run:
    """A run directory: run.json (what was asked, with what, from where), log.jsonl, completions.jsonl, adapter/, ...

    Reading needs no lock. Who writes has it (`create`, and `with` gives it back): a second process is refused. Of processes that
    train together the first one writes.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = Path(path), None
        if not (self.path / "run.json").is_file():
            raise UserError(f"{self.path}: not a run directory (no run.json); `sft` and `grpo` make one with --out")
        stay_inside(self.path)
        try:
            self.facts: dict[str, Any] = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}/run.json: damaged ({str(error)[:100]})") from error
        if wrong := _wrong_facts(self.facts):
            raise UserError(f"{self.path}/run.json: damaged ({wrong})")

    @classmethod
    def create(cls, path: Path, command: str, options: Any, resume: bool, **facts: Any) -> "Run":
        """A new run directory, or with `resume` the one that is there, if it was asked for the same with the same files."""
        made = together.first(lambda: cls._create(Path(path), command, options, resume, facts))
        return made or cls(path)  # of another machine: the directory must be one that all of them see

    @classmethod
    def _create(cls, path: Path, command: str, options: Any, resume: bool, facts: dict[str, Any]) -> "Run":
        new = not path.is_dir() or all(name.startswith(".") for name in os.listdir(path))  # a killed start leaves hidden files only
        if not resume and (path.exists() and not path.is_dir() or not new):
            raise UserError(f"{path}: exists already; choose another --out, or --resume to go on with it")
        try:
            path.mkdir(parents=True, exist_ok=True)
            stay_inside(path)
            lock = lock_of(path / ".lock", f"{path}: another process is working on this run; wait for it, or stop it")
        except OSError as error:
            raise UserError(f"{path}: cannot be made or written to ({error.strerror})") from error
        try:
            asked = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(options).items()}
            if resume and new:
                say(f"{path}: nothing to go on with there; beginning")
            if new:
                write_json(path / "run.json", {"command": command, "options": asked, "seed": options.seed, "versions": versions(), "machine": machine(), "started": time.strftime("%Y-%m-%dT%H:%M:%S"), "status": "running", **facts})
            run = cls(path)
            run._same(options, asked, facts.get("hashes", {}))
        except BaseException:
            unlock(lock)
            raise
        run._lock = lock
        return run

    def _same(self, options: Any, asked: dict[str, Any], hashes: dict[str, str]) -> None:
        """Raises UserError unless the run was asked for the same, with the same files."""
        free = {f.name for f in dataclasses.fields(options) if f.metadata.get("free")}  # what changes no number of the run
        had = {f.name: str(f.default) if isinstance(f.default, Path) else f.default for f in dataclasses.fields(options)} | self.facts["options"]  # an older version knew fewer
        if changed := [k for k, v in asked.items() if had[k] != v and k not in free]:
            raise UserError(f"{self.path}: --resume with another --{changed[0].replace('_', '-')} ({asked[changed[0]]!r}; the run has {had[changed[0]]!r}); repeat the run's own options")
        before = self.facts.get("hashes") or {}
        if other := [name for name, value in hashes.items() if before.get(name, value) != value]:
            raise UserError(f"{self.path}: --resume, but the {other[0]} is not what it was when the run began ({before[other[0]]}, now {hashes[other[0]]}); put the old one back, or begin another run")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        if self._lock is not None:
            unlock(self._lock)
            self._lock = None

    @property
    def done(self) -> bool:
        return self.facts.get("status") == "done" and (self.path / "adapter" / "adapter_model.safetensors").is_file()

    def update(self, **facts: Any) -> None:
        self.facts.update(facts)
        if together.rank() == 0:
            write_json(self.path / "run.json", self.facts)

    def append(self, name: str, records: list[dict]) -> None:
        """Add lines to a .jsonl file: all of them, or (a full disk) none."""
        if together.rank():
            return
        path, data = self.path / name, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode("utf-8", errors="replace")
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(size)
                raise UserError(f"{path}: cannot be written ({error.strerror}); make room, then the same command with --resume goes on") from error

    def rewind(self, step: int) -> None:
        """Before going on from `step`: forget what was recorded after it (it will be recorded again), and lines that a kill tore."""
        if together.rank():
            return
        for name in STEP_FILES:
            if (path := self.path / name).exists():
                kept = [json.dumps(row, ensure_ascii=False) + "\n" for _, row, _ in json_lines(path, strict=False) if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step]
                write_text(path, "".join(kept))

    @property
    def adapter(self) -> Path:
        if not (self.path / "adapter" / "adapter_config.json").is_file():
            raise UserError(f"{self.path}: no adapter/ (the run is {self.facts.get('status', 'unfinished')}); finish it with --resume")
        return self.path / "adapter"


def _wrong_facts(facts: Any) -> str | None:
    """What of a run.json cannot be, in a few words."""
    if not isinstance(facts, dict):
        return "not a JSON object"
    kinds = {"command": str, "options": dict, "model": str, "base": str, "base_hash": str, "bits": int, "hashes": (dict, type(None)), "base_gguf": (str, type(None)), "ladder": (list, type(None)), "setting": (dict, type(None))}
    facts.setdefault("options", {})
    if odd := [key for key, kind in kinds.items() if (key in facts or key == "command") and not isinstance(facts.get(key), kind)]:
        return f"{odd[0]} is {'missing' if odd[0] not in facts else type(facts[odd[0]]).__name__}"
    form = facts.get("form")
    texts = isinstance(form, dict) and [*(form.get("spans") or ["?"]), *(form.get("hints") or ["?"]), form.get("label"), form.get("reply"), form.get("system")]
    if form is not None and not (texts and all(isinstance(t, str) for t in texts) and len(form["spans"]) == len(form["hints"]) and all(re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name) for name in form["spans"])):
        return "form is not one of spans, hints, label, reply and system"
    return None


def stay_inside(directory: Path) -> None:
    """A link in a run directory that leads out of it would have us write or delete there: refused."""
    home = directory.resolve()
    for path in directory.iterdir():
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise UserError(f"{path}: a link that leads out of the directory; put the thing itself there")


def lock_of(path: Path, taken: str):
    """The lock of a directory, held until it is released or the process is gone, however it went. Raises UserError(taken)."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(taken) from None
    return lock


def unlock(lock) -> None:
    """Give a lock of `lock_of` back, and leave no file."""
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


LONGEST_LINE = 16 << 20  # bytes


def json_lines(path: Path, strict: bool = True) -> Iterator[tuple[int, Any, str]]:
    """(line number, value, "") of each line of a JSONL file that is not blank, or (number, None, what is wrong with it).

    One line is in memory at a time, and none of more than 16 MB. BOM and CRLF are fine; U+2028 inside a text ends no line. NaN
    is no JSON, half a surrogate pair is no text. Raises UserError where a line is not UTF-8 (not `strict`: it is wrong like others).
    """

    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON")

    with open(path, "rb") as file:
        number = 0
        while raw := file.readline(LONGEST_LINE):
            number += 1
            if len(raw) == LONGEST_LINE and not raw.endswith(b"\n"):
                while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield number, None, f"a line of over {LONGEST_LINE >> 20} MB"
                continue
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                if strict:
                    raise UserError(f"{path}:{number}: not UTF-8 text (byte {error.start} of the line); convert it") from error
                line = "\ufffd"
            if not line.strip():
                continue
            try:
                value = json.loads(line, parse_constant=refuse)
                if r"\ud" in line or r"\uD" in line:
                    json.dumps(value, ensure_ascii=False).encode()
                yield number, value, ""
            except UnicodeEncodeError:
                yield number, None, "half a surrogate pair"
            except RecursionError:
                yield number, None, f"{line.strip()[:40]!r} (nested too deeply)"
            except ValueError as error:
                yield number, None, f"{line.strip()[:40]!r} ({str(getattr(error, 'msg', error))[:80]})"


def write_text(path: Path, text: str) -> None:
    """To a temporary name, then renamed: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # with the name, which a full disk's error lacks
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "gguf", "llama-cpp-python", "unsloth", "unsloth_zoo"):
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
