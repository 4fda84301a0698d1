"""Ask a model for next-token logits and for answers, in torch or in llama.cpp."""

from __future__ import annotations

from pathlib import Path

from kardia.core import machine
from kardia.models.base import reporting_load_errors, silence_transformers
from kardia.models.weights import Weights


def load_plain(directory: Path, dtype):
    """Return the whole model of a directory, loaded as any user of transformers loads it, for evaluation."""
    from transformers import AutoModelForCausalLM

    silence_transformers()
    fits = machine.fits_on_gpu(Weights(directory).count() * dtype.itemsize)
    settings = {"dtype": dtype, "use_safetensors": True, "device_map": {"": 0} if fits else None}
    with reporting_load_errors(directory.name, "model"):
        return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False, **settings).eval()


def torch_logits(model, prompts: list[list[int]]):
    """Return next-token logits, float32 numpy [prompts, V]. Prompts that begin alike share a pass."""
    import numpy as np
    import torch

    rows: dict[int, np.ndarray] = {}
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        if i in rows:
            continue
        inside = [j for j, p in enumerate(prompts) if j not in rows and prompts[i][: len(p)] == p]
        ids = torch.tensor([prompts[i]], device=model.device)  # [1, L]
        places = torch.tensor([len(prompts[j]) - 1 for j in inside], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=places).logits[0]  # [inside, V]
        rows.update(zip(inside, logits.float().cpu().numpy()))
    return np.stack([rows[i] for i in range(len(prompts))])


def torch_answers(
    model, tokenizer, prompts, max_tokens: int, temperature=0.0, seed=0, on_progress=None, batch=8
) -> list[str]:
    """Return one answer per prompt (token ids), greedy at temperature 0. on_progress receives their count.

    It replaces the model's generation_config.
    """
    import torch
    from transformers import GenerationConfig

    settings = {"do_sample": temperature > 0, "temperature": temperature or 1.0, "top_p": 1.0, "top_k": 0}
    settings |= {"max_new_tokens": max_tokens, "repetition_penalty": 1.0, "use_cache": True}
    settings |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    # transformers fills every unset argument from the base's generation_config.json. Qwen2.5 ships a
    # repetition penalty there: even greedy answers would differ from llama.cpp's. So all of it is replaced.
    model.generation_config = GenerationConfig(**settings)
    torch.manual_seed(seed)
    answers: list[str] = []
    for start in range(0, len(prompts), batch):
        some = prompts[start : start + batch]
        width = max(map(len, some))
        padded = [[tokenizer.pad_token_id] * (width - len(p)) + p for p in some]
        seen = [[0] * (width - len(p)) + [1] * len(p) for p in some]
        ids, mask = (torch.tensor(rows, device=model.device) for rows in (padded, seen))  # [batch, width]
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=mask)  # [batch, width + answer]
        answers += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        if on_progress:
            on_progress(len(answers))
    return answers


def llama_answers(
    worker,
    role,
    tokenizer,
    prompts,
    max_tokens,
    temperature=0.0,
    seed=0,
    on_progress=None,
    on_text=None,
    parallel=16,
) -> list[str]:
    """Return one answer per prompt from the worker's model `role`, up to the end token.

    parallel: answers side by side; each takes room for a prompt and an answer. on_text receives, for a
    single prompt, the text so far after every token.
    """
    if not prompts:
        return []
    ids: list[int] = []

    def on_token(token: int) -> None:
        ids.append(token)
        on_text(tokenizer.decode(ids, skip_special_tokens=True))

    settings = {"role": role, "group": 1, "max_tokens": max_tokens, "temperature": temperature}
    settings |= {"seeds": [seed + i for i in range(len(prompts))], "stop": [tokenizer.eos_token_id]}
    settings |= {"on_progress": on_token if on_text else on_progress, "stream": on_text is not None}
    samples = worker.rollout(prompts, parallel=parallel, **settings)
    return tokenizer.batch_decode([sample["ids"] for sample in samples], skip_special_tokens=True)
