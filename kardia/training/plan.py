"""Plan a run: its memory, its passes, and our options as TRL's arguments."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from kardia.core import distributed, machine
from kardia.core.console import UserError
from kardia.core.run_directory import Run
from kardia.judge.judge import NO_JUDGE, judge_sizes
from kardia.models.adapter import read_adapter
from kardia.models.base import Base, load_into_worker
from kardia.models.memory_plan import Setting, plan_memory


def shared_arguments(options, bits: int) -> dict[str, Any]:
    """Return the arguments of transformers' Trainer that SFT and GRPO have in common."""
    import torch

    gpu, dtype = torch.cuda.is_available(), machine.compute_dtype()
    return {
        "seed": options.seed,
        "data_seed": options.seed,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": options.save_steps,
        "report_to": options.track,
        "disable_tqdm": True,
        "use_cpu": not gpu,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "gradient_checkpointing": gpu,
        "optim": "paged_adamw_8bit" if gpu else "adamw_torch",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "dataloader_pin_memory": gpu,
        # Every pass uses every LoRA weight, so DistributedDataParallel need not search for unused ones.
        "ddp_find_unused_parameters": False,
    }


def sft_passes(options) -> tuple[int, int]:
    """Return (dialogues per forward pass, passes per optimizer step) of each process."""
    processes = distributed.size()
    micro = min(options.micro_batch, max(1, options.batch_size // processes))
    return micro, max(1, round(options.batch_size / micro / processes))


def sft_config(options, out, bits: int):
    """Return the SFTConfig of a run into the directory `out`."""
    from trl import SFTConfig

    micro, accumulate = sft_passes(options)
    return SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate,
        learning_rate=options.learning_rate,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        warmup_steps=3,
        lr_scheduler_type="cosine",
        max_length=None,  # `Renderer.examples` has cut the dialogues already
        dataset_kwargs={"skip_prepare_dataset": True},
        **shared_arguments(options, bits),
    )


def answers_per_pass(options) -> int:
    """Return the micro-batch: a divisor of the group, so that no pass mixes two prompts. Raise UserError for
    another."""
    group, micro = options.group_size, options.micro_batch or options.group_size
    if group % micro:
        fits = max(d for d in range(1, min(micro, group) + 1) if group % d == 0)
        raise UserError(f"--micro-batch {micro} does not divide --group-size {group}; try {fits}")
    return micro


def prompts_per_process(options) -> int:
    """Return each process's prompts per step. Raise UserError where a group would be split."""
    prompts, processes = options.prompts_per_step, distributed.size()
    if prompts % processes:
        raise UserError(
            f"--prompts-per-step {prompts} with {processes} processes: each takes whole groups; give a "
            f"multiple "
            f"of {processes}"
        )
    return prompts // processes


def grpo_config(options, out, bits: int, micro: int, reward_weights: list[float], **more):
    """Return the GRPOConfig of a run: `prompts_per_step` groups per step, in passes of `micro` answers."""
    from trl import GRPOConfig

    arguments = {
        "output_dir": str(out),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": prompts_per_process(options) * options.group_size // micro,
        "num_generations": options.group_size,
        "max_completion_length": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        # Unset, transformers would take the base's own (Qwen2.5 ships 20).
        "top_k": 0,
        "min_p": options.min_p or None,
        "beta": options.beta,
        "epsilon": options.epsilon,
        "loss_type": "dapo",  # one token denominator for the whole step; `grpo_loss` computes it
        "scale_rewards": "group",
        "learning_rate": options.learning_rate,
        # A decay to 0 would hide whether the reward still rises.
        "lr_scheduler_type": "constant",
        "max_steps": options.steps,
        "reward_weights": reward_weights,
        "chat_template_kwargs": {"enable_thinking": False},
        **shared_arguments(options, bits),
    }
    return GRPOConfig(**{**arguments, **more})


def describe_sft(options, engine: str, bits: int, examples: list[dict], dialogues: int) -> str:
    """Return what SFT is about to do, in one line."""
    tokens = sum(len(example["input_ids"]) for example in examples)
    trained = sum(label != -100 for example in examples for label in example["labels"])
    (micro, accumulate), processes = sft_passes(options), distributed.size()
    each = f" x {processes} processes" if processes > 1 else ""
    return (
        f"SFT on {len(examples)} examples of {dialogues} dialogues ({tokens:,} tokens, {trained:,} "
        f"trained), {engine}, "
        f"{bits} bits; {micro} dialogues x {accumulate} micro-batches{each} = "
        f"{micro * accumulate * processes} per step"
    )


def plan_sft(options, run: Run, base: Base, tokens: int) -> Setting:
    """Return the setting of an SFT run whose largest row has `tokens`, and record it with its memory plan in
    run.json."""
    host = options.embedding == "host"
    wanted = Setting.here(run.facts["bits"], rank=options.lora_rank, completion=tokens, host_embedding=host)
    choose_host = options.embedding == "auto" and run.facts["engine"] == "transformers"
    free = ("host_embedding",) if choose_host else ()
    setting, terms = plan_memory(base, wanted, free, run.facts.get("setting"))
    run.update(setting=dataclasses.asdict(setting), memory_plan=terms)
    return setting


def check_grpo(options) -> None:
    """Raise UserError for sizes that do not fit together."""
    answers_per_pass(options)
    prompts_per_process(options)


def smaller_answers(options) -> str:
    """Return how a run that ran out of memory can go on: with less to train on, which is the user's to
    decide."""
    ways = [f"--resume --max-tokens {max(8, options.max_tokens * 3 // 4)}"]
    half = options.group_size // 2
    if half >= 2 and half % (options.micro_batch or 1) == 0:
        ways.append(f"--resume --group-size {half}")
    return (
        f"The same command with {' or '.join(ways)} goes on from the last checkpoint with shorter or fewer "
        f"answers, which "
        "changes what is trained; --bits 4, a smaller --judge or --judge-gpu-layers 0 take less memory, too"
    )


def longest_prompt(renderer, dialogues, base: Base, max_tokens: int) -> list[int]:
    """Return the longest prompt's ids. Raise UserError for one that the model cannot hold."""
    longest, where = max(((renderer.prompt(d), d.where) for d in dialogues), key=lambda pair: len(pair[0]))
    base.check_context(len(longest), max_tokens, where)
    return longest


def plan_grpo(
    options,
    base: Base,
    engine: str,
    bits: int,
    adapter: Path,
    longest: list[int],
    before,
    worker,
):
    """Return (setting, GB per term) of a GRPO run: what the user asked for, and what fits.

    before: run.json's facts of the run that goes on, or {}.
    """
    rollout = base.rollouts(options.rollout)
    wanted = Setting.here(
        bits,
        rank=read_adapter(adapter)[0]["r"],
        prompt=len(longest),
        completion=options.max_tokens,
        group=options.group_size,
        prompts=prompts_per_process(options),
        micro=answers_per_pass(options),
        rollout=rollout,
        rollout_type="bf16" if options.rollout_type == "auto" else options.rollout_type,
        **(judge_sizes(options.judge) if options.judge != NO_JUDGE else {}),
        judge_on_gpu=options.judge_gpu_layers != 0,
        host_embedding=options.embedding == "host",
        llama_gpu=machine.has_gpu() and worker.has_gpu,
    )
    free = {
        "micro": not options.micro_batch,
        "rollout": options.rollout == "auto" and rollout == "llama",
        "rollout_type": options.rollout_type == "auto",
        "judge_on_gpu": options.judge_gpu_layers < 0,
        "host_embedding": options.embedding == "auto" and engine == "transformers",
    }
    chosen = before.get("setting")
    if chosen and (chosen.get("completion"), chosen.get("group")) != (options.max_tokens, options.group_size):
        # After an out-of-memory error a resumed run may draw shorter or fewer answers.
        sizes = {"completion": options.max_tokens, "group": options.group_size, "micro": wanted.micro}
        chosen = {**chosen, **sizes}
    if before and not chosen:  # of a version that chose nothing
        wanted = dataclasses.replace(wanted, rollout=before.get("rollout", rollout))
        free = {name: free[name] for name in ("micro", "judge_on_gpu")}
    names = tuple(name for name, is_free in free.items() if is_free)
    return plan_memory(base, wanted, names, chosen)


def describe_grpo(options, engine: str, setting: Setting, rollouts) -> str:
    """Return what GRPO is about to do, in one line. rollouts: a `Rollouts`."""
    G, P, processes = options.group_size, options.prompts_per_step, distributed.size()
    rubric, judged, prompts = rollouts.rubric, rollouts.judge is not None, len(rollouts.dialogues)
    each = f" by each of {processes} processes" if processes > 1 else ""
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in rubric.rewards.items())
    criteria = ", ".join(c.name for c in rubric.criteria if c.weight) if judged else "nothing"
    return (
        f"GRPO, {engine}, rollouts by {setting.rollout}: {P} prompt{'' if P == 1 else 's'} x {G} answers = "
        f"{P * G} per "
        f"step in {P * G // setting.micro} passes{each}, {options.steps} steps, {prompts} prompts; weights "
        f"{weights}; rubric "
        f"of {criteria}"
    )


def load_rollout_model(worker, base: Base, setting: Setting, run: Run) -> None:
    """Load the policy's base into the llama worker.

    Which attention is faster is measured once and recorded: another one would draw other answers after a
    resume.
    """
    gguf = base.quantized(worker, setting.bits, setting.rollout_type)
    fused = load_into_worker(worker, gguf, run.facts.get("fused_attention"), planned=True)
    run.update(fused_attention=fused)
