"""Compare an export with the trained model: next-token logits, tokens of a text, answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kardia.core import machine
from kardia.core.console import say
from kardia.export import ollama
from kardia.export.book import best_gguf
from kardia.export.formats import Artefact
from kardia.llama.errors import LlamaError
from kardia.llama.worker import Worker
from kardia.models.generate import llama_answers, load_plain, torch_answers, torch_logits
from kardia.results.tables import NOTHING

# KL that the loaders' own arithmetic may make: 16-bit activations in llama.cpp (3e-5 to 1e-4 measured)
NOISE = 2e-4


def _logprobs(*logits) -> list:
    """Return the log-probabilities [P, V], float64, of each, over the tokens that all have."""
    import numpy as np
    from scipy.special import log_softmax

    width = min(x.shape[1] for x in logits)  # a padded vocabulary may differ in its unused tail
    return [log_softmax(x[:, :width].astype(np.float64), axis=1) for x in logits]


def kl_and_agreement(trained, other) -> tuple[float, float]:
    """Return (mean KL(trained || other) in nats, share of equal greedy tokens) of logits, float32 [P, V]."""
    import numpy as np

    p, q = _logprobs(trained, other)  # [P, V]
    return float((np.exp(p) * (p - q)).sum(1).mean()), float((p.argmax(1) == q.argmax(1)).mean())


def kept(base, trained, other) -> float:
    """Return how much of what training changed is in `other`: 1 = all, 0 = none. Logits of the three, [P, V].

    It is the slope of log p_other - log p_base on log p_trained - log p_base, tokens weighted by the mean of
    p_base and p_trained. Rounding noise is independent of the training: it moves KL, but not this slope.
    A LoRA that was rounded away moves it to 0.
    """
    import numpy as np

    b, t, o = _logprobs(base, trained, other)  # [P, V]
    weight = (np.exp(b) + np.exp(t)) / 2
    d, e = t - b, o - b
    # a constant added to all logits is no change
    d, e = (x - (weight * x).sum(1, keepdims=True) for x in (d, e))
    moved = float((weight * d * d).sum())
    return float((weight * d * e).sum()) / moved if moved > 0 else 1.0


def verdict(kl_export: float, kl_base: float, share: float, quantized: bool = False) -> tuple[str, str]:
    """Return ("ok" | "noisy" | "lost", why). The KLs are those of export and base to the trained model;
    `share` of what training changed is in the export.

    An exact type must stay below a tenth of the effect of training. Where the effect is as small as the
    noise of the arithmetic, it must hold most of it. A quantized type adds noise of its own, which is
    reported; it is lost when under half of the change is left, or when the noise is larger than the effect.
    """
    if kl_export != kl_export or share != share:
        return "lost", "its logits are not numbers"
    if kl_export <= 0.1 * kl_base or (kl_export <= NOISE and (share >= 0.8 or kl_base < NOTHING)):
        return "ok", ""
    facts = f"KL to the trained model is {kl_export:.2g}, training moved the base by {kl_base:.2g}, "
    facts += f"{share:.0%} of that movement is in it"
    if quantized and kl_export <= kl_base and share >= 0.5:
        noise = kl_export / kl_base
        return "noisy", f"the rounding of this type is {noise:.0%} of the effect of training ({facts})"
    return "lost", facts


def proof_prompts(renderer, dialogues, places: int = 8, most: int = 32) -> list[list[int]]:
    """Return prompts [token ids] where the next token matters: `places` evenly spread through the answers of
    each dialogue; for a row that ends with a user turn, where the answer would begin."""
    prompts: list[list[int]] = []
    for dialogue in dialogues:
        if len(prompts) >= most:
            break
        if dialogue.is_prompt:
            prompts.append(renderer.prompt(dialogue))
            continue
        for ids, labels in renderer.examples(dialogue, 1024)[:1]:
            answer = [i for i, label in enumerate(labels) if label != -100]
            prompts += [ids[: answer[len(answer) * i // places]] for i in range(places)]
    return prompts


@dataclass
class ReferenceOutputs:
    """The outputs of the trained model and of its base, with which every export is compared."""

    trained: Any  # logits, float32 [P, V]
    before: Any  # the base's, at the same places
    kl: float  # of the base to the trained model: the size of the effect of training


@dataclass
class Proof:
    """The questions of a proof, and the means to ask them of the trained model and of each export."""

    base: Any
    run: Any
    renderer: Any
    worker: Worker
    load_policy: Callable  # (base, engine, bits, *, adapter, dtype) -> PeftModel
    dtype: Any  # in which torch computes the logits
    prompts: list[list[int]]  # whose next token is compared
    asked: list[list[int]]  # prompts to be answered in full
    max_tokens: int  # of these answers
    texts: list[str]  # a GGUF's tokenizer must split them as ours does
    reference: ReferenceOutputs | None = None

    def measure_trained(self) -> list[str]:
        """Set `reference` from base and adapter in torch. Return the trained model's answers."""
        model = self._with_lora(self.run.adapter)
        trained = torch_logits(model, self.prompts)
        with model.disable_adapter():
            before = torch_logits(model, self.prompts)
        if self.run.facts["bits"] == 16:
            # merged in float32, then rounded: the same model, and generation is twice as fast
            model = model.merge_and_unload().to(machine.compute_dtype())
        kl, agreement = kl_and_agreement(trained, before)
        answers = self._torch_answers(model)
        same = f"it would say the same next token in {agreement:.0%} of {len(self.prompts)} places"
        say(f"  training moved the base by KL {kl:.2g} ({same}); each export must stay far below that")
        self.reference = ReferenceOutputs(trained, before, kl)
        return answers

    def measure(self, artefact: Artefact) -> dict[str, Any]:
        """Load an export as its users will, compare it, and return its row of the drift table."""
        reference, more = self.reference, {}
        try:
            if artefact.loader.startswith("llama.cpp"):
                logits, answers, more = self._measure_gguf(artefact)
            else:
                logits, answers = self._measure_torch(artefact)
        except LlamaError as error:  # a file that its loader refuses fails alone
            return {"kl": None, "kl_base": reference.kl, "verdict": "lost", "why": str(error), "ok": False}
        kl, agreement = kl_and_agreement(reference.trained, logits)
        share = kept(reference.before, reference.trained, logits)
        exact = artefact.loader != "llama.cpp" or artefact.name in ("f32", "f16", "bf16")
        result, why = verdict(kl, reference.kl, share, quantized=not exact)
        if more.get("same_tokens", 1.0) < 0.5:
            result, cause = "lost", "the GGUF's tokenizer is not the model's"
            why = f"llama.cpp splits text into other tokens with it: {cause}; give another --gguf-template"
        row = {"kl": kl, "kl_base": reference.kl, "kept": share, "agreement": agreement, **more}
        return {**row, "answers": answers, "verdict": result, "why": why, "ok": result != "lost"}

    def _with_lora(self, adapter: Path):
        bits = self.run.facts["bits"]
        return self.load_policy(self.base, "transformers", bits, adapter=adapter, dtype=self.dtype).eval()

    def _torch_answers(self, model) -> list[str]:
        return torch_answers(model, self.renderer.tokenizer, self.asked, self.max_tokens)

    def _measure_torch(self, artefact: Artefact) -> tuple[Any, list[str]]:
        """Return (logits [P, V], answers) of a merged directory or a PEFT adapter."""
        if artefact.loader == "peft":
            model = self._with_lora(artefact.path)
            logits = torch_logits(model, self.prompts)
            # where there is a template the same LoRA answers as GGUF, which is faster
            return logits, [] if self.base.template else self._torch_answers(model)
        model = load_plain(artefact.path, self.dtype)
        logits = torch_logits(model, self.prompts)
        return logits, self._torch_answers(model.to(machine.compute_dtype()))

    def _measure_gguf(self, artefact: Artefact) -> tuple[Any, list[str], dict[str, Any]]:
        """Return (logits [P, V], answers, other findings) of a GGUF, or of a LoRA on a GGUF of its base."""
        worker, bits, more = self.worker, self.run.facts["bits"], {}
        is_lora = artefact.loader != "llama.cpp"
        try:
            if is_lora and (bits == 4 or not self.base.imported):
                # people put it on the GGUF they have, whose weights are a little different
                self._load_gguf(self.base.template, artefact.path)
                logits = worker.next_logits("export", self.prompts)
                more["kl_on_template"] = kl_and_agreement(self.reference.trained, logits)[0]
            if is_lora:
                self._load_gguf(self.base.gguf(bits), artefact.path)
            else:
                self._load_gguf(artefact.path, None)
            theirs = worker.tokenize("export", self.texts, special=True)
            same = sum(a == self.renderer.ids(text) for a, text in zip(theirs, self.texts))
            more["same_tokens"] = same / len(self.texts)
            tokenizer = self.renderer.tokenizer
            answers = llama_answers(worker, "export", tokenizer, self.asked, self.max_tokens)
            return worker.next_logits("export", self.prompts), answers, more
        finally:
            worker.unload("export")  # the file is about to be renamed

    def _load_gguf(self, gguf: Path, lora: Path | None) -> None:
        self.worker.load("export", gguf, -1 if machine.fits_on_gpu(gguf.stat().st_size) else 0)
        self.worker.set_lora("export", lora)


def advice(book: dict, target: Path) -> list[str]:
    """Return what to know about the export and how to use it, as lines."""
    lines = []
    for name, entry in book["formats"].items():
        if entry["verdict"] == "noisy":
            nearer = "q8_0, or the base with the LoRA, is nearer"
            lines.append(f"{name}: {entry['why']}. Compare its answers before you publish it; {nearer}")
        if (same := entry.get("same_tokens", 1)) < 1:
            lines.append(f"{name}: llama.cpp splits {1 - same:.0%} of the proof's texts into other tokens")
        if (kl := entry.get("kl_on_template")) is not None:
            share = kl / max(entry["kl_base"], NOTHING)
            far = f"its KL to the trained model is {kl:.2g}, {share:.1%} of what training did"
            weights = "measured on the very weights it was trained on"
            lines.append(f"{name}: {weights}; on the base's own GGUF {far}")
    if gguf := best_gguf(book, target):
        usable = ollama.command_lines(gguf)
        if "modelfile" not in book["formats"]:
            usable.pop()  # Ollama's line needs the Modelfile
        lines += ["talk to it:", f"  python kardia_lite.py chat {gguf}", *(f"  {line}" for line in usable)]
    lora = book["formats"].get("lora gguf")
    if lora and lora["ok"]:
        lines.append(f"  llama-server -m BASE.gguf --lora {target / lora['file']} --jinja")
    return lines
