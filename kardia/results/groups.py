"""Put recorded replies into their GRPO groups, and do the arithmetic of one group.

    advantage_i = (reward_i - mean(rewards of the group)) / (std(rewards of the group) + 1e-4)

std is the sample standard deviation (n - 1), as in TRL. By GDPO each component is compared like that, and the
weighted sums are scaled once more over the answers of the step.
"""

from __future__ import annotations

from typing import NamedTuple

from kardia.results.run_files import fixed, mean_of, number

EPSILON = 1e-4  # TRL's, in the denominator of the advantage


def groups_of(completions: list[dict]) -> list[tuple[int, int, list[dict]]]:
    """Return [(step, group, samples)] in order. A resumed run repeats steps: the later record counts."""
    groups: dict[tuple[int, int], dict] = {}
    for row in completions:
        place = (int(number(row.get("step")) or 0), int(number(row.get("group")) or 0))
        samples = groups.setdefault(place, {})
        samples[number(row.get("sample", len(samples)))] = row
    return [(step, group, list(samples.values())) for (step, group), samples in sorted(groups.items())]


def rewards_of(samples: list[dict]) -> list[float | None]:
    """Return the reward of each sample [G]; None where the judge could not read the reply."""
    return [number(sample.get("reward")) for sample in samples]


def spread_of(samples: list[dict]) -> float:
    """Return the distance between the largest and the smallest known reward."""
    known = [reward for reward in rewards_of(samples) if reward is not None]
    return max(known) - min(known) if known else 0.0


def advantages_of(rewards: list[float | None]) -> tuple[float | None, float, list[float]]:
    """Return (mean, std, advantages [G]); 0 for an unknown reward, and if fewer than two are known."""
    known = [reward for reward in rewards if reward is not None]
    mean = mean_of(known)
    # One reward alone has no standard deviation, and nothing to be compared with.
    if mean is None or len(known) < 2:
        return mean, 0.0, [0.0] * len(rewards)
    std = (sum((reward - mean) ** 2 for reward in known) / (len(known) - 1)) ** 0.5
    return mean, std, [0.0 if reward is None else (reward - mean) / (std + EPSILON) for reward in rewards]


def is_closed(sample: dict) -> bool:
    """Return whether a gate took everything from a sample: its format does not hold."""
    return bool(sample.get("gate")) and not number((sample.get("components") or {}).get("format"))


def parts_of(sample: dict) -> list[tuple[str, float, float | None]]:
    """Return [(component, weight, value)] of one sample as they count; its reward is the sum of weight x
    value."""
    weights, components = sample.get("weights") or {}, sample.get("components") or {}
    names = {**weights, **components}
    if is_closed(sample):
        components = dict.fromkeys(names, 0.0)
    return [(name, number(weights.get(name)) or 0.0, number(components.get(name))) for name in names]


class Compared(NamedTuple):
    """What GDPO made of one group: each component's advantage, their weighted sums, the final advantages."""

    weights: dict[str, float]
    parts: dict[str, list[float]]  # component -> [G]
    sums: list[float | None]  # [G]; None where the reward is unknown
    mean: float | None  # of the sums of all answers of the step
    std: float
    advantages: list[float]  # [G]


def compared_of(groups: list[tuple[int, int, list[dict]]], step: int, group: int) -> Compared | None:
    """Return what GDPO made of one group of a run, None where sums were compared (GRPO)."""
    own = [(number_, samples) for at, number_, samples in groups if at == step]
    if not own or any(row.get("compared") != "gdpo" for _, samples in own for row in samples):
        return None
    return compare_components([samples for _, samples in own], [number_ for number_, _ in own].index(group))


def compare_components(groups: list[list[dict]], own: int) -> Compared:
    """Return what GDPO made of group number `own` of a step's groups."""
    weights: dict[str, float] = {}
    parts, sums = {}, []
    for place, samples in enumerate(groups):
        known = [reward is not None for reward in rewards_of(samples)]
        rows = [{name: (weight, value) for name, weight, value in parts_of(sample)} for sample in samples]
        weights |= {name: weight for name, (weight, _) in (rows[0] if rows else {}).items() if weight}
        found = {}
        for name in weights:
            values = [
                row.get(name, (0.0, None))[1] if is_known else None for row, is_known in zip(rows, known)
            ]
            found[name] = advantages_of(values)[2]
        total = [sum(weights[name] * found[name][i] for name in weights) for i in range(len(samples))]
        sums.append([value if is_known else None for value, is_known in zip(total, known)])
        parts = found if place == own else parts
    mean, std, advantages = advantages_of([value for group in sums for value in group])
    first = sum(len(group) for group in sums[:own])
    return Compared(weights, parts, sums[own], mean, std, advantages[first : first + len(sums[own])])


def means_of(samples: list[dict], kind: str) -> dict[str, float]:
    """Return the mean of each component (as it counts) or criterion over the samples that take part."""
    known = [sample for sample in samples if number(sample.get("reward")) is not None]
    taking_part = [sample.get(kind) or {} for sample in known]
    if kind == "components":
        taking_part = [{name: value for name, _, value in parts_of(sample)} for sample in known]
    means = {}
    for name in dict.fromkeys(name for scores in taking_part for name in scores):
        values = [number(scores.get(name)) for scores in taking_part]
        means[name] = mean_of([value for value in values if value is not None])
    return {name: mean for name, mean in means.items() if mean is not None}


def why_pushed(sample: dict, samples: list[dict], compared: Compared | None = None) -> str:
    """Return one plain sentence: which component carries this sample away from its group's mean."""
    reward = number(sample.get("reward"))
    if compared and reward is not None:
        return _why_compared(sample, samples.index(sample), compared)
    mean, std, _ = advantages_of(rewards_of(samples))
    if reward is None:
        return "Took no part: it has no reward, so its advantage is 0."
    if std < 1e-6:
        return "Not pushed: no two rewards of the group differ."
    advantage = (reward - mean) / (std + EPSILON)
    sign, way = (1, "up") if advantage > 0 else (-1, "down")
    means = means_of(samples, "components")
    parts = [part for part in parts_of(sample) if part[2] is not None and part[0] in means]
    gains = [(sign * weight * (value - means[name]), name, value) for name, weight, value in parts]
    gain, name, value = max(gains, default=(0.0, "", 0.0))
    if abs(advantage) < 0.05 or gain <= 0:
        return f"Hardly pushed: reward {fixed(reward)} against the group's mean {fixed(mean)}."
    if is_closed(sample) and way == "down":
        return _why_closed(sample)
    sentence = f"Pushed {way} mostly by {name}: {fixed(value)} against a mean of {fixed(means[name])}, "
    sentence += f"worth {fixed(sign * gain, sign=True)} of reward"
    means = means_of(samples, "criteria")
    scores = {key: number(score) for key, score in (sample.get("criteria") or {}).items() if key in means}
    tilts = [(sign * (score - means[key]), key) for key, score in scores.items() if score is not None]
    tilt, key = max(tilts, default=(0.0, ""))
    if name == "rubric" and tilt > 0:
        sentence += (
            f" (most of all {key.replace('_', ' ')}, {fixed(scores[key])} against {fixed(means[key])})"
        )
    return sentence + "."


def _why_closed(sample: dict) -> str:
    return f"Pushed down by the gate: its format does not hold ({sample.get('problem') or 'invalid'})."


def _why_compared(sample: dict, i: int, compared: Compared) -> str:
    """Return the sentence for GDPO, where each component is compared with its siblings."""
    advantage = compared.advantages[i]
    sign, way = (1, "up") if advantage > 0 else (-1, "down")
    gains = [(sign * weight * compared.parts[name][i], name) for name, weight in compared.weights.items()]
    gain, name = max(gains, default=(0.0, ""))
    if abs(advantage) < 0.05 or gain <= 0:
        return "Hardly pushed: its components are near their means in the group, or cancel out."
    if is_closed(sample) and way == "down":
        return _why_closed(sample)
    part, weight = fixed(compared.parts[name][i], sign=True), fixed(compared.weights[name])
    return f"Pushed {way} mostly by {name}: {part} deviations from its mean in the group, at weight {weight}."
