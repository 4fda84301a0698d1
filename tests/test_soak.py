"""Many GRPO steps: memory of both processes, open files, threads and what lies about do not grow."""

import json
import os
import statistics
import tempfile
from pathlib import Path

import pytest
from conftest import names_of
from test_checkpoints import forks, short_rows, spawn, victim

from kardia.core.run_directory import Run

STEPS = int(os.environ.get("SOAK", "100"))
FILES = {".lock", ".rollout-lora.gguf", "completions.jsonl", "log.jsonl", "run.json", "tokens.jsonl"}


def held_by(process):
    """Return (bytes of its own memory, open files, threads)."""
    return process.memory_full_info().uss, process.num_fds(), process.num_threads()


def watched(line, log, out):
    """Run a command line; after every step write down what this process and its llama worker hold."""
    import psutil

    append, samples, own = Run.append, [], Path(out).with_name("temporary")
    own.mkdir()
    # What other programs leave in the system's place does not count.
    os.environ["TMPDIR"], tempfile.tempdir = str(own), None

    def append_and_look(self, name, records):
        append(self, name, records)
        if name == "log.jsonl":
            me = psutil.Process()
            worker = next(child for child in me.children() if "spawn_main" in " ".join(child.cmdline()))
            sample = {"trainer": held_by(me), "worker": held_by(worker)}
            sample |= {"files": names_of(self.path), "temporary": len(os.listdir(own))}
            samples.append(sample)
            Path(out).write_text(json.dumps(samples))

    Run.append = append_and_look
    victim(line, log)


@pytest.mark.slow
@forks
def test_many_steps_leave_no_trace(little, pairs, tmp_path):
    log, sft, out, samples = (tmp_path / name for name in ("log", "sft", "grpo", "samples.json"))
    data = short_rows(tmp_path / "prompts.jsonl", "prompts", 64)
    assert spawn(f"sft --model {little} --limit 2 --max-steps 1 --out {sft}", log) == 0, log.read_text()
    judge = f"--judge {little} --exam-pairs {pairs} --force-judge --witness none"
    line = f"grpo --from {sft} {judge} --data {data} --out {out}"
    line += f" --steps {STEPS} --group-size 4 --max-tokens 8 --save-steps 5 --inspect-every 5"
    code = spawn(line, log, watched, limit=1200, out=str(samples))
    assert code == 0, log.read_text()[-3000:]
    samples = json.loads(samples.read_text())
    assert len(samples) == STEPS
    # torch keeps kernels per shape of a pass: memory grows in bursts until about step 35, then no more.
    warm, end = samples[2 * STEPS // 5 : 3 * STEPS // 5], samples[-STEPS // 5 :]
    for who in ("trainer", "worker"):
        columns = [list(zip(*[sample[who] for sample in part])) for part in (warm, end)]
        before, after = (statistics.median(values[0]) for values in columns)
        assert after < 1.05 * before, (who, before, after)
        # A file that is open at the moment of a look is no leak; one that stays raises the minimum.
        before, after = ([min(values) for values in part[1:]] for part in columns)
        assert after <= before, (who, before, after)
    assert end[-1]["temporary"] <= warm[0]["temporary"]
    for sample in end:
        others = [name for name in sample["files"] if name not in FILES]
        assert len(others) <= 2 and all(name.startswith("checkpoint-") for name in others), sample["files"]
    assert set(names_of(out)) == (FILES | {"adapter"}) - {".lock", ".rollout-lora.gguf"}
