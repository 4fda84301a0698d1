"""Run command lines as one of several processes, with the changes that test_distributed.py asks for.

A single line runs as a launcher runs it. Several lines share one process group, which saves the imports; each
process prints their exit codes in its last line. NAME=value in front of a line:

UNPACKED=1        as if attention could not be exchanged: TRL's own path
STOP_AT=step      process 1 alone gets a SIGTERM after this step
OUT_OF_MEMORY=n   process 1 finds no memory in the n-th training pass of several answers
"""

import contextlib
import itertools
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from conftest import with_signal

import kardia_lite as k
from kardia.core import distributed
from kardia.models import packed_rows
from kardia.training import recorder


def half_silent(score):
    """score_answers that tells the answers to half of the prompts apart: the other groups are drawn again."""
    scored = with_signal(score)

    def of_half(answers, *rest, **more):
        rewards = scored(answers, *rest, **more)
        for reward, (dialogue, _) in zip(rewards, answers):
            reward.components["format"] *= sum(map(ord, dialogue.person)) % 2
        return rewards

    return of_half


def change(patch, names):
    """Apply the changes in `names` with a pytest.MonkeyPatch."""
    patch.setattr(k, "score_answers", half_silent(k.score_answers))
    if "UNPACKED" in names:
        patch.setattr(packed_rows, "enable_packed_rows", lambda model: "as a test wants it")
    if "STOP_AT" in names and distributed.rank() == 1:
        log_row = recorder.log_row

        def then_stop(step, *rest):
            if step == int(names["STOP_AT"]):
                signal.raise_signal(signal.SIGTERM)
            return log_row(step, *rest)

        patch.setattr(recorder, "log_row", then_stop)
    if "OUT_OF_MEMORY" in names and distributed.rank() == 1:
        logps, passes = packed_rows.PackedRow.logps, itertools.count(1)

        def failing(row, *rest, **more):
            # Not in the trial of packed rows, which needs no gradients.
            if len(row.real) > 1 and torch.is_grad_enabled() and next(passes) == int(names["OUT_OF_MEMORY"]):
                raise MemoryError("injected")
            return logps(row, *rest, **more)

        patch.setattr(packed_rows.PackedRow, "logps", failing)


def run(line):
    """Run one command line with its changes; it ends with SystemExit."""
    words = line.split()
    names = dict(word.split("=") for word in itertools.takewhile(lambda word: "=" in word, words))
    with pytest.MonkeyPatch.context() as patch:
        change(patch, names)
        k.cli.main(words[len(names) :])


def run_all(lines):
    """Run command lines in one process group. Return their exit codes."""
    codes = []
    with distributed.process_group(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "process_group", contextlib.nullcontext)
        for line in lines:
            with pytest.raises(SystemExit) as end:
                run(line)
            codes.append(end.value.code)
        print(f"exit codes: {codes}", file=sys.stderr)
    return codes


if __name__ == "__main__":  # not in the llama worker, which imports this file, too
    if len(sys.argv) == 2:
        run(sys.argv[1])
    run_all(sys.argv[1:])
