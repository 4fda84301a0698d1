"""`explain` on tiny groups written by hand: what it says follows from the numbers."""

import math
import re

import pytest
from test_report import moved, page, rollout, write_run

from kardia.results.explain import explain
from kardia.results.run_files import ReportError


def flat(text):
    return re.sub(r"\s+", " ", text)


def test_the_arithmetic_of_a_hand_computed_group(tmp_path):
    # Rewards 0.2 0.4 0.6: mean 0.4, sample standard deviation 0.2, advantages -+ 0.2 / 0.2001 = 0.9995.
    group = [(0.2, -0.9995, -1.2), (0.4, 0.0, -1.0), (0.6, 0.9995, -0.9)]
    rows = [rollout(2, i, reward, a, logprob_after=after) for i, (reward, a, after) in enumerate(group)]
    text = explain(write_run(tmp_path / "run", [rollout(1, 0), rollout(1, 1), *rows]))
    pieces = [
        "STEP 2, GROUP 0: 3 samples",
        "0.5000 x 1.0000 format + 0.5000 x 0.2000 rubric = 0.6000",
        "(0.2000 + 0.4000 + 0.6000) / 3 = 0.4000",
        "/ (3 - 1)) = 0.2000",
        "(0.6000 - 0.4000) / (0.2000 + 0.0001) = +0.9995 stored +0.9995",
        "equal to the stored advantages",
        "Pushed up mostly by format: 1.00 against a mean of 0.33, worth +0.33 of reward.",
        "-1.0000 -> -0.9000 (+0.1000, with the push)",
    ]
    assert [piece for piece in pieces if piece not in flat(text)] == []
    assert max(map(len, text.splitlines())) <= 100 and "DIFFERS" not in text


def test_a_gate_and_gdpo_are_worked_out(tmp_path):
    """Three answers of one step; the third is behind the gate. Numbers redone by hand."""
    values = [(1.0, 0.2), (1.0, 0.4), (0.0, 0.9)]
    parts = [[0.2, 0.4, 0.0], [1.0, 1.0, 0.0]]  # as they count: rubric, emotion
    compared = []
    for column in parts:
        mean = sum(column) / 3
        std = math.sqrt(sum((value - mean) ** 2 for value in column) / 2)
        compared.append([(value - mean) / (std + 1e-4) for value in column])
    sums = [0.5 * a + 0.5 * b for a, b in zip(*compared)]
    mean = sum(sums) / 3
    std = math.sqrt(sum((value - mean) ** 2 for value in sums) / 2)
    advantages = [(value - mean) / (std + 1e-4) for value in sums]
    rows = []
    for i, (shape, rubric) in enumerate(values):
        row = rollout(1, i, 0.0 if not shape else 0.5 * rubric + 0.5, advantages[i])
        row |= {"components": {"format": shape, "rubric": rubric, "emotion": 1.0}, "gate": True}
        row |= {"weights": {"format": 0.0, "rubric": 0.5, "emotion": 0.5}, "compared": "gdpo"}
        rows.append(row | {"problem": None if shape else "text outside the spans"})
    run = write_run(tmp_path / "run", rows)
    text = flat(explain(run))
    pieces = [
        "0 behind the gate where the format does not hold",
        "the gate is closed: text outside the spans",
        f"0.5000 x {compared[0][1]:+.4f} rubric + 0.5000 x {compared[1][1]:+.4f} emotion = {sums[1]:+.4f}",
        f"/ ({std:.4f} + 0.0001) = {advantages[0]:+.4f} stored {advantages[0]:+.4f}",
        "equal to the stored advantages within 0.001",
        "Pushed up mostly by",
        "Pushed down by the gate: its format does not hold (text outside the spans).",
    ]
    assert [piece for piece in pieces if piece not in text] == [] and "DIFFERS" not in text
    assert "Pushed down by the gate" in page(run)


def test_samples_without_reward_take_no_part(tmp_path):
    rows = [rollout(1, i, reward) for i, reward in enumerate([0.2, None, 0.6])]
    text = explain(write_run(tmp_path / "run", rows), 1)
    assert "GROUP: 2 of 3 samples take part" in text and "(0.2000 + 0.6000) / 2 = 0.4000" in text
    assert "sample 1    no reward, takes no part: 0" in text
    assert "(0.6000 - 0.4000) / (0.2828 + 0.0001) = +0.7069   stored +0.0000   DIFFERS" in text
    alone = explain(write_run(tmp_path / "alone", [rollout(), rollout(sample=1, reward=None)]))
    assert "fewer than two rewards" in alone
    equal = explain(write_run(tmp_path / "equal", [rollout(), rollout(sample=1)]))
    assert "no two rewards of the group differ" in equal


def test_a_refusal_names_the_steps_there_are(tmp_path):
    path = write_run(tmp_path / "run", [rollout(step) for step in (1, 2, 3, 7, 9, 10)])
    with pytest.raises(ReportError, match=r"no step 5 in completions.jsonl; it has 1-3, 7, 9-10$"):
        explain(path, 5)
    with pytest.raises(ReportError, match="no completions recorded"):
        explain(write_run(tmp_path / "sft", run={"command": "sft"}))
    with pytest.raises(ReportError, match="group of 300 samples"):
        explain(write_run(tmp_path / "crowd", [rollout(1, i) for i in range(300)]))


def test_the_later_record_of_a_resumed_step_counts_and_no_control_character_is_printed(tmp_path):
    odd = "a\x1b[31mred\u202etxet \ud800"
    rows = [rollout(1, 0, 0.1), rollout(1, 1, 0.9), rollout(1, 0, 0.3, completion=odd), rollout(1, 1, 0.5)]
    text = explain(write_run(tmp_path / "run", rows))
    assert "(0.3000 + 0.5000) / 2 = 0.4000" in text
    assert all(c.isprintable() or c == "\n" for c in text)
    text.encode("utf-8")
    page(tmp_path / "run")


def two(tmp_path, tokens, clipped=0.0):
    """The text about a group of two, with rewards 1 and 0 at step 1, whose tokens were recorded."""
    rows = [rollout(1, 0, 1.0, 0.7070), rollout(1, 1, 0.0, -0.7070)]
    log = [{"step": 1, "clip_ratio/region_mean": clipped}]
    return explain(write_run(tmp_path / "run", rows, log, tokens))


def test_which_tokens_moved_and_how_much(tmp_path):
    rude = {"tokens": [" rude\x1b[2J", " b"], "before": [-2.0, -1.0], "after": [-2.4, -0.9]}
    kind = {"tokens": [" kind", " a"], "before": [-2.0, -1.0], "after": [-1.7, -1.0]}
    text = two(tmp_path, [moved(0, **kind), moved(1, **rude)])
    k3 = [math.exp(m) - 1 - m for m in (0.3, 0.0, -0.4, 0.1)]
    pieces = [
        '" kind" -2.0000 -> -1.7000 +0.3000 r 1.350 past 1 +- 0.2',  # exp(0.3) = 1.3499
        '" rude?[2J" -2.0000 -> -2.4000 -0.4000 r 0.670 past 1 +- 0.2',
        "1 of 2 tokens moved with the push",  # sample 1: -0.4 with it, +0.1 against it
        f"{sum(k3):.5f} / 4 tokens = {sum(k3) / 4:.6f} nats per token",
        f'" rude?[2J": {math.exp(-0.4):.4f} - 1 - (-0.4000) = {k3[2]:.6f}',
        "r is 1 when the gradient is taken",
        "2 of 4 tokens have been pushed past the range",
    ]
    assert [piece for piece in pieces if piece not in flat(text)] == []
    assert max(map(len, text.splitlines())) <= 100 and "\x1b" not in text
    assert "12.50% of the tokens lay outside already" in flat(two(tmp_path, [moved()], clipped=0.125))


def test_without_usable_tokens_the_rest_is_there(tmp_path):
    nothing = {"step": 1, "group": 0, "sample": 0}
    unknown = {"tokens": ["a", "b"], "before": [None, "x"], "after": [1, 2]}
    for tokens in ([], [nothing], [moved(**unknown)], [moved(tokens="abc", before=-1.0, after=None)]):
        text = two(tmp_path, tokens)
        assert "ADVANTAGE" in text and "TOKENS: log-prob" not in text
    text = two(tmp_path, [moved(step=step) for step in (2, 3, 5)])
    assert "TOKENS were recorded of other steps: 2-3, 5" in text
