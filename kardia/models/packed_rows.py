"""Many answers in one row: a prompt is computed once for its whole group, dialogues stand side by side without padding.

    [prompt][c1][c2]..[cG]      every segment sees the prompt and itself, and starts again at position P

A row of P + sum C_i tokens replaces G rows of P + C_i. All layers but attention work token by token and need not know.
Attention does: a [L, L] mask over the whole row would be exact, but computes (P + G C)^2 scores to keep the G C (P + C) that
count. So queries and keys of the segments are laid out as a batch of their own (`shared_prefix_attention` below), behind the
keys of the prompt. transformers hands its attention functions whatever a caller adds to the model's forward, here `pack`.
A GPU has another way: FlexAttention (arXiv 2412.05496) walks the whole row and skips the blocks that nobody sees. Which of the two is
faster there is measured when a model is enabled (`flex_is_faster`).

`token_logps` is the other half: log-probabilities of the tokens that were drawn, and their gradient, without ever
holding more than a chunk of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NAME = "kardia_shared_prefix"  # among transformers' attention implementations


@dataclass
class Pack:
    """One row of segments behind a prompt (which may be empty: then it is plain packing of texts that share nothing).

    ids, positions [1, L]; predictors [sum C_i]: the places whose hidden states predict the segments' tokens (the prompt's
    last token for each first one, then each segment's own tokens but the last; without a prompt the first token of a
    segment is predicted by nothing and left out).
    """

    ids: Any
    positions: Any
    predictors: Any
    prompt: int
    index: Any  # [G, longest C] place in the row of every segment's tokens; past a segment's end: any place, never read
    real: Any  # [G, longest C] bool
    segment: Any  # [L] 0: the prompt, 1..G
    _visible: dict = field(default_factory=dict)

    def hidden(self, causal_lm):
        """Hidden states of the row under a causal LM whose attention was switched by `enable`: [L, H]."""
        import torch
        from peft.helpers import disable_input_dtype_casting

        # PEFT makes a float32 copy of every LoRA's input, which autocast turns back into half precision; both would be kept
        # for the backward pass: a third of all activations.
        with disable_input_dtype_casting(causal_lm, active=torch.is_autocast_enabled(self.ids.device.type)):
            # A 4-D mask is "made already" to transformers, which then makes none of its own; ours never looks at it.
            mask = self.ids[None, None]
            return causal_lm.base_model(
                input_ids=self.ids,
                position_ids=self.positions,
                attention_mask=mask,
                use_cache=False,
                pack=self,
            ).last_hidden_state[0]

    def logps(self, causal_lm, at, targets, temperature: float = 1.0, chunk: int = 128):
        """`token_logps` of targets [N] predicted at the places `at` [N] of the row, `chunk` rows of logits at once."""
        config = causal_lm.config.get_text_config()
        return token_logps(
            self.hidden(causal_lm)[at],
            causal_lm.get_output_embeddings(),
            targets,
            temperature,
            getattr(config, "final_logit_softcapping", None),
            chunk,
        )

    def visible(self, window: int | None):
        """What a segment's tokens see of [prompt, segment]: bool [C, P + C]; `window`: the last so many tokens, itself included."""
        if window not in self._visible:
            self._visible[window] = _causal(self.index.shape[1], self.prompt, window, self.ids.device)
        return self._visible[window]

    def blocks(self, window: int | None):
        """The same as FlexAttention wants it: a BlockMask over the whole row [L, L]."""
        from torch.nn.attention.flex_attention import create_block_mask

        if (key := ("blocks", window)) not in self._visible:
            segment, at, L = self.segment, self.positions[0], self.ids.shape[1]

            def sees(batch, head, q, kv):
                seen = ((segment[kv] == 0) | (segment[kv] == segment[q])) & (at[kv] <= at[q])
                return seen & (at[q] - at[kv] < window) if window else seen

            self._visible[key] = create_block_mask(sees, None, None, L, L, device=self.ids.device)
        return self._visible[key]


def pack(prompt, segments) -> Pack:
    """prompt [P] and segments G x [C_i], token ids of one device -> Pack."""
    import torch

    device, lengths, P = segments[0].device, [len(s) for s in segments], len(prompt)
    starts = [P + sum(lengths[:i]) for i in range(len(lengths))]
    places = torch.arange(max(lengths), device=device)
    real = places < torch.tensor(lengths, device=device)[:, None]
    index = (torch.tensor(starts, device=device)[:, None] + places).where(real, 0)
    own = [torch.arange(start, start + n - 1, device=device) for start, n in zip(starts, lengths)]
    last = torch.tensor([P - 1], device=device)[: min(P, 1)]
    positions = torch.cat([torch.arange(P), *[torch.arange(P, P + n) for n in lengths]]).to(device)
    segment = torch.arange(len(lengths) + 1, device=device).repeat_interleave(
        torch.tensor([P, *lengths], device=device)
    )
    return Pack(
        torch.cat([prompt, *segments])[None],
        positions[None],
        torch.cat([torch.cat([last, o]) for o in own]),
        P,
        index,
        real,
        segment,
    )


def _causal(tokens: int, before: int, window: int | None, device):
    """bool [tokens, before + tokens]: a token sees itself and what stands before it, at most `window` tokens in all."""
    import torch

    seen = torch.arange(before + tokens, device=device)
    at = torch.arange(before, before + tokens, device=device)[:, None]
    return (seen <= at) & (at - seen < (window or before + tokens))


def _attend(query, key, value, visible, scaling, softcap, dropout):
    """query [B, H, T, D], key and value [B, H_kv, S, D], visible bool broadcastable to [B, 1, T, S] or None (causal) -> [B, H, T, D]."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    B, H, T, D = query.shape
    shared = H // key.shape[1]  # query heads per key head (grouped-query attention)
    if visible is None and not softcap:
        return sdpa(
            query,
            key.repeat_interleave(shared, 1),
            value.repeat_interleave(shared, 1),
            is_causal=T > 1,
            scale=scaling,
            dropout_p=dropout,
        )
    if visible is None:
        visible = _causal(T, key.shape[2] - T, None, query.device)
    # The heads that share a key stand one behind the other: keys and values are neither copied nor their gradients summed.
    query, visible = (
        query.reshape(B, key.shape[1], shared * T, D),
        visible.repeat(*[1] * (visible.dim() - 2), shared, 1),
    )
    if softcap:
        scores = softcap * torch.tanh((query @ key.transpose(-1, -2)).float() * (scaling / softcap))
        scores = scores.masked_fill(
            ~visible, torch.finfo(scores.dtype).min
        )  # not -inf: padding may see nothing at all
        out = scores.softmax(-1).to(value.dtype) @ value
    else:
        out = sdpa(query, key, value, attn_mask=visible, scale=scaling, dropout_p=dropout)
    return out.reshape(B, H, T, D)


def shared_prefix_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    sliding_window=None,
    softcap=None,
    pack=None,
    **more,
):
    """transformers' attention interface. With `pack`: query [1, H, L, D], key and value [1, H_kv, L, D] -> [1, L, H, D]; without: plain SDPA."""
    import torch

    scaling = scaling or query.shape[-1] ** -0.5
    if pack is None:
        if softcap:  # transformers' SDPA would silently leave it out
            return _attend(query, key, value, attention_mask, scaling, softcap, dropout).transpose(
                1, 2
            ).contiguous(), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    P, (G, C) = pack.prompt, pack.index.shape
    window = sliding_window if sliding_window and sliding_window < P + C else None
    if _kernel and not dropout:
        return _flex(query, key, value, pack, window, scaling, softcap), None
    out = []
    if P:
        own = _causal(P, 0, window, query.device) if window else None
        out.append(
            _attend(query[:, :, :P], key[:, :, :P], value[:, :, :P], own, scaling, softcap, dropout)[
                0
            ].transpose(0, 1)
        )  # [P, H, D]
    q, k, v = (states[0][:, pack.index].transpose(0, 1) for states in (query, key, value))  # [G, heads, C, D]
    if P:
        k, v = (
            torch.cat([states[:, :, :P].expand(G, -1, -1, -1), own], 2)
            for states, own in ((key, k), (value, v))
        )
    seen = pack.visible(window) if P or window else None
    out.append(
        _attend(q, k, v, seen, scaling, softcap, dropout).transpose(1, 2)[pack.real]
    )  # [sum C_i, H, D]
    return torch.cat(out)[None], None


_kernel: list[Any] = []  # FlexAttention, compiled, where it is the faster way


def _flex(query, key, value, pack, window: int | None, scaling: float, softcap: float | None):
    """query [1, H, L, D], key and value [1, H_kv, L, D] -> [1, L, H, D], all segments in one kernel."""
    import torch

    cap = (lambda score, batch, head, q, kv: softcap * torch.tanh(score / softcap)) if softcap else None
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast, which SDPA heeds and this does not
    return _kernel[0](
        query,
        key,
        value,
        score_mod=cap,
        block_mask=pack.blocks(window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    ).transpose(1, 2)


def _compiled():
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex_is_faster(
    causal_lm, rounds: int = 5, prompt: int = 512, group: int = 8, completion: int = 128
) -> bool:
    """Both ways forwards and backwards on a row of GRPO's size with this model's heads, in turns, on its GPU. False as well where
    FlexAttention cannot be had (it needs Triton), fails, or gives something else."""
    import time

    import torch

    text, device, kept = causal_lm.config.get_text_config(), causal_lm.device, _kernel[:]
    D = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    row = pack(
        torch.zeros(prompt - 3, dtype=torch.long, device=device),
        [torch.zeros(completion - 3 * i, dtype=torch.long, device=device) for i in range(group)],
    )  # no round lengths
    shape = row.ids.shape[1], D
    states = [
        torch.randn(1, heads, *shape, device=device, dtype=computed_in(causal_lm), requires_grad=True)
        for heads in (
            text.num_attention_heads,
            *[getattr(text, "num_key_value_heads", None) or text.num_attention_heads] * 2,
        )
    ]
    best, results = {}, {}

    def once(flex: bool) -> None:
        _kernel[:] = [compiled] if flex else []
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        out = shared_prefix_attention(None, *states, None, pack=row)[0]
        gradients = torch.autograd.grad(out.float().square().mean(), states)
        torch.cuda.synchronize(device)
        best[flex] = min(best.get(flex, 9e9), time.perf_counter() - began)
        results[flex] = out.detach(), *gradients

    try:
        compiled = _compiled()
        for flex in (True, False):  # compiling and first calls do not count
            once(flex)
        best.clear()
        for _ in range(rounds):
            once(True)
            once(False)
        alike = all(
            float((a.float() - b.float()).norm()) < 0.02 * float(b.float().norm())
            for a, b in zip(results[True], results[False])
        )
    except Exception:  # whatever its compiler raises: the other way is always there
        return False
    finally:
        _kernel[:] = kept
    return alike and best[True] < best[False]


def kernel() -> str:
    """Which way packed rows are computed now: flex, segments."""
    return "flex" if _kernel else "segments"


def choose_kernel(causal_lm) -> None:
    """On a GPU: take the faster way from now on."""
    _kernel.clear()
    if causal_lm.device.type == "cuda" and flex_is_faster(causal_lm):
        _kernel.append(_compiled())
        try:
            fine = _probe(causal_lm) < tolerance(causal_lm)
        except Exception:  # as in the trial
            fine = False
        if not fine:
            _kernel.clear()


def enable_packed_rows(causal_lm) -> str | None:
    """Switch a model's attention to ours, which is plain SDPA until a Pack comes along. Returns None, or why it cannot be done
    (the model is then left as it was): other kinds of layers, or log-probs of a packed row that differ from those of plain rows."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    text = causal_lm.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    head = causal_lm.get_output_embeddings()
    if odd := kinds - {"full_attention", "sliding_attention"}:
        return f"layers of kind {', '.join(sorted(odd))}"
    if getattr(text, "logit_scale", None) or getattr(text, "logits_scaling", None):
        return "scaled logits"
    if (
        head is None
        or head.weight.requires_grad
        or getattr(head, "bias", None) is not None
        or head.weight.dim() != 2
        or not head.weight.is_floating_point()
    ):
        return "an output layer that is trained, quantized or has a bias"
    AttentionInterface.register(NAME, shared_prefix_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = text._attn_implementation
    try:
        causal_lm.set_attn_implementation(NAME)
        if text._attn_implementation != NAME:
            return "attention that cannot be exchanged"
        difference = _probe(causal_lm)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError, NotImplementedError) as error:
        causal_lm.set_attn_implementation(before)
        return (
            f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            if str(error)
            else type(error).__name__
        )
    if not difference < tolerance(causal_lm):
        causal_lm.set_attn_implementation(before)
        return f"its log-probs in a packed row are off by {difference:.2f}"
    choose_kernel(causal_lm)
    return None


def computed_in(causal_lm):
    """The dtype of a model's products. Its first weights may say otherwise: 4-bit ones are bytes, a LoRA is float32."""
    return causal_lm.get_output_embeddings().weight.dtype


def tolerance(causal_lm) -> float:
    """Half precision rounds log-probs to about 0.02 on average; a token that sees too much or too little moves them by far more."""
    import torch

    return 1e-3 if computed_in(causal_lm) == torch.float32 else 0.1


def _probe(causal_lm, tokens: int = 24) -> float:
    """Mean difference of log-probs between a packed row and plain rows, on arbitrary tokens: nats."""
    import torch

    vocabulary, device = causal_lm.get_output_embeddings().weight.shape[0], causal_lm.device
    text = torch.randint(
        min(100, vocabulary // 2), vocabulary, (3, tokens), generator=torch.Generator().manual_seed(0)
    ).to(device)
    training, dtype = causal_lm.training, computed_in(causal_lm)
    causal_lm.eval()
    with (
        torch.no_grad(),
        torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)),
    ):
        row = pack(text[0], [text[1], text[2][: tokens // 2]])
        wanted = torch.cat([text[1], text[2][: tokens // 2]])
        packed, *_ = row.logps(causal_lm, row.predictors, wanted)
        plain = []
        for segment in (text[1], text[2][: tokens // 2]):
            logits = (
                causal_lm(input_ids=torch.cat([text[0], segment])[None], use_cache=False)
                .logits[0, tokens - 1 : -1]
                .float()
            )
            plain.append(logits.log_softmax(-1).gather(-1, segment[:, None])[:, 0])
    causal_lm.train(training)
    return float((packed - torch.cat(plain)).abs().mean())


def token_logps(hidden, head, targets, temperature: float, softcap: float | None = None, chunk: int = 128):
    """hidden [N, H], targets [N] -> (log p(target) [N], entropy [N], target is the likeliest token [N]) of
    softmax(head(hidden) / temperature); float32, nats.

    The logits of 8 answers are the largest tensor of a step (N x 49,152 floats). Here a chunk of them is computed once and
    thrown away: log p is one number per token, so its gradient with respect to that token's hidden state,

        d log p(t) / d h = (w_t - sum_v p_v w_v) / temperature,

    does not depend on what comes later and is found on the spot; the backward pass only scales it. `head` is frozen and
    has no bias (see `enable`); only log p carries a gradient. softcap: logits become c tanh(logits / c) first (Gemma 2).
    """
    return _function().apply(hidden, head.weight, targets, temperature, softcap, chunk)


def _function():
    """The autograd function, made once: torch is imported only when something is trained."""
    if _function.made is None:
        import torch

        class TokenLogps(torch.autograd.Function):
            @staticmethod
            def forward(context, hidden, weight, targets, temperature, softcap, chunk):
                slope = (
                    torch.empty_like(hidden, dtype=weight.dtype) if context.needs_input_grad[0] else None
                )  # d log p / d hidden
                logps, entropies, best = (
                    hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(3)
                )
                with torch.autocast(hidden.device.type, enabled=False):
                    for start in range(0, len(targets), chunk):
                        logits = p = None  # the chunk before goes first
                        here = slice(start, start + chunk)
                        logits = (hidden[here].to(weight.dtype) @ weight.T).float()  # [chunk, vocabulary]
                        if softcap:
                            logits = softcap * torch.tanh(logits / softcap)
                        factor = (
                            (1 - (logits / softcap) ** 2) / temperature if softcap else 1 / temperature
                        )  # d scaled / d logits
                        if temperature != 1:
                            logits = logits / temperature
                        norm = logits.logsumexp(-1, keepdim=True)
                        drawn = logits.gather(-1, targets[here, None])
                        logps[here], best[here] = (
                            (drawn - norm)[:, 0],
                            (logits.argmax(-1) == targets[here]).float(),
                        )
                        p = (logits - norm).exp_()
                        entropies[here] = norm[:, 0] - torch.linalg.vecdot(p, logits)
                        if slope is not None:
                            p.neg_().scatter_add_(-1, targets[here, None], p.new_ones(len(p), 1))
                            slope[here] = (p.mul_(factor).to(weight.dtype)) @ weight
                if slope is not None:
                    context.save_for_backward(slope)
                context.mark_non_differentiable(entropies, best)
                return logps, entropies, best

            @staticmethod
            def backward(context, gradient, *_):
                (slope,) = context.saved_tensors
                return gradient[:, None].to(slope.dtype) * slope, None, None, None, None, None

        _function.made = TokenLogps
    return _function.made


_function.made = None
