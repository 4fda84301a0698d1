"""The command line as a launcher starts it, with what test_together.py changes of it. What to change stands in the environment:

SIGNAL           rewards that differ: a random model's answers would all get 0
OUT_OF_MEMORY    "1 draw", "1 record" or "1 update": process 1, once, where its answers are drawn or written down, or a pass of several is computed
UNPACKED         as if attention could not be exchanged: TRL's own path
STOP_AT          step after which process 1 alone gets a SIGTERM
FAIL_IN          process that meets an error the others do not
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import kardia_lite as k  # noqa: E402
from kardia.core import distributed  # noqa: E402
from kardia.models import packed_rows
from kardia.training import recorder


def with_signal(score):
    def scored(answers, *rest, **more):
        rewards = score(answers, *rest, **more)
        for reward, (_, text) in zip(rewards, answers):
            reward.components["format"] = text.count("e") % 5 / 4
        return rewards

    return scored


def failing_once(function, when):
    """`function`, which finds no memory the first time that `when` holds for its arguments."""
    left = [1]

    def tried(*arguments, **more):
        if left and when(*arguments):
            left.clear()
            raise MemoryError("injected")
        return function(*arguments, **more)

    return tried


def change() -> None:
    asked = os.environ.get
    if asked("SIGNAL"):
        k.score_answers = with_signal(k.score_answers)
    if asked("UNPACKED"):
        packed_rows.enable_packed_rows = lambda model: "as a test wants it"
    who, _, where = asked("OUT_OF_MEMORY", "").partition(" ")
    if who == str(distributed.rank()):
        if where == "draw":
            k.Rollouts._draw = failing_once(
                k.Rollouts._draw, lambda rollouts, prompts, trainer: trainer.state.global_step == 1
            )
        elif where == "record":
            k.Rollouts.record = failing_once(k.Rollouts.record, lambda rollouts, step, *_: step == 2)
        else:
            packed_rows.Pack.logps = failing_once(
                packed_rows.Pack.logps, lambda row, *_: len(row.real) > 1 and torch.is_grad_enabled()
            )  # not in the trial of packed rows
    if distributed.rank() == 1 and (step := asked("STOP_AT")):
        log_row = recorder.log_row

        def then_stop(number, *rest):
            if number == int(step):
                signal.raise_signal(signal.SIGTERM)
            return log_row(number, *rest)

        recorder.log_row = then_stop
    if asked("FAIL_IN") == str(distributed.rank()):

        def fail(*_, **__):
            raise k.UserError("only here")

        k.load_policy = fail


if __name__ == "__main__":  # not in the llama worker, which imports this file, too
    change()
    k.cli()
