"""Check a GGUF's header, and read its rope, before a model is made of it."""

from __future__ import annotations

from pathlib import Path

from kardia.core.console import shorten
from kardia.llama.gguf_header import read_gguf
from kardia.models.model_files import ExportError

ELSEWHERE = "give the model's Hugging Face directory, and this file as --gguf-template"


def check_sizes(source: Path) -> None:
    """Raise ExportError for a header that names absurd sizes, other layers or another vocabulary.

    transformers makes every layer that the header names, without data; `import_gguf` compares every shape.
    """
    header = read_gguf(source)
    architecture = header.value("general.architecture")
    if not isinstance(architecture, str):
        raise ExportError(f"{source}: damaged GGUF (general.architecture is {shorten(architecture)})")
    for key in header.fields:
        value = header.value(key) if key.startswith(f"{architecture}.") else None
        most = 0 if key.endswith(".expert_count") else 1 << 24  # no architecture known here has experts
        if isinstance(value, int) and not 0 <= value <= most:
            raise ExportError(f"{source}: damaged GGUF ({shorten(key)} is {value})")
    blocks = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    tokens, embed = header.value("tokenizer.ggml.tokens"), header.tensors.get("token_embd.weight")
    facts = [("block_count", header.value(f"{architecture}.block_count"), len(blocks))]
    if tokens is not None and embed and len(embed.shape) > 1:
        count = len(tokens) if isinstance(tokens, list) else 1
        facts.append(("tokenizer.ggml.tokens", count, embed.shape[-2]))
    for key, value, count in facts:
        if value != count:
            lie = f"its header says {key} {shorten(value)}, its tensors {count}"
            raise ExportError(f"{source}: damaged GGUF ({lie})")


def query_scalar(config) -> int:
    """Return the number whose root llama.cpp divides gemma's queries by: no GGUF says it."""
    of_27b = {"gemma2": 46, "gemma3_text": 62}.get(config.model_type) == config.num_hidden_layers
    return config.hidden_size // config.num_attention_heads if of_27b else config.head_dim


def rope_parameters(source: Path, config) -> dict:
    """Return the rope's parameters with the scaling that transformers does not read from a GGUF.

    Without it torch would train another model than llama.cpp runs. Of Llama 3.1's scaling only the result
    is stored (rope_freqs), so its parameters are found by trying.
    """
    header, rope = read_gguf(source), dict(config.rope_parameters or {})
    architecture = header.value("general.architecture")
    scaling = header.value(f"{architecture}.rope.scaling.type")
    if factors := header.tensors.get("rope_freqs.weight"):
        return {**rope, **_llama3_rope(source, factors.values(), rope["rope_theta"])}
    if scaling in (None, "none"):
        return rope
    if scaling != "linear":
        why = f"its rope scaling ({scaling}) cannot be taken over from a GGUF"
        raise ExportError(f"{source}: {why}; {ELSEWHERE}")
    scaled = {"rope_type": "linear", "factor": header.value(f"{architecture}.rope.scaling.factor")}
    if "full_attention" in rope:
        return {**rope, "full_attention": {**rope["full_attention"], **scaled}}
    return {**rope, **scaled}


def _llama3_rope(source: Path, factors, theta: float) -> dict:
    """Return {rope_type: llama3, ..} whose divisors of the frequencies are `factors` [head_dim / 2]."""
    import numpy as np

    # The formula of Llama 3.1, from the length of each frequency's wave in tokens.
    wave = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))  # [head_dim / 2]
    factor, low, high = float(factors.max()), 1.0, 4.0
    for original in (8192, *(2**n for n in range(5, 18))):
        smooth = np.clip((original / wave - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-3):
            found = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low}
            return found | {"high_freq_factor": high, "original_max_position_embeddings": original}
    raise ExportError(f"{source}: its rope_freqs are not Llama 3.1's; {ELSEWHERE}")
