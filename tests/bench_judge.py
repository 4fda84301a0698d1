"""Scores per second: the judge that is read against two judges that write, on the same work, in one run.

    python tests/bench_judge.py [--prompts 12] [--replies 8] [--json FILE]

Work: for each prompt (an exam dialogue) a group of replies, five criteria each. Three ways, interleaved prompt by prompt:

    ours   Judge.raw: context once, each reply once, a branch per criterion; one decode per reply, nothing is generated
    chat   llama-cpp-python's create_chat_completion, one call per reply and criterion, the answer a digit
    json   create_chat_completion with a JSON schema (GBNF underneath), one call per reply, five digits

All read the same GGUF with the same threads. The two plain ways are written as llama-cpp-python's documentation shows
them, with what they need to be fast: the changing part of the prompt stands last, so that `Llama` reuses the tokens it
has in common with the call before (its own prefix matching). Printed per way: median seconds per prompt, scores per
second with the spread of the prompts, the share of scores that could not be read from the text.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "active"
)  # what our worker has; doubles the decoding speed of the plain ways, too
os.environ.setdefault("GOMP_SPINCOUNT", "1000000")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kardia_lite as k
from kardia.core.files import write_json
from kardia.core.machine import default_threads, describe_machine
from kardia.judge import exam
from kardia.judge.judge import Judge, JudgedReply
from kardia.llama.worker import Worker


def work(rubric, prompts: int, replies: int) -> list[list[JudgedReply]]:
    """Groups of items that share a context: a pair's own two replies and others' to fill the group."""
    pairs = exam.load_pairs(k.DATA / "judge_exam.jsonl", [c.name for c in rubric.criteria])
    pairs = pairs[:: max(1, len(pairs) // prompts)][:prompts]  # spread over all criteria
    texts = [pair[key] for pair in pairs for key in ("better", "worse")]
    groups = []
    for i, pair in enumerate(pairs):
        turns = tuple((m["role"], m["content"]) for m in pair["messages"])
        own = [pair["better"], pair["worse"], *(texts[(7 * i + 3 * j) % len(texts)] for j in range(replies))]
        groups.append(
            [JudgedReply(pair["person"], pair["situation"], turns, reply) for reply in own[:replies]]
        )
    return groups


def instructions(item: JudgedReply, rubric) -> str:
    listed = "\n".join(f"- {c.name}: {c.description}" for c in rubric.criteria)
    return f"You grade replies of a listener from 1 (bad) to 5 (good) on these criteria:\n{listed}\n\n{item.context}\n\nReply to grade: {item.reply}\n\n"


class Chat:
    """One completion per reply and criterion."""

    def __init__(self, llama, rubric) -> None:
        self.llama, self.rubric, self.asked, self.failed = llama, rubric, 0, 0

    def __call__(self, items: list[JudgedReply]) -> None:
        for item in items:
            for criterion in self.rubric.criteria:
                message = f"{instructions(item, self.rubric)}Answer with one number from 1 to 5 for {criterion.name}, nothing else."
                answer = self.llama.create_chat_completion(
                    [{"role": "user", "content": message}], max_tokens=4, temperature=0.0
                )
                text = answer["choices"][0]["message"]["content"].strip()
                self.asked += 1
                self.failed += not (
                    text[:1].isdigit() and 1 <= int(text[:1]) <= 5 and not text[1:2].isdigit()
                )


class Json:
    """One grammar-constrained completion per reply."""

    def __init__(self, llama, rubric) -> None:
        names = [c.name for c in rubric.criteria]
        properties = {name: {"type": "integer", "minimum": 1, "maximum": 5} for name in names}
        self.format = {
            "type": "json_object",
            "schema": {"type": "object", "properties": properties, "required": names},
        }
        self.llama, self.rubric, self.names, self.asked, self.failed = llama, rubric, names, 0, 0

    def __call__(self, items: list[JudgedReply]) -> None:
        for item in items:
            message = f"{instructions(item, self.rubric)}Answer with a JSON object of the five numbers."
            answer = self.llama.create_chat_completion(
                [{"role": "user", "content": message}],
                max_tokens=96,
                temperature=0.0,
                response_format=self.format,
            )
            self.asked += len(self.names)
            try:
                values = json.loads(answer["choices"][0]["message"]["content"])
                self.failed += sum(
                    not isinstance(values.get(name), int) or not 1 <= values[name] <= 5 for name in self.names
                )
            except (ValueError, AttributeError):
                self.failed += len(self.names)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--judge", default=k.EMBEDDED, help="a .gguf file")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--replies", type=int, default=8)
    parser.add_argument("--gpu-layers", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    import llama_cpp

    rubric, path = k.load_rubric(k.HERE / "rubrics.yaml"), k.resolve_judge(arguments.judge)
    groups = work(rubric, arguments.prompts, arguments.replies)
    threads = default_threads()
    # without llama-cpp-python's own cache objects: its in-context prefix matching is on by default and the faster of the two
    llama = llama_cpp.Llama(
        str(path),
        n_ctx=2048,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=arguments.gpu_layers,
        verbose=False,
    )
    with Worker() as worker:
        judge = Judge(
            worker, path, rubric, arguments.gpu_layers, lora=k.resolve_judge_lora(arguments.judge, "auto")
        )
        wanted = [(c, judge.chosen(c)) for c in rubric.criteria]
        ways = {
            "ours": lambda items: judge.numbers(items, wanted, guarded=False),
            "chat": Chat(llama, rubric),
            "json": Json(llama, rubric),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for way in ways.values():
            way(groups[0][:1])  # warm up: allocations, kernels
        for name in ("chat", "json"):
            ways[name].asked = ways[name].failed = 0
        for number, group in enumerate(groups, 1):
            for name, way in ways.items():
                llama.reset()  # neither plain way starts from what the other has just read
                began = time.perf_counter()
                way(group)
                seconds[name].append(time.perf_counter() - began)
            print(
                f"prompt {number}/{len(groups)}: "
                + ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items()),
                file=sys.stderr,
                flush=True,
            )
        unread = {name: way.failed / way.asked for name, way in ways.items() if name != "ours"}
        numbers = [
            value
            for group in groups
            for row in judge.numbers(group, wanted, guarded=False)
            for value in row.values()
        ]
        unread["ours"] = sum(value is None for value in numbers) / len(numbers)
    scores = arguments.replies * len(rubric.criteria)
    figures = {
        "machine": describe_machine(),
        "judge": Path(path).name,
        "prompts": len(groups),
        "replies": arguments.replies,
        "criteria": len(rubric.criteria),
        "ways": {},
    }
    print(
        f"{len(groups)} prompts x {arguments.replies} replies x {len(rubric.criteria)} criteria, {path.name}, {describe_machine()}"
    )
    print(
        f"{'way':<6} {'s/prompt':>9} {'scores/s':>9} {'(prompts from - to)':>21} {'unread':>8} {'ours is':>9}"
    )
    for name, times in seconds.items():
        median, rates = statistics.median(times), sorted(scores / t for t in times)
        ratio = statistics.median(t / o for t, o in zip(times, seconds["ours"]))
        figures["ways"][name] = {
            "seconds": median,
            "scores_per_second": scores / median,
            "low": rates[0],
            "high": rates[-1],
            "unread": unread[name],
            "ratio_to_ours": ratio,
        }
        print(
            f"{name:<6} {median:>9.2f} {scores / median:>9.1f} {rates[0]:>12.1f} - {rates[-1]:<6.1f} {unread[name]:>8.0%} {'' if name == 'ours' else f'{ratio:.1f}x':>9}"
        )
    if arguments.json:
        write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
