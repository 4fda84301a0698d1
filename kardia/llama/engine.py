"""The engine inside the worker process: the only code that calls llama.cpp."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kardia.llama.errors import LlamaError, LlamaOutOfMemory
from kardia.llama.sampling import logits_logsumexp
from kardia.llama.sampling import sample as sample_tokens

MAX_SEQUENCES = 256  # llama.cpp's LLAMA_MAX_SEQ


# ---------------------------------------------------------------------------------- inside the worker


@dataclass
class _Model:
    path: str
    model: Any
    vocab: Any
    n_vocab: int
    threads: int
    gpu_layers: int
    fused: bool
    ctx: Any = None
    shape: tuple[int, int, bool] = (0, 0, True)  # cells, sequences, unified
    lora: Any = None


class Engine:
    """The worker's side. Every public method is a request; arguments and results are plain lists, dicts and numpy."""

    def __init__(self) -> None:
        import llama_cpp

        self.lib = llama_cpp
        self.models: dict[str, _Model] = {}
        self.errors: list[str] = []
        self.tell = lambda done: None  # how many of a long request's parts are done

        @llama_cpp.llama_log_callback
        def log(level, text, _):  # llama.cpp's only explanation of a failure is a log line
            if level >= 3:
                self.errors = [*self.errors[-20:], text.decode(errors="replace").strip()]

        self._log = log
        llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()

    def _why(self) -> str:
        return next((line for line in reversed(self.errors) if line), "no reason given")

    def load(self, role: str, path: str, gpu_layers: int, threads: int, fused: bool) -> dict:
        self.unload(role)
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.use_extra_bufts = not _has_amx()
        self.errors = []
        model = self.lib.llama_model_load_from_file(path.encode(), params)
        if not model:
            raise LlamaError(f"{path}: llama.cpp cannot load this GGUF ({self._why()})")
        vocab = self.lib.llama_model_get_vocab(model)
        entry = _Model(path, model, vocab, self.lib.llama_vocab_n_tokens(vocab), threads, gpu_layers, fused)
        self.models[role] = entry
        template = self.lib.llama_model_chat_template(model, None)
        piece = lambda token: (
            "" if token < 0 else self.lib.llama_vocab_get_text(vocab, token).decode(errors="replace")
        )  # noqa: E731
        return {
            "n_vocab": entry.n_vocab,
            "n_ctx_train": self.lib.llama_model_n_ctx_train(model),
            "n_params": self.lib.llama_model_n_params(model),
            "add_bos": bool(self.lib.llama_vocab_get_add_bos(vocab)),
            "bos": self.lib.llama_vocab_bos(vocab),
            "bos_piece": piece(self.lib.llama_vocab_bos(vocab)),
            "eos_piece": piece(self.lib.llama_vocab_eos(vocab)),
            "template": template.decode(errors="replace") if template else None,
            "gpu": self._on_gpu(entry),
        }

    def unload(self, role: str) -> None:
        entry = self.models.pop(role, None)
        if entry is None:
            return
        if entry.ctx:
            self.lib.llama_free(entry.ctx)
        if entry.lora:
            self.lib.llama_adapter_lora_free(entry.lora)
        self.lib.llama_model_free(entry.model)

    def set_lora(self, role: str, path: str | None) -> None:
        """Swap the adapter of a model; its KV cache, computed under the old adapter, is dropped with the next request."""
        entry, old, self.errors = self.models[role], self.models[role].lora, []
        entry.lora = self.lib.llama_adapter_lora_init(entry.model, path.encode()) if path else None
        if (
            path and not entry.lora
        ):  # llama.cpp raises nothing: an unchecked failure would train on the bare base
            entry.lora = old
            raise LlamaError(f"{path}: llama.cpp cannot apply this LoRA to {entry.path} ({self._why()})")
        self._use_lora(entry)
        if old:
            self.lib.llama_adapter_lora_free(old)

    def has_gpu(self) -> bool:
        return bool(self.lib.llama_supports_gpu_offload())

    def _on_gpu(self, entry: _Model) -> bool:
        return bool(entry.gpu_layers and self.lib.llama_supports_gpu_offload())

    def _use_lora(self, entry: _Model) -> None:
        if entry.ctx:
            adapters, scales = (
                (self.lib.llama_adapter_lora_p_ctypes * 1)(entry.lora),
                (ctypes.c_float * 1)(1.0),
            )
            if self.lib.llama_set_adapters_lora(entry.ctx, adapters, 1 if entry.lora else 0, scales) != 0:
                raise LlamaError(f"{entry.path}: llama.cpp refused the LoRA")

    def _context(self, entry: _Model, cells: int, n_seq: int, unified: bool = True) -> Any:
        """An empty context of at least `cells` tokens in all for `n_seq` sequences; kept when it is large enough.

        unified: a cell may belong to many sequences (so a shared prefix is stored once), but every token looks over the
        cells of all. Else each sequence has a stream of its own (a prefix is copied), and only these cells to look over.
        """
        if n_seq > MAX_SEQUENCES:
            raise LlamaError(
                f"{n_seq} sequences at once; llama.cpp takes {MAX_SEQUENCES}: lower --group-size"
            )
        has_cells, has_seq, has_unified = entry.shape
        each = -(-cells // (1 if unified else n_seq) // 256) * 256  # cells per stream
        if entry.ctx and (
            has_unified != unified or has_seq < n_seq or has_cells // (1 if unified else has_seq) < each
        ):
            self.lib.llama_free(entry.ctx)
            entry.ctx = None
        if not entry.ctx:
            cells, entry.shape = (each if unified else each * n_seq), (0, 0, True)
            params = self.lib.llama_context_default_params()
            params.n_ctx, params.n_seq_max = cells, n_seq
            params.n_batch, params.n_ubatch = cells, min(512, cells)
            params.kv_unified = unified
            params.op_offload = params.offload_kqv = self._on_gpu(
                entry
            )  # a model that was put on the CPU takes nothing of the GPU
            params.n_threads = params.n_threads_batch = entry.threads
            if not self._on_gpu(entry) and (unified or not entry.fused):
                params.flash_attn_type = self.lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.no_perf = True
            self.errors = []
            entry.ctx = self.lib.llama_init_from_model(entry.model, params)
            if not entry.ctx:
                raise LlamaOutOfMemory(
                    f"{entry.path}: no context of {cells} tokens ({self._why()}); lower the lengths or the group size"
                )
            entry.shape = cells, n_seq, unified
            self._use_lora(entry)
        self.lib.llama_memory_clear(self.lib.llama_get_memory(entry.ctx), False)
        return entry.ctx

    def _decode(self, entry: _Model, tokens: list[tuple[int, int, list[int], bool]]) -> None:
        """Decode one batch of (token id, position, sequence ids, wants logits)."""
        batch = self.lib.llama_batch_init(len(tokens), 0, max(len(seqs) for _, _, seqs, _ in tokens))
        try:
            for i, (token, position, seqs, wants_logits) in enumerate(tokens):
                if not 0 <= token < entry.n_vocab:
                    raise LlamaError(
                        f"token id {token} is not in the vocabulary of {entry.path} ({entry.n_vocab} tokens): wrong base for this tokenizer?"
                    )
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = (
                    token,
                    position,
                    len(seqs),
                    wants_logits,
                )
                for j, seq in enumerate(seqs):
                    batch.seq_id[i][j] = seq
            batch.n_tokens = len(tokens)
            self.errors = []
            rc = self.lib.llama_decode(entry.ctx, batch)
        finally:
            self.lib.llama_batch_free(batch)
        if rc != 0:
            reason = "the KV cache is full" if rc == 1 else self._why()
            raise LlamaError(f"{entry.path}: llama_decode failed ({reason}); context {entry.shape[0]} tokens")

    def _logits(self, entry: _Model, row: int):
        import numpy as np

        pointer = self.lib.llama_get_logits_ith(entry.ctx, row)
        if not pointer:
            raise LlamaError(f"{entry.path}: llama.cpp returned no logits for batch row {row}")
        return np.ctypeslib.as_array(pointer, (entry.n_vocab,))

    def tokenize(self, role: str, texts: list[str], special: bool) -> list[list[int]]:
        return [self._tokenize(self.models[role], text, special) for text in texts]

    def _tokenize(self, entry: _Model, text: str, special: bool) -> list[int]:
        data = text.encode("utf-8", errors="replace")
        n = -(len(data) + 8)
        for _ in range(2):  # a space may become three bytes, each a token: then it says how many there are
            tokens = (self.lib.llama_token * -n)()
            n = self.lib.llama_tokenize(entry.vocab, data, len(data), tokens, -n, False, special)
            if n >= 0:
                break
        else:
            raise LlamaError(f"{entry.path}: llama.cpp cannot tokenize a text of {len(data)} bytes")
        return list(tokens[:n])

    def rollout(
        self,
        role: str,
        prompts: list[list[int]],
        group: int,
        max_tokens: int,
        temperature: float,
        top_p: float,
        min_p: float,
        seeds: list[int],
        stop: list[int],
        parallel: int,
        stream: bool = False,
        longest: int = 0,
    ) -> list[dict]:
        """Sample `group` completions of every prompt. Returns prompts x group dicts {ids, logprobs}, prompt-major.

        At most `parallel` sequences (and at least one group) are decoded together: as soon as enough have ended, the
        next prompt takes their place. Room is made for a prompt of `longest` tokens, that will come later. log-probs are those of the whole distribution at `temperature` (nats), as GRPO's
        ratio needs them, whatever top_p and min_p cut away; at temperature 0 (greedy) those of the unscaled one.
        """
        import numpy as np

        entry, stop = self.models[role], set(stop)
        samples: list[dict] = [{"ids": [], "logprobs": []} for _ in range(len(prompts) * group)]
        rngs = [np.random.default_rng(seed) for seed in seeds]
        groups = min(len(prompts), max(1, parallel // group))
        longest = max(longest, *map(len, prompts))
        unified = group > 1 and (self._on_gpu(entry) or not entry.fused)
        cells = (
            groups * (longest + group * max_tokens) if unified else groups * group * (longest + max_tokens)
        )
        self._context(entry, cells, groups * group, unified)
        memory = self.lib.llama_get_memory(entry.ctx)
        logits = np.empty(
            (groups * group, entry.n_vocab), np.float32
        )  # of the sequences that are live, in their order
        live: list[int] = []  # live[i]: the sample that llama.cpp's sequence i is writing
        waiting, ended = list(range(len(prompts)))[::-1], 0
        while True:
            while waiting and len(live) + group <= groups * group:
                prompt, first = waiting.pop(), len(live)
                tokens = prompts[prompt]
                self._decode(entry, [(t, at, [first], at == len(tokens) - 1) for at, t in enumerate(tokens)])
                logits[first : first + group] = self._logits(entry, len(tokens) - 1)
                for seq in range(first + 1, first + group):
                    self.lib.llama_memory_seq_cp(memory, first, seq, -1, -1)
                live += range(prompt * group, (prompt + 1) * group)
            tokens, logps = sample_tokens(
                logits[: len(live)], temperature, top_p, min_p, [rngs[s] for s in live]
            )
            for sample, token, logp in zip(live, tokens, logps):
                samples[sample]["ids"].append(int(token))
                samples[sample]["logprobs"].append(float(logp))
                if stream:
                    self.tell(int(token))
            for seq in reversed(range(len(live))):
                ids = samples[live[seq]]["ids"]
                if ids[-1] in stop or len(ids) == max_tokens:
                    self._retire(memory, live, seq)
                    ended += 1
                    if not stream:
                        self.tell(ended)
            if live:
                last = [
                    (samples[s]["ids"][-1], len(prompts[s // group]) + len(samples[s]["ids"]) - 1)
                    for s in live
                ]
                self._decode(entry, [(token, at, [seq], True) for seq, (token, at) in enumerate(last)])
                for seq in range(len(live)):
                    logits[seq] = self._logits(entry, seq)
            elif not waiting:
                return samples

    def _retire(self, memory, live: list[int], seq: int) -> None:
        """Sequence `seq` is done. The last one takes its number: streams are decoded together only if their numbers leave no gap."""
        last = len(live) - 1
        self.lib.llama_memory_seq_rm(memory, seq, -1, -1)
        if seq != last:
            self.lib.llama_memory_seq_cp(memory, last, seq, -1, -1)
            self.lib.llama_memory_seq_rm(memory, last, -1, -1)
            live[seq] = live[last]
        live.pop()

    def branches(
        self,
        role: str,
        prefix: list[int],
        replies: list[list[int]],
        suffixes: list[tuple[list[int], list[list[int]]]],
        score_reply: bool,
    ) -> list[dict]:
        """For each reply: log p(continuation | prefix, reply, cue) of every continuation of every suffix (cue, continuations).

        The prefix is decoded once; each reply with all its branches is ONE decode of a token tree (the reply's tokens
        belong to every leaf sequence, a cue's to its own leaves), after which its cells are dropped. So a score depends
        on nothing but the prefix and the reply: it is bit-identical whatever stood beside it. Returns, per reply,
        {"suffixes": [[log p, ...] per suffix], "reply": log p(reply | prefix) or None}; nats, summed over tokens.
        """
        entry = self.models[role]
        leaves = [
            (s, c) for s, (_, continuations) in enumerate(suffixes) for c in range(len(continuations))
        ] or [(0, 0)]
        tail = sum(len(cue) + sum(map(len, continuations)) for cue, continuations in suffixes)
        self._context(entry, len(prefix) + max(map(len, replies), default=0) + tail, len(leaves))
        memory = self.lib.llama_get_memory(entry.ctx)
        self._decode(entry, [(t, i, [0], i == len(prefix) - 1) for i, t in enumerate(prefix)])
        first = self._logits(entry, len(prefix) - 1).copy() if score_reply else None
        for leaf in range(1, len(leaves)):
            self.lib.llama_memory_seq_cp(memory, 0, leaf, -1, -1)
        out = []
        for reply in replies:
            out.append(self._score_tree(entry, len(prefix), first, reply, suffixes, leaves))
            for leaf in range(len(leaves)):
                self.lib.llama_memory_seq_rm(memory, leaf, len(prefix), -1)
        return out

    def _score_tree(self, entry, start, first, reply, suffixes, leaves) -> dict:
        tokens = [(t, start + i, list(range(len(leaves))), first is not None) for i, t in enumerate(reply)]
        wanted: list[
            tuple[int, int, int, int]
        ] = []  # (suffix, continuation, batch row that predicts it, token)
        for s, (cue, continuations) in enumerate(suffixes):
            mine = [i for i, (suffix, _) in enumerate(leaves) if suffix == s]
            tokens += [(t, start + len(reply) + i, mine, i == len(cue) - 1) for i, t in enumerate(cue)]
            cue_row = len(tokens) - 1
            for c, continuation in enumerate(continuations):
                row = cue_row
                for i, t in enumerate(continuation):
                    wanted.append((s, c, row, t))
                    if i < len(continuation) - 1:  # the last token is only predicted, never decoded
                        tokens.append((t, start + len(reply) + len(cue) + i, [mine[c]], True))
                        row = len(tokens) - 1
        if tokens:
            self._decode(entry, tokens)
        norms: dict[int, float] = {}

        def logp(row: int, token: int) -> float:
            logits = self._logits(entry, row)
            if row not in norms:
                norms[row] = logits_logsumexp(logits)
            return float(logits[token]) - norms[row]

        result = [[0.0] * len(continuations) for _, continuations in suffixes]
        for s, c, row, token in wanted:
            result[s][c] += logp(row, token)
        reply_logp = None
        if first is not None and reply:
            reply_logp = (
                float(first[reply[0]])
                - logits_logsumexp(first)
                + sum(logp(i, t) for i, t in enumerate(reply[1:]))
            )
        return {"suffixes": result, "reply": reply_logp}

    def next_logits(self, role: str, prompts: list[list[int]]):
        """Logits of the token after each prompt: float32 [prompts, vocabulary]. Export's proof reads these."""
        import numpy as np

        entry = self.models[role]
        out = np.empty((len(prompts), entry.n_vocab), np.float32)
        self._context(entry, max(map(len, prompts)), 1)
        before: list[int] = []
        for row, prompt in enumerate(prompts):
            if (
                before and prompt[: len(before)] == before and len(prompt) > len(before)
            ):  # goes on where the last one ended
                start = len(before)
            else:
                self.lib.llama_memory_clear(self.lib.llama_get_memory(entry.ctx), False)
                start = 0
            self._decode(entry, [(t, i, [0], i == len(prompt) - 1) for i, t in enumerate(prompt)][start:])
            out[row], before = self._logits(entry, len(prompt) - 1 - start), prompt
        return out

    def quantize(self, source: str, target: str, file_type: str) -> None:
        """llama.cpp's own quantizer, to `target` (the caller renames: a failed run leaves a broken file behind)."""
        params = self.lib.llama_model_quantize_default_params()
        params.ftype = getattr(self.lib, f"LLAMA_FTYPE_MOSTLY_{file_type.upper()}")
        params.nthread = os.cpu_count() or 1
        self.errors = []
        if self.lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)) != 0:
            raise LlamaError(f"{target}: llama.cpp could not quantize to {file_type} ({self._why()})")


def _has_amx() -> bool:
    """llama.cpp's AMX kernels (any quantized type) die with SIGSEGV at `ldtilecfg` in some virtual machines that list
    amx_tile among their CPU flags. Without its repacked buffers the same models run, a little slower to read a prompt."""
    try:
        return "amx_tile" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
