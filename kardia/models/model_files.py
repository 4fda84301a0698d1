"""Write directories that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from kardia.core.console import UserError
from kardia.core.files import write_json


class ExportError(UserError):
    """Report weights that cannot be read or written, or an export that lost what was trained."""


def save_shards(tensors: Iterable, directory: Path, shard_bytes: int = 5_000_000_000) -> None:
    """Write (name, tensor) pairs as safetensors of at most `shard_bytes`, each as it fills."""
    from safetensors.torch import save_file

    parts, shard, size, total = [], {}, 0, 0

    def flush() -> None:
        save_file(shard, directory / f"part-{len(parts)}", metadata={"format": "pt"})
        parts.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        n_bytes = tensor.numel() * tensor.element_size()
        if shard and size + n_bytes > shard_bytes:
            flush()
            size = 0
        shard[name] = tensor.contiguous()
        size, total = size + n_bytes, total + n_bytes
    flush()
    weight_map = {}
    for i, names in enumerate(parts):
        file = "model.safetensors"
        if len(parts) > 1:
            file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        (directory / f"part-{i}").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def add_compatibility_keys(directory: Path) -> None:
    """Write what transformers 4.x needs into a directory that 5.x wrote.

    4.x reads rope_theta where 5.x writes rope_parameters, and silently takes 10,000 without it. gemma3 has
    one set for each kind of layer. Tokenizer classes have other names.
    """
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if isinstance(rope.get("sliding_attention"), dict) and isinstance(rope.get("full_attention"), dict):
        config.setdefault("rope_local_base_freq", rope["sliding_attention"].get("rope_theta"))
        rope = rope["full_attention"]
        config.setdefault("sliding_window_pattern", config.get("_sliding_window_pattern", 6))
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            config.setdefault("rope_scaling", scaling)
    if "dtype" in config:
        config.setdefault("torch_dtype", config["dtype"])
    write_json(path, config)
    path = directory / "tokenizer_config.json"
    if path.is_file() and (directory / "tokenizer.json").is_file():
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        if tokenizer.get("tokenizer_class") in ("TokenizersBackend", None):
            # Both versions read this one: as tokenizer.json says, without a class's own defaults.
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
            write_json(path, tokenizer)


def add_stop_tokens(directory: Path, stop: list[int]) -> None:
    """Name every token that ends an answer in generation_config.json: a turn's end may not be a text's."""
    path = directory / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    before = config.get("eos_token_id")
    more = before if isinstance(before, list) else [before]
    ids = list(dict.fromkeys(i for i in [*stop, *more] if i is not None))
    config["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    write_json(path, config)
