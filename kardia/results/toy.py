"""Show GRPO in numbers small enough for paper: a policy of three words, four one-word answers, two
updates."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from kardia.results.groups import advantages_of
from kardia.results.templates import template

WORDS = ("sorry", "pizza", "okay")
DRAWN, REWARDS = (0, 1, 0, 2), (1.0, 0.0, 1.0, 0.5)
RATE, EPSILON = 1.0, 0.2  # learning rate, clip range


def softmax(logits: list[float]) -> list[float]:
    """Return the probabilities [V] of logits [V]."""
    weights = [math.exp(z) for z in logits]
    return [w / sum(weights) for w in weights]


def _clip(r: float, epsilon: float) -> float:
    return min(max(r, 1 - epsilon), 1 + epsilon)


def toy_gradient(
    logits: list[float], old: list[float], drawn: list[int], advantages: list[float], epsilon: float
) -> tuple[float, list[float]]:
    """Return (loss, its gradient [V]) for one-token answers `drawn` [G] under a softmax policy with logits
    [V].

    loss = -(1/G) sum_i min(r_i A_i, clip(r_i, 1 - eps, 1 + eps) A_i),   r_i = p(drawn_i) / old(drawn_i)
    d r_i / d z_v = r_i (1[v = drawn_i] - p_v);   a clipped answer has no gradient
    """
    p, G = softmax(logits), len(drawn)
    loss, gradient = 0.0, [0.0] * len(logits)
    for token, advantage in zip(drawn, advantages):
        r = p[token] / old[token]
        inside = _clip(r, epsilon)
        loss -= min(r * advantage, inside * advantage) / G
        # The smaller term counts. Only the unclipped one has a gradient.
        if r * advantage <= inside * advantage:
            for v in range(len(logits)):
                gradient[v] -= advantage * r * ((v == token) - p[v]) / G
    return loss, gradient


def _update(logits: list[float], old: list[float], advantages: list[float]) -> dict[str, Any]:
    """Return the numbers of one update, for the template."""
    p, answers = softmax(logits), []
    loss, gradient = toy_gradient(logits, old, list(DRAWN), advantages, EPSILON)
    for token, reward, advantage in zip(DRAWN, REWARDS, advantages):
        r = p[token] / old[token]
        term, clipped = r * advantage, _clip(r, EPSILON) * advantage
        answer = {"token": token, "word": WORDS[token], "reward": reward, "advantage": advantage, "r": r}
        answer |= {"p": p[token], "p_drawn": old[token], "term": term, "clipped": clipped}
        answers.append({**answer, "flat": term > clipped})
    pushed = [answer for answer in answers if not answer["flat"]]
    terms = [f"{x['advantage']:+.4f} x {x['r']:.4f} x ({int(x['token'] == 0)} - {p[0]:.4f})" for x in pushed]
    by_hand = f"-(1/4) x ({' '.join(terms)}) = {gradient[0]:+.4f}"
    by_hand = textwrap.fill(by_hand, 100, initial_indent=" " * 7, subsequent_indent=" " * 9)
    logits = [z - RATE * slope for z, slope in zip(logits, gradient)]
    numbers = {"p": p, "answers": answers, "loss": loss, "gradient": gradient, "by_hand": by_hand}
    return {**numbers, "logits": logits, "p_after": softmax(logits)}


def toy() -> str:
    """Return the lesson as text of at most 100 columns."""
    logits = [0.0] * len(WORDS)
    old = softmax(logits)
    mean, std, advantages = advantages_of(list(REWARDS))
    first = _update(logits, old, advantages)
    new = first["p_after"]
    lesson = {"words": WORDS, "rewards": REWARDS, "rate": RATE, "epsilon": EPSILON, "mean": mean, "std": std}
    lesson |= {"first": first, "second": _update(first["logits"], old, advantages)}
    lesson["logs"] = [(word, math.log(b), math.log(a)) for word, b, a in zip(WORDS, old, new)]
    lesson["kl_terms"] = [(b, math.log(b / a)) for b, a in zip(old, new)]
    lesson["kl"] = sum(b * log_ratio for b, log_ratio in lesson["kl_terms"])
    return template("toy.txt.j2").render(lesson)
