"""Two processes, connected by gloo on a CPU, train what one trains with the same global batch."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import launched
import pytest
from conftest import lines_of, run

import kardia_lite as k
from kardia.core import distributed
from kardia.core.console import UserError
from kardia.llama.worker import own_gpu
from kardia.models import unsloth
from kardia.models.adapter import read_adapter
from kardia.training import plan, trainers

# Eleven dialogues and micro-batches of two: the last step of an epoch is not full.
SFT = "--limit 11 --batch-size 4 --micro-batch 2 --max-length 700 --learning-rate 3e-3 --save-steps 1"
GRPO = "--steps 3 --group-size 4 --prompts-per-step 2 --micro-batch 2 --max-tokens 16 --learning-rate 1e-3"
GRPO += " --eval-prompts 4 --redraw 2"
GRPO += " --inspect-every 1 --save-steps 1"
ACCELERATE = "-m accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2 --num_machines 1"
ACCELERATE += " --main_process_port 0 --mixed_precision no --dynamo_backend no"
SAME = "loss grad_norm entropy mean_token_accuracy reward reward_std learning_rate".split()


# ---------------------------------------------------------------------------------------- one process


def launcher(monkeypatch):
    """Set what a launcher sets in the environment of the second of two processes."""
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))


def test_one_process_agrees_with_itself(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # means nothing without a launcher's other words
    assert (distributed.size(), distributed.rank(), distributed.local_size()) == (1, 0, 1)
    assert distributed.gather("x") == ["x"] and distributed.same(3) == 3 and distributed.first(lambda: 5) == 5
    assert distributed.any_of(True) and not distributed.any_of(False)


def test_only_training_is_launched(monkeypatch):
    launcher(monkeypatch)
    monkeypatch.setenv("RANK", "0")
    result = run("report x", ok=False)
    assert result.exit_code == 1 and "report runs in one process" in result.output
    with pytest.raises(UserError, match="trains in one process"):
        unsloth.choose_engine("unsloth", None)


def test_the_batch_is_divided_among_the_processes(monkeypatch):
    def passes(batch, micro):
        return plan.sft_passes(k.SFTOptions(batch_size=batch, micro_batch=micro))

    assert passes(8, 2) == (2, 4) and trainers.blank_examples(11, 2, 7) == []
    launcher(monkeypatch)
    assert passes(8, 2) == (2, 2) and passes(4, 4) == (2, 1) and passes(1, 1) == (1, 1)
    (blank,) = trainers.blank_examples(11, 2, 7)
    assert set(blank["labels"]) == {-100} and trainers.blank_examples(12, 2, 7) == []
    with pytest.raises(UserError, match="3 with 2 processes: each takes whole groups; give a multiple of 2"):
        k.train_grpo(k.GRPOOptions(prompts_per_step=3), Path("none"), Path("none"))


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert own_gpu() is None
    launcher(monkeypatch)
    assert own_gpu() == "1"
    for visible, own in {"4,7": "7", "GPU-a,GPU-b": "GPU-b", "": None, "-1": None}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert own_gpu() == own, visible


# ---------------------------------------------------------------------------------------- two processes


def launch(*lines):
    """Run command lines in two processes, as `accelerate launch` starts them. Return (exit code, output)."""
    command = [sys.executable, *ACCELERATE.split(), launched.__file__, *lines]
    names = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=names, capture_output=True, text=True, timeout=500)
    return result.returncode, result.stderr


@pytest.fixture(scope="module")
def lines(tmp_path_factory, little, unjudged):
    """Return (a directory, the SFT line, the GRPO line); the name of the run is missing at their ends."""
    work = tmp_path_factory.mktemp("distributed")
    sft = f"sft --model {little} --rubric {unjudged} {SFT} --out {work}/"
    return work, sft, f"grpo --from {work}/sft --rubric {unjudged} --judge none {GRPO} --out {work}/"


@pytest.fixture(scope="module")
def output(lines):
    """Train in this process and the same in two processes, also with stops. Return what these print."""
    _, sft, grpo = lines
    runs = [f"UNPACKED=1 {sft}unpacked --max-steps 3", f"{sft}sft", f"{grpo}grpo"]
    assert launched.run_all(runs) == [0, 0, 0]
    runs = [f"UNPACKED=1 {sft}unpacked2 --max-steps 3", f"{sft}sft2", f"{grpo}grpo2"]
    runs += [f"STOP_AT=4 {sft}sft3", f"{sft}sft3", f"{sft}sft3 --resume"]  # the second one exists already
    runs += [f"STOP_AT=1 {grpo}grpo3", f"{grpo}grpo3 --resume"]
    code, output = launch(*runs)
    assert code == 0 and output.count("exit codes: [0, 0, 0, 1, 1, 0, 1, 0]") == 2, output[-3000:]
    return output


@pytest.mark.slow
@pytest.mark.parametrize("alone", ["sft", "unpacked", "grpo"])
def test_two_processes_train_what_one_trains(lines, output, alone):
    """SFT on packed rows and on TRL's own path, GRPO; also after a signal to one process and --resume."""
    one, *runs = sorted(lines[0].glob(f"{alone}*"))
    assert len(runs) == (1 if alone == "unpacked" else 2)
    (_, adapter), log = read_adapter(one / "adapter"), lines_of(one / "log.jsonl")
    assert any(b.abs().max() > 1e-3 for _, b in adapter.values())  # something was learned at all
    for two in runs:
        for a, b in zip(log, lines_of(two / "log.jsonl"), strict=True):
            for key in SAME:
                assert a.get(key) == pytest.approx(b.get(key), rel=1e-4, abs=1e-6), (two, a["step"], key)
        (_, other) = read_adapter(two / "adapter")
        assert all((x - y).abs().max() < 1e-4 for n in adapter for x, y in zip(adapter[n], other[n])), two
        assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}


@pytest.mark.slow
def test_groups_stay_whole_and_get_the_same_answers(lines, output):
    one, two = (lines_of(lines[0] / run / "completions.jsonl") for run in ("grpo", "grpo2"))
    order = [(row["step"], row["group"], row["sample"]) for row in two]
    assert order == list(itertools.product((1, 2, 3), (0, 1), range(4)))
    for a, b in zip(one, two, strict=True):
        assert a["completion"] == b["completion"] and a["reward"] == b["reward"]
        assert a["advantage"] == pytest.approx(b["advantage"], abs=1e-5)
    redrawn = [
        [row.get("redrawn", 0) for row in lines_of(lines[0] / run / "log.jsonl")] for run in ("grpo", "grpo2")
    ]
    assert redrawn[0] == redrawn[1] and sum(redrawn[0]) > 0
    persons = {(row["step"], row["group"]): row["person"] for row in two}
    assert all(persons[step, 0] != persons[step, 1] for step in (1, 2, 3))
    one, two = (lines_of(lines[0] / run / "tokens.jsonl") for run in ("grpo", "grpo2"))
    keys = "step", "group", "tokens"
    assert [[row[key] for key in keys] for row in one] == [[row[key] for key in keys] for row in two]


@pytest.mark.slow
def test_only_the_first_process_prints(output):
    assert (
        output.count("2 dialogues x 1 micro-batches x 2 processes = 4 per step") == 4
    )  # unpacked2, sft2, sft3 twice
    assert output.count("step   1/6") == 2 and output.count("exists already") == 1
    for stop in ("stopped at step 5 of 6", "stopped at step 2 of 3"):
        assert f"{stop}; go on with the same command and --resume" in output


@pytest.mark.slow
def test_out_of_memory_in_one_process_ends_both(lines, output):
    # The first pass is the largest of all, which is rehearsed; then two make a step.
    code, errors = launch(f"OUT_OF_MEMORY=4 {lines[2]}memory")
    message = "step 2: out of memory (injected); begin again, in another --out, with a smaller --micro-batch"
    assert code and errors.count(message) == 1, errors
    facts = json.loads((lines[0] / "memory" / "run.json").read_text())
    assert facts["status"] != "done" and not (lines[0] / "memory" / "adapter").exists()
