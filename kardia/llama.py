"""The wall to llama.cpp: one worker process that owns every GGUF, and the two things we ask of it.

Torch lives on one side, llama.cpp on the other. The worker (spawned, its own OpenMP policy) holds the judge and, for
rollouts, the policy's base with the current LoRA. When llama.cpp aborts, the training process survives: `Worker.call`
starts a new worker, loads the same models again and replays the request once.

    Worker.rollout   prompt decoded once, its KV cells shared by the group or copied (llama_memory_seq_cp), batched sampling,
                     waiting prompts take the place of finished ones
    Worker.branches  log-probabilities of continuations of one context: the only question the judge ever asks

Inside the worker everything is token ids and numpy; texts are tokenized with special=False unless the text is ours,
so `<|im_end|>` inside a reply is eleven harmless characters and never a turn of its own.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import multiprocessing
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kardia import together

MAX_SEQUENCES = 256  # llama.cpp's LLAMA_MAX_SEQ
MOST = 1 << 21  # strings in a GGUF's vocabulary: eight times the largest there is


class LlamaError(RuntimeError):
    """Something the user can mend (a broken file, a prompt that does not fit): one line, no traceback."""


class LlamaOutOfMemory(LlamaError):
    """The worker found no memory, or died of the lack of it."""


def check_gguf(path: str | Path) -> Path:
    """Return `path` if it is a GGUF whose header and tensors are all there, else raise LlamaError (one line)."""
    path = Path(path)
    if not path.is_file():
        raise LlamaError(f"{path}: no such GGUF file")
    try:
        with open(path, "rb") as file:
            magic, size = file.read(4), path.stat().st_size
            if magic != b"GGUF":
                raise LlamaError(f"{path}: not a GGUF file (it begins with {magic!r}, a GGUF begins with b'GGUF')")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                tensors, end = _extent(data)
    except OSError as error:
        raise LlamaError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (struct.error, ValueError, KeyError, IndexError, OverflowError) as error:
        raise LlamaError(f"{path}: truncated GGUF or a damaged one ({type(error).__name__}: {str(error)[:100]}); download it again") from error
    if not tensors:
        raise LlamaError(f"{path}: this GGUF holds no tensors (a vocabulary only?); give a model's GGUF")
    if end > size:
        raise LlamaError(f"{path}: truncated GGUF ({size:,} bytes of {end:,}); download it again")
    return path


def _extent(data) -> tuple[int, int]:
    """(number of tensors, bytes the file must have), from a GGUF's header alone. The gguf package reads it too, but takes
    more than a second over the 100,000 strings of a vocabulary; this walk takes some 15 milliseconds, at every start."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    at = 4

    def read(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(form, data, at)
        at += struct.calcsize(form)
        return value

    def text() -> bytes:
        nonlocal at
        length = read("<Q")
        if length > len(data) - at:
            raise ValueError("a string ends beyond the file")
        at += length
        return data[at - length : at] if length < 256 else b""

    def skip(kind: int, count: int = 1) -> None:
        nonlocal at
        if kind == 8:
            for _ in range(count):
                at += 8 + struct.unpack_from("<Q", data, at)[0]
        elif kind == 9:
            inner, length = read("<I"), read("<Q")
            if inner == 9 or length > MOST:
                raise ValueError("an array of arrays, or one longer than any vocabulary")
            skip(inner, length)
        else:
            at += count * {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}[kind]

    version, tensors, pairs = read("<I"), read("<Q"), read("<Q")
    if version not in (2, 3):
        raise ValueError(f"version {version}")
    if tensors > 1 << 16 or pairs > 1 << 16:
        raise ValueError(f"{tensors} tensors, {pairs} metadata")
    alignment, end, total = 32, 0, 0
    for _ in range(pairs):
        key, kind = text(), read("<I")
        if key == b"general.alignment" and kind == 4:
            alignment = read("<I")
        else:
            skip(kind)
    if not alignment or alignment & (alignment - 1):
        raise ValueError(f"alignment {alignment}")
    for _ in range(tensors):
        text()
        if (dimensions := read("<I")) > 4:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        elements = math.prod(read("<Q") for _ in range(dimensions))
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(read("<I"))]
        total += elements // block * size
        end = max(end, read("<Q") + elements // block * size, total)  # tensors that share their bytes would be a small file of a large model
    return tensors, -(-at // alignment) * alignment + end


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


class _Engine:
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
        piece = lambda token: "" if token < 0 else self.lib.llama_vocab_get_text(vocab, token).decode(errors="replace")  # noqa: E731
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
        if path and not entry.lora:  # llama.cpp raises nothing: an unchecked failure would train on the bare base
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
            adapters, scales = (self.lib.llama_adapter_lora_p_ctypes * 1)(entry.lora), (ctypes.c_float * 1)(1.0)
            if self.lib.llama_set_adapters_lora(entry.ctx, adapters, 1 if entry.lora else 0, scales) != 0:
                raise LlamaError(f"{entry.path}: llama.cpp refused the LoRA")

    def _context(self, entry: _Model, cells: int, n_seq: int, unified: bool = True) -> Any:
        """An empty context of at least `cells` tokens in all for `n_seq` sequences; kept when it is large enough.

        unified: a cell may belong to many sequences (so a shared prefix is stored once), but every token looks over the
        cells of all. Else each sequence has a stream of its own (a prefix is copied), and only these cells to look over.
        """
        if n_seq > MAX_SEQUENCES:
            raise LlamaError(f"{n_seq} sequences at once; llama.cpp takes {MAX_SEQUENCES}: lower --group-size")
        has_cells, has_seq, has_unified = entry.shape
        each = -(-cells // (1 if unified else n_seq) // 256) * 256  # cells per stream
        if entry.ctx and (has_unified != unified or has_seq < n_seq or has_cells // (1 if unified else has_seq) < each):
            self.lib.llama_free(entry.ctx)
            entry.ctx = None
        if not entry.ctx:
            cells, entry.shape = (each if unified else each * n_seq), (0, 0, True)
            params = self.lib.llama_context_default_params()
            params.n_ctx, params.n_seq_max = cells, n_seq
            params.n_batch, params.n_ubatch = cells, min(512, cells)
            params.kv_unified = unified
            params.op_offload = params.offload_kqv = self._on_gpu(entry)  # a model that was put on the CPU takes nothing of the GPU
            params.n_threads = params.n_threads_batch = entry.threads
            if not self._on_gpu(entry) and (unified or not entry.fused):
                params.flash_attn_type = self.lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.no_perf = True
            self.errors = []
            entry.ctx = self.lib.llama_init_from_model(entry.model, params)
            if not entry.ctx:
                raise LlamaOutOfMemory(f"{entry.path}: no context of {cells} tokens ({self._why()}); lower the lengths or the group size")
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
                    raise LlamaError(f"token id {token} is not in the vocabulary of {entry.path} ({entry.n_vocab} tokens): wrong base for this tokenizer?")
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, len(seqs), wants_logits
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

    def rollout(self, role: str, prompts: list[list[int]], group: int, max_tokens: int, temperature: float, top_p: float,
                min_p: float, seeds: list[int], stop: list[int], parallel: int, stream: bool = False, longest: int = 0) -> list[dict]:
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
        cells = groups * (longest + group * max_tokens) if unified else groups * group * (longest + max_tokens)
        self._context(entry, cells, groups * group, unified)
        memory = self.lib.llama_get_memory(entry.ctx)
        logits = np.empty((groups * group, entry.n_vocab), np.float32)  # of the sequences that are live, in their order
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
            tokens, logps = _sample(logits[: len(live)], temperature, top_p, min_p, [rngs[s] for s in live])
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
                last = [(samples[s]["ids"][-1], len(prompts[s // group]) + len(samples[s]["ids"]) - 1) for s in live]
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

    def branches(self, role: str, prefix: list[int], replies: list[list[int]], suffixes: list[tuple[list[int], list[list[int]]]],
                 score_reply: bool) -> list[dict]:
        """For each reply: log p(continuation | prefix, reply, cue) of every continuation of every suffix (cue, continuations).

        The prefix is decoded once; each reply with all its branches is ONE decode of a token tree (the reply's tokens
        belong to every leaf sequence, a cue's to its own leaves), after which its cells are dropped. So a score depends
        on nothing but the prefix and the reply: it is bit-identical whatever stood beside it. Returns, per reply,
        {"suffixes": [[log p, ...] per suffix], "reply": log p(reply | prefix) or None}; nats, summed over tokens.
        """
        entry = self.models[role]
        leaves = [(s, c) for s, (_, continuations) in enumerate(suffixes) for c in range(len(continuations))] or [(0, 0)]
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
        wanted: list[tuple[int, int, int, int]] = []  # (suffix, continuation, batch row that predicts it, token)
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
                norms[row] = _logsumexp(logits)
            return float(logits[token]) - norms[row]

        result = [[0.0] * len(continuations) for _, continuations in suffixes]
        for s, c, row, token in wanted:
            result[s][c] += logp(row, token)
        reply_logp = None
        if first is not None and reply:
            reply_logp = float(first[reply[0]]) - _logsumexp(first) + sum(logp(i, t) for i, t in enumerate(reply[1:]))
        return {"suffixes": result, "reply": reply_logp}

    def next_logits(self, role: str, prompts: list[list[int]]):
        """Logits of the token after each prompt: float32 [prompts, vocabulary]. Export's proof reads these."""
        import numpy as np

        entry = self.models[role]
        out = np.empty((len(prompts), entry.n_vocab), np.float32)
        self._context(entry, max(map(len, prompts)), 1)
        before: list[int] = []
        for row, prompt in enumerate(prompts):
            if before and prompt[: len(before)] == before and len(prompt) > len(before):  # goes on where the last one ended
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


def _logsumexp(logits) -> float:
    import numpy as np

    peak = logits.max()
    return float(peak + np.log(np.exp(logits - peak).sum(dtype=np.float64)))


def _sample(logits, temperature, top_p, min_p, rngs):
    """One token per row of `logits` [n, vocabulary]: returns (tokens [n], log-probs [n] at the sampling temperature)."""
    import numpy as np

    if temperature == 0:
        tokens = logits.argmax(1)
        peak = logits.max(1)
        return tokens, -np.log(np.exp(logits - peak[:, None]).sum(1))
    scaled = logits / np.float32(temperature) if temperature != 1 else logits
    scaled = scaled - scaled.max(1, keepdims=True)
    weights = np.exp(scaled)  # [n, vocabulary], largest is 1
    kept = weights
    if min_p > 0:  # keep what is at least min_p times as likely as the best token
        kept = np.where(kept >= min_p, kept, 0)
    if top_p < 1:  # keep the smallest set of best tokens whose mass reaches top_p
        order = np.argsort(-kept, axis=1)
        cumulative = np.take_along_axis(kept, order, 1).cumsum(1, dtype=np.float64)
        cut = cumulative - np.take_along_axis(kept, order, 1) >= top_p * cumulative[:, -1:]
        kept = kept.copy()
        np.put_along_axis(kept, order, np.where(cut, 0, np.take_along_axis(kept, order, 1)), 1)
    tokens, total = _draw(kept, rngs)
    if kept is not weights:
        total = weights.sum(1, dtype=np.float64)
    return tokens, scaled[np.arange(len(tokens)), tokens] - np.log(total)


def _draw(weights, rngs, block: int = 256):
    """One index per row of `weights` [n, vocabulary], in proportion to them; also the rows' sums. Inverse of the cumulative
    sum, first over the sums of blocks, then inside one block: two passes over the vocabulary become one."""
    import numpy as np

    n, size = weights.shape
    whole = size // block * block
    sums = weights[:, :whole].reshape(n, -1, block).sum(2).astype(np.float64)  # [n, blocks]; numpy adds pairwise: exact to 1e-6
    if whole < size:
        sums = np.concatenate([sums, weights[:, whole:].sum(1, dtype=np.float64)[:, None]], 1)
    tokens = []
    for row, blocks, rng in zip(weights, sums, rngs):
        edges = blocks.cumsum()
        u = rng.random() * edges[-1]
        b = min(int(np.searchsorted(edges, u, side="right")), len(edges) - 1)
        while b and not blocks[b]:
            b -= 1
        inside = row[b * block : (b + 1) * block].cumsum(dtype=np.float64)
        at = min(int(np.searchsorted(inside, u - (edges[b] - blocks[b]), side="right")), len(inside) - 1)
        while at and inside[at] == inside[at - 1]:  # rounding must not pick what was cut away (weight 0)
            at -= 1
        tokens.append(b * block + at)
    return np.array(tokens), sums.sum(1)


def _serve(pipe, parent_path: list[str], gpu: str | None) -> None:
    """The worker's main loop: one request, one answer; ends when the parent closes the pipe or is gone."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the parent, which then ends us in good order
    if sys.platform == "linux":  # a parent that is killed takes us along at once, and not when the request is done
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    # Threads spin between the many small decodes of a rollout (twice the speed of sleeping ones), but give the cores
    # back to torch a few milliseconds after the last one.
    os.environ.setdefault("OMP_WAIT_POLICY", "active")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000000")
    sys.path[:] = parent_path
    engine = None
    while True:
        try:
            method, kwargs = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            engine = engine or _Engine()
            engine.tell = lambda done: pipe.send(("done", done))
            answer = ("ok", getattr(engine, method)(**kwargs))
        except LlamaOutOfMemory as error:
            answer = ("memory", str(error))
        except LlamaError as error:
            answer = ("user", str(error))
        except Exception as error:  # a bug: hand the whole story to the parent, which raises it there
            import traceback

            answer = ("bug", f"{error!r}\n{traceback.format_exc()}")
        try:
            pipe.send(answer)
        except (BrokenPipeError, OSError):
            return


# ---------------------------------------------------------------------------------- the parent's side


class Worker:
    """A handle on the worker process. `with Worker() as worker: worker.load("judge", path)`."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or max(1, default_threads() // together.local_size())
        self._loads: dict[str, dict] = {}  # role -> arguments of load, to do it again after a crash
        self._loras: dict[str, str | None] = {}
        self.info: dict[str, dict] = {}
        self.restarts = 0
        self._process = self._pipe = None
        self._progress: Callable[[int], None] = lambda done: None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # never fork a process that has started torch's threads
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, list(sys.path), own_gpu()), daemon=True, name="kardia-llama")
        self._process.start()
        theirs.close()

    def close(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.join(5)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self._process = self._pipe = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def _once(self, method: str, kwargs: dict) -> Any:
        if self._process is None or not self._process.is_alive():
            self.close()
            self._start()
            for role, arguments in self._loads.items():
                self.info[role] = self._exchange("load", {"role": role, **arguments})
            for role, path in self._loras.items():
                if path:
                    self._exchange("set_lora", {"role": role, "path": path})
        return self._exchange(method, kwargs)

    def _exchange(self, method: str, kwargs: dict) -> Any:
        self._pipe.send((method, kwargs))
        while (message := self._pipe.recv())[0] == "done":
            self._progress(message[1])
        status, answer = message
        if status in ("user", "memory"):
            raise (LlamaError if status == "user" else LlamaOutOfMemory)(answer)
        if status == "bug":
            raise RuntimeError(f"llama worker: {answer}")
        return answer

    def call(self, method: str, **kwargs) -> Any:
        """One request. A worker that died in it is replaced and the request replayed once; twice is an error."""
        try:
            return self._once(method, kwargs)
        except (EOFError, ConnectionError, OSError):
            code = self._reap()
            self.restarts += 1
            print(f"llama worker ended with code {code} during {method}; starting it again", file=sys.stderr)
        try:
            return self._once(method, kwargs)
        except (EOFError, ConnectionError, OSError) as error:
            raise LlamaOutOfMemory(f"llama.cpp ended twice (exit code {self._reap()}) during {method}: out of memory, or a GGUF it cannot run") from error

    def _reap(self) -> int | None:
        process = self._process
        if process is not None:
            process.join(5)
        code = process.exitcode if process is not None else None
        self.close()
        return code

    def load(self, role: str, path: str | Path, gpu_layers: int = 0, fused: bool = False) -> dict:
        """Load a GGUF under a role name ("judge", "policy"); returns what its header says. Loading it twice is free.

        fused, for rollouts on a CPU: llama.cpp's fused attention, with a stream of KV cells per sequence, instead of the
        plain one over cells that a group shares. Which is faster depends on the CPU: `fused_is_faster` measures it.
        """
        arguments = {"path": str(check_gguf(path)), "gpu_layers": gpu_layers, "threads": self.threads, "fused": fused}
        if self._loads.get(role) != arguments:
            self.info[role] = self.call("load", role=role, **arguments)
            self._loads[role], self._loras[role] = arguments, None
        return self.info[role]

    @property
    def has_gpu(self) -> bool:
        """Can llama.cpp, as it was built, use a GPU that is here? The worker is asked: torch's process is to load none of CUDA twice."""
        return self.call("has_gpu")

    def holds(self, role: str, path: str | Path) -> dict | None:
        """The arguments `load` was called with, if that is what is loaded."""
        arguments = self._loads.get(role)
        return arguments if arguments and arguments["path"] == str(path) else None

    def unload(self, role: str) -> None:
        if self._loads.pop(role, None):
            self._loras.pop(role, None)
            self.call("unload", role=role)

    def set_lora(self, role: str, path: str | Path | None) -> None:
        self.call("set_lora", role=role, path=str(path) if path else None)
        self._loras[role] = str(path) if path else None

    def tokenize(self, role: str, texts: list[str], special: bool = False) -> list[list[int]]:
        return self.call("tokenize", role=role, texts=texts, special=special)

    def rollout(self, prompts: list[list[int]], *, group: int, max_tokens: int, seeds: list[int], stop: list[int], temperature: float = 1.0,
                top_p: float = 1.0, min_p: float = 0.0, role: str = "policy", parallel: int = 32, progress: Callable[[int], None] | None = None, stream: bool = False, longest: int = 0) -> list[dict]:
        """See `_Engine.rollout`. `seeds`: one per completion, prompt-major; the same seeds give the same rollouts.
        `progress` is told how many completions have ended; with `stream` (one prompt, group 1) each token as it is drawn."""
        if len(seeds) != len(prompts) * group:
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts x {group}")
        self._progress = progress or (lambda done: None)
        return self.call("rollout", role=role, prompts=prompts, group=group, max_tokens=max_tokens, temperature=temperature, top_p=top_p,
                         min_p=min_p, seeds=seeds, stop=stop, parallel=parallel, stream=stream, longest=longest)

    def branches(self, role: str, prefix: list[int], replies: list[list[int]], suffixes: list, score_reply: bool = False) -> list[dict]:
        return self.call("branches", role=role, prefix=prefix, replies=replies, suffixes=suffixes, score_reply=score_reply)

    def next_logits(self, role: str, prompts: list[list[int]]):
        return self.call("next_logits", role=role, prompts=prompts)

    def quantize(self, source: str | Path, target: str | Path, file_type: str) -> None:
        self.call("quantize", source=str(source), target=str(target), file_type=file_type)


def fused_is_faster(worker: Worker, path: str | Path, rounds: int = 3) -> bool:
    """Decode a group of 8 a little way in both manners, in turns; compares the best rounds. A few seconds for a small model."""
    best = {True: math.inf, False: math.inf}
    for fused in (True, False) * rounds:  # the machine's moods are fair to both
        role = f"attention {fused}"
        n_vocab = worker.load(role, path, fused=fused)["n_vocab"]
        prompt = [100 + i % (n_vocab // 2) for i in range(300)] if n_vocab > 1000 else [i % n_vocab for i in range(300)]
        began = time.perf_counter()
        worker.rollout([prompt], group=8, max_tokens=12, seeds=list(range(8)), stop=[], role=role)
        best[fused] = min(best[fused], time.perf_counter() - began)
    for fused in best:
        worker.unload(f"attention {fused}")
    return best[True] < best[False]


def own_gpu() -> str | None:
    """The GPU of this process among several that train together, as CUDA_VISIBLE_DEVICES names it: llama.cpp would otherwise lay
    a model's layers over all GPUs it sees. None: one process, or no GPU is to be seen; the environment says it already."""
    if together.size() == 1 or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[together.local_rank()] if together.local_rank() < len(visible) else str(together.local_rank())


def default_threads() -> int:
    """Cores this process may use (a container's quota of CPUs shows in the affinity mask on Linux)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def logsumexp(values: list[float]) -> float:
    peak = max(values)
    return peak + math.log(sum(math.exp(x - peak) for x in values))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-min(x, 700))) if x >= 0 else math.exp(max(x, -700)) / (1 + math.exp(max(x, -700)))
