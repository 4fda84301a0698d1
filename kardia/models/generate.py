"""Asking a model, in torch or in llama.cpp: what comes next (logits), and what it answers. Evaluation, chat and export's proof ask here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kardia.core import machine
from kardia.llama.worker import Worker
from kardia.models.base import reporting_load_errors, silence_transformers
from kardia.models.weights import Weights


def load_plain(directory: Path, dtype):
    """A whole model as any user of transformers loads it."""
    from transformers import AutoModelForCausalLM

    silence_transformers()
    fits = machine.fits_on_gpu(Weights(directory).count() * dtype.itemsize)
    with reporting_load_errors(directory.name, "model"):
        return AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            device_map={"": 0} if fits else None,
            use_safetensors=True,
            trust_remote_code=False,
        ).eval()


def torch_logits(model, prompts: list[list[int]]):
    """Next-token logits, float32 numpy [prompts, vocabulary]; prompts that begin alike (places in one dialogue) share one pass."""
    import numpy as np
    import torch

    rows: list[Any] = [None] * len(prompts)
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        if rows[i] is not None:
            continue
        inside = [j for j, p in enumerate(prompts) if rows[j] is None and prompts[i][: len(p)] == p]
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([prompts[i]], device=model.device),
                use_cache=False,
                logits_to_keep=torch.tensor([len(prompts[j]) - 1 for j in inside], device=model.device),
            ).logits[0]  # [inside, vocabulary]
        for j, row in zip(inside, logits.float().cpu().numpy()):
            rows[j] = row
    return np.stack(rows)


def llama_answers(
    worker: Worker,
    role: str,
    tokenizer,
    prompts: list[list[int]],
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    at: Callable[[int], None] | None = None,
) -> list[str]:
    """Sampled (or at temperature 0 greedy) in the worker by the model of that role, all prompts side by side; until the end token."""
    seeds = [seed + i for i in range(len(prompts))]
    samples = (
        worker.rollout(
            prompts,
            role=role,
            group=1,
            max_tokens=max_tokens,
            seeds=seeds,
            stop=[tokenizer.eos_token_id],
            temperature=temperature,
            parallel=16,
            progress=at,
        )
        if prompts
        else []
    )
    return tokenizer.batch_decode([s["ids"] for s in samples], skip_special_tokens=True)


def llama_answer_streamed(
    worker: Worker,
    role: str,
    tokenizer,
    prompt: list[int],
    max_tokens: int,
    temperature: float,
    seed: int,
    show: Callable[[str], None],
) -> str:
    """One answer; `show` is given the text so far after every token."""
    ids: list[int] = []

    def drawn(token: int) -> None:
        ids.append(token)
        show(tokenizer.decode(ids, skip_special_tokens=True))

    sample = worker.rollout(
        [prompt],
        role=role,
        group=1,
        max_tokens=max_tokens,
        seeds=[seed],
        stop=[tokenizer.eos_token_id],
        temperature=temperature,
        progress=drawn,
        stream=True,
    )[0]
    return tokenizer.decode(sample["ids"], skip_special_tokens=True)


def torch_answers(
    model,
    tokenizer,
    prompts: list[list[int]],
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    at: Callable[[int], None] | None = None,
    batch: int = 8,
) -> list[str]:
    """`generate`, a few prompts at a time, padded on the left."""
    import torch

    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    answers: list[str] = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        width = max(map(len, some))
        ids = torch.tensor(
            [[tokenizer.pad_token_id] * (width - len(p)) + p for p in some], device=model.device
        )  # [some, width]
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some], device=model.device)
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                use_cache=True,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **sampling,
            )
        answers += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        if at:
            at(len(answers))
    return answers
