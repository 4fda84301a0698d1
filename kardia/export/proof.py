"""Compare an export with the trained model."""

from __future__ import annotations

from pathlib import Path

from kardia.export import ollama
from kardia.export.formats import (
    best_gguf,
)
from kardia.results.tables import NOTHING

# ---------------------------------------------------------------------------------- proof


def _log_softmax(x):
    import numpy as np

    x = x.astype(np.float64)
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def kl_and_agreement(trained, other) -> tuple[float, float]:
    """(mean KL(trained || other) in nats, share of equal greedy tokens) of next-token logits float32 [prompts, vocabulary]."""
    import numpy as np

    width = min(trained.shape[1], other.shape[1])  # a padded vocabulary may differ in its unused tail
    p, q = _log_softmax(trained[:, :width]), _log_softmax(other[:, :width])
    return float((np.exp(p) * (p - q)).sum(1).mean()), float((p.argmax(1) == q.argmax(1)).mean())


def kept(base, trained, other) -> float:
    """How much of what training changed is in `other`: 1 = all, 0 = none (logits [prompts, vocabulary] of the three).

    The slope of log p_other - log p_base on log p_trained - log p_base, tokens weighted by the mean of p_base and p_trained.
    Rounding noise, which knows nothing of the training, moves KL but not this; a LoRA that was rounded away moves it to 0.
    """
    import numpy as np

    width = min(len(base[0]), len(trained[0]), len(other[0]))
    b, t, o = (_log_softmax(x[:, :width]) for x in (base, trained, other))
    weight = (np.exp(b) + np.exp(t)) / 2
    d, e = t - b, o - b
    d, e = (
        x - (weight * x).sum(1, keepdims=True) for x in (d, e)
    )  # a constant added to all logits is no change
    moved = float((weight * d * d).sum())
    return float((weight * d * e).sum()) / moved if moved > 0 else 1.0


NOISE = 2e-4  # KL that the loaders' own arithmetic may make: bfloat16 and float16 activations in llama.cpp (3e-5 to 1e-4 measured)


def verdict(kl_export: float, kl_base: float, share: float, quantized: bool = False) -> tuple[str, str]:
    """("ok" | "noisy" | "lost", why) for an export whose KL to the trained model is `kl_export`, where training moved the base
    by `kl_base` and `share` of that movement is in it.

    An exact type must stay far below the size of the effect: a tenth of it; or, where the effect is as small as the
    arithmetic's noise, hold most of it. A quantized type adds noise of its own, which may be larger and is then reported: it is
    lost when the movement is gone (under a half), or when the noise is larger than the whole of it.
    """
    if kl_export != kl_export or share != share:
        return "lost", "its logits are not numbers"
    if kl_export <= 0.1 * kl_base or (kl_export <= NOISE and (share >= 0.8 or kl_base < NOTHING)):
        return "ok", ""
    told = f"KL to the trained model is {kl_export:.2g}, training moved the base by {kl_base:.2g}, {share:.0%} of that movement is in it"
    if quantized and kl_export <= kl_base and share >= 0.5:
        return (
            "noisy",
            f"the rounding of this type is {kl_export / kl_base:.0%} of the effect of training ({told})",
        )
    return "lost", told


def advice(book: dict, target: Path) -> list[str]:
    """What to know about the export and how to use it, a line each."""
    lines = []
    for name, entry in book["formats"].items():
        if entry["verdict"] == "noisy":
            lines.append(
                f"{name}: {entry['why']}. Compare its answers before you publish it; q8_0, or the base with the LoRA, is nearer"
            )
        if entry.get("same_tokens", 1) < 1:
            lines.append(
                f"{name}: llama.cpp splits {1 - entry['same_tokens']:.0%} of the proof's texts into other tokens than training did"
            )
        if entry.get("kl_on_template") is not None:
            lines.append(
                f"{name}: measured on the very weights it was trained on; on the base's own GGUF its KL to the trained model is {entry['kl_on_template']:.2g}, {entry['kl_on_template'] / max(entry['kl_base'], NOTHING):.1%} of what training did"
            )
        if name == "modelfile" and entry["why"]:
            lines.append(f"modelfile: no template in it ({entry['why']}); Ollama goes by the one in the GGUF")
    if gguf := best_gguf(book, target):
        lines += [
            "talk to it:",
            f"  python kardia_lite.py chat {gguf}",
            *(
                f"  {line}"
                for line in ollama.command_lines(gguf)[: 3 if "modelfile" in book["formats"] else 2]
            ),
        ]
    if "lora gguf" in book["formats"] and book["formats"]["lora gguf"]["ok"]:
        lines.append(
            f"  llama-server -m BASE.gguf --lora {target / book['formats']['lora gguf']['file']} --jinja"
        )
    return lines
