"""Ask held-out prompts while GRPO trains, and notice a policy that scores above what people would write.

A small model does not write better than the person who wrote `data/eval.jsonl`: where the judge says so, the
policy has learned to please the judge (over-optimization), or the judge reads nothing there. Before the first
step the same comparison is a test of the judge, against the very policy that it shall reward.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kardia.core import distributed
from kardia.core.console import UserError, progress, say
from kardia.core.files import file_hash
from kardia.core.options import DATA, option
from kardia.core.run_directory import Run
from kardia.data.rubric import Rubric
from kardia.judge.judge import Judge, weighted
from kardia.models.base import load_into_worker
from kardia.results.run_files import mean_of
from kardia.results.statistics import reference_wins, well_read

FILE = "held_out.jsonl"  # in the run directory: a line per measurement
ASKED = "Dialogues whose first turns are asked now and then (default: data/eval.jsonl for the starter data)."


@dataclass
class HeldOutOptions:
    """Hold the options of measurements on held-out prompts during training."""

    eval_data: Path | None = option(None, ASKED)
    eval_prompts: int = option(16, "How many of them (0: none).", min=0)
    eval_every: int = option(20, "Steps between these measurements; also before the first.", min=1)
    keep: str = option(
        "last",
        "best: also write the adapter with the best reward there, to RUN/best.",
        choices=("last", "best"),
    )


def open_held_out(options: Any, rubric: Rubric, judge: Judge | None, rollout: str, script: tuple) -> Any:
    """Return the HeldOut of a GRPO run; None where this data has none, or where torch draws the answers
    (UserError if --keep best needs it).

    script: (load_rows, score_answers) of the script.
    """
    held_out = _open(options, rubric, judge, rollout, script)
    if held_out is None and options.keep == "best":
        raise UserError(
            "--keep best needs held-out prompts: --eval-data FILE, rows that end in a written answer"
        )
    return held_out


def _open(options: Any, rubric: Rubric, judge: Judge | None, rollout: str, script: tuple) -> Any:
    load_rows, score_answers = script
    starter = DATA / "eval.jsonl" if Path(options.data).resolve() == DATA / "prompts.jsonl" else None
    path = options.eval_data or starter
    if path is None or not options.eval_prompts:
        return None
    try:
        rows = load_rows([path], rubric, "dialogue")[: options.eval_prompts]
    except UserError:
        if options.eval_data:
            raise
        say(f"  held-out prompts left out: {path.name} is of another rubric; --eval-data names your own")
        return None
    if rollout != "llama":
        say("  held-out prompts are not asked while torch draws the answers: `evaluate` does it afterwards")
        return None
    return HeldOut(rows, rubric, judge, score_answers, path)


def _mean(values: list[float | None]) -> float | None:
    return mean_of([value for value in values if value is not None])


def _witness_means(rewards: list) -> dict[str, float]:
    """Return the mean of each criterion as the witness reads it; {} without a witness."""
    names = dict.fromkeys(name for reward in rewards for name in reward.witness)
    means = {name: _mean([reward.witness.get(name) for reward in rewards]) for name in names}
    return {name: mean for name, mean in means.items() if mean is not None}


class HeldOut:
    """Hold the held-out prompts with their written answers, and measure a policy's answers against these.

    rows: the script's Dialogues, each with a written answer to its first turn. score_answers: the script's.
    """

    def __init__(self, rows: list, rubric: Rubric, judge: Judge | None, score_answers, path: Path) -> None:
        self.dialogues = [row.first_prompt() for row in rows]
        self.written = [row.messages[1][1] for row in rows]
        self.rubric, self.judge, self.score_answers = rubric, judge, score_answers
        self.hash = file_hash(path)  # a resumed run asks the same prompts
        self.references: list | None = None  # rewards of the written answers, once they were asked for
        self.latest: list = []  # rewards of the policy's answers, measured last
        self.start: dict[str, Any] | None = None  # the measurement before the first step

    def measure(self, step: int, answer: Callable[[list], list[str]]) -> dict[str, Any]:
        """Return the means of a policy's answers at `step`, and how often the written ones score above them.

        answer(dialogues) returns one answer each; process 0 asks for all.
        """
        began, record = time.monotonic(), None
        if distributed.rank() == 0:
            # The written answers do not change, so the judge reads them once.
            if self.references is None:
                self.references = self._score(self.written)
            self.latest = self._score(answer(self.dialogues))
            record = {**self._record(step), "seconds": round(time.monotonic() - began, 2)}
        return distributed.same(record)

    def _record(self, step: int) -> dict[str, Any]:
        record = {"step": step, "n": len(self.latest), **self._means(self.latest)}
        record["reward"] = _mean([reward.total(self.rubric) for reward in self.latest])
        names = ["rubric", *(c.name for c in self.rubric.criteria)] if self.judge else []
        wins = reference_wins({"policy": self.latest}, dict(enumerate(self.references)), names)
        record |= {"wins": wins.get("policy", {}), "written": self._means(self.references)["rubric"]}
        read = {"witness": self.latest, "witness_of_written": self.references}
        return record | {key: _witness_means(rewards) for key, rewards in read.items()}

    def use(self, rubric: Rubric) -> None:
        """Take over a rubric whose criteria carry other weights, also in what was measured before."""
        self.rubric = rubric
        if self.latest and self.start and self.judge:
            for reward in (*self.latest, *self.references):
                reward.components["rubric"] = weighted(reward.criteria, rubric.weights)
            self.start = {**self.start, **self._record(0)}

    def _score(self, texts: list[str]) -> list:
        rewards = self.score_answers(list(zip(self.dialogues, texts)), self.rubric, self.judge)
        if self.judge:
            form = self.rubric.form
            for reward, scores in zip(rewards, self.judge.witness_of(self.dialogues, texts, form)):
                reward.witness = scores
        return rewards

    def _means(self, rewards: list) -> dict[str, float | None]:
        return {name: _mean([r.components[name] for r in rewards]) for name in self.rubric.rewards}

    def test_judge(self, answerer, options, setting, exam: dict | None, before: dict) -> None:
        """Measure the policy that training begins with; what the judge fails goes into its exam.

        A criterion by which the policy surely (95%) beats the written answers is unfit. answerer: the
        script's Answerer of that policy. before: the facts of a run that is resumed.
        """
        self.start = before.get("held_out_start")
        if self.start is None:
            say(f"  {len(self.dialogues)} held-out prompts: the policy's answers against the written ones")
            # The same file as the rollouts, which is what the memory plan knows.
            worker = answerer.worker
            answerer.gguf = answerer.base.quantized(worker, setting.bits, setting.rollout_type)
            load_into_worker(worker, answerer.gguf, before.get("fused_attention"), planned=True)

        def answer(dialogues: list) -> list[str]:
            with progress("answers", len(dialogues)) as on_progress:
                return answerer.answer(dialogues, options.max_tokens, on_progress=on_progress)

        self.start = self.start or self.measure(0, answer)
        for name, entry in (exam or {"criteria": {}})["criteria"].items():
            won = well_read(self.start["wins"]).get(name)
            # Sixteen prompts are few: only what is sure counts against the judge.
            if won and won["high"] < 0.5:
                share = f"written replies win only {won['rate']:.0%} of {won['n']} against this policy's own"
                entry.update(
                    fit=False, why=f"{share}: the judge cannot tell them apart, or prefers the worse"
                )

    def write(self, run: Run, record: dict[str, Any]) -> dict[str, float]:
        """Append a measurement to the run's file and say it; return its numbers for the step's line."""
        # Without the seconds the same run is the same file.
        if distributed.rank() == 0:
            run.append(FILE, [{key: value for key, value in record.items() if key != "seconds"}])
        names = [*self.rubric.rewards, "reward"]
        known = {name: record[name] for name in names if record.get(name) is not None}
        seen = _mean(list((record.get("witness") or {}).values()))
        known |= {} if seen is None else {"witness": seen}
        parts = [f"{name} {value:.2f}" for name, value in known.items()]
        won = record["wins"].get("rubric")
        parts += [f"written replies win {won['rate']:.0%} of {won['n']} that the judge read"] if won else []
        say(f"  held-out prompts after step {record['step']}: {', '.join(parts)}")
        began = ((self.start or {}).get("wins") or {}).get("rubric") or {"rate": 1.0}
        rewarded = bool(self.rubric.rewards["rubric"])
        enough = rewarded and record["step"] and "rubric" in well_read(record["wins"])
        if enough and won["rate"] < 0.5 <= began["rate"]:
            say("  ! the policy scores above written replies: over-optimization; take another --judge")
        numbers = {f"held_out/{name}": value for name, value in known.items()}
        numbers |= {"held_out/written_wins": won["rate"]} if won else {}
        return {**numbers, "time/held_out": record["seconds"]}
