"""The report and `explain`, on tiny runs written by hand: what they say must follow from the numbers, and nothing of a run may act in the page."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from kardia import report

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'
REPLY = "<|understanding_begin|>u<|understanding_end|><|emotion_begin|>sad<|emotion_end|><|response_begin|>never closed"


def rollout(step=1, sample=0, reward=0.5, advantage=0.0, **more):
    """One line of completions.jsonl whose components add up to its reward: format 0.5 x 1 or 0, rubric 0.5 x the rest."""
    shape = 1.0 if reward is not None and reward >= 0.5 else 0.0
    rubric = None if reward is None else (reward - 0.5 * shape) / 0.5
    return {
        "step": step, "group": 0, "sample": sample, "person": "Mara", "emotion": "sad", "situation": "Her dog died.",
        "messages": [{"role": "user", "content": "I miss him."}], "completion": REPLY, "tokens": 12, "truncated": False, "problem": None,
        "components": {"format": shape, "rubric": rubric}, "criteria": {"empathy": rubric}, "weights": {"format": 0.5, "rubric": 0.5},
        "reward": reward, "advantage": advantage, "logprob": -1.0, "logprob_after": None, **more,
    }  # fmt: skip


def write_run(path, completions=(), log=(), **objects):
    path.mkdir(parents=True, exist_ok=True)
    for name, rows in (("completions", completions), ("log", log)):
        if rows:
            (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, value in objects.items():
        (path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return path


class Tags(HTMLParser):
    """What a browser would see: (tag, names of its attributes) of every tag."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, [name for name, _ in attrs]))


def page(*runs):
    return report.write_report(list(runs), runs[0].parent / "out" / "report.html").read_text(encoding="utf-8")


def grpo(low, high):
    return {"command": "grpo", "base": "/models/tiny", "bits": 16, "status": "done",
            "reward_trend": {"slope_per_step": 0.01, "low": low, "high": high, "first_quarter": 0.4, "last_quarter": 0.6, "steps": 8}}  # fmt: skip


@pytest.fixture
def full(tmp_path):
    """A run with every file there."""
    scores = {"format": {"mean": 0.9, "low": 0.8, "high": 1.0, "n": 9}}
    evaluation = {
        "models": ["base", "sft"], "prompts": 9, "judge": "tiny", "metrics": {"base": scores, "sft": scores},
        "differences": [{"better": "sft", "than": "base", "metric": "format", "mean": -0.3, "low": -0.4, "high": -0.2}],
        "win_rate": [{"model": "sft", "against": "base", "rate": 0.7, "low": 0.5, "high": 0.9, "ties": 1}],
        "examples": [{"person": "Mara", "messages": [{"role": "user", "content": "Hello."}], "answers": {"base": {"text": "Hi.", "valid": False, "problem": "no spans", "scores": {"empathy": 0.5}}}}],
    }  # fmt: skip
    criterion = {"method": "contrast", "correct": 5, "n": 10, "accuracy": 0.5, "low": 0.2, "high": 0.8, "length_baseline": 0.6, "fit": False, "why": "not above chance", "weight": 1.0}
    exam = {"judge": "tiny", "pairs": 10, "criteria": {"empathy": criterion}, "overall": {"accuracy": 0.5, "low": 0.2, "high": 0.8, "length_baseline": 0.6}}
    export = {"formats": {"f16": {"path": "f16.gguf", "bytes": 10**6, "kl": 1e-6, "kl_base": 0.1, "agreement": 1.0, "ok": True}, "modelfile": {"path": "Modelfile", "bytes": 9, "kl": None, "ok": True}}}
    log = [{"step": i, "reward": 0.1 * i, "rewards/format/mean": 0.5, "criteria/empathy": None, "entropy": 1.0} for i in range(1, 9)]
    completions = [rollout(step, i, (step + i) / 12) for step in range(1, 9) for i in range(3)]
    run = {**grpo(0.001, 0.02), "judge_exam": exam, "options": {"group_size": 3}, "versions": {"torch": "2"}, "hashes": {"data": "abc"}}
    return write_run(tmp_path / "full", completions, log, run=run, evaluation=evaluation, export=export)


# ---------------------------------------------------------------------------------- the page


def test_every_section_is_there_and_says_what_the_numbers_say(full):
    text = page(full)
    for key in ("evaluation", "curves", "exam", "groups", "examples", "export", "details"):
        assert f'<section id="{key}">' in text
    assert "sft against base: <b>worse</b> on format" in text
    assert "Rewarded although the judge failed its exam on them: empathy" in text  # unfit, weighted, not dropped
    assert "not measured" in text and "found to match it: f16." in text  # an export without a KL is no proof
    assert text.count("<svg") >= 4 and "NaN" not in text and ">None<" not in text


@pytest.mark.parametrize("low, high, verdict", [
    (0.001, 0.02, "<b>rose</b>"),
    (-0.02, -0.001, "<b>fell</b>"),
    (-0.01, 0.01, "no change that the interval can tell from zero"),
    (0.0, 0.02, "no change that the interval can tell from zero"),  # an interval that touches zero tells nothing
    (None, None, "is not recorded"),
])  # fmt: skip
def test_headline_verdict(tmp_path, low, high, verdict):
    text = page(write_run(tmp_path / "run", run=grpo(low, high)))
    assert verdict in text
    assert sum(word in text for word in ("<b>rose</b>", "<b>fell</b>", "no change that", "is not recorded")) == 1


def test_nothing_of_a_run_becomes_markup(tmp_path):
    rows = [rollout(sample=i, reward=0.2 + 0.3 * i, person=EVIL, situation=EVIL, emotion=EVIL, completion=EVIL + f"<|response_begin|>{EVIL}<|response_end|>", problem=EVIL,
                    messages=[{"role": EVIL, "content": EVIL}, {"role": "assistant", "content": EVIL}], criteria={EVIL: 0.5}, components={EVIL: 1.0}, weights={EVIL: 1.0}) for i in range(2)]  # fmt: skip
    cell = {"mean": 0.5, "low": 0.4, "high": 0.6}
    evaluation = {"models": [EVIL], "judge": EVIL, "metrics": {EVIL: {EVIL: cell}}, "differences": [{"better": EVIL, "than": EVIL, "metric": EVIL, **cell}],
                  "win_rate": [{"model": EVIL, "against": EVIL, "rate": 0.5, **cell}], "examples": [{"messages": [{"content": EVIL}], "answers": {EVIL: {"text": EVIL, "problem": EVIL, "scores": {EVIL: 1}}}}]}  # fmt: skip
    run = {**grpo(0, 1), "command": EVIL, "base": EVIL, "parent": EVIL, "machine": EVIL, "options": {EVIL: EVIL}, "dropped_criteria": [EVIL],
           "judge_exam": {"judge": EVIL, "criteria": {EVIL: {"method": EVIL, "why": EVIL, "fit": False, "accuracy": 0.5}}}}  # fmt: skip
    log = [{"step": i, "reward": 0.1, f"criteria/{EVIL}": 0.3} for i in range(4)]
    path = write_run(tmp_path / "run", rows, log, run=run, evaluation=evaluation, export={"formats": {EVIL: {"path": EVIL, "ok": False}}})
    text = page(path)
    assert "&lt;script&gt;" in text
    tags = Tags()
    tags.feed(text)
    assert not {"script", "img"} & {tag for tag, _ in tags.seen}
    assert {name for _, names in tags.seen for name in names} <= {
        "lang", "charset", "name", "content", "href", "id", "class", "style", "open", "scope", "role", "aria-label", "aria-hidden", "viewbox", "preserveaspectratio", "d"}  # fmt: skip


def test_the_page_stands_alone(full):
    text = page(full)
    assert re.findall(r'href="([^#][^"]*)"', text) == []  # only jumps inside the page
    assert not re.search(r"\ssrc\s*=|<link|@import|url\(|<script", text)
    assert text.startswith("<!doctype html>") and '<meta charset="utf-8">' in text
    assert [p.name for p in (full.parent / "out").iterdir()] == ["report.html"]  # the temporary name is gone


def test_size_stays_under_the_limit_however_long_the_replies(tmp_path):
    long = "<|response_begin|>" + "word & " * 20_000 + "<|response_end|>"
    rows = [rollout(step, i, 0.1 * i, completion=long, person=long, messages=[{"role": "user", "content": long}] * 8) for step in range(1, 15) for i in range(8)]
    path = write_run(tmp_path / "run", rows)
    assert report.write_report([path], tmp_path / "r.html").stat().st_size < 3_000_000


@pytest.mark.parametrize("files", [{}, {"run": {"command": "sft"}}, {"run": {}, "evaluation": {}, "export": {}}, {"evaluation": {"models": ["base"]}}])
def test_missing_files_leave_their_section_out(tmp_path, files):
    path = write_run(tmp_path / "run", **files)
    data = report.read_run(path)
    assert data["log"] == [] and data["completions"] == [] and data["exam"] is None
    assert "<section" not in page(path) or files.get("run")
    with pytest.raises(report.ReportError, match="no such run directory"):
        report.read_run(tmp_path / "absent")


def test_a_torn_last_line_is_skipped_and_nan_is_unknown(tmp_path):
    path = write_run(tmp_path / "run", [rollout()])
    with open(path / "completions.jsonl", "ab") as file:
        file.write('{"step": 2, "person": "Zoë'.encode()[:-1])  # cut within a character
    (path / "log.jsonl").write_text('{"step": 1, "reward": NaN}\n\n{"step": 2, "reward": 0.5}\n')
    data = report.read_run(path)
    assert len(data["completions"]) == 1
    assert [row["reward"] for row in data["log"]] == [None, 0.5]
    page(path)


@pytest.mark.parametrize("name, content", [
    ("run.json", '{"command": '),
    ("evaluation.json", "[]"),  # JSON, but not an object
    ("export.json", ""),
    ("exam.json", b"\xff\xfe{}"),
    ("log.jsonl", '{"step": 1\n{"step": 2}\n'),  # torn, but not last: something else is wrong
    ("completions.jsonl", "3\n{}\n"),
])  # fmt: skip
def test_a_malformed_file_is_named_in_one_line(tmp_path, name, content):
    (write_run(tmp_path / "run") / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(report.ReportError) as error:
        report.read_run(tmp_path / "run")
    assert name in str(error.value) and "\n" not in str(error.value)


def test_several_runs_stand_side_by_side(tmp_path, full):
    sft = write_run(tmp_path / "sft", log=[{"step": i, "loss": 3 - 0.1 * i} for i in range(1, 12)], run={"command": "sft"})
    twin = write_run(tmp_path / "other" / "full", run=grpo(-1, 1))  # the same directory name elsewhere
    text = page(full, sft, twin)
    assert "<h3>sft</h3>" in text and f"<h3>{full}</h3>" in text and f"<h3>{twin}</h3>" in text
    assert "The SFT loss went from 2.85 (first quarter) to 1.95 (last quarter)." in text
    assert text.count('<section id="curves">') == 1


def test_the_smoothed_line_follows_a_straight_one_to_both_ends(tmp_path):
    line = report._smooth([(x, 2.0 * x + 1) for x in range(20)])
    assert all(math.isclose(value, 2 * x + 1, abs_tol=1e-6) for x, value, _ in line)
    assert all(half is None or half < 1e-6 for *_, half in line)  # no scatter, no width
    assert report._smooth([(1.0, 0.5), (1.0, 0.7)]) == []  # one step: no line


# ---------------------------------------------------------------------------------- explain


def test_explain_shows_the_arithmetic_of_a_hand_computed_group(tmp_path):
    # rewards 0.2 0.4 0.6: mean 0.4, sample standard deviation 0.2, advantages -+ 0.2 / 0.2001 = 0.9995
    rows = [rollout(2, i, *pair, logprob_after=after) for i, (pair, after) in enumerate([((0.2, -0.9995), -1.2), ((0.4, 0.0), -1.0), ((0.6, 0.9995), -0.9)])]
    text = report.explain(write_run(tmp_path / "run", [rollout(1, 0), rollout(1, 1), *rows]))
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
    text = report.explain(write_run(tmp_path / "run", rows), 1)
    assert "GROUP: 2 of 3 samples take part" in text
    assert "(0.2000 + 0.6000) / 2 = 0.4000" in text
    assert "sample 1    no reward, takes no part: 0" in text
    assert "(0.6000 - 0.4000) / (0.2828 + 0.0001) = +0.7069   stored +0.0000   DIFFERS" in text
    alone = report.explain(write_run(tmp_path / "alone", [rollout(), rollout(sample=1, reward=None)]))
    assert "fewer than two rewards" in alone
    equal = report.explain(write_run(tmp_path / "equal", [rollout(), rollout(sample=1)]))
    assert "no two rewards of the group differ" in equal


def test_explain_names_the_steps_there_are(tmp_path):
    path = write_run(tmp_path / "run", [rollout(step) for step in (1, 2, 3, 7, 9, 10)])
    with pytest.raises(report.ReportError, match=r"no step 5 in completions.jsonl; it has 1-3, 7, 9-10$"):
        report.explain(path, 5)
    with pytest.raises(report.ReportError, match="no completions recorded"):
        report.explain(write_run(tmp_path / "sft", run={"command": "sft"}))


def test_explain_takes_the_later_record_of_a_resumed_step_and_no_control_characters(tmp_path):
    rows = [rollout(1, 0, 0.1), rollout(1, 1, 0.9), rollout(1, 0, 0.3, completion="a\x1b[31mred\u202etxet \ud800"), rollout(1, 1, 0.5)]
    text = report.explain(write_run(tmp_path / "run", rows))
    assert "(0.3000 + 0.5000) / 2 = 0.4000" in text
    assert all(c.isprintable() or c == "\n" for c in text)
    text.encode("utf-8")
    page(tmp_path / "run")
