"""Two hundred GRPO steps: memory of both processes, open files and what lies about must not grow."""

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import pytest
from test_keep import spawn, victim

import kardia_lite as k

STEPS = int(os.environ.get("SOAK", "200"))


def watched(arguments, log, out):
    """A `victim` that nobody kills: after every step it writes down what it and the llama worker hold."""
    import psutil

    append, samples, own = k.Run.append, [], Path(out).with_name("temporary")
    own.mkdir()
    os.environ["TMPDIR"], tempfile.tempdir = (
        str(own),
        None,
    )  # what others leave in the system's place is none of ours

    def append_and_look(self, name, records):
        append(self, name, records)
        if name == "log.jsonl":
            me = psutil.Process()
            worker = next(child for child in me.children() if "spawn_main" in " ".join(child.cmdline()))
            samples.append(
                {
                    "files": sorted(p.name for p in self.path.iterdir()),
                    "temporary": len(os.listdir(tempfile.gettempdir())),
                    **{
                        who: {
                            "memory": process.memory_full_info().uss,
                            "handles": process.num_fds(),
                            "threads": process.num_threads(),
                        }
                        for who, process in (("trainer", me), ("worker", worker))
                    },
                }
            )
            Path(out).write_text(json.dumps(samples))

    k.Run.append = append_and_look
    victim(arguments, log)


@pytest.mark.real
@pytest.mark.skipif(sys.platform == "win32", reason="file descriptors")
def test_two_hundred_steps_leave_no_trace(little, pairs, tmp_path):
    lines = []
    for line in (k.DATA / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:64]:
        row = json.loads(line)
        lines.append(
            json.dumps(
                {
                    **row,
                    "person": row["person"][:20],
                    "situation": row["situation"][:20],
                    "messages": [{"role": "user", "content": row["messages"][-1]["content"][:40]}],
                }
            )
        )
    (tmp_path / "short.jsonl").write_text("\n".join(lines) + "\n")
    assert (
        spawn(
            ["sft", "--model", little, "--limit", 2, "--max-steps", 1, "--out", tmp_path / "sft"],
            tmp_path / "log",
        )
        == 0
    ), (tmp_path / "log").read_text()
    arguments = [
        "grpo",
        "--from",
        tmp_path / "sft",
        "--judge",
        little,
        "--steps",
        STEPS,
        "--group-size",
        4,
        "--max-tokens",
        8,
        "--save-steps",
        10,
        "--inspect-every",
        10,
        "--data",
        tmp_path / "short.jsonl",
        "--exam-pairs",
        pairs,
        "--force-judge",
        "--out",
        tmp_path / "grpo",
    ]
    assert (
        spawn(arguments, tmp_path / "log", target=watched, out=str(tmp_path / "samples.json"), limit=1200)
        == 0
    ), (tmp_path / "log").read_text()[-3000:]
    samples = json.loads((tmp_path / "samples.json").read_text())
    assert len(samples) == STEPS
    warm, end = samples[STEPS // 5 : 2 * STEPS // 5], samples[-STEPS // 5 :]
    for who in ("trainer", "worker"):
        of = {
            name: [statistics.median(sample[who][name] for sample in part) for part in (warm, end)]
            for name in ("memory", "handles", "threads")
        }
        print(
            f"{who}: {of['memory'][0] / 1e6:.0f} -> {of['memory'][1] / 1e6:.0f} MB ({of['memory'][1] / of['memory'][0] - 1:+.1%}), {of['handles'][1]:.0f} handles, {of['threads'][1]:.0f} threads"
        )
        assert of["memory"][1] < 1.05 * of["memory"][0], of
        assert of["handles"][0] == of["handles"][1] and max(sample[who]["handles"] for sample in end) <= max(
            sample[who]["handles"] for sample in warm
        ), of
        assert of["threads"][0] == of["threads"][1], of
    assert end[-1]["temporary"] <= warm[0]["temporary"]
    known = {".lock", ".rollout-lora.gguf", "completions.jsonl", "log.jsonl", "run.json", "tokens.jsonl"}
    assert all(
        {name for name in sample["files"] if not name.startswith("checkpoint-")} <= known
        and sum(name.startswith("checkpoint-") for name in sample["files"]) <= 2
        for sample in end
    )
    assert sorted(p.name for p in (tmp_path / "grpo").iterdir()) == [
        "adapter",
        "completions.jsonl",
        "log.jsonl",
        "run.json",
        "tokens.jsonl",
    ]
