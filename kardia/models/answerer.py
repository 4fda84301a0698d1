"""Answer prompts with whatever can answer: a base, a run, a merged directory, a GGUF."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kardia.core import machine
from kardia.core.console import UserError
from kardia.core.run_directory import Run
from kardia.data.rubric import DEFAULT_FORMAT, AnswerFormat
from kardia.llama.gguf_header import check_gguf
from kardia.llama.worker import Worker
from kardia.models.base import EMBEDDED, Base, base_of_run, load_into_worker, load_tokenizer, resolve_base
from kardia.models.chat_template import prepare_tokenizer
from kardia.models.generate import llama_answers, load_plain, torch_answers
from kardia.models.gguf_tokenizer import import_tokenizer
from kardia.models.policy import lora_gguf_of


class Answerer:
    """Answer prompts with a base, a run, a merged directory or a GGUF; by llama.cpp where there is a GGUF.

    The script's subclass names its `load_policy` and its `Renderer`.
    """

    load_policy: Callable
    renderer: Callable

    def __init__(
        self, source: str, worker: Worker, form: AnswerFormat = DEFAULT_FORMAT, base: Base | None = None
    ) -> None:
        self.source, self.worker, self.gguf, self.lora, self.model = source, worker, None, None, None
        path = Path(source)
        if source in ("base", EMBEDDED):
            base = base or resolve_base(EMBEDDED)
            self.gguf, tokenizer = base.gguf(16), load_tokenizer(base)
        elif (path / "run.json").is_file():
            run = Run(path)
            base, bits = base_of_run(run.facts, path), run.facts["bits"]
            form = AnswerFormat.of(run.facts.get("form"))
            self.gguf, tokenizer = base.gguf(bits), load_tokenizer(base)
            if self.gguf is None:
                self.model = self.load_policy(base, "transformers", bits, adapter=run.adapter).eval()
            else:
                self.lora = lora_gguf_of(run.adapter, base)
        elif path.suffix == ".gguf":  # llama.cpp answers, so only the tokenizer is imported
            self.gguf, tokenizer = check_gguf(path), prepare_tokenizer(import_tokenizer(path), path.name)
        else:
            base = resolve_base(source)
            tokenizer = load_tokenizer(base)
        if self.gguf is None and self.model is None:
            self.model = load_plain(base.directory, machine.compute_dtype())
        self.base, self.renderer = base, self.renderer(tokenizer, form)

    def answer(
        self, dialogues, max_tokens: int, temperature=0.0, seed=0, on_progress=None, show=None
    ) -> list[str]:
        """Return one answer per prompt, as text. show(text so far) follows a single one (llama.cpp)."""
        tokenizer = self.renderer.tokenizer
        prompts = [self.renderer.prompt(dialogue) for dialogue in dialogues]
        sampling = (max_tokens, temperature, seed)
        if self.gguf is None:
            return torch_answers(self.model, tokenizer, prompts, *sampling, on_progress)
        load_into_worker(self.worker, self.gguf)
        self.worker.set_lora("policy", self.lora)
        context, longest = self.worker.info["policy"]["n_ctx_train"], max(map(len, prompts))
        if longest + max_tokens > context:
            raise UserError(
                f"{self.source}: a prompt of {longest:,} tokens with --max-tokens {max_tokens} is over the "
                f"{context:,} that it can hold"
            )
        return llama_answers(self.worker, "policy", tokenizer, prompts, *sampling, on_progress, show)
