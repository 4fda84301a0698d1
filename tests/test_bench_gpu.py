"""The arithmetic of bench_gpu.py, and what of its work needs no GPU."""

import subprocess
import sys
from pathlib import Path

import bench_gpu as bench
import pytest
import torch

import kardia_lite as k
from kardia.core import machine
from kardia.llama.worker import Worker
from kardia.models import memory_plan

GB = 1e9


def cell(task="grpo", shape="Qwen2.5-3B", cap=8.0, who="ours", seconds=(9.0, 2.0, 2.2), **more):
    steps = [{"rollout": s / 2, "judge": s / 4, "update": s / 4, "step": s} for s in seconds]
    facts = {
        "status": "done",
        "steps": steps,
        "peak_gb": 7.0,
        "limit_gb": memory_plan.usable(cap),
        "planned_gb": 7.35 if who in bench.OURS else None,
        "drawn": [256.0] * 3,
        "context_assumed": False,
        "setting": None,
        "memory_plan": {},
    }
    return {
        "task": task,
        "shape": shape,
        "cap": cap,
        "who": who,
        "micro": 0,
        "sizes": bench.SIZES,
        "ladder": [],
        "llama_gpu": True,
        **facts,
        **more,
    }


def report(cells, rehearsal=False):
    ratios = bench.ratios_of(cells)
    return {
        "cells": cells,
        "ratios": ratios,
        "targets": bench.targets_of(cells, ratios, rehearsal),
        "attention": [],
        "rehearsal": rehearsal,
        "sizes": bench.SIZES,
        "steps": 2,
        "probe": {"gpu": not rehearsal},
    }


def of(found):
    return [what for _, what, _ in found["targets"]]


def test_ratios_go_step_by_step_without_the_first():
    (row,) = bench.ratios_of([cell(), cell(who="trl", seconds=(99.0, 5.0, 4.4))])
    assert (
        row["step"] == [pytest.approx(2.25), pytest.approx(2.0), pytest.approx(2.5)] and row["rival"] == "trl"
    )
    assert bench.ratios_of([cell(), cell(who="trl", cap=12.0), cell(who="trl", status="out of memory")]) == []


@pytest.mark.parametrize(
    "changes, what",
    [
        ({}, "fits"),
        ({"status": "out of memory", "why": "CUDA out of memory"}, "out of memory"),
        ({"status": "not run", "why": "unsloth is not installed"}, "unsloth is not installed"),
        ({"peak_gb": 7.9}, "too much: 7.90 of 7.74 GB"),
        (
            {
                "ladder": [
                    {
                        "step": 1,
                        "passes": 4,
                        "chunk": 128,
                        "tokens": 256,
                        "group": 8,
                        "why": "micro-batch 8 -> 4 (x)",
                    }
                ]
            },
            "fits",
        ),  # no number of the run changed
        (
            {
                "ladder": [
                    {
                        "step": 1,
                        "passes": 1,
                        "chunk": 8,
                        "tokens": 192,
                        "group": 8,
                        "why": "completion length 256 -> 192 (x)",
                    }
                ]
            },
            "only with completion length 256 -> 192",
        ),
    ],
)
def test_what_became_of_a_cell(changes, what):
    assert bench.verdict(cell(**changes)) == what


def test_targets_are_met_or_not_or_not_measured():
    assert of(report([])) == ["not measured"] * 6
    assert of(
        report(
            [cell(), cell(who="trl", seconds=(9.0, 5.0, 4.5)), cell(who="unsloth", seconds=(9.0, 1.5, 1.5))]
        )
    ) == ["not measured", "not measured", "met", "met", "not met", "met"]
    assert of(
        report(
            [
                cell(status="out of memory"),
                cell(who="ours-unsloth", planned_gb=8.0),
                cell("sft", "Qwen2.5-7B", who="ours", peak_gb=7.8),
            ]
        )
    ) == ["not met", "not measured", "met", "not measured", "not measured", "not met"]
    # a failure of another kind says nothing about memory, nor does a llama.cpp that stayed on the CPU
    assert (
        of(
            report(
                [
                    cell(status="failed", why="KeyError"),
                    cell(who="ours-unsloth", llama_gpu=False, setting={"rollout": "llama"}),
                ]
            )
        )[2]
        == "not measured"
    )
    stayed = cell(llama_gpu=False, planned_gb=9.0, setting={"rollout": "llama", "llama_gpu": True})
    assert of(report([stayed]))[5] == "not measured"  # planned for a llama.cpp on the GPU
    assert (
        of(report([{**stayed, "setting": {"rollout": "llama", "llama_gpu": False}}]))[5] == "not met"
    )  # the plan knew
    assert (
        of(report([cell(), cell(who="trl", seconds=(9.0, 9.0, 9.0))], rehearsal=True)) == ["not measured"] * 6
    )


def test_no_figure_stands_where_none_was_measured():
    lost = [
        cell(who="trl", status="out of memory", why="CUDA out of memory. Tried to allocate 2 GiB", micro=1),
        cell(who="unsloth", status="not run", why="unsloth is not installed", steps=[]),
    ]
    lines = bench.tables(report([cell(), *lost])).splitlines()
    assert any("2.10 (2.00 to 2.20) | 7.00 | 7.35 | 105% | fits |" in line for line in lines)
    assert [line.split("|", 4)[4] for line in lines if "plain TRL |" in line] == [
        "  |  |  |  |  |  |  | out of memory; micro 1 |"
    ]
    assert [line.split("|", 4)[4] for line in lines if "Unsloth's own |" in line] == [
        "  |  |  |  |  |  |  | unsloth is not installed |"
    ]
    rehearsed = bench.tables(report([cell()], rehearsal=True))
    assert (
        f"2.10 (2.00 to 2.20){bench.MARK}" in rehearsed
        and "| ran |" in rehearsed
        and "no figure here measures anything" in rehearsed
    )


def test_a_card_inside_a_gpu(monkeypatch):
    """80 GB free at first, 0.5 for CUDA itself, then torch and llama.cpp take theirs: torch may have what is left of 8 GiB less the reserve."""
    held, fractions = {"torch": 0.0, "others": 0.5 * GB}, []
    fake = {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "memory_reserved": lambda: held["torch"],
        "mem_get_info": lambda device=None: (80 * GB - sum(held.values()), 85 * GB),
        "set_per_process_memory_fraction": fractions.append,
        "max_memory_reserved": lambda: held["torch"],
        "max_memory_allocated": lambda: held["torch"],
    }
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)
    with bench.Card(8.0, 80 * GB) as card:
        assert fractions[-1] * 85 == pytest.approx(memory_plan.usable(8) - 0.5)
        held.update(torch=2 * GB, others=3.5 * GB)
        card.tighten()
        assert fractions[-1] * 85 == pytest.approx(memory_plan.usable(8) - 3.5)
        free, total = torch.cuda.mem_get_info()  # what ours is told
        assert free / GB == pytest.approx(memory_plan.usable(8) - 5.5) and total / GB == pytest.approx(
            memory_plan.usable(8)
        )
        held.update(torch=1 * GB)
    assert (
        not card.assumed
        and card.figures()["peak_gb"] == pytest.approx(5.5)
        and card.figures()["beside_torch_gb"] == pytest.approx(3.5)
    )
    with bench.Card(0, None) as card:  # no nvidia-smi, and the whole GPU
        assert (
            card.assumed
            and card.limit is None
            and card.used() / GB == pytest.approx(machine.CONTEXT["torch"], abs=0.01 + 1.0)
        )


def test_a_model_of_a_shape_and_its_twin(tmp_path, embedded):
    """All tensors that transformers wants and no other, and a GGUF that llama.cpp answers from, with more rows than the tokenizer has tokens."""
    from transformers import AutoModelForCausalLM

    directory = bench.write_model(
        tmp_path / "model",
        {**bench.TINY, "vocab_size": 49_152 + 64, "tie_word_embeddings": False},
        embedded.directory,
        shard=4e6,
    )
    _, loaded = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"] and not loaded["mismatched_keys"]
    assert len(list(directory.glob("*.safetensors"))) > 1
    base = k.resolve_base(
        str(directory), bench.write_template(directory, tmp_path / "template.gguf", embedded.template)
    )
    with Worker() as worker:
        assert worker.load("policy", base.gguf(4), 0)["n_vocab"] == 49_152 + 64
        (sample,) = worker.rollout([[5, 6, 7]], group=1, max_tokens=4, seeds=[0], stop=[])
    assert len(sample["ids"]) == 4


def test_rows_have_exactly_as_many_tokens(tmp_path, renderer, rubric):
    bench.write_data(
        k, tmp_path, renderer, rubric, {"prompt": 330, "length": 700}
    )  # counts them as it reads them back
    assert {p.name for p in tmp_path.iterdir()} == {"prompts-330.jsonl", "sft-700.jsonl"}


def test_a_cell_that_fails_is_a_cell(tmp_path):
    for task, seconds, status, why in (
        ("nothing", 60, "failed", "KeyError: 'nothing'"),
        ("probe", 0.01, "timeout", "not done after 0 s"),
    ):
        found = bench.run_cell({"task": task}, tmp_path, seconds)
        assert (found["status"], found["why"]) == (status, why) and Path(found["log"]).is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, bench.__file__, "--work", str(tmp_path)], capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and not done.stdout
        and len(done.stderr.splitlines()) == 1
        and "no GPU" in done.stderr
    )


@pytest.mark.parametrize("wrong", ["--shapes 9B", "--who me", "--caps 0.5", "--targets --quick", "--steps 0"])
def test_what_cannot_be_asked_for(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.parse(wrong.split())
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err
