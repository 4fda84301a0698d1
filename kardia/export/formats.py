"""From a run to files that others load, and the proof that each still holds what was trained.

Every format is built under a hidden name, loaded by its real loader, compared with the trained model, and only then given
its own name, or a name that ends in .failed. `Exporter` builds; `drift` and `verdict` are the comparison.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from kardia.core.console import shorten
from kardia.core.files import file_hash, lock_directory, temporary_path, unlock_directory, write_text
from kardia.export import ollama
from kardia.models import gguf as gguf_files
from kardia.models.weights import ExportError, Weights, read_gguf, small_json, write_merged

FORMATS = ("merged", "lora", "modelfile")  # and every type of GGUF
LOW_BIT = re.compile(r"(iq|tq|q|mxfp|nvfp)[1-4]")  # of 4 bits or fewer


def parse_formats(text: str) -> list[str]:
    """ "merged,Q8_0" -> ["merged", "q8_0"]. Raises ValueError, in one line, for a format that does not exist or cannot be made."""
    formats, types = (
        list(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip())),
        gguf_files.file_types(),
    )
    for kind in formats:
        if kind in gguf_files.NEEDS_IMATRIX:
            raise ValueError(
                f"{kind!r} needs an importance matrix, which is not made here; take q2_k, q3_k_m or q4_k_m"
            )
        if kind not in FORMATS and kind not in types:
            raise ValueError(
                f"{kind!r} is not one of {', '.join(FORMATS)} or a GGUF type: {', '.join(types)}"
            )
    if not formats:
        raise ValueError("no format given; for example merged,q8_0")
    return formats


@dataclass
class Artefact:
    """A thing that was written and can be loaded: what it is called in the table, where it lies, what it weighs, who loads it."""

    name: str
    path: Path
    loader: str  # transformers, peft, llama.cpp, llama.cpp + LoRA, text

    def bytes(self) -> int:
        return (
            sum(p.stat().st_size for p in self.path.rglob("*") if p.is_file())
            if self.path.is_dir()
            else self.path.stat().st_size
        )


class Exporter:
    """Builds the formats of one run in the hidden folder `work` inside `target`. Raises ExportError before anything is written if
    the adapter is not of this base, the base's GGUF is of another model, or the disk is too small."""

    def __init__(
        self,
        base,
        adapter: Path,
        bits: int,
        target: Path,
        name: str,
        *,
        stop: list[int],
        chat_template: str,
        llama_cpp: Path | None = None,
    ) -> None:
        self.base, self.adapter, self.target, self.stop, self.llama_cpp = (
            base,
            adapter,
            target,
            stop,
            llama_cpp,
        )
        self.name = re.sub(r"[^\w.-]+", "-", name)
        self.metadata = {"tokenizer.chat_template": chat_template}
        self.work = target / ".part"
        self.weights = Weights(base.directory, bits, adapter)
        self.bf16: Path | None = None  # what llama.cpp's quantizer reads
        self.merged: Path | None = None

    def check(self, formats: list[str]) -> list[str]:
        """What should be known before hours are spent: errors raise, the rest is returned as lines."""
        notes = []
        types = [kind for kind in formats if kind not in FORMATS]
        if types and not self.llama_cpp and self.base.template is None:
            raise ExportError(
                f"{types[0]}: the base {self.base.name} came without a GGUF; give one of the same model with --gguf-template FILE.gguf, or llama.cpp's source with --llama-cpp DIR, or export merged,lora"
            )
        if self.base.template and (types and not self.llama_cpp or "lora" in formats):
            gguf_files.check_template(self.base.template, self.weights)
        if self.llama_cpp:
            gguf_files.converter(self.llama_cpp)
        if "lora" in formats and self.base.template is None:
            notes.append(
                f"lora: as PEFT adapter only; for a GGUF LoRA give the base's GGUF (--gguf-template; {self.base.name} came without)"
            )
        grid = four_bit_grid(self.base)
        if grid and (low := [kind for kind in types if LOW_BIT.match(kind)]):
            notes.append(
                f"{', '.join(low)}: the base's weights lie on a 4-bit grid already ({grid}); a 4-bit type pulls what was learned back to it. The proof will tell; q8_0 keeps it, and so does the base with the LoRA (--formats lora)"
            )
        needed, free = (
            self.size(formats),
            shutil.disk_usage(
                next(p for p in (self.target, *self.target.absolute().parents) if p.exists())
            ).free,
        )
        if needed > free:
            raise ExportError(
                f"{self.target}: {', '.join(formats)} need about {needed / 1e9:.1f} GB there, {free / 1e9:.1f} GB are free"
            )
        return notes

    def size(self, formats: list[str]) -> float:
        """Bytes on disk, roughly, what is only needed on the way included; types by the bits in their names."""
        stored, n = self.weights.bytes(), self.weights.count()
        narrow = (
            self.weights.config.get("hidden_size", 256) % 256 != 0
        )  # then llama.cpp takes a type of more bits for most tensors
        per = {"merged": stored, "lora": 0, "modelfile": 0, "f32": 4 * n, "f16": 2 * n, "bf16": 2 * n}
        few = [kind for kind in formats if kind not in per and kind not in gguf_files.WRITTEN_HERE]
        bits = lambda kind: max(int(re.search(r"\d", kind).group()) + 1, 6 if narrow else 0)  # noqa: E731
        n_bytes = sum(per.get(kind, n * 1.1 if kind == "q8_0" else 0) for kind in formats) + sum(
            n * bits(kind) / 8 for kind in few
        )
        return (
            n_bytes
            + (2 * n if few and "bf16" not in formats else 0)
            + (stored if self.llama_cpp and "merged" not in formats else 0)
        )

    def write(self, kind: str, quantize) -> list[Artefact]:
        """Build one format in `work`. quantize(source, target, type) is llama.cpp's quantizer, in the worker."""
        if kind == "merged":
            self.merged = self._merge(self.work / "merged")
            return [Artefact("merged", self.merged, "transformers")]
        if kind == "lora":
            found = [Artefact("lora", self._peft(), "peft")]
            if self.base.template is not None:
                path = self.work / f"{self.name}-lora.gguf"
                gguf_files.write_lora_gguf(self.weights.lora, self.weights.pairs, self.weights.config, path)
                found.append(Artefact("lora gguf", path, "llama.cpp + LoRA"))
            return found
        path = self.work / f"{self.name}-{kind}.gguf"
        if kind in gguf_files.WRITTEN_HERE:
            self._gguf(path, kind)
            self.bf16 = path if kind == "bf16" else self.bf16
        else:
            if self.bf16 is None:
                self.bf16 = self._gguf(self.work / "between.gguf", "bf16")
            temporary = temporary_path(path)
            try:
                quantize(self.bf16, temporary, kind)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return [Artefact(kind, path, "llama.cpp")]

    def _merge(self, path: Path) -> Path:
        write_merged(self.weights, path, self.stop)
        write_chat_template(path, self.metadata["tokenizer.chat_template"])
        return path

    def _gguf(self, path: Path, kind: str) -> Path:
        if not self.llama_cpp:
            return gguf_files.write_gguf(
                self.base.template, path, kind, gguf_files.gguf_tensors(self.weights), self.metadata
            )
        if self.merged is None:
            self.merged = self._merge(self.work / "between")
        return gguf_files.convert(self.llama_cpp, self.merged, path, kind)

    def _peft(self) -> Path:
        """The adapter as it is, naming its base by its hub id, or else by the directory where it lies."""
        path = self.work / "lora"
        path.mkdir()
        config = path / "adapter_config.json"
        for name in (
            "adapter_model.safetensors",
            config.name,
        ):  # whatever else lies there is not ours to pass on
            shutil.copyfile(self.adapter / name, path / name)
        facts = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(
            json.dumps(
                {
                    **facts,
                    "base_model_name_or_path": self.base.name
                    if "/" in self.base.name
                    else str(self.base.directory.absolute()),
                },
                indent=2,
            )
            + "\n",
            encoding="utf-8",
        )
        return path

    def keep(self, artefact: Artefact, row: dict) -> dict:
        """Out of the hidden folder, under its own name or under one that ends in .failed. Returns its entry in the book."""
        n_bytes, good, bad = (
            artefact.bytes(),
            self.target / artefact.path.name,
            self.target / f"{artefact.path.name}.failed",
        )
        for old in (good, bad):  # what an earlier call left under either name
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        final = good if row["ok"] else bad
        os.replace(artefact.path, final)
        self.bf16 = final if artefact.path == self.bf16 else self.bf16
        self.merged = final if artefact.path == self.merged else self.merged
        return {**row, "file": final.name, "path": str(final), "loader": artefact.loader, "bytes": n_bytes}

    def write_modelfile(self, gguf: Path, worker, **how) -> dict:
        """Ollama's Modelfile for `gguf`, which lies beside it; `how` goes to `clients.modelfile`."""
        facts = worker.load("export", gguf)
        worker.unload("export")
        text, why = ollama.modelfile(
            gguf.name, add_bos=facts["add_bos"], context=min(4096, facts["n_ctx_train"]), **how
        )
        path = self.target / "Modelfile"
        write_text(path, text)
        return {
            "format": "modelfile",
            "file": path.name,
            "path": str(path),
            "loader": "text",
            "bytes": path.stat().st_size,
            "verdict": "text",
            "ok": True,
            "why": why or "",
            "describes": gguf.name,
        }

    def open_book(self, run: str, formats: list[str], say) -> tuple[dict, list[str]]:
        """(export.json as it will be, the formats still to be made, the Modelfile last). Every check that needs no work is made here."""
        identity = {
            "adapter": file_hash(self.adapter),
            "base": self.base.hash,
            "bits": self.weights.bits,
            "llama_cpp": bool(self.llama_cpp),
        }
        book = {
            **book_of(self.target, identity),
            "run": run,
            "base": self.base.name,
            "bits": self.weights.bits,
        }
        parts = {"lora": ["lora", "lora gguf"] if self.base.template else ["lora"]}
        whole = lambda name: (
            (entry := book["formats"].get(name)) and entry["ok"] and (self.target / entry["file"]).exists()
        )  # noqa: E731
        done = [
            kind
            for kind in formats
            if kind != "modelfile" and all(whole(name) for name in parts.get(kind, [kind]))
        ]
        order = lambda kind: (kind == "modelfile", kind not in (*FORMATS, *gguf_files.WRITTEN_HERE))  # noqa: E731
        todo = sorted(
            (kind for kind in formats if kind not in done), key=order
        )  # bf16 first: the quantizer reads it
        if todo == ["modelfile"] and best_gguf(book, self.target) is None:
            raise ExportError(
                "modelfile: it describes a GGUF, and none that passed its proof is there; ask for one with it, for example --formats q8_0,modelfile"
            )
        for kind in done:
            say(f"  {kind}: already there, and proved")
        for note in self.check(todo):
            say(f"  {note}")
        return book, todo

    def save(self, book: dict) -> None:
        write_text(self.target / "export.json", json.dumps(book, indent=2, ensure_ascii=False) + "\n")

    def __enter__(self) -> Exporter:
        self.target.mkdir(parents=True, exist_ok=True)
        self.lock = lock_directory(
            self.target / ".lock",
            f"{self.target}: another process is exporting into it; wait for it, or choose another --to",
        )
        shutil.rmtree(self.work, ignore_errors=True)  # of a killed one
        self.work.mkdir(parents=True)
        return self

    def __exit__(self, *_) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        unlock_directory(self.lock)


def write_chat_template(directory: Path, template: str) -> None:
    """The template as trained, in the file that wins over the one inside tokenizer_config.json."""
    path = directory / "tokenizer_config.json"
    facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if facts.pop("chat_template", None) is not None:
        path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def four_bit_grid(base) -> str | None:
    """The 4-bit type that most of a base's weights come from, if its GGUF was imported; else None."""
    if not base.imported:
        return None
    weights: dict[str, int] = {}
    for tensor in read_gguf(base.template).tensors:
        weights[tensor.tensor_type.name] = weights.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    most = max(weights, key=weights.get)
    return most if LOW_BIT.match(most.lower()) else None


# ---------------------------------------------------------------------------------- what is there already


def book_of(target: Path, identity: dict) -> dict:
    """export.json of an earlier, perhaps interrupted export of the same run into `target`, else a new one. Raises ExportError if
    something else lies there."""
    path = target / "export.json"
    if target.is_file():
        raise ExportError(f"{target}: a file of that name exists; choose another --to")
    if path.is_file():
        book = small_json(path, 64 << 20)
        if wrong := _wrong(book):
            raise ExportError(f"{path}: damaged ({wrong}); choose another --to")
        same = {key: book["identity"].get(key) for key in identity} == identity
        if not same:
            raise ExportError(
                f"{target}: holds the export of another run or with other settings ({shorten(book.get('run'))}); choose another --to"
            )
        return book
    if target.is_dir() and (
        others := sorted(p.name for p in target.iterdir() if p.name not in (".part", ".lock"))
    ):
        raise ExportError(
            f"{target}: exists already and is not an export of this run ({others[0]}); choose another --to"
        )
    return {"identity": identity, "formats": {}}


KINDS = {
    "format": str,
    "ok": bool,
    "why": str,
    "loader": str,
    "bytes": int,
    "verdict": str,
}  # of an entry, beside `file`
NUMBERS = ("kl", "kl_base", "kept", "agreement", "valid", "rubric", "same_tokens", "kl_on_template")


def _wrong(book) -> str | None:
    """What of an export.json cannot be, in a few words. A `file` is a plain name: nothing leads out of the directory."""
    if (
        not isinstance(book, dict)
        or not isinstance(book.get("identity"), dict)
        or not isinstance(book.get("formats"), dict)
    ):
        return "identity and formats are needed"
    for name, entry in book["formats"].items():
        if not re.fullmatch(r"\w[\w ]{0,30}", name) or not isinstance(entry, dict):
            return f"{shorten(name)} = {shorten(entry)}"
        if odd := [key for key, kind in KINDS.items() if not isinstance(entry.get(key), kind)]:
            return f"{name}.{odd[0]} = {shorten(entry.get(odd[0]))}"
        if (
            entry["verdict"] not in ("ok", "noisy", "lost", "text")
            or not isinstance(entry.get("file"), str)
            or not re.fullmatch(r"[\w-][\w.-]{0,250}", entry["file"])
        ):
            return f"{name}: {shorten(entry['verdict'])} of the file {shorten(entry.get('file'))}"
        if odd := _odd_numbers(entry):
            return f"{name}.{odd} = {shorten(entry.get(odd))}"
    if (
        odd := ""
        if book.get("trained") is None
        else "answers"
        if not isinstance(book["trained"], dict)
        else _odd_numbers(book["trained"])
    ):
        return f"trained.{odd}"
    return None


def _odd_numbers(record: dict) -> str | None:
    """A key whose value is no number, though it must be one, or must be because another is there."""
    known = {key: value for key in NUMBERS if (value := record.get(key)) is not None}
    odd = [key for key, value in known.items() if not isinstance(value, (int, float)) or abs(value) >= 1e15]
    odd += [
        key
        for one, others in (
            ("kl", ("kl_base", "kept", "agreement")),
            ("rubric", ("valid",)),
            ("kl_on_template", ("kl_base",)),
        )
        if one in known
        for key in others
        if key not in known
    ]
    return odd[0] if odd else None


def best_gguf(book: dict, target: Path) -> Path | None:
    """The smallest GGUF in `target` that passed its proof without a remark, else the smallest that passed."""
    good = [
        e
        for e in book["formats"].values()
        if e["ok"] and e.get("loader") == "llama.cpp" and (target / e["file"]).exists()
    ]
    return target / min(good, key=lambda e: (e["verdict"] != "ok", e["bytes"]))["file"] if good else None
