"""`explain` on tiny groups written by hand: what it says must follow from the numbers."""

import re

import pytest
from test_report import page, rollout, write_run

from kardia.results import explain, run_files


def test_explain_shows_the_arithmetic_of_a_hand_computed_group(tmp_path):
    # rewards 0.2 0.4 0.6: mean 0.4, sample standard deviation 0.2, advantages -+ 0.2 / 0.2001 = 0.9995
    rows = [
        rollout(2, i, *pair, logprob_after=after)
        for i, (pair, after) in enumerate([((0.2, -0.9995), -1.2), ((0.4, 0.0), -1.0), ((0.6, 0.9995), -0.9)])
    ]
    text = explain.explain(write_run(tmp_path / "run", [rollout(1, 0), rollout(1, 1), *rows]))
    for piece in (
        "STEP 2, GROUP 0: 3 samples",
        "0.5000 x 1.0000 format + 0.5000 x 0.2000 rubric = 0.6000",
        "(0.2000 + 0.4000 + 0.6000) / 3 = 0.4000",
        "/ (3 - 1)) = 0.2000",
        "(0.6000 - 0.4000) / (0.2000 + 0.0001) = +0.9995   stored +0.9995",
        "equal to the stored advantages",
        "Pushed up mostly by format: 1.00 against a mean of 0.33, worth +0.33 of reward.",
        "-1.0000 -> -0.9000 (+0.1000, with the push)",
    ):
        assert piece in re.sub(r"\s*\n\s+", " ", text) or piece in text, piece
    assert max(map(len, text.splitlines())) <= 100
    assert "DIFFERS" not in text


def test_explain_leaves_samples_without_reward_out(tmp_path):
    rows = [rollout(1, i, reward) for i, reward in enumerate([0.2, None, 0.6])]
    text = explain.explain(write_run(tmp_path / "run", rows), 1)
    assert "GROUP: 2 of 3 samples take part" in text
    assert "(0.2000 + 0.6000) / 2 = 0.4000" in text
    assert "sample 1    no reward, takes no part: 0" in text
    assert "(0.6000 - 0.4000) / (0.2828 + 0.0001) = +0.7069   stored +0.0000   DIFFERS" in text
    alone = explain.explain(write_run(tmp_path / "alone", [rollout(), rollout(sample=1, reward=None)]))
    assert "fewer than two rewards" in alone
    equal = explain.explain(write_run(tmp_path / "equal", [rollout(), rollout(sample=1)]))
    assert "no two rewards of the group differ" in equal


def test_explain_names_the_steps_there_are(tmp_path):
    path = write_run(tmp_path / "run", [rollout(step) for step in (1, 2, 3, 7, 9, 10)])
    with pytest.raises(run_files.ReportError, match=r"no step 5 in completions.jsonl; it has 1-3, 7, 9-10$"):
        explain.explain(path, 5)
    with pytest.raises(run_files.ReportError, match="no completions recorded"):
        explain.explain(write_run(tmp_path / "sft", run={"command": "sft"}))


def test_explain_takes_the_later_record_of_a_resumed_step_and_no_control_characters(tmp_path):
    rows = [
        rollout(1, 0, 0.1),
        rollout(1, 1, 0.9),
        rollout(1, 0, 0.3, completion="a\x1b[31mred\u202etxet \ud800"),
        rollout(1, 1, 0.5),
    ]
    text = explain.explain(write_run(tmp_path / "run", rows))
    assert "(0.3000 + 0.5000) / 2 = 0.4000" in text
    assert all(c.isprintable() or c == "\n" for c in text)
    text.encode("utf-8")
    page(tmp_path / "run")
