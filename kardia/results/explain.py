"""One GRPO group worked by hand, as text: rewards, mean, deviation, advantages, and what the step did to the tokens.

`toy` is the same without any run: numbers small enough to be redone on paper.
"""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path

from kardia.core.console import printable
from kardia.data.rows import split_spans
from kardia.results.run_files import (
    ReportError,
    advantages_of,
    fixed,
    form_of,
    groups_of,
    number,
    parts_of,
    read_run,
    rewards_of,
    spread_of,
    why_pushed,
)

WIDTH = 100  # columns
MOST = 256  # samples of a group: a page of text for each


def _say(label: str, text, clip: int = 100_000) -> list[str]:
    """`label` and wrapped text, at most WIDTH columns, without control characters."""
    clean = printable(f"{label:<11} {text}"[:clip])
    return textwrap.wrap(clean, WIDTH, initial_indent="  ", subsequent_indent=" " * 14)


def _marked(text) -> str:
    """A message on one line, its spans named in brackets."""
    parts = split_spans(text)
    return (
        " ".join(f"[{name or 'outside the spans'}] {piece}" for name, piece in parts)
        if any(name for name, _ in parts)
        else str(text or "")
    )


def _sum_by_hand(sample: dict) -> str:
    """'weight x value component + ... = reward' of one sample, and a word where the stored reward is another number."""
    reward, parts = number(sample.get("reward")), parts_of(sample)
    known = [(name, weight, value) for name, weight, value in parts if value is not None]
    unknown = ", ".join(name for name, _, value in parts if value is None)
    if reward is None:
        return f"no reward: {unknown or 'it'} could not be judged; takes no part"
    terms, total, weights = (
        " + ".join(f"{w:.4f} x {v:.4f} {name}" for name, w, v in known),
        sum(w * v for _, w, v in known),
        sum(w for _, w, _ in known),
    )
    if unknown and weights and abs(total / weights - reward) <= 1e-3:
        return f"({terms}) / {weights:.4f} = {total / weights:.4f}   ({unknown} not judged)"
    return (
        f"{terms} = {total:.4f}"
        + (f"   ({unknown} not judged)" if unknown else "")
        + (f"   (the run stored {reward:.4f})" if abs(total - reward) > 1e-3 else "")
    )


def _group_by_hand(samples: list[dict]) -> list[str]:
    rewards = rewards_of(samples)
    known, (mean, std, advantages) = [r for r in rewards if r is not None], advantages_of(rewards)
    label = [f"sample {sample.get('sample', i)}" for i, sample in enumerate(samples)]
    lines = ["", f"GROUP: {len(known)} of {len(samples)} samples take part"]
    if len(known) < 2:
        return lines + _say("", "fewer than two rewards: nothing to compare, every advantage is 0")
    lines += _say("mean", f"({' + '.join(f'{r:.4f}' for r in known)}) / {len(known)} = {mean:.4f}")
    lines += _say(
        "std",
        f"sqrt(({' + '.join(f'({r:.4f} - {mean:.4f})^2' for r in known)}) / ({len(known)} - 1)) = {std:.4f}",
    )
    lines += ["", "ADVANTAGE = (reward - mean) / (std + 0.0001)"]
    stored = [number(sample.get("advantage")) for sample in samples]
    off = [0.0 if kept is None else abs(kept - advantage) for kept, advantage in zip(stored, advantages)]
    for name, reward, advantage, kept, gap in zip(label, rewards, advantages, stored, off):
        terms = (
            "no reward, takes no part: 0"
            if reward is None
            else f"({reward:.4f} - {mean:.4f}) / ({std:.4f} + 0.0001) = {advantage:+.4f}"
        )
        lines += _say(
            name,
            terms
            + ("   not stored" if kept is None else f"   stored {kept:+.4f}" + "   DIFFERS" * (gap > 1e-3)),
        )
    if max(off) > 1e-3:
        lines += _say(
            "check",
            f"the stored advantages differ by up to {max(off):.4f}: the run scaled its rewards in another way",
        )
    elif None not in stored:
        lines += _say("check", "equal to the stored advantages within 0.001")
    lines += ["", "WHAT IS PUSHED: the log-prob of every token of a reply, in proportion to its advantage"]
    for advantage, i in sorted(((a, i) for i, a in enumerate(advantages)), key=lambda pair: -pair[0]):
        lines += _say(
            label[i], why_pushed(samples[i], samples).replace("−", "-")
        )  # a Windows console may not know the minus sign
        before, after = (number(samples[i].get(key)) for key in ("logprob", "logprob_after"))
        if before is not None and after is not None:
            moved = (
                ""
                if not advantage
                else ", with the push"
                if (after - before) * advantage > 0
                else ", not with the push: replies share tokens and weights"
            )
            lines += _say(
                "", f"mean log-prob per token {before:.4f} -> {after:.4f} ({after - before:+.4f}{moved})"
            )
    return lines


# ---------------------------------------------------------------------------------- what the step did to the tokens


def _quoted(token: str) -> str:
    return json.dumps(
        "".join(c if c.isprintable() or c == "\n" else "?" for c in str(token)), ensure_ascii=False
    )


def _moves(row: dict) -> list[tuple[str, float, float]]:
    """[(token, log-prob before, after)] of one line of tokens.jsonl; what is damaged is left out."""
    columns = (row.get(key, []) for key in ("tokens", "before", "after"))
    return [
        (str(token), number(before), number(after))
        for token, before, after in zip(*columns)
        if number(before) is not None and number(after) is not None
    ]


def _tokens_by_hand(samples: list[dict], traced: dict, logged: dict, most: int = 6) -> list[str]:
    """Which tokens moved and how much, the KL of the step and the clip, for a group whose tokens were recorded."""
    advantages = advantages_of(rewards_of(samples))[2]
    known = [
        (a, s, moves)
        for a, s in zip(advantages, samples)
        if (moves := _moves(traced.get(number(s.get("sample")), {})))
    ]
    if not known:
        return []
    everything = [(token, a - b, advantage) for advantage, _, moves in known for token, b, a in moves]
    epsilon, n = number(next(iter(traced.values())).get("epsilon")) or 0.2, len(everything)
    epsilon = epsilon if 0 < epsilon < 1 else 0.2
    lines = ["", "TOKENS: log-prob before the step -> after it, ratio r = exp(after - before)"]
    chosen = [max(known, key=lambda row: row[0]), min(known, key=lambda row: row[0])]
    for advantage, sample, moves in chosen[: 1 if chosen[0] is chosen[1] else 2]:
        way = "up" if advantage > 0 else "down" if advantage < 0 else "not pushed"
        lines += _say(
            f"sample {sample.get('sample', '?')}",
            f"advantage {advantage:+.4f}: each of its {len(moves)} tokens is pushed {way}, by its share advantage / tokens of the step. The {min(most, len(moves))} that moved most:",
        )
        for token, before, after in sorted(moves, key=lambda move: -abs(move[2] - move[1]))[:most]:
            ratio = math.exp(min(50.0, after - before))
            flat = (advantage > 0 and ratio > 1 + epsilon) or (advantage < 0 and ratio < 1 - epsilon)
            lines.append(
                f"    {_quoted(token)[:24]:<24} {before:9.4f} -> {after:9.4f}  {after - before:+.4f}  r {ratio:.3f}{f'  past 1 +- {epsilon:g}' * flat}"
            )
        right = sum((after - before) * advantage > 0 for _, before, after in moves)
        mean = sum(after - before for _, before, after in moves) / len(moves)
        lines += _say(
            "",
            f"{right} of {len(moves)} tokens moved with the push, on average by {mean:+.5f} (tokens share weights: a push on one moves all)",
        )
    token, moved, _ = max(everything, key=lambda row: abs(row[1]))
    k3 = [math.exp(min(50.0, m)) - 1 - m for _, m, _ in everything]
    lines += ["", "KL of the step, before || after, from the tokens that were drawn: mean of r - 1 - log r"]
    lines += _say(
        "one token",
        f"{_quoted(token)}: {math.exp(min(50.0, moved)):.4f} - 1 - ({moved:+.4f}) = {math.exp(min(50.0, moved)) - 1 - moved:.6f}",
    )
    lines += _say("all", f"{sum(k3):.5f} / {n} tokens = {sum(k3) / n:.6f} nats per token")
    out = sum(
        (a > 0 and m > math.log(1 + epsilon)) or (a < 0 and m < math.log(1 - epsilon))
        for _, m, a in everything
    )
    lines += ["", f"CLIP: min(r A, clip(r, {1 - epsilon:g}, {1 + epsilon:g}) A)"]
    clipped = number(logged.get("clip_ratio/region_mean"))
    lines += _say(
        "in the step",
        "r is 1 when the gradient is taken, one update per rollout: nothing to clip"
        if not clipped
        else f"{clipped:.2%} of the tokens lay outside already: llama.cpp drew them with other weights (4 bits here, 8 there)",
    )
    lines += _say(
        "after it",
        f"{out} of {n} tokens have been pushed past the range; used a second time, these answers would push them no further",
    )
    return lines


# ---------------------------------------------------------------------------------- a lesson without any run


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(z) for z in logits]
    return [w / sum(weights) for w in weights]


def toy_gradient(
    logits: list[float], old: list[float], drawn: list[int], advantages: list[float], epsilon: float
) -> tuple[float, list[float]]:
    """(loss, its gradient with respect to the logits) of one-token answers `drawn` [G] under a softmax policy:

    loss = -(1/G) sum_i min(r_i A_i, clip(r_i, 1 - eps, 1 + eps) A_i),   r_i = p(drawn_i) / old(drawn_i)
    d r_i / d z_v = r_i (1[v = drawn_i] - p_v);   a clipped answer has no gradient
    """
    p, G = softmax(logits), len(drawn)
    loss, gradient = 0.0, [0.0] * len(logits)
    for token, advantage in zip(drawn, advantages):
        r = p[token] / old[token]
        inside = min(max(r, 1 - epsilon), 1 + epsilon)
        loss -= min(r * advantage, inside * advantage) / G
        if (
            r * advantage <= inside * advantage
        ):  # the unclipped term is the smaller one: it carries the gradient
            for v in range(len(logits)):
                gradient[v] -= advantage * r * ((v == token) - p[v]) / G
    return loss, gradient


TOY_WORDS, TOY_DRAWN, TOY_REWARDS, TOY_RATE, TOY_EPSILON = (
    (" sorry", " pizza", " okay"),
    (0, 1, 0, 2),
    (1.0, 0.0, 1.0, 0.5),
    1.0,
    0.2,
)


def toy() -> str:
    """GRPO in numbers small enough for paper: a policy of three words, four one-word answers, two updates."""
    row = lambda values, sign="": "  ".join(
        f"{word.strip()} {v:{sign}.4f}" for word, v in zip(TOY_WORDS, values)
    )  # noqa: E731
    logits, G = [0.0] * len(TOY_WORDS), len(TOY_DRAWN)
    old = softmax(logits)
    mean, std, advantages = advantages_of(list(TOY_REWARDS))
    lines = [
        "GRPO ON PAPER: three words, four answers of one word each, two updates. A calculator is enough.",
        "",
        "1. THE POLICY is a softmax over three logits z: p_v = exp(z_v) / sum exp(z). All are equally likely:",
        f"     z  {row(logits)}",
        f"     p  {row(old)}",
        "",
        '2. A GROUP. "My dog died." is answered four times; the judge gives each a reward:',
        *(
            f"     answer {i}  {TOY_WORDS[token].strip():<6} reward {reward:.2f}"
            for i, (token, reward) in enumerate(zip(TOY_DRAWN, TOY_REWARDS))
        ),
        "",
        "3. ADVANTAGES: how far each beats its siblings, in standard deviations. Nothing else is needed.",
        f"     mean = ({' + '.join(f'{r:g}' for r in TOY_REWARDS)}) / {G} = {mean:.4f}",
        f"     std  = sqrt(({' + '.join(f'({r:g} - {mean:.4f})^2' for r in TOY_REWARDS)}) / {G - 1}) = {std:.4f}",
        *(
            f"     A_{i} = ({r:.2f} - {mean:.4f}) / ({std:.4f} + 0.0001) = {a:+.4f}   {TOY_WORDS[token].strip()}"
            for i, (r, a, token) in enumerate(zip(TOY_REWARDS, advantages, TOY_DRAWN))
        ),
        "",
    ]
    for number_ in (1, 2):
        p = softmax(logits)
        ratios = [p[token] / old[token] for token in TOY_DRAWN]
        loss, gradient = toy_gradient(logits, old, list(TOY_DRAWN), advantages, TOY_EPSILON)
        lines += [
            "4. FIRST UPDATE. ratio r_i = p now / p when drawn = 1, so the loss is minus the mean advantage:"
            if number_ == 1
            else f"5. SECOND UPDATE, the same answers. Now the ratio counts, and what went past 1 +- {TOY_EPSILON:g} is held back:"
        ]
        if number_ == 1:
            lines += [
                f"     loss = -({' '.join(f'{a:+.4f}' for a in advantages)}) / {G} = {abs(loss):.4f}",
                "     A loss of 0 is no sign of standing still; its slope is what counts.",
            ]
        else:
            for i, (token, r, a) in enumerate(zip(TOY_DRAWN, ratios, advantages)):
                inside = min(max(r, 1 - TOY_EPSILON), 1 + TOY_EPSILON)
                flat = r * a > inside * a
                lines.append(
                    f"     r_{i} = {p[token]:.4f} / {old[token]:.4f} = {r:.4f}   min({r * a:+.4f}, {inside * a:+.4f})  {'clipped: no slope' if flat else 'inside: pushed on'}   {TOY_WORDS[token].strip()}"
                )
            lines.append(f"     loss = {loss:+.4f}")
        pushed = [
            (a, r, token)
            for a, r, token in zip(advantages, ratios, TOY_DRAWN)
            if r * a <= min(max(r, 1 - TOY_EPSILON), 1 + TOY_EPSILON) * a
        ]
        by_hand = " ".join(f"{a:+.4f} x {r:.4f} x ({int(token == 0)} - {p[0]:.4f})" for a, r, token in pushed)
        lines += [
            "     The slope of the loss for word v: -(1/4) x sum over the unclipped answers of",
            "     A_i x r_i x ((1 if the answer is v, else 0) - p_v). For v = sorry:",
            *textwrap.wrap(
                f"-(1/4) x ({by_hand}) = {gradient[0]:+.4f}",
                WIDTH,
                initial_indent="       ",
                subsequent_indent="         ",
            ),
            f"     of each word:  {row(gradient, '+')}",
        ]
        logits = [z - TOY_RATE * g for z, g in zip(logits, gradient)]
        new = softmax(logits)
        lines += [f"     z - {TOY_RATE:g} x slope:  {row(logits, '+')}", f"     p                {row(new)}"]
        if number_ == 1:
            lines += [
                "     log p before -> after, of each word:",
                *(
                    f"     {word.strip():<6} {math.log(b):.4f} -> {math.log(a):.4f}  ({math.log(a) - math.log(b):+.4f})"
                    for word, b, a in zip(TOY_WORDS, old, new)
                ),
            ]
            kl = sum(b * math.log(b / a) for b, a in zip(old, new))
            lines += [
                f"     KL = sum of p log(p / p_new) = {' + '.join(f'{b:.4f} x {math.log(b / a):+.4f}' for b, a in zip(old, new))} = {kl:.4f}"
            ]
        lines.append("")
    lines += [
        "WHAT TO TAKE HOME. Only distances from the group's mean entered the slope: had all four rewards been",
        "equal, every advantage would be 0 and nothing learned. `explain RUN` does this with a real group.",
    ]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------- the whole text


def explain(run: Path, step: int | None = None) -> str:
    """One GRPO group of `run`, number by number, as text of at most 100 columns: of `step` the one that was inspected (else
    the first), without a step the one with the widest spread of rewards among the inspected groups (else among all).
    Raises ReportError without completions or without that step."""
    data = read_run(run)
    groups = groups_of(data["completions"])
    if not groups:
        raise ReportError(f"{run}: no completions recorded; explain needs the directory of a GRPO run")
    found = [group for group in groups if step in (None, group[0])]
    if not found:
        raise ReportError(
            f"{run}: no step {step} in completions.jsonl; it has {_ranges({s for s, _, _ in groups})}"
        )
    recorded = {
        (number(row.get("step")), number(row.get("group"))) for row in data["tokens"]
    }  # whose tokens can be told of as well
    told = [group for group in found if group[:2] in recorded] or found
    number_, group, samples = (
        max(told, key=lambda item: spread_of(item[2])) if step is None or told is not found else told[0]
    )
    if len(samples) > MOST:
        raise ReportError(
            f"{run}: step {number_} has a group of {len(samples)} samples; explain works through {MOST} at most"
        )
    why = (
        "of the step"
        if step is not None
        else f"the widest spread of rewards in {len(told)} {'inspected ' * (told is not found)}groups"
    )
    lines = [f"STEP {number_}, GROUP {group}: {len(samples)} samples ({why})", "", "PROMPT"]
    label = form_of(data)["label"]
    for name, value in (
        ("persona", samples[0].get("person")),
        ("situation", samples[0].get("situation")),
        (label, samples[0].get("label") or samples[0].get("emotion")),
    ):
        lines += _say(name, value, 400) if value else []
    for turn in samples[0].get("messages") or []:
        lines += _say(str(turn.get("role"))[:11], _marked(turn.get("content")), 400)
    lines += ["", "SAMPLES: reward = sum of weight x component"]
    for i, sample in enumerate(samples):
        lines += _say(f"sample {sample.get('sample', i)}", _sum_by_hand(sample))
        criteria = ", ".join(
            f"{name} {fixed(value, 4, none='not judged')}"
            for name, value in (sample.get("criteria") or {}).items()
        )
        criteria += (
            f" (not put to the judge: {sample['refused']})" if criteria and sample.get("refused") else ""
        )
        lines += (_say("", f"criteria: {criteria}") if criteria else []) + _say(
            "", f"reply: {_marked(sample.get('completion'))}", 600
        )
    traced = {
        number(row.get("sample")): row
        for row in data["tokens"]
        if (row.get("step"), row.get("group")) == (number_, group)
    }
    logged = next((row for row in reversed(data["log"]) if row.get("step") == number_), {})
    tokens = _tokens_by_hand(samples, traced, logged)
    if not tokens and (
        steps := {int(row["step"]) for row in data["tokens"] if number(row.get("step")) is not None}
    ):
        tokens = ["", f"TOKENS were recorded of other steps: {_ranges(steps)}"]
    return "\n".join(lines + _group_by_hand(samples) + tokens) + "\n"


def _ranges(steps: set[int], most: int = 20) -> str:
    """{1, 2, 3, 7} -> "1-3, 7"; of more than `most` stretches the first."""
    pairs = list(
        zip(sorted(s for s in steps if s - 1 not in steps), sorted(s for s in steps if s + 1 not in steps))
    )
    return ", ".join(
        [f"{a}-{b}" if b > a else str(a) for a, b in pairs[:most]] + ["..."] * (len(pairs) > most)
    )
