"""Measure scores per second: the judge that is read against two judges that write, on the same work, in turn.

    python tests/bench_judge.py [--prompts 12] [--replies 8] [--json FILE]

Work: for each prompt (an exam dialogue) a group of replies, five criteria each. Three ways:

    ours   Judge.numbers: context once, each reply once, a branch per criterion; nothing is generated
    chat   llama-cpp-python's create_chat_completion, one call per reply and criterion, the answer a digit
    json   create_chat_completion with a JSON schema (GBNF underneath), one call per reply, five digits

All read the same GGUF with the same threads. The changing part of the prompts of the plain ways stands last,
so that `Llama` reuses the tokens of the call before.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

# As our worker has it; it doubles the speed of the plain ways.
os.environ.setdefault("OMP_WAIT_POLICY", "active")
os.environ.setdefault("GOMP_SPINCOUNT", "1000000")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kardia.core.files import write_json
from kardia.core.machine import default_threads, describe_machine
from kardia.core.options import DATA, PROJECT
from kardia.data.rubric import Rubric, load_rubric
from kardia.judge.exam import load_pairs
from kardia.judge.judge import Judge, JudgedReply, resolve_judge
from kardia.llama.worker import Worker
from kardia.models.base import EMBEDDED


def groups_of(rubric: Rubric, prompts: int, replies: int) -> list[list[JudgedReply]]:
    """Return groups that share a context: a pair's own two replies, filled up with those of others."""
    pairs = load_pairs(DATA / "judge_exam.jsonl", [c.name for c in rubric.criteria])
    pairs = pairs[:: max(1, len(pairs) // prompts)][:prompts]  # spread over all criteria
    texts = [pair[key] for pair in pairs for key in ("better", "worse")]
    groups = []
    for i, pair in enumerate(pairs):
        others = [texts[(7 * i + 3 * j) % len(texts)] for j in range(replies)]
        own = [pair["better"], pair["worse"], *others][:replies]
        groups.append([JudgedReply.from_pair({**pair, "reply": reply}, "reply") for reply in own])
    return groups


class Chat:
    """A judge that writes: one completion per reply and criterion."""

    def __init__(self, llama, rubric: Rubric) -> None:
        self.llama, self.names, self.unread = llama, [c.name for c in rubric.criteria], []
        listed = "\n".join(f"- {c.name}: {c.description}" for c in rubric.criteria)
        self.task = f"You grade replies of a listener from 1 (bad) to 5 (good) on these criteria:\n{listed}"

    def __call__(self, replies: list[JudgedReply]) -> None:
        for reply in replies:
            grades = self.ask(f"{self.task}\n\n{reply.context}\n\nReply to grade: {reply.reply}\n\n")
            self.unread += [str(grades.get(name)) not in list("12345") for name in self.names]

    def write(self, message: str, **more) -> str:
        turns = [{"role": "user", "content": message}]
        answer = self.llama.create_chat_completion(turns, temperature=0.0, **more)
        return answer["choices"][0]["message"]["content"].strip()

    def ask(self, prompt: str) -> dict:
        """Return the grades of one reply as they were written."""
        form = "Answer with one number from 1 to 5 for {}, nothing else."
        written = {name: self.write(prompt + form.format(name), max_tokens=4) for name in self.names}
        return {name: text[:1] for name, text in written.items() if not text[1:2].isdigit()}


class Json(Chat):
    """A judge that writes: one grammar-constrained completion per reply."""

    def ask(self, prompt: str) -> dict:
        grades = {name: {"type": "integer", "minimum": 1, "maximum": 5} for name in self.names}
        schema = {"type": "object", "properties": grades, "required": self.names}
        form = {"max_tokens": 96, "response_format": {"type": "json_object", "schema": schema}}
        try:
            return json.loads(self.write(f"{prompt}Answer with a JSON object of the five numbers.", **form))
        except ValueError:
            return {}


class Ours:
    """The judge that is read."""

    def __init__(self, judge: Judge) -> None:
        self.judge, self.unread = judge, []
        self.wanted = [(c, judge.chosen(c)) for c in judge.rubric.criteria]

    def __call__(self, replies: list[JudgedReply]) -> None:
        for row in self.judge.numbers(replies, self.wanted, guarded=False):
            self.unread += [value is None for value in row.values()]


def measure(ways: dict, llama, groups: list) -> dict[str, list[float]]:
    """Return the seconds per prompt of each way."""
    for way in ways.values():
        way(groups[0][:1])  # warm up: allocations, kernels
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number, group in enumerate(groups, 1):
        for name, way in ways.items():
            llama.reset()  # no plain way starts from what the other has just read
            began = time.perf_counter()
            way(group)
            seconds[name].append(time.perf_counter() - began)
        times = ", ".join(f"{name} {taken[-1]:.2f} s" for name, taken in seconds.items())
        print(f"prompt {number}/{len(groups)}: {times}", file=sys.stderr, flush=True)
    return seconds


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--judge", default=EMBEDDED, help="a .gguf file")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--replies", type=int, default=8)
    parser.add_argument("--gpu-layers", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    import llama_cpp

    rubric, path, threads = (
        load_rubric(PROJECT / "rubrics.yaml"),
        resolve_judge(given.judge),
        default_threads(),
    )
    groups, criteria = groups_of(rubric, given.prompts, given.replies), len(rubric.criteria)
    # Without llama-cpp-python's cache objects: its in-context prefix matching is on by default, and faster.
    sizes = {
        "n_ctx": 2048,
        "n_threads": threads,
        "n_threads_batch": threads,
        "n_gpu_layers": given.gpu_layers,
    }
    llama = llama_cpp.Llama(str(path), verbose=False, **sizes)
    with Worker() as worker:
        judge = Judge(worker, path, rubric, given.gpu_layers)
        ways = {"ours": Ours(judge), "chat": Chat(llama, rubric), "json": Json(llama, rubric)}
        seconds = measure(ways, llama, groups)
    size = f"{len(groups)} prompts x {given.replies} replies x {criteria} criteria"
    print(f"{size}, {path.name}, {describe_machine()}")
    print(f"{'way':<6} {'s/prompt':>9} {'scores/s':>9} {'(from - to)':>21} {'unread':>8} {'ours is':>9}")
    figures = {"machine": describe_machine(), "judge": path.name, "work": size, "ways": {}}
    for name, times in seconds.items():
        rates, unread = [given.replies * criteria / t for t in times], statistics.mean(ways[name].unread)
        median, rate = statistics.median(times), statistics.median(rates)
        ratio = statistics.median(t / o for t, o in zip(times, seconds["ours"]))
        row = {"seconds": median, "scores_per_second": rate, "low": min(rates), "high": max(rates)}
        figures["ways"][name] = {**row, "unread": unread, "ratio_to_ours": ratio}
        spread = f"{min(rates):>12.1f} - {max(rates):<6.1f} {unread:>8.0%} {ratio:>8.1f}x"
        print(f"{name:<6} {median:>9.2f} {rate:>9.1f} {spread}")
    if given.json:
        write_json(given.json, figures)


if __name__ == "__main__":
    main()
