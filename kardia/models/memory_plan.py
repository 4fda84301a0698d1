"""What a run takes of a card's memory, term by term, and which setting fits: from config.json alone, before anything is loaded.

    terms(config, setting)      GB per named term; their sum is the plan
    fit(config, gb, setting)    the setting nearest to the wanted one that fits into `gb`
    choose(config, gb, setting) the same for a run: what is not the user's to say is chosen
    flags(setting)              the same in words of the command line
    advice(config, gb, ...)     all of that as `doctor` prints it

The torch side (weights, activations, working space) is counted, not guessed: tests/test_memory_plan.py runs the real update on tensors
without data and compares. What no CPU can count is named below with where it comes from. GB are 10^9 bytes; a card's "8 GB" are 8 GiB.

Phases alternate in GRPO (draw, judge, update), but nothing is given back between them: llama.cpp keeps models and contexts, torch's
allocator keeps what it freed. So the terms add up; a maximum over the phases would be a plan that fails.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from typing import Any

from kardia.core.machine import CONTEXT, GB, GIB

MARGIN = 0.04  # of what there is: a plan that fits to the last megabyte is one that does not
RESERVE = 0.85  # GB of a card that are never ours: 0.25 the driver keeps, 0.6 a desktop with a browser (a headless machine has them)
UBATCH = 512  # tokens llama.cpp computes at once (n_ubatch)
VLLM = 1.5  # GB vLLM wants beside weights and cache: a trial pass of 4,096 tokens, CUDA graphs. Assumed
JUDGE_KV = 0.1  # GB: some 1,500 cells of a context with its branches; 3B 0.06, 7B 0.09
FRAGMENTS = 0.1  # share of what comes and goes that torch's CUDA allocator holds beyond it. Assumed: it rounds to 2 MB and cannot join pieces
HEAP = 0.6  # the same of a CPU's heap: glibc held 55% (bfloat16) and 75% (float32) of a 135M model's activations as free pieces, with rows of two lengths
LIBRARIES = 0.8  # GB of a process that has imported torch, transformers, trl, datasets, and of the worker


WORDS = "none", "llama", "hf", "vllm", "bf16", "q8_0", "q4_k_m"
FREE = (
    "micro",
    "rollout",
    "rollout_type",
    "judge_on_gpu",
    "host_embedding",
)  # what may be chosen: none of it changes what is asked for


@dataclass(frozen=True)
class Setting:
    """All that decides how much a run takes. SFT: no prompt, `completion` is the longest dialogue, `rollout` "none"."""

    bits: int = 4
    rank: int = 16
    prompt: int = 0  # tokens of the longest prompt
    completion: int = 2048  # tokens of the longest answer
    group: int = 1  # answers per prompt
    prompts: int = 1  # per step
    micro: int = 1  # answers (dialogues) per forward pass
    chunk: int = 128  # rows of logits at once
    rollout: str = "none"  # llama, hf, vllm
    rollout_type: str = "bf16"  # of the base's GGUF: bf16, q8_0, q4_k_m
    judge_bytes: int = 0  # its file
    judge_vocabulary: int = 49_152
    judge_on_gpu: bool = True
    host_embedding: bool = False  # an untied embedding table in the computer's own memory
    checkpointing: bool = True
    cuda: bool = True
    item: int = 2  # bytes of a number in what is computed
    llama_gpu: bool = True  # can llama.cpp use the GPU? Else judge and rollouts are in the computer's memory, whatever is asked for

    @classmethod
    def of(cls, facts: Any) -> Setting:
        """As a run.json holds it. Raises ValueError for what is none."""
        known = {f.name: f.default for f in fields(cls)}
        if (
            not isinstance(facts, dict)
            or not facts.keys() <= known.keys()
            or any(
                type(v) is not type(known[k])
                or isinstance(v, int)
                and not 0 <= v < 2**50
                or isinstance(v, str)
                and v not in WORDS
                for k, v in facts.items()
            )
        ):
            raise ValueError("run.json: damaged (setting)")
        return cls(**facts)

    @property
    def tokens(self) -> int:
        """Of the longest row: [prompt][c1]..[c of a micro-batch]."""
        return self.prompt + self.micro * self.completion


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    inner: int
    vocabulary: int
    tied: bool

    @property
    def query(self) -> int:
        return self.heads * self.head

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """name -> (in, out) of a layer's matrices."""
        h, q, kv, inner = self.hidden, self.query, self.kv, self.inner
        return {
            "q": (h, q),
            "k": (h, kv),
            "v": (h, kv),
            "o": (q, h),
            "gate": (h, inner),
            "up": (h, inner),
            "down": (inner, h),
        }

    @property
    def linear(self) -> int:
        return self.layers * sum(i * o for i, o in self.projections.values())

    @property
    def table(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def small(self) -> int:
        """Norms and biases (as if q, k and v had some), always 16 bit."""
        return self.layers * (2 * self.hidden + self.query + 2 * self.kv) + self.hidden

    def lora(self, rank: int) -> list[int]:
        """Elements of every tensor of the adapter."""
        return [rank * n for pair in self.projections.values() for n in pair] * self.layers


def shape_of(config: dict) -> Shape:
    """The sizes the plan needs, from a Hugging Face config.json. What is missing or odd raises ValueError in one line."""
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise ValueError("config.json: text_config is no object")  # whoever calls knows one kind of mistake
    keys = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"
    if missing := next((key for key in keys if key not in text), None):
        raise ValueError(f"config.json has no {missing}")
    h, layers, heads, inner, vocabulary = (text[key] for key in keys)
    optional = {
        "num_key_value_heads": text.get("num_key_value_heads") or heads,
        "head_dim": text.get("head_dim")
        or (h // heads if all(isinstance(n, int) and n > 0 for n in (h, heads)) else 1),
    }
    for key, value in [*zip(keys, (h, layers, heads, inner, vocabulary)), *optional.items()]:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise ValueError(f"config.json: {key} = {str(value)[:40]!r} / expected a positive number")
    if any(
        isinstance(text.get(key), int) and text[key] > 1
        for key in ("num_experts", "num_local_experts", "n_routed_experts")
    ):
        raise ValueError("config.json: a mixture of experts, which the plan does not know")
    return Shape(
        h,
        layers,
        heads,
        optional["num_key_value_heads"],
        optional["head_dim"],
        inner,
        vocabulary,
        bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings"))),
    )


# ---------------------------------------------------------------------------------- torch


def weights(s: Shape, setting: Setting) -> float:
    """Bytes of the base. NF4 with double quantization: 4 bits, an 8-bit scale per 64 weights, a float32 per 256 of these (QLoRA,
    arXiv 2305.14314); embedding, output layer and norms stay as they are computed in."""
    linear = 0.5 + 1 / 64 + 4 / (64 * 256) if setting.bits == 4 else setting.item
    tables = 1 if s.tied or setting.host_embedding and setting.cuda else 2
    return s.linear * linear + (tables * s.table + s.small) * setting.item


def optimizer(s: Shape, setting: Setting) -> float:
    """Bytes of Adam's two moments. CUDA: 8 bits and a float32 scale per 256, but 32 bits for tensors under 4,096 elements
    (bitsandbytes/optim/optimizer.py). They are paged, and could leave the card; we count them there."""
    if not setting.cuda:
        return 8 * sum(s.lora(setting.rank))
    return sum(8 * n if n < 4096 else 2 * (n + 4 * -(-n // 256)) for n in s.lora(setting.rank))


def update(s: Shape, setting: Setting) -> tuple[float, float]:
    """(bytes kept from the forward pass for the backward one, bytes of working space beside them) of one packed row.

    With checkpointing a layer keeps its input, and is computed again in the backward pass: the working space is what that one
    layer keeps, the gradients at its widest place and the dequantized matrix there; or the logits of a chunk, whichever is more.
    """
    i, h, inner = setting.item, s.hidden, s.inner
    P, n, C, T = setting.prompt, setting.micro, setting.completion, setting.tokens
    # Attention keeps per layer: queries (of the row, of the segments), outputs (of both parts, joined), keys and values of each segment behind
    # the prompt's, the prompt's own expanded to all heads, and the mask as numbers. Without a prompt it is plain causal attention.
    attention = (
        s.query * (2 * T + 2 * n * C + P)
        + 2 * n * (P + C) * s.kv
        + 2 * P * s.query
        + s.heads // s.kv_heads * C * (P + C)
        if P
        else 5 * T * s.query
    )
    other = (
        i * (attention + 7 * setting.rank * T) + 4 * T * s.heads + 8 * T * h
    )  # and LoRA's middles, softmax norms, two float32 inputs of norms
    dequantized = (
        i * h * max(inner, s.query) if setting.bits == 4 else 0
    )  # bitsandbytes' MatMul4Bit keeps only the 4-bit matrix, and makes this one anew each time
    logits = (
        12 * setting.chunk * s.vocabulary + 2 * i * n * C * h + (4 + i) * T * h
    )  # token_logps: a chunk's logits and probabilities, in float32 and in what is computed; slopes; the last norm
    half = (
        2 * sum(s.lora(setting.rank)) if i == 2 else 0
    )  # autocast's copies of the adapter; with checkpointing they are gone before the backward pass
    if not setting.checkpointing:
        return s.layers * (i * T * (4 * inner + 2 * h) + other) + half, max(
            logits, 2 * i * T * inner + dequantized
        )
    again = (
        4 * T * inner + i * T * (6 * h + inner) if setting.bits == 16 and i == 2 else 0
    )  # PEFT casts a 16-bit layer's input; Pack.hidden's switch is back on when a layer is computed again
    return s.layers * i * T * h, max(logits + half, i * T * (5 * inner + 4 * h) + other + dequantized + again)


# ---------------------------------------------------------------------------------- llama.cpp

# Bits per weight of ggml's blocks (ggml-common.h).
BITS = {"bf16": 16, "q8_0": 8.5, "q6_k": 6.5625, "q5_0": 5.5, "q4_k": 4.5}


def gguf_bits(s: Shape, file_type: str) -> tuple[float, float]:
    """(bytes of all layers' matrices, bytes of the output matrix) in a GGUF of this type.

    Q4_K_M (llama-quant.cpp): Q4_K; Q6_K for the output matrix, and for v and down in the first and last eighth of the layers and
    every third between. Rows that are no multiple of 256 take the next type with blocks of 32: Q5_0 for Q4_K, Q8_0 for Q6_K.
    """
    if file_type != "q4_k_m":
        return s.linear * BITS[file_type] / 8, s.table * BITS[file_type] / 8

    def bits(kind: str, row: int) -> float:
        return BITS[kind if row % 256 == 0 else {"q4_k": "q5_0", "q6_k": "q8_0"}[kind]]

    n, total = s.layers, 0.0
    for layer in range(n):
        more = layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2
        total += sum(
            i * o * bits("q6_k" if more and name in ("v", "down") else "q4_k", i)
            for name, (i, o) in s.projections.items()
        )
    return total / 8, s.table * bits("q6_k", s.hidden) / 8


def kv_bytes(s: Shape, cells: int) -> float:
    """Keys and values in 16 bits."""
    return 2 * 2 * s.layers * s.kv * cells


def compute_buffer(vocabulary: int, hidden: int) -> float:
    """llama.cpp plans its buffer for UBATCH tokens that all want logits; with flash attention little else is as large
    (measured on the CPU, 135M: 98.2 MiB, this says 97.1)."""
    return 4 * UBATCH * (vocabulary + hidden)


def llama_terms(s: Shape, setting: Setting) -> dict[str, float]:
    """Bytes of the policy's twin in the worker: on a GPU without its embedding table, which llama.cpp leaves to the CPU."""
    matrices, output = gguf_bits(s, setting.rollout_type)
    tables = output * (1 if setting.cuda or s.tied else 2)
    groups = min(setting.prompts, max(1, 32 // setting.group))
    shared = setting.cuda  # cells of the prompt; a CPU's fused attention has them once per sequence
    cells = groups * (
        setting.prompt + setting.group * setting.completion
        if shared
        else setting.group * (setting.prompt + setting.completion)
    )
    return {
        f"rollouts: base as {setting.rollout_type} GGUF": matrices + tables + 4 * s.small,
        "rollouts: LoRA (new beside old)": 2 * 4 * sum(s.lora(setting.rank)),
        "rollouts: KV cache": kv_bytes(s, -(-cells // 256) * 256),
        "rollouts: llama.cpp's buffer": compute_buffer(s.vocabulary, s.hidden),
    }


def generate_bytes(s: Shape, setting: Setting) -> float:
    """What transformers' own rollouts take at their peak: keys and values (every answer has the prompt for itself), the prompts'
    widest place, logits of the group in float32 a few times over."""
    G, P = setting.group * setting.prompts, setting.prompt
    return (
        kv_bytes(s, G * (P + setting.completion)) * (1 + 1 / s.layers)
        + 3 * setting.item * s.inner * G * P
        + 16 * G * s.vocabulary
        + setting.item * s.hidden * s.inner
    )


def vllm_bytes(s: Shape, setting: Setting) -> float:
    """A 16-bit copy of the base, keys and values of all answers, and what vLLM takes for itself."""
    cells = setting.prompts * setting.group * (setting.prompt + setting.completion)
    return 2 * (s.linear + (1 if s.tied else 2) * s.table + s.small) + kv_bytes(s, cells) + VLLM * GB


# ---------------------------------------------------------------------------------- the plan


def terms(config: dict | Shape, setting: Setting) -> dict[str, float]:
    """GB per term of a run on a GPU (or, `cuda` False, of the computer's memory)."""
    s = config if isinstance(config, Shape) else shape_of(config)
    kept, working = update(s, setting)
    found = {
        "base weights": weights(s, setting),
        "LoRA and its gradients": 8 * sum(s.lora(setting.rank)),  # float32 each
        "Adam": optimizer(s, setting),
        "activations": kept,
        "working space": working,
    }
    if setting.rollout == "hf":
        found["rollouts: beyond the update's"] = max(0.0, generate_bytes(s, setting) - kept - working)
    moving = kept + working + found.get("rollouts: beyond the update's", 0)
    found["pieces the allocator holds"] = moving * (FRAGMENTS if setting.cuda else HEAP)
    here = setting.llama_gpu or not setting.cuda
    if setting.rollout == "llama" and here:
        found |= llama_terms(s, setting)
    if setting.rollout == "vllm":
        found["rollouts: vLLM"] = vllm_bytes(s, setting)
    if setting.judge_bytes and here and (setting.judge_on_gpu or not setting.cuda):
        found["judge"] = setting.judge_bytes + compute_buffer(setting.judge_vocabulary, 2048) + JUDGE_KV * GB
    if not setting.cuda:
        found["libraries"] = LIBRARIES * GB
    else:
        found["CUDA itself"] = GB * (
            CONTEXT["torch"] + (CONTEXT["llama.cpp"] if setting.rollout != "none" and here else 0)
        )
    return {name: n / GB for name, n in found.items()}


def total(config: dict | Shape, setting: Setting) -> float:
    return sum(terms(config, setting).values())


def usable(vram_gib: float) -> float:
    """GB of a card sold with `vram_gib` "GB" (GiB, in truth) that a run can have."""
    return max(0.0, vram_gib * GIB / GB - RESERVE)


# ---------------------------------------------------------------------------------- the choice


def price(setting: Setting) -> float:
    """What a setting gives up, in shares of a step's time; fidelity is put on the same scale. Estimates: they only have to order.

    - micro-batch: the prompt is computed once per pass. About half of a step is the update.
    - Q8_0 rollouts: no slower (decoding reads fewer bytes), and the sampler's log-probs correct for other weights; little noise.
    - Q4_K_M: faster still, but another model than the one that learns: ratios spread, the clip throws tokens away.
    - judge on the CPU: 135M costs little, 3B waits for the processor at every step; by its bytes.
    - hf: drawing answers with transformers is four to five times slower; nothing else about the run changes.
    - embedding table in the computer's memory: some megabytes over the bus per pass.
    So a small judge leaves first, then Q8_0 and smaller passes, then Q4_K_M, a large judge and last llama.cpp's twin.
    """
    P, C, G = setting.prompt, setting.completion, setting.group
    passes = 0.5 * ((G / setting.micro * P + G * C) / (P + G * C) - 1)
    drawing = (
        2.0 if setting.rollout == "hf" else {"bf16": 0.0, "q8_0": 0.08, "q4_k_m": 0.6}[setting.rollout_type]
    )
    return (
        passes
        + drawing
        + (0 if setting.judge_on_gpu else 0.02 + 0.7 * (setting.judge_bytes / GB) ** 2)
        + 0.01 * setting.host_embedding
    )


def candidates(wanted: Setting, tied: bool = True, free: tuple[str, ...] = FREE) -> list[Setting]:
    """Settings of the same training, cheapest first. bits, group, lengths and rank are the user's: they change what is learned. `free`:
    what else is not; a `tied` embedding table is the output matrix as well, which the GPU needs."""
    hosts = (
        (False, True) if "host_embedding" in free and not tied and wanted.cuda else (wanted.host_embedding,)
    )
    if wanted.rollout == "none":
        micro = range(wanted.micro, 0, -1) if "micro" in free else (wanted.micro,)
        return sorted(
            (replace(wanted, micro=m, host_embedding=h) for m, h in itertools.product(micro, hosts)),
            key=lambda c: (-c.micro, c.host_embedding),
        )
    micro = (
        [m for m in range(1, wanted.group + 1) if wanted.group % m == 0]
        if "micro" in free
        else [wanted.micro]
    )
    kinds = ("bf16", "q8_0", "q4_k_m") if "rollout_type" in free else (wanted.rollout_type,)
    rollouts = [
        (r, t)
        for r in (("llama", "hf") if "rollout" in free else (wanted.rollout,))
        for t in (kinds if r == "llama" else ("bf16",))
    ]
    judges = (True, False) if wanted.judge_bytes and "judge_on_gpu" in free else (wanted.judge_on_gpu,)
    return sorted(
        (
            replace(wanted, micro=m, rollout=r, rollout_type=t, judge_on_gpu=j, host_embedding=h)
            for m, (r, t), j, h in itertools.product(micro, rollouts, judges, hosts)
        ),
        key=price,
    )


def fit(
    config: dict | Shape, gb: float, wanted: Setting, free: tuple[str, ...] = FREE
) -> tuple[Setting | None, Setting]:
    """(the cheapest setting whose terms add up to at most `gb`, MARGIN of it to spare if any has, or None; the one that takes least)."""
    s = config if isinstance(config, Shape) else shape_of(config)
    sizes = [(total(s, c), c) for c in candidates(wanted, s.tied, free)]
    best = next((c for limit in (gb * (1 - MARGIN), gb) for size, c in sizes if size <= limit), None)
    return best, min(sizes, key=lambda pair: pair[0])[1]


def choose(config: dict | Shape, gb: float, wanted: Setting, free: tuple[str, ...]) -> Setting:
    """What a run takes: on a GPU the cheapest that fits, or if none does the least; on a CPU what was wanted."""
    if not wanted.cuda:
        return wanted
    best, least = fit(config, gb, wanted, free)
    return best or least


def chosen(setting: Setting, wanted: Setting) -> str:
    """How a setting differs from the wanted one, in words."""
    words = {
        "micro": f"micro-batch {setting.micro}",
        "rollout": "rollouts by transformers, from the 4-bit weights that are there"
        if setting.bits == 4
        else "rollouts by transformers",
        "rollout_type": f"rollouts from a {setting.rollout_type} GGUF",
        "judge_on_gpu": "the judge on the CPU",
        "host_embedding": "the embedding table in the computer's memory",
    }
    return ", ".join(
        told
        for name, told in words.items()
        if getattr(setting, name) != getattr(wanted, name)
        and not (name == "rollout_type" and setting.rollout != "llama")
    )


def longest_that_fits(config: dict | Shape, gb: float, wanted: Setting, least: int = 256) -> Setting | None:
    """SFT with shorter dialogues: the longest `completion` (a multiple of 128) that fits."""
    s = config if isinstance(config, Shape) else shape_of(config)
    shorter = (
        replace(wanted, micro=1, completion=n, host_embedding=not s.tied and wanted.cuda)
        for n in range(wanted.completion // 128 * 128, least - 1, -128)
    )
    return next((c for c in shorter if total(s, c) <= gb), None)


def flags(setting: Setting) -> str:
    """The options of `sft` or `grpo` that give this setting."""
    host = " --embedding host" * setting.host_embedding
    if setting.rollout == "none":
        return f"--bits {setting.bits} --micro-batch {setting.micro} --max-length {setting.completion}{host}"
    words = [
        f"--group-size {setting.group} --micro-batch {setting.micro} --max-tokens {setting.completion} --rollout {setting.rollout}"
    ]
    words += [f"--rollout-type {setting.rollout_type}"] if setting.rollout == "llama" else []
    return (
        " ".join(
            words + (["--judge-gpu-layers 0"] if setting.judge_bytes and not setting.judge_on_gpu else [])
        )
        + host
    )


def advice(
    config: dict,
    gb: float,
    *,
    model: str = "MODEL",
    length: int = 2048,
    prompt: int = 512,
    completion: int = 256,
    group: int = 8,
    judge_bytes: int = 270_000_000,
    judge_vocabulary: int = 49_152,
    **machine,
) -> list[str]:
    """Lines for `doctor`: SFT and GRPO with `gb` to spare, each with its terms and its command. `machine`: what else of Setting is
    not as on a GPU in 4 bits (bits, rank, cuda, checkpointing, item, host_embedding)."""
    s, lines = shape_of(config), []
    sft = Setting(completion=length, **machine)
    grpo = Setting(
        prompt=prompt,
        completion=completion,
        group=group,
        micro=group,
        rollout="llama",
        judge_bytes=judge_bytes,
        judge_vocabulary=judge_vocabulary,
        **machine,
    )
    for name, wanted, command in (
        (f"SFT, {sft.bits} bits, dialogues of {length:,} tokens", sft, f"sft --model {model}"),
        (
            f"GRPO, {sft.bits} bits, {group} answers of {completion} tokens to a prompt of {prompt}",
            grpo,
            "grpo --from RUN",
        ),
    ):
        best, least = fit(s, gb, wanted)
        cut = best is None and wanted is sft and longest_that_fits(s, gb, sft)
        chosen = best or cut or least
        verdict = "fits" if best else f"fits if they are cut to {cut.completion:,}" if cut else "does not fit"
        lines.append(f"{name}: {verdict}, {total(s, chosen):.2f} of {gb:.2f} GB")
        lines += [f"  {value:6.2f} GB  {term}" for term, value in terms(s, chosen).items() if value >= 0.005]
        lines.append(
            f"  python kardia_lite.py {command} {flags(chosen)} --out RUN"
            if best or cut
            else f"  that is the least it can take, {total(s, least) - gb:.2f} GB too much: {what_would_help(s, gb, least)}"
        )
    return lines


def what_would_help(s: Shape, gb: float, least: Setting) -> str:
    """For a setting that takes too much although it takes least: what of the training itself makes it fit, if any one thing does."""
    changes = {
        "--bits 4": {"bits": 4},
        f"--max-tokens {least.completion // 2}": {"completion": least.completion // 2},
        f"--group-size {least.group // 2}": {"group": least.group // 2, "micro": 1},
    }
    if least.rollout == "none":
        changes = {"--bits 4": {"bits": 4}}
    told = (
        flag
        for flag, change in changes.items()
        if all(change.values()) and total(s, replace(least, **change)) <= gb
    )
    return next((f"{flag} would fit" for flag in told), "take a smaller model")
