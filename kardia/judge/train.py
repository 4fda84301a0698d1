"""Train a small LoRA that teaches a small model to judge, on pairs of a better and a worse reply.

The judge stays a language model that is read and never writes: after the reply stands the criterion's
question, and the margin d = log p(" yes") - log p(" no") is its raw number. Training pushes the better
reply's margin above the worse one's,

    loss = -log sigmoid(d_better - d_worse)     (Bradley and Terry 1952; the loss of arXiv 2203.02155)

so length, tone or the person's story cancel out within a pair. Context and both replies are one packed row.
Pairs are varied by rule (`vary`), never at exam time.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kardia.core.console import UserError, progress, say
from kardia.core.files import check_new
from kardia.core.machine import read_config
from kardia.core.options import DATA, CommonOptions, option
from kardia.data.rubric import Cue, load_rubric
from kardia.judge.exam import load_pairs, situation
from kardia.judge.exam_statistics import right_or_wrong, wilson
from kardia.judge.guards import rules
from kardia.judge.judge import REPLY_TOKENS, JudgedReply
from kardia.models.base import EMBEDDED, load_tokenizer, resolve_base
from kardia.models.gguf import write_lora_gguf
from kardia.models.packed_rows import enable_packed_rows, pack
from kardia.models.policy import lora_of


@dataclass
class JudgeTrainOptions(CommonOptions):
    """Hold the options of `judge train`."""

    judge: str = option(EMBEDDED, "Base of the judge: a .gguf file or a local directory.")
    pairs: Path = option(DATA / "judge_train.jsonl", "Pairs as in data/judge_train.jsonl to learn from.")
    exam_pairs: Path = option(DATA / "judge_exam.jsonl", "Pairs to test on; they are not among the first.")
    epochs: int = option(2, "Passes over the pairs.", min=1)
    learning_rate: float = option(3e-4, "Peak learning rate, cosine to 0.", min=0.0)
    batch_size: int = option(8, "Pairs per optimizer step.", min=1)
    lora_rank: int = option(8, "LoRA rank, on all linear layers.", min=1)


def vary(pairs: list[dict], rng: random.Random) -> list[dict]:
    """Return the pairs and what derives from them: 1.9 times as many, a quarter without situation."""
    varied = list(pairs)
    for pair in pairs:
        other = rng.choice(pairs)
        differs = {"relevance": "situation", "persona_consistency": "person"}.get(pair["criterion"])
        # Another dialogue's reply does not fit this person or situation, however good it is.
        if differs and other.get(differs) != pair.get(differs):
            varied.append({**pair, "worse": other["better"]})
        if pair["criterion"] == "fluency":
            words = pair["better"].split()
            at = rng.randrange(max(1, len(words) - 4))
            shuffled = words[at : at + 5]
            rng.shuffle(shuffled)
            worse = " ".join(words[:at] + shuffled + words[at + 5 :])
            if worse != pair["better"]:
                varied.append({**pair, "worse": worse})
        for key in ("worse", "better"):  # a sentence that asks for a good grade never makes a reply better
            if rng.random() < 0.15:
                varied.append({**pair, "worse": f"{pair[key]} {rng.choice(rules().begging)}"})
    for i, pair in enumerate(varied):  # other people's data has no profile or situation
        if rng.random() < 0.25:
            varied[i] = {**pair, "situation": ""}
        if pair["criterion"] != "persona_consistency" and rng.random() < 0.25:
            varied[i] = {**varied[i], "person": ""}
    return varied


class Margins:
    """Margins of replies under a causal LM in torch: the same tokens as `Judge` sends to llama.cpp."""

    def __init__(self, model: Any, encode: Callable, start: list[int], questions: dict[str, Cue]) -> None:
        self.causal_lm = model.base_model.model  # inside the PeftModel
        self.encode, self.start = encode, start  # encode(text) -> ids without special tokens
        self.questions = questions  # criterion -> its cue of method ask

    def __call__(self, pair: dict):
        """Return [margin of better, margin of worse], float32 with gradient."""
        import torch

        cue, lm = self.questions[pair["criterion"]], self.causal_lm
        head = lm.get_output_embeddings().weight  # [V, H]
        context = JudgedReply.from_pair(pair, "better").context
        prefix = torch.tensor(self.start + self.encode(context), device=head.device)
        replies = []
        for key in ("better", "worse"):
            ids = self.encode(f" {pair[key].strip()}")[:REPLY_TOKENS] + self.encode(cue.text)
            replies.append(torch.tensor(ids, device=head.device))
        hidden = pack(prefix, replies).hidden(lm)  # [prefix + better + worse, H]
        better_end = len(prefix) + len(replies[0]) - 1
        ends = [better_end, better_end + len(replies[1])]
        yes, no = self.encode(cue.good[0])[0], self.encode(cue.bad[0])[0]
        # The normalizer of the softmax cancels: two rows of the output matrix are enough.
        return hidden[ends].float() @ (head[yes].float() - head[no].float())  # [2]


def train(model: Any, margins: Margins, pairs: list[dict], options: Any, on_progress: Callable) -> None:
    """Train the LoRA by AdamW, cosine to zero; `on_progress(step, steps, loss)` after every step."""
    import torch

    rng = random.Random(options.seed)
    pairs = vary(pairs, rng)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.01)
    size, per_epoch = options.batch_size, math.ceil(len(pairs) / options.batch_size)
    steps = options.epochs * per_epoch
    device, half = parameters[0].device.type, margins.causal_lm.dtype == torch.bfloat16
    for step in range(steps):
        start, total = step % per_epoch * size, 0.0
        if start == 0:
            rng.shuffle(pairs)
        batch = pairs[start : start + size]
        for pair in batch:  # one row per pair; gradients add up to those of the batch
            with torch.autocast(device, torch.bfloat16, enabled=half):
                better, worse = margins(pair)
            loss = -torch.nn.functional.logsigmoid(better - worse) / len(batch)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        warm_up, cosine = min(1.0, (step + 1) / 10), 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * warm_up * cosine
        optimizer.step()
        optimizer.zero_grad()
        on_progress(step + 1, steps, total)


def accuracy(margins: Margins, pairs: list[dict]) -> tuple[float, float, float]:
    """Return (the share of pairs in the right order, its Wilson interval's low and high end)."""
    import torch

    right = 0.0
    with progress("held-out pairs", len(pairs)) as on_progress, torch.no_grad():
        for done, pair in enumerate(pairs, 1):
            right += right_or_wrong(*margins(pair).tolist())
            on_progress(done)
    return (right / len(pairs), *wilson(right, len(pairs)))


def train_judge(options: Any, out: Path, load_policy: Callable) -> dict[str, Any]:
    """Train a judge's LoRA on pairs of replies, write it as GGUF; return accuracy before and after.

    load_policy(base, bits, rank=, alpha=, seed=) returns a PeftModel.
    """
    rubric = load_rubric(options.rubric)
    questions = {c.name: c.cues_of("ask")[0] for c in rubric.criteria if "ask" in c.methods}
    pairs = load_pairs(options.pairs, list(questions))
    held_out = load_pairs(options.exam_pairs, list(questions))
    if shared := {situation(p) for p in pairs} & {situation(p) for p in held_out}:
        rule = "a judge must not be examined on what it was trained on"
        raise UserError(f"{options.pairs} and {options.exam_pairs} share {len(shared)} situations; {rule}")
    check_new(out)
    base = resolve_base(options.judge)
    rank, tokenizer = options.lora_rank, load_tokenizer(base)
    model = load_policy(base, 16, rank=rank, alpha=2 * rank, seed=options.seed)
    if why := enable_packed_rows(model.base_model.model):
        cannot = f"two replies cannot share a context ({why}); judge train needs another model"
        raise UserError(f"{base.name} ({model.config.model_type}): {cannot}")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    # llama.cpp adds the BOS token where the tokenizer would: training must see the same first token.
    start = [tokenizer.bos_token_id] if getattr(tokenizer, "add_bos_token", False) else []
    margins = Margins(model, encode, start, questions)
    before, began = accuracy(margins, held_out), time.monotonic()
    right = f"{before[0]:.0%} right ({before[1]:.0%} to {before[2]:.0%}) on {len(held_out)} held-out pairs"
    say(f"training on {len(pairs)} pairs and what is derived from them; before: {right}")

    def on_progress(step: int, steps: int, loss: float) -> None:
        if step % 10 == 0 or step == steps:
            left = (time.monotonic() - began) / step * (steps - step) / 60
            say(f"  step {step:>3}/{steps}  loss {loss:.3f}  {left:.1f} min left")

    train(model, margins, pairs, options, on_progress)
    after = accuracy(margins, held_out)
    write_lora_gguf(*lora_of(model), read_config(base.directory), out, half=True)
    return {"before": before, "after": after, "pairs": len(held_out), "seconds": time.monotonic() - began}
