"""Load a base into torch, in 16 or 4 bits, and put a new or a trained LoRA on it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kardia.core.console import UserError, one_line
from kardia.core.files import cache_directory, file_hash, file_lock
from kardia.core.machine import read_config
from kardia.models.adapter import lora_pairs, read_adapter
from kardia.models.base import Base, keep_on_host, reporting_load_errors, silence_transformers
from kardia.models.gguf import write_lora_gguf

PLAIN = {"lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM"}  # of every LoRA


def load_base(base: Base, bits: int, dtype, host_embedding: bool = False):
    """Return a base as a causal LM of transformers. bits 4: double-quantized NF4 (arXiv 2305.14314)."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    silence_transformers()
    device_map = {"": torch.cuda.current_device()} if torch.cuda.is_available() else None
    settings = {"dtype": dtype, "attn_implementation": "sdpa", "device_map": device_map}
    settings["use_safetensors"] = True
    if bits == 4:
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **nf4)
        settings["quantization_config"] = quantized
    with reporting_load_errors(base.name, "model"):
        model = AutoModelForCausalLM.from_pretrained(base.directory, trust_remote_code=False, **settings)
    for module in model.modules():
        # After a pass in eval() bitsandbytes would compute 4 bits in a CPU kernel that has no gradients.
        if bits == 4 and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if host_embedding:
        keep_on_host(model)
    return model


def new_lora(model, rank: int, alpha: int, last_layers: int = 0):
    """Return a PeftModel with a LoRA on all linear layers; its update is scaled by alpha / rank.

    last_layers: only on those of the last so many blocks (0: of all), below which no gradient is computed.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    targets: str | list[str] = "all-linear"
    if last_layers:
        # PEFT takes no count of blocks beside "all-linear", so each layer is named.
        first = model.config.num_hidden_layers - last_layers
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        blocks = [(name, re.search(r"\.layers\.(\d+)\.", name)) for name in linear]
        targets = [name for name, block in blocks if block and int(block[1]) >= first]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **PLAIN))


def load_trained_lora(model, adapter: Path, base_name: str):
    """Return a PeftModel with the LoRA of an adapter directory.

    PEFT never gets the file's own configuration, which may name modules to import and patterns to search
    with. Raise UserError for a pickle, for what an export would lose, and for another base's adapter.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    facts, pairs = read_adapter(adapter)
    last_names = {module.rpartition(".")[2] for module in pairs}
    modules = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in last_names]
    targets = last_names if len(modules) == len(pairs) else pairs
    config = LoraConfig(**{**facts, "target_modules": sorted(targets)}, **PLAIN)
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a  # [r, in]
        tensors[f"base_model.model.{module}.lora_B.weight"] = b  # [out, r]
    try:
        model = get_peft_model(model, config)
        left = set_peft_model_state_dict(model, tensors).unexpected_keys
        if left:
            raise ValueError(f"{left[0]} has no place in it")
        return model
    except (RuntimeError, ValueError) as error:
        why = f"(adapter of another base?): {one_line(error)[:120]}"
        raise UserError(f"{adapter}: does not fit the base {base_name} {why}") from error


def lora_of(model) -> tuple[dict, dict]:
    """Return (configuration, {module: (A [r, in], B [out, r])}) of a PeftModel's LoRA, float32 on the CPU."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name="default")
    tensors = {name: tensor.detach().float().cpu() for name, tensor in state.items()}
    return model.peft_config["default"].to_dict(), lora_pairs(tensors)


def lora_gguf_of(adapter: Path, base: Base) -> Path:
    """Return a run's adapter as GGUF, written once beside it, or in the cache where that is read-only.

    Its name holds the adapter's hash: clocks and copies say nothing about age.
    """
    name = f"adapter-{file_hash(adapter)}.gguf"
    place = adapter if (adapter / name).exists() or os.access(adapter, os.W_OK) else cache_directory()
    target = place / name
    with file_lock(cache_directory() / target.name):
        if not target.exists():
            facts, pairs = read_adapter(adapter)
            write_lora_gguf(facts, pairs, read_config(base.directory), target)
    return target
