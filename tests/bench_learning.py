"""Does GRPO learn the same when it is faster? Ours against plain TRL from one adapter: the reward of every step, a few seeds each.

    python tests/bench_learning.py --from RUN [--steps 20] [--seeds 3] [--tokens 48] [--json FILE]

Everything but the machinery is shared: adapter, prompts and their order, group of 8, learning rate, loss, and a reward that
any model can follow within some steps and that needs no judge: the share of an answer's words that have at most four letters.
Ours rolls out with llama.cpp and updates packed rows; TRL uses `generate` and padded ones. They draw different answers
(different random numbers), so curves agree only within their intervals: 95 %, by Student's t, over the steps of a quarter
and all seeds; the difference is paired by seed and step, since both get the same prompt there.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_grpo import Work

import kardia_lite as k
from kardia.core.files import write_json
from kardia.core.machine import describe_machine
from kardia.llama.worker import Worker

T95 = {
    4: 2.78,
    9: 2.26,
    14: 2.14,
    19: 2.09,
    24: 2.06,
    29: 2.05,
    59: 2.0,
}  # Student's t, two-sided, by degrees of freedom


def short_words(prompts, completions, **_) -> list[float]:
    words = [re.findall(r"[A-Za-z]+", completion[0]["content"]) for completion in completions]
    return [sum(len(word) <= 4 for word in found) / len(found) if found else 0.0 for found in words]


def child(arguments) -> None:
    """One trainer, one seed: the mean reward of every step as a JSON list on stdout."""
    from transformers import PrinterCallback
    from trl import GRPOTrainer

    k.start(k.CommonOptions(), k.EMBEDDED)
    with Worker() as worker:
        work = Work(arguments)
        random.Random(arguments.seed).shuffle(work.dialogues)
        work.options.seed, work.options.steps, work.options.learning_rate = (
            arguments.seed,
            arguments.steps,
            2e-4,
        )
        if arguments.only == "ours":
            k.load_for_rollouts(worker, work.base.gguf(16))
            work.folder.joinpath("ours").mkdir()
            run = type("Folder", (), {"path": work.folder / "ours", "append": lambda *_: None})()
            rollouts = k.Rollouts(
                worker,
                work.renderer,
                work.dialogues,
                work.options,
                work.rubric,
                None,
                work.base,
                run,
                k.recorder.Board("bench"),
            )
            trainer = work.trainer(
                k.make_grpo_trainer_class(), "ours", short_words, "llama", rollout_func=rollouts
            )
        else:
            trainer = work.trainer(GRPOTrainer, "plain", short_words, "hf")
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    print(
        json.dumps([entry["reward"] for entry in trainer.state.log_history if "reward" in entry]), flush=True
    )


def interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high), 95 %."""
    mean = statistics.mean(values)
    freedom = len(values) - 1
    half = (
        T95[max((f for f in T95 if f <= freedom), default=4)] * statistics.stdev(values) / len(values) ** 0.5
    )
    return mean, mean - half, mean + half


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="source", type=Path, required=True, help="SFT run to go on from")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--only", choices=("ours", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the curves to this file")
    arguments = parser.parse_args()
    if arguments.only:
        child(arguments)
        return
    curves: dict[str, list[list[float]]] = {"ours": [], "plain": []}
    for seed in range(arguments.seeds):
        for name in curves:
            command = [
                sys.executable,
                __file__,
                "--from",
                str(arguments.source),
                "--steps",
                str(arguments.steps),
                "--tokens",
                str(arguments.tokens),
                "--group-size",
                str(arguments.group_size),
                "--only",
                name,
                "--seed",
                str(seed),
            ]
            curves[name].append(
                json.loads(
                    subprocess.run(
                        command, stdout=subprocess.PIPE, text=True, check=True
                    ).stdout.splitlines()[-1]
                )
            )
            print(
                f"{name:<6} seed {seed}: " + " ".join(f"{r:.2f}" for r in curves[name][-1]),
                file=sys.stderr,
                flush=True,
            )
    print(
        f"share of short words, {arguments.seeds} seeds x {arguments.steps} steps of 8 answers of up to {arguments.tokens} tokens, {describe_machine()}"
    )
    print(f"{'steps':<8} {'ours':>20} {'TRL':>20} {'ours - TRL':>24}")
    quarter = max(1, arguments.steps // 4)
    for start in range(0, arguments.steps, quarter):
        ours, plain = (
            [r for curve in curves[name] for r in curve[start : start + quarter]]
            for name in ("ours", "plain")
        )
        cells = [interval(values) for values in (ours, plain, [a - b for a, b in zip(ours, plain)])]
        shown = [f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in cells]
        print(
            f"{start + 1:>2} - {min(start + quarter, arguments.steps):<3} {shown[0]:>20} {shown[1]:>20} {shown[2]:>24}"
        )
    if arguments.json:
        write_json(arguments.json, {"machine": describe_machine(), "curves": curves})


if __name__ == "__main__":
    main()
