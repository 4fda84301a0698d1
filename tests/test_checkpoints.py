"""An interrupted or killed run ends, with --resume, at the adapter of an undisturbed run, bit for bit."""

import itertools
import json
import multiprocessing
import os
import pkgutil
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import lines_of, names_of, with_signal
from conftest import run as invoke

import kardia_lite as k
from kardia.core.options import PROJECT
from kardia.core.run_directory import Run
from kardia.training import checkpoints, recorder

SFT = "--limit 6 --batch-size 2 --max-length 900 --max-steps 6 --save-steps 2 --learning-rate 1e-2".split()
GRPO = "--steps 6 --group-size 4 --micro-batch 2 --max-tokens 16 --save-steps 2 --inspect-every 3"
GRPO += " --learning-rate 1e-2"
# Imported once, by the server that all victims are forked from.
PRELOADED = "torch trl peft datasets trl.trainer.sft_trainer trl.trainer.grpo_trainer kardia_lite".split()
OWN = """
def mine(row, answers):
    told = sum(map(ord, row["person"])) % 2
    return [told * sum(map(ord, answer)) % 89 / 89 for answer in answers]
"""
forks = pytest.mark.skipif(sys.platform == "win32", reason="timers that kill, forkserver")
KILLED = -14  # by SIGALRM


def refusal(line):
    """Return what a command line that fails prints."""
    result = invoke(line, ok=False)
    assert result.exit_code == 1, result.output
    return result.stderr


def files_of(run):
    """Return the bytes of the files of the adapter (and the best one), but for where the base lies.

    GGUFs are left out: whoever answers with a run writes one beside its adapter.
    """
    where = rb'"base_model_name_or_path": "[^"]*"'
    paths = [path for path in run.glob("**/adapter/*") if path.suffix != ".gguf"]
    return {str(path.relative_to(run)): re.sub(where, b"", path.read_bytes()) for path in paths}


def steps_of(run):
    """Return the step of every line. A torn line fails here."""
    return [row["step"] for row in lines_of(run / "log.jsonl")]


def short_rows(path, kind="dialogues", count=6):
    """Write the first rows of a data file with one short turn, so that a step takes a tenth of a second."""
    rows = lines_of(k.DATA / f"{kind}.jsonl")[:count]
    for row in rows:
        row |= {"person": row["person"][:20], "situation": row["situation"][:20]}
        row["messages"] = [{"role": "user", "content": row["messages"][0]["content"][:40]}]
        if kind == "dialogues":
            spans = dict(zip(k.DEFAULT_FORMAT.names, ["Lost.", "Ask.", row["emotion"], "Who?"]))
            row["messages"].append({"role": "assistant", "content": k.render_answer(spans)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_an_interrupted_run_goes_on_to_the_same_adapter(little, tmp_path, monkeypatch):
    whole, out, log_row = tmp_path / "whole", tmp_path / "run", recorder.log_row
    data = short_rows(tmp_path / "short.jsonl")
    line = f"sft --model {little} --data {data} {' '.join(SFT)} --max-steps 4 --out"
    invoke(f"{line} {whole}")

    # Ctrl-C (SIGTERM: test_distributed.py): the next step is finished, and saved though no save is due.
    def interrupt_after_2(step, *rest):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return log_row(step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "log_row", interrupt_after_2)
        error = refusal(f"{line} {out}")
    assert "stopped at step 3 of 4; go on with the same command and --resume" in error
    assert [p.name for p in checkpoints.checkpoints(Run(out))] == ["checkpoint-2", "checkpoint-3"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and Run(out).facts["status"] == "interrupted"

    # Another option, or no --resume: refused, and nothing is touched.
    error = refusal(f"{line} {out} --resume --lora-rank 8")
    assert "--resume with another --lora-rank (8; the run has 16)" in error
    assert "exists already" in refusal(f"{line} {out}")

    # Damaged checkpoints and torn lines, as kills and bad disks leave them: the run goes on from before.
    shutil.copytree(out / "checkpoint-3", out / "checkpoint-4")
    state = out / "checkpoint-3" / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:-1])
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 4, "loss": 9.0, "num_tokens": 9}\n{"step": 5, "lo')
    output = invoke(f"{line} {out} --resume").stderr
    assert "checkpoint-4 is skipped (its trainer_state.json is of another step)" in output
    assert "checkpoint-3 is skipped (optimizer.pt is damaged)" in output and "going on from step 2" in output
    assert files_of(out) == files_of(whole) and names_of(out) == names_of(whole)
    assert steps_of(out) == steps_of(whole) == [1, 2, 3, 4]

    # A finished run says so, and what a kill at its very end left behind goes.
    (out / "checkpoint-4").mkdir()
    (out / ".rollout-lora.gguf").write_text("")
    assert f"{out}: finished already" in invoke(f"{line} {out} --resume").stderr
    assert files_of(out) == files_of(whole) and names_of(out) == names_of(whole)


# ------------------------------------------------------------------------------------------ kills


def readable(score):
    """Let the judge read a sentence that depends on the answer: a random model says nothing to be judged."""
    score = with_signal(score)

    def scored(answers, *rest, **more):
        sentence = "<|response_begin|>That sounds hard, tell me about all {} of them.<|response_end|>"
        replaced = [(row, sentence.format(sum(map(ord, text)) % 89)) for row, text in answers]
        return score(replaced, *rest, **more)

    return scored


def victim(line, log, place=None, times=1, delay=0.0, clock=None):
    """Run a command line, killed `delay` seconds after it called `place` for the `times`-th time.

    place: a function's whole name, or "start". clock: the seed of a clock that jumps.
    """
    if clock is not None:
        jumps, now = random.Random(clock), time.time
        time.time = lambda: now() + jumps.uniform(-1e7, 1e7)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    k.score_answers = readable(k.score_answers)

    def strike():
        # The default action of its signal ends the process as abruptly as SIGKILL.
        signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6))

    if place == "start":
        strike()
    elif place:
        owner, _, name = place.rpartition(".")
        owner, calls, function = pkgutil.resolve_name(owner), itertools.count(1), pkgutil.resolve_name(place)

        def deadly(*rest, **more):
            if next(calls) == times:
                strike()
            return function(*rest, **more)

        setattr(owner, name, deadly)
    k.cli.main(line.split())


def spawn(line, log, target=victim, limit=300, **more):
    """Return the exit code of a command line in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=target, args=(line, log), kwargs=more)
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        pytest.fail(f"a process hangs: {line}")
    return process.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory, little, pairs):
    """Return (directory of undisturbed runs, {run: its command line}, {run: its seconds})."""
    work, seconds = tmp_path_factory.mktemp("whole"), {}
    data, prompts = short_rows(work / "sft.jsonl"), short_rows(work / "grpo.jsonl", "prompts")
    sft = f"sft --model {little} --data {data} {' '.join(SFT)}"
    judge = f"--judge {little} --exam-pairs {pairs} --force-judge --witness none"
    held_out = f"--eval-data {short_rows(work / 'held_out_rows.jsonl')} --eval-prompts 2 --eval-every 3"
    lines = {"sft": sft, "grpo": f"grpo --from {work / 'sft'} --data {prompts} {held_out} {judge} {GRPO}"}
    # A reward of the user's own that says nothing of half of the prompts: their groups are drawn again.
    (work / "mine.py").write_text(OWN)
    rewards = f"--reward {work / 'mine.py'}:mine --reward format=0 --reward emotion=0 --reward rubric=0"
    more = "--judge none --advantages gdpo --redraw 2 --keep best --eval-every 2"
    lines["own"] = f"grpo --from {work / 'sft'} --data {prompts} {held_out} {rewards} {more} {GRPO}"
    for kind, line in lines.items():
        began = time.monotonic()
        assert spawn(f"{line} --out {work / kind}", work / "log") == 0, (work / "log").read_text()
        seconds[kind] = time.monotonic() - began
    return work, lines, seconds


def kill_and_resume(whole, kind, out, blows, **last):
    """Kill a run again and again, then let it end; it must be the run that nobody killed."""
    work, lines, _ = whole
    undisturbed, line, log, codes = work / kind, f"{lines[kind]} --out {out}", out.with_suffix(".log"), []
    for blow in blows:
        codes.append(spawn(line, log, **blow))
        line = f"{lines[kind]} --out {out} --resume"
    assert set(codes) <= {KILLED, 0} and spawn(line, log, **last) == 0, log.read_text()
    assert files_of(out) == files_of(undisturbed) and names_of(out) == names_of(undisturbed)
    assert steps_of(out) == steps_of(undisturbed)
    for path in undisturbed.glob("*.jsonl"):  # every answer, score, advantage, log-prob and measurement
        assert path.name == "log.jsonl" or path.read_text() == (out / path.name).read_text(), path.name
    return codes


BLOWS = [
    ("sft", {"place": "kardia.models.packed_rows.PackedRow.logps", "times": 9, "delay": 0.05}),
    # A checkpoint is being sealed; the clock jumps.
    ("sft", {"place": "kardia.training.checkpoints.sync_to_disk", "times": 2, "clock": 1}),
    ("grpo", {"place": "kardia.llama.worker.Worker.rollout", "times": 5, "delay": 0.05}),
    ("grpo", {"place": "kardia.training.checkpoints.tidy"}),
    ("own", {"place": "kardia.llama.worker.Worker.rollout", "times": 6, "delay": 0.05}),
    ("own", {"place": "kardia.training.checkpoints.save_adapter", "times": 2}),
]


@pytest.mark.slow
@forks
@pytest.mark.parametrize("kind, blow", BLOWS)
def test_killed_anywhere_it_goes_on_to_the_same_adapter(whole, tmp_path, kind, blow):
    assert kill_and_resume(whole, kind, tmp_path / "run", [blow], clock=blow.get("clock")) == [KILLED]


@pytest.mark.slow
@forks
def test_groups_without_signal_are_drawn_again(whole):
    """From other prompts, and no more than the step's group is recorded; the best adapter is a run."""
    run = whole[0] / "own"
    logged, answers = lines_of(run / "log.jsonl"), lines_of(run / "completions.jsonl")
    assert sum(row.get("redrawn", 0) for row in logged) > 0
    assert all(0 < row.get("redrawn", 1) <= 2 for row in logged) and len(answers) == 6 * 4
    for step in range(1, 7):
        group = [row for row in answers if row["step"] == step]
        assert len({row["person"] for row in group}) == 1 and {row["compared"] for row in group} == {"gdpo"}
    told = [sum(map(ord, row["person"])) % 2 for row in answers]
    assert sum(told) > len(told) / 2  # of the six prompts about half say nothing
    measured = {row["step"]: row["reward"] for row in lines_of(run / "held_out.jsonl")}
    best = json.loads((run / "best" / "run.json").read_text())["best_step"]
    assert list(measured) == [0, 2, 4, 6] and measured[best] == max(measured.values())
    assert all(value < measured[best] for step, value in measured.items() if step < best)
    assert Run(run / "best").done


@pytest.mark.slow
@forks
@pytest.mark.parametrize("seed", range(int(os.environ.get("KILLS", "3"))))
def test_killed_at_random_moments_and_more_than_once(whole, tmp_path, seed):
    """KILLS=40 for a long evening. The moments are drawn from a process's whole life."""
    rng, kind = random.Random(seed), ("sft", "grpo")[seed % 2]
    delays = [rng.uniform(0, whole[2][kind]) for _ in range(rng.choice((1, 1, 2, 3)))]
    kill_and_resume(whole, kind, tmp_path / "run", [{"place": "start", "delay": d} for d in delays])


@pytest.mark.slow
@forks
def test_ctrl_c_ends_a_command_at_its_next_step(whole, tmp_path):
    """From outside, as a person presses it: no traceback, the step is saved, and --resume goes on."""
    work, lines, _ = whole
    command = [sys.executable, PROJECT / "kardia_lite.py", *lines["sft"].split(), "--out", tmp_path / "run"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert any("step   2/6" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 1 and "Traceback" not in said
    assert re.search("stopped at step [345] of 6; go on with the same command and --resume", said), said
    assert subprocess.run([*command, "--resume"], capture_output=True).returncode == 0
    assert files_of(tmp_path / "run") == files_of(work / "sft") and steps_of(tmp_path / "run") == [
        *range(1, 7)
    ]


@pytest.mark.slow
@forks
def test_a_killed_export_goes_on_to_the_same_files(whole, tmp_path):
    line = f"export {whole[0] / 'sft'} --formats merged,f16,q8_0,lora --answers 0 --to"
    once, out, log = tmp_path / "once", tmp_path / "killed", tmp_path / "log"
    place = "kardia.export.formats.Exporter.keep"
    assert spawn(f"{line} {once}", log) == 0, log.read_text()
    assert spawn(f"{line} {out}", log, place=place, times=2, delay=0.02) == KILLED
    assert spawn(f"{line} {out}", log) == 0, log.read_text()
    contents = []
    for to in (once, out):
        files = [path for path in to.rglob("*") if path.is_file() and path.name != "export.json"]
        contents.append({path.relative_to(to): path.read_bytes() for path in files})
    assert contents[0] == contents[1]  # nothing is half-written, nothing hidden is left
