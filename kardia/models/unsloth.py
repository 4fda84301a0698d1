"""Unsloth's model under our trainers: its kernels, 4-bit weights and checkpointing, with the loss in our hands.

Unsloth is two things. One is a model: the forward pass of a few architectures with fused Triton kernels for LoRA, RoPE, RMSNorm
and SwiGLU, and checkpoints that wait in the computer's memory. The other rewrites TRL's trainers while it is imported; a rewritten
GRPOTrainer computes log-probs inside its own loss, where neither the shared prompt, nor the ladder, nor the record reach them.
Only the first is taken: UNSLOTH_ALLOW_CPU=1, meant for tests of TRL's source, leaves the trainers as they were and, next to an
NVIDIA GPU, changes nothing else (unsloth 2026.10.7: models/rl.py:5092, _gpu_init.py:793).

Its attention does not ask transformers' table of attention functions, so `packing.enable` cannot reach it. But it lets a layout
for shared prompts through to every layer, and looks up the function that computes it in one place: `share_rows` puts ours there.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from kardia.core.console import UserError, one_line
from kardia.core.machine import read_config
from kardia.models import packed_rows
from kardia.models.base import reporting_load_errors

TESTED = "2026.10.7"
FAST = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
)  # SmolLM2 is a llama; all else goes through Unsloth's rewriting compiler
ROPE = (
    "default",
    "llama3",
    "linear",
    "yarn",
)  # of these its cos and sin tables were compared with transformers'


def unsupported_reason(config: dict[str, Any]) -> str | None:
    """Why a base (its config.json) is better left to --engine transformers, or None. What Unsloth would compute differently
    without a word is listed here: a window that our rows do not pass on, an activation or a RoPE that it replaces by its own."""
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
    """What Unsloth reads only while it is imported."""
    os.environ["UNSLOTH_ALLOW_CPU"] = "1"  # see above: TRL's trainers stay TRL's
    os.environ["UNSLOTH_GRPO_PREFIX_GROUPER"] = (
        "0"  # its own attention for shared prompts, compiled anew for every shape
    )
    os.environ["UNSLOTH_RETURN_HIDDEN_STATES"] = (
        "0"  # "1" would hand out hidden states under the name of logits
    )
    os.environ.setdefault(
        "UNSLOTH_DISABLE_STATISTICS", "1"
    )  # a README fetched from the hub at every load, as a counter
    # Else ./unsloth_compiled_cache: generated Python in whatever directory one stands in, first in the import path.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str((cache / "unsloth").absolute()))


def is_amd() -> bool:
    """There UNSLOTH_ALLOW_CPU would change more than the trainers."""
    import torch

    return bool(torch.version.hip)


def bring_in(cache: Path) -> None:
    """Import Unsloth, ahead of trl, transformers and peft, which it patches; then see whether TRL's trainers are TRL's own."""
    prepare_import(cache)
    try:
        with _hushed():
            import unsloth  # noqa: F401
        import trl
    except (
        Exception
    ) as error:  # of its many parts (torchvision, xformers, triton) any may not fit this torch or driver
        raise UserError(
            f"--engine unsloth: Unsloth cannot be imported ({one_line(error)}); reinstall it with `pip install -r requirements-gpu.txt`, or use --engine transformers"
        ) from error
    home = Path(trl.__file__).parent
    for trainer in (trl.SFTTrainer, trl.GRPOTrainer):
        if not trainer.__module__.startswith("trl.") or not Path(
            trainer.__init__.__code__.co_filename
        ).is_relative_to(home):
            raise UserError(
                f"--engine unsloth: this version of Unsloth replaces {trainer.__name__}, which trains something else than we do; install unsloth=={TESTED}, or use --engine transformers"
            )


def load(directory: Path, bits: int, dtype, window: int, seed: int, device: int, dress: Callable):
    """A base in Unsloth's hands, with the LoRA that `dress` puts on it (model -> PeftModel), float32. Returns the PeftModel.

    window: how many tokens the base was made for. Longer, and Unsloth would stretch its RoPE; shorter, and it would cut off rows
    that are longer, in both cases with no more than a warning.
    """
    from unsloth import FastLanguageModel

    with _hushed(), reporting_load_errors(str(directory), "model"):
        # Its tokenizer is not used. bits 4: NF4 with double quantization, computed in `dtype`, all but the output layer, as in the other engine.
        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(directory),
            max_seq_length=window,
            dtype=dtype,
            load_in_4bit=bits == 4,
            load_in_16bit=bits == 16,
            device_map={"": device},
            random_state=seed,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            use_exact_model_name=True,
            fix_tokenizer=False,
            offload_embedding=False,
            use_gradient_checkpointing="unsloth",
        )
    if bits == 4 and not getattr(
        model, "is_loaded_in_4bit", False
    ):  # it goes on in 16 bits where bitsandbytes does not work
        raise UserError(
            f"{directory}: Unsloth loaded it without 4 bits (does `python -m bitsandbytes` find the GPU?); give --bits 16, or use --engine transformers"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if (
        rows != read_config(directory)["vocab_size"]
    ):  # it makes room for a tokenizer with more tokens than the base has rows
        raise UserError(
            f"{directory}: Unsloth changed its vocabulary to {rows:,} tokens; use --engine transformers"
        )
    with _hushed():
        # As in its own loading of adapters: PEFT makes the LoRA, so that both engines read one in the same way; then the kernels.
        return FastLanguageModel.patch_peft_model(dress(model), use_gradient_checkpointing="unsloth")


def enable_packed_rows(causal_lm) -> str | None:
    """`packing.enable` for a model of `load`. Returns None, or why it cannot be done (the model is then left as it was)."""
    from unsloth.utils import attention_dispatch

    inner, slot = causal_lm.base_model, "_flex_shared_prefix_attention"
    if not hasattr(attention_dispatch, slot):
        return "another version of Unsloth"
    forward = inner.forward

    def attention(Q, K, V, pack, scale=None, **_):  # [1, L, heads, D], and so returned
        return packed_rows.shared_prefix_attention(
            None, Q.transpose(1, 2), K.transpose(1, 2), V.transpose(1, 2), None, scaling=scale, pack=pack
        )[0]

    def forward_rows(*arguments, pack=None, attention_mask=None, **more):
        if (
            pack is not None
        ):  # who sees whom is the layout's business; a mask beside it is an error to Unsloth
            return forward(*arguments, prefix_seg_info=pack, **more)
        return forward(*arguments, attention_mask=attention_mask, **more)

    setattr(attention_dispatch, slot, attention)
    inner.forward = forward_rows
    difference, why = float("inf"), None
    try:
        difference = packed_rows._probe(causal_lm)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError, NotImplementedError) as error:
        why = f"{type(error).__name__}: {one_line(error)[:100]}"
    if difference < packed_rows.tolerance(causal_lm):
        packed_rows.choose_kernel(causal_lm)
        return None
    inner.forward = forward
    return why or f"its log-probs in a packed row are off by {difference:.2f}"


def check_reference(model, beta: float) -> None:
    """With --beta the reference must be the SFT adapter: TRL's own trainer keeps a frozen copy of it, named "ref"; without that
    copy it, and Unsloth's trainer always, would measure the KL to the bare base."""
    if beta and "ref" not in model.peft_config:
        raise UserError(
            f"--beta {beta:g}: no copy of the SFT adapter is kept as the KL reference; use --beta 0"
        )


@contextmanager
def _hushed() -> Iterator[None]:
    """stdout is the product; Unsloth prints its banner there."""
    with redirect_stdout(io.StringIO()):
        yield
