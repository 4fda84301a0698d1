"""Rewards that the user chooses: weights, the gate, near labels, functions of one's own."""

import json
import textwrap
from argparse import Namespace

import pytest
from click.testing import CliRunner

import kardia_lite as k
from kardia.core.console import UserError
from kardia.core.options import DATA, RUBRIC
from kardia.data.rewards import check_functions, own_rewards, rewards_hash, with_rewards
from kardia.data.rubric import load_rubric
from kardia.training.judging import open_judging

SPANS = {"understanding": "u", "reasoning": "r", "emotion": "sad", "response": "I am here. Where is he now?"}
TEXT = k.render_answer(SPANS)


def write(path, text):
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def own(path, text, name="mine"):
    return f"{write(path, text)}:{name}"


def prompts(rubric, n=2):
    return k.load_rows([DATA / "prompts.jsonl"], rubric, "prompt")[:n]


def test_weights_are_those_of_the_file_then_those_of_the_command_line(rubric, tmp_path):
    mine = own(tmp_path / "mine.py", "def mine(row, answers):\n    return [1.0] * len(answers)\n")
    changed = with_rewards(rubric, ("emotion=0", f"{mine}=2"))
    assert changed.rewards == {"format": 0.25, "emotion": 0.0, "rubric": 0.25, "mine": 0.5}
    assert with_rewards(rubric, ()).rewards == rubric.rewards
    gated = with_rewards(rubric, ("format=gate", mine))
    assert gated.gate and gated.rewards == {"format": 0.0, "emotion": 1 / 3, "rubric": 1 / 3, "mine": 1 / 3}
    # The paper's thirds are one flag away from a file with a gate.
    assert not with_rewards(gated, ("format=1",)).gate


def test_a_function_gets_the_row_and_the_answers(rubric, tmp_path):
    """Extra keys of a row reach it; answers are texts that know their spans; numpy's bools are numbers."""
    mine = own(
        tmp_path / "mine.py",
        """
        import numpy as np

        def mine(row, answers):
            assert row["messages"][-1]["role"] == "user" and row["kind"] == "test" and row["mbti"] == "ISTP"
            values = [answer.span("response").endswith("?") for answer in answers]
            values[-1] = None
            return np.array(values, dtype=object)
        """,
    )
    line = json.loads((DATA / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[0])
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**line, "kind": "test"}) + "\n", encoding="utf-8")
    rubric = with_rewards(rubric, (mine,))
    (dialogue,) = k.load_rows([path], rubric, "prompt")
    answers = [(dialogue, text) for text in (TEXT, "no spans?", TEXT)]
    assert own_rewards(rubric, answers) == [{"mine": 1.0}, {"mine": 0.0}, {"mine": None}]
    rewards = k.score_answers(answers, with_rewards(rubric, ("rubric=0",)), None)
    assert [reward.components["mine"] for reward in rewards] == [1.0, 0.0, None]
    assert rewards[2].total(with_rewards(rubric, ("rubric=0",))) is None  # unknown is never 0


def test_answers_to_one_prompt_come_together(rubric, tmp_path):
    mine = own(tmp_path / "mine.py", "def mine(row, answers):\n    return [len(answers)] * len(answers)\n")
    rubric = with_rewards(rubric, (mine,))
    a, b = prompts(rubric)
    found = own_rewards(rubric, [(a, TEXT), (a, TEXT), (b, TEXT)])
    assert [each["mine"] for each in found] == [2.0, 2.0, 1.0]


MISTAKES = {
    "raises": (
        "def mine(row, answers):\n    x = {}\n    return x['a']\n",
        "mine.py:3: in mine: KeyError: 'a'",
    ),
    "exits": ("def mine(row, answers):\n    raise SystemExit(3)\n", "mine.py:2: in mine: SystemExit: 3"),
    "too few": (
        "def mine(row, answers):\n    return [1.0]\n",
        "mine returned 1 value / expected a list of 3",
    ),
    "one number": ("def mine(row, answers):\n    return 1.0\n", "mine returned 1.0 / expected a list of 3"),
    "nothing": ("def mine(row, answers):\n    pass\n", "mine returned None / expected a list of 3"),
    "a text": ("def mine(row, answers):\n    return ['1'] * 3\n", "returned '1' / expected a finite number"),
    "nan": (
        "def mine(row, answers):\n    return [float('nan')] * 3\n",
        "/ expected a finite number, or None",
    ),
    "one argument": ("def mine(row):\n    return 1\n", "mine.py: in mine: TypeError"),
    "a generator": ("def mine(row, answers):\n    yield 1 / len(answers[2])\n", "mine.py:2: in mine: Zero"),
    "a list of lists": ("def mine(row, answers):\n    return [[1]] * 3\n", "/ expected a finite number"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_a_function_is_one_line_before_training(rubric, tmp_path, case):
    text, expected = MISTAKES[case]
    rubric = with_rewards(rubric, (own(tmp_path / "mine.py", text),))
    with pytest.raises(UserError) as error:
        check_functions(rubric, prompts(rubric)[0], k.render_answer)
    assert expected in error.value.message and "\n" not in error.value.message


@pytest.mark.parametrize(
    "text, expected",
    [
        ("def mine(row, answers:\n", "mine.py:1: SyntaxError"),
        ("import json\n1 / 0\n", "mine.py:2: ZeroDivisionError"),
        ("import no_such_module\n", "mine.py:1: ModuleNotFoundError"),
        ("raise SystemExit\n", "mine.py:1: SystemExit"),
        ("mine = 3\n", "has no function mine"),
        ("def other(row, answers): ...\n", "has no function mine"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(rubric, tmp_path, text, expected):
    with pytest.raises(UserError) as error:
        with_rewards(rubric, (own(tmp_path / "mine.py", text),))
    assert expected in error.value.message and "\n" not in error.value.message


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "mine",
        "mine.py",
        "no.py:mine",
        "mine.py:",
        "format",
        "format=",
        "format=often",
        "emotion=-1",
        "tone=1",
    ]
    + [
        "emotion=nan",
        "rubric=1e9",
        "=1",
        "emotion=gate",
        "{file}:mine=x",
        "{file}:format",
        "{file}:mine=-1",
        "{file}:reward",
        "{file}:empathy",
    ],
)
def test_what_reward_cannot_mean_is_one_line(rubric, tmp_path, spec):
    file = write(tmp_path / "mine.py", "def mine(row, answers): ...\ndef format(row, answers): ...\n")
    with pytest.raises(UserError) as error:
        with_rewards(rubric, (spec.format(file=file),))
    assert "--reward" in error.value.message and "\n" not in error.value.message
    with pytest.raises(UserError, match="no other reward"):
        with_rewards(rubric, (f"{file}:mine", f"{file}:mine"))


def test_no_judge_only_where_no_rubric_is_rewarded(rubric):
    options = k.GRPOOptions(judge="none", eval_prompts=0)
    with pytest.raises(UserError, match="--judge none, but the rubric carries weight"):
        open_judging(None, rubric, options, None, {}, (None, None), None)
    left = open_judging(
        None, with_rewards(rubric, ("rubric=0",)), options, Namespace(rollout="llama"), {}, (None, None), None
    )
    assert left.judge is None and left.hashes()["judge"] == "none" and left.facts()["judge_exam"] is None
    kept = k.GRPOOptions(judge="none", eval_prompts=0, keep="best")
    with pytest.raises(UserError, match="--keep best needs held-out prompts"):
        open_judging(None, left.rubric, kept, Namespace(rollout="llama"), {}, (None, None), None)


def test_nothing_rewarded_is_refused(rubric):
    with pytest.raises(UserError, match="all weights are zero"):
        with_rewards(rubric, ("format=gate", "emotion=0", "rubric=0"))


def test_a_changed_function_is_another_run(rubric, tmp_path):
    path = tmp_path / "mine.py"
    first = with_rewards(rubric, (own(path, "def mine(row, answers):\n    return [0.5] * len(answers)\n"),))
    before = rewards_hash(first)
    assert before != rewards_hash(rubric) and before == rewards_hash(first)
    own(path, "def mine(row, answers):\n    return [0.6] * len(answers)\n")
    assert rewards_hash(first) != before


def near_rubric(path, near):
    text = RUBRIC.read_text(encoding="utf-8")
    path.write_text(f"{text}\nnear: {json.dumps(near)}\n", encoding="utf-8")
    return load_rubric(path)


def test_a_near_label_earns_its_credit(tmp_path):
    near = {"credit": 0.5, "labels": [["afraid", "terrified", "anxious"], ["sad", "lonely"]]}
    rubric = near_rubric(tmp_path / "near.yaml", near)
    credits = [
        rubric.label_credit(a, b) for a, b in (("sad", "sad"), ("sad", "lonely"), ("afraid", "anxious"))
    ]
    assert credits == [1.0, 0.5, 0.5]
    # Another word for a label, of the list beside it, is near it.
    assert [rubric.label_credit(word, "afraid") for word in ("scared", "Nervous", "mad")] == [0.5, 0.5, 0]
    assert rubric.label_credit("afraid", "sad") == 0 and rubric.label_credit(None, "sad") == 0
    assert load_rubric(RUBRIC).label_credit("sad", "lonely") == 0 and rewards_hash(rubric) != rewards_hash(
        load_rubric(RUBRIC)
    )


@pytest.mark.parametrize(
    "near, expected",
    [
        ({"credit": 1, "labels": [["sad", "lonely"]]}, "near.credit"),
        ({"credit": 0, "labels": [["sad", "lonely"]]}, "near.credit"),
        ({"credit": 0.5, "labels": []}, "near.labels"),
        ({"credit": 0.5, "labels": [["sad"]]}, r"near.labels\[0\]"),
        ({"credit": 0.5, "labels": [["sad", "glum"]]}, r"near.labels\[0\]: found 'glum'"),
        ({"credit": 0.5, "labels": [["sad", "sad"]]}, "each name once"),
        ({"credit": 0.5}, "near.labels"),
        (3, "near: found '3'"),
    ],
)
def test_a_mistake_in_near_labels_is_one_line(tmp_path, near, expected):
    with pytest.raises(UserError, match=expected):
        near_rubric(tmp_path / "near.yaml", near)


def test_the_command_line_says_it_in_one_line(tmp_path):
    arguments = ["grpo", "--from", "nowhere", "--out", str(tmp_path / "out"), "--reward", "mine.py:mine"]
    result = CliRunner().invoke(k.cli, arguments)
    assert result.exit_code == 1 and result.output.count("\n") == 1 and not (tmp_path / "out").exists()
