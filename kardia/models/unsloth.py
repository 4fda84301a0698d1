"""Put Unsloth's model under our trainers: its kernels, 4-bit weights and checkpointing, with our loss.

Unsloth is two things. One is a model: the forward pass of a few architectures with fused Triton kernels, and
checkpoints that wait in the computer's memory. The other rewrites TRL's trainers while it is imported; a
rewritten GRPOTrainer computes log-probs inside its own loss, where neither the shared prompt, nor the retry
after an out-of-memory error, nor the record reach them. Only the first is taken: UNSLOTH_ALLOW_CPU=1, meant
for tests of TRL's source, leaves the trainers as they were and, next to an NVIDIA GPU, changes nothing else
(unsloth 2026.10.7: models/rl.py:5092, _gpu_init.py:793).

Its attention does not ask transformers' table of attention functions, so `packed_rows.enable_packed_rows`
cannot reach it. But it hands a layout for shared prompts to every layer, and looks up the function that
computes it in one place: `enable_packed_rows` puts ours there.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from kardia.core import distributed, machine
from kardia.core.console import UserError, one_line, say
from kardia.core.files import cache_directory
from kardia.core.machine import read_config
from kardia.models import packed_rows
from kardia.models.base import Base, reporting_load_errors

TESTED = "2026.10.7"
FAST = ("llama", "mistral", "qwen2", "qwen3")  # SmolLM2 is a llama; its compiler rewrites all others
ROPE = ("default", "llama3", "linear", "yarn")  # their cos and sin tables were compared with transformers'


def choose_engine(engine: str, base: Base) -> str:
    """Return "unsloth" or "transformers" for --engine, and import Unsloth if it is chosen.

    auto takes Unsloth where CUDA and the package are present and it computes this base as transformers does.
    """
    from importlib.util import find_spec

    if engine == "transformers":
        return engine
    several = distributed.size() > 1
    if engine == "unsloth" and several:
        raise UserError("--engine unsloth trains in one process; --engine transformers takes several")
    if several or find_spec("unsloth") is None or not machine.has_gpu() or is_amd():
        if engine == "auto":
            return "transformers"
        needs = "an NVIDIA GPU and `pip install -r requirements-gpu.txt`"
        raise UserError(f"--engine unsloth needs {needs}; --engine transformers works everywhere")
    if reason := unsupported_reason(read_config(base.directory)):
        if engine == "unsloth":
            raise UserError(f"--engine unsloth: {base.name} has {reason}; --engine transformers trains it")
        say(f"engine: transformers, for {base.name} has {reason}")
        return "transformers"
    # A failed import leaves Unsloth's patches behind, so falling back is not safe, not even for auto.
    import_unsloth(cache_directory())
    return "unsloth"


def is_amd() -> bool:
    """Return whether torch is built for AMD, where UNSLOTH_ALLOW_CPU would change more than the trainers."""
    import torch

    return bool(torch.version.hip)


def unsupported_reason(config: dict[str, Any]) -> str | None:
    """Return what of a base (its config.json) Unsloth would silently compute differently, or None."""
    kind, rope = config.get("model_type"), config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    window = config.get("sliding_window") and (kind == "mistral" or config.get("use_sliding_window"))
    if kind not in FAST:
        return f"no fast path for the architecture {kind} (only {', '.join(FAST)})"
    if window or "sliding_attention" in str(config.get("layer_types")):
        return "a sliding window"
    if config.get("hidden_act", "silu") != "silu":
        return f"the activation {config['hidden_act']}"
    if scaling not in ROPE:
        return f"RoPE of type {scaling}"
    return "weights that are quantized already" if config.get("quantization_config") else None


def prepare_import(cache: Path) -> None:
    """Set what Unsloth reads only while it is imported."""
    fixed = {"ALLOW_CPU": "1"}  # see above: TRL's trainers stay TRL's
    fixed["GRPO_PREFIX_GROUPER"] = "0"  # its own shared prompts, compiled anew for every shape
    fixed["RETURN_HIDDEN_STATES"] = "0"  # "1" returns hidden states under the name of logits
    os.environ.update({f"UNSLOTH_{name}": value for name, value in fixed.items()})
    # It fetches a README at every load, as a counter.
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    # Else ./unsloth_compiled_cache: generated Python in the working directory, first in the import path.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str((cache / "unsloth").absolute()))


def import_unsloth(cache: Path) -> None:
    """Import Unsloth ahead of trl and peft, which it patches. Raise UserError if it replaced trainers."""
    prepare_import(cache)
    try:
        with redirect_stdout(io.StringIO()):  # stdout is the product; Unsloth prints its banner there
            import unsloth  # noqa: F401
        import trl
    except Exception as error:  # torchvision, xformers or triton may not fit this torch or driver
        fix = "reinstall it with `pip install -r requirements-gpu.txt`, or use --engine transformers"
        raise UserError(f"--engine unsloth: Unsloth cannot be imported ({one_line(error)}); {fix}") from error
    home = Path(trl.__file__).parent
    for trainer in (trl.SFTTrainer, trl.GRPOTrainer):
        source = Path(trainer.__init__.__code__.co_filename)
        if not trainer.__module__.startswith("trl.") or not source.is_relative_to(home):
            why = f"replaces {trainer.__name__}, which trains something else than we do"
            fix = f"install unsloth=={TESTED}, or use --engine transformers"
            raise UserError(f"--engine unsloth: this version of Unsloth {why}; {fix}")


def load(directory: Path, bits: int, dtype, window: int, seed: int, device: int, add_lora: Callable):
    """Return a base in Unsloth's hands as a PeftModel, with the float32 LoRA that `add_lora` puts on it.

    window: the base's context. With more, Unsloth would stretch its RoPE; with less, cut off longer rows.
    """
    from unsloth import FastLanguageModel

    # bits 4: NF4 with double quantization, all but the output layer, as in the other engine.
    settings = {"dtype": dtype, "load_in_4bit": bits == 4, "load_in_16bit": bits == 16}
    settings |= {"max_seq_length": window, "device_map": {"": device}, "random_state": seed}
    settings |= {"use_safetensors": True, "local_files_only": True, "model_name": str(directory)}
    settings |= {"use_exact_model_name": True, "fix_tokenizer": False, "offload_embedding": False}
    checkpoints = {"use_gradient_checkpointing": "unsloth"}
    with redirect_stdout(io.StringIO()), reporting_load_errors(str(directory), "model"):
        model, _ = FastLanguageModel.from_pretrained(trust_remote_code=False, **settings, **checkpoints)
    # It goes on in 16 bits where bitsandbytes does not work.
    if bits == 4 and not getattr(model, "is_loaded_in_4bit", False):
        why = "Unsloth loaded it without 4 bits (does `python -m bitsandbytes` find the GPU?)"
        raise UserError(f"{directory}: {why}; give --bits 16, or use --engine transformers")
    # It grows the embedding for a tokenizer with more tokens than the base has rows.
    rows = model.get_input_embeddings().weight.shape[0]
    if rows != read_config(directory)["vocab_size"]:
        why = f"Unsloth changed its vocabulary to {rows:,} tokens"
        raise UserError(f"{directory}: {why}; use --engine transformers")
    with redirect_stdout(io.StringIO()):
        # As in its own loading of adapters: PEFT makes the LoRA, as in the other engine; then the kernels.
        return FastLanguageModel.patch_peft_model(add_lora(model), **checkpoints)


def enable_packed_rows(causal_lm) -> str | None:
    """Let a model of `load` take packed rows. Return None, or why it cannot; the model is then as it was."""
    from unsloth.utils import attention_dispatch

    inner, slot = causal_lm.base_model, "_flex_shared_prefix_attention"
    if not hasattr(attention_dispatch, slot):
        return "another version of Unsloth"
    forward = inner.forward

    def attention(Q, K, V, pack, scale=None, **_):  # [1, L, heads, D], and so returned
        q, k, v = (states.transpose(1, 2) for states in (Q, K, V))  # [1, heads, L, D]
        return packed_rows.shared_prefix_attention(None, q, k, v, None, scaling=scale, pack=pack)[0]

    def forward_rows(*arguments, pack=None, attention_mask=None, **more):
        if pack is not None:  # the layout says which tokens see which; Unsloth refuses a mask beside it
            return forward(*arguments, prefix_seg_info=pack, **more)
        return forward(*arguments, attention_mask=attention_mask, **more)

    setattr(attention_dispatch, slot, attention)
    inner.forward = forward_rows
    reason = packed_rows.wrong_rows(causal_lm)
    if reason:
        inner.forward = forward
    return reason


def check_reference(model, beta: float) -> None:
    """Raise UserError if --beta has no copy of the SFT adapter ("ref") to measure the KL to.

    Without that copy TRL's trainer, and Unsloth's always, would measure the KL to the bare base.
    """
    if beta and "ref" not in model.peft_config:
        why = "no copy of the SFT adapter is kept as the KL reference"
        raise UserError(f"--beta {beta:g}: {why}; use --beta 0")
