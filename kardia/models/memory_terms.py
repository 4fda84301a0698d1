"""Count what a run takes of a card's memory, term by term, from config.json and a setting.

The torch side is counted: tests/test_memory_plan.py runs the real update on tensors without data. What no CPU
can count is marked "Assumed". GB are 10^9 bytes; a card's "8 GB" are 8 GiB. GRPO draws, judges and updates in
turn, but llama.cpp keeps its models and torch's allocator what it freed: the terms add up.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from kardia.core import machine
from kardia.core.console import UserError
from kardia.core.machine import CONTEXT, GB, GIB

RESERVE = 0.85  # GB of a card that no run gets: the driver keeps 0.25, a desktop with a browser 0.6
UBATCH = 512  # tokens llama.cpp computes at once (n_ubatch)
JUDGE_KV = 0.1  # GB: some 1,500 cells of a context with its branches; 3B 0.06, 7B 0.09
FRAGMENTS = 0.1  # Assumed: share that torch's CUDA allocator holds beyond what comes and goes, in 2 MB blocks
HEAP = 0.6  # the same of a CPU's heap: glibc held 55% (bfloat16) and 75% (float32) with rows of two lengths
LIBRARIES = 0.8  # GB of a process that has imported torch, transformers, trl, datasets, and of the worker
WORDS = ("none", "llama", "hf", "bf16", "q8_0", "q4_k_m")


@dataclass(frozen=True)
class Setting:
    """Hold all that decides how much a run takes. SFT: no prompt, `completion` is the longest dialogue."""

    bits: int = 4
    rank: int = 16
    prompt: int = 0  # tokens of the longest prompt
    completion: int = 2048  # tokens of the longest answer
    group: int = 1  # answers per prompt
    prompts: int = 1  # per step
    micro: int = 1  # answers (dialogues) per forward pass
    chunk: int = 128  # rows of logits at once
    rollout: str = "none"  # llama, hf
    rollout_type: str = "bf16"  # of the base's GGUF: bf16, q8_0, q4_k_m
    judge_bytes: int = 0  # size of its file
    judge_vocabulary: int = 49_152
    judge_on_gpu: bool = True
    host_embedding: bool = False  # an untied embedding table in the computer's own memory
    checkpointing: bool = True
    cuda: bool = True
    item: int = 2  # bytes of a number in what is computed
    llama_gpu: bool = True  # else llama.cpp keeps judge and rollouts in the computer's memory

    @classmethod
    def here(cls, bits: int, **more: Any) -> Setting:
        """Return a setting of this machine: its GPU, if there is one, and the dtype it computes in."""
        gpu = machine.has_gpu()
        return cls(bits=bits, cuda=gpu, checkpointing=gpu, item=machine.compute_dtype().itemsize, **more)

    @classmethod
    def of(cls, facts: Any) -> Setting:
        """Return the setting in a run.json, perhaps of another version. Raise UserError if it is damaged."""
        defaults = {f.name: f.default for f in fields(cls)}
        if not isinstance(facts, dict):
            raise UserError("run.json: damaged (setting)")
        # An older version could draw with vLLM, which took memory as transformers' rollouts do.
        values = {name: "hf" if facts[name] == "vllm" else facts[name] for name in defaults if name in facts}
        for name, value in values.items():
            same_type = type(value) is type(defaults[name])
            if not same_type or (value not in WORDS if isinstance(value, str) else not 0 <= value < 2**50):
                raise UserError(f"run.json: damaged (setting: {name})")
        return cls(**values)

    @property
    def tokens(self) -> int:
        """Tokens of the longest row: [prompt][c1]..[c of a micro-batch]."""
        return self.prompt + self.micro * self.completion


@dataclass
class Shape:
    """The sizes of a decoder: all that the plan needs of a config.json."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    inner: int
    vocabulary: int
    tied: bool

    def __post_init__(self) -> None:
        h, inner = self.hidden, self.inner
        self.query, self.kv = self.heads * self.head, self.kv_heads * self.head
        attention = {"q": (h, self.query), "k": (h, self.kv), "v": (h, self.kv), "o": (self.query, h)}
        # (in, out) of a layer's matrices
        self.projections = {**attention, "gate": (h, inner), "up": (h, inner), "down": (inner, h)}
        self.linear = self.layers * sum(i * o for i, o in self.projections.values())
        self.table = self.vocabulary * h
        # Norms and biases (as if q, k and v had some), always 16 bit.
        self.small = self.layers * (2 * h + self.query + 2 * self.kv) + h

    def lora(self, rank: int) -> list[int]:
        """Return the elements of every tensor of the adapter."""
        return [rank * n for pair in self.projections.values() for n in pair] * self.layers


def shape_of(config: dict | Shape) -> Shape:
    """Return the sizes in a Hugging Face config.json, or raise UserError; a Shape comes back as it is."""
    if isinstance(config, Shape):
        return config
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise UserError("config.json: text_config is no object")
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    for key in keys:
        if key not in text:
            raise UserError(f"config.json has no {key}")
    sizes = {key: text[key] for key in keys}
    sizes["num_key_value_heads"] = text.get("num_key_value_heads") or text["num_attention_heads"]
    if text.get("head_dim"):
        sizes["head_dim"] = text["head_dim"]
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise UserError(f"config.json: {key} = {str(value)[:40]!r} / expected a positive number")
    experts = [text.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")]
    if any(isinstance(n, int) and n > 1 for n in experts):
        raise UserError("config.json: a mixture of experts, which the plan does not know")
    h, layers, heads, inner, vocabulary = (sizes[key] for key in keys)
    head = sizes.get("head_dim", max(1, h // heads))
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings")))
    return Shape(h, layers, heads, sizes["num_key_value_heads"], head, inner, vocabulary, tied)


# ---------------------------------------------------------------------------------- torch


def weight_bytes(s: Shape, setting: Setting) -> float:
    """Return the bytes of the base. Embedding, output layer and norms stay as they are computed in.

    NF4 (QLoRA, arXiv 2305.14314): 4 bits, an 8-bit scale per 64 weights, a float32 per 256 of these.
    """
    linear = 0.5 + 1 / 64 + 4 / (64 * 256) if setting.bits == 4 else setting.item
    tables = 1 if s.tied or (setting.host_embedding and setting.cuda) else 2
    return s.linear * linear + (tables * s.table + s.small) * setting.item


def adam_bytes(s: Shape, setting: Setting) -> float:
    """Return the bytes of Adam's two moments, none paged off the card.

    CUDA: 8 bits and a float32 scale per 256, 32 bits under 4,096 elements (bitsandbytes/optim/optimizer.py).
    """
    if not setting.cuda:
        return 8 * sum(s.lora(setting.rank))
    return sum(8 * n if n < 4096 else 2 * (n + 4 * -(-n // 256)) for n in s.lora(setting.rank))


def update_bytes(s: Shape, setting: Setting) -> tuple[float, float]:
    """Return (bytes kept from the forward for the backward pass, bytes of working space) of one packed row.

    With checkpointing a layer keeps its input and is computed again in the backward pass. The working space
    is then what that one layer keeps, with its widest gradients, or the logits of a chunk, whichever is more.
    """
    i, h, inner = setting.item, s.hidden, s.inner
    P, n, C, T = setting.prompt, setting.micro, setting.completion, setting.tokens
    if P:
        # Kept per layer: queries and outputs (of the row, of the segments), keys and values of each segment
        # behind the prompt's, the prompt's own expanded to all heads, and the mask as numbers.
        attention = s.query * (2 * T + 2 * n * C + P) + 2 * n * (P + C) * s.kv
        attention += 2 * P * s.query + s.heads // s.kv_heads * C * (P + C)
    else:
        attention = 5 * T * s.query  # plain causal attention
    # Also LoRA's middles, softmax norms, two float32 inputs of norms.
    other = i * (attention + 7 * setting.rank * T) + 4 * T * s.heads + 8 * T * h
    # bitsandbytes keeps only the 4-bit matrix and makes the 16-bit one anew each time.
    dequantized = i * h * max(inner, s.query) if setting.bits == 4 else 0
    # A chunk's logits and probabilities in float32 and in what is computed; slopes; the last norm.
    logits = 12 * setting.chunk * s.vocabulary + 2 * i * n * C * h + (4 + i) * T * h
    # Autocast's copies of the adapter; with checkpointing they are gone before the backward pass.
    copies = 2 * sum(s.lora(setting.rank)) if i == 2 else 0
    if not setting.checkpointing:
        kept = s.layers * (i * T * (4 * inner + 2 * h) + other) + copies
        return kept, max(logits, 2 * i * T * inner + dequantized)
    again = 0
    # PEFT casts a 16-bit layer's input unless a switch is set, which is off when a layer is recomputed.
    if setting.bits == 16 and i == 2:
        again = 4 * T * inner + i * T * (6 * h + inner)
    layer = i * T * (5 * inner + 4 * h) + other + dequantized + again
    return s.layers * i * T * h, max(logits + copies, layer)


def generate_bytes(s: Shape, setting: Setting) -> float:
    """Return the peak of transformers' rollouts: keys and values, the widest place, float32 logits."""
    G, P = setting.group * setting.prompts, setting.prompt
    cache = kv_bytes(s, G * (P + setting.completion)) * (1 + 1 / s.layers)  # each answer has its own prompt
    widest, weights = 3 * setting.item * s.inner * G * P, setting.item * s.hidden * s.inner
    return cache + widest + 16 * G * s.vocabulary + weights


# ---------------------------------------------------------------------------------- llama.cpp

BITS = {"bf16": 16, "q8_0": 8.5, "q6_k": 6.5625, "q5_0": 5.5, "q4_k": 4.5}  # per weight (ggml-common.h)


def gguf_bits(s: Shape, file_type: str) -> tuple[float, float]:
    """Return (bytes of all layers' matrices, bytes of the output matrix) in a GGUF of this type.

    Q4_K_M (llama-quant.cpp): Q4_K; Q6_K for the output matrix, and for v and down in the first and last
    eighth of the layers and every third between. Rows that 256 does not divide take a type with blocks of 32.
    """
    if file_type != "q4_k_m":
        return s.linear * BITS[file_type] / 8, s.table * BITS[file_type] / 8

    def bits(kind: str, row: int) -> float:
        return BITS[kind if row % 256 == 0 else {"q4_k": "q5_0", "q6_k": "q8_0"}[kind]]

    n, total_bits = s.layers, 0.0
    for layer in range(n):
        more = layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2
        for name, (i, o) in s.projections.items():
            total_bits += i * o * bits("q6_k" if more and name in ("v", "down") else "q4_k", i)
    return total_bits / 8, s.table * bits("q6_k", s.hidden) / 8


def kv_bytes(s: Shape, cells: int) -> float:
    """Return the bytes of keys and values in 16 bits."""
    return 2 * 2 * s.layers * s.kv * cells


def compute_buffer(vocabulary: int, hidden: int) -> float:
    """Return the bytes of llama.cpp's buffer for UBATCH logits (135M: 98.2 MiB measured, 97.1 planned)."""
    return 4 * UBATCH * (vocabulary + hidden)


def llama_terms(s: Shape, setting: Setting) -> dict[str, float]:
    """Return the bytes of the policy's twin in the worker; on a GPU without its embedding table."""
    matrices, output = gguf_bits(s, setting.rollout_type)
    tables = output * (1 if setting.cuda or s.tied else 2)
    groups = min(setting.prompts, max(1, 32 // setting.group))
    own = setting.group * setting.completion
    # A group shares the prompt's cells; a CPU's fused attention has them once per sequence.
    cells = groups * (own + setting.prompt * (1 if setting.cuda else setting.group))
    return {
        f"rollouts: base as {setting.rollout_type} GGUF": matrices + tables + 4 * s.small,
        "rollouts: LoRA (new beside old)": 2 * 4 * sum(s.lora(setting.rank)),
        "rollouts: KV cache": kv_bytes(s, -(-cells // 256) * 256),
        "rollouts: llama.cpp's buffer": compute_buffer(s.vocabulary, s.hidden),
    }


# ---------------------------------------------------------------------------------- the plan


def terms(config: dict | Shape, setting: Setting) -> dict[str, float]:
    """Return GB per term of a run on a GPU (or, `cuda` False, of the computer's memory)."""
    s = shape_of(config)
    kept, working = update_bytes(s, setting)
    sizes = {
        "base weights": weight_bytes(s, setting),
        "LoRA and its gradients": 8 * sum(s.lora(setting.rank)),  # float32 each
        "Adam": adam_bytes(s, setting),
        "activations": kept,
        "working space": working,
    }
    moving = kept + working
    if setting.rollout == "hf":
        beyond = max(0.0, generate_bytes(s, setting) - kept - working)
        sizes["rollouts: beyond the update's"] = beyond
        moving += beyond
    sizes["pieces the allocator holds"] = moving * (FRAGMENTS if setting.cuda else HEAP)
    llama_here = setting.llama_gpu or not setting.cuda
    if setting.rollout == "llama" and llama_here:
        sizes |= llama_terms(s, setting)
    if setting.judge_bytes and llama_here and (setting.judge_on_gpu or not setting.cuda):
        sizes["judge"] = setting.judge_bytes + compute_buffer(setting.judge_vocabulary, 2048) + JUDGE_KV * GB
    if setting.cuda:
        worker = CONTEXT["llama.cpp"] if setting.rollout != "none" and llama_here else 0.0
        sizes["CUDA itself"] = GB * (CONTEXT["torch"] + worker)
    else:
        sizes["libraries"] = LIBRARIES * GB
    return {name: n / GB for name, n in sizes.items()}


def total(config: dict | Shape, setting: Setting) -> float:
    """Return the GB of all terms."""
    return sum(terms(config, setting).values())


def usable(vram_gib: float) -> float:
    """Return the GB that a run can have of a card sold with `vram_gib` "GB" (GiB, in truth)."""
    return max(0.0, vram_gib * GIB / GB - RESERVE)
