"""Read and write files that are never half-written, lock directories, hash, and find the cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kardia.core.console import (
    UserError,
)


def lock_directory(path: Path, taken: str):
    """The lock of a directory, held until it is released or the process is gone, however it went. Raises UserError(taken)."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(taken) from None
    return lock


def unlock_directory(lock) -> None:
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
                    raise UserError(
                        f"{path}:{number}: not UTF-8 text (byte {error.start} of the line); convert it"
                    ) from error
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
        raise OSError(
            error.errno, error.strerror, str(path)
        ) from error  # with the name, which a full disk's error lacks
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def file_hash(path: Path) -> str:
    """sha256 of a file, first 16 digits; of a directory: of its config and weights."""
    digest = hashlib.sha256()
    files = (
        sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors"))
        if path.is_dir()
        else [path]
    )
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def cache_directory() -> Path:
    path = Path(os.environ.get("KARDIA_CACHE") or Path.home() / ".cache" / "kardia-lite")
    path.mkdir(parents=True, exist_ok=True)
    return path


def file_lock(target: Path):
    """A lock between processes: the second one waits until the first has made `target`, then finds it there."""
    from filelock import FileLock

    return FileLock(target.with_name(f".{target.name}.lock"))


def temporary_path(path: Path) -> Path:
    """The temporary name beside `path` that is renamed to it once complete; a leftover of a killed run is removed."""
    temporary = path.with_name(f".{path.name}.part")
    if temporary.is_dir():
        shutil.rmtree(temporary)
    temporary.unlink(missing_ok=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    return temporary


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
