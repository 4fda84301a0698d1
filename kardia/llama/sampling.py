"""Sample tokens from logits in numpy."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: their longest length, the distribution, and the tokens that end one."""

    max_tokens: int
    temperature: float = 1.0  # 0 takes the most likely token
    top_p: float = 1.0
    min_p: float = 0.0
    stop: Collection[int] = ()


def sample(logits, how: Sampling, rngs):
    """Draw a token per row of `logits` [n, V]; return tokens [n] and their log-probs [n] (nats).

    A log-prob is that of the whole distribution at the temperature, whatever top_p and min_p cut away.
    """
    import numpy as np

    if how.temperature == 0:
        peak = logits.max(1)
        return logits.argmax(1), -np.log(np.exp(logits - peak[:, None]).sum(1))
    scaled = logits / np.float32(how.temperature) if how.temperature != 1 else logits
    scaled = scaled - scaled.max(1, keepdims=True)
    weights = np.exp(scaled)  # [n, V], the largest of each row is 1
    kept = weights
    if how.min_p > 0:  # keep what is at least min_p times as likely as the best token
        kept = np.where(kept >= how.min_p, kept, 0)
    if how.top_p < 1:
        kept = np.stack([_keep_top_p(row, how.top_p) for row in kept])
    tokens, total = draw(kept, rngs)
    if kept is not weights:
        total = weights.sum(1, dtype=np.float64)
    return tokens, scaled[np.arange(len(tokens)), tokens] - np.log(total)


def _keep_top_p(weights, top_p: float, candidates: int = 1024):
    """Return `weights` [V] with 0 outside the smallest set of best tokens whose mass reaches `top_p`."""
    import numpy as np

    limit = top_p * weights.sum(dtype=np.float64)
    # Sorting 150,000 weights takes 10 ms a token; the set nearly always lies within the best thousand.
    order = np.argpartition(weights, -min(candidates, len(weights)))[-candidates:]
    if weights[order].sum(dtype=np.float64) < limit:
        order = np.arange(len(weights))
    order = order[np.argsort(-weights[order])]
    mass_before = weights[order].cumsum(dtype=np.float64) - weights[order]
    inside = order[mass_before < limit]
    kept = np.zeros_like(weights)
    kept[inside] = weights[inside]
    return kept


def draw(weights, rngs, block: int = 256):
    """Draw an index per row of `weights` [n, V], in proportion; return indices and row sums.

    This inverts the cumulative sum, first over blocks, then inside one: one pass over the vocabulary.
    """
    import numpy as np

    n, size = weights.shape
    whole = size // block * block
    # numpy adds pairwise, which is exact to 1e-6.
    sums = weights[:, :whole].reshape(n, -1, block).sum(2).astype(np.float64)  # [n, blocks]
    if whole < size:
        sums = np.concatenate([sums, weights[:, whole:].sum(1, dtype=np.float64)[:, None]], 1)
    indices = []
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
        indices.append(b * block + at)
    return np.array(indices), sums.sum(1)


def logits_logsumexp(logits) -> float:
    """Return log(sum(exp(logits))) of one row of logits [V]."""
    import numpy as np

    peak = logits.max()
    return float(peak + np.log(np.exp(logits - peak).sum(dtype=np.float64)))


def logsumexp(values: list[float]) -> float:
    """Return log(sum(exp(values)))."""
    peak = max(values)
    return peak + math.log(sum(math.exp(x - peak) for x in values))


def sigmoid(x: float) -> float:
    """Return 1 / (1 + exp(-x)) for any finite or infinite x."""
    if x >= 0:
        return 1 / (1 + math.exp(-min(x, 700)))
    small = math.exp(max(x, -700))
    return small / (1 + small)
