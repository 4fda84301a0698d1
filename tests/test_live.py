"""The live view: what a step says, trends, the board on a terminal, the plain log elsewhere, and GRPO stopping itself."""

import io
import json
import re
from pathlib import Path

import pytest

from kardia.core import console as console_
from kardia.core import files, run_directory
from kardia.training import progress as progress_board
from kardia.training import recorder


class Screen(io.StringIO):
    def isatty(self):
        return True


def console(width=120, terminal=True):
    from rich.console import Console

    return Console(file=Screen(), force_terminal=terminal, width=width, legacy_windows=False, _environ={})


def grpo_step(step, reward=0.5, signal=True):
    return {
        "step": step,
        "loss": 0.0,
        "reward": reward,
        "reward_std": 0.1,
        "frac_reward_zero_std": 0.0 if signal else 1.0,
        "rewards/format/mean": reward,
        "rewards/rubric/mean": 0.4,
        "criteria/persona_consistency": 0.3,
        "completions/mean_length": 131.0,
        "completions/clipped_ratio": 0.25,
        "clip_ratio/region_mean": 0.0,
        "tokens_per_second": 210.0,
        "judge_scores_per_second": 18.0,
        "memory_gb": 2.8,
        "seconds": 13.4,
    }


@pytest.mark.parametrize(
    ("values", "sign"),
    [
        ([0.1 * i for i in range(10)], 1),  # a straight line
        ([1.0 - 0.1 * i for i in range(10)], -1),
        ([0.5, 0.4, 0.6, 0.5, 0.4, 0.6, 0.5, 0.4, 0.6, 0.5], 0),  # noise
        ([0.3] * 8, 0),  # nothing moves
        ([0.1, 0.9, 0.2, 1.0], 0),  # too few to tell
        ([], 0),
    ],
)
def test_trend_is_told_only_when_it_is_more_than_noise(values, sign):
    change = progress_board.trend(values)
    assert (change > 0) - (change < 0) == sign
    if len(values) == 10 and sign:
        assert change == pytest.approx(0.9 * sign)  # the change over the whole series


def test_sparkline_keeps_the_course_in_a_given_width():
    assert (
        progress_board.sparkline([0, 1]) == "▁█"
        and progress_board.sparkline([2, 2, 2]) == "▁▁▁"
        and progress_board.sparkline([]) == ""
    )
    long = progress_board.sparkline(list(range(1000)), 20)
    assert len(long) <= 20 and list(long) == sorted(long)


def test_time_is_readable():
    assert [progress_board.clock(s) for s in (5, 65, 3600, 7322)] == ["0:05", "1:05", "1:00:00", "2:02:02"]


def test_components_and_criteria_of_any_name_are_metrics():
    assert (
        progress_board.metric_of("rewards/verdict/mean").name == "verdict"
        and progress_board.metric_of("criteria/persona_consistency").name == "persona consistency"
    )
    assert (
        progress_board.metric_of("rewards/verdict/std") is None
        and progress_board.metric_of("nobody/knows") is None
    )
    assert progress_board.shown_value("frac_reward_zero_std", 0.25) == 0.75  # shown as groups with signal


def test_the_board_shows_everything_a_step_says():
    board = progress_board.Board("GRPO", console())
    board.begin(100, 0)
    for step in range(1, 11):
        board.step(grpo_step(step, reward=0.05 * step))
    board.phase("rollouts", 5, 8)
    board.sample("What was \x1b[31mhis\x1b[0m name?\nTell me.", 0.81)
    board.console.file.truncate(0)
    board.console.print(board.render())
    board.end()
    text = re.sub(r"\x1b\[[0-9;]*m", "", board.console.file.getvalue())
    for piece in (
        "GRPO",
        "step 10/100",
        "left",
        "rollouts 5/8",
        "reward",
        "0.500",
        "format",
        "rubric",
        "persona consistency",
        "groups with signal",
        "100%",
        "tokens per answer",
        "131",
        "cut at the limit",
        "25%",
        "tokens clipped",
        "judge, scores per second",
        "18",
        "memory, GB",
        "2.8",
        "↑",
        "reward 0.81: What was",
        "name? Tell me.",
    ):
        assert piece in text, piece
    assert not console_.SCREEN  # what is said now goes to stderr again


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_board_fits_the_window(width):
    board = progress_board.Board("GRPO", console(width))
    board.total = 10
    for step in range(1, 4):
        board.step(grpo_step(step))
    board.sample("word " * 200, 0.5)
    board.console.print(board.render())
    assert (
        max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in board.console.file.getvalue().splitlines())
        <= width
    )


def test_elsewhere_one_plain_line_per_step(capsys):
    board = progress_board.Board("GRPO", console(terminal=False))
    board.begin(100, 0)
    board.step(grpo_step(7))
    board.sample("Hello there.", 0.5)  # within the first minute: no sample in the log
    board.told -= 61
    board.sample("Hello there.\x1b[2J", 0.5)
    board.end()
    err = capsys.readouterr().err
    line, sample = err.strip().splitlines()
    assert (
        line.split()[:2] == ["step", "7/100"]
        and "reward 0.500  " in line
        and "rubric 0.400" in line
        and "signal 100%" in line
        and "13.4 s" in line
        and line.endswith("left")
    )
    assert "it says (reward 0.50: Hello there." in sample and "\x1b" not in err


def test_what_is_said_while_the_board_stands_goes_above_it():
    board = progress_board.Board("SFT", console())
    board.begin(3, 0)
    console_.say("checkpoint saved")
    board.end()
    assert "checkpoint saved" in board.console.file.getvalue()


class State:
    def __init__(self, step, steps=100):
        self.global_step, self.max_steps = step, steps


class Control:
    should_save = should_training_stop = False


@pytest.fixture
def run(tmp_path):
    files.write_json(tmp_path / "run.json", {"command": "grpo"})
    return run_directory.Run(tmp_path)


def play(run, steps, patience=3, step_done=lambda step: {}):
    """The callbacks in the order in which transformers' Trainer makes them; returns the step it stopped at, or None."""
    callback = recorder.recorder(
        run, progress_board.Board("GRPO", console(terminal=False)), patience, step_done
    )
    callback.on_train_begin(None, State(0), Control())
    for number, record in enumerate(steps, 1):
        control = Control()
        callback.on_step_end(None, State(number), control)
        callback.on_log(
            None,
            State(number),
            control,
            logs={k: v for k, v in record.items() if k not in ("step", "seconds", "memory_gb")},
        )
        if control.should_training_stop:
            assert control.should_save
            return number, callback
    return None, callback


@pytest.mark.parametrize(
    ("signals", "patience", "stop"),
    [
        ([0, 0, 0, 0], 3, 3),
        ([0, 0, 1, 0, 0, 0, 1], 3, 6),  # a step with signal starts the count again
        ([0, 1, 0, 1, 0, 1], 2, None),
        ([0] * 50, 0, None),  # 0: never
    ],
)
def test_grpo_stops_after_many_steps_without_signal(run, signals, patience, stop):
    stopped, callback = play(run, [grpo_step(i, signal=bool(s)) for i, s in enumerate(signals, 1)], patience)
    assert stopped == stop and callback.stuck == (stop is not None)


def test_the_log_has_one_line_per_step_with_memory_and_what_the_inspection_took(run):
    play(
        run,
        [grpo_step(1), {**grpo_step(2), "entropy": float("nan"), "time/rollout": 2.0, "time/judge": 1.0}],
        step_done=lambda step: {"time/inspect": 0.5} if step == 2 else {},
    )
    rows = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(
        row["memory_gb"] > 0 and row["seconds"] >= 0 for row in rows
    )
    assert "entropy" not in rows[1] and "time/inspect" not in rows[0]  # NaN is no JSON
    assert rows[1]["time/update"] == pytest.approx(
        rows[1]["seconds"] - 3.5, abs=2e-3
    )  # what is no other part of the step


def test_the_readme_tells_what_every_metric_means():
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    for key, metric in progress_board.METRICS.items():
        assert f"| `{key}` | {metric.meaning} |" in text, key
