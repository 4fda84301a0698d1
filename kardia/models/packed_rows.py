"""Compute many answers in one row: a prompt once for its whole group, dialogues side by side without padding.

    [prompt][c1][c2]..[cG]      every segment sees the prompt and itself, and its positions start again at P

A row of P + sum C_i tokens replaces G rows of P + C_i. All layers but attention work token by token. A mask
[L, L] over the row would be exact too, but compute (P + G C)^2 scores to keep G C (P + C) of them. So the
segments' queries and keys form a batch of their own behind the prompt's keys (`shared_prefix_attention`).
transformers hands its attention functions every keyword of the model's forward pass: here `pack`.

`token_logps` returns log-probabilities of the chosen tokens with at most a chunk of logits in memory.

Symbols: P prompt tokens, G segments, C_i tokens of segment i, C the longest, L = P + sum C_i, H hidden size,
N chosen tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from kardia.core.console import one_line

NAME = "kardia_shared_prefix"  # the name among transformers' attention implementations
# What a model of another build raises when its attention is exchanged and tried.
TRIAL_ERRORS = (TypeError, ValueError, AttributeError, KeyError, RuntimeError, NotImplementedError)


@dataclass
class PackedRow:
    """Hold one row of segments behind a prompt. An empty prompt packs texts that share nothing.

    predictors: the places whose hidden states predict the segments' tokens. Without a prompt nothing predicts
    a segment's first token, which is left out.
    """

    ids: Any  # [1, L]
    positions: Any  # [1, L]
    predictors: Any  # [sum C_i]
    prompt: int  # P
    index: Any  # [G, C] place of each segment's tokens in the row; past its end any place, never read
    real: Any  # [G, C] bool
    _visible: dict = field(default_factory=dict)

    def hidden(self, causal_lm):
        """Return the row's hidden states [L, H] under a causal LM that `enable_packed_rows` has changed."""
        import torch
        from peft.helpers import disable_input_dtype_casting

        # PEFT casts every LoRA's input to float32 and autocast casts it back: a third of all activations.
        with disable_input_dtype_casting(causal_lm, active=torch.is_autocast_enabled(self.ids.device.type)):
            # transformers makes no mask of its own where it is given a 4-D one; our attention ignores it.
            inputs = {"input_ids": self.ids, "position_ids": self.positions}
            mask = self.ids[None, None]
            states = causal_lm.base_model(**inputs, attention_mask=mask, use_cache=False, pack=self)
        return states.last_hidden_state[0]

    def logps(self, causal_lm, places, targets, temperature: float = 1.0, chunk: int = 128):
        """Return `token_logps` of targets [N], each predicted at its place [N] in the row."""
        softcap = getattr(causal_lm.config.get_text_config(), "final_logit_softcapping", None)
        states = self.hidden(causal_lm)[places]  # [N, H]
        return token_logps(states, causal_lm.get_output_embeddings(), targets, temperature, softcap, chunk)

    def visible(self, window: int | None):
        """Return which of [prompt, segment] a segment's tokens see: bool [C, P + C]."""
        if window not in self._visible:
            self._visible[window] = _causal(self.index.shape[1], self.prompt, window, self.ids.device)
        return self._visible[window]


def pack(prompt, segments) -> PackedRow:
    """Return the row of a prompt [P] and segments G x [C_i], token ids on one device."""
    import torch

    device, lengths, P = segments[0].device, [len(s) for s in segments], len(prompt)
    starts = [P + sum(lengths[:i]) for i in range(len(lengths))]
    places = torch.arange(max(lengths), device=device)  # [C]
    real = places < torch.tensor(lengths, device=device)[:, None]  # [G, C]
    index = (torch.tensor(starts, device=device)[:, None] + places).where(real, 0)  # [G, C]
    last = torch.tensor([P - 1], device=device)[: min(P, 1)]  # the prompt's last token, if there is a prompt
    predictors = []
    for start, length in zip(starts, lengths):
        predictors += [last, torch.arange(start, start + length - 1, device=device)]
    positions = torch.cat([torch.arange(P), *[torch.arange(P, P + n) for n in lengths]]).to(device)  # [L]
    ids = torch.cat([prompt, *segments])  # [L]
    return PackedRow(ids[None], positions[None], torch.cat(predictors), P, index, real)


# --------------------------------------------------------------------------------------- attention


def _causal(tokens: int, before: int, window: int | None, device):
    """Return bool [tokens, before + tokens]: a token sees itself and those before, at most `window`."""
    import torch

    seen = torch.arange(before + tokens, device=device)
    at = torch.arange(before, before + tokens, device=device)[:, None]
    return (seen <= at) & (at - seen < (window or before + tokens))


def _attend(query, key, value, visible, scaling, softcap, dropout):
    """Return attention [B, heads, T, D] of query [B, heads, T, D] over key and value [B, kv heads, S, D].

    visible: bool, broadcastable to [B, 1, T, S], or None for plain causal attention.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    B, heads, T, D = query.shape
    shared = heads // key.shape[1]  # query heads per key head (grouped-query attention)
    if visible is None and not softcap:
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        return sdpa(query, key, value, is_causal=T > 1, scale=scaling, dropout_p=dropout)
    if visible is None:
        visible = _causal(T, key.shape[2] - T, None, query.device)
    # Heads that share a key stand one behind the other, so no key is copied and no gradient summed.
    query = query.reshape(B, key.shape[1], shared * T, D)
    visible = visible.repeat(*[1] * (visible.dim() - 2), shared, 1)
    if softcap:
        scores = softcap * torch.tanh((query @ key.transpose(-1, -2)).float() * (scaling / softcap))
        # Not -inf: a padding token may see nothing at all, and softmax would give NaN.
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        out = scores.softmax(-1).to(value.dtype) @ value
    else:
        out = sdpa(query, key, value, attn_mask=visible, scale=scaling, dropout_p=dropout)
    return out.reshape(B, heads, T, D)


def shared_prefix_attention(module, query, key, value, attention_mask, pack=None, **settings):
    """Return (attention output [1, L, heads, D], None): transformers' attention interface.

    With `pack`: query [1, heads, L, D], key and value [1, kv heads, L, D]. Without it: plain SDPA.
    """
    import torch

    scaling = settings.get("scaling") or query.shape[-1] ** -0.5
    softcap, dropout = settings.get("softcap"), settings.get("dropout", 0.0)
    if pack is None:
        return _plain_attention(module, query, key, value, attention_mask, {**settings, "scaling": scaling})
    P, (G, C) = pack.prompt, pack.index.shape
    window = settings.get("sliding_window")
    if window and window >= P + C:
        window = None
    out = []
    if P:
        own = _causal(P, 0, window, query.device) if window else None
        prompt = [states[:, :, :P] for states in (query, key, value)]
        out.append(_attend(*prompt, own, scaling, softcap, dropout)[0].transpose(0, 1))  # [P, heads, D]
    q, k, v = (states[0][:, pack.index].transpose(0, 1) for states in (query, key, value))  # [G, heads, C, D]
    if P:
        k = torch.cat([key[:, :, :P].expand(G, -1, -1, -1), k], 2)  # [G, kv heads, P + C, D]
        v = torch.cat([value[:, :, :P].expand(G, -1, -1, -1), v], 2)
    visible = pack.visible(window) if P or window else None
    answers = _attend(q, k, v, visible, scaling, softcap, dropout)  # [G, heads, C, D]
    out.append(answers.transpose(1, 2)[pack.real])  # [sum C_i, heads, D]
    return torch.cat(out)[None], None


def _plain_attention(module, query, key, value, attention_mask, settings):
    """Return SDPA's attention, with the soft cap that transformers' own SDPA would silently leave out."""
    if softcap := settings.get("softcap"):
        scaling, dropout = settings["scaling"], settings.get("dropout", 0.0)
        out = _attend(query, key, value, attention_mask, scaling, softcap, dropout)
        return out.transpose(1, 2).contiguous(), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    settings.pop("sliding_window", None)
    settings.pop("softcap", None)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


def enable_packed_rows(causal_lm) -> str | None:
    """Exchange a model's attention for ours, which is plain SDPA until a pack comes along.

    Return None, or the reason why that does not work; the model is then as it was.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    text = causal_lm.config.get_text_config()
    if reason := _unsupported_reason(text, causal_lm.get_output_embeddings()):
        return reason
    AttentionInterface.register(NAME, shared_prefix_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = text._attn_implementation
    try:
        causal_lm.set_attn_implementation(NAME)
        reason = None if text._attn_implementation == NAME else "attention that cannot be exchanged"
    except TRIAL_ERRORS as error:
        reason = f"{type(error).__name__}: {one_line(error)[:100]}"
    if reason := reason or wrong_rows(causal_lm):
        causal_lm.set_attn_implementation(before)
    return reason


def wrong_rows(causal_lm) -> str | None:
    """Return why packed rows of this model cannot be trusted, or None if they give plain rows' log-probs."""
    try:
        difference = probe(causal_lm)
    except TRIAL_ERRORS as error:
        return f"{type(error).__name__}: {one_line(error)[:100]}"
    if difference < tolerance(causal_lm):
        return None
    return f"its log-probs in a packed row are off by {difference:.2f}"


def _unsupported_reason(text, head) -> str | None:
    if odd := set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}:
        return f"layers of kind {', '.join(sorted(odd))}"
    if getattr(text, "logit_scale", None) or getattr(text, "logits_scaling", None):
        return "scaled logits"
    plain = head is not None and getattr(head, "bias", None) is None and head.weight.dim() == 2
    if not plain or head.weight.requires_grad or not head.weight.is_floating_point():
        return "an output layer that is trained, quantized or has a bias"
    return None


def accept_packed_rows(peft_model) -> None:
    """Let a PeftModel take a packed row: model(packed_row=row, places=, targets=, ..) -> `token_logps`.

    The row goes through the forward pass of whatever wraps the model, so DistributedDataParallel sees it.
    """
    plain_forward = peft_model.forward

    @functools.wraps(plain_forward)
    def forward(*arguments, packed_row: PackedRow | None = None, **keywords):
        if packed_row is None:
            return plain_forward(*arguments, **keywords)
        return packed_row.logps(peft_model.base_model.model, **keywords)

    peft_model.forward = forward


def tolerance(causal_lm) -> float:
    """Return the mean difference of log-probs, in nats, that rounding explains; a wrong mask makes more."""
    import torch

    return 1e-3 if causal_lm.get_output_embeddings().weight.dtype == torch.float32 else 0.1


def probe(causal_lm, tokens: int = 24) -> float:
    """Return the mean difference of log-probs (nats) between a packed row and plain rows of random tokens."""
    import torch

    head, device = causal_lm.get_output_embeddings().weight, causal_lm.device  # head: [vocabulary, H]
    vocabulary, dtype, training = head.shape[0], head.dtype, causal_lm.training
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(min(100, vocabulary // 2), vocabulary, (3, tokens), generator=generator).to(device)
    prompt, segments = text[0], [text[1], text[2][: tokens // 2]]
    half = dtype in (torch.bfloat16, torch.float16)
    causal_lm.eval()
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=half):
        row, plain = pack(prompt, segments), []
        packed, *_ = row.logps(causal_lm, row.predictors, torch.cat(segments))
        for segment in segments:
            ids = torch.cat([prompt, segment])[None]  # [1, P + C_i]
            logits = causal_lm(input_ids=ids, use_cache=False).logits[0, tokens - 1 : -1].float()
            plain.append(logits.log_softmax(-1).gather(-1, segment[:, None])[:, 0])  # [C_i]
    causal_lm.train(training)
    return float((packed - torch.cat(plain)).abs().mean())


# --------------------------------------------------------------------------------------- log-probabilities


def token_logps(hidden, head, targets, temperature: float, softcap: float | None = None, chunk: int = 128):
    """Return (log p(target) [N], entropy [N], target is the likeliest token [N]), float32, nats.

    p = softmax(head(hidden) / temperature), hidden [N, H], targets [N]. softcap: logits become c tanh(logits
    / c) first (Gemma 2). In plain torch, with all logits in memory, the first of the three is

        (head(hidden).float() / temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    Here a chunk of the logits is computed once and thrown away: log p is one number per token, so its
    gradient with respect to that token's hidden state,

        d log p(t) / d h = (w_t - sum_v p_v w_v) / temperature,

    does not depend on what comes later. It is computed on the spot; the backward pass only scales it. `head`
    is frozen and has no bias (`enable_packed_rows` checks it); only log p carries a gradient.
    """
    return _token_logps_function().apply(hidden, head.weight, targets, temperature, softcap, chunk)


@functools.cache
def _token_logps_function():
    """Return the autograd function, made at its first use: torch is imported only where it is needed."""
    import torch

    class TokenLogps(torch.autograd.Function):
        @staticmethod
        def forward(context, hidden, weight, targets, temperature, softcap, chunk):
            wanted = context.needs_input_grad[0]
            # slope: d log p / d hidden [N, H]; the results [N] each
            slope = torch.empty_like(hidden, dtype=weight.dtype) if wanted else None
            logps = hidden.new_empty(len(targets), dtype=torch.float32)
            entropies, best = torch.empty_like(logps), torch.empty_like(logps)
            with torch.autocast(hidden.device.type, enabled=False):
                for start in range(0, len(targets), chunk):
                    logits = p = None  # frees the chunk before
                    here = slice(start, start + chunk)
                    logits = (hidden[here].to(weight.dtype) @ weight.T).float()  # [chunk, vocabulary]
                    factor = 1 / temperature  # d scaled logits / d logits
                    if softcap:
                        logits = softcap * torch.tanh(logits / softcap)
                        factor = (1 - (logits / softcap) ** 2) / temperature
                    if temperature != 1:
                        logits = logits / temperature
                    norm = logits.logsumexp(-1, keepdim=True)  # [chunk, 1]
                    drawn = logits.gather(-1, targets[here, None])  # [chunk, 1]
                    logps[here] = (drawn - norm)[:, 0]
                    best[here] = (logits.argmax(-1) == targets[here]).float()
                    p = (logits - norm).exp_()
                    entropies[here] = norm[:, 0] - torch.linalg.vecdot(p, logits)
                    if slope is not None:
                        p.neg_().scatter_add_(-1, targets[here, None], p.new_ones(len(p), 1))
                        slope[here] = p.mul_(factor).to(weight.dtype) @ weight
            if slope is not None:
                context.save_for_backward(slope)
            context.mark_non_differentiable(entropies, best)
            return logps, entropies, best

        @staticmethod
        def backward(context, gradient, *_):
            (slope,) = context.saved_tensors
            return gradient[:, None].to(slope.dtype) * slope, None, None, None, None, None

    return TokenLogps
