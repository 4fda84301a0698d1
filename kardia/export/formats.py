"""Build the files that other programs load from a run: merged weights, GGUFs, LoRAs, a Modelfile.

Every format is built under a hidden name, loaded by its real loader, compared with the trained model
(kardia/export/proof.py), and only then given its own name, or a name that ends in .failed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kardia.core.files import file_hash, lock_directory, unlock_directory, write_json, write_text
from kardia.export import ollama
from kardia.export.book import best_gguf, is_whole, read_book
from kardia.llama.gguf_header import read_gguf
from kardia.models import gguf as gguf_files
from kardia.models.model_files import ExportError
from kardia.models.weights import Weights, write_merged

FORMATS = ("merged", "lora", "modelfile")  # besides every type of GGUF
LOW_BIT = re.compile(r"(iq|tq|q|mxfp|nvfp)[1-4]")  # GGUF types of 4 bits or fewer
BYTES_PER_WEIGHT = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.1}


def parse_formats(text: str) -> list[str]:
    """Return "merged,Q8_0" as ["merged", "q8_0"]. Raises ValueError for a format that cannot be made."""
    types = gguf_files.file_types()
    formats = list(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    for kind in formats:
        if kind in gguf_files.NEEDS_IMATRIX:
            why = "needs an importance matrix, which is not made here"
            raise ValueError(f"{kind!r} {why}; take q2_k, q3_k_m or q4_k_m")
        if kind not in FORMATS and kind not in types:
            raise ValueError(
                f"{kind!r} is not one of {', '.join(FORMATS)} or a GGUF type: {', '.join(types)}"
            )
    if not formats:
        raise ValueError("no format given; for example merged,q8_0")
    return formats


def is_quantized(kind: str) -> bool:
    """Return whether llama.cpp's quantizer makes this format from a BF16 GGUF."""
    return kind not in (*FORMATS, *gguf_files.WRITTEN_HERE)


@dataclass
class Artefact:
    """One thing that was written and can be loaded."""

    name: str  # in the drift table
    path: Path
    loader: str  # transformers, peft, llama.cpp, llama.cpp + LoRA, text

    def bytes(self) -> int:
        """Return its size on disk, of a directory with all files in it."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files if file.is_file())


class Exporter:
    """Builds the formats of one run in the hidden folder `work` of `target`, and holds its lock."""

    def __init__(self, base, adapter: Path, bits: int, target: Path, name: str, chat, llama_cpp=None) -> None:
        """Read the adapter. `chat`: (ids that end an answer, chat template). Raises ExportError."""
        self.base, self.adapter, self.target, self.llama_cpp = base, adapter, target, llama_cpp
        self.stop, self.chat_template = chat
        self.name, self.work = re.sub(r"[^\w.-]+", "-", name), target / ".part"
        self.weights = Weights(base.directory, bits, adapter)
        self.bf16: Path | None = None  # what llama.cpp's quantizer reads
        self.merged: Path | None = None  # what llama.cpp's converter reads

    def __enter__(self) -> Exporter:
        self.target.mkdir(parents=True, exist_ok=True)
        taken = "another process is exporting into it; wait for it, or choose another --to"
        self.lock = lock_directory(self.target / ".lock", f"{self.target}: {taken}")
        shutil.rmtree(self.work, ignore_errors=True)  # left by a killed process
        self.work.mkdir(parents=True)
        return self

    def __exit__(self, *_) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        unlock_directory(self.lock)

    def open_book(self, run: str, formats: list[str], say) -> tuple[dict, list[str]]:
        """Return (export.json as it will be, the formats still to make). Makes every cheap check."""
        identity = {"adapter": file_hash(self.adapter), "base": self.base.hash, "bits": self.weights.bits}
        book = read_book(self.target, {**identity, "llama_cpp": bool(self.llama_cpp)})
        book.update(run=run, base=self.base.name, bits=self.weights.bits)
        todo = []
        for kind in formats:
            names = ["lora", "lora gguf"] if kind == "lora" and self.base.template else [kind]
            if kind != "modelfile" and all(is_whole(book, name, self.target) for name in names):
                say(f"  {kind}: already there, and proved")
            else:
                todo.append(kind)
        # bf16 comes before the types that are made of it; the Modelfile describes what is there at the end
        todo.sort(key=lambda kind: (kind == "modelfile", is_quantized(kind)))
        if todo == ["modelfile"] and best_gguf(book, self.target) is None:
            why = "it describes a GGUF, and none that passed its proof is there"
            raise ExportError(f"modelfile: {why}; ask for one with it, for example --formats q8_0,modelfile")
        for note in self.check(todo):
            say(f"  {note}")
        return book, todo

    def check(self, formats: list[str]) -> list[str]:
        """Return notes to read before the work. Raises ExportError for what would fail later."""
        types = [kind for kind in formats if kind not in FORMATS]
        notes, name, template = [], self.base.name, self.base.template
        if types and not self.llama_cpp and template is None:
            ways = (
                "--gguf-template FILE.gguf, or llama.cpp's source with --llama-cpp DIR, or export merged,lora"
            )
            why = f"the base {name} came without a GGUF; give one of the same model with {ways}"
            raise ExportError(f"{types[0]}: {why}")
        if template and ("lora" in formats or (types and not self.llama_cpp)):
            gguf_files.check_template(template, self.weights)
        if self.llama_cpp:
            gguf_files.converter(self.llama_cpp)
        if "lora" in formats and template is None:
            give = f"give the base's GGUF (--gguf-template; {name} came without)"
            notes.append(f"lora: as PEFT adapter only; for a GGUF LoRA {give}")
        low = [kind for kind in types if LOW_BIT.match(kind)]
        if low and (grid := four_bit_grid(self.base)):
            why = f"the base's weights lie on a 4-bit grid already ({grid})"
            loss = "a 4-bit type pulls what was learned back to it. The proof will tell"
            keep = "q8_0 keeps it, and so does the base with the LoRA (--formats lora)"
            notes.append(f"{', '.join(low)}: {why}; {loss}; {keep}")
        existing = next(path for path in (self.target, *self.target.absolute().parents) if path.exists())
        needed, free = self.size(formats), shutil.disk_usage(existing).free
        if needed > free:
            sizes = f"need about {needed / 1e9:.1f} GB there, {free / 1e9:.1f} GB are free"
            raise ExportError(f"{self.target}: {', '.join(formats)} {sizes}")
        return notes

    def size(self, formats: list[str]) -> float:
        """Return about how many bytes `formats` take on disk, intermediate files included."""
        n = self.weights.count()
        # llama.cpp takes a larger type for tensors whose rows do not divide by 256
        least_bits = 6 if self.weights.config.get("hidden_size", 256) % 256 else 0
        total = n * sum(BYTES_PER_WEIGHT.get(kind, 0.0) for kind in formats)
        quantized = [kind for kind in formats if is_quantized(kind)]
        for kind in quantized:
            bits = int(re.search(r"\d", kind).group()) + 1
            total += n * max(bits, least_bits) / 8
        if quantized and "bf16" not in formats:
            total += 2 * n
        if self.llama_cpp or "merged" in formats:
            total += self.weights.bytes()
        return total

    def write(self, kind: str, quantize: Callable[[Path, Path, str], None]) -> list[Artefact]:
        """Build one format in `work`. `quantize(source, target, type)` is llama.cpp's quantizer."""
        if kind == "merged":
            self.merged = self._merge(self.work / "merged")
            return [Artefact("merged", self.merged, "transformers")]
        if kind == "lora":
            return self._write_lora()
        path = self.work / f"{self.name}-{kind}.gguf"
        if not is_quantized(kind):
            self._write_gguf(path, kind)
            self.bf16 = path if kind == "bf16" else self.bf16
        else:
            self.bf16 = self.bf16 or self._write_gguf(self.work / "between.gguf", "bf16")
            quantize(self.bf16, path, kind)
        return [Artefact(kind, path, "llama.cpp")]

    def _merge(self, path: Path) -> Path:
        write_merged(self.weights, path, self.stop)
        write_chat_template(path, self.chat_template)
        return path

    def _write_gguf(self, path: Path, kind: str) -> Path:
        if not self.llama_cpp:
            metadata = {"tokenizer.chat_template": self.chat_template}
            tensors = gguf_files.gguf_tensors(self.weights)
            return gguf_files.write_gguf(self.base.template, path, kind, tensors, metadata)
        self.merged = self.merged or self._merge(self.work / "between")
        return gguf_files.convert(self.llama_cpp, self.merged, path, kind)

    def _write_lora(self) -> list[Artefact]:
        """Copy the adapter, naming its base by hub id or else by directory; and write it as GGUF."""
        path, base = self.work / "lora", self.base
        path.mkdir()
        # only these two: whatever else lies in the adapter's folder is not ours to pass on
        shutil.copyfile(self.adapter / "adapter_model.safetensors", path / "adapter_model.safetensors")
        config = json.loads((self.adapter / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base.name if "/" in base.name else str(base.directory.absolute())
        text = json.dumps(config, indent=2) + "\n"
        (path / "adapter_config.json").write_text(text, encoding="utf-8")
        written = [Artefact("lora", path, "peft")]
        if base.template is not None:
            gguf, weights = self.work / f"{self.name}-lora.gguf", self.weights
            gguf_files.write_lora_gguf(weights.lora, weights.pairs, weights.config, gguf)
            written.append(Artefact("lora gguf", gguf, "llama.cpp + LoRA"))
        return written

    def keep(self, artefact: Artefact, row: dict) -> dict:
        """Move it to its own name, or where the proof failed to NAME.failed. Return its entry in the book."""
        n_bytes, good = artefact.bytes(), self.target / artefact.path.name
        bad = self.target / f"{artefact.path.name}.failed"
        for old in (good, bad):  # what an earlier call left under either name
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)
        final = good if row["ok"] else bad
        os.replace(artefact.path, final)
        self.bf16 = final if artefact.path == self.bf16 else self.bf16
        self.merged = final if artefact.path == self.merged else self.merged
        return {**row, "file": final.name, "path": str(final), "loader": artefact.loader, "bytes": n_bytes}

    def write_modelfile(self, gguf: Path, worker, renderer, system: str) -> dict:
        """Write Ollama's Modelfile for `gguf`, which lies beside it. Return its entry."""
        facts = worker.load("export", gguf)
        worker.unload("export")
        stop, context = ollama.stop_tokens(renderer, facts["add_bos"]), min(4096, facts["n_ctx_train"])
        path = self.target / "Modelfile"
        write_text(path, ollama.modelfile(gguf.name, stop, system, 0.7, context))
        entry = {"format": "modelfile", "file": path.name, "path": str(path), "loader": "text"}
        entry |= {"bytes": path.stat().st_size, "verdict": "text", "ok": True, "why": ""}
        return {**entry, "describes": gguf.name}

    def save(self, book: dict) -> None:
        """Write export.json."""
        write_json(self.target / "export.json", book)


def write_chat_template(directory: Path, template: str) -> None:
    """Write the template as trained into the file that wins over the one inside tokenizer_config.json."""
    path = directory / "tokenizer_config.json"
    facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if facts.pop("chat_template", None) is not None:
        path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def four_bit_grid(base) -> str | None:
    """Return the 4-bit type that most of a base's weights come from, if its GGUF was imported; else None."""
    if not base.imported:
        return None
    weights = Counter()
    for tensor in read_gguf(base.template).tensors.values():
        weights[tensor.kind.name] += tensor.n_elements
    most = weights.most_common(1)[0][0]
    return most if LOW_BIT.match(most.lower()) else None
