"""Read and write files that are never half-written, lock directories, hash files, and find the cache."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from kardia.core.console import UserError, one_line

LONGEST_LINE = 16 << 20  # bytes


def json_lines(path: Path, strict: bool = True) -> Iterator[tuple[int, Any, str]]:
    """Yield (line number, value, "") or (number, None, problem) per line of a JSONL file that is not blank.

    One line is in memory at a time, and none of more than 16 MB. A BOM and CRLF are accepted; U+2028 inside a
    text does not end a line. NaN is not JSON, half a surrogate pair is not text. Raises UserError for a line
    that is not UTF-8; without `strict` such a line is a problem like the others.
    """
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
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8", "strict" if strict else "replace")
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 text (byte {error.start} of the line); convert it"
                raise UserError(f"{path}:{number}: {problem}") from error
            if line.strip():
                yield number, *_json_value(line)


def checked_rows(
    path: Path, flaw_of: Callable[[Any], str], expected: str, hint: str, error: type[UserError] = UserError
) -> list[dict]:
    """Return the rows of a JSONL file, of which flaw_of(row) is "" or what is wrong in a few words.

    Raises `error` with the first twenty flaws, one line each; for an absent file with the hint.
    """
    if not Path(path).is_file():
        raise error(f"{path}: no such {hint}")
    rows, errors = [], []
    for number, row, flaw in json_lines(Path(path)):
        wanted = "one JSON object" if flaw else expected
        if flaw := flaw or flaw_of(row):
            errors.append(f"{path}:{number}: found {flaw} / expected {wanted}")
        else:
            rows.append(row)
    if errors:
        raise error("\n".join(errors[:20]))
    return rows


def _json_value(line: str) -> tuple[Any, str]:
    """Return (value, "") of one line of JSON, or (None, the problem)."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        value = json.loads(line, parse_constant=refuse)
        if r"\ud" in line or r"\uD" in line:
            json.dumps(value, ensure_ascii=False).encode()  # fails for half a surrogate pair
        return value, ""
    except UnicodeEncodeError:
        return None, "half a surrogate pair"
    except RecursionError:
        return None, f"{line.strip()[:40]!r} (nested too deeply)"
    except ValueError as error:
        return None, f"{line.strip()[:40]!r} ({str(getattr(error, 'msg', error))[:80]})"


def small_json(path: Path, most: int) -> Any:
    """Return the value of a JSON file of at most `most` bytes. Raises UserError for any other file."""
    try:
        with open(path, "rb") as file:
            text = file.read(most + 1)
        if len(text) > most:
            raise ValueError(f"over {most >> 10:,} kB")
        return json.loads(text.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)})") from error


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: nobody ever reads half of it. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # that of a full disk does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def as_json_lines(rows: list[dict]) -> str:
    """Return rows as the text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def temporary_path(path: Path) -> Path:
    """Return a temporary name beside `path`, to be renamed later; the leftover of a killed run is removed."""
    temporary = path.with_name(f".{path.name}.part")
    if temporary.is_dir():
        shutil.rmtree(temporary)
    temporary.unlink(missing_ok=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    return temporary


_hashes: dict[tuple, str] = {}  # of large files and directories, by (path, size, time of change) of each file


def file_hash(path: Path) -> str:
    """Return the first 16 digits of a file's sha256; of a directory, of its configuration and weights."""
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors"))
    stats = [file.stat() for file in files]
    key = tuple((str(file.absolute()), s.st_size, s.st_mtime_ns) for file, s in zip(files, stats))
    if key in _hashes:
        return _hashes[key]
    sha = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                sha.update(block)
    # 15 GB of a 7B model take up to a minute. Small files are read again: two versions of one size may be
    # written within one tick of the clock.
    if sum(s.st_size for s in stats) > 1 << 26:
        _hashes[key] = sha.hexdigest()[:16]
    return sha.hexdigest()[:16]


def digest(data: bytes) -> str:
    """Return the first 16 digits of the sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def check_new(path: Path) -> None:
    """Raise UserError if a file to write is there already."""
    if path.exists():
        raise UserError(f"{path}: exists already; choose another --out")


def cache_directory() -> Path:
    """Create and return the directory for what can be made again: KARDIA_CACHE, else ~/.cache/kardia-lite."""
    path = Path(os.environ.get("KARDIA_CACHE") or Path.home() / ".cache" / "kardia-lite")
    path.mkdir(parents=True, exist_ok=True)
    return path


def file_lock(target: Path):
    """Return a lock between processes: the second one waits until the first has made `target`."""
    from filelock import FileLock

    return FileLock(target.with_name(f".{target.name}.lock"))


def lock_directory(path: Path, taken: str):
    """Lock the file `path` until it is released or the process ends in any way. Raises UserError(taken)."""
    from filelock import FileLock, Timeout

    try:
        lock = FileLock(path)
        lock.acquire(timeout=0)
        return lock
    except Timeout:
        raise UserError(taken) from None


def unlock_directory(lock) -> None:
    """Release a lock of `lock_directory` and remove its file."""
    # Removed while it is held: else another process could take the lock of a file that is about to go.
    # Windows refuses to remove an open file; there filelock does it on release.
    with suppress(OSError):
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def shortest_names(paths: list[str]) -> list[str]:
    """Return a name per path: its last part, or as many last parts as tell it from the others."""
    names = []
    for path in paths:
        parts, length = Path(path).parts, 1
        others = [Path(other).parts for other in paths if other != path]
        while length < len(parts) and any(parts[-length:] == other[-length:] for other in others):
            length += 1
        names.append("/".join(parts[-length:]))
    return names
