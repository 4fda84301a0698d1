"""Train a small LoRA that teaches a small model to judge, on pairs of a better and a worse reply.

The judge stays a language model that is read and never writes: after the reply stand the criterion's cues,
and the margin d = log p(any good word) - log p(any bad word) is its raw number; by a question, the words are
" yes" and " no". Training pushes the better reply's margin above the worse one's,

    loss = -log sigmoid(d_better - d_worse)     (Bradley and Terry 1952; the loss of arXiv 2203.02155)

so length, tone or the person's story cancel out within a pair. Context, reply and all its cues are one packed
row. Pairs are varied by rule (`vary`), never at exam time. A teacher's pairs (teacher.py) have soft targets.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kardia.core.console import UserError, progress, say
from kardia.core.files import check_new, digest, temporary_path
from kardia.core.machine import read_config
from kardia.core.options import DATA, CommonOptions, option
from kardia.data.rows import find_span
from kardia.data.rubric import Cue, Rubric, load_rubric
from kardia.judge.exam import ExamError, load_pairs, situation
from kardia.judge.exam_statistics import right_or_wrong, wilson
from kardia.judge.guards import rules
from kardia.judge.judge import REPLY_TOKENS, JudgedReply
from kardia.models.base import EMBEDDED, load_tokenizer, resolve_base
from kardia.models.gguf import write_lora_gguf
from kardia.models.packed_rows import enable_packed_rows, pack
from kardia.models.policy import lora_of

SAVE_STEPS = 10  # about a minute of work on two cores
ADAMW_STATE = ("exp_avg", "exp_avg_sq", "step")  # torch's names


@dataclass
class JudgeTrainOptions(CommonOptions):
    """Hold the options of `judge train`."""

    judge: str = option(EMBEDDED, "Base of the judge: a .gguf file or a local directory.")
    pairs: Path = option(DATA / "judge_train.jsonl", "Pairs to learn from (not with --teacher).")
    exam_pairs: Path = option(DATA / "judge_exam.jsonl", "Pairs to test on; they are not among the first.")
    dialogues: Path = option(
        DATA / "dialogues.jsonl", "Written answers that stand against those of --against."
    )
    epochs: int = option(2, "Passes over the pairs.", min=1)
    learning_rate: float = option(3e-4, "Peak learning rate, cosine to 0.", min=0.0)
    batch_size: int = option(8, "Pairs per optimizer step.", min=1)
    lora_rank: int = option(8, "LoRA rank, on all linear layers.", min=1)
    last_layers: int = option(0, "Only so many of the last blocks get a LoRA: faster (0: all).", min=0)


def vary(pairs: list[dict], rng: random.Random) -> list[dict]:
    """Return the pairs and what derives from them: 1.9 times as many, a quarter without situation."""
    facts = {"relevance": situation, "persona_consistency": lambda row: row.get("person")}
    varied = list(pairs)
    for pair in pairs:
        other, fact = rng.choice(pairs), facts.get(pair["criterion"])
        # Another dialogue's reply does not fit this person or situation, however good it is.
        if fact and fact(other) != fact(pair):
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


def pairs_against(answerer: Any, source: str, rows: list, rubric: Rubric, seed: int) -> list[dict]:
    """Return pairs of a written reply and the one that a policy draws, two criteria per dialogue.

    answerer: the script's Answerer of the policy. rows: training dialogues, whose first turn is asked.
    """
    rng = random.Random(seed)
    prompts = [row.first_prompt() for row in rows]
    with progress(f"answers of {Path(source).name}", len(rows)) as on_progress:
        answers = answerer.answer(prompts, REPLY_TOKENS, 1.0, seed, on_progress)
    names = [c.name for c in rubric.criteria if c.taught]
    # Two criteria per dialogue: every one is taught, at a third of the time of all five.
    pairs = []
    for row, text in zip(rows, answers):
        written, drawn = (find_span(each, rubric.form.reply) for each in (row.messages[1][1], text))
        if not drawn or not drawn.strip() or drawn == written:
            continue  # an answer without a reply is the format's business
        facts = {"person": row.person, "situation": row.situation, "better": written, "worse": drawn}
        facts["messages"] = [{"role": role, "content": content} for role, content in row.messages[:1]]
        pairs += [{**facts, "criterion": name} for name in rng.sample(names, min(2, len(names)))]
    if not pairs:
        raise UserError(
            f"{source}: none of its {len(answers)} answers has a {rubric.form.reply} span to learn from"
        )
    say(f"{len(pairs)} pairs of a written reply and one of {Path(source).name}")
    return pairs


class Margins:
    """Margins of replies under a causal LM in torch: the same numbers that `Judge` reads in llama.cpp."""

    def __init__(
        self, model: Any, encode: Callable, start: list[int], cues: dict[str, tuple[Cue, ...]]
    ) -> None:
        self.causal_lm = model.base_model.model  # inside the PeftModel
        self.encode, self.start = encode, start  # encode(text) -> ids without special tokens
        self.cues = cues  # criterion -> the cues of the method that is taught

    def __call__(self, pair: dict):
        """Return [margin of better, margin of worse], float32 with gradient."""
        import torch

        before = self.start + self.encode(JudgedReply.from_pair(pair, "better").context)
        return torch.stack(
            [self._margin(before, pair[key], pair["criterion"]) for key in ("better", "worse")]
        )

    def _margin(self, before: list[int], reply: str, criterion: str):
        """Return log p(any good word) - log p(any bad word) behind a reply, averaged over the cues."""
        import torch

        device = self.causal_lm.get_output_embeddings().weight.device
        prefix = before + self.encode(f" {reply.strip()}")[:REPLY_TOKENS]
        starts: dict[tuple[int, ...], int] = {}  # segment behind the prefix -> its place in the row
        places, targets, lengths, end = [], [], [], len(prefix)
        words = [(cue.text, word) for cue in self.cues[criterion] for word in (*cue.good, *cue.bad)]
        for text, word in words:
            cue_ids, word_ids = self.encode(text), self.encode(word)
            segment = (*cue_ids, *word_ids[:-1])  # words of one token share their cue's segment
            if segment not in starts:
                starts[segment], end = end, end + len(segment)
            first = starts[segment] + len(cue_ids) - 1
            places += range(first, first + len(word_ids))
            targets += word_ids
            lengths.append(len(word_ids))
        segments = [torch.tensor(segment, device=device) for segment in starts]
        row = pack(torch.tensor(prefix, device=device), segments)
        asked = [torch.tensor(numbers, device=device) for numbers in (places, targets)]
        logps = iter([part.sum() for part in row.logps(self.causal_lm, *asked)[0].split(lengths)])
        margins = []
        for cue in self.cues[criterion]:
            good, bad = (torch.stack([next(logps) for _ in group]) for group in (cue.good, cue.bad))
            margins.append(good.logsumexp(0) - bad.logsumexp(0))
        return torch.stack(margins).mean()


class Progress:
    """Keep what training needs to go on after an interruption: the LoRA and AdamW's state, in one file."""

    def __init__(self, path: Path, key: str, resume: bool) -> None:
        self.path, self.key, self.resume = path, key, resume

    def load(self, parameters: list, optimizer: Any) -> int:
        """Put back what was saved; return the step it belongs to, 0 if there is nothing of this training."""
        import torch
        from safetensors import SafetensorError, safe_open

        if not (self.resume and self.path.is_file()):
            return 0
        try:
            with safe_open(self.path, "pt") as file:
                facts = file.metadata() or {}
                saved = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path}: damaged; begin again without --resume") from error
        if facts.get("key") != self.key:
            why = "of other options, pairs or another base"
            raise UserError(f"{self.path}: {why}; begin again without --resume")
        with torch.no_grad():
            for i, parameter in enumerate(parameters):
                parameter.copy_(saved[f"{i}.value"])
                state = {name: saved[f"{i}.{name}"] for name in ADAMW_STATE}
                # AdamW keeps its step on the CPU and the moments where the parameter is.
                moved = {name: t if name == "step" else t.to(parameter.device) for name, t in state.items()}
                optimizer.state[parameter] = moved
        say(f"going on from step {facts['step']}")
        return int(facts["step"])

    def save(self, step: int, parameters: list, optimizer: Any) -> None:
        """Write the state after a step; an interrupted write leaves the one before."""
        from safetensors.torch import save_file

        tensors = {}
        for i, parameter in enumerate(parameters):
            own = {"value": parameter.detach(), **optimizer.state[parameter]}
            tensors |= {f"{i}.{name}": own[name].contiguous() for name in ("value", *ADAMW_STATE)}
        # A kill while writing must not cost what was saved before.
        temporary = temporary_path(self.path)
        save_file(tensors, temporary, metadata={"key": self.key, "step": str(step)})
        temporary.replace(self.path)


def train(
    model: Any,
    margins: Margins,
    pairs: list[dict],
    options: Any,
    on_progress: Callable,
    kept: Progress | None = None,
) -> None:
    """Train the LoRA by AdamW, cosine to zero; `on_progress(step, steps, loss)` after every step.

    kept: where the state is saved every SAVE_STEPS steps, and read back.
    """
    import torch

    rng = random.Random(options.seed)
    # A teacher's readings are of the replies as they are.
    soft = [pair for pair in pairs if "target" in pair]
    pairs = vary([pair for pair in pairs if "target" not in pair], rng) + soft
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.01)
    size, per_epoch = options.batch_size, math.ceil(len(pairs) / options.batch_size)
    steps = options.epochs * per_epoch
    device, half = parameters[0].device.type, margins.causal_lm.dtype == torch.bfloat16
    done = kept.load(parameters, optimizer) if kept else 0
    for step in range(steps):
        start, total = step % per_epoch * size, 0.0
        if start == 0:
            rng.shuffle(pairs)
        if step < done:
            continue  # only the order of the pairs is made again
        batch = pairs[start : start + size]
        for pair in batch:  # one row per pair; gradients add up to those of the batch
            with torch.autocast(device, torch.bfloat16, enabled=half):
                better, worse = margins(pair)
            loss = _loss(better - worse, pair.get("target", 1.0)) / len(batch)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        warm_up, cosine = min(1.0, (step + 1) / 10), 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * warm_up * cosine
        optimizer.step()
        optimizer.zero_grad()
        if kept and (step + 1) % SAVE_STEPS == 0:
            kept.save(step + 1, parameters, optimizer)
        on_progress(step + 1, steps, total)


def _loss(gap, target: float):
    """Return the cross-entropy of `target`, the probability that the better reply is better."""
    from torch.nn.functional import logsigmoid

    return -logsigmoid(gap) if target == 1 else -(target * logsigmoid(gap) + (1 - target) * logsigmoid(-gap))


def accuracy(margins: Margins, pairs: list[dict]) -> tuple[float, float, float]:
    """Return (the share of pairs in the right order, its Wilson interval's low and high end)."""
    import torch

    right = 0.0
    with progress("held-out pairs", len(pairs)) as on_progress, torch.no_grad():
        for done, pair in enumerate(pairs, 1):
            right += right_or_wrong(*margins(pair).tolist())
            on_progress(done)
    return (right / len(pairs), *wilson(right, len(pairs)))


def _check_apart(name: Any, pairs: list[dict], tested: Any, held_out: list[dict]) -> None:
    """Raise UserError if pairs to learn from and pairs to test on share a situation."""
    if shared := {situation(p) for p in pairs} & {situation(p) for p in held_out}:
        rule = "a judge must not be examined on what it was trained on"
        raise UserError(f"{name} and {tested} share {len(shared)} situations; {rule}")


def _pairs(
    options: Any, criteria: list[str], draw: Callable | None, teach: Callable | None
) -> tuple[list[dict], list[dict]]:
    """Return (pairs to learn from, pairs to test on); what takes minutes comes once the files are checked."""
    try:
        exam = load_pairs(options.exam_pairs, criteria)
    except ExamError:
        if not teach:
            raise
        exam = []  # a teacher is for those who have no pairs
    pairs = [] if teach else load_pairs(options.pairs, criteria)
    _check_apart(options.pairs, pairs, options.exam_pairs, exam)
    taught, held_out = teach() if teach else ([], exam)
    _check_apart("the replies", taught, options.exam_pairs, exam)
    drawn = draw() if draw else []
    for name, tested in ((options.exam_pairs, exam), ("the replies held out", held_out)):
        _check_apart(options.dialogues, drawn, name, tested)
    return pairs + taught + drawn, held_out


def _check_start(options: Any, out: Path, kept: Path, resume: bool, cues: dict) -> None:
    """Raise UserError if there is nothing to learn, or if something would be overwritten."""
    if not cues:
        rule = "a LoRA learns one of ask and contrast"
        raise UserError(f"{options.rubric}: no criterion is read by cues or a question; {rule}")
    check_new(out)
    if kept.exists() and not resume:
        raise UserError(f"{kept}: of an interrupted training; go on with --resume, or remove it")


def train_judge(
    options: Any,
    out: Path,
    load_policy: Callable,
    resume: bool = False,
    draw: Callable | None = None,
    teach: Callable | None = None,
) -> dict[str, Any]:
    """Train a judge's LoRA on pairs of replies, write it as GGUF; return accuracy before and after.

    load_policy(base, bits, rank=, alpha=, last_layers=, seed=) returns a PeftModel. draw() returns pairs of
    written replies and a policy's own, beside those of the file; teach() returns a teacher's pairs to learn
    from, instead of the file's, and to test on.
    """
    rubric = load_rubric(options.rubric)
    cues = {c.name: c.cues_of(c.taught) for c in rubric.criteria if c.taught}
    base, kept = resolve_base(options.judge), out.with_name(f"{out.name}.partial")
    _check_start(options, out, kept, resume, cues)  # now, before the minutes of reading
    pairs, held_out = _pairs(options, list(cues), draw, teach)
    rank, tokenizer = options.lora_rank, load_tokenizer(base)
    sizes = {"rank": rank, "alpha": 2 * rank, "last_layers": options.last_layers, "seed": options.seed}
    model = load_policy(base, 16, **sizes)
    if why := enable_packed_rows(model.base_model.model):
        cannot = f"two replies cannot share a context ({why}); judge train needs another model"
        raise UserError(f"{base.name} ({model.config.model_type}): {cannot}")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    # llama.cpp adds the BOS token where the tokenizer would: training must see the same first token.
    start = [tokenizer.bos_token_id] if getattr(tokenizer, "add_bos_token", False) else []
    margins = Margins(model, encode, start, cues)
    before, began = accuracy(margins, held_out), time.monotonic()
    right = f"{before[0]:.0%} right on {len(held_out)} held-out pairs"
    say(f"training on {len(pairs)} pairs and what is derived from them; before: {right}")
    first: list[int] = []  # the first step of this process, after a resume

    def on_progress(step: int, steps: int, loss: float) -> None:
        first.append(step)
        if step % 10 == 0 or step == steps:
            each = (time.monotonic() - began) / (step - first[0] + 1)
            say(f"  step {step:>3}/{steps}  loss {loss:.3f}  {each * (steps - step) / 60:.1f} min left")

    numbers = (options.epochs, options.learning_rate, options.batch_size, sizes)
    key = digest(f"{base.hash}{rubric.hash}{json.dumps(pairs)}{numbers}".encode())
    train(model, margins, pairs, options, on_progress, Progress(kept, key, resume))
    after = accuracy(margins, held_out)
    write_lora_gguf(*lora_of(model), read_config(base.directory), out, half=True)
    kept.unlink(missing_ok=True)
    return {"before": before, "after": after, "pairs": len(held_out), "seconds": time.monotonic() - began}
