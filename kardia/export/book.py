"""Read and check export.json, the record of what an export wrote and proved."""

from __future__ import annotations

import re
from pathlib import Path

from kardia.core.console import shorten
from kardia.core.files import small_json
from kardia.models.model_files import ExportError

REQUIRED = {"format": str, "ok": bool, "why": str, "loader": str, "bytes": int, "verdict": str, "file": str}
# A table reads these numbers. Where the first of a row is known, the others must be known too.
NUMBERS = [("kl", "kl_base", "kept", "agreement"), ("rubric", "valid"), ("kl_on_template", "kl_base")]
NUMBERS += [(key,) for key in ("valid", "same_tokens", "kl_base", "kept", "agreement")]


def read_book(target: Path, identity: dict) -> dict:
    """Return export.json of an earlier, perhaps interrupted export of the same run, else a new book.

    Raises ExportError if something else is in `target`, or if export.json is damaged.
    """
    path, other = target / "export.json", "choose another --to"
    if target.is_file():
        raise ExportError(f"{target}: a file of that name exists; {other}")
    if path.is_file():
        book = small_json(path, 64 << 20)
        if problem := _problem(book):
            raise ExportError(f"{path}: damaged ({problem}); {other}")
        if any(book["identity"].get(key) != value for key, value in identity.items()):
            whose = f"another run or with other settings ({shorten(book.get('run'))})"
            raise ExportError(f"{target}: holds the export of {whose}; {other}")
        return book
    files = sorted(p.name for p in target.iterdir()) if target.is_dir() else []
    if strange := [name for name in files if name not in (".part", ".lock")]:
        raise ExportError(
            f"{target}: exists already and is not an export of this run ({strange[0]}); {other}"
        )
    return {"identity": identity, "formats": {}}


def is_whole(book: dict, name: str, target: Path) -> bool:
    """Return whether `name` was written into `target`, passed its proof, and is still there."""
    entry = book["formats"].get(name)
    return entry is not None and entry["ok"] and (target / entry["file"]).exists()


def best_gguf(book: dict, target: Path) -> Path | None:
    """Return the smallest GGUF in `target` that passed without a remark, else the smallest that passed."""
    entries = book["formats"].items()
    good = [e for name, e in entries if e["loader"] == "llama.cpp" and is_whole(book, name, target)]
    best = min(good, key=lambda entry: (entry["verdict"] != "ok", entry["bytes"]), default=None)
    return target / best["file"] if best else None


def _problem(book) -> str | None:
    """Return what makes an export.json unusable, in a few words, or None."""
    parts = ("identity", "formats")
    if not isinstance(book, dict) or not all(isinstance(book.get(part), dict) for part in parts):
        return "identity and formats are needed"
    for name, entry in book["formats"].items():
        if not re.fullmatch(r"\w[\w ]{0,30}", name) or not isinstance(entry, dict):
            return f"{shorten(name)} = {shorten(entry)}"
        for key, kind in REQUIRED.items():
            if not isinstance(entry.get(key), kind):
                return f"{name}.{key} = {shorten(entry.get(key))}"
        # A plain name: nothing in a book made elsewhere may point out of its directory.
        plain = re.fullmatch(r"[\w-][\w.-]{0,250}", entry["file"])
        if not plain or entry["verdict"] not in ("ok", "noisy", "lost", "text"):
            return f"{name}: {shorten(entry['verdict'])} of the file {shorten(entry['file'])}"
    for name, record in {**book["formats"], "trained": book.get("trained") or {}}.items():
        if not isinstance(record, dict) or not _numbers_are_there(record):
            return f"a number of {name}"
    return None


def _numbers_are_there(record: dict) -> bool:
    needed = {key for group in NUMBERS if record.get(group[0]) is not None for key in group}
    values = [record.get(key) for key in needed]
    return all(isinstance(value, (int, float)) and abs(value) < 1e15 for value in values)
