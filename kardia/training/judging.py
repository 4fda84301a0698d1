"""Open what a GRPO run is rewarded by: the rubric with its judge, and the held-out prompts that test both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kardia.core.console import UserError
from kardia.data.rewards import reward_facts, rewards_hash
from kardia.data.rubric import Rubric
from kardia.judge.judge import NO_JUDGE, Judge
from kardia.judge.opening import drop_unfit_criteria, open_judge, refuse_unfit_criteria
from kardia.llama.worker import Worker
from kardia.models.memory_plan import Setting
from kardia.training.held_out import HeldOut, open_held_out


@dataclass
class Judging:
    """Hold a run's rubric, without what its judge failed; the judge and its exam; the held-out prompts."""

    rubric: Rubric
    judge: Judge | None
    exam: dict[str, Any] | None
    held_out: HeldOut | None
    dropped: list[str]  # criteria

    def hashes(self) -> dict[str, str]:
        """Return the hashes of what a resumed run must find unchanged."""
        judge = (self.exam or {}).get("judge_hash", "none")
        held_out = self.held_out.hash if self.held_out else "none"
        return {"judge": judge, "held_out": held_out, "rewards": rewards_hash(self.rubric)}

    def facts(self) -> dict[str, Any]:
        """Return what run.json says of them."""
        start = self.held_out.start if self.held_out else None
        facts = {"judge_exam": self.exam, "dropped_criteria": self.dropped, "held_out_start": start}
        return facts | {"reward": reward_facts(self.rubric)}


def open_judging(
    worker: Worker, rubric: Rubric, options: Any, setting: Setting, before: dict, script: tuple, answerer
) -> Judging:
    """Return the judging of a GRPO run, its criteria settled: the exam first, then the held-out prompts.

    before: the facts of a run that is resumed. script: (load_rows, score_answers) of the script.
    answerer(): the script's Answerer of the policy that training begins with.
    """
    judge, exam, dropped = None, None, []
    # A rubric of weight 0 is logged: its judge is asked, and may fail its exam.
    rewarded = bool(rubric.rewards["rubric"])
    if rewarded and options.judge == NO_JUDGE:
        fix = "give a judge, or train without it: --reward rubric=0"
        raise UserError(f"--judge none, but the rubric carries weight in the reward; {fix}")
    if options.judge != NO_JUDGE:
        layers = options.judge_gpu_layers if setting.judge_on_gpu else 0
        judge, exam = open_judge(worker, rubric, options, layers)
        if rewarded:
            refuse_unfit_criteria(exam, options, before)  # now, before the policy is asked
    held_out = open_held_out(options, rubric, judge, setting.rollout, script)
    if held_out:
        held_out.test_judge(answerer(), options, setting, exam, before)
    if judge and rewarded:
        rubric, dropped = drop_unfit_criteria(rubric, exam, options, before)
        judge.rubric = rubric
    if held_out and dropped:
        held_out.use(rubric)
    return Judging(rubric, judge, exam, held_out, dropped)
