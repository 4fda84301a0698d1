"""Sample tokens from logits in numpy."""

from __future__ import annotations

import math


def logits_logsumexp(logits) -> float:
    import numpy as np

    peak = logits.max()
    return float(peak + np.log(np.exp(logits - peak).sum(dtype=np.float64)))


def sample(logits, temperature, top_p, min_p, rngs):
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
    tokens, total = draw(kept, rngs)
    if kept is not weights:
        total = weights.sum(1, dtype=np.float64)
    return tokens, scaled[np.arange(len(tokens)), tokens] - np.log(total)


def draw(weights, rngs, block: int = 256):
    """One index per row of `weights` [n, vocabulary], in proportion to them; also the rows' sums. Inverse of the cumulative
    sum, first over the sums of blocks, then inside one block: two passes over the vocabulary become one."""
    import numpy as np

    n, size = weights.shape
    whole = size // block * block
    sums = (
        weights[:, :whole].reshape(n, -1, block).sum(2).astype(np.float64)
    )  # [n, blocks]; numpy adds pairwise: exact to 1e-6
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


def logsumexp(values: list[float]) -> float:
    peak = max(values)
    return peak + math.log(sum(math.exp(x - peak) for x in values))


def sigmoid(x: float) -> float:
    return (
        1 / (1 + math.exp(-min(x, 700))) if x >= 0 else math.exp(max(x, -700)) / (1 + math.exp(max(x, -700)))
    )
