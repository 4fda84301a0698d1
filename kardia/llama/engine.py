"""Answer the worker's requests: the only code that calls llama.cpp."""

from __future__ import annotations

import ctypes
import os
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from kardia.core.console import one_line
from kardia.core.machine import cpu_info
from kardia.llama.errors import LlamaError, LlamaOutOfMemory
from kardia.llama.rollout import Rollout
from kardia.llama.sampling import Sampling, logits_logsumexp

MAX_SEQUENCES = 256  # llama.cpp's LLAMA_MAX_SEQ
GPU_THREADS = 4  # beside a GPU, where only embeddings are looked up on the CPU; idle threads would spin

Suffixes = list[tuple[list[int], list[list[int]]]]  # (cue, its continuations), as token ids
Token = tuple[int, int, list[int], bool]  # (id, position, sequences, wants logits): one place of a batch


class Cells(NamedTuple):
    """The size of a context: KV cells in a stream, sequences, and whether these share one stream."""

    per_stream: int
    sequences: int
    unified: bool


@dataclass
class _Model:
    path: str
    model: Any
    vocab: Any
    n_vocab: int
    threads: int
    on_gpu: bool
    fused: bool
    ctx: Any = None
    cells: Cells | None = None
    lora: Any = None


class Engine:
    """The worker's side: its public methods are the requests, and the steps that they consist of."""

    def __init__(self, on_progress: Callable[[int], None]) -> None:
        try:
            import llama_cpp
        except Exception as error:  # a CUDA build whose libraries are not found raises one of several errors
            fix = "`kardia_lite.py doctor` names the way to mend it"
            raise LlamaError(f"llama-cpp-python cannot be loaded ({one_line(error)}); {fix}") from error
        self.lib = llama_cpp
        self.models: dict[str, _Model] = {}
        self.on_progress = on_progress
        self.log_lines: deque[str] = deque(maxlen=20)  # warnings and errors during this request

        @llama_cpp.llama_log_callback
        def log(level, text, _):  # llama.cpp explains a failure only in its log
            if level >= 3:
                self.log_lines.append(text.decode(errors="replace").strip())

        self._log = log  # llama.cpp keeps no reference
        llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()

    def _why(self) -> str:
        return next((line for line in reversed(self.log_lines) if line), "no reason given")

    def load(self, role: str, path: str, gpu_layers: int, threads: int, fused: bool) -> dict:
        """Load a GGUF under a role name; return what its header says."""
        self.unload(role)
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        # llama.cpp's AMX kernels die with SIGSEGV at `ldtilecfg` in some virtual machines that list AMX.
        # Without its repacked buffers the same models run, a little slower to read a prompt.
        params.use_extra_bufts = "amx_tile" not in cpu_info()
        model = self.lib.llama_model_load_from_file(path.encode(), params)
        if not model:
            no_memory = re.search("out of memory|(failed|unable) to allocate", "\n".join(self.log_lines))
            kind = LlamaOutOfMemory if no_memory else LlamaError
            raise kind(f"{path}: llama.cpp cannot load this GGUF ({self._why()})")
        vocab = self.lib.llama_model_get_vocab(model)
        on_gpu = gpu_layers != 0 and self.has_gpu()
        if on_gpu and gpu_layers < 0:
            threads = min(threads, GPU_THREADS)
        n_vocab = self.lib.llama_vocab_n_tokens(vocab)
        self.models[role] = entry = _Model(path, model, vocab, n_vocab, threads, on_gpu, fused)
        return self._facts(entry)

    def _facts(self, entry: _Model) -> dict:
        lib, model, vocab = self.lib, entry.model, entry.vocab
        template, bos = lib.llama_model_chat_template(model, None), lib.llama_vocab_bos(vocab)

        def piece(token: int) -> str:
            return "" if token < 0 else lib.llama_vocab_get_text(vocab, token).decode(errors="replace")

        facts = {"n_vocab": entry.n_vocab, "n_params": lib.llama_model_n_params(model), "gpu": entry.on_gpu}
        facts |= {"bos": bos, "bos_piece": piece(bos), "eos_piece": piece(lib.llama_vocab_eos(vocab))}
        facts["n_ctx_train"] = lib.llama_model_n_ctx_train(model)
        facts["add_bos"] = bool(lib.llama_vocab_get_add_bos(vocab))
        facts["template"] = template.decode(errors="replace") if template else None
        return facts

    def unload(self, role: str) -> None:
        """Free a model, its context and its LoRA."""
        entry = self.models.pop(role, None)
        if entry and entry.ctx:
            self.lib.llama_free(entry.ctx)
        if entry and entry.lora:
            self.lib.llama_adapter_lora_free(entry.lora)
        if entry:
            self.lib.llama_model_free(entry.model)

    def has_gpu(self) -> bool:
        """Return whether llama.cpp was built for a GPU and sees one."""
        return bool(self.lib.llama_supports_gpu_offload())

    def set_lora(self, role: str, path: str | None) -> None:
        """Swap the adapter of a model. The next request drops the KV cache of the old one."""
        entry = self.models[role]
        lora = self.lib.llama_adapter_lora_init(entry.model, path.encode()) if path else None
        # llama.cpp raises nothing: an unchecked failure would train on the bare base.
        if path and not lora:
            raise LlamaError(f"{path}: llama.cpp cannot apply this LoRA to {entry.path} ({self._why()})")
        old, entry.lora = entry.lora, lora
        self._use_lora(entry)
        if old:
            self.lib.llama_adapter_lora_free(old)

    def _use_lora(self, entry: _Model) -> None:
        if not entry.ctx:
            return
        adapters = (self.lib.llama_adapter_lora_p_ctypes * 1)(entry.lora)
        scales = (ctypes.c_float * 1)(1.0)
        if self.lib.llama_set_adapters_lora(entry.ctx, adapters, 1 if entry.lora else 0, scales) != 0:
            raise LlamaError(f"{entry.path}: llama.cpp refused the LoRA")

    def quantize(self, source: str, target: str, file_type: str) -> None:
        """Quantize a GGUF to `target`. The caller renames it: a failed run leaves a broken file behind."""
        params = self.lib.llama_model_quantize_default_params()
        params.ftype = getattr(self.lib, f"LLAMA_FTYPE_MOSTLY_{file_type.upper()}")
        params.nthread = os.cpu_count() or 1
        if self.lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)) != 0:
            raise LlamaError(f"{target}: llama.cpp could not quantize to {file_type} ({self._why()})")

    def tokenize(self, role: str, texts: list[str], special: bool) -> list[list[int]]:
        """Return the token ids of each text; only with `special` does `<|im_end|>` become one token."""
        return [self._tokenize(self.models[role].vocab, text, special) for text in texts]

    def _tokenize(self, vocab: Any, text: str, special: bool) -> list[int]:
        data = text.encode("utf-8", errors="replace")
        size = 3 * len(data) + 8  # a space may become three tokens
        tokens = (self.lib.llama_token * size)()
        n = self.lib.llama_tokenize(vocab, data, len(data), tokens, size, False, special)
        if n < 0:
            raise LlamaError(f"llama.cpp cannot tokenize a text of {len(data)} bytes")
        return list(tokens[:n])

    def context(self, entry: _Model, cells: int, sequences: int, unified: bool = True) -> Any:
        """Prepare an empty context of at least `cells` tokens in all; a large enough one is used again.

        unified: a cell may belong to many sequences (a shared prefix is stored once), but each token looks
        over the cells of all. Else each sequence has its own stream (a prefix is copied) to look over.
        """
        if sequences > MAX_SEQUENCES:
            limit = f"llama.cpp takes {MAX_SEQUENCES}: lower --group-size, or give the rubric fewer cues"
            raise LlamaError(f"{sequences} sequences at once; {limit}")
        per_stream = -(-cells // (256 if unified else 256 * sequences)) * 256
        wanted, has = Cells(per_stream, sequences, unified), entry.cells
        if entry.ctx and (has.unified != unified or has.sequences < sequences or has.per_stream < per_stream):
            self.lib.llama_free(entry.ctx)
            entry.ctx = None
        if not entry.ctx:
            self._new_context(entry, wanted)
        memory = self.lib.llama_get_memory(entry.ctx)
        self.lib.llama_memory_clear(memory, False)
        return memory

    def _new_context(self, entry: _Model, cells: Cells) -> None:
        params = self.lib.llama_context_default_params()
        total = cells.per_stream * (1 if cells.unified else cells.sequences)
        params.n_ctx, params.n_seq_max, params.kv_unified = total, cells.sequences, cells.unified
        params.n_batch, params.n_ubatch = total, min(512, total)
        # A model that was put on the CPU takes nothing of the GPU.
        params.op_offload = params.offload_kqv = entry.on_gpu
        params.n_threads = params.n_threads_batch = entry.threads
        if not entry.on_gpu and (cells.unified or not entry.fused):
            params.flash_attn_type = self.lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.no_perf = True
        entry.ctx = self.lib.llama_init_from_model(entry.model, params)
        if not entry.ctx:
            why = f"no context of {total} tokens ({self._why()})"
            raise LlamaOutOfMemory(f"{entry.path}: {why}; lower the lengths or the group size")
        entry.cells = cells
        self._use_lora(entry)

    def decode(self, entry: _Model, tokens: list[Token]) -> None:
        """Decode one batch."""
        batch = self.lib.llama_batch_init(len(tokens), 0, max(len(token[2]) for token in tokens))
        try:
            for i, (token, position, sequences, wants_logits) in enumerate(tokens):
                if not 0 <= token < entry.n_vocab:
                    where = f"the vocabulary of {entry.path} ({entry.n_vocab} tokens)"
                    raise LlamaError(f"token id {token} is not in {where}: wrong base for this tokenizer?")
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wants_logits
                batch.n_seq_id[i] = len(sequences)
                for j, sequence in enumerate(sequences):
                    batch.seq_id[i][j] = sequence
            batch.n_tokens = len(tokens)
            code = self.lib.llama_decode(entry.ctx, batch)
        finally:
            self.lib.llama_batch_free(batch)
        if code != 0:
            why = "the KV cache is full" if code == 1 else self._why()
            raise LlamaError(f"{entry.path}: llama_decode failed ({why})")

    def prompt(self, entry: _Model, ids: list[int], sequence: int = 0, start: int = 0) -> Any:
        """Decode `ids` from position `start` on; return a view of the last token's logits [V]."""
        last = len(ids) - 1
        tokens = [(ids[at], at, [sequence], at == last) for at in range(start, len(ids))]
        self.decode(entry, tokens)
        return self.logits(entry, len(tokens) - 1)

    def logits(self, entry: _Model, row: int) -> Any:
        """Return a view of the logits [V] of a row of the last batch; the next decode overwrites it."""
        import numpy as np

        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(entry.ctx, row), (entry.n_vocab,))

    def rollout(self, role: str, how: Sampling, stream: bool, **request: Any) -> list[dict]:
        """Sample `group` completions per prompt; return prompts x group dicts {ids, logprobs}, prompt-major.

        log-probs are those of the whole distribution at the temperature (nats), as GRPO's ratio needs them,
        whatever top_p and min_p cut away; at temperature 0 (greedy) those of the unscaled one.
        """
        return Rollout(self, self.models[role], how, **request).run(stream)

    def branches(
        self, role: str, prefix: list[int], replies: list[list[int]], suffixes: Suffixes, score_reply: bool
    ) -> list[dict]:
        """For each reply: log p(continuation | prefix, reply, cue) of every continuation of every suffix.

        The prefix is decoded once; each reply with its branches is ONE decode of a token tree, after which
        its cells are dropped. So a score depends only on prefix and reply: it is bit-identical whatever stood
        beside it. Returns per reply {"suffixes": [[log p, ...] per suffix], "reply": log p(reply | prefix) or
        None}; nats, summed over tokens.
        """
        entry = self.models[role]
        leaves = sum(map(_leaves, suffixes)) or 1
        longest = max(map(len, replies), default=0)
        tail = sum(len(cue) + sum(map(len, continuations)) for cue, continuations in suffixes)
        memory = self.context(entry, len(prefix) + longest + tail, leaves)
        first = self.prompt(entry, prefix).copy()  # [V], predicts the reply's first token
        for leaf in range(1, leaves):
            self.lib.llama_memory_seq_cp(memory, 0, leaf, -1, -1)
        results = []
        for reply in replies:
            tokens, wanted = _token_tree(len(prefix), reply, suffixes, leaves, score_reply)
            if tokens:
                self.decode(entry, tokens)
            results.append(self._tree_scores(entry, suffixes, wanted, reply, first if score_reply else None))
            for leaf in range(leaves):
                self.lib.llama_memory_seq_rm(memory, leaf, len(prefix), -1)
        return results

    def _tree_scores(self, entry: _Model, suffixes: Suffixes, wanted, reply: list[int], first) -> dict:
        norms: dict[int, float] = {}

        def logp(row: int, token: int) -> float:
            logits = self.logits(entry, row)
            if row not in norms:
                norms[row] = logits_logsumexp(logits)
            return float(logits[token]) - norms[row]

        scores = [[0.0] * len(continuations) for _, continuations in suffixes]
        for suffix, continuation, row, token in wanted:
            scores[suffix][continuation] += logp(row, token)
        of_reply = None
        if first is not None and reply:
            rest = sum(logp(row, token) for row, token in enumerate(reply[1:]))
            of_reply = float(first[reply[0]]) - logits_logsumexp(first) + rest
        return {"suffixes": scores, "reply": of_reply}

    def next_logits(self, role: str, prompts: list[list[int]]) -> Any:
        """Return the logits of the token after each prompt: float32 [prompts, V]."""
        import numpy as np

        entry = self.models[role]
        out = np.empty((len(prompts), entry.n_vocab), np.float32)
        memory = self.context(entry, max(map(len, prompts)), 1)
        before: list[int] = []
        for row, ids in enumerate(prompts):
            # A prompt that begins with the last one goes on where that one ended.
            start = len(before) if len(ids) > len(before) and ids[: len(before)] == before else 0
            if not start:
                self.lib.llama_memory_clear(memory, False)
            out[row], before = self.prompt(entry, ids, start=start), ids
        return out


def _leaves(suffix: tuple[list[int], list[list[int]]]) -> int:
    """Return the leaf sequences of a suffix: one per continuation whose tokens are decoded, at least one."""
    return max(1, sum(len(continuation) > 1 for continuation in suffix[1]))


def _token_tree(start: int, reply: list[int], suffixes: Suffixes, leaves: int, score_reply: bool):
    """Return the batch of a reply with its branches, and (suffix, continuation, row, token)s.

    The reply's tokens belong to every leaf sequence, a cue's to the leaves of its own continuations.
    """
    tokens = [(t, start + i, list(range(leaves)), score_reply) for i, t in enumerate(reply)]
    wanted: list[tuple[int, int, int, int]] = []
    first_leaf = 0
    for s, (cue, continuations) in enumerate(suffixes):
        mine = list(range(first_leaf, first_leaf + _leaves((cue, continuations))))
        first_leaf += len(mine)
        free, at = iter(mine), start + len(reply)
        tokens += [(t, at + i, mine, i == len(cue) - 1) for i, t in enumerate(cue)]
        cue_row = len(tokens) - 1
        for c, continuation in enumerate(continuations):
            row = cue_row
            leaf = next(free) if len(continuation) > 1 else None  # one token is read off the cue's last row
            for i, t in enumerate(continuation):
                wanted.append((s, c, row, t))
                if i < len(continuation) - 1:  # the last token is only predicted, never decoded
                    tokens.append((t, at + len(cue) + i, [leaf], True))
                    row = len(tokens) - 1
    return tokens, wanted
