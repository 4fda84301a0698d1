"""Read a model's weights from disk as it computes with them: in 16 bits or 4, with a LoRA on top.

All that leaves a run is made from here, in float32 and from files, one tensor at a time, never from a live
model: merging into live 4-bit weights would quantize again and erase the LoRA.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from kardia.core.console import one_line
from kardia.core.files import small_json, temporary_path
from kardia.core.machine import read_config
from kardia.models.adapter import lora_scale, read_adapter
from kardia.models.model_files import ExportError, add_compatibility_keys, add_stop_tokens, save_shards

PART = re.compile(r"[\w-][\w.-]{0,200}\.safetensors")  # a plain name: nothing leads out of the directory


def shards(directory: Path) -> dict[str, Path]:
    """Return {tensor name: the safetensors file that holds it} of a directory. Raise ExportError.

    A hub snapshot may hold other copies (consolidated.safetensors): the index or model.safetensors counts.
    """
    from safetensors import safe_open

    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return _indexed(index)
    files = sorted(directory.glob("*.safetensors"))
    if directory / "model.safetensors" in files:
        files = [directory / "model.safetensors"]
    if not files:
        why = "pickled weights, .bin or .pth, are not read"
        raise ExportError(f"{directory}: no *.safetensors in the base's directory ({why})")
    names: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names.update(dict.fromkeys(opened.keys(), file))
        except Exception as error:  # safetensors' own class
            raise ExportError(f"{file}: damaged ({one_line(error)})") from error
    return names


def _indexed(index: Path) -> dict[str, Path]:
    whole = small_json(index, 64 << 20)
    names = whole.get("weight_map") if isinstance(whole, dict) else None
    files = names.values() if isinstance(names, dict) else [None]
    if not all(isinstance(file, str) and PART.fullmatch(file) for file in files):
        raise ExportError(f"{index}: damaged (weight_map must name files beside it, tensor by tensor)")
    paths = {name: index.parent / file for name, file in names.items()}
    for path in sorted(set(paths.values())):
        if not path.is_file():
            raise ExportError(f"{path}: this part of the model is missing; download it again")
    return paths


def nf4_round_trip(weight):
    """Return what a 4-bit (NF4, double-quantized) Linear computes with: float32 [out, in]."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    packed, state = quantize_4bit(weight.to(device), blocksize=64, quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state).float().cpu()


def is_quantized(name: str, n_dims: int, bits: int) -> bool:
    """Return whether a 4-bit run holds this tensor in NF4: all linear layers but the head."""
    is_matrix = n_dims == 2 and name.endswith(".weight")
    return bits == 4 and is_matrix and "lm_head" not in name and "embed" not in name


class Weights:
    """Read the tensors of a Hugging Face directory as a model computes with them, one by one.

    That is W, or with `bits` 4 the values of its NF4 image, plus scale * B @ A where `adapter` has a LoRA. A
    LoRA trained on NF4 corrects NF4's errors too, so it belongs on the dequantized weights (measured: KL to
    the trained model 2e-12, not 0.088). Raise ExportError if the adapter is not of this base.
    """

    def __init__(self, directory: Path, bits: int = 16, adapter: Path | None = None) -> None:
        self.directory, self.bits, self.adapter = directory, bits, adapter
        try:
            self.config = read_config(directory)
        except ValueError as error:
            raise ExportError(str(error)) from error
        self.files, self._open = shards(directory), {}
        self.lora, self.pairs = read_adapter(adapter) if adapter else ({}, {})
        for module, (a, b) in self.pairs.items():
            self._check_module(module, (b.shape[0], a.shape[1]))

    def _check_module(self, module: str, shape: tuple[int, int]) -> None:
        name = f"{module}.weight"
        if name not in self.files:
            why = "adapter of another base"
            if module == "lm_head" and self.config.get("tie_word_embeddings"):
                why = "its output layer is the embedding itself"
            where = f"{self.directory} ({self.config.get('model_type')})"
            raise ExportError(f"{self.adapter}: module {module!r} is not in the base {where}: {why}")
        if shape != self.shape(name):
            sizes = f"{shape[0]}x{shape[1]}, the base's weight {self.shape(name)}"
            raise ExportError(f"{self.adapter}: LoRA of {module} is {sizes}: adapter of another base")

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def _ask(self, name: str, question):
        from safetensors import SafetensorError, safe_open

        path = self.files[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            return question(self._open[path])
        except SafetensorError as error:  # the index names a tensor that is not there, or the file is damaged
            raise ExportError(f"{path}: damaged ({one_line(error)})") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._ask(name, lambda file: file.get_slice(name).get_shape()))

    def stored(self, name: str):
        """Return the base's own tensor, in its own dtype."""
        return self._ask(name, lambda file: file.get_tensor(name))

    def changed(self, name: str) -> bool:
        """Return whether the model computes with other values than the stored ones."""
        quantized = is_quantized(name, len(self.shape(name)), self.bits)
        return quantized or name.removesuffix(".weight") in self.pairs

    def read(self, name: str):
        """Return the tensor as the model computes with it, float32."""
        tensor = self.stored(name)
        values = nf4_round_trip(tensor) if is_quantized(name, tensor.ndim, self.bits) else tensor.float()
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in self.pairs:
            a, b = self.pairs[module]
            values = values + lora_scale(self.lora, module, a.shape[0]) * (b @ a)  # [out, in]
        return values

    def bytes(self) -> int:
        """Return the size of the weights as they are stored."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    def count(self) -> int:
        """Return the number of parameters stored."""
        return sum(math.prod(self.shape(name)) for name in self.files)


def write_merged(weights: Weights, target: Path, stop: list[int], shard_bytes: int = 5_000_000_000) -> Path:
    """Write a directory that plain `transformers` loads (4.57 and 5.x), tensors in the base's dtype.

    stop: ids of the tokens that end an answer, the first is the trained one.
    """
    from safetensors import SafetensorError

    temporary = temporary_path(target)
    temporary.mkdir(parents=True)

    def tensors():
        for name in weights:
            stored = weights.stored(name)
            yield name, weights.read(name).to(stored.dtype) if weights.changed(name) else stored

    try:
        save_shards(tensors(), temporary, shard_bytes)
        for file in weights.directory.iterdir():  # tokenizer, chat template, generation config
            is_index = file.name == "model.safetensors.index.json"
            if file.suffix in (".json", ".jinja", ".model", ".txt") and not is_index:
                shutil.copyfile(file, temporary / file.name)
        add_compatibility_keys(temporary)
        add_stop_tokens(temporary, stop)
        temporary.rename(target)
    except SafetensorError as error:  # also for a full disk
        raise ExportError(f"{target}: cannot be written ({one_line(error)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
