"""Choose the setting of a run so that it fits into a card's memory, before anything is loaded."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from kardia.core import distributed, machine
from kardia.core.console import UserError, say
from kardia.core.machine import GB
from kardia.models.base import Base
from kardia.models.memory_terms import Setting, Shape, shape_of, terms, total

MARGIN = 0.04  # of what there is: a plan that fits to the last megabyte does not fit
# What may be chosen for the user: none of it changes what is learned.
FREE = ("micro", "rollout", "rollout_type", "judge_on_gpu", "host_embedding")

# Drawing with transformers is four to five times slower, and a quantized twin is another model than the one
# that learns: Q8_0 adds little noise, with Q4_K_M ratios spread and the clip throws tokens away.
DRAWING = {"hf": 2.0, "bf16": 0.0, "q8_0": 0.08, "q4_k_m": 0.6}
LLAMA_ON_CPU = 3.0  # beside a GPU: reading a large base from the computer's memory is slower than that


def price(setting: Setting) -> float:
    """Return what a setting gives up, in shares of a step's time. It only has to order.

    A small judge leaves the card first, then come Q8_0 and smaller passes, Q4_K_M, a large judge, llama.cpp.
    """
    if setting.rollout == "none":
        return 0.01 * setting.host_embedding
    P, C, G = setting.prompt, setting.completion, setting.group
    # The prompt is computed once per pass; about half of a step is the update.
    cost = 0.5 * ((G / setting.micro * P + G * C) / (P + G * C) - 1)
    cost += DRAWING["hf" if setting.rollout == "hf" else setting.rollout_type]
    if setting.rollout == "llama" and setting.cuda and not setting.llama_gpu:
        cost += LLAMA_ON_CPU
    if not setting.judge_on_gpu:
        cost += 0.02 + 0.7 * (setting.judge_bytes / GB) ** 2  # 135M costs little, 3B holds up every step
    return cost + 0.01 * setting.host_embedding  # some megabytes over the bus per pass


def candidates(wanted: Setting, tied: bool = True, free: tuple[str, ...] = FREE) -> list[Setting]:
    """Return settings of the same training, cheapest first; only what is `free` differs."""
    values = {}
    if wanted.rollout != "none":
        values["micro"] = [m for m in range(1, wanted.group + 1) if wanted.group % m == 0]
        values["rollout"] = ["llama", "hf"]
        values["rollout_type"] = ["bf16", "q8_0", "q4_k_m"]
        values["judge_on_gpu"] = [True, False] if wanted.judge_bytes else [wanted.judge_on_gpu]
    if wanted.cuda and not tied:  # a tied table is the output matrix as well
        values["host_embedding"] = [False, True]
    values = {name: some for name, some in values.items() if name in free}
    every = (replace(wanted, **dict(zip(values, each))) for each in itertools.product(*values.values()))
    # transformers draws from the live weights: a GGUF's type means nothing then.
    sensible = {replace(c, rollout_type="bf16") if c.rollout == "hf" else c: None for c in every}
    return sorted(sensible, key=price)


def fit(config: dict | Shape, gb: float, wanted: Setting, free=FREE) -> tuple[Setting | None, Setting]:
    """Return (the cheapest setting that fits, if any does with MARGIN to spare, or None; the smallest)."""
    s = shape_of(config)
    sizes = [(total(s, c), c) for c in candidates(wanted, s.tied, free)]
    best = next((c for limit in (gb * (1 - MARGIN), gb) for size, c in sizes if size <= limit), None)
    return best, min(sizes, key=lambda pair: pair[0])[1]


def choose(config: dict | Shape, gb: float, wanted: Setting, free: tuple[str, ...]) -> Setting:
    """Return on a GPU the cheapest setting that fits, else the smallest; on a CPU what was wanted."""
    if not wanted.cuda:
        return wanted
    best, least = fit(config, gb, wanted, free)
    return best or least


def chosen(setting: Setting, wanted: Setting) -> str:
    """Return in words how a setting differs from the wanted one."""
    origin = ", from the 4-bit weights that are there" if setting.bits == 4 else ""
    words = {
        "micro": f"micro-batch {setting.micro}",
        "rollout": f"rollouts by transformers{origin}",
        "rollout_type": f"rollouts from a {setting.rollout_type} GGUF",
        "judge_on_gpu": "the judge on the CPU",
        "host_embedding": "the embedding table in the computer's memory",
    }
    names = [name for name in words if getattr(setting, name) != getattr(wanted, name)]
    return ", ".join(words[name] for name in names if name != "rollout_type" or setting.rollout == "llama")


def flags(setting: Setting) -> str:
    """Return the options of `sft` or `grpo` that give this setting."""
    words = f"--bits {setting.bits} --micro-batch {setting.micro} --max-length {setting.completion}"
    if setting.rollout != "none":
        words = f"--group-size {setting.group} --micro-batch {setting.micro}"
        words += f" --max-tokens {setting.completion} --rollout {setting.rollout}"
    if setting.rollout == "llama":
        words += f" --rollout-type {setting.rollout_type}"
    if setting.judge_bytes and not setting.judge_on_gpu:
        words += " --judge-gpu-layers 0"
    return words + " --embedding host" if setting.host_embedding else words


def plan_memory(base: Base, wanted: Setting, free: tuple[str, ...], before: dict | None = None):
    """Return (the setting in which a run fits this GPU, its planned GB per term) and print the plan.

    Only what is `free` is chosen. before: the setting of an interrupted run, which stays; raise UserError if
    that is damaged. A base that the plan does not know trains all the same, without one.
    """
    setting = Setting.of(before) if before else wanted
    gb = min(distributed.gather(machine.free_for_us()))
    try:
        config = machine.read_config(base.directory)
        setting = setting if before else choose(config, gb, wanted, free)
        plan = {name: round(size, 3) for name, size in terms(config, setting).items() if size >= 0.0005}
    except (UserError, ValueError) as error:
        say(f"memory: no plan for {base.name} ({error})")
        return setting, {}
    if setting.rollout != "none" and setting.cuda and not setting.llama_gpu:
        say("memory: this llama.cpp cannot use the GPU; its judge and its rollouts stay on the CPU")
    if differences := chosen(setting, wanted):
        say(f"memory: so that it fits into {gb:.1f} GB: {differences}")
    planned = sum(plan.values())
    listed = ", ".join(f"{name} {size:.2f}" for name, size in plan.items())
    say(f"memory, planned: {planned:.1f} GB ({listed})")
    if planned > gb > 0:
        other = "--max-length" if setting.rollout == "none" else "--group-size or --max-tokens"
        less = f"a smaller --micro-batch, {other} takes less"
        fallback = "if memory runs out, the run goes down by itself"
        say(f"  that is more than the {gb:.1f} GB that are free: {less}; {fallback}")
    return setting, plan


# ---------------------------------------------------------------------------------- doctor's advice


def longest_that_fits(config: dict | Shape, gb: float, wanted: Setting, least: int = 256) -> Setting | None:
    """Return SFT with the longest dialogues (a multiple of 128 tokens) that fit, or None."""
    s = shape_of(config)
    small = replace(wanted, micro=1, host_embedding=not s.tied and wanted.cuda)
    lengths = range(wanted.completion // 128 * 128, least - 1, -128)
    every = (replace(small, completion=length) for length in lengths)
    return next((setting for setting in every if total(s, setting) <= gb), None)


def advice(config: dict, gb: float, *, model="MODEL", length=2048, **more: Any) -> list[str]:
    """Return lines for `doctor`: SFT and GRPO with `gb` to spend, each with its terms and its command.

    more: what else of Setting is not the default. prompt, completion, group and the judge are GRPO's.
    """
    s, drawn = shape_of(config), {"prompt": 512, "completion": 256, "group": 8, "judge_bytes": 270_000_000}
    drawn |= {name: more.pop(name) for name in (*drawn, "judge_vocabulary") if name in more}
    prompt, completion, group = drawn["prompt"], drawn["completion"], drawn["group"]
    sft = Setting(completion=length, **more)
    grpo = Setting(micro=group, rollout="llama", **drawn, **more)
    sft_name = f"SFT, {sft.bits} bits, dialogues of {length:,} tokens"
    grpo_name = f"GRPO, {sft.bits} bits, {group} answers of {completion} tokens to a prompt of {prompt}"
    sft_lines = _advice(s, gb, sft, sft_name, f"sft --model {model}")
    return sft_lines + _advice(s, gb, grpo, grpo_name, "grpo --from RUN")


def _advice(s: Shape, gb: float, wanted: Setting, name: str, command: str) -> list[str]:
    best, least = fit(s, gb, wanted)
    verdict = "fits" if best else "does not fit"
    if best is None and wanted.rollout == "none" and (best := longest_that_fits(s, gb, wanted)):
        verdict = f"fits if they are cut to {best.completion:,}"
    shown = best or least
    lines = [f"{name}: {verdict}, {total(s, shown):.2f} of {gb:.2f} GB"]
    lines += [f"  {value:6.2f} GB  {term}" for term, value in terms(s, shown).items() if value >= 0.005]
    if best:
        return [*lines, f"  python kardia_lite.py {command} {flags(best)} --out RUN"]
    excess = f"that is the least it takes, {total(s, least) - gb:.2f} GB too much"
    return [*lines, f"  {excess}: {what_would_help(s, gb, least)}"]


def what_would_help(s: Shape, gb: float, least: Setting) -> str:
    """Return which one change of the training itself makes the smallest setting fit, if any does."""
    changes, tokens, group = {"--bits 4": {"bits": 4}}, least.completion // 2, least.group // 2
    if least.rollout != "none" and tokens:
        changes[f"--max-tokens {tokens}"] = {"completion": tokens}
    if least.rollout != "none" and group:
        changes[f"--group-size {group}"] = {"group": group, "micro": 1}
    for flag, change in changes.items():
        if total(s, replace(least, **change)) <= gb:
            return f"{flag} would fit"
    return "take a smaller model"
