"""Let a bigger judge teach a small one: its readings of your replies become soft targets for pairs of them.

A 7B model reads a reply well and slowly. Its raw numbers t of two replies of one conversation (`likert`, or
`ask` for a teacher below 1B parameters) give the probability that the first is the better one,

    p = sigmoid(SHARPNESS (t_1 - t_2) / s),     s the standard deviation of the criterion's t

and `judge train` moves the small judge's margins towards it: distillation (arXiv 1503.02531) in the pairwise
form of train.py's loss. Readings are kept in the cache as they are made.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

from kardia.core import machine
from kardia.core.console import UserError, progress, say
from kardia.core.files import (
    as_json_lines,
    cache_directory,
    digest,
    file_hash,
    file_lock,
    json_lines,
    write_text,
)
from kardia.core.run_directory import Run
from kardia.data.rows import find_span
from kardia.data.rubric import Rubric, check_same_format
from kardia.judge.exam import READING_VERSION
from kardia.judge.judge import BIG, Judge, JudgedReply
from kardia.judge.replies import read_replies
from kardia.llama.sampling import sigmoid
from kardia.llama.worker import Worker

SHARPNESS = 2.0  # two replies one deviation apart: p = 0.88
SAME = 0.25  # deviations below which the teacher sees no difference worth teaching
MOST = 3  # pairs per conversation and criterion: a prompt drawn 50 times must not outweigh the rest
AT_ONCE = 8  # replies whose readings an interruption may cost
HELD_OUT = 8  # one conversation in so many is kept for the test
Readings = list[tuple[JudgedReply, dict[str, float]]]  # a reply and {criterion: the teacher's raw number}


def load_replies(paths: list[Path], rubric: Rubric) -> list[JudgedReply]:
    """Return the replies of files (rows as `judge score` takes them) and of GRPO runs, each once.

    Raises UserError for a row that is neither, and if no conversation has two replies.
    """
    replies: dict[JudgedReply, None] = {}
    for path in paths:
        if path.is_dir() and (path / "run.json").is_file():
            check_same_format(path, Run(path).facts, rubric.form)
        rows, read = read_replies(path / "completions.jsonl" if path.is_dir() else path, rubric.form)
        # An answer without a reply is the format's business.
        kept = ("completion" not in row or find_span(row["completion"], rubric.form.reply) for row in rows)
        replies |= dict.fromkeys(itertools.compress(read, kept))
    if sum(len(group) > 1 for group in _by_context(replies)) < 2:
        found = f"{len(replies)} different replies, and not two conversations with two of them"
        rule = "a teacher compares replies of one conversation, and one conversation is held out"
        raise UserError(f"{', '.join(map(str, paths))}: {found}; {rule}")
    return list(replies)


def _by_context(replies) -> list[list[JudgedReply]]:
    groups: dict[str, list[JudgedReply]] = {}
    for reply in replies:
        groups.setdefault(reply.context, []).append(reply)
    return list(groups.values())


def read_by_teacher(worker: Worker, teacher: Path, replies: list[JudgedReply], rubric: Rubric) -> Readings:
    """Return what the teacher makes of each reply that it can read; nothing is read twice."""
    judge = Judge(worker, teacher, rubric, gpu_layers=-1)
    if machine.has_gpu() and not judge.info["gpu"]:
        say("  the teacher runs on the CPU: `doctor` says why")
    method = "likert" if judge.info["n_params"] >= BIG else "ask"
    asked = [(c, method) for c in rubric.criteria if c.taught]
    key = f"{file_hash(teacher)}-{rubric.hash}-{method}-v{READING_VERSION}"
    kept = cache_directory() / f"teacher-{digest(key.encode())}.jsonl"
    with file_lock(kept):
        known: dict[str, dict[str, float]] = {}
        for _, row, _ in json_lines(kept, strict=False) if kept.is_file() else ():
            if isinstance(row, dict) and row.keys() == {"reply", "numbers"}:
                known[row["reply"]] = row["numbers"]
        # A line that a kill cut short goes: what is added must begin a line of its own.
        write_text(kept, as_json_lines([{"reply": name, "numbers": known[name]} for name in known]))
        groups = _by_context([reply for reply in replies if _name(reply) not in known])
        total = sum(map(len, groups))
        say(f"the teacher {teacher.name} reads {total} replies by {method}; {len(replies) - total} are known")
        with progress("replies", total) as on_progress, open(kept, "a", encoding="utf-8") as file:
            done = 0
            batches = [group[i : i + AT_ONCE] for group in groups for i in range(0, len(group), AT_ONCE)]
            for group in batches:  # of one conversation: its context is decoded once for them
                for reply, row in zip(group, judge.numbers(group, asked, guarded=False)):
                    numbers = {name: raw for (name, _), raw in row.items() if raw is not None}
                    known[_name(reply)] = numbers
                    file.write(json.dumps({"reply": _name(reply), "numbers": numbers}) + "\n")
                file.flush()
                done += len(group)
                on_progress(done)
    return [(reply, known[_name(reply)]) for reply in replies if known[_name(reply)]]


def _name(reply: JudgedReply) -> str:
    return digest(f"{reply.context}\0{reply.reply}".encode())


def soft_pairs(readings: Readings, seed: int) -> tuple[list[dict], list[dict]]:
    """Return (pairs to learn from, pairs to test on): exam rows with `target`, the p of the better one.

    No conversation stands in both. Raises UserError if the teacher sees no difference anywhere.
    """
    import numpy as np

    rng = random.Random(seed)
    by_context: dict[str, Readings] = {}
    for reply, numbers in readings:
        by_context.setdefault(reply.context, []).append((reply, numbers))
    contexts = sorted(by_context)
    rng.shuffle(contexts)
    learn, test = [], []
    for name in sorted({name for _, numbers in readings for name in numbers}):
        scale = float(np.std([numbers[name] for _, numbers in readings if name in numbers]))
        for place, context in enumerate(contexts):
            both = itertools.permutations([entry for entry in by_context[context] if name in entry[1]], 2)
            apart = [(a, b, (a[1][name] - b[1][name]) / scale) for a, b in both] if scale else []
            apart = [pair for pair in apart if pair[2] >= SAME]
            kept = test if place % HELD_OUT == 0 else learn
            for (better, _), (worse, _), gap in rng.sample(apart, min(MOST, len(apart))):
                kept.append(_pair(name, better, worse.reply) | {"target": sigmoid(SHARPNESS * gap)})
    if not learn or not test:
        few = f"{len(learn)} pairs to learn from and {len(test)} to test on"
        raise UserError(f"the teacher tells too few replies apart ({few}); more conversations are needed")
    return learn, test


def _pair(criterion: str, better: JudgedReply, worse: str) -> dict[str, Any]:
    messages = [{"role": role, "content": text} for role, text in better.messages]
    facts = {"criterion": criterion, "person": better.person, "situation": better.situation}
    return {**facts, "messages": messages, "better": better.reply, "worse": worse}
