"""Draw and score a GRPO step's answers as TRL asks for it: a `rollout_func` and reward functions."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kardia.core import distributed, machine
from kardia.models.base import Base
from kardia.models.generate import llama_answers
from kardia.models.gguf import write_lora_gguf
from kardia.models.policy import lora_of
from kardia.training.held_out import FILE
from kardia.training.progress import Board
from kardia.training.step_records import StepRecords


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
        self.drawn = 0  # tokens of the step's answers
        self.scored: tuple[Any, list] = (None, [])

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
        began, G, step = time.monotonic(), trainer.num_generations, trainer.state.global_step
        self._send_lora(trainer)
        # TRL repeats each prompt G times; llama.cpp decodes it once and shares its cells.
        unique = [self.renderer.ids(self.renderer.render(chat, generate=True)) for chat in prompts[::G]]
        first = distributed.rank() * len(prompts)  # answers of the processes before this one
        # A seed per answer, by its place in the run: a resumed step draws the same answers.
        names = [f"{self.options.seed}/{step}/{first + i}" for i in range(len(prompts))]
        seeds = [random.Random(name).getrandbits(63) for name in names]

        def on_progress(done: int) -> None:
            self.board.phase("rollouts", done, len(prompts))

        on_progress(0)
        samples = self.sample_group(self.worker, unique, trainer, self.options, seeds, on_progress)
        self.times["rollout"] = time.monotonic() - began
        self.drawn = sum(len(sample["ids"]) for sample in samples)
        return {
            "prompt_ids": [ids for ids in unique for _ in range(G)],
            "completion_ids": [sample["ids"] for sample in samples],
            "logprobs": [sample["logprobs"] for sample in samples],
        }

    def _send_lora(self, trainer) -> None:
        """Give llama.cpp the policy's LoRA as it is now."""
        settings, pairs = lora_of(trainer.model)
        write_lora_gguf(settings, pairs, machine.read_config(self.base.directory), self.lora_gguf)
        self.worker.set_lora("policy", self.lora_gguf)

    def begin_held_out(self, run) -> None:
        """Write the measurement before the first step down."""
        if self.held_out and self.held_out.start and not (run.path / FILE).exists():
            self.held_out.write(run, self.held_out.start)

    def measure_held_out(self, step: int, trainer, run) -> dict[str, float]:
        """Measure the policy after `step` on held-out prompts if it is time; return numbers for the log."""
        options = self.options
        wanted = step % options.held_out_every == 0 or step == options.steps
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
        return self.held_out.write(run, self.held_out.measure(step, answer))

    def rewards(self, completions, index) -> list:
        """Return a batch's rewards, computed once and shared by the reward functions."""
        texts = [completion[0]["content"] for completion in completions]
        key = (tuple(texts), tuple(index))
        if self.scored[0] != key:
            began = time.monotonic()
            self.board.phase("judging")
            answers = [(self.dialogues[i], text) for i, text in zip(index, texts)]
            self.scored = key, self.score_answers(answers, self.rubric, self.judge)
            self.times["judge"] = time.monotonic() - began
        return self.scored[1]

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
                unknown = [reward.total(self.rubric.rewards) is None for reward in rewards]
                values = [reward.components[name] or 0.0 for reward in rewards]
                return [None if left_out else value for left_out, value in zip(unknown, values)]

            function.__name__ = name
            return function

        return [component(name) for name in self.rubric.rewards]

    def _log(self, rewards: list, log_metric: Callable) -> None:
        for name in rewards[0].criteria:
            known = [r.criteria[name] for r in rewards if r.criteria.get(name) is not None]
            if known:
                log_metric(f"criteria/{name}", sum(known) / len(known))
        for name, seconds in self.times.items():
            log_metric(f"time/{name}", seconds)
        if self.judge:
            scores = len(rewards) * len(self.rubric.criteria)
            log_metric("judge_scores_per_second", scores / max(1e-3, self.times["judge"]))
        if self.drawn:  # by llama.cpp; TRL does not report how long its own rollouts took
            log_metric("tokens_per_second", self.drawn / max(1e-3, self.times["rollout"]))

    def record(self, step: int, inputs: list[dict], output: dict) -> None:
        """Hand the step's answers, scores and advantages to the records."""
        (texts, _), rewards = self.scored
        self.records.record(step, [row["index"] for row in inputs], list(texts), rewards, output)
