"""Two processes that train together, for real: gloo between two CPU processes must give what one process gives with the same
global batch. Each launch takes some ten seconds, most of them imports."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kardia_lite as k
from kardia.core import distributed
from kardia.core.console import UserError
from kardia.models.weights import read_adapter

SCRIPT = Path(__file__).with_name("launched.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [
    "-m",
    "accelerate.commands.accelerate_cli",
    "launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--main_process_port",
    "0",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]
# Eleven dialogues and micro-batches of two: the last step of an epoch is not full.
SFT = [
    "--limit",
    11,
    "--batch-size",
    4,
    "--micro-batch",
    2,
    "--max-length",
    700,
    "--learning-rate",
    "3e-3",
    "--save-steps",
    1,
]
GRPO = [
    "--steps",
    3,
    "--group-size",
    4,
    "--prompts-per-step",
    2,
    "--micro-batch",
    2,
    "--max-tokens",
    16,
    "--learning-rate",
    "1e-3",
    "--inspect-every",
    1,
    "--save-steps",
    1,
]


def command(*arguments, launcher=TORCHRUN, **changes):
    """The command line, in two processes (launcher=[]: in one). Returns (exit code, stdout, stderr)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **changes}
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def trained(*arguments, **more):
    code, out, err = command(*arguments, **more)
    assert code == 0, err[-3000:]
    return err


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def same_training(one, two):
    """The same losses and gradients, step by step, and the same adapter at the end."""
    for a, b in zip(log_of(one), log_of(two), strict=True):
        for key in (
            "loss",
            "grad_norm",
            "entropy",
            "mean_token_accuracy",
            "reward",
            "reward_std",
            "learning_rate",
        ):
            assert a.get(key) == pytest.approx(b.get(key), rel=1e-4, abs=1e-6), (a["step"], key)
    (_, first), (_, second) = read_adapter(one / "adapter"), read_adapter(two / "adapter")
    assert any(b.abs().max() > 1e-3 for _, b in first.values())  # something was learned at all
    assert all((x - y).abs().max() < 1e-4 for name in first for x, y in zip(first[name], second[name]))


@pytest.fixture(scope="module")
def work(tmp_path_factory, unjudged):
    path = tmp_path_factory.mktemp("together")
    shutil.copy(unjudged, path / "rubric.yaml")
    return path


@pytest.fixture(scope="module")
def sft(work, little):
    trained(
        "sft", "--model", little, *SFT, "--rubric", work / "rubric.yaml", "--out", work / "sft", launcher=[]
    )
    return work / "sft"


@pytest.fixture(scope="module")
def grpo(work, sft):
    trained(
        "grpo",
        "--from",
        sft,
        *GRPO,
        "--rubric",
        work / "rubric.yaml",
        "--out",
        work / "grpo",
        launcher=[],
        SIGNAL="1",
    )
    return work / "grpo"


def test_sft_of_two_processes_is_sft_of_one(work, little, sft):
    err = trained(
        "sft",
        "--model",
        little,
        *SFT,
        "--rubric",
        work / "rubric.yaml",
        "--out",
        work / "sft2",
        launcher=ACCELERATE,
    )
    assert "2 dialogues x 1 micro-batches x 2 processes = 4 per step" in err
    assert err.count("step   1/6") == 1  # one of them speaks
    same_training(sft, work / "sft2")
    assert sorted(p.name for p in (work / "sft2").iterdir()) == ["adapter", "log.jsonl", "run.json"]


def test_sft_on_trls_own_path_too(work, little):
    for name, launcher in (("own", []), ("own2", TORCHRUN)):
        trained(
            "sft",
            "--model",
            little,
            *SFT,
            "--max-steps",
            3,
            "--rubric",
            work / "rubric.yaml",
            "--out",
            work / name,
            launcher=launcher,
            UNPACKED="1",
        )
    same_training(work / "own", work / "own2")


def test_grpo_of_two_processes_is_grpo_of_one(work, sft, grpo):
    trained(
        "grpo", "--from", sft, *GRPO, "--rubric", work / "rubric.yaml", "--out", work / "grpo2", SIGNAL="1"
    )
    same_training(grpo, work / "grpo2")
    one, two = (
        [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
        for run in (grpo, work / "grpo2")
    )
    assert [(row["step"], row["group"], row["sample"]) for row in two] == [
        (s, g, i) for s in (1, 2, 3) for g in (0, 1) for i in range(4)
    ]
    for a, b in zip(
        one, two, strict=True
    ):  # whole groups, with the seeds that one process would have given them
        assert (a["completion"], a["reward"], a["advantage"]) == (
            b["completion"],
            b["reward"],
            pytest.approx(b["advantage"], abs=1e-5),
        )
    one, two = (
        [json.loads(line) for line in (run / "tokens.jsonl").read_text().splitlines()]
        for run in (grpo, work / "grpo2")
    )
    assert [(row["step"], row["group"], row["tokens"]) for row in one] == [
        (row["step"], row["group"], row["tokens"]) for row in two
    ]
    assert {path.name for path in (work / "grpo2").iterdir()} == {
        "adapter",
        "log.jsonl",
        "run.json",
        "completions.jsonl",
        "tokens.jsonl",
    }


@pytest.mark.parametrize("where", ["draw", "record", "update"])
def test_when_one_runs_out_of_memory_both_go_down(work, sft, grpo, where):
    out = work / f"memory-{where}"
    err = trained(
        "grpo",
        "--from",
        sft,
        *GRPO,
        "--rubric",
        work / "rubric.yaml",
        "--out",
        out,
        SIGNAL="1",
        OUT_OF_MEMORY=f"1 {where}",
    )
    (rung,) = json.loads((out / "run.json").read_text())["ladder"]
    assert ("micro-batch 2 -> 1" if where == "update" else "completion length 16 -> 12") in rung[
        "why"
    ] and "another process" in rung["why"]
    assert err.count("and the step once more") == 1
    if (
        where == "update"
    ):  # smaller passes change no number by more than rounding; from the second step on other answers may be drawn
        one, two = log_of(grpo)[0], log_of(out)[0]
        assert (
            one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-2) and one["reward"] == two["reward"]
        )


def test_a_signal_to_one_stops_both_and_they_go_on(work, sft, grpo):
    out = work / "stopped"
    arguments = ["grpo", "--from", sft, *GRPO, "--rubric", work / "rubric.yaml", "--out", out]
    code, _, err = command(*arguments, SIGNAL="1", STOP_AT="1")
    assert code == 1 and "of 3; go on with the same command and --resume" in err
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    assert not list(out.glob(".checkpoint*"))
    trained(*arguments, "--resume", SIGNAL="1")
    same_training(grpo, out)


def test_sft_stopped_in_its_second_epoch_goes_on_where_it_was(work, little, sft):
    """The order of an epoch is asked of its number; and lines that a kill left behind are gone before anyone counts them."""
    out = work / "stopped-sft"
    arguments = ["sft", "--model", little, *SFT, "--rubric", work / "rubric.yaml", "--out", out]
    code, _, err = command(*arguments, STOP_AT="4")
    assert code == 1 and "of 6; go on with the same command and --resume" in err
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 6, "loss": 9.0}\n{"step": 7, "lo')
    trained(*arguments, "--resume")
    same_training(sft, out)


def test_a_mistake_that_one_makes_alone_is_told(work, sft):
    code, _, err = command(
        "grpo", "--from", sft, *GRPO, "--rubric", work / "rubric.yaml", "--out", work / "failed", FAIL_IN="1"
    )
    assert code == 1 and "Error: only here" in err


def test_groups_stay_whole(work, sft, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(
        UserError,
        match="--prompts-per-step 3 with 2 processes: each takes whole groups; give a multiple of 2",
    ):
        k.train_grpo(k.GRPOOptions(prompts_per_step=3), sft, work / "none")


def test_only_training_is_launched(monkeypatch):
    from click.testing import CliRunner

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(k.cli, ["report", "x"])
    assert result.exit_code == 1 and "report runs in one process" in result.output
    with pytest.raises(UserError, match="trains in one process"):
        k.choose_engine("unsloth", None)


@pytest.mark.parametrize(
    "visible, expected", [(None, "1"), ("4,7", "7"), ("GPU-a,GPU-b", "GPU-b"), ("", None), ("-1", None)]
)
def test_each_process_has_a_gpu_of_its_own(monkeypatch, visible, expected):
    from kardia.llama import worker as llama_worker

    assert llama_worker.own_gpu() is None
    for name, value in {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert llama_worker.own_gpu() == expected


def test_a_lone_process_pays_nothing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # without a launcher's other words it means nothing
    assert distributed.size() == 1 and distributed.rank() == 0
    assert (
        distributed.gather("x") == ["x"]
        and distributed.sums([1.0]) == [1.0]
        and distributed.any_of(True)
        and distributed.same(3) == 3
    )
    assert distributed.all_or_none(lambda: 5, lambda error: True) == 5
