"""The lessons: the toy can be redone on paper, the notebook runs, the rewards are what the pages say."""

import json
import re

import pytest

import kardia_lite as k
from kardia.core.options import PROJECT
from kardia.data.rewards import own_rewards, with_rewards
from kardia.results import toy

LESSONS = PROJECT / "docs" / "lessons"


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


def test_the_rewards_of_the_lessons(rubric):
    """By hand: short and asking, short, long and asking, no reply; warm words, counted once each time."""
    names = (f"{LESSONS / 'rewards.py'}:brief", f"{LESSONS / 'rewards.py'}:warm")
    rubric, texts = with_rewards(rubric, names), ["Who is with you?", "I see.", "so " * 21 + "is it?", None]
    spans = dict.fromkeys(k.DEFAULT_FORMAT.names, "x")
    answers = [k.render_answer({**spans, "response": text}) if text else "nothing" for text in texts]
    warm = k.render_answer(
        {**spans, "response": "I am sorry. That sounds hard, I understand how you feel. Sorry."}
    )
    dialogue = k.load_rows([k.DATA / "prompts.jsonl"], rubric, "prompt")[0]
    found = own_rewards(rubric, [(dialogue, text) for text in [*answers, warm]])
    assert [each["brief"] for each in found] == [1.0, 0.5, 0.5, 0.0, 0.5]
    assert [each["warm"] for each in found] == [0.0, 0.0, 0.0, 0.0, 1.0]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Cell after cell, with the smallest sizes; what it shows is there."""
    monkeypatch.chdir(PROJECT)
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((LESSONS / "1_your_own_reward.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    sizes = f"""from pathlib import Path
OUT = Path({str(tmp_path)!r})
SFT = "--limit 4 --max-steps 2 --batch-size 2 --learning-rate 0.003 --max-length 860"
GRPO = "--steps 2 --group-size 2 --max-tokens 24 --inspect-every 0 --eval-prompts 0 --redraw 0"
"""
    space = {}
    for cell in cells:
        source = sizes if "parameters" in cell["metadata"].get("tags", []) else "".join(cell["source"])
        exec(compile(source, "cell", "exec"), space)
    assert len(space["log"]) == 2 and len(space["answers"]) == 4
    assert all(not cell["outputs"] for cell in cells)
