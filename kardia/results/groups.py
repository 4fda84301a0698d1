"""Put recorded replies into their GRPO groups, and do the arithmetic of one group.

    advantage_i = (reward_i - mean(rewards of the group)) / (std(rewards of the group) + 1e-4)

std is the sample standard deviation (n - 1), as in TRL.
"""

from __future__ import annotations

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


def parts_of(sample: dict) -> list[tuple[str, float, float | None]]:
    """Return [(component, weight, value)] of one sample; its reward is the sum of weight x value."""
    weights, components = sample.get("weights") or {}, sample.get("components") or {}
    names = {**weights, **components}
    return [(name, number(weights.get(name)) or 0.0, number(components.get(name))) for name in names]


def means_of(samples: list[dict], kind: str) -> dict[str, float]:
    """Return the mean of each component or criterion over the samples that take part."""
    taking_part = [sample.get(kind) or {} for sample in samples if number(sample.get("reward")) is not None]
    means = {}
    for name in dict.fromkeys(name for scores in taking_part for name in scores):
        values = [number(scores.get(name)) for scores in taking_part]
        means[name] = mean_of([value for value in values if value is not None])
    return {name: mean for name, mean in means.items() if mean is not None}


def why_pushed(sample: dict, samples: list[dict]) -> str:
    """Return one plain sentence: which component carries this sample away from its group's mean."""
    reward = number(sample.get("reward"))
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
