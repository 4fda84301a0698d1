"""Map a model's tensors to GGUF's: names, row order of q and k, architectures."""

from __future__ import annotations

from collections.abc import Callable

from kardia.models.model_files import ExportError

# architecture in config.json -> (in GGUF, are q/k rows permuted (rotary layout), is a norm weight + 1)
ARCHITECTURES = {
    "llama": ("llama", True, False),
    "mistral": ("llama", True, False),
    "qwen2": ("qwen2", False, False),
    "qwen3": ("qwen3", False, False),
    "gemma2": ("gemma2", False, True),
    "gemma3_text": ("gemma3", False, True),
}


def architecture_of(config: dict, what: str) -> tuple[str, bool, bool]:
    """Return ARCHITECTURES' entry of a config.json. Raise ExportError for another architecture."""
    kind = config.get("model_type", "?")
    if kind not in ARCHITECTURES:
        fix = "give a Hugging Face directory as --model; export --formats merged works for all"
        why = f"architecture {kind!r} has no GGUF mapping here ({', '.join(ARCHITECTURES)})"
        raise ExportError(f"{what}: {why}; {fix}, --llama-cpp DIR for what llama.cpp converts")
    return ARCHITECTURES[kind]


def tensor_names(config: dict) -> Callable[[str], str]:
    """Return the function from Hugging Face's tensor name to GGUF's."""
    import gguf

    architecture = architecture_of(config, "config.json")[0]
    kind = {name: value for value, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])

    def name_of(name: str) -> str:
        gguf_name = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ExportError(f"{name}: no GGUF tensor of {architecture} corresponds to it")
        return gguf_name

    return name_of


def permute(rows, n_head: int, back: bool = False):
    """Return rows of q/k (W [out, in] or B [out, r]) in GGUF's rotary layout, or `back` in Hugging Face's.

    That is [heads, 2, half, ..] -> [heads, half, 2, ..].
    """
    shape = rows.shape
    if shape[0] % (2 * n_head):
        raise ExportError(f"{shape[0]} rows do not divide among {n_head} heads: tensor of another base")
    half = shape[0] // n_head // 2
    split = (n_head, half, 2) if back else (n_head, 2, half)
    return rows.reshape(*split, *shape[1:]).swapaxes(1, 2).reshape(shape)


def heads_of(name: str, config: dict) -> int | None:
    """Return the number of heads if `name` is a q or k projection (what GGUF's llama permutes), else None."""
    heads = config["num_attention_heads"]
    if ".k_proj" in name:
        return config.get("num_key_value_heads") or heads
    return heads if ".q_proj" in name else None


def is_left_out(name: str, config: dict) -> bool:
    """Return whether GGUF has no such tensor: a tied head, or what the config says (in old llamas)."""
    tied = name == "lm_head.weight" and config.get("tie_word_embeddings")
    return bool(tied) or name.endswith("rotary_emb.inv_freq")
