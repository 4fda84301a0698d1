"""The live view of a run: trends, the board on a terminal, the plain log elsewhere, and GRPO's own stop."""

import io
import re
from types import SimpleNamespace

import pytest
from conftest import lines_of
from rich.console import Console

from kardia.core import console
from kardia.core.files import write_json
from kardia.core.run_directory import Run
from kardia.training import progress, recorder

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def board_on(terminal=True, width=120):
    window = {"file": io.StringIO(), "force_terminal": terminal, "width": width, "_environ": {}}
    return progress.Board("GRPO", Console(legacy_windows=False, **window))


def shown(board):
    """Return what stands on the board now, without colours."""
    board.console.file.truncate(0)
    board.console.print(board.render())
    return ESCAPES.sub("", board.console.file.getvalue())


def grpo_step(step, reward=0.5, signal=True):
    row = {"step": step, "loss": 0.0, "reward": reward, "reward_std": 0.1, "clip_ratio/region_mean": 0.0}
    row |= {"rewards/format/mean": reward, "rewards/rubric/mean": 0.4, "criteria/persona_consistency": 0.3}
    row |= {"completions/mean_length": 131.0, "completions/clipped_ratio": 0.25, "tokens_per_second": 210.0}
    row |= {"judge_scores_per_second": 18.0, "memory_gb": 2.8, "seconds": 13.4}
    return {**row, "frac_reward_zero_std": 0.0 if signal else 1.0}


def test_trends_sparklines_and_times():
    rising = [0.1 * i for i in range(10)]
    noise = [0.5, 0.4, 0.6, 0.5, 0.4, 0.6, 0.5, 0.4, 0.6, 0.5]
    # Only what is more than noise is a trend, and four values are too few.
    trends = [progress.trend(values) for values in (rising, rising[::-1], noise, [0.3] * 8, rising[:4], [])]
    assert trends == pytest.approx([0.9, -0.9, 0, 0, 0, 0])
    assert [progress.sparkline(values) for values in ([0, 1], [2, 2, 2], [])] == ["▁█", "▁▁▁", ""]
    long = progress.sparkline(list(range(1000)), 20)
    assert len(long) <= 20 and list(long) == sorted(long)
    assert [progress.clock(s) for s in (5, 65, 3600, 7322)] == ["0:05", "1:05", "1:00:00", "2:02:02"]


def test_components_and_criteria_of_any_name_are_metrics():
    names = ("rewards/verdict/mean", "criteria/persona_consistency", "rewards/verdict/std", "unknown")
    verdict, persona, *others = map(progress.metric_of, names)
    assert (verdict.name, persona.name, others) == ("verdict", "persona consistency", [None, None])
    assert progress.shown_value("frac_reward_zero_std", 0.25) == 0.75  # shown as groups with signal
    keys = ["held_out/format", "held_out/written_wins"]  # the second is one of its own, and a component's
    assert progress.in_order(keys) == keys[::-1]


def test_the_board_shows_everything_a_step_says(capsys):
    board = board_on()
    board.begin(100, 0)
    for step in range(1, 11):
        board.step(grpo_step(step, reward=0.05 * step))
    board.phase("rollouts", 5, 8)
    board.sample("What was \x1b[31mhis\x1b[0m name?\nTell me.", 0.81)
    console.say("checkpoint saved")
    assert "checkpoint saved" in board.console.file.getvalue()  # above what is redrawn
    text = shown(board)
    board.end()
    pieces = """GRPO|step 10/100|left|rollouts 5/8|reward|0.500|format|rubric|persona consistency|100%|131|25%
groups with signal|tokens per answer|cut at the limit|tokens clipped|judge, scores per second|18
memory, GB|2.8|↑|reward 0.81: What was|name? Tell me."""
    assert [piece for piece in re.split("[|\n]", pieces) if piece not in text] == []
    board.console.file.truncate(0)
    console.say("done")
    assert capsys.readouterr().err == "done\n" and "done" not in board.console.file.getvalue()


def test_the_board_fits_the_window():
    for width in (60, 80, 140):
        board = board_on(width=width)
        board.step(grpo_step(1))
        board.sample("word " * 200, 0.5)
        assert max(map(len, shown(board).splitlines())) <= width


def test_elsewhere_one_plain_line_per_step(capsys):
    board = board_on(terminal=False)
    board.begin(100, 0)
    board.step(grpo_step(7))
    board.sample("Hello there.", 0.5)  # within the first minute: no answer in the log
    board.last_answer -= 61
    board.sample("Hello there.\x1b[2J", 0.5)
    err = capsys.readouterr().err
    line, answer = err.strip().splitlines()
    assert line.split()[:2] == ["step", "7/100"] and line.endswith("left")
    assert not [p for p in ("reward 0.500  ", "rubric 0.400", "signal 100%", "13.4 s") if p not in line]
    assert "it says (reward 0.50: Hello there." in answer and "\x1b" not in err


def play(path, steps, patience=3, step_done=recorder.nothing_more):
    """Call the recorder as the Trainer does. Return (the step it stopped at or None, the recorder)."""
    write_json(path / "run.json", {"command": "grpo"})
    callback = recorder.recorder(Run(path), board_on(terminal=False), patience, step_done)
    for step, row in enumerate(steps, 1):
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        state = SimpleNamespace(global_step=step, max_steps=100)
        callback.on_step_end(None, state, control)
        logs = {name: v for name, v in row.items() if name not in ("step", "seconds", "memory_gb")}
        callback.on_log(None, state, control, logs=logs)
        if control.should_training_stop:
            assert control.should_save
            return step, callback
    return None, callback


def test_grpo_stops_after_many_steps_without_signal(tmp_path):
    # Signal of each step, --patience, the step of the stop: signal starts the count again, 0 means never.
    cases = [("0000", 3, 3), ("0010001", 3, 6), ("010101", 2, None), ("0" * 50, 0, None)]
    for signals, patience, stop in cases:
        steps = [grpo_step(i, signal=s == "1") for i, s in enumerate(signals, 1)]
        stopped, callback = play(tmp_path, steps, patience)
        assert stopped == stop and callback.stuck == (stop is not None), signals


def test_the_second_signal_ends_the_run_at_once(tmp_path):
    _, callback = play(tmp_path, [])
    callback.interrupt()
    with pytest.raises(KeyboardInterrupt):
        callback.interrupt()


def test_the_log_has_one_line_per_step_with_memory_and_times(tmp_path):
    second = {**grpo_step(2), "entropy": float("nan"), "time/rollout": 2.0, "time/judge": 1.0}
    play(tmp_path, [grpo_step(1), second], step_done={1: {}, 2: {"time/inspect": 0.5}}.get)
    rows = lines_of(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["memory_gb"] > 0 and row["seconds"] >= 0 for row in rows)
    assert "entropy" not in rows[1] and "time/inspect" not in rows[0]  # NaN is no JSON
    # The update takes what is no other part of the step.
    assert rows[1]["time/update"] == pytest.approx(rows[1]["seconds"] - 3.5, abs=2e-3)
