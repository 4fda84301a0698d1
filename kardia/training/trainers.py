"""Connect the script's losses, rewards and advantages to TRL's trainers. What is here only serves TRL.

TRL's SFTTrainer and GRPOTrainer keep the loop, the optimizer and the bookkeeping. `compute_loss` and
`_compute_loss` call the functions of kardia_lite.py, and its `grpo_advantages` (or `gdpo_advantages`) makes
the advantages that train.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from kardia.core import distributed, machine
from kardia.core.console import UserError, one_line
from kardia.models import packed_rows, unsloth
from kardia.training.out_of_memory import RetryOnOutOfMemory


@contextmanager
def lora_unrounded(model):
    """Keep the LoRA in float32 while a trainer is made.

    TRL rounds the LoRA of a 4-bit model to bfloat16, which has 8 bits of precision. A GRPO update is smaller
    than its rounding step: a learning rate of 2e-5 cannot move a weight of 0.1, whose neighbours are 5e-4
    away.
    """
    exact = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        # "ref" is TRL's copy of the adapter, the reference of the KL penalty.
        source = exact.get(name.replace(".ref.", ".default."))
        if source is not None:
            parameter.data = source if name in exact else source.clone()


def side_by_side(examples: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Return a micro-batch as one row without padding: input_ids [L], labels [L], the dialogues' lengths."""
    import torch

    def joined(key: str):
        return torch.tensor([token for example in examples for token in example[key]])

    lengths = [len(example["input_ids"]) for example in examples]
    return {"input_ids": joined("input_ids"), "labels": joined("labels"), "lengths": lengths}


def blank_examples(count: int, micro: int, token: int) -> list[dict[str, list[int]]]:
    """Return examples that teach nothing, so that all processes have as many micro-batches of `micro`
    dialogues."""
    processes = distributed.size()
    missing = -count % (micro * processes) if processes > 1 else 0
    return [{"input_ids": [token] * 2, "labels": [-100] * 2} for _ in range(missing)]


def enable_packed_rows(engine: str, model) -> str | None:
    """Let a PeftModel take packed rows. Return None, or the reason why it cannot. Raise UserError for
    Unsloth's model."""
    enable = unsloth.enable_packed_rows if engine == "unsloth" else packed_rows.enable_packed_rows
    reason = enable(model.base_model.model)
    if reason and engine == "unsloth":  # TRL's own path over Unsloth's model was never compared with anything
        raise UserError(
            f"--engine unsloth: this model does not take packed rows there ({reason}); --engine "
            f"transformers trains it"
        )
    packed_rows.accept_packed_rows(model)
    return reason and f"{engine}, {model.config.model_type}: {reason}"


class SFTHooks(RetryOnOutOfMemory):
    """Give TRL's SFTTrainer the loss `sft_loss`, and smaller passes when memory runs out.

    packed: dialogues of a micro-batch lie side by side in one row (`side_by_side`); else TRL's own loss on
    padded rows.
    """

    sft_loss: Callable
    longest: list[dict] = []  # a micro-batch of the longest examples
    examples = 0  # in the dataset, before blank ones

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.packed:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        chunk = self.pass_size.chunk if self.pass_size else 128
        loss, counts = self.sft_loss(model, inputs, num_items_in_batch, chunk)
        self._log_counts(counts)
        # The token count is of all processes, the gradient the mean over them.
        return loss if num_items_in_batch is None else loss * self.accelerator.num_processes

    def _log_counts(self, counts: dict[str, float]) -> None:
        totals = {name: sum(row[name] for row in distributed.gather(counts)) for name in counts}
        metrics = self._metrics["train"]
        for name, total in (("entropy", totals["entropy"]), ("mean_token_accuracy", totals["correct"])):
            metrics[name].append(total / max(1, totals["trained"]))
        self._total_train_tokens += totals["tokens"]
        metrics["num_tokens"] = [self._total_train_tokens]

    def _get_train_sampler(self, *arguments):
        if distributed.size() == 1:
            return super()._get_train_sampler(*arguments)
        return _one_order(self)

    def passes_of(self, inputs):
        rows = self.pass_size.passes
        lengths = inputs.get("lengths") or [1] * len(inputs["input_ids"])  # a padded dialogue is one row
        for first in range(0, len(lengths), rows):
            begin, end = sum(lengths[:first]), sum(lengths[: first + rows])
            part = {key: value[begin:end] for key, value in inputs.items() if key != "lengths"}
            if self.packed:
                part["lengths"] = lengths[first : first + rows]
            yield inputs if len(lengths) <= rows else part

    def largest_pass(self):
        inputs = self.data_collator(self.longest[: self.pass_size.passes])
        return inputs, (inputs["labels"] != -100).sum(), inputs["input_ids"].numel()


def _one_order(trainer: SFTHooks):
    """Return a sampler of one process's order of the examples, then of the blank ones.

    Consecutive batches go to the processes in turn. Without blank examples accelerate fills the last batch
    with examples from the beginning, which would count twice.
    """
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import Sampler

    examples, rows = trainer.examples, len(trainer.train_dataset)

    class OneOrder(Sampler):
        def __init__(self) -> None:
            self.shuffled = SeedableRandomSampler(range(examples), data_seed=trainer.args.data_seed)

        def __iter__(self):
            # accelerate does not find this sampler when a run goes on in the middle of an epoch. The state
            # is looked up now: the trainer makes a new one after it made its data loader.
            self.shuffled.set_epoch(int(trainer.state.epoch or 0))
            yield from self.shuffled
            yield from range(examples, rows)

        def __len__(self) -> int:
            return rows

    return OneOrder()


class GRPOHooks(RetryOnOutOfMemory):
    """Give TRL's GRPOTrainer the script's log-probs, rewards, advantages and loss.

    A pass holds answers to one prompt, so the update computes the prompt once per group. Every rollout is
    handed to `on_rollouts`.
    """

    answer_logps: Callable
    advantages: Callable  # (components [N, K], weights [K], group size) -> [N]
    grpo_loss: Callable
    old_logps_from_sampler = False  # the clipped ratio then corrects for the sampler's other weights
    on_rollouts: Callable | None = None  # called with the step's rollouts once their advantages are known
    drawing: list[dict] = []  # the step's rows, as TRL's loader gave them
    inspecting = False  # this step's log-probs are kept, to be compared with those after it
    longest: list[int] = []  # ids of the longest prompt
    inspected_passes: list[tuple] = []  # (input_ids, attention_mask, C, log-probs [B, C]) of each pass

    # ------------------------------------------------------------------- the loop of a step

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.begin_step(model)
        step, parts = self._step, self.args.steps_per_generation
        if step % (parts * self.num_iterations) == 0 or self._buffered_inputs is None:
            self.model.train()  # TRL looks at this to tell training from evaluation
            self._buffered_inputs = self._draw(inputs)
            self._counts = self._count_metrics()  # a pass that is done again does not draw again
        n, part = len(self._buffered_inputs["completion_ids"]), step % parts
        rows = _rows(self._buffered_inputs, n * part // parts, n * (part + 1) // parts)
        loss = super().training_step(model, (step, rows), num_items_in_batch)
        self._step = step + 1
        return loss

    def _prepare_inputs(self, inputs):
        return inputs if self.model.training else super()._prepare_inputs(inputs)

    def _draw(self, inputs):
        """Return the step's answers with their advantages, in TRL's format but without its shuffle."""
        self.drawing = inputs
        try:
            return self._generate_and_score_completions(inputs)
        except Exception as error:
            if not machine.out_of_memory(error):
                raise
            reason = one_line(error)
        step = self.state.global_step + 1
        raise UserError(
            f"step {step}: out of memory while drawing or judging answers ({reason}). {self.smaller_options}"
        )

    def passes_of(self, micro_batch):
        step, batch = micro_batch
        # Rows of one prompt stand together, so a pass of a group's divisor never mixes two prompts.
        n = len(batch["completion_ids"])
        for first in range(0, n, self.pass_size.passes):
            self._step = step  # TRL counts passes as if each were a micro-batch
            yield _rows(batch, first, min(first + self.pass_size.passes, n))

    def largest_pass(self):
        import torch

        rows, C, device = self.pass_size.passes, self.max_completion_length, self.accelerator.device
        prompt = torch.tensor([self.longest] * rows, device=device)  # [rows, P]
        answer = prompt.repeat(1, -(-C // prompt.shape[1]))[:, :C]  # [rows, C], any tokens
        zeros = torch.zeros(rows, C, device=device)
        inputs = {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
            "completion_ids": answer,
            "completion_mask": torch.ones_like(answer),
            "advantages": zeros[:, 0],
            "num_items_in_batch": torch.tensor(rows * C, device=device),
            "ref_per_token_logps": zeros,
        }
        prompts = 1 if self.packed else rows
        return inputs, None, prompts * prompt.shape[1] + answer.numel()

    # ------------------------------------------------------------------- rewards and advantages

    def _calculate_rewards(self, *arguments, **keywords):
        # [answers of all processes, components]; NaN in every column where an answer could not be judged
        self._components = super()._calculate_rewards(*arguments, **keywords)
        return self._components

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        weights = self.reward_weights.to(self._components.device)
        first = self.accelerator.process_index * len(inputs)
        # [answers of all processes]
        advantages = self.advantages(self._components, weights, self.num_generations)
        output["advantages"] = advantages[first : first + len(inputs)]
        sampled = output.get("sampling_per_token_logps")
        if self.old_logps_from_sampler and sampled is not None:
            output["old_per_token_logps"] = sampled
        self.inspected_passes = []
        if self.on_rollouts:
            self.on_rollouts(self.state.global_step + 1, inputs, output)
        return output

    # ------------------------------------------------------------------- log-probs and loss

    def _compute_loss(self, model, inputs):
        import torch

        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)  # [B, P + C]
        attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        mask = inputs["completion_mask"]  # [B, C]
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model, ids, attended, mask.shape[1], compute_entropy=True
        )  # [B, C] each
        old = inputs.get("old_per_token_logps")
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        # The count spans all answers that were drawn; a step takes its share of them.
        tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        loss, parts = self.grpo_loss(
            logps,
            logps.detach() if old is None else old,
            inputs["advantages"],
            mask,
            tokens,
            self.epsilon_low,
            inputs.get("ref_per_token_logps"),
            self.beta,
        )
        self._log_parts(mask, {"entropy": entropies, **parts})
        return loss

    def _log_parts(self, mask, parts) -> None:
        """Log the mean of each [B, C] tensor over the real tokens of all processes."""
        import torch

        for name, values in parts.items():
            sums = torch.stack([(values * mask).sum(), mask.sum().float()])
            total, count = self.accelerator.reduce(sums, reduction="sum")
            self._metrics["train"][name].append((total / count.clamp(min=1.0)).item())

    def _get_per_token_logps_and_entropies(self, model, ids, mask, C, compute_entropy=False, **keywords):
        import torch

        compute = self._packed_logps if self.packed else super()._get_per_token_logps_and_entropies
        logps, entropies, *rest = compute(model, ids, mask, C, compute_entropy=compute_entropy, **keywords)
        if self.inspecting and torch.is_grad_enabled():
            self.inspected_passes.append((ids, mask, C, logps.detach()))
        return (logps, entropies, *rest)

    def _packed_logps(self, model, ids, mask, C, compute_entropy=False, **_):
        """Return log-probs and entropies [B, C] of answers, a row per run of equal prompts; TRL's
        interface."""
        import torch

        keep, parts, start = mask.bool(), [], 0
        prompts = ids[:, :-C].where(keep[:, :-C], -1)  # [B, P], equal where the prompts are
        while start < len(ids):
            end = start + 1
            while end < len(ids) and torch.equal(prompts[end], prompts[start]):
                end += 1
            prompt = ids[start, :-C][keep[start, :-C]]  # [P without padding]
            answers = [row[real] for row, real in zip(ids[start:end, -C:], keep[start:end, -C:])]
            parts.append(self.answer_logps(model, prompt, answers, self.temperature, self.pass_size.chunk))
            start = end
        empty = torch.zeros(len(ids), C, device=ids.device)
        logps, entropies, _ = (empty.masked_scatter(keep[:, -C:], torch.cat(flat)) for flat in zip(*parts))
        return logps, entropies if compute_entropy else None, None


def trainer_class(hooks: type, **functions: Callable) -> type:
    """Return TRL's trainer with `hooks` (SFTHooks or GRPOHooks) in front of it, and the script's functions as
    its parts."""
    import trl

    trainer = trl.SFTTrainer if issubclass(hooks, SFTHooks) else trl.GRPOTrainer
    parts = {name: staticmethod(function) for name, function in functions.items()}
    return type(f"Kardia{trainer.__name__}", (hooks, trainer), parts)


def _rows(batch: dict[str, Any], first: int, end: int) -> dict[str, Any]:
    """Return rows first..end-1 of a batch; what is not per row (the count of tokens) stays whole."""
    n = len(batch["completion_ids"])

    def part(value):
        per_row = isinstance(value, list) or (getattr(value, "ndim", 0) > 0 and len(value) == n)
        return value[first:end] if per_row else value

    return {key: part(value) for key, value in batch.items()}


def logps_before_and_after(
    trainer, first: int, last: int
) -> list[tuple[list[int], list[float], list[float]]]:
    """Return (token ids, log-probs before the optimizer step, after it) of the inspected answers
    first..last-1."""
    import torch

    out, row = [], 0
    for ids, mask, C, before in trainer.inspected_passes:
        if first <= row < last:
            with torch.no_grad(), trainer.accelerator.autocast():
                after = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, C)[0]  # [B, C]
            for tokens, real, old, new in zip(ids[:, -C:], mask[:, -C:].bool(), before, after):
                out.append((tokens[real].tolist(), old[real].tolist(), new[real].tolist()))
        row += len(ids)
    return out
