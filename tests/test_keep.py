"""A run is not lost: killed anywhere it goes on to the same adapter; bad checkpoints, full disks and second processes get one line."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import threading
import time

import pytest

import kardia_lite as k
from kardia.core import files
from kardia.training import checkpoints

HEAVY = [
    "torch",
    "trl",
    "peft",
    "datasets",
    "trl.trainer.sft_trainer",
    "trl.trainer.grpo_trainer",
    "bitsandbytes",
    "sqlite3",
    "kardia_lite",
]  # imported once, by the server that all victims are forked from
SFT = [
    "--limit",
    6,
    "--batch-size",
    2,
    "--max-length",
    900,
    "--max-steps",
    6,
    "--save-steps",
    2,
    "--learning-rate",
    "1e-2",
]
GRPO = [
    "--steps",
    6,
    "--group-size",
    4,
    "--micro-batch",
    2,
    "--max-tokens",
    16,
    "--save-steps",
    2,
    "--inspect-every",
    3,
    "--learning-rate",
    "1e-2",
    "--force-judge",
]


# ---------------------------------------------------------------------------------- victims


def readable(score):
    """A random model says nothing that could be judged: what it said becomes a number in a sentence, so that rewards differ and the
    judge has something to read."""

    def scores(answers, *rest, **more):
        said = [
            (
                dialogue,
                f"<|response_begin|>That sounds hard, tell me about all {sum(map(ord, text)) % 89} of them.<|response_end|>",
            )
            for dialogue, text in answers
        ]
        rewards = score(said, *rest, **more)
        for reward, (_, text) in zip(rewards, answers):
            reward.components["format"] = sum(map(ord, text)) % 5 / 4
        return rewards

    return scores


PLACES = {  # what is going on when the blow falls: where the function lives that does it
    "rollouts": lambda: (k.Worker, "rollout"),
    "judging": lambda: (k, "score_answers"),
    "update": lambda: (k.packed_rows.Pack, "logps"),
    "checkpoint": lambda: (files, "file_hash"),
    "sealing": lambda: (checkpoints, "to_disk"),
    "logging": lambda: (k.Run, "append"),
    "end": lambda: (checkpoints, "tidy"),
    "export": lambda: (k, "measure"),
    "writing": lambda: (k.export_formats.Exporter, "write"),
    "keeping": lambda: (k.export_formats.Exporter, "keep"),
    "importing": lambda: (k.gguf_files, "add_compatibility_keys"),
    "examining": lambda: (k.exam, "run_exam"),
    "copying": lambda: (k.gguf_files, "_finish"),
}


def victim(
    arguments, log, place=None, times=1, delay=0.0, anywhere=None, cache=None, clock=None, by=signal.SIGKILL
):
    """A process that runs a command and, if told so, is killed `delay` seconds after it came to `place` for the so-many-th time
    (or `anywhere`: so many seconds after its start) `by` a signal. `cache`: a cache of its own; `clock`: a seed for a clock that jumps."""
    if cache:
        os.environ["KARDIA_CACHE"] = str(cache)
    if clock is not None:
        jumps, now = random.Random(clock), time.time
        time.time = lambda: now() + jumps.uniform(-1e7, 1e7)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    k.score_answers = readable(k.score_answers)
    die = lambda: os.kill(os.getpid(), by)  # noqa: E731

    def later(seconds):
        timer = threading.Timer(seconds, die)
        timer.daemon = True  # a run that is through sooner is not kept waiting for its death
        timer.start() if seconds else die()

    if anywhere is not None:
        later(anywhere)
    if place:
        thing, name = PLACES[place]()
        function, count = getattr(thing, name), [0]

        def deadly(*a, **more):
            count[0] += 1
            if count[0] == times:
                later(delay)
            return function(*a, **more)

        setattr(thing, name, deadly)
    k.cli.main(
        [str(a) for a in arguments], standalone_mode=False
    ) if place is None and anywhere is None else k.cli.main([str(a) for a in arguments])


def spawn(arguments, log, target=victim, limit=300, **more):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    process = context.Process(target=target, args=(arguments, log), kwargs=more)
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        pytest.fail(f"a process hangs: {arguments}")
    return process.exitcode


def files_of(path):
    """The adapter's files, save that its configuration says where the base lies."""
    return {
        p.name: re.sub(rb'"base_model_name_or_path": "[^"]*"', b"", p.read_bytes())
        if p.suffix == ".json"
        else p.read_bytes()
        for p in sorted((path / "adapter").iterdir())
        if p.suffix in (".safetensors", ".json")
    }


def steps_of(run, name="log.jsonl"):
    """(step, group, sample) of every line; a torn one would not be read."""
    lines = (run / name).read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return [(row["step"], row.get("group"), row.get("sample")) for row in map(json.loads, lines)]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("keep")


@pytest.fixture(scope="module")
def whole(work, little, pairs):
    """The runs that nobody disturbed: what every killed one must end as."""
    for kind in ("sft", "grpo"):
        assert spawn(command(kind, work, little, pairs, work / kind), work / "log") == 0, (
            work / "log"
        ).read_text()
    return work


@pytest.fixture(scope="module")
def lasts(whole, little, pairs):
    """Seconds from the start of a process to its end, once everything is in the cache."""
    seconds = {}
    for kind in ("sft", "grpo"):
        began = time.monotonic()
        assert spawn(command(kind, whole, little, pairs, whole / f"{kind}-again"), whole / "log") == 0
        assert files_of(whole / f"{kind}-again") == files_of(whole / kind)
        seconds[kind] = time.monotonic() - began
    return seconds


def command(kind, whole, little, pairs, out):
    if kind == "sft":
        return ["sft", "--model", little, *SFT, "--out", out]
    return ["grpo", "--from", whole / "sft", "--judge", little, *GRPO, "--exam-pairs", pairs, "--out", out]


def kill_and_resume(kind, whole, little, pairs, out, blows, **last):
    """Kill a run again and again, then let it end; it must be the run that nobody killed."""
    asked, log, fell = command(kind, whole, little, pairs, out), out.with_suffix(".log"), []
    for n, blow in enumerate(blows):
        code = spawn([*asked, *["--resume"] * (n > 0)], log, **blow)
        assert code in (-signal.SIGKILL, 0), log.read_text()  # 0: it was through before the blow fell
        fell.append(
            len(steps_of(out))
            if code and (out / "log.jsonl").exists() and (out / "log.jsonl").read_bytes().endswith(b"\n")
            else 0
            if code
            else None
        )
    print(f"{out.name}: killed with so many steps in the log: {fell}")
    assert spawn([*asked, "--resume"], log, **last) == 0, log.read_text()
    assert files_of(out) == files_of(whole / kind)
    assert steps_of(out) == steps_of(whole / kind)
    if kind == "grpo":
        assert steps_of(out, "completions.jsonl") == steps_of(whole / kind, "completions.jsonl") and steps_of(
            out, "tokens.jsonl"
        ) == steps_of(whole / kind, "tokens.jsonl")
        a, b = (
            [
                {**json.loads(line), "time": 0}
                for line in (path / "completions.jsonl").read_text().splitlines()
            ]
            for path in (out, whole / kind)
        )
        assert a == b  # every answer, score, advantage and log-prob
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (whole / kind).iterdir()), (
        "something was left over"
    )
    return log.read_text()


TRIALS = [  # the fourth thing that is sealed, after three checkpoints, is the adapter itself
    ("sft", "update", 5, 0.3),
    ("sft", "update", 9, 0.1),
    ("sft", "checkpoint", 12, 0.0),
    ("sft", "sealing", 2, 0.0),
    ("sft", "sealing", 4, 0.0),
    ("sft", "logging", 4, 0.0),
    ("sft", "end", 1, 0.0),
    ("grpo", "rollouts", 2, 0.2),
    ("grpo", "rollouts", 5, 0.05),
    ("grpo", "judging", 3, 0.02),
    ("grpo", "update", 11, 0.05),
    ("grpo", "checkpoint", 14, 0.0),
    ("grpo", "sealing", 3, 0.0),
    ("grpo", "sealing", 4, 0.0),
    ("grpo", "logging", 8, 0.0),
    ("grpo", "end", 1, 0.0),
]


@pytest.mark.real
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL, forkserver")
@pytest.mark.parametrize(
    "kind, place, times, delay", TRIALS, ids=[f"{kind}-{place}-{times}" for kind, place, times, _ in TRIALS]
)
def test_killed_anywhere_it_goes_on_to_the_same_adapter(
    whole, little, pairs, work, kind, place, times, delay
):
    kill_and_resume(
        kind,
        whole,
        little,
        pairs,
        work / f"{kind}-{place}-{times}",
        [{"place": place, "times": times, "delay": delay}],
    )


@pytest.mark.real
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL, forkserver")
@pytest.mark.parametrize("seed", range(int(os.environ.get("KILLS", "6"))))
def test_killed_at_random_moments_and_more_than_once(whole, lasts, little, pairs, work, seed):
    """KILLS=40 for a long evening. The moments are drawn from the whole of a process's life, its start and its end included."""
    rng, kind = random.Random(seed), ("sft", "grpo")[seed % 2]
    kill_and_resume(
        kind,
        whole,
        little,
        pairs,
        work / f"random-{seed}",
        [{"anywhere": rng.uniform(0, lasts[kind])} for _ in range(rng.choice((1, 1, 2, 3)))],
    )


@pytest.mark.real
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL, forkserver")
def test_killed_while_the_base_is_imported_and_the_judge_examined(whole, little, pairs, work, cache):
    """With a cold cache: half an import, half a copy of the base, half an exam are simply done again. Only which attention was
    measured to be faster is taken over: measured anew it might be the other one, which rounds otherwise."""
    known, cache = list(cache.glob("attention-*.json")), work / "cold"
    cache.mkdir()
    for file in known:
        shutil.copy(file, cache)
    kill_and_resume(
        "sft", whole, little, pairs, work / "cold-sft", [{"place": "importing", "cache": cache}], cache=cache
    )
    kill_and_resume(
        "grpo",
        whole,
        little,
        pairs,
        work / "cold-grpo",
        [{"place": "examining", "delay": 0.3, "cache": cache}, {"place": "copying", "cache": cache}],
        cache=cache,
    )
    assert not [p for p in cache.iterdir() if p.name.endswith(".part")]


@pytest.mark.real
@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM, forkserver")
def test_sigterm_is_obeyed_like_ctrl_c(whole, little, work):
    """What batch systems send first: the step is finished and saved, though no checkpoint was due."""
    out = work / "term"
    assert (
        spawn(
            ["sft", "--model", little, *SFT, "--out", out],
            out.with_suffix(".log"),
            place="update",
            times=3,
            by=signal.SIGTERM,
        )
        == 1
    )
    assert "go on with the same command and --resume" in out.with_suffix(".log").read_text() and [
        p.name for p in checkpoints.checkpoints(k.Run(out))
    ] == ["checkpoint-1"]
    assert spawn(["sft", "--model", little, *SFT, "--out", out, "--resume"], out.with_suffix(".log")) == 0
    assert files_of(out) == files_of(whole / "sft") and steps_of(out) == steps_of(whole / "sft")


@pytest.mark.real
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL, forkserver")
def test_a_clock_that_jumps_changes_nothing(whole, little, pairs, work):
    kill_and_resume(
        "sft",
        whole,
        little,
        pairs,
        work / "clock",
        [{"place": "checkpoint", "times": 8, "clock": 1}],
        clock=2,
    )


@pytest.mark.real
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL, forkserver")
@pytest.mark.parametrize("place, times", [("writing", 2), ("export", 2), ("keeping", 3)])
def test_a_killed_export_goes_on_to_the_same_files(whole, work, place, times):
    def export(to, **blow):
        return spawn(
            ["export", whole / "sft", "--to", to, "--formats", "merged,f16,q8_0,lora", "--answers", 0],
            to.with_suffix(".log"),
            **blow,
        )

    def told(to):
        return {
            p.relative_to(to): p.read_bytes()
            for p in to.rglob("*")
            if p.is_file() and p.name != "export.json"
        }

    once, out = work / "export", work / f"export-{place}"
    if not once.exists():
        assert export(once) == 0, once.with_suffix(".log").read_text()
    assert export(out, place=place, times=times, delay=0.02) == -signal.SIGKILL
    assert export(out) == 0, out.with_suffix(".log").read_text()
    assert told(out) == told(once)  # nothing half-written, nothing hidden left
