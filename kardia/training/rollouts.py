"""Draw and score a GRPO step's answers as TRL asks for it: a `rollout_func` and reward functions."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kardia.core import distributed, machine
from kardia.core.files import json_lines
from kardia.core.options import option
from kardia.models.base import Base
from kardia.models.generate import llama_answers
from kardia.models.gguf import write_lora_gguf
from kardia.models.policy import lora_of
from kardia.training.checkpoints import save_best
from kardia.training.held_out import FILE
from kardia.training.progress import Board
from kardia.training.step_records import StepRecords


@dataclass
class RolloutOptions:
    """Hold how a GRPO step's answers are drawn."""

    redraw: int = option(
        1, "Draw a group whose rewards are all equal again, from another prompt, so many times.", min=0, max=8
    )

    temperature: float = option(1.0, "Sampling temperature of the rollouts.", min=0.01)
    top_p: float = option(1.0, "Nucleus sampling of the rollouts (1: off).", min=0.01, max=1.0)
    min_p: float = option(
        0.0, "Drop tokens less likely than this share of the best (0: off).", min=0.0, max=1.0
    )
    rollout: str = option(
        "auto", "Who samples: llama.cpp or transformers (hf).", choices=("auto", "llama", "hf")
    )
    rollout_type: str = option(
        "auto",
        "Type of the GGUF that samples; bf16 = as torch computes.",
        choices=("auto", "bf16", "q8_0", "q4_k_m"),
    )


class Rollouts:
    """Hold what a step's answers are drawn from and scored with.

    sample_group, score_answers: the script's functions. renderer: the script's Renderer. Of several processes
    each draws whole groups with a llama.cpp worker of its own.
    """

    def __init__(
        self, worker, renderer, dialogues, options, rubric, judge, base: Base, sample_group, score_answers
    ) -> None:
        self.worker, self.renderer, self.dialogues, self.options = worker, renderer, dialogues, options
        self.rubric, self.judge, self.base = rubric, judge, base
        self.sample_group, self.score_answers = sample_group, score_answers
        self.board = Board("GRPO")
        self.held_out = None  # a HeldOut, where the answers come from llama.cpp
        self.records: StepRecords | None = None
        self.lora_gguf: Path | None = None  # where the step's LoRA is written
        self.times = {"rollout": 0.0, "judge": 0.0}  # seconds
        self.redrawn = 0  # groups of the step
        self.drawn = 0  # tokens of the step's answers
        self.scored: dict[tuple, list] = {}  # (texts of a group, its prompt) -> rewards
        self.step: tuple[list[str], list] = ([], [])  # texts and rewards that TRL asked for last

    def prompts(self) -> list[dict[str, Any]]:
        """Return the prompts as TRL wants them: a chat each, and its dialogue's index for the rewards."""
        chats = [self.renderer.chat(dialogue, len(dialogue.messages)) for dialogue in self.dialogues]
        return [{"prompt": chat, "index": i} for i, chat in enumerate(chats)]

    def write_to(self, run, trainer) -> StepRecords:
        """Return the records of a run's steps; from now on each step's answers go there."""
        decode = self.renderer.tokenizer.decode
        parts = (self.board, self.dialogues, self.rubric, self.judge, self.options, decode)

        def measure(step: int) -> dict[str, float]:
            return self.measure_held_out(step, trainer, run)

        self.records = StepRecords(run, trainer, *parts, measure)
        trainer.on_rollouts = self.record
        self.lora_gguf = run.path / f".rollout-lora{distributed.rank() or ''}.gguf"
        return self.records

    def __call__(self, prompts: list, trainer) -> dict[str, list]:
        """Return {"prompt_ids", "completion_ids", "logprobs"}, one entry per chat; each chat comes G times in
        a row.

        The LoRA as it is now goes to llama.cpp, which holds the base's GGUF: the answers are the current
        policy's own.
        """
        G = trainer.num_generations
        self.drawn = self.redrawn = 0
        began = time.monotonic()
        self._send_lora(trainer)
        self.times["rollout"] += time.monotonic() - began
        # TRL repeats each prompt G times; llama.cpp decodes it once and shares its cells.
        indices = [row["index"] for row in trainer.drawing[::G]]
        places = list(range(len(indices)))
        groups = self._draw(indices, trainer, places)
        for attempt in range(1, self.options.redraw + 1):
            places = self._silent(indices, groups)
            step = list(itertools.chain(*distributed.gather(indices)))  # of all processes
            if not places:
                continue
            # What was drawn in vain is recorded nowhere but in the step's count.
            others = self._others(step, f"{trainer.state.global_step}/{attempt}")
            for i in places:
                # By its place in the step: no two groups, of whatever process, take the same one.
                indices[i] = others[(distributed.rank() * len(indices) + i) % len(others)]
            again = self._draw([indices[i] for i in places], trainer, places, f"/{attempt}")
            for i, group in zip(places, again):
                groups[i] = group
            self.redrawn += len(places)
        samples = [sample for group in groups for sample in group]
        return {
            "prompt_ids": [self._prompt(i) for i in indices for _ in range(G)],
            "completion_ids": [sample["ids"] for sample in samples],
            "logprobs": [sample["logprobs"] for sample in samples],
            "index": [i for i in indices for _ in range(G)],  # takes the place of TRL's own
        }

    def _prompt(self, index: int) -> list[int]:
        return self.renderer.prompt(self.dialogues[index])

    def _others(self, indices: list[int], place: str) -> list[int]:
        """Return the prompts that do not stand in the step yet, in the same random order in every process and
        after a resume."""
        others = [j for j in range(len(self.dialogues)) if j not in indices] or indices
        return random.Random(f"{self.options.seed}/{place}").sample(others, len(others))

    def _draw(self, indices: list[int], trainer, places: list[int], attempt: str = "") -> list[list[dict]]:
        """Return a group of answers {"ids", "logprobs"} to each prompt; places: of the groups in the step."""
        began, G, step = time.monotonic(), trainer.num_generations, trainer.state.global_step
        first = distributed.rank() * len(trainer.drawing)  # answers of the processes before this one
        # A seed per answer, by its place in the run: a resumed step draws the same answers.
        names = [f"{self.options.seed}/{step}/{first + i * G + j}{attempt}" for i in places for j in range(G)]
        seeds = [random.Random(name).getrandbits(63) for name in names]

        def on_progress(done: int) -> None:
            self.board.phase("rollouts", done, len(names))

        on_progress(0)
        prompts = [self._prompt(i) for i in indices]
        samples = self.sample_group(self.worker, prompts, trainer, self.options, seeds, on_progress)
        self.times["rollout"] += time.monotonic() - began
        self.drawn += sum(len(sample["ids"]) for sample in samples)
        return [samples[i : i + G] for i in range(0, len(samples), G)]

    def _silent(self, indices: list[int], groups: list[list[dict]]) -> list[int]:
        """Return the places of groups whose known rewards are all equal, which teach nothing."""
        decode = self.renderer.tokenizer.batch_decode
        texts = [decode([s["ids"] for s in group], skip_special_tokens=True) for group in groups]  # as TRL
        keys = [(tuple(each), index) for each, index in zip(texts, indices)]
        return [i for i, rewards in enumerate(self._score(keys)) if self._equal(rewards)]

    def _equal(self, rewards: list) -> bool:
        known = [reward for reward in rewards if reward.total(self.rubric) is not None]
        # GDPO learns from any component that differs, also where the sums are equal.
        if self.options.advantages == "grpo":
            return len({round(reward.total(self.rubric), 6) for reward in known}) < 2
        weighty = [name for name, weight in self.rubric.rewards.items() if weight]
        return all(len({round(r.counted(self.rubric)[name], 6) for r in known}) < 2 for name in weighty)

    def _send_lora(self, trainer) -> None:
        """Give llama.cpp the policy's LoRA as it is now."""
        settings, pairs = lora_of(trainer.model)
        write_lora_gguf(settings, pairs, machine.read_config(self.base.directory), self.lora_gguf)
        self.worker.set_lora("policy", self.lora_gguf)

    def begin_held_out(self, run, model) -> None:
        """Write the measurement before the first step down."""
        if self.held_out and self.held_out.start and not (run.path / FILE).exists():
            self._keep_best(run, model, self.held_out.start)
            self.held_out.write(run, self.held_out.start)

    def _keep_best(self, run, model, record: dict) -> None:
        """Save the policy if --keep best asks for it and no earlier one has as good a reward on the held-out
        prompts."""
        if self.options.keep == "best" and distributed.rank() == 0 and record.get("reward") is not None:
            path = run.path / FILE
            rows = [row for _, row, _ in json_lines(path)] if path.exists() else []
            earlier = [row["reward"] for row in rows if row.get("reward") is not None]
            if record["reward"] > max(earlier, default=float("-inf")):
                save_best(run, model, record["step"])

    def measure_held_out(self, step: int, trainer, run) -> dict[str, float]:
        """Measure the policy after `step` on held-out prompts if it is time; return numbers for the log."""
        options = self.options
        wanted = step % options.eval_every == 0 or step == options.steps
        if self.held_out is None or not wanted:
            return {}

        # The weights have moved since the rollouts of this step.
        def answer(dialogues) -> list[str]:
            self._send_lora(trainer)
            prompts = [self.renderer.prompt(dialogue) for dialogue in dialogues]
            # No more room in llama.cpp's context than a group of rollouts takes.
            longest, G, most = max(map(len, prompts)), options.group_size, options.max_tokens
            parallel = max(1, (longest + G * most) // (longest + most))
            limits = {"max_tokens": most, "parallel": parallel}
            return llama_answers(self.worker, "policy", self.renderer.tokenizer, prompts, **limits)

        self.board.phase("held-out prompts")
        record = self.held_out.measure(step, answer)
        self._keep_best(run, trainer.model, record)
        return self.held_out.write(run, record)

    def rewards(self, completions, index) -> list:
        """Return a batch's rewards, computed once and shared by the reward functions."""
        texts, G = [completion[0]["content"] for completion in completions], self.options.group_size
        keys = [(tuple(texts[i : i + G]), index[i]) for i in range(0, len(texts), G)]
        groups = self._score(keys)
        self.scored = dict(zip(keys, groups))  # what was drawn in vain is forgotten
        self.step = texts, [reward for group in groups for reward in group]
        return self.step[1]

    def _score(self, groups: list[tuple]) -> list[list]:
        """Return the rewards of groups (texts, index of the prompt), each scored once."""
        new = [group for group in dict.fromkeys(groups) if group not in self.scored]
        if new:
            began = time.monotonic()
            self.board.phase("judging")
            answers = [(self.dialogues[index], text) for texts, index in new for text in texts]
            rewards = iter(self.score_answers(answers, self.rubric, self.judge))
            self.scored |= {group: [next(rewards) for _ in group[0]] for group in new}
            self.times["judge"] += time.monotonic() - began
        return [self.scored[group] for group in groups]

    def reward_functions(self) -> list[Callable]:
        """Return one function per component, as TRL calls them.

        TRL takes None as 0 in a sum, so an answer with one unknown component gets None from all: it takes no
        part.
        """

        def component(name: str) -> Callable:
            def function(prompts, completions, index, log_metric=None, **_):
                rewards = self.rewards(completions, index)
                if name == "format" and log_metric:
                    self._log(rewards, log_metric)
                unknown = [reward.total(self.rubric) is None for reward in rewards]
                values = [reward.counted(self.rubric)[name] or 0.0 for reward in rewards]
                return [None if left_out else value for left_out, value in zip(unknown, values)]

            function.__name__ = name
            return function

        return [component(name) for name in self.rubric.rewards]

    def _log(self, rewards: list, log_metric: Callable) -> None:
        for name in dict.fromkeys(name for reward in rewards for name in reward.criteria):
            known = [r.criteria[name] for r in rewards if r.criteria.get(name) is not None]
            if known:
                log_metric(f"criteria/{name}", sum(known) / len(known))
        for name, seconds in self.times.items():
            log_metric(f"time/{name}", seconds)
        if self.judge:
            replies = len(rewards) + self.redrawn * self.options.group_size
            scores = replies * len(self.rubric.criteria)
            log_metric("judge_scores_per_second", scores / max(1e-3, self.times["judge"]))
        # TRL takes the mean over processes: of their sums.
        if self.redrawn or distributed.size() > 1:
            log_metric("redrawn", self.redrawn * distributed.size())
        if self.drawn:  # by llama.cpp; TRL does not report how long its own rollouts took
            log_metric("tokens_per_second", self.drawn / max(1e-3, self.times["rollout"]))
        self.times = dict.fromkeys(self.times, 0.0)

    def record(self, step: int, inputs: list[dict], output: dict) -> None:
        """Hand the step's answers, scores and advantages to the records."""
        self.records.record(step, [row["index"] for row in inputs], *self.step, output)
