"""A GRPO step, ours against plain TRL: the same model, prompts, seed, group, lengths and criteria, in one run, step by step.

    python tests/bench_grpo.py [--from RUN] [--steps 3] [--sweep] [--json FILE]      (bench_learning.py: do both learn the same?)

Each trainer lives in a process of its own (in one process the thread pools of torch and two llama.cpps slow each other: TRL
took 47 s a step there and 30 s alone) and they take turns, one step each, so that a noisy machine is noisy to both. Timed:

    rollout   trainer._generate:          ours llama.cpp with the LoRA swapped in;  TRL's transformers `generate`
    judge     trainer._calculate_rewards: ours log-probabilities of branches;       a JSON completion per reply (llama-cpp-python)
    update    the rest of the step:       ours one row with a shared prompt;        TRL's own path, one row per answer

The baseline is TRL as its documentation shows it, at its best here: bfloat16 where the machine multiplies it, the whole
group in one batch, key-value cache on, the judge's changing text last so that llama-cpp-python's prefix matching works.
Every completion is sampled to exactly --tokens tokens (the end token is masked for one, ignored by the other) and the
judge reads the last 30 words of each, so both do the same work. Medians over steps; the first step of each is not counted.

The floor is what the arithmetic alone would take at the matmul and memory rates measured here, with perfect reuse of the
prompt: weights read once per decoded token, 2 x parameters FLOPs per token forward, 4 x per token trained (the base is
frozen: its backward pass needs the gradient of the activations only).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import kardia_lite as k
from kardia.core import machine
from kardia.core.files import write_json
from kardia.core.machine import default_threads, describe_machine
from kardia.core.run_directory import Run
from kardia.judge.judge import Judge, JudgedReply
from kardia.llama.worker import Worker

PARTS = ("rollout", "judge", "update", "step")


class Work:
    """What both share: base, adapter, prompts, rubric, options."""

    def __init__(self, arguments) -> None:
        self.tokens, self.group = arguments.tokens, arguments.group_size
        self.run = Run(arguments.source) if arguments.source else None
        self.base = k.base_of(self.run) if self.run else k.resolve_base(k.EMBEDDED)
        self.rubric = k.load_rubric(k.HERE / "rubrics.yaml")
        self.renderer = k.Renderer(k.load_tokenizer(self.base))
        self.dialogues = k.load_rows([k.DATA / "prompts.jsonl"], self.rubric, "prompt")
        random.Random(0).shuffle(self.dialogues)
        if getattr(arguments, "prompt", 0):
            self.dialogues = [self.stretched(d, arguments.prompt) for d in self.dialogues[:8]]
        self.options = k.GRPOOptions(
            group_size=self.group,
            max_tokens=self.tokens,
            steps=arguments.steps + 1,
            learning_rate=2e-5,
            save_steps=10**6,
        )
        self.folder = Path(tempfile.mkdtemp(prefix="bench-grpo-"))

    def stretched(self, dialogue, tokens: int):
        """The same dialogue with a prompt of about so many tokens: its situation repeated or cut."""
        bare = dataclasses.replace(dialogue, person="-", situation="-")
        room = tokens - len(self.renderer.prompt(bare))
        text = f"{dialogue.situation} {dialogue.person} " * (1 + max(0, room) // 20)
        return dataclasses.replace(
            bare, situation=self.renderer.tokenizer.decode(self.renderer.ids(text)[: max(1, room)])
        )

    def policy(self):
        return k.load_policy(self.base, "transformers", 16, adapter=self.run.adapter if self.run else None)

    def items(self, completions, index) -> list[JudgedReply]:
        """The last 30 words of every completion as a reply in its dialogue."""
        return [
            k.as_item(self.dialogues[i], " ".join(k.DEFAULT_FORMAT.marker.sub(" ", c[0]["content"]).split()[-30:]))
            for c, i in zip(completions, index)
        ]

    def trainer(self, trainer_class, name: str, reward, rollout: str, **more):
        from datasets import Dataset

        config = k.grpo_config(
            self.options,
            self.folder / name,
            16,
            rollout,
            [1.0],
            shuffle_dataset=False,
            save_strategy="no",
            **more.pop("config", {}),
        )
        rows = Dataset.from_list(k.prompt_rows(self.dialogues, self.renderer))
        trainer = trainer_class(
            model=self.policy(),
            reward_funcs=reward,
            args=config,
            train_dataset=rows,
            processing_class=k.load_tokenizer(self.base),
            **more,
        )
        trainer.create_model_card = lambda *_, **__: None
        return trainer


def make_ours(work: Work, worker: Worker):
    k.load_for_rollouts(worker, work.base.gguf(16))
    judge = Judge(
        worker, k.resolve_judge(k.EMBEDDED), work.rubric, 0, lora=k.resolve_judge_lora(k.EMBEDDED, "auto")
    )

    def reward(prompts, completions, index, **_):
        wanted = [
            (c, judge.chosen(c)) for c in work.rubric.criteria
        ]  # without guards: nobody is spared a reply
        return [
            sum(row.values()) for row in judge.numbers(work.items(completions, index), wanted, guarded=False)
        ]

    work.folder.joinpath("ours").mkdir()

    class FixedLength:  # the same worker, told that no token ends an answer
        set_lora = staticmethod(worker.set_lora)

        @staticmethod
        def rollout(prompts, *, stop, **more):
            return worker.rollout(prompts, stop=[], **more)

    run = type("Folder", (), {"path": work.folder / "ours", "append": lambda *_: None})()
    rollouts = k.Rollouts(
        FixedLength(),
        work.renderer,
        work.dialogues,
        work.options,
        work.rubric,
        None,
        work.base,
        run,
        k.recorder.Board("bench"),
    )
    return work.trainer(k.make_grpo_trainer_class(), "ours", reward, "llama", rollout_func=rollouts)


def make_plain(work: Work):
    import llama_cpp
    from bench_judge import Json
    from trl import GRPOTrainer

    threads = default_threads()
    llama = llama_cpp.Llama(
        str(k.resolve_judge(k.EMBEDDED)),
        n_ctx=2048,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    judge = Json(llama, work.rubric)

    def reward(prompts, completions, index, **_):
        items = work.items(completions, index)
        judge(items)
        return [
            random.Random(item.reply).random() for item in items
        ]  # the time is what counts here; some spread keeps the update whole

    return work.trainer(
        GRPOTrainer, "plain", reward, "hf", config={"generation_kwargs": {"min_new_tokens": work.tokens}}
    )


def clock(trainer) -> None:
    """Time the parts of every step; begin a step when a line comes on stdin, report it as a JSON line on stdout."""
    from transformers import PrinterCallback, TrainerCallback

    part = {"rollout": 0.0, "judge": 0.0}

    def timed(method: str, label: str) -> None:
        original = getattr(trainer, method)

        def call(*arguments, **more):
            began = time.perf_counter()
            try:
                return original(*arguments, **more)
            finally:
                part[label] = time.perf_counter() - began

        setattr(trainer, method, call)

    timed("_generate", "rollout")
    timed("_calculate_rewards", "judge")

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if not sys.stdin.readline():
                raise SystemExit("the other trainer failed")
            self.began = time.perf_counter()

        def on_step_end(self, arguments, state, control, **_):
            step = time.perf_counter() - self.began
            print(
                json.dumps({**part, "update": step - part["rollout"] - part["judge"], "step": step}),
                flush=True,
            )

    trainer.add_callback(Clock())
    trainer.remove_callback(PrinterCallback)


def child(arguments) -> None:
    """One trainer alone in this process: steps on request, then its peak memory."""
    k.start(k.CommonOptions(), k.EMBEDDED)
    with machine.PeakSampler() as sampler, Worker() as worker:
        work = Work(arguments)
        trainer = make_ours(work, worker) if arguments.only == "ours" else make_plain(work)
        clock(trainer)
        trainer.train()
    print(json.dumps({"peak_gb": sampler.peak}), flush=True)


def race(
    arguments, names: tuple[str, ...] = ("ours", "plain")
) -> tuple[dict[str, dict[str, list[float]]], dict[str, float]]:
    """Both trainers, a step each in turn. Returns (seconds per trainer, part and step; peak GB per trainer). The first step of each is not counted."""
    command = [
        sys.executable,
        __file__,
        "--steps",
        str(arguments.steps),
        "--group-size",
        str(arguments.group_size),
        "--tokens",
        str(arguments.tokens),
        "--prompt",
        str(arguments.prompt),
    ]
    command += ["--from", str(arguments.source)] if arguments.source else []
    children = {
        name: subprocess.Popen(
            [*command, "--only", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for name in names
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in children}
    try:
        for step in range(arguments.steps + 1):
            for name, process in children.items():
                os.killpg(process.pid, signal.SIGCONT)
                process.stdin.write("go\n")
                process.stdin.flush()
                line = process.stdout.readline()
                if not line:
                    raise SystemExit(f"{name} ended with exit code {process.wait()}")
                if step < arguments.steps:
                    os.killpg(process.pid, signal.SIGSTOP)  # threads that still spin would slow the other one
                times = json.loads(line)
                print(
                    f"{name:<6} step {step + 1}: "
                    + ", ".join(f"{part} {times[part]:.2f} s" for part in PARTS),
                    file=sys.stderr,
                    flush=True,
                )
                if step:  # the first one allocates, compiles kernels, fills caches
                    for part in PARTS:
                        seconds[name][part].append(times[part])
        peaks = {name: json.loads(process.stdout.readline())["peak_gb"] for name, process in children.items()}
    finally:
        for process in children.values():
            os.killpg(process.pid, signal.SIGKILL)
    return seconds, peaks


def floor(work_tokens: dict[str, float], parameters: int) -> dict[str, float]:
    """Seconds per part if only the arithmetic counted; rates measured here and now."""
    import torch

    dtype = k.compute_dtype()
    a, b = (
        torch.randn(2048, 576, dtype=dtype),
        torch.randn(576, 1536, dtype=dtype),
    )  # the shapes of this model's layers
    rate = max(
        2 * 2048 * 576 * 1536 * 50 / timed_seconds(lambda: [a @ b for _ in range(50)]) for _ in range(3)
    )
    block = torch.ones(64 << 20)  # 256 MB of float32, far more than any cache
    bandwidth = max((256 << 20) / timed_seconds(lambda: block.sum()) for _ in range(3))
    weights = 2 * parameters
    return {
        "flops": rate,
        "bytes_per_second": bandwidth,
        "rollout": 2 * parameters * (work_tokens["prompt"] + work_tokens["completions"]) / rate
        + work_tokens["decodes"] * weights / bandwidth,
        "judge": 2 * parameters * work_tokens["judge"] / rate,
        "update": 4 * parameters * (work_tokens["prompt"] + work_tokens["completions"]) / rate,
    }


def timed_seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def sweep(arguments, middle: dict[str, list[float]]) -> list[dict]:
    """How our cost grows with the group, the prompt and the answers: medians of two counted steps; `middle` is the race already run."""
    rows = []
    for key, values in (("group_size", (4, 0, 16)), ("prompt", (150, 0, 600)), ("tokens", (65, 0, 260))):
        for value in values:
            seconds = (
                race(argparse.Namespace(**{**vars(arguments), key: value, "steps": 2}), ("ours",))[0]["ours"]
                if value
                else middle
            )
            rows.append(
                {
                    key: value or getattr(arguments, key),
                    **{part: statistics.median(seconds[part]) for part in PARTS},
                }
            )
            print(
                f"{key:<10} {rows[-1][key] or 'as it is':>8}: "
                + ", ".join(f"{part} {rows[-1][part]:.1f} s" for part in PARTS),
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        help="SFT run to go on from (default: the embedded model with a fresh LoRA)",
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=130, help="length of every completion")
    parser.add_argument(
        "--prompt",
        type=int,
        default=0,
        help="stretch or cut every prompt to about so many tokens (0: as they are)",
    )
    parser.add_argument(
        "--sweep", action="store_true", help="also measure other group sizes and lengths (minutes)"
    )
    parser.add_argument("--only", choices=("ours", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if arguments.only:
        child(arguments)
        return
    seconds, peaks = race(arguments)
    k.start(k.CommonOptions(), k.EMBEDDED)
    work = Work(arguments)
    prompt = statistics.mean(len(work.renderer.prompt(d)) for d in work.dialogues)
    completions = arguments.group_size * arguments.tokens
    least = floor(
        {
            "prompt": prompt,
            "completions": completions,
            "decodes": arguments.tokens,
            "judge": 200 + arguments.group_size * 100,
        },
        134_515_008,
    )
    least["step"] = sum(least[part] for part in PARTS[:3])
    figures = {
        "machine": describe_machine(),
        "group_size": arguments.group_size,
        "tokens": arguments.tokens,
        "prompt": prompt,
        "steps": arguments.steps,
        "seconds": seconds,
        "peak_gb": peaks,
        "floor": least,
    }
    print(
        f"{arguments.group_size} answers x {arguments.tokens} tokens after prompts of {prompt:.0f}, five criteria, {arguments.steps} steps each, {describe_machine()}"
    )
    print(f"{'':<8} {'ours':>8} {'TRL':>8} {'ratio':>7} {'(steps from - to)':>19} {'floor':>7}")
    for part in PARTS:
        ours, plain = (statistics.median(seconds[name][part]) for name in ("ours", "plain"))
        ratios = sorted(b / a for a, b in zip(seconds["ours"][part], seconds["plain"][part]))
        print(
            f"{part:<8} {ours:>7.2f}s {plain:>7.2f}s {statistics.median(ratios):>6.1f}x {ratios[0]:>11.1f} - {ratios[-1]:<5.1f} {least[part]:>6.2f}s"
        )
    print(
        f"floor at {least['flops'] / 1e9:,.0f} GFLOP/s and {least['bytes_per_second'] / 1e9:.1f} GB/s, measured here"
    )
    print(
        f"peak memory: ours {peaks['ours']:.1f} GB, TRL {peaks['plain']:.1f} GB (each with all its processes)"
    )
    if arguments.sweep:
        figures["sweep"] = sweep(arguments, seconds["ours"])
    if arguments.json:
        write_json(arguments.json, json.loads(json.dumps(figures)))


if __name__ == "__main__":
    main()
