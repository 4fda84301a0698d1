"""Measure whether GRPO learns the same when it is faster: ours against plain TRL from one adapter.

    python tests/bench_learning.py --from RUN [--steps 20] [--seeds 3] [--tokens 48] [--json FILE]

Everything but the machinery is shared: adapter, prompts and their order, group of 8, learning rate, loss, and
a reward that any model can follow within some steps and that needs no judge: the share of an answer's words
that have at most four letters. Ours rolls out with llama.cpp and updates packed rows; TRL uses `generate` and
padded ones. They draw different answers (other random numbers), so the curves agree only within their
intervals: 95%, by Student's t, over the steps of a quarter and all seeds. The difference is paired by seed
and step, since both get the same prompt there.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from bench_grpo import Work

import kardia_lite as k
from kardia.cli.process import configure_process
from kardia.core.files import write_json
from kardia.core.machine import describe_machine


def short_words(prompts, completions, **_) -> list[float]:
    """Return the share of short words of every completion."""
    texts = [re.findall(r"[A-Za-z]+", completion[0]["content"]) for completion in completions]
    return [sum(len(word) <= 4 for word in words) / max(1, len(words)) for words in texts]


def child(given) -> None:
    """Train one trainer with one seed. Print the mean reward of every step as a JSON list."""
    from trl import GRPOTrainer

    configure_process(False, k.EMBEDDED)
    with k.Worker() as worker:
        work = Work(given, seed=given.seed, steps=given.steps, learning_rate=2e-4)
        random.Random(given.seed).shuffle(work.dialogues)
        if given.only == "ours":
            trainer = work.ours(worker, short_words, k.sample_group)
        else:
            trainer = work.trainer(GRPOTrainer, short_words, None)
        trainer.train()
    print(json.dumps([row["reward"] for row in trainer.state.log_history if "reward" in row]), flush=True)


def interval(values: list[float]) -> str:
    """Return the mean with its 95% interval."""
    from scipy.stats import t

    mean, n = statistics.mean(values), len(values)
    half = t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5
    return f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--from", dest="source", type=Path, required=True, help="SFT run to go on from")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--only", choices=("ours", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the curves to this file")
    given = parser.parse_args()
    if given.only:
        child(given)
        return
    curves: dict[str, list[list[float]]] = {"ours": [], "plain": []}
    sizes = f"--steps {given.steps} --tokens {given.tokens} --group-size {given.group_size}"
    command = [sys.executable, __file__, "--from", str(given.source), *sizes.split()]
    for seed in range(given.seeds):
        for name, curve in curves.items():
            one = [*command, "--only", name, "--seed", str(seed)]
            output = subprocess.run(one, stdout=subprocess.PIPE, text=True, check=True).stdout
            curve.append(json.loads(output.splitlines()[-1]))
            rewards = " ".join(f"{reward:.2f}" for reward in curve[-1])
            print(f"{name:<6} seed {seed}: {rewards}", file=sys.stderr, flush=True)
    what = f"{given.steps} steps of {given.group_size} answers of up to {given.tokens} tokens"
    print(f"share of short words, {given.seeds} seeds x {what}, {describe_machine()}")
    print(f"{'steps':<8} {'ours':>24} {'TRL':>24} {'ours - TRL':>26}")
    quarter = max(1, given.steps // 4)
    for start in range(0, given.steps, quarter):
        end = min(start + quarter, given.steps)
        ours, plain = ([r for curve in curves[name] for r in curve[start:end]] for name in ("ours", "plain"))
        difference = interval([a - b for a, b in zip(ours, plain)])
        print(f"{start + 1:>2} - {end:<3} {interval(ours):>24} {interval(plain):>24} {difference:>26}")
    if given.json:
        write_json(given.json, {"machine": describe_machine(), "curves": curves})


if __name__ == "__main__":
    main()
