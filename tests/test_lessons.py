"""The toy lesson: its slope is autograd's, and its printed numbers can be redone on paper."""

import re

import pytest

from kardia.results import toy


def test_the_slope_is_autograds_slope():
    """The loss as a student would write it in torch; both updates, the clipped one included."""
    import torch

    old, drawn = torch.full((3,), 1 / 3, dtype=torch.float64), list(toy.DRAWN)
    rewards = torch.tensor(toy.REWARDS, dtype=torch.float64)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        ratio = logits.softmax(0)[drawn] / old[drawn]
        loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        (slope,) = torch.autograd.grad(loss, logits)
        ours = toy.toy_gradient(logits.tolist(), old.tolist(), drawn, advantages.tolist(), 0.2)
        assert ours[0] == pytest.approx(loss.item(), abs=1e-12)
        assert ours[1] == pytest.approx(slope.tolist(), abs=1e-9)
        logits = (logits - slope).detach().requires_grad_()
    # Where the lesson ends is where torch ends.
    assert f"p                sorry {logits.softmax(0)[0]:.4f}" in toy.toy()


def test_the_printed_numbers_can_be_redone_on_paper():
    text = toy.toy()
    lines = re.findall(r"= \((\d\.\d+) - (\d\.\d+)\) / \((\d\.\d+) \+ 0\.0001\) = ([+-]\d\.\d+)", text)
    for line in lines:
        reward, mean, std, advantage = map(float, line)
        assert (reward - mean) / (std + 0.0001) == pytest.approx(advantage, abs=2e-3)
    slopes = re.findall(r"-\(1/4\) x \((.*?)\) = ([+-]\d\.\d+)", re.sub(r"\s*\n\s+", " ", text))
    for hand, result in slopes:
        assert -0.25 * eval(hand.replace(" x ", "*")) == pytest.approx(float(result), abs=2e-3)
    assert len(lines) == 4 and len(slopes) == 2
    assert text.count("clipped: no slope") == 3 and text.count("inside: pushed on") == 1
    assert max(map(len, text.splitlines())) <= 100
