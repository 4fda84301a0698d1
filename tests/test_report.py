"""The report on tiny runs written by hand: what it says must follow from the numbers, and nothing of a run may act in the page."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from kardia.results import plots, report, run_files
from kardia.results.warnings import Alarm

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'
REPLY = "<|understanding_begin|>u<|understanding_end|><|emotion_begin|>sad<|emotion_end|><|response_begin|>never closed"


def rollout(step=1, sample=0, reward=0.5, advantage=0.0, **more):
    """One line of completions.jsonl whose components add up to its reward: format 0.5 x 1 or 0, rubric 0.5 x the rest."""
    shape = 1.0 if reward is not None and reward >= 0.5 else 0.0
    rubric = None if reward is None else (reward - 0.5 * shape) / 0.5
    return {
        "step": step,
        "group": 0,
        "sample": sample,
        "person": "Mara",
        "emotion": "sad",
        "situation": "Her dog died.",
        "messages": [{"role": "user", "content": "I miss him."}],
        "completion": REPLY,
        "tokens": 12,
        "truncated": False,
        "problem": None,
        "components": {"format": shape, "rubric": rubric},
        "criteria": {"empathy": rubric},
        "weights": {"format": 0.5, "rubric": 0.5},
        "reward": reward,
        "advantage": advantage,
        "logprob": -1.0,
        "logprob_after": None,
        **more,
    }


def write_run(path, completions=(), log=(), tokens=(), **objects):
    path.mkdir(parents=True, exist_ok=True)
    for name, rows in (("completions", completions), ("log", log), ("tokens", tokens)):
        if rows:
            (path / f"{name}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
            )
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


def section(text, name):
    """The HTML of one section of the page."""
    return text.split(f'<section id="{name}"')[1].split("</section>")[0]


def words(html):
    """What a reader sees: tags become one space."""
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def grpo(low, high):
    return {
        "command": "grpo",
        "base": "/models/tiny",
        "bits": 16,
        "status": "done",
        "reward_trend": {
            "slope_per_step": 0.01,
            "low": low,
            "high": high,
            "first_quarter": 0.4,
            "last_quarter": 0.6,
            "steps": 8,
        },
    }


@pytest.fixture
def full(tmp_path):
    """A run with every file there."""
    scores = {"format": {"mean": 0.9, "low": 0.8, "high": 1.0, "n": 9}}
    evaluation = {
        "models": ["base", "sft"],
        "prompts": 9,
        "judge": "tiny",
        "metrics": {"base": scores, "sft": scores},
        "differences": [
            {"better": "sft", "than": "base", "metric": "format", "mean": -0.3, "low": -0.4, "high": -0.2}
        ],
        "win_rate": [{"model": "sft", "against": "base", "rate": 0.7, "low": 0.5, "high": 0.9, "ties": 1}],
        "examples": [
            {
                "person": "Mara",
                "messages": [{"role": "user", "content": "Hello."}],
                "answers": {
                    "base": {"text": "Hi.", "valid": False, "problem": "no spans", "scores": {"empathy": 0.5}}
                },
            }
        ],
    }
    criterion = {
        "method": "contrast",
        "correct": 5,
        "n": 10,
        "accuracy": 0.5,
        "low": 0.2,
        "high": 0.8,
        "length_baseline": 0.6,
        "fit": False,
        "why": "not above chance",
        "weight": 1.0,
    }
    exam = {
        "judge": "tiny",
        "pairs": 10,
        "criteria": {"empathy": criterion},
        "overall": {"accuracy": 0.5, "low": 0.2, "high": 0.8, "length_baseline": 0.6},
    }
    export = {
        "formats": {
            "f16": {
                "path": "f16.gguf",
                "bytes": 10**6,
                "kl": 1e-6,
                "kl_base": 0.1,
                "agreement": 1.0,
                "ok": True,
            },
            "modelfile": {"path": "Modelfile", "bytes": 9, "kl": None, "ok": True},
        }
    }
    log = [
        {"step": i, "reward": 0.1 * i, "rewards/format/mean": 0.5, "criteria/empathy": None, "entropy": 1.0}
        for i in range(1, 9)
    ]
    completions = [rollout(step, i, (step + i) / 12) for step in range(1, 9) for i in range(3)]
    run = {
        **grpo(0.001, 0.02),
        "judge_exam": exam,
        "options": {"group_size": 3},
        "versions": {"torch": "2"},
        "hashes": {"data": "abc"},
        "memory_plan": {"base weights": 1.0},
    }
    return write_run(tmp_path / "full", completions, log, run=run, evaluation=evaluation, export=export)


# ---------------------------------------------------------------------------------- the page


def test_every_section_is_there_and_says_what_the_numbers_say(full):
    text = page(full)
    for key in ("evaluation", "curves", "memory", "exam", "groups", "examples", "export", "details"):
        assert text.count(f'<section id="{key}"') == 1 and f'<a href="#{key}">' in text
    assert "sft against base: <b>worse</b> on format" in text
    assert (
        "Rewarded although the judge failed its exam on them: empathy" in text
    )  # unfit, weighted, not dropped
    assert "not measured" in text and "found to match it: f16." in text  # an export without a KL is no proof
    assert text.count("<svg") >= 4 and "NaN" not in text and ">None<" not in text


@pytest.mark.parametrize(
    "low, high, verdict",
    [
        (0.001, 0.02, "<b>rose</b>"),
        (-0.02, -0.001, "<b>fell</b>"),
        (-0.01, 0.01, "no change that the interval can tell from zero"),
        (
            0.0,
            0.02,
            "no change that the interval can tell from zero",
        ),  # an interval that touches zero tells nothing
        (None, None, "is not recorded"),
    ],
)
def test_headline_verdict(tmp_path, low, high, verdict):
    text = page(write_run(tmp_path / "run", run=grpo(low, high)))
    assert verdict in text
    assert (
        sum(word in text for word in ("<b>rose</b>", "<b>fell</b>", "no change that", "is not recorded")) == 1
    )


def test_nothing_of_a_run_becomes_markup(tmp_path, monkeypatch):
    rows = [
        rollout(
            sample=i,
            reward=0.2 + 0.3 * i,
            person=EVIL,
            situation=EVIL,
            emotion=EVIL,
            completion=EVIL + f"<|response_begin|>{EVIL}<|response_end|>",
            problem=EVIL,
            messages=[{"role": EVIL, "content": EVIL}, {"role": "assistant", "content": EVIL}],
            criteria={EVIL: 0.5},
            components={EVIL: 1.0},
            weights={EVIL: 1.0},
            label=EVIL,
            refused=EVIL,
            held_out={EVIL: 0.4},
        )
        for i in range(2)
    ]
    tokens = [
        {
            "step": 1,
            "group": 0,
            "sample": i,
            "tokens": [EVIL, '" onmouseover=alert(1) x="', "<|response_begin|>"],
            "before": [-1.0, EVIL, -1.0],
            "after": [-0.5, -0.5, -2.0],
            "epsilon": EVIL,
        }
        for i in range(2)
    ]
    cell = {"mean": 0.5, "low": 0.4, "high": 0.6}
    evaluation = {
        "models": [EVIL],
        "judge": EVIL,
        "metrics": {EVIL: {EVIL: cell}},
        "differences": [{"better": EVIL, "than": EVIL, "metric": EVIL, **cell}],
        "win_rate": [{"model": EVIL, "against": EVIL, "rate": 0.5, **cell}],
        "examples": [
            {
                "messages": [{"content": EVIL}],
                "answers": {EVIL: {"text": EVIL, "problem": EVIL, "scores": {EVIL: 1}}},
            }
        ],
    }
    run = {
        **grpo(0, 1),
        "command": EVIL,
        "base": EVIL,
        "parent": EVIL,
        "machine": EVIL,
        "options": {EVIL: EVIL},
        "versions": {EVIL: EVIL},
        "hashes": {EVIL: EVIL},
        "dropped_criteria": [EVIL],
        "memory_plan": {EVIL: 1.0},
        "peak_memory_gb": 2.0,
        "peak_memory_of": EVIL,
        "form": {"spans": [EVIL, "response"], "label": EVIL},
        "rollout": EVIL,
        "judge_exam": {
            "judge": EVIL,
            "criteria": {
                EVIL: {
                    "method": EVIL,
                    "why": EVIL,
                    "fit": False,
                    "accuracy": 0.5,
                    "held_out": {"text": EVIL, "accuracy": 0.5},
                }
            },
        },
    }
    log = [{"step": i, "reward": 0.1, f"criteria/{EVIL}": 0.3} for i in range(4)]
    path = write_run(
        tmp_path / "run",
        rows,
        log,
        tokens,
        run=run,
        evaluation=evaluation,
        export={"formats": {EVIL: {"path": EVIL, "ok": False}}},
    )
    twin = write_run(
        tmp_path / "<img src=x>",
        rows,
        log,
        tokens,
        run={**run, "options": {EVIL: 2}, "machine": "another"},
        evaluation=evaluation,
    )
    monkeypatch.setattr(report.alarms, "check", lambda data: [Alarm(EVIL, EVIL)])
    text = page(path, twin)
    for name in ("differs", "evaluation", "curves", "memory", "exam", "groups", "examples", "details"):
        assert "&lt;script&gt;" in section(text, name), name
    tags = Tags()
    tags.feed(text)
    assert not {"script", "img"} & {tag for tag, _ in tags.seen}
    assert {name for _, names in tags.seen for name in names} <= {
        "lang",
        "charset",
        "name",
        "content",
        "href",
        "id",
        "class",
        "style",
        "open",
        "scope",
        "role",
        "aria-label",
        "aria-hidden",
        "viewbox",
        "preserveaspectratio",
        "d",
        "http-equiv",
        "tabindex",
        "title",
        "colspan",
    }


def test_the_page_stands_alone(full):
    text = page(full)
    assert re.findall(r'href="([^#][^"]*)"', text) == []  # only jumps inside the page
    assert not re.search(r"\ssrc\s*=|<link|@import|url\(|<script", text)
    assert text.startswith("<!doctype html>") and '<meta charset="utf-8">' in text
    assert (
        "default-src 'none'; style-src 'unsafe-inline'" in text
    )  # and if all else fails, the browser runs nothing
    assert [p.name for p in (full.parent / "out").iterdir()] == ["report.html"]  # the temporary name is gone


def test_size_stays_under_the_limit_however_long_the_replies(tmp_path):
    long = "<|response_begin|>" + "word & " * 20_000 + "<|response_end|>"
    rows = [
        rollout(
            step, i, 0.1 * i, completion=long, person=long, messages=[{"role": "user", "content": long}] * 8
        )
        for step in range(1, 15)
        for i in range(8)
    ]
    path = write_run(tmp_path / "run", rows)
    assert report.write_report([path], tmp_path / "r.html").stat().st_size < 3_000_000


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"run": {"command": "sft"}},
        {"run": {}, "evaluation": {}, "export": {}},
        {"evaluation": {"models": ["base"]}},
    ],
)
def test_missing_files_leave_their_section_out(tmp_path, files):
    path = write_run(tmp_path / "run", **files)
    data = run_files.read_run(path)
    assert data["log"] == [] and data["completions"] == [] and data["exam"] is None
    assert "<section" not in page(path) or files.get("run")
    with pytest.raises(run_files.ReportError, match="no such run directory"):
        run_files.read_run(tmp_path / "absent")


def test_a_torn_last_line_is_skipped_and_nan_is_unknown(tmp_path):
    path = write_run(tmp_path / "run", [rollout()])
    with open(path / "completions.jsonl", "ab") as file:
        file.write('{"step": 2, "person": "Zoë'.encode()[:-1])  # cut within a character
    (path / "log.jsonl").write_text('{"step": 1, "reward": NaN}\n\n{"step": 2, "reward": 0.5}\n')
    data = run_files.read_run(path)
    assert len(data["completions"]) == 1
    assert [row["reward"] for row in data["log"]] == [None, 0.5]
    page(path)


@pytest.mark.parametrize(
    "name, content",
    [
        ("run.json", '{"command": '),
        ("evaluation.json", "[]"),  # JSON, but not an object
        ("export.json", ""),
        ("exam.json", b"\xff\xfe{}"),
        ("log.jsonl", '{"step": 1\n{"step": 2}\n'),  # torn, but not last: something else is wrong
        ("completions.jsonl", "3\n{}\n"),
    ],
)
def test_a_malformed_file_is_named_in_one_line(tmp_path, name, content):
    (write_run(tmp_path / "run") / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    with pytest.raises(run_files.ReportError) as error:
        run_files.read_run(tmp_path / "run")
    assert name in str(error.value) and "\n" not in str(error.value)


def test_several_runs_stand_side_by_side(tmp_path, full):
    sft = write_run(
        tmp_path / "sft", log=[{"step": i, "loss": 3 - 0.1 * i} for i in range(1, 12)], run={"command": "sft"}
    )
    twin = write_run(tmp_path / "other" / "full", run=grpo(-1, 1))  # the same directory name elsewhere
    text = page(full, sft, twin)
    assert "<h3>sft</h3>" in text and f"<h3>{full}</h3>" in text and f"<h3>{twin}</h3>" in text
    assert "The SFT loss went from 2.85 (first quarter) to 1.95 (last quarter)." in text
    assert text.count('<section id="curves">') == 1


def test_the_smoothed_line_follows_a_straight_one_to_both_ends(tmp_path):
    line = plots.smooth([(x, 2.0 * x + 1) for x in range(20)])
    assert all(math.isclose(value, 2 * x + 1, abs_tol=1e-6) for x, value, _ in line)
    assert all(half is None or half < 1e-6 for *_, half in line)  # no scatter, no width
    assert plots.smooth([(1.0, 0.5), (1.0, 0.7)]) == []  # one step: no line


# ---------------------------------------------------------------------------------- warnings


def test_warnings_stand_at_the_top_with_their_evidence(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", [rollout(step) for step in (1, 2)], run=grpo(0.1, 0.2))
    monkeypatch.setattr(
        report.alarms,
        "check",
        lambda data: (
            [Alarm("no signal", "80% of <5 groups"), Alarm("length", "r = 0.9")]
            if data["name"] == "run"
            else []
        ),
    )
    text = page(path)
    assert words(text.split("<aside")[1].split("</aside>")[0]).endswith(
        "2 warnings: read the numbers with care no signal : 80% of &lt;5 groups length : r = 0.9"
    )
    assert text.index("<aside") < text.index("<b>rose</b>") < text.index("<section")


def test_a_grpo_run_without_warnings_says_that_it_was_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(report.alarms, "check", lambda data: [])
    sentence = "none fired"
    assert sentence in page(write_run(tmp_path / "grpo", run=grpo(0, 1)))
    assert sentence not in page(
        write_run(tmp_path / "sft", log=[{"step": 1, "loss": 2.0}], run={"command": "sft"})
    )  # nothing there to check


# ---------------------------------------------------------------------------------- curves


@pytest.mark.parametrize(
    "low, high, first, last",
    [
        (0.0, 1.0, 0.0, 1.0),
        (0.31, 0.34, 0.31, 0.34),  # a narrow range does not start at 0
        (-0.02, 0.013, -0.02, 0.02),
        (5.0, 5.0, 4.8, 5.2),  # a constant still has a scale around it
        (0.0, 0.0, 0.0, 0.5),
        (99.0, 1234.0, 0.0, 1500.0),
    ],
)
def test_ticks_are_round_and_hold_the_values(low, high, first, last):
    found = plots.ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 6
    assert first - 0.3 * (last - first) <= found[0] and found[-1] <= last + 0.3 * (last - first)
    assert len({round(b - a, 9) for a, b in zip(found, found[1:])}) == 1


@pytest.mark.parametrize(
    "left, right, most, expected",
    [
        (1, 7, 4, [1, 4, 7]),  # 2 and 6 would touch the ends' labels
        (1, 40, 4, [1, 10, 20, 30, 40]),
        (1, 36, 8, [1, 5, 10, 15, 20, 25, 30, 36]),  # 35 would touch 36
        (3, 3, 4, [3]),  # one step: one label
        (1, 2, 4, [1, 2]),  # no half steps
    ],
)
def test_step_labels_are_whole_steps_with_room_between_them(left, right, most, expected):
    assert plots.step_labels(left, right, most) == expected


def test_a_chart_names_its_unit_and_shows_shares_in_percent():
    curve = plots.Curve("r0 l0", "", [(step, 0.25) for step in range(1, 9)])
    half = plots.chart("Groups with signal", [curve], "%", unit_scale=True)
    assert "25% → 25%" in words(half) and words(half).count("100%") == 1
    small = plots.chart(
        "Tokens clipped",
        [plots.Curve("r0 l0", "", [(1, 0.001), (2, 0.004), (3, 0.002)])],
        "%",
        unit_scale=True,
    )
    assert "100%" not in words(small) and "0.4%" in words(
        small
    )  # a share below 1% would be a line on the floor
    assert "nats per token" in words(plots.chart("Entropy", [curve], "nats per token"))
    assert plots.chart("Entropy", [plots.Curve("r0 l0", "", [])]) == ""


def test_runs_of_one_command_share_charts_and_differ_without_colour(tmp_path):
    runs = [
        write_run(
            tmp_path / f"run-{i}",
            log=[
                {"step": s, "reward": 0.1 * s + i, "loss": 1.0, **({"kl": 0.1} if i else {})}
                for s in range(1, 5)
            ],
            run=grpo(0, 1),
        )
        for i in range(2)
    ]
    sft = write_run(
        tmp_path / "sft", log=[{"step": s, "loss": 3.0} for s in range(1, 5)], run={"command": "sft"}
    )
    figures = re.findall(r"<figure.*?</figure>", section(page(runs[0], sft, runs[1]), "curves"))
    by_title = {words(figure).split(" ")[0]: figure for figure in figures}
    reward = by_title["Total"]
    assert (
        words(reward).count("run-0") == 1 and words(reward).count("run-1") == 1 and "sft" not in words(reward)
    )
    assert (
        'class="line r0 l0"' in reward and 'class="line r2 l1"' in reward
    )  # its place on the page; its place among the runs in the chart
    assert "run-0: 0.10 → 0.40; run-1: 1.10 → 1.40" in reward  # for those who hear the chart
    assert "run-0" not in by_title["KL"] and "run-1" in by_title["KL"]
    assert (
        by_title["Loss"].count('class="line') == 1 and "3.00 → 3.00" in by_title["Loss"]
    )  # GRPO's loss is another quantity
    dashes = re.findall(r"\.line\.l\d\{stroke-dasharray:([^}]*)\}", plots.STYLE)
    assert len(set(dashes)) == plots.LOOKS - 1  # the first is solid


def test_held_out_scores_stand_in_the_curve_of_their_criterion(tmp_path):
    rows = [
        rollout(step, i, 0.6, held_out={"empathy": 0.25} if step == 3 else None)
        for step in range(1, 6)
        for i in range(2)
    ]
    text = section(page(write_run(tmp_path / "run", rows, run=grpo(0, 1))), "curves")
    rings = [figure for figure in re.findall(r"<figure.*?</figure>", text) if "rings" in figure]
    assert len(rings) == 1 and words(rings[0]).startswith("empathy")
    assert (
        '<path class="rings r0 l0" d="M50.0 75.0h0"/>' in rings[0]
    )  # step 3 of 1 to 5; 0.25 of a scale from 0 to 1
    assert "Rings: the same replies" in text


# ---------------------------------------------------------------------------------- several runs


SFT_RUN = {
    "command": "sft",
    "options": {"data": "d", "seed": 0, "epochs": 1},
    "versions": {"torch": "2"},
    "machine": "m",
}
GRPO_RUN = {
    "command": "grpo",
    "options": {"data": "p", "seed": 0, "beta": 0.0},
    "versions": {"torch": "2"},
    "machine": "m",
}


@pytest.mark.parametrize(
    "runs, differing, silent",
    [
        (
            [SFT_RUN, GRPO_RUN],
            ["data d p"],
            ["epochs", "beta", "seed", "torch", "machine"],
        ),  # what one command alone knows is no difference
        ([GRPO_RUN, GRPO_RUN], [], ["data", "beta", "seed"]),
        (
            [GRPO_RUN, {**GRPO_RUN, "options": {"data": "p", "seed": 1}}],
            ["seed 0 1", "beta 0.0 –"],
            ["data"],
        ),  # a later version dropped an option
        (
            [SFT_RUN, GRPO_RUN, {**GRPO_RUN, "options": {**GRPO_RUN["options"], "beta": 0.1}}],
            ["beta – 0.0 0.1", "data d p p"],
            ["epochs"],
        ),
        (
            [GRPO_RUN, {**GRPO_RUN, "versions": {"torch": "3"}, "machine": "n", "hashes": {"data": "h"}}],
            ["torch 2 3", "machine m n", "data – h"],
            ["seed"],
        ),
        (
            [GRPO_RUN, {**GRPO_RUN, "options": "damaged", "versions": None}],
            ["data p –", "torch 2 –"],
            ["machine"],
        ),
    ],
)
def test_only_what_differs_is_in_the_table(tmp_path, runs, differing, silent):
    paths = [
        write_run(tmp_path / f"r{i}", log=[{"step": 1, "reward": 0.5}], run=run) for i, run in enumerate(runs)
    ]
    rows = [words(row) for row in re.findall("<tr>.*?</tr>", section(page(*paths), "differs"))]
    assert [row for row in differing if row not in rows] == []
    assert [row for row in rows for name in silent if row.split(" ")[0] == name] == []
    assert '<section id="differs"' not in page(paths[0])


def test_how_the_runs_ended_is_the_last_quarter(tmp_path):
    log = [{"step": s, "reward": s / 10, "rewards/format/mean": 1.0, "loss": 9.0} for s in range(1, 9)]
    grpo_run = write_run(
        tmp_path / "grpo", log=log, run={"command": "grpo", "seconds": 600, "peak_memory_gb": 2.5}
    )
    sft = write_run(
        tmp_path / "sft",
        log=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}],
        run={"command": "sft", "seconds": 30},
    )
    rows = [words(row) for row in re.findall("<tr>.*?</tr>", section(page(sft, grpo_run), "differs"))]
    for row in (
        "reward – 0.750",
        "reward, format – 1.000",
        "SFT loss 1.500 –",
        "steps 2 8",
        "time 30 s 10 min",
        "peak memory, GB – 2.50",
    ):  # (0.7 + 0.8) / 2; of two steps the last
        assert row in rows, row


def test_what_runs_have_in_common_is_shown_once(tmp_path, full):
    twin = write_run(
        tmp_path / "twin",
        run={**grpo(0, 1), "judge_exam": json.loads((full / "run.json").read_text())["judge_exam"]},
    )
    exam = section(page(full, twin), "exam")
    assert (
        exam.count("<h3>full</h3>") == exam.count("<h3>twin</h3>") == 1
        and exam.count("not above chance") == 1
    )


# ---------------------------------------------------------------------------------- memory


def test_memory_is_planned_term_by_term_and_measured(tmp_path):
    run = {
        "command": "sft",
        "memory_plan": {"base weights": 1.0, "activations": 0.5, "logits": None},
        "peak_memory_gb": 3.0,
        "peak_memory_of": "this process",
    }
    text = section(page(write_run(tmp_path / "run", run=run)), "memory")
    assert "Measured 3.00 GB of 1.50 GB planned: 2.00 times the plan." in text
    told = words(text)
    assert (
        all(
            piece in told
            for piece in (
                "base weights 1.00",
                "activations 0.50",
                "planned in all 1.50",
                "measured peak of this process 3.00",
            )
        )
        and "logits" not in told
    )
    bars = re.findall(r'<i class="?(fill[ \w]*)"? style="(?:left:([\d.]+)%;)?width:([\d.]+)%', text)
    assert bars == [
        ("fill", "0.0", "33.3"),
        ("fill", "33.3", "16.7"),
        ("fill sum", "", "50.0"),
        ("fill real", "", "100.0"),
    ]  # each begins where the one before ended
    assert "The peak was not measured." in page(
        write_run(tmp_path / "alone", run={**run, "peak_memory_gb": None})
    )
    setting = {"cuda": True, "micro": 4, "rollout": "llama", "rollout_type": "q8_0<b>", "judge_on_gpu": False}
    chosen = section(page(write_run(tmp_path / "chosen", run={**run, "setting": setting})), "memory")
    assert "What fitted: micro 4, rollout llama, rollout type q8_0&lt;b&gt;, judge on gpu False." in chosen
    assert "What fitted" not in section(
        page(write_run(tmp_path / "cpu", run={**run, "setting": {**setting, "cuda": False}})), "memory"
    )


# ---------------------------------------------------------------------------------- groups


def moved(sample=0, **more):
    """A line of tokens.jsonl: one token became likelier by 1, one less likely by 0.5, one stayed."""
    return {
        "step": 1,
        "group": 0,
        "sample": sample,
        "tokens": ["up", "down", "still"],
        "before": [-2.0, -1.0, -1.0],
        "after": [-1.0, -1.5, -1.0],
        "epsilon": 0.2,
        **more,
    }


def test_tokens_are_tinted_by_how_they_moved(tmp_path):
    text = section(
        page(
            write_run(
                tmp_path / "run",
                [rollout(), rollout(sample=1, reward=0.7)],
                tokens=[moved(), {**moved(), "step": 2}],
            )
        ),
        "groups",
    )
    assert (
        '<i class=u5 title="−2.000 → −1.000 (+1.000)">up</i><i class=d5 title="−1.000 → −1.500 (−0.500)">down</i><i title="−1.000 → −1.000 (+0.000)">still</i>'
        in text
    )
    assert (
        "33% of 3 tokens more likely, +0.167 on average; 2 left the clip range of 0.80 to 1.20." in text
    )  # e^1 and e^-0.5, around a ratio of 1
    assert text.count("<div class=tokens>") == 1  # sample 1 has none, step 2 no replies
    assert "less likely after the step" in text and "class=u1" in text  # the legend


@pytest.mark.parametrize(
    "row, shown",
    [
        (moved(after=[-1.0]), ["up"]),  # cut short: only what is known on both sides
        (
            moved(before=[None, "x", -1.0]),
            ["still"],
        ),  # unknown numbers: the token stands there, without a tint
        (moved(tokens="up", before=3, after=None), []),
        (moved(before=[-1e9, -1.0, -1.0], after=[1e9, -1.0, -1.0]), ["up", "down", "still"]),
        (
            moved(before=[-1e300, -1.0, -1.0], after=[1e300, -1.0, -1.0]),
            ["down", "still"],
        ),  # larger than anything measured
        ({"step": 1, "group": 0, "sample": 0}, []),
    ],
)
def test_damaged_tokens_leave_their_part_out(tmp_path, row, shown):
    text = section(page(write_run(tmp_path / "run", [rollout()], tokens=[row])), "groups")
    assert re.findall(r"<i[^>]* title=[^>]*>(\w+)</i>", text) == shown


def test_held_out_scores_stand_beside_the_criteria(tmp_path):
    rows = [rollout(held_out={"empathy": 0.31}), rollout(sample=1)]
    cards = section(page(write_run(tmp_path / "run", rows)), "groups").split("<article")[1:]
    asked = next(card for card in cards if "Sample 0" in card)
    assert (
        "empathy 0.00 0.31" in words(asked)
        and "in other words" in words(asked)
        and 'class=ring style="left:31.0%"' in asked
    )
    assert "other" not in words(next(card for card in cards if "Sample 1" in card))


def test_spans_are_coloured_in_the_order_of_the_form_and_the_label_has_its_name(tmp_path):
    said = "<|answer_begin|>yes<|answer_end|><|emotion_begin|>sad<|emotion_end|><|plan_begin|>p<|plan_end|>"
    form = {"spans": ["plan", "answer"], "label": "intent", "reply": "answer"}
    text = section(
        page(
            write_run(
                tmp_path / "other",
                [rollout(completion=said, label="refund")],
                run={"command": "grpo", "form": form},
            )
        ),
        "groups",
    )
    assert (
        '<div class="span s0"><small>plan</small>p</div>' in text
        and '<div class="span s1"><small>answer</small>yes</div>' in text
    )
    assert '<div class="span stray"><small>emotion</small>sad</div>' in text  # no span of this task
    assert "<dt>Intent to find</dt><dd>refund</dd>" in text
    old = section(page(write_run(tmp_path / "old", [rollout()])), "groups")
    assert (
        '<div class="span s2"><small>emotion</small>sad</div>' in old
        and "<dt>Emotion to find</dt><dd>sad</dd>" in old
    )


def test_the_browser_shows_the_ends_the_widest_and_the_inspected_groups(tmp_path):
    rows = [
        rollout(step, i, 0.5 + (0.4 * i if step == 33 else 0.1 * i))
        for step in range(1, 61)
        for i in range(2)
    ]
    text = section(page(write_run(tmp_path / "run", rows, tokens=[moved(step=20)])), "groups")
    steps = list(map(int, re.findall(r"<b>Step (\d+)</b>", text)))
    assert {1, 20, 33, 60} <= set(steps) and steps == sorted(steps) and len(steps) == 12
    assert re.findall(
        r"<details class=group open><summary><span class=what><b>Step (\d+)</b>, group 0 <small>widest spread<",
        text,
    ) == ["33"]


def test_many_tokens_do_not_break_the_size_limit(tmp_path):
    rows = [rollout(step, i, 0.1 * i) for step in range(1, 15) for i in range(8)]
    tokens = [
        moved(i, step=step, tokens=["<&>"] * 3000, before=[-1.0] * 3000, after=[-0.5] * 3000)
        for step in range(1, 15)
        for i in range(8)
    ]
    path = write_run(tmp_path / "run", rows, tokens=tokens)
    out = report.write_report([path], tmp_path / "r.html")
    assert out.stat().st_size < 3_000_000 and " more]</small>" in out.read_text()
