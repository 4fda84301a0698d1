"""Measure a GRPO step, ours against plain TRL: the same model, prompts, seed, group, lengths and criteria.

    python tests/bench_grpo.py [--from RUN] [--steps 3] [--sweep] [--json FILE]

Each trainer has a process of its own (in one process the thread pools of torch and two llama.cpps slow each
other) and they take turns, one step each. The first step is not counted. Timed:

    rollout   trainer._generate: ours llama.cpp with the LoRA swapped in, TRL's transformers `generate`
    judge     trainer._calculate_rewards: ours log-probs of branches, TRL's a JSON completion per reply
    update    the rest of the step: ours one row with a shared prompt, TRL's own path with a row per answer

The baseline is TRL as its documentation shows it, at its best here: bfloat16 where the machine multiplies it,
the whole group in one batch, key-value cache on, the judge's changing text last for llama-cpp-python's prefix
matching. Every completion has exactly --tokens tokens, and the judge reads the last 30 words of each.

The floor is the arithmetic at the matmul and memory rates measured here, with perfect reuse of the prompt:
weights read once per decoded token, 2 x parameters FLOPs per token forward, 4 x per token trained (the base
is frozen: its backward pass needs the gradient of the activations only).
"""

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

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import kardia_lite as k
from kardia.cli.process import configure_process
from kardia.core.files import write_json
from kardia.core.machine import PeakSampler, compute_dtype, default_threads, describe_machine
from kardia.core.options import PROJECT
from kardia.judge.judge import resolve_judge
from kardia.models.base import load_into_worker

PARTS = ("rollout", "judge", "update", "step")
PARAMETERS = 134_515_008  # of the embedded model


class Work:
    """Hold what both trainers share: base, adapter, prompts, rubric, options."""

    def __init__(self, given, **options) -> None:
        self.run = k.Run(given.source) if given.source else None
        embedded = self.run is None
        self.base = k.resolve_base(k.EMBEDDED) if embedded else k.base_of_run(self.run.facts, self.run.path)
        self.rubric = k.load_rubric(PROJECT / "rubrics.yaml")
        self.renderer = k.Renderer(k.load_tokenizer(self.base))
        self.dialogues = k.load_rows([k.DATA / "prompts.jsonl"], self.rubric, "prompt")
        random.Random(0).shuffle(self.dialogues)
        if getattr(given, "prompt", 0):
            self.dialogues = [self.stretched(dialogue, given.prompt) for dialogue in self.dialogues[:8]]
        self.options = k.GRPOOptions(
            group_size=given.group_size, max_tokens=given.tokens, redraw=0, **options
        )
        self.folder = Path(tempfile.mkdtemp(prefix="bench-grpo-"))

    def stretched(self, dialogue, tokens: int):
        """Return a dialogue with a prompt of about `tokens` tokens: its situation is repeated or cut."""
        bare = dataclasses.replace(dialogue, person="-", situation="-")
        missing = max(1, tokens - len(self.renderer.prompt(bare)))
        text = f"{dialogue.situation} {dialogue.person} " * (1 + missing // 20)
        situation = self.renderer.tokenizer.decode(self.renderer.ids(text)[:missing])
        return dataclasses.replace(bare, situation=situation)

    def replies(self, completions, index) -> list:
        """Return the last 30 words of every completion as a reply in its dialogue."""
        texts = [k.DEFAULT_FORMAT.marker.sub(" ", completion[0]["content"]) for completion in completions]
        last = [" ".join(text.split()[-30:]) for text in texts]
        return [k.JudgedReply.from_dialogue(self.dialogues[i], text) for i, text in zip(index, last)]

    def trainer(self, trainer_class, reward, rollouts, **config):
        """Return a trainer of the class on a new policy; rollouts: a `Rollouts`, or None for TRL's own."""
        from datasets import Dataset
        from transformers import PrinterCallback

        prompts = k.Rollouts(None, self.renderer, self.dialogues, self.options, None, None, None, None, None)
        config |= {"shuffle_dataset": False, "save_strategy": "no"}
        folder, group = self.folder / "trainer", self.options.group_size
        adapter = self.run.adapter if self.run else None
        trainer = trainer_class(
            model=k.load_policy(self.base, "transformers", 16, adapter=adapter),
            reward_funcs=reward,
            args=k.plan.grpo_config(self.options, folder, 16, group, [1.0], **config),
            train_dataset=Dataset.from_list(prompts.prompts()),
            processing_class=k.load_tokenizer(self.base),
            rollout_func=rollouts,
        )
        trainer.create_model_card = lambda *_, **__: None
        trainer.remove_callback(PrinterCallback)  # stdout is for our own lines
        return trainer

    def ours(self, worker, reward, sample_group):
        """Return our trainer with llama.cpp behind it."""
        load_into_worker(worker, self.base.gguf(16))
        parts = (worker, self.renderer, self.dialogues, self.options, self.rubric, None, self.base)
        rollouts = k.Rollouts(*parts, sample_group, k.score_answers)
        rollouts.lora_gguf = self.folder / "lora.gguf"
        parts = {"answer_logps": k.answer_logps, "advantages": k.grpo_advantages, "grpo_loss": k.grpo_loss}
        trainer_class = k.trainers.trainer_class(k.trainers.GRPOHooks, **parts)
        trainer = self.trainer(trainer_class, reward, rollouts)
        unpacked_reason = k.trainers.enable_packed_rows("transformers", trainer.model)
        trainer.set_passes(unpacked_reason, self.options.group_size)
        return trainer


def endless_answers(worker, prompts, trainer, options, seeds, on_progress):
    """Return what kardia_lite.sample_group returns, but no token ends an answer."""
    sizes = {"group": trainer.num_generations, "max_tokens": trainer.max_completion_length}
    sampling = {name: getattr(options, name) for name in ("temperature", "top_p", "min_p")}
    return worker.rollout(prompts, seeds=seeds, stop=[], on_progress=on_progress, **sizes, **sampling)


def make_ours(work: Work, worker):
    judge = k.Judge(worker, resolve_judge(k.EMBEDDED), work.rubric)
    wanted = [(c, judge.chosen(c)) for c in work.rubric.criteria]

    def reward(prompts, completions, index, **_):
        # Without guards: no reply is refused unread.
        rows = judge.numbers(work.replies(completions, index), wanted, guarded=False)
        return [sum(row.values()) for row in rows]

    return work.ours(worker, reward, endless_answers)


def make_plain(work: Work):
    import llama_cpp
    from bench_judge import Json
    from trl import GRPOTrainer

    path, threads = str(resolve_judge(k.EMBEDDED)), default_threads()
    llama = llama_cpp.Llama(path, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)
    judge = Json(llama, work.rubric)

    def reward(prompts, completions, index, **_):
        replies = work.replies(completions, index)
        judge(replies)
        # Only the time counts here; some spread keeps the update whole.
        return [random.Random(reply.reply).random() for reply in replies]

    exact = {"min_new_tokens": work.options.max_tokens}
    return work.trainer(GRPOTrainer, reward, None, generation_kwargs=exact)


def clock(trainer) -> None:
    """Begin a step when a line comes on stdin, and report the time of its parts as a JSON line on stdout."""
    from transformers import TrainerCallback

    part = {"rollout": 0.0, "judge": 0.0}

    def timed(method: str, label: str) -> None:
        original = getattr(trainer, method)

        def call(*arguments, **more):
            began = time.perf_counter()
            result = original(*arguments, **more)
            part[label] = time.perf_counter() - began
            return result

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
            update = step - part["rollout"] - part["judge"]
            print(json.dumps({**part, "update": update, "step": step}), flush=True)

    trainer.add_callback(Clock())


def child(given) -> None:
    """Run one trainer alone in this process: steps on request, then its peak memory."""
    with PeakSampler() as sampler, k.Worker() as worker:
        work = Work(given, steps=given.steps + 1, learning_rate=2e-5)
        trainer = make_ours(work, worker) if given.only == "ours" else make_plain(work)
        clock(trainer)
        trainer.train()
    print(json.dumps({"peak_gb": sampler.peak}), flush=True)


def shown(times: dict[str, float], digits: int) -> str:
    return ", ".join(f"{part} {times[part]:.{digits}f} s" for part in PARTS)


def race(given, names=("ours", "plain")) -> tuple[dict[str, dict[str, list[float]]], dict[str, float]]:
    """Let the trainers take a step each in turn. Return (seconds per trainer, part and step; peak GB)."""
    sizes = f"--steps {given.steps} --group-size {given.group_size} --tokens {given.tokens}"
    command = [sys.executable, __file__, *sizes.split(), "--prompt", str(given.prompt)]
    command += ["--from", str(given.source)] if given.source else []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    children = {name: subprocess.Popen([*command, "--only", name], **pipes) for name in names}
    seconds: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in names}
    try:
        for step in range(given.steps + 1):
            for name, process in children.items():
                os.killpg(process.pid, signal.SIGCONT)
                process.stdin.write("go\n")
                process.stdin.flush()
                line = process.stdout.readline()
                if not line:
                    raise SystemExit(f"{name} ended with exit code {process.wait()}")
                if step < given.steps:
                    os.killpg(process.pid, signal.SIGSTOP)  # threads that still spin would slow the other one
                times = json.loads(line)
                print(f"{name:<6} step {step + 1}: {shown(times, 2)}", file=sys.stderr, flush=True)
                if step:  # the first one allocates, compiles kernels, fills caches
                    for part in PARTS:
                        seconds[name][part].append(times[part])
        peaks = {name: json.loads(process.stdout.readline())["peak_gb"] for name, process in children.items()}
    finally:
        for process in children.values():
            os.killpg(process.pid, signal.SIGKILL)
    return seconds, peaks


def timed_seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def floor(prompt: float, group: int, tokens: int) -> dict[str, float]:
    """Return seconds per part if only the arithmetic counted, at the rates measured here and now."""
    import torch

    rows, inner, outer = 2048, 576, 1536  # the shapes of this model's layers
    a, b = torch.randn(rows, inner, dtype=compute_dtype()), torch.randn(inner, outer, dtype=compute_dtype())
    matmuls = min(timed_seconds(lambda: [a @ b for _ in range(50)]) for _ in range(3))
    rate = 2 * rows * inner * outer * 50 / matmuls
    block = torch.ones(64 << 20)  # 256 MB of float32, far more than any cache
    bandwidth = (256 << 20) / min(timed_seconds(block.sum) for _ in range(3))
    read, judged = prompt + group * tokens, 200 + group * 100  # tokens
    rollout = 2 * PARAMETERS * read / rate + tokens * 2 * PARAMETERS / bandwidth
    parts = {
        "rollout": rollout,
        "judge": 2 * PARAMETERS * judged / rate,
        "update": 4 * PARAMETERS * read / rate,
    }
    return {"flops": rate, "bytes_per_second": bandwidth, **parts, "step": sum(parts.values())}


def sweep(given, middle: dict[str, list[float]]) -> list[dict]:
    """Measure how our cost grows with the group, the prompt and the answers: medians of two steps each.

    middle: our seconds of the race that was run already.
    """
    rows = []
    for key, values in (("group_size", (4, 0, 16)), ("prompt", (150, 0, 600)), ("tokens", (65, 0, 260))):
        for value in values:
            changed = argparse.Namespace(**{**vars(given), key: value, "steps": 2})
            seconds = race(changed, ("ours",))[0]["ours"] if value else middle
            medians = {part: statistics.median(seconds[part]) for part in PARTS}
            rows.append({key: value or getattr(given, key), **medians})
            print(f"{key:<10} {rows[-1][key] or 'as it is':>8}: {shown(medians, 1)}", flush=True)
    return rows


def print_table(seconds, peaks, least) -> None:
    print(f"{'':<8} {'ours':>8} {'TRL':>8} {'ratio':>7} {'(steps from - to)':>19} {'floor':>7}")
    for part in PARTS:
        ours, plain = (statistics.median(seconds[name][part]) for name in ("ours", "plain"))
        ratios = sorted(b / a for a, b in zip(seconds["ours"][part], seconds["plain"][part]))
        ratio = f"{statistics.median(ratios):>6.1f}x {ratios[0]:>11.1f} - {ratios[-1]:<5.1f}"
        print(f"{part:<8} {ours:>7.2f}s {plain:>7.2f}s {ratio} {least[part]:>6.2f}s")
    rate, bandwidth = least["flops"] / 1e9, least["bytes_per_second"] / 1e9
    print(f"floor at {rate:,.0f} GFLOP/s and {bandwidth:.1f} GB/s, measured here")
    ours, plain = peaks["ours"], peaks["plain"]
    print(f"peak memory: ours {ours:.1f} GB, TRL {plain:.1f} GB (each with all its processes)")


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    start = "SFT run to go on from (default: the embedded model with a new LoRA)"
    parser.add_argument("--from", dest="source", type=Path, help=start)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=130, help="length of every completion")
    stretch = "stretch or cut every prompt to about so many tokens (0: as they are)"
    parser.add_argument("--prompt", type=int, default=0, help=stretch)
    parser.add_argument("--sweep", action="store_true", help="also measure other sizes (minutes)")
    parser.add_argument("--only", choices=("ours", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    configure_process(False, k.EMBEDDED)
    if given.only:
        child(given)
        return
    seconds, peaks = race(given)
    work = Work(given)
    prompt = statistics.mean(len(work.renderer.prompt(dialogue)) for dialogue in work.dialogues)
    least = floor(prompt, given.group_size, given.tokens)
    figures = {"machine": describe_machine(), "prompt": prompt, "seconds": seconds, "peak_gb": peaks}
    figures |= {name: getattr(given, name) for name in ("group_size", "tokens", "steps")}
    what = f"{given.group_size} answers x {given.tokens} tokens after prompts of {prompt:.0f}, five criteria"
    print(f"{what}, {given.steps} steps each, {describe_machine()}")
    print_table(seconds, peaks, least)
    if given.sweep:
        figures["sweep"] = sweep(given, seconds["ours"])
    if given.json:
        write_json(given.json, {**figures, "floor": least})


if __name__ == "__main__":
    main()
