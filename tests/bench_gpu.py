"""On a GPU: memory and speed of SFT and of a GRPO step, ours against plain TRL and Unsloth, with real shapes, inside smaller cards.

    python tests/bench_gpu.py --quick                    0.5B inside an 8 GB card, all contestants: made to fit 4 minutes
    python tests/bench_gpu.py --targets --drop           what the targets ask: 7B SFT in 8 GB, GRPO in 12; 3B GRPO in 8, and in 24 for speed
    python tests/bench_gpu.py --minutes 180 --drop       every shape and card, 128 cells; one shape's files at a time on the disk
    python tests/bench_gpu.py --tiny                     a rehearsal with a two-layer model, on a CPU too: nothing of it is a measurement

Models have the sizes of Qwen2.5 (bench_plan.py) and random weights, so nothing is downloaded; tokenizer and judge are the embedded
model's. Measured, each in a process of its own, the contestants taking turns:

    sft     two dialogues of 2,048 tokens a step, 4 bits: tokens per second, largest use of memory
    grpo    8 answers of 256 tokens to a prompt of 512, judged on five criteria: seconds of rollouts, judging, update

    ours            --engine transformers                          ours-unsloth    --engine unsloth
    trl             TRL's own trainers as documented: QLoRA by     unsloth         FastLanguageModel and the trainers that Unsloth
                    BitsAndBytesConfig, `generate`, a JSON judge                   makes of TRL's, as in its notebooks, without vLLM

Same work for all: same rows, no token ends an answer, and the judge reads real replies of the exam, for random weights write none
(rewards are drawn: they only keep the update whole; nor does the judge sit its exam, which says nothing about time). The clock
is the same: TRL's `_generate`, `_calculate_rewards`, the rest of the step; the first step is not counted. Learning rate, LoRA
(rank 16, all layers) and optimizer are the same, too. Plain TRL gets 8 answers per forward pass, and if memory runs out 2, then
1, in new processes.

A card of N GB is simulated: N GiB less the 0.85 GB that the driver and a desktop keep (kardia/budget.py). torch's allocator is
held to what others (CUDA itself, llama.cpp) leave of that, and ours is told that no more is free. llama.cpp cannot be held to
anything: what exceeds the card by it is reported as too much. Use is what the GPU has less free than before the process began.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_plan import SHAPES, shape, words  # noqa: E402

from kardia.core import machine  # noqa: E402
from kardia.models import memory_plan

GB = 1e9
SHORT = {
    name.removeprefix("Qwen2.5-"): name for name in SHAPES if name.startswith("Qwen")
}  # 0.5B -> Qwen2.5-0.5B
TINY = shape(64, 2, 4, 2, 128, 49_152, True)
WHO = {
    "ours": "ours, transformers",
    "ours-unsloth": "ours, Unsloth's model",
    "trl": "plain TRL",
    "unsloth": "Unsloth's own",
}
OURS = "ours", "ours-unsloth"
PARTS = "rollout", "judge", "update", "step"
SIZES = {"prompt": 512, "tokens": 256, "group": 8, "length": 2048}
SMALL = {"prompt": 320, "tokens": 12, "group": 2, "length": 768}  # of a rehearsal
MICRO = {8: 2, 2: 1, 4: 1}  # plain TRL's answers per pass, after it ran out of memory
TARGETS = (
    ("grpo", "3B", 8),
    ("grpo", "3B", 24),
    ("sft", "7B", 8),
    ("grpo", "7B", 12),
)  # 24: where plain TRL has room, to be compared with
BATCH = 2  # dialogues per step of SFT
MARK = "\u2020"


# ---------------------------------------------------------------------------------- models, data


def config_of(sizes: dict) -> dict:
    more = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    return {
        **sizes,
        **more,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def tensors_of(s: memory_plan.Shape):
    """(name, shape) of every tensor of a Qwen2, layer by layer."""
    yield "model.embed_tokens.weight", (s.vocabulary, s.hidden)
    for i in range(s.layers):
        for name, (n_in, n_out) in s.projections.items():
            module = (
                f"model.layers.{i}.{'mlp' if name in ('gate', 'up', 'down') else 'self_attn'}.{name}_proj"
            )
            yield f"{module}.weight", (n_out, n_in)
            if name in "qkv":
                yield f"{module}.bias", (n_out,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{i}.{name}.weight", (s.hidden,)
    yield "model.norm.weight", (s.hidden,)
    if not s.tied:
        yield "lm_head.weight", (s.vocabulary, s.hidden)


def write_model(directory: Path, sizes: dict, like: Path, shard: float = 2e9) -> Path:
    """A model of random weights with the tokenizer of the directory `like`. Every matrix is cut from one pool of random numbers:
    drawing 7.6 billion would take minutes."""
    import torch
    from safetensors.torch import save_file

    s = memory_plan.shape_of(sizes)
    half = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    pool = (torch.randn((1 << 24) + 4099, generator=torch.Generator().manual_seed(0)) * 0.02).to(
        torch.bfloat16
    )
    where, held, count, parts = {}, {}, 0, 0

    def flush() -> None:
        nonlocal parts, held
        parts += 1
        file = f"model-{parts:05}.safetensors"
        save_file(held, half / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(held, file))
        held = {}

    for number, (name, size) in enumerate(tensors_of(s)):
        n = size[0] * (size[1] if len(size) > 1 else 1)
        if "norm" in name or name.endswith("bias"):
            held[name] = torch.full(size, float("norm" in name), dtype=torch.bfloat16)
        else:
            own = pool[number % 4099 :][: 1 << 24]
            held[name] = own.repeat(-(-n // len(own)))[:n].reshape(size)
        count += 2 * n
        if sum(2 * t.numel() for t in held.values()) > shard:
            flush()
    if held:
        flush()
    (half / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": count}, "weight_map": where})
    )
    (half / "config.json").write_text(json.dumps(config_of(sizes), indent=1))
    for file in like.iterdir():
        if file.name.startswith("tokenizer") or file.suffix == ".jinja":
            shutil.copy(file, half / file.name)
    half.rename(directory)
    return directory


def write_template(directory: Path, path: Path, like: Path) -> Path:
    """A GGUF of the same model for --gguf-template: metadata, the tokenizer of the GGUF `like` (filled up with unused tokens, for
    llama.cpp wants as many as the embedding has rows), and tensors of zeros that take no room on the disk."""
    import gguf
    import numpy as np
    from conftest import GGUF_KEYS

    from kardia.models import gguf as gguf_files
    from kardia.models.weights import Weights, read_gguf

    weights = Weights(directory)
    config = weights.config
    architecture = gguf_files.architecture_of(config, "bench")[0]
    writer = gguf.GGUFWriter(path, architecture)
    for key, (name, kind) in GGUF_KEYS.items():
        if config.get(key) is not None:
            getattr(writer, f"add_{kind}")(f"{architecture}.{name}", config[key])
    writer.add_float32(f"{architecture}.rope.freq_base", config["rope_theta"])
    for key, field in read_gguf(like).fields.items():
        if key.startswith("tokenizer."):
            value, missing = field.contents(), config["vocab_size"] - len(field.data)
            if key == "tokenizer.ggml.tokens":
                value = value + [f"[unused {i}]" for i in range(missing)]
            elif key == "tokenizer.ggml.token_type":
                value = value + [5] * missing
            writer.add_key_value(
                key, value, field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    names, end = gguf_files._names(config), 0
    for name in weights:
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        size = weights.shape(name)
        kind = gguf.GGMLQuantizationType.Q4_0 if len(size) > 1 else gguf.GGMLQuantizationType.F32
        n_bytes = int(np.prod(gguf.quant_shape_to_byte_shape(size, kind)) if len(size) > 1 else 4 * size[0])
        writer.add_tensor_info(names(name), size, np.dtype(np.float32), n_bytes, raw_dtype=kind)
        end += gguf.GGUFWriter.ggml_pad(n_bytes, writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    begin = gguf.GGUFWriter.ggml_pad(writer.fout[0].tell(), writer.data_alignment)
    writer.close()
    os.truncate(path, begin + end)
    return path


def fill(dialogue, tokens: int, count):
    """The dialogue with words added to its situation until `count` of it is exactly `tokens`."""
    import dataclasses

    text = dialogue.situation
    for _ in range(20):
        missing = tokens - count(dataclasses.replace(dialogue, situation=text))
        if not missing:
            return dataclasses.replace(dialogue, situation=text)
        text = text + " and" * missing if missing > 0 else text[: 4 * missing]
    raise RuntimeError(f"no dialogue of exactly {tokens} tokens could be made of {dialogue.where}")


def write_data(k, work: Path, renderer, rubric, sizes: dict) -> None:
    """prompts-N.jsonl, sft-N.jsonl: rows of exactly N tokens, counted again as they are read back."""
    import dataclasses

    from kardia.core.files import write_text

    def line(d) -> str:
        return json.dumps(
            {
                "person": d.person,
                "mbti": d.mbti,
                "anon_username": d.anon_username,
                rubric.form.label: d.label,
                "situation": d.situation,
                "messages": [{"role": role, "content": text} for role, text in d.messages],
            }
        )

    prompts = k.load_rows([k.DATA / "prompts.jsonl"], rubric, "prompt")[:16]
    rows = [fill(d, sizes["prompt"], lambda d: len(renderer.prompt(d))) for d in prompts]
    write_text(work / f"prompts-{sizes['prompt']}.jsonl", "\n".join(map(line, rows)) + "\n")

    def length(d) -> int:
        return sum(len(ids) for ids, _ in renderer.examples(d, 10**9))

    rows, talks = [], itertools.cycle(k.load_rows([k.DATA / "dialogues.jsonl"], rubric, "dialogue"))
    while len(rows) < 8:
        whole = next(talks)
        while (
            length(longer := dataclasses.replace(whole, messages=whole.messages + next(talks).messages))
            <= sizes["length"]
        ):
            whole = longer
        while length(whole) > sizes["length"]:
            whole = dataclasses.replace(whole, messages=whole.messages[:-2])
        rows.append(fill(whole, sizes["length"], length))
    write_text(work / f"sft-{sizes['length']}.jsonl", "\n".join(map(line, rows)) + "\n")
    for name, kind, count, tokens in (
        ("prompts", "prompt", lambda d: len(renderer.prompt(d)), sizes["prompt"]),
        ("sft", "dialogue", length, sizes["length"]),
    ):
        found = [count(d) for d in k.load_rows([work / f"{name}-{tokens}.jsonl"], rubric, kind)]
        assert set(found) == {tokens}, f"{name}: rows of {sorted(set(found))} tokens, not {tokens}"


def prepare(cell: dict) -> dict:
    """Everything the cells of one shape share, made once: model, GGUF twin of its 4-bit weights, a LoRA to go on from, data."""
    import torch
    from safetensors.torch import save_file

    import kardia_lite as k
    from kardia.core.files import file_hash
    from kardia.core.run_directory import Run

    began, work, sizes = time.monotonic(), Path(cell["work"]), cell["sizes"]
    here = work / cell["shape"]
    embedded, rubric = k.resolve_base(k.EMBEDDED), k.load_rubric(k.HERE / "rubrics.yaml")
    renderer = k.Renderer(k.load_tokenizer(embedded), rubric.form)
    write_data(k, work, renderer, rubric, sizes)
    if not (here / "model").is_dir():
        here.mkdir(parents=True, exist_ok=True)
        write_model(here / "model", cell["config"], embedded.directory)
    if not (here / "template.gguf").is_file():
        write_template(here / "model", here / "half.gguf", embedded.template).rename(here / "template.gguf")
    base = k.resolve_base(str(here / "model"), here / "template.gguf")
    gguf = base.gguf(4)
    k.resolve_judge(k.EMBEDDED)
    if not (here / "source" / "adapter").is_dir():
        shutil.rmtree(here / "source", ignore_errors=True)
        options = k.SFTOptions(model=str(here / "model"), gguf_template=here / "template.gguf", bits=4)
        with Run.create(
            here / "source",
            "sft",
            options,
            False,
            parent=None,
            bits=4,
            engine="transformers",
            **k.describe(base),
            form=rubric.form.facts(),
            hashes={},
        ) as run:
            run.update(status="done")
        s, tensors = memory_plan.shape_of(cell["config"]), {}
        for name, size in tensors_of(s):
            if "_proj.weight" in name:
                module = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = (
                    torch.randn(16, size[1]) / size[1] ** 0.5,
                    torch.zeros(size[0], 16),
                )
        (here / "source" / "adapter").mkdir()
        save_file(tensors, here / "source" / "adapter" / "adapter_model.safetensors")
        lora = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": [f"{name}_proj" for name in s.projections],
            "base_model_name_or_path": str(here / "model"),
        }
        (here / "source" / "adapter" / "adapter_config.json").write_text(json.dumps(lora))
    return {
        "hashes": {
            str(here / "model"): base.hash,
            str(here / "template.gguf"): file_hash(here / "template.gguf"),
        },
        "ggufs": str(gguf.with_name(base.hash)),
        "seconds": round(time.monotonic() - began, 1),
    }


# ---------------------------------------------------------------------------------- inside a cell's process


class Card:
    """A card of `gib` GB inside this GPU (0: all of it), and the largest use seen: `with Card(..) as card`. Without a GPU: this
    process and its children, and no card."""

    def __init__(self, gib: float, free_at_start: float | None) -> None:
        self.limit = memory_plan.usable(gib) * GB if gib else None
        self.free_at_start, self.assumed = free_at_start, False
        self.peak = self.beside = 0.0
        self.gpu = False
        self._stop = threading.Event()

    def __enter__(self) -> Card:
        import torch

        self.torch, self.gpu = torch, torch.cuda.is_available()
        if self.gpu:
            torch.cuda.synchronize()  # CUDA's context
            self.real = torch.cuda.mem_get_info
            if (
                self.free_at_start is None or not 0 <= self.used() < 2 * GB
            ):  # no nvidia-smi, or it sees another GPU: what the context takes cannot be told from inside
                self.assumed = True
                self.free_at_start = (
                    self.real()[0] + torch.cuda.memory_reserved() + machine.CONTEXT["torch"] * GB
                )
            if self.limit:
                torch.cuda.mem_get_info = lambda device=None: (
                    int(max(0, min(self.limit - self.used(), self.real()[0]))),
                    int(self.limit),
                )
            self.tighten()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.look()
        self._stop.set()
        self._thread.join()

    def used(self) -> float:
        """Bytes."""
        if self.gpu:
            return self.free_at_start - self.real()[0]
        from kardia.core.machine import processes_gb

        return processes_gb() * GB

    def look(self) -> None:
        self.peak = max(self.peak, self.used())

    def _watch(self) -> None:
        while not self._stop.wait(0.05 if self.gpu else 2.0):
            self.look()

    def tighten(self) -> None:
        """torch may have what the others leave."""
        if not self.gpu:
            return
        self.look()
        others = self.used() - self.torch.cuda.memory_reserved()
        self.beside = max(self.beside, others)
        if self.limit:
            self.torch.cuda.set_per_process_memory_fraction(
                min(1.0, max(0.001, (self.limit - others) / self.real()[1]))
            )

    def figures(self) -> dict:
        seen = {
            "peak_gb": self.peak / GB,
            "limit_gb": self.limit / GB if self.limit else None,
            "context_assumed": self.assumed,
        }
        if self.gpu:
            seen |= {
                "torch_reserved_gb": self.torch.cuda.max_memory_reserved() / GB,
                "torch_allocated_gb": self.torch.cuda.max_memory_allocated() / GB,
                "beside_torch_gb": self.beside / GB,
            }
        return seen


def clock(trainer, card: Card, steps: list[dict], parts: tuple[str, ...]) -> None:
    """Time every step of a trainer, and those of its parts that it has, into `steps`."""
    from transformers import TrainerCallback

    now: dict[str, float] = {}

    def time_now() -> float:
        if card.gpu:
            card.torch.cuda.synchronize()
        return time.perf_counter()

    def timed(method: str, label: str) -> None:
        original = getattr(trainer, method)

        def call(*arguments, **more):
            began = time_now()
            try:
                return original(*arguments, **more)
            finally:
                now[label] = now.get(label, 0.0) + time_now() - began

        setattr(trainer, method, call)

    for label in parts:
        if hasattr(trainer, method := {"rollout": "_generate", "judge": "_calculate_rewards"}[label]):
            timed(method, label)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            now.clear()
            card.tighten()
            self.began = time_now()

        def on_step_end(self, arguments, state, control, **_):
            step = time_now() - self.began
            rest = (
                {"update": step - sum(now[label] for label in parts)}
                if parts and all(label in now for label in parts)
                else {}
            )
            steps.append({**now, **rest, "step": step})
            card.tighten()

    trainer.add_callback(Clock())


def replies_of(k) -> list[str]:
    """Real replies, for the judge: those of the exam."""
    pairs = [
        json.loads(text) for text in (k.DATA / "judge_exam.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    texts = [pair[key] for pair in pairs for key in ("better", "worse")]
    random.Random(0).shuffle(texts)
    return texts


class Turns:
    """The items the judge reads: at each step other replies, the same for every contestant."""

    def __init__(self, k) -> None:
        self.k, self.replies, self.given = k, itertools.cycle(replies_of(k)), 0

    def items(self, dialogues) -> list:
        self.given += len(dialogues)
        return [self.k.as_item(dialogue, next(self.replies)) for dialogue in dialogues]


def grpo_options(k, cell: dict, **more):
    work, sizes = Path(cell["work"]), cell["sizes"]
    return k.GRPOOptions(
        data=work / f"prompts-{sizes['prompt']}.jsonl",
        group_size=sizes["group"],
        max_tokens=sizes["tokens"],
        steps=cell["steps"] + 1,
        save_steps=10**6,
        inspect_every=0,
        patience=0,
        **more,
    )


def sft_options(k, cell: dict, **more):
    work, length = Path(cell["work"]), cell["sizes"]["length"]
    here = work / cell["shape"]
    return k.SFTOptions(
        model=str(here / "model"),
        gguf_template=here / "template.gguf",
        data=work / f"sft-{length}.jsonl",
        bits=4,
        max_steps=cell["steps"] + 1,
        batch_size=BATCH,
        micro_batch=1,
        max_length=length,
        save_steps=10**6,
        **more,
    )


def ours(cell: dict, card: Card, steps: list[dict]) -> dict:
    """Our own commands, with a clock in the trainer, answers that no token ends and real replies for the judge."""
    import kardia_lite as k
    from kardia.judge.judge import Judge
    from kardia.llama.worker import Worker
    from kardia.models import packed_rows

    turns, drawn, rng = Turns(k), [], random.Random(0)
    parts = ("rollout", "judge") if cell["task"] == "grpo" else ()

    def clocked(make):
        def made(*arguments, **more):
            class Clocked(make(*arguments, **more)):
                def __init__(self, *arguments, **more) -> None:
                    super().__init__(*arguments, **more)
                    clock(self, card, steps, parts)

            return Clocked

        return made

    call, rollout, config, judged = Worker.call, Worker.rollout, k.grpo_config, []

    def held(worker, method, **more):
        try:
            return call(worker, method, **more)
        finally:
            card.tighten()

    def score(answers, rubric, judge, whole_text=False):
        rows = judge.numbers(
            turns.items([dialogue for dialogue, _ in answers]),
            [(c, judge.chosen(c)) for c in rubric.criteria],
            cached=False,
            guarded=False,
        )
        judged[:] = [judge.info]
        assert all(value is not None for row in rows for value in row.values()), (
            "the judge could not read a reply"
        )
        return [k.Reward({name: rng.random() for name in rubric.rewards}, {}, None) for _ in rows]

    def recorded(trainer_class):
        generate = trainer_class._generate_and_score_completions

        def counted(trainer, inputs):
            output = generate(trainer, inputs)
            drawn.append(float(output["completion_mask"].sum(1).float().mean()))
            return output

        trainer_class._generate_and_score_completions = counted
        return trainer_class

    def open_judge(worker, judge, rubric, gpu_layers, *_, **__):
        return Judge(
            worker, k.resolve_judge(judge), rubric, gpu_layers, lora=k.resolve_judge_lora(judge, "auto")
        ), {"judge": judge, "judge_hash": "none", "criteria": {}}

    k.open_judge, make_grpo = open_judge, clocked(k.make_grpo_trainer_class)
    k.make_grpo_trainer_class, k.make_sft_trainer_class, k.score_answers = (
        lambda *a, **m: recorded(make_grpo(*a, **m)),
        clocked(k.make_sft_trainer_class),
        score,
    )
    Worker.call, Worker.rollout = (
        held,
        lambda worker, prompts, *, stop, **more: rollout(worker, prompts, stop=[], **more),
    )
    k.grpo_config = lambda options, out, bits, who, weights, **more: config(
        options,
        out,
        bits,
        who,
        weights,
        **more,
        **({"generation_kwargs": {"min_new_tokens": options.max_tokens}} if who == "hf" else {}),
    )
    engine, out = {"ours": "transformers", "ours-unsloth": "unsloth"}[cell["who"]], Path(cell["out"])
    try:
        if cell["task"] == "sft":
            run = k.train_sft(sft_options(k, cell, engine=engine), out)
        else:
            run = k.train_grpo(
                grpo_options(k, cell, engine=engine, rollout=cell["rollout"]),
                Path(cell["work"]) / cell["shape"] / "source",
                out,
            )
    finally:
        cell["facts"] = json.loads((out / "run.json").read_text()) if (out / "run.json").is_file() else {}
    log = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    return {
        "kernel": packed_rows.kernel(),
        "drawn": drawn,
        "judge_on_gpu": judged[0]["gpu"] if judged else None,
        "log": [
            {
                name: row[name]
                for name in ("step", "time/rollout", "time/judge", "time/update", "seconds")
                if name in row
            }
            for row in log
        ],
    }


def facts_of(facts: dict) -> dict:
    """What a run of ours says about its memory."""
    plan = facts.get("memory_plan") or {}
    return {
        "setting": facts.get("setting"),
        "memory_plan": plan,
        "planned_gb": sum(plan.values()) if plan else None,
        "ladder": facts.get("ladder") or [],
    }


def theirs(cell: dict, card: Card, steps: list[dict]) -> dict:
    """TRL's own trainers on a model of transformers, or Unsloth's on its own."""
    unsloth = cell["who"] == "unsloth"
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback

    import kardia_lite as k

    k.silence_transformers()
    directory, dtype, sizes = Path(cell["work"]) / cell["shape"] / "model", k.compute_dtype(), cell["sizes"]
    rubric, tokenizer = (
        k.load_rubric(k.HERE / "rubrics.yaml"),
        k.load_tokenizer(k.Base("bench", directory, None, "")),
    )
    renderer, drawn, turns, more = k.Renderer(tokenizer, rubric.form), [], Turns(k), {}
    if unsloth:
        from unsloth import FastLanguageModel

        room = sizes["length"] if cell["task"] == "sft" else sizes["prompt"] + sizes["tokens"]
        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(directory),
            max_seq_length=room,
            load_in_4bit=True,
            fast_inference=False,
            use_exact_model_name=True,
        )
        model = FastLanguageModel.get_peft_model(
            model,
            r=16,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            lora_alpha=32,
            lora_dropout=0,
            bias="none",
            use_gradient_checkpointing="unsloth",
            random_state=0,
        )
    else:
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, quantization_config=quantization, device_map={"": 0} if card.gpu else None
        )
        more["peft_config"] = LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules="all-linear",
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
    if cell["task"] == "sft":
        from trl import SFTConfig, SFTTrainer

        options = sft_options(k, cell)
        rows = [
            {"input_ids": ids, "labels": labels}
            for d in k.load_rows([options.data], rubric, "dialogue")
            for ids, labels in renderer.examples(d, options.max_length)
        ]
        config = SFTConfig(
            output_dir=cell["out"],
            per_device_train_batch_size=1,
            gradient_accumulation_steps=BATCH,
            learning_rate=options.learning_rate,
            max_steps=options.max_steps,
            max_length=None,
            save_steps=10**6,
            dataset_kwargs={"skip_prepare_dataset": True},
            **k.shared_arguments(options, 4),
        )
        if unsloth:
            from transformers import DataCollatorForSeq2Seq

            more["data_collator"] = DataCollatorForSeq2Seq(tokenizer=tokenizer)
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            **more,
        )
    else:
        import llama_cpp
        from bench_judge import Json
        from trl import GRPOTrainer

        from kardia.core.machine import default_threads

        options = grpo_options(k, cell, micro_batch=cell["micro"])
        dialogues, threads, rng = (
            k.load_rows([options.data], rubric, "prompt"),
            default_threads(),
            random.Random(0),
        )
        llama = llama_cpp.Llama(
            str(k.resolve_judge(k.EMBEDDED)),
            n_ctx=2048,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=-1 if card.gpu else 0,
            verbose=False,
        )
        judge = Json(llama, rubric)

        def reward(prompts, completions, completion_ids, index, **_):
            drawn.append(statistics.mean(map(len, completion_ids)))
            judge(turns.items([dialogues[i] for i in index]))
            card.tighten()
            return [rng.random() for _ in completions]

        config = k.grpo_config(
            options,
            Path(cell["out"]),
            4,
            "hf",
            [1.0],
            save_strategy="no",
            generation_kwargs={"min_new_tokens": options.max_tokens},
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(k.prompt_rows(dialogues, renderer)),
            processing_class=tokenizer,
            **more,
        )
    clock(trainer, card, steps, ("rollout", "judge") if cell["task"] == "grpo" else ())
    trainer.remove_callback(PrinterCallback)
    trainer.create_model_card = lambda *_, **__: None
    trainer.train()
    return {
        "drawn": drawn,
        "judge_on_gpu": bool(card.gpu and llama_cpp.llama_supports_gpu_offload())
        if cell["task"] == "grpo"
        else None,
        "trainer": f"{type(trainer).__module__}.{type(trainer).__name__}",
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def train(cell: dict) -> dict:
    import kardia_lite as k
    from kardia.core import files
    from kardia.models import unsloth

    k.start(k.CommonOptions(offline=True), k.EMBEDDED)
    known, hashed = cell["hashes"], files.file_hash
    files.file_hash = lambda path: (
        known.get(str(path)) or hashed(path)
    )  # 15 GB to read, which `prepare` has done
    if cell["who"] == "ours-unsloth":  # before CUDA starts: it sets how torch's allocator works
        unsloth.bring_in(files.cache_directory())
    if cell["who"] == "unsloth":
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(cell["work"]) / "cache" / "unsloth-own"))
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        import unsloth  # noqa: F401
    steps: list[dict] = []
    shutil.rmtree(cell["out"], ignore_errors=True)
    with Card(cell["cap"], cell["free_at_start"]) as card:
        try:
            found = (ours if cell["who"] in OURS else theirs)(cell, card, steps)
        except BaseException as error:
            found = failure(error)
        found |= {"steps": steps, **facts_of(cell.get("facts") or {})}
    shutil.rmtree(cell["out"], ignore_errors=True)
    return {"status": "done", **found, **card.figures()}


def attention(cell: dict) -> dict:
    """Both ways of computing a packed row's attention, forwards and backwards, with this shape's heads: best of five, in turns; and
    what kardia chooses by its own trial."""
    import torch

    from kardia.models import packed_rows

    c, sizes = cell["config"], cell["sizes"]
    if not torch.cuda.is_available():
        return {"status": "not run", "why": "no GPU"}
    heads, dtype = (
        (c["num_attention_heads"], c["num_key_value_heads"], c["num_key_value_heads"]),
        torch.bfloat16,
    )
    text = SimpleNamespace(
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        hidden_size=c["hidden_size"],
        head_dim=None,
    )
    model = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: text), device=torch.device("cuda", 0), dtype=dtype
    )
    packed_rows.choose_kernel(model)
    chosen, kept = packed_rows.kernel(), packed_rows._kernel[:]
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=True)
    row = packed_rows.pack(
        torch.zeros(sizes["prompt"], dtype=torch.long, device="cuda"),
        [torch.zeros(sizes["tokens"], dtype=torch.long, device="cuda")] * sizes["group"],
    )
    states = [
        torch.randn(
            1,
            n,
            row.ids.shape[1],
            c["hidden_size"] // heads[0],
            device="cuda",
            dtype=dtype,
            requires_grad=True,
        )
        for n in heads
    ]
    seconds: dict[str, list[float]] = {"flex": [], "segments": []}
    why = {}
    for way in ("flex", "segments") * 6:
        if way in why:
            continue
        try:
            packed_rows._kernel[:] = [compiled] if way == "flex" else []
            torch.cuda.synchronize()
            began = time.perf_counter()
            torch.autograd.grad(
                packed_rows.shared_prefix_attention(None, *states, None, pack=row)[0].float().square().mean(),
                states,
            )
            torch.cuda.synchronize()
            seconds[way].append(time.perf_counter() - began)
        except Exception as error:  # noqa: BLE001  whatever Triton raises is a finding
            why[way] = one_line(error)
    packed_rows._kernel[:] = kept
    return {
        "status": "done",
        "chosen": chosen,
        "milliseconds": {
            way: 1000 * min(times[1:]) if len(times) > 1 and way not in why else None
            for way, times in seconds.items()
        },
        "failed": why,
        "row": row.ids.shape[1],
    }


def probe(cell: dict) -> dict:
    import llama_cpp
    import torch

    from kardia.core.machine import describe_machine, versions

    found = {
        "gpu": torch.cuda.is_available(),
        "machine": describe_machine(),
        "versions": versions(),
        "cuda": torch.version.cuda,
        "llama_cpp_gpu": bool(llama_cpp.llama_supports_gpu_offload()),
    }
    if found["gpu"]:
        card = torch.cuda.get_device_properties(0)
        found |= {
            "name": card.name,
            "total_gb": card.total_memory / GB,
            "free_gb": torch.cuda.mem_get_info()[0] / GB,
            "capability": f"{card.major}.{card.minor}",
        }
    return found


def one_line(error: BaseException) -> str:
    text = getattr(error, "message", None) or str(error)
    return f"{type(error).__name__}: {' '.join(text.split())[:300]}" if text else type(error).__name__


def failure(error: BaseException) -> dict:
    """A failure as figures: `out of memory`, `missing`, or `failed`; the traceback goes to the cell's log."""
    import traceback

    from kardia.core import machine

    traceback.print_exception(error)
    if machine.out_of_memory(error) or "out of memory" in str(getattr(error, "message", error)):
        return {"status": "out of memory", "why": one_line(error)}
    if isinstance(error, ModuleNotFoundError):
        return {"status": "missing", "why": f"{error.name} is not installed"}
    return {"status": "failed", "why": one_line(error)}


def child(cell: dict) -> None:
    from kardia.core.files import write_json

    try:
        found = {"probe": probe, "prepare": prepare, "attention": attention, "sft": train, "grpo": train}[
            cell["task"]
        ](cell)
    except BaseException as error:
        found = failure(error)
    write_json(Path(cell["result"]), found)


# ---------------------------------------------------------------------------------- the parent, which never touches the GPU


def smi(query: str) -> str | None:
    """What nvidia-smi says of the GPU that torch will take, or None."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-i", gpu],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def free_now() -> float | None:
    """Bytes that are free on the GPU."""
    try:
        return float(smi("memory.free") or "") * 2**20
    except ValueError:
        return None


def run_cell(cell: dict, work: Path, timeout: float) -> dict:
    """One cell in a process of its own. Whatever happens to it is what is returned."""
    name = re.sub(
        r"[^A-Za-z0-9.]+",
        "-",
        "-".join(str(cell[key]) for key in ("task", "shape", "cap", "who", "micro") if cell.get(key)),
    )
    logs = work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    result, log = logs / f"{name}.json", logs / f"{name}.log"
    result.unlink(missing_ok=True)
    cell = {
        **cell,
        "work": str(work),
        "result": str(result),
        "out": str(work / "runs" / name),
        "free_at_start": free_now(),
    }
    environment = {**os.environ, "KARDIA_CACHE": str(work / "cache"), "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, __file__, "--cell", json.dumps(cell)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # its llama.cpp worker, too
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    told = {"wall_seconds": round(time.monotonic() - began, 1), "log": str(log)}
    if code is None:
        return {"status": "timeout", "why": f"not done after {timeout:.0f} s", **told}
    if not result.is_file():
        return {
            "status": "failed",
            "why": "killed: the computer's own memory?"
            if code in (-9, 137)
            else f"ended with exit code {code}",
            **told,
        }
    return {**json.loads(result.read_text()), **told}


def verdict(cell: dict) -> str:
    """In a few words, what became of a cell: `fits`, or why not."""
    if cell["status"] != "done":
        return {"out of memory": "out of memory", "timeout": "timeout"}.get(
            cell["status"], cell.get("why", cell["status"])
        )
    asked = {"tokens": cell["sizes"]["tokens"], "group": cell["sizes"]["group"]}
    if cell["ladder"] and any(cell["ladder"][-1].get(key) not in (None, asked[key]) for key in asked):
        return "only with " + ", ".join(rung["why"].split(" (")[0] for rung in cell["ladder"])
    if cell["limit_gb"] and cell["peak_gb"] > cell["limit_gb"]:
        return f"too much: {cell['peak_gb']:.2f} of {cell['limit_gb']:.2f} GB"
    return "fits"


def counted(cell: dict) -> list[dict]:
    """The steps that count: all but the first."""
    return cell.get("steps", [])[1:] if cell["status"] == "done" else []


def beside(cell: dict) -> bool:
    """Did llama.cpp stay on the CPU, for it was built for no GPU? Then its memory says nothing about a card."""
    setting = cell.get("setting") or {}
    return cell.get("llama_gpu") is False and (
        setting.get("rollout") == "llama"
        or bool(setting.get("judge_bytes"))
        and setting.get("judge_on_gpu", False)
    )


def planned_wrongly(cell: dict) -> bool:
    """The plan counts what llama.cpp does not take of this GPU: nothing to compare with."""
    return beside(cell) and (cell.get("setting") or {}).get("llama_gpu", True)


def spread(values: list[float], shape: str = "{:.2f}") -> str:
    """Median (lowest to highest)."""
    return (
        f"{shape.format(statistics.median(values))} ({shape.format(min(values))} to {shape.format(max(values))})"
        if values
        else ""
    )


def ratios_of(cells: list[dict]) -> list[dict]:
    """How many times as long the rivals take, step by step, per part: median, lowest, highest."""
    found = []
    for mine, rival in itertools.product(
        [c for c in cells if c["who"] in OURS], [c for c in cells if c["who"] not in OURS]
    ):
        if (
            any(mine[key] != rival[key] for key in ("task", "shape", "cap"))
            or not (counted(mine) and counted(rival))
            or "only with" in verdict(mine)
        ):
            continue
        row = {key: mine[key] for key in ("task", "shape", "cap")} | {
            "ours": mine["who"],
            "rival": rival["who"],
        }
        for part in PARTS:
            both = [
                (a[part], b[part])
                for a, b in zip(counted(mine), counted(rival))
                if a.get(part) and b.get(part)
            ]
            if both:
                each = [b / a for a, b in both]
                row[part] = [statistics.median(each), min(each), max(each)]
        found.append(row)
    return found


def targets_of(cells: list[dict], ratios: list[dict], rehearsal: bool) -> list[tuple[str, str, str]]:
    """(target, met / not met / not measured, by what)."""
    out = []

    def fits(text: str, task: str, name: str, cap: float) -> None:
        tried = [
            c
            for c in cells
            if (c["task"], c["shape"], c["cap"]) == (task, name, cap)
            and c["who"] in OURS
            and c["status"] in ("done", "out of memory")
            and not beside(c)
        ]
        why = "; ".join(
            f"{c['who']}: {verdict(c)}" + (f", {c['peak_gb']:.2f} GB" if c["status"] == "done" else "")
            for c in tried
        )
        out.append(
            (
                text,
                "not measured"
                if not tried
                else "met"
                if any(verdict(c) == "fits" for c in tried)
                else "not met",
                why,
            )
        )

    def ratio(text: str, rival: str, least: float) -> None:
        rows = [r for r in ratios if r["task"] == "grpo" and r["rival"] == rival and "step" in r]
        best = [
            max((r for r in rows if (r["shape"], r["cap"]) == key), key=lambda r: r["step"][0])
            for key in dict.fromkeys((r["shape"], r["cap"]) for r in rows)
        ]
        why = "; ".join(f"{r['shape']}, {card(r['cap'])}: {r['step'][0]:.2f}x ({r['ours']})" for r in best)
        out.append(
            (
                text,
                "not measured"
                if not best
                else "met"
                if all(r["step"][0] >= least for r in best)
                else "not met",
                why,
            )
        )

    fits("7B in 4 bits: SFT on 2,048 tokens in 8 GB", "sft", SHORT["7B"], 8)
    fits("7B: GRPO, 8 x 256 after 512, in 12 GB", "grpo", SHORT["7B"], 12)
    fits("3B: GRPO with its judge in 8 GB", "grpo", SHORT["3B"], 8)
    ratio("a GRPO step at least twice as fast as plain TRL's", "trl", 2.0)
    ratio("a GRPO step not slower than Unsloth's own without vLLM", "unsloth", 1.0)
    planned = [
        (c, c["planned_gb"] / c["peak_gb"])
        for c in cells
        if c["who"] in OURS and c["status"] == "done" and c.get("planned_gb") and not planned_wrongly(c)
    ]
    worst = max(planned, key=lambda pair: abs(pair[1] - 1), default=None)
    why = (
        f"{len(planned)} runs, the farthest {worst[1]:.0%} ({worst[0]['task']}, {worst[0]['shape']}, {card(worst[0]['cap'])}, {worst[0]['who']})"
        if worst
        else ""
    )
    out.append(
        (
            "memory as planned, within 10% of the measured",
            "not measured"
            if not planned
            else "met"
            if all(abs(share - 1) <= 0.1 for _, share in planned)
            else "not met",
            why,
        )
    )
    return [(text, "not measured", "a rehearsal") for text, *_ in out] if rehearsal else out


def card(cap: float) -> str:
    return f"{cap:g} GB" if cap else "no card"


def tables(report: dict) -> str:
    """The report in Markdown. A figure stands only where one was measured."""
    cells, rehearsal, sizes, lines = report["cells"], report["rehearsal"], report["sizes"], []
    mark = MARK if rehearsal else ""

    def head(*names: str) -> None:
        lines.extend(("| " + " | ".join(names) + " |", "|" + "---|" * len(names)))

    def row(*texts: str) -> None:
        lines.append(
            "| "
            + " | ".join(
                text + mark if mark and re.match(r"\d", text) and i > 2 else text
                for i, text in enumerate(texts)
            )
            + " |"
        )

    def memory_of(c: dict) -> tuple[str, str, str]:
        if c["status"] != "done":
            return ("", f"{c['planned_gb']:.2f}" if c.get("planned_gb") else "", "")
        if not c.get("planned_gb"):
            return f"{c['peak_gb']:.2f}", "", ""
        return (
            f"{c['peak_gb']:.2f}",
            f"{c['planned_gb']:.2f}",
            "" if planned_wrongly(c) else f"{c['planned_gb'] / c['peak_gb']:.0%}",
        )

    def fate(c: dict) -> str:
        text, notes = ("ran" if rehearsal and c["status"] == "done" else verdict(c)), []
        if (
            c.get("micro")
            and c["who"] == "trl"
            and c["task"] == "grpo"
            and c["status"] in ("done", "out of memory")
        ):
            notes.append(f"micro {c['micro']}")
        if c.get("setting") and c["who"] in OURS:
            told = words(memory_plan.Setting.of(c["setting"]))
            notes += [f"chosen: {told}"] if told else []
        if c["status"] == "done":
            notes += [
                f"went down: {rung['why'].split(' (')[0]}" for rung in c["ladder"] if verdict(c) == "fits"
            ]
            if c["drawn"] and any(abs(n - sizes["tokens"]) > 0.5 for n in c["drawn"]):
                notes.append(
                    f"answers of {min(c['drawn']):.0f} to {max(c['drawn']):.0f} tokens, not {sizes['tokens']}"
                )
            notes += ["torch's context assumed"] if c["context_assumed"] else []
            notes += ["llama.cpp on the CPU"] if beside(c) and not rehearsal else []
        return "; ".join([text, *notes])

    for task, title in (
        ("sft", f"SFT, 4 bits, {BATCH} dialogues of {sizes['length']:,} tokens a step"),
        (
            "grpo",
            f"GRPO, 4 bits, {sizes['group']} answers of {sizes['tokens']} tokens to a prompt of {sizes['prompt']}, with the embedded judge",
        ),
    ):
        mine = [c for c in cells if c["task"] == task]
        if not mine:
            continue
        lines.append(
            f"\n**{title}**{' (' + MARK + ' a rehearsal)' if rehearsal else ''}; median (lowest to highest) of {report['steps']} steps\n"
        )
        speed = (
            ("tokens/s",)
            if task == "sft"
            else tuple(f"{part}, s" for part in ("rollouts", "judging", "update", "step"))
        )
        head("model", "card", "who", *speed, "peak GB", "planned GB", "planned / measured", "")
        for c in mine:
            steps = counted(c)
            told = (
                [spread([BATCH * sizes["length"] / s["step"] for s in steps], "{:,.0f}")]
                if task == "sft"
                else [spread([s[part] for s in steps if part in s]) for part in PARTS]
            )
            row(c["shape"], card(c["cap"]), WHO[c["who"]], *told, *memory_of(c), fate(c))
    if report["ratios"]:
        lines.append("\n**How many times as long they take**, step by step: median (lowest to highest)\n")
        head("", "model, card", "who / ours", "rollouts", "judging", "update", "step")
        for r in report["ratios"]:
            row(
                r["task"],
                f"{r['shape']}, {card(r['cap'])}",
                f"{WHO[r['rival']]} / {WHO[r['ours']]}",
                *(f"{r[p][0]:.2f}x ({r[p][1]:.2f} to {r[p][2]:.2f})" if p in r else "" for p in PARTS),
            )
    if report["attention"]:
        lines.append("\n**Attention of a packed row**, forwards and backwards, milliseconds, best of five\n")
        head("model", "row", "chosen", "flex", "segments")
        for a in report["attention"]:
            if a["status"] != "done":
                row(a["shape"], "", "", f"not tried: {a['why']}", "")
                continue
            row(
                a["shape"],
                f"{a['row']:,} tokens",
                a["chosen"],
                *(
                    f"{ms:.2f}" if (ms := a["milliseconds"][way]) else a["failed"].get(way, "")
                    for way in ("flex", "segments")
                ),
            )
    lines.append("\n**Targets**\n")
    head("target", "", "by what")
    for text, what, why in report["targets"]:
        lines.append(f"| {text} | {what} | {why} |")
    if rehearsal:
        lines.append(
            f"\n{MARK} A rehearsal with a two-layer model{'' if report['probe']['gpu'] else ' on a CPU, where cards mean nothing'}: no figure here measures anything."
        )
    return "\n".join(lines).strip()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several = lambda kind: lambda text: [kind(part) for part in text.split(",") if part]  # noqa: E731
    parser.add_argument("--shapes", type=several(str), help=f"of {','.join(SHORT)} (default: all)")
    parser.add_argument(
        "--caps", type=several(float), help="cards to simulate, GB (default 8,12,16,24; 0: the whole GPU)"
    )
    parser.add_argument(
        "--who", type=several(str), default=list(WHO), help=f"of {','.join(WHO)} (default: all)"
    )
    parser.add_argument(
        "--what", type=several(str), default=["grpo", "sft"], help="of grpo,sft (default: both)"
    )
    parser.add_argument("--steps", type=int, help="steps that count, after one that does not (default 3)")
    parser.add_argument(
        "--rollout",
        choices=("auto", "llama", "hf"),
        default="auto",
        help="who samples for ours (auto: as the plan chooses)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="0.5B inside 8 GB, 2 steps, nothing new begun after 4 minutes"
    )
    parser.add_argument(
        "--targets", action="store_true", help="only the shapes and cards that the targets name"
    )
    parser.add_argument("--minutes", type=float, help="begin no new cell after so many minutes")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a cell may take (default 600)")
    parser.add_argument("--tiny", action="store_true", help="rehearse with a two-layer model, on a CPU too")
    parser.add_argument(
        "--work",
        type=Path,
        help="where models, GGUFs, logs and caches lie and are found again (default: bench-gpu in the temporary directory; a 7B takes 45 GB)",
    )
    parser.add_argument(
        "--drop", action="store_true", help="remove each shape's files once its cells are done"
    )
    parser.add_argument("--out", type=Path, help="every number, as JSON (default: bench_gpu.json in --work)")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.targets and (arguments.tiny or arguments.quick or arguments.shapes or arguments.caps):
        parser.error("--targets says itself which shapes and cards")
    arguments.shapes = (
        ["tiny"]
        if arguments.tiny
        else arguments.shapes
        or (["0.5B"] if arguments.quick else ["3B", "7B"] if arguments.targets else list(SHORT))
    )
    arguments.caps = (
        [0.0]
        if arguments.tiny
        else arguments.caps
        or ([8.0] if arguments.quick else [8.0, 12.0, 24.0] if arguments.targets else [8.0, 12.0, 16.0, 24.0])
    )
    arguments.steps = (
        (2 if arguments.quick or arguments.tiny else 3) if arguments.steps is None else arguments.steps
    )
    arguments.minutes = arguments.minutes or (4.0 if arguments.quick else None)
    for option, given, known in (
        ("shapes", arguments.shapes, ["tiny", *SHORT]),
        ("who", arguments.who, WHO),
        ("what", arguments.what, ["sft", "grpo"]),
    ):
        if odd := [value for value in given if value not in known]:
            parser.error(f"--{option} {odd[0]}: not one of {', '.join(known)}")
    if arguments.steps < 1 or any(0 < cap <= 1 or cap < 0 for cap in arguments.caps):
        parser.error("--steps wants at least 1, --caps more than 1 GB each (or 0)")
    return arguments


def room_for(config: dict, here: Path) -> str | None:
    """Why there is no room on the disk for a shape's files, or None: safetensors and GGUF in 16 bits, Q8_0 and Q4_K_M if the plan asks for them."""
    s = memory_plan.shape_of(config)
    need = (s.linear + s.table * (1 if s.tied else 2)) * (5.7 if not (here / "model").is_dir() else 2.0)
    if (free := shutil.disk_usage(here.parent).free) < need:
        return f"no room on the disk: {need / GB:.0f} GB wanted in {here.parent}, {free / GB:.0f} free (--work elsewhere, --drop)"
    return None


def main() -> None:
    arguments = parse()
    if arguments.cell:
        child(arguments.cell)
        return
    began = time.monotonic()
    work = (arguments.work or Path(tempfile.gettempdir()) / "bench-gpu").absolute()
    work.mkdir(parents=True, exist_ok=True)
    out = arguments.out or work / "bench_gpu.json"
    say = lambda text: print(
        f"{(time.monotonic() - began) / 60:5.1f} min  {text}", file=sys.stderr, flush=True
    )  # noqa: E731
    seen = run_cell({"task": "probe"}, work, 120)
    if "gpu" not in seen:
        raise SystemExit(f"the probe of this machine failed: {seen.get('why')} ({seen['log']})")
    if not seen["gpu"] and not arguments.tiny:
        print(
            "no GPU that torch can use: nothing to measure here (--tiny rehearses the whole benchmark on a CPU)",
            file=sys.stderr,
        )
        raise SystemExit(1)
    sizes = SMALL if arguments.tiny else SIZES
    rehearsal = bool(arguments.tiny)
    report = {
        "rehearsal": rehearsal,
        "command": shlex.join([sys.executable, *sys.argv]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "probe": seen,
        "driver": smi("driver_version"),
        "gpu": seen.get("name", "no GPU"),
        "versions": seen["versions"],
        "sizes": sizes,
        "steps": arguments.steps,
        "cells": [],
        "attention": [],
        "ratios": [],
        "targets": [],
    }
    about = (
        f"{seen['name']}, {seen['total_gb']:.0f} GB, driver {report['driver'] or 'unknown'}, CUDA {seen['cuda']}"
        if seen["gpu"]
        else "no GPU: a rehearsal, not a measurement"
    )
    notes = (
        []
        if not seen["gpu"] or seen["llama_cpp_gpu"]
        else [
            "llama.cpp here was built for no GPU: rollouts by it and all judging run on the CPU (`kardia_lite.py doctor` prints the line that mends it)"
        ]
    )
    for text in (about, *notes):
        say(text)
    unsloth = importlib.util.find_spec("unsloth") is not None

    def late() -> str | None:
        return (
            f"not begun: {arguments.minutes:g} minutes were over"
            if arguments.minutes and time.monotonic() - began > 60 * arguments.minutes
            else None
        )

    def keep() -> None:
        report["ratios"] = ratios_of(report["cells"])
        report["targets"] = targets_of(report["cells"], report["ratios"], rehearsal)
        out.parent.mkdir(parents=True, exist_ok=True)
        half = out.with_name(f".{out.name}.part")
        half.write_text(json.dumps(report, indent=1))
        half.replace(out)

    for short in arguments.shapes:
        name, config = ("tiny", TINY) if short == "tiny" else (SHORT[short], SHAPES[SHORT[short]])
        here, ready = work / name, {}
        common = {
            "shape": name,
            "config": config,
            "sizes": sizes,
            "steps": arguments.steps,
            "rollout": arguments.rollout,
        }
        why = late() or room_for(config, here)
        if not why:
            say(f"{name}: preparing model, GGUF, data")
            ready = run_cell({**common, "task": "prepare"}, work, max(arguments.timeout, 900))
            why = None if "hashes" in ready else f"not prepared: {ready.get('why')}"
            say(f"{name}: {why or 'ready'}, {ready['wall_seconds']:.0f} s")
        for cap, task, who in itertools.product(arguments.caps, arguments.what, arguments.who):
            if arguments.targets and (task, short, cap) not in TARGETS:
                continue
            cell = {
                **common,
                "task": task,
                "cap": cap,
                "who": who,
                "hashes": ready.get("hashes", {}),
                "micro": sizes["group"] if task == "grpo" and who in ("trl", "unsloth") else 0,
            }
            label = f"{name}, {card(cap)}, {task}, {WHO[who]}"
            reason = why or ("unsloth is not installed" if "unsloth" in who and not unsloth else late())
            if not reason and cap and memory_plan.usable(cap) > seen["free_gb"]:
                reason = f"this GPU has only {seen['free_gb']:.1f} GB free"
            if reason:
                found = {"status": "not run", "why": reason}
            else:
                say(f"{label} ...")
                found = run_cell(cell, work, arguments.timeout)
                while (
                    found["status"] == "out of memory" and who == "trl" and cell["micro"] > 1 and not late()
                ):
                    cell["micro"] = MICRO[cell["micro"]]
                    say(f"{label}: out of memory; again with {cell['micro']} answers per pass")
                    found = run_cell(cell, work, arguments.timeout)
            report["cells"].append(
                {key: cell[key] for key in ("task", "shape", "cap", "who", "micro", "sizes")}
                | {"ladder": [], "llama_gpu": seen["llama_cpp_gpu"]}
                | found
            )
            done = report["cells"][-1]
            step = (
                f", {statistics.median(s['step'] for s in counted(done)):.2f} s a step"
                if counted(done)
                else ""
            )
            say(
                f"{label}: {'ran' if rehearsal and done['status'] == 'done' else verdict(done)}{step}"
                + (f" (see {done['log']})" if done["status"] in ("failed", "timeout") else "")
            )
            keep()
        if "grpo" in arguments.what and set(OURS) & set(arguments.who):
            report["attention"].append(
                {
                    "shape": name,
                    **(
                        {"status": "not run", "why": "no GPU"}
                        if not seen["gpu"]
                        else {"status": "not run", "why": reason}
                        if (reason := why or late())
                        else run_cell({**common, "task": "attention"}, work, arguments.timeout)
                    ),
                }
            )
        if arguments.drop and here.is_dir() and not rehearsal:
            shutil.rmtree(here)
            for file in (work / "cache").glob(f"{Path(ready.get('ggufs', 'none')).name}-*.gguf"):
                file.unlink()
    keep()
    print(
        f"# {about}\n\n`{report['command']}`\n\n{', '.join(f'{key} {value}' for key, value in seen['versions'].items())}; {seen['machine']}\n"
        + "".join(f"\n{note}\n" for note in notes)
    )
    print(tables(report))
    print(f"\nEvery number: {out}; what each process said: {work / 'logs'}")


if __name__ == "__main__":
    main()
