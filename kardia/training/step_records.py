"""Write down every answer of a GRPO step with its scores, and of an inspected step what the update did to its
tokens."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

from kardia.core import distributed
from kardia.core.run_directory import Run
from kardia.data.rows import find_span
from kardia.results.groups import spread_of
from kardia.training.progress import Board
from kardia.training.trainers import logps_before_and_after


class StepRecords:
    """Collect a step's rollouts (`record`) and write them once the weights have moved (`step_done`).

    Of several processes each records its own groups; the first one writes for all.
    """

    def __init__(
        self, run: Run, trainer, board: Board, dialogues, rubric, judge, options, decode: Callable, measure
    ) -> None:
        self.run, self.trainer, self.board = run, trainer, board
        self.dialogues, self.decode = dialogues, decode
        self.rubric, self.judge, self.options = rubric, judge, options
        self.measure = measure  # step -> numbers for the log, once the weights have moved
        self.rows: list[dict] = []
        self.first_group, self.seconds = 0, 0.0

    def record(self, step: int, indices: list[int], texts: list[str], rewards: list, output: dict) -> None:
        """Take the step's answers; rewards: one `Reward` each; output: TRL's batch with our advantages."""
        every, form, G = self.options.inspect_every, self.rubric.form, self.trainer.num_generations
        self.trainer.inspecting = bool(every) and (step % every == 0 or step in (1, self.options.steps))
        self.first_group = distributed.rank() * (len(rewards) // G)  # among the step's groups
        dialogues = [self.dialogues[i] for i in indices]
        witness = self._witness_scores(dialogues, texts)
        self.rows = []
        for i, (dialogue, text, reward) in enumerate(zip(dialogues, texts, rewards)):
            self.rows.append(
                {
                    "step": step,
                    "group": self.first_group + i // G,
                    "sample": i % G,
                    **_prompt_facts(dialogue),
                    "completion": text,
                    **self._update_facts(output, i),
                    "problem": reward.problem,
                    "refused": reward.refused,
                    "components": reward.components,
                    "criteria": reward.criteria,
                    "witness": witness[i] if witness else None,
                    "weights": self.rubric.rewards,
                    "gate": self.rubric.gate,
                    "compared": self.options.advantages,
                    "reward": reward.total(self.rubric),
                }
            )
        # An answer that could not be judged is shown only if there is no other.
        best = max(self.rows, key=lambda row: -1.0 if row["reward"] is None else row["reward"])
        reply = find_span(best["completion"], form.reply) or best["completion"]
        self.board.sample(reply, best["reward"])
        self.board.phase("update")

    def _witness_scores(self, dialogues, texts: list[str]) -> list[dict]:
        """Ask the witness, whose scores are never rewarded; [] if this step is not inspected."""
        began, scores = time.monotonic(), []
        if self.judge and self.trainer.inspecting:
            scores = self.judge.witness_of(dialogues, texts, self.rubric.form)
        self.seconds = time.monotonic() - began
        return scores

    def _update_facts(self, output: dict, i: int) -> dict[str, Any]:
        n = int(output["completion_mask"][i].sum())
        sampled = output.get("sampling_per_token_logps")
        return {
            "tokens": n,
            "truncated": n >= self.trainer.max_completion_length,
            "advantage": float(output["advantages"][i]),
            "logprob": None if sampled is None else float(sampled[i][:n].mean()),
            "logprob_after": None,
        }

    def step_done(self, step: int) -> dict[str, float]:
        """Write the step down. Return what its line in log.jsonl shall say besides."""
        began, inspected, tokens = time.monotonic(), bool(self.trainer.inspected_passes), []
        if inspected:
            tokens = self._inspect(step)
            self.trainer.inspected_passes = []
        answers, traced = (list(itertools.chain(*distributed.gather(rows))) for rows in (self.rows, tokens))
        for name, everyone in (("completions.jsonl", answers), ("tokens.jsonl", traced)):
            if everyone:
                self.run.append(name, everyone)
        seconds = round(self.seconds + time.monotonic() - began, 3)
        facts = {"time/inspect": seconds, **_witness_means(answers)} if inspected else {}
        return facts | self.measure(step) | _not_computed(answers)

    def _inspect(self, step: int) -> list[dict]:
        """Return what the update did to the tokens of the group whose rewards differed most.

        [] from a process that does not hold that group.
        """
        G = self.trainer.num_generations
        groups = [self.rows[i : i + G] for i in range(0, len(self.rows), G)]
        spreads = list(itertools.chain(*distributed.gather([spread_of(group) for group in groups])))
        widest = max(range(len(spreads)), key=spreads.__getitem__)
        own = widest - self.first_group
        if not 0 <= own < len(groups):
            return []
        tokens = []
        for row, (ids, before, after) in zip(
            groups[own], logps_before_and_after(self.trainer, own * G, (own + 1) * G)
        ):
            row.update(logprob=sum(before) / len(before), logprob_after=sum(after) / len(after))
            tokens.append(
                {
                    "step": step,
                    "group": widest,
                    "sample": row["sample"],
                    "epsilon": self.options.epsilon,
                    "tokens": [self.decode([i]) for i in ids],
                    "before": [round(x, 4) for x in before],
                    "after": [round(x, 4) for x in after],
                }
            )
        return tokens


def _prompt_facts(dialogue) -> dict[str, Any]:
    return {
        "person": dialogue.person,
        "label": dialogue.label,
        "situation": dialogue.situation,
        "messages": [{"role": role, "content": content} for role, content in dialogue.messages],
    }


def _not_computed(answers: list[dict]) -> dict[str, float]:
    """Return NaN, which is not logged, for components that no answer has: TRL was handed 0 for them."""
    names = answers[0]["components"] if answers else {}
    missing = [name for name in names if all(row["components"][name] is None for row in answers)]
    return {f"rewards/{name}/{part}": math.nan for name in missing for part in ("mean", "std")}


def _witness_means(answers: list[dict]) -> dict[str, float]:
    """Return {"witness/<criterion>": mean over the step's answers}, for the step's line."""
    rows = [row["witness"] for row in answers if row["witness"]]
    known = {name: [row[name] for row in rows if row[name] is not None] for name in (rows or [{}])[0]}
    return {f"witness/{name}": sum(found) / len(found) for name, found in known.items() if found}
