"""What teaches: the toy lesson against autograd, and what a step did to the tokens, from a run written by hand."""

import json
import math
import re

import pytest

from kardia.results import explain


def test_the_toys_slope_is_autograds_slope():
    """The loss of the toy as a student would write it in torch; both updates, the clipped one included."""
    import torch

    old = torch.full((3,), 1 / 3, dtype=torch.float64)
    rewards = torch.tensor(explain.TOY_REWARDS, dtype=torch.float64)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        ratio = logits.softmax(0)[list(explain.TOY_DRAWN)] / old[list(explain.TOY_DRAWN)]
        loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        (slope,) = torch.autograd.grad(loss, logits)
        ours = explain.toy_gradient(
            logits.tolist(), old.tolist(), list(explain.TOY_DRAWN), advantages.tolist(), 0.2
        )
        assert ours[0] == pytest.approx(loss.item(), abs=1e-12) and ours[1] == pytest.approx(
            slope.tolist(), abs=1e-9
        )
        logits = (logits - slope).detach().requires_grad_()
    text = explain.toy()
    assert (
        f"p                sorry {logits.softmax(0)[0]:.4f}" in text
    )  # where the lesson ends is where torch ends


def test_the_toy_is_to_be_redone_on_paper():
    text = explain.toy()
    for line in re.findall(r"= \((\d\.\d+) - (\d\.\d+)\) / \((\d\.\d+) \+ 0\.0001\) = ([+-]\d\.\d+)", text):
        reward, mean, std, advantage = map(float, line)
        assert (reward - mean) / (std + 0.0001) == pytest.approx(advantage, abs=2e-3)
    for hand, result in re.findall(r"-\(1/4\) x \((.*?)\) = ([+-]\d\.\d+)", re.sub(r"\s*\n\s+", " ", text)):
        assert -0.25 * eval(hand.replace(" x ", "*")) == pytest.approx(
            float(result), abs=2e-3
        )  # the numbers as printed give the result as printed
    assert text.count("clipped: no slope") == 3 and text.count("inside: pushed on") == 1
    assert max(map(len, text.splitlines())) <= 100


def rollout(sample, reward, advantage):
    return {
        "step": 3,
        "group": 0,
        "sample": sample,
        "completion": "x",
        "reward": reward,
        "advantage": advantage,
        "components": {"format": reward},
        "weights": {"format": 1.0},
        "logprob": -1.0,
        "logprob_after": None,
    }


def traced(sample, tokens, before, after, step=3):
    return {
        "step": step,
        "group": 0,
        "sample": sample,
        "epsilon": 0.2,
        "tokens": tokens,
        "before": before,
        "after": after,
    }


@pytest.fixture
def run(tmp_path):
    def make(tokens, log=()):
        rows = [rollout(0, 1.0, 0.7070), rollout(1, 0.0, -0.7070)]
        for name, lines in (("completions", rows), ("tokens", tokens), ("log", log)):
            (tmp_path / f"{name}.jsonl").write_text(
                "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
            )
        return tmp_path

    return make


def test_which_tokens_moved_and_how_much(run):
    path = run(
        [
            traced(0, [" kind", " a"], [-2.0, -1.0], [-1.7, -1.0]),
            traced(1, [" rude\x1b[2J", " b"], [-2.0, -1.0], [-2.4, -0.9]),
        ],
        [{"step": 3, "clip_ratio/region_mean": 0.0}],
    )
    text = explain.explain(path)
    flat = re.sub(r"\s+", " ", text)
    assert '" kind" -2.0000 -> -1.7000 +0.3000 r 1.350 past 1 +- 0.2' in flat  # exp(0.3) = 1.3499
    assert '" rude?[2J" -2.0000 -> -2.4000 -0.4000 r 0.670 past 1 +- 0.2' in flat and "\x1b" not in text
    assert "1 of 2 tokens moved with the push" in flat  # sample 1: -0.4 with it, +0.1 against it
    k3 = [math.exp(m) - 1 - m for m in (0.3, 0.0, -0.4, 0.1)]
    assert f"{sum(k3):.5f} / 4 tokens = {sum(k3) / 4:.6f} nats per token" in flat
    assert f'" rude?[2J": {math.exp(-0.4):.4f} - 1 - (-0.4000) = {k3[2]:.6f}' in flat
    assert (
        "r is 1 when the gradient is taken" in flat
        and "2 of 4 tokens have been pushed past the range" in flat
    )
    assert max(map(len, text.splitlines())) <= 100


def test_clipping_inside_the_step_is_told(run):
    text = explain.explain(
        run(
            [traced(0, ["a"], [-1.0], [-1.0]), traced(1, ["b"], [-1.0], [-1.1])],
            [{"step": 3, "clip_ratio/region_mean": 0.125}],
        )
    )
    assert "12.50% of the tokens lay outside already" in re.sub(r"\s+", " ", text)


@pytest.mark.parametrize(
    "tokens",
    [
        [],  # never inspected
        [{"step": 3, "group": 0, "sample": 0}],  # nothing in it
        [traced(0, ["a", "b"], [None, "x"], [1, 2])],  # not numbers
        [traced(0, "abc", -1.0, None)],  # not lists
    ],
)
def test_without_recorded_tokens_the_rest_is_told(run, tokens):
    text = explain.explain(run(tokens))
    assert "ADVANTAGE" in text and "TOKENS: log-prob" not in text


def test_tokens_of_other_steps_are_named(run):
    assert "TOKENS were recorded of other steps: 1-2, 5" in explain.explain(
        run([traced(0, ["a"], [-1.0], [-1.0], step) for step in (1, 2, 5)])
    )
