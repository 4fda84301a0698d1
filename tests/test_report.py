"""The report on tiny runs: it says what follows from the numbers, and nothing of a run acts in the page."""

import json
import math
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest

from kardia.results import plots, report, run_files, statistics, tables
from kardia.results.run_files import ReportError
from kardia.results.warnings import RunWarning

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'
REPLY = (
    "<|understanding_begin|>u<|understanding_end|><|emotion_begin|>sad<|emotion_end|><|response_begin|>open"
)


def rollout(step=1, sample=0, reward=0.5, advantage=0.0, **more):
    """One line of completions.jsonl; reward = 0.5 x format (1 or 0) + 0.5 x rubric."""
    shape = 1.0 if reward is not None and reward >= 0.5 else 0.0
    rubric = None if reward is None else (reward - 0.5 * shape) / 0.5
    row = {"step": step, "group": 0, "sample": sample, "person": "Mara", "emotion": "sad"}
    row |= {"situation": "Her dog died.", "messages": [{"role": "user", "content": "I miss him."}]}
    row |= {"completion": REPLY, "tokens": 12, "truncated": False, "problem": None}
    row |= {"components": {"format": shape, "rubric": rubric}, "criteria": {"empathy": rubric}}
    row |= {"weights": {"format": 0.5, "rubric": 0.5}, "reward": reward, "advantage": advantage}
    return {**row, "logprob": -1.0, "logprob_after": None, **more}


def moved(sample=0, **more):
    """A line of tokens.jsonl: one token became likelier by 1, one less likely by 0.5, one stayed."""
    row = {"step": 1, "group": 0, "sample": sample, "tokens": ["up", "down", "still"], "epsilon": 0.2}
    return {**row, "before": [-2.0, -1.0, -1.0], "after": [-1.0, -1.5, -1.0], **more}


def write_run(path, completions=(), log=(), tokens=(), held_out=(), **objects):
    path.mkdir(parents=True, exist_ok=True)
    files = {"completions": completions, "log": log, "tokens": tokens, "held_out": held_out}
    for name, rows in files.items():
        if rows:
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for name, value in objects.items():
        (path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return path


ATTRIBUTES = """lang charset name content href id class style open scope role aria-label aria-hidden title
width height version xmlns xmlns:xlink xlink:href d transform x y clip-path http-equiv tabindex viewbox"""
TAGS = """html head meta title style body h1 h2 h3 h4 nav a main section p b i em small br div span code ul li
dl dt dd aside details summary article header figure figcaption svg g path use defs text clippath rect table
thead tbody tr th td"""


class Page(HTMLParser):
    """What a browser would make of a page. Asserts that nothing in it acts or loads."""

    def __init__(self, text):
        super().__init__()
        self.ids = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        assert tag in TAGS.split(), tag
        for name, value in attrs:
            assert name in ATTRIBUTES.split(), (tag, name)
            if name.endswith("href"):
                assert value.startswith("#"), value  # only jumps inside the page
            if name in ("style", "clip-path"):
                assert "url(" not in value or re.fullmatch(r"url\(#\w+\)", value), value
            if name == "id":
                self.ids.append(value)

    def handle_comment(self, data):
        raise AssertionError(data[:50])


def page(*runs):
    """The text of the report, after the checks that hold of every report."""
    text = report.write_report(list(runs), runs[0].parent / "out" / "report.html").read_text(encoding="utf-8")
    ids = Page(text).ids
    assert len(set(ids)) == len(ids) and len(text) < 3_000_000
    return text


def section(text, name):
    """The HTML of one section of the page."""
    return text.split(f'<section id="{name}"')[1].split("</section>")[0]


def words(html):
    """What a reader sees: tags become one space."""
    return " ".join(re.sub(r"<[^>]*>", " ", html).replace("&nbsp;", " ").split())


def rows_of(html):
    return [words(row) for row in re.findall("<tr>.*?</tr>", html, flags=re.S)]


def grpo(low, high):
    trend = {"slope_per_step": 0.01, "low": low, "high": high, "steps": 8}
    trend |= {"first_quarter": 0.4, "last_quarter": 0.6}
    return {"command": "grpo", "base": "/models/tiny", "bits": 16, "status": "done", "reward_trend": trend}


@pytest.fixture
def full(tmp_path):
    """A small run with every file there, recorded by version 0.1.0: it still opens."""
    return shutil.copytree(Path(__file__).parent / "old_run", tmp_path / "full")


# ---------------------------------------------------------------------------------- the page


def test_every_section_is_there_and_says_what_the_numbers_say(full):
    text = page(full)
    for key in ("evaluation", "curves", "memory", "exam", "groups", "examples", "export", "details"):
        assert text.count(f'<section id="{key}"') == 1 and f'<a href="#{key}">' in text
    seen = words(text)
    assert "sft against base: worse on format" in seen and "Mean reward of the rollouts rose" in seen
    assert "Rewarded although the judge failed its exam on them: empathy" in seen
    assert "What the step did to each token" in seen and "step 2: micro-batch 8 -&gt; 4 (&lt;b&gt;)" in seen
    assert "not measured" in seen and "found to match it: f16." in seen  # an export without a KL is no proof
    assert "format −0.30 (−0.40 to −0.20) worse" in seen and "70% (50% to 90%)" in seen
    assert "5 of 10 50% (20% to 80%)" in seen and "UNFIT: not above chance" in seen
    assert text.count("<svg") >= 4 and "NaN" not in text and ">None<" not in text
    # It stands alone; and if all else fails, the browser runs nothing.
    assert not re.search(r"\ssrc\s*=|<link|@import|url\((?!#)|<script", text)
    assert text.lstrip().startswith("<!doctype html>") and '<meta charset="utf-8">' in text
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    assert [p.name for p in (full.parent / "out").iterdir()] == ["report.html"]  # the temporary name is gone


def test_the_table_on_the_page_is_the_table_of_the_terminal(full):
    data, text = run_files.read_run(full), page(full)
    for name in ("evaluation", "exam", "export"):
        found = getattr(tables, f"{name}_table")(data[name])
        # A Windows console knows cp1252 only.
        lines = [" ".join(line.split()) for line in found.text().encode("cp1252").decode().split("\n")]
        html = re.sub('<small class="prose">.*?</small>', "", section(text, name))  # details are for the page
        shown = [row.replace("−", "-").replace("–", "-") for row in rows_of(html)]
        assert [row for row in shown if " ".join(row.split()) not in lines] == [], name
    cases = {(0.001, 0.02): "rose", (-0.02, -0.001): "fell", (None, None): "too few steps"}
    cases |= {(-0.01, 0.01): "did not rise by more than chance", (0.0, 0.02): "did not rise"}
    for (low, high), verdict in cases.items():
        assert verdict in tables.trend_sentence(grpo(low, high)["reward_trend"])


def records(file):
    text = file.read_text()
    return list(map(json.loads, [text] if file.suffix == ".json" else text.splitlines()))


def write_lines(file, values):
    file.write_text("".join(json.dumps(value) + "\n" for value in values))


def hostile(value):
    """The value with every text replaced, and with one more key in every record."""
    if isinstance(value, dict):
        out = {key: hostile(each) for key, each in value.items()}
        return out | dict.fromkeys([EVIL], next(iter(out.values()), 0.5))
    if isinstance(value, list):
        return [hostile(each) for each in value]
    return EVIL if isinstance(value, str) else value


def test_nothing_of_a_run_becomes_markup(full, monkeypatch):
    for file in full.iterdir():
        write_lines(file, [hostile(value) for value in records(file)])
    twin = shutil.copytree(full, full.parent / "<img src=x> $\\frac{")
    [run] = records(twin / "run.json")
    write_lines(twin / "run.json", [run | {"options": {EVIL: 2}, "machine": "another"}])
    monkeypatch.setattr(report.warnings, "check", lambda data: [RunWarning(EVIL, EVIL)])
    text = page(full, twin)
    for name in "differs evaluation curves memory exam groups examples export details".split():
        assert "&lt;script&gt;" in section(text, name), name
    drawn = plots.charts_of([run_files.read_run(full), run_files.read_run(twin)])
    plots.write_png([(kind, blocks[:2]) for kind, blocks in drawn], full.parent / "png")
    names = sorted(file.name for file in (full.parent / "png").iterdir())
    assert names[0] == "01-grpo-total-reward.png"
    assert all(re.fullmatch(r"\d\d-[\w-]+\.png", name) for name in names)


def test_size_stays_under_the_limit_however_long_the_replies(tmp_path):
    long = "<|response_begin|>" + "word & " * 5_000 + "<|response_end|>"
    long = {"completion": long, "person": long, "messages": [{"role": "user", "content": long}] * 5}
    rows = [rollout(step, i, 0.1 * i, **long) for step in range(1, 13) for i in range(3)]
    column = {"tokens": ["<&>"] * 3000, "before": [-1.0] * 3000, "after": [-0.5] * 3000}
    tokens = [moved(i, step=step, **column) for step in range(1, 13) for i in range(3)]
    assert "word &amp;" in page(write_run(tmp_path / "run", rows, tokens=tokens))  # `page` asserts the size


def test_missing_torn_and_malformed_files(tmp_path):
    little = [{}, {"run": {}, "evaluation": {}, "export": {}}, {"evaluation": {"models": ["base"]}}]
    for i, files in enumerate(little):
        path = write_run(tmp_path / str(i), **files)
        data = run_files.read_run(path)
        assert data["log"] == [] and data["completions"] == [] and data["exam"] is None
        assert "<section" not in page(path)
    path = write_run(tmp_path / "torn", [rollout()])
    with open(path / "completions.jsonl", "ab") as file:
        file.write('{"step": 2, "person": "Zoë'.encode()[:-1])  # cut within a character
    (path / "log.jsonl").write_text('{"step": 1, "reward": NaN}\n\n{"step": 2, "reward": 0.5}\n')
    data = run_files.read_run(path)
    assert len(data["completions"]) == 1 and [row["reward"] for row in data["log"]] == [None, 0.5]
    page(path)
    bad = {"run.json": '{"command": ', "evaluation.json": "[]", "export.json": "", "exam.json": b"\xff\xfe{}"}
    bad["log.jsonl"] = '{"step": 1\n{"step": 2}\n'  # torn, but not in the last line: something else is wrong
    bad |= {"completions.jsonl": "3\n{}\n", "tokens.jsonl": "[" * 99_999 + "\n{}"}
    for name, content in bad.items():
        path = write_run(tmp_path / name)
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ReportError) as error:
            run_files.read_run(path)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ReportError, match="no such run directory"):
        run_files.read_run(tmp_path / "absent")


ODD = [None, math.nan, 1e300, "x", "", [], {}, True, -3, [[]], {"a": []}]


def damaged(value, rng):
    """The value with one part of it replaced by something odd."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        return {**value, key: damaged(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], damaged(value[i], rng), *value[i + 1 :]]
    return rng.choice(ODD)


def test_a_damaged_run_is_shown_or_refused_in_one_line(full, monkeypatch):
    monkeypatch.setattr(plots.Chart, "svg", "")  # drawing takes most of the time, and sees numbers only
    rng = random.Random(3)
    for _ in range(40):
        file = rng.choice(sorted(full.iterdir()))
        values, whole = records(file), file.read_text()
        write_lines(file, [damaged(values[0], rng), *values[1:]])
        try:
            page(full)
        except ReportError as error:
            assert file.name in str(error)
        file.write_text(whole)


def test_records_without_end_and_what_is_no_file(full, monkeypatch):
    """Thousands of names and rows are more than a run ever writes, and no reason to hang."""
    monkeypatch.setattr(plots.Chart, "svg", "")
    names = {f"name{i}": 0.5 for i in range(2000)}
    many = dict.fromkeys(("criteria", "components", "weights", "witness"), names)
    cell = {"mean": 0.5, "low": 0.4, "high": 0.6}
    gaps = [{"better": f"a{i}", "than": "b", "metric": f"m{i}", **cell} for i in range(20_000)]
    scores = {f"m{i}": {f"k{i}": cell} for i in range(2000)}
    rows = [rollout(step, i, 0.1 * i, **many) for step in (1, 2) for i in range(2)]
    page(write_run(full, rows, evaluation={"metrics": scores, "differences": gaps}))
    for name, target in (("log.jsonl", "/dev/zero"), ("tokens.jsonl", full), ("exam.json", full / "nowhere")):
        (full / name).unlink(missing_ok=True)
        (full / name).symlink_to(target)
    data = run_files.read_run(full)  # as if they were not there
    assert data["log"] == data["tokens"] == [] and data["exam"]["pairs"] == 10
    with pytest.raises(ReportError, match="no such run directory"):
        run_files.read_run(full / "run.json")


def test_warnings_stand_at_the_top_with_their_evidence(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", [rollout(step) for step in (1, 2)], run=grpo(0.1, 0.2))
    found = [RunWarning("no signal", "80% of <5 groups"), RunWarning("length", "r = 0.9")]
    monkeypatch.setattr(report.warnings, "check", lambda data: found)
    text = page(path)
    listed = words(text.split("<aside")[1].split("</aside>")[0])
    assert listed.endswith("read the numbers with care no signal : 80% of &lt;5 groups length : r = 0.9")
    assert "2 warnings:" in listed
    assert text.index("<aside") < text.index("rollouts rose") < text.index("<section")
    found.clear()
    assert "none fired" in page(path)
    sft = write_run(tmp_path / "sft", log=[{"step": 1, "loss": 2.0}], run={"command": "sft"})
    assert "none fired" not in page(sft)  # nothing there to check


# ---------------------------------------------------------------------------------- curves


def test_the_smoothed_line_follows_a_straight_one_to_both_ends():
    line = statistics.smooth([(x, 2.0 * x + 1) for x in range(20)])
    assert all(math.isclose(value, 2 * x + 1, abs_tol=1e-6) for x, value, _ in line) and len(line) == 61
    assert all(half < 1e-6 or math.isnan(half) for *_, half in line)  # no scatter, no width
    assert statistics.smooth([(1.0, 0.5), (1.0, 0.7)]) == []  # one step: no line


def test_a_figure_shows_shares_in_percent_and_numbers_only():
    def labels(chart):
        return re.findall(r"<text[^>]*>([^<]*)</text>", chart.svg)

    def chart(*values):
        return plots.Chart(
            "$\\frac{<b>", [plots.Curve("", 0, 0, list(enumerate(values, 1)))], "%", scale=True
        )

    half, small = chart(*[0.25] * 8), chart(0.001, 0.004, 0.002)
    assert half.changes() == ["25.0% → 25.0%"] and "100%" in labels(half)
    assert all(re.fullmatch(r"step|[\d.]+%?", label) for label in labels(half))
    assert "100%" not in labels(small)  # a share below 1% would be a line on the floor
    # The page has the colours, for light and dark.
    assert "var(--c0)" in half.svg and "var(--rule)" in half.svg and "#1f5f9e" not in half.svg


def test_runs_of_one_command_share_figures_and_differ_without_colour(tmp_path):
    runs = []
    for i in range(2):
        kl = {"kl": 0.1} if i else {}
        log = [{"step": s, "reward": 0.1 * s + i, "loss": 1.0, **kl} for s in range(1, 5)]
        runs.append(write_run(tmp_path / f"run-{i}", [], log, run=grpo(0, 1)))
    sft = [{"step": s, "loss": 3.0} for s in range(1, 5)]
    runs.insert(1, write_run(tmp_path / "sft", log=sft, run={"command": "sft"}))
    figures = re.findall(r"<figure.*?</figure>", section(page(*runs), "curves"), flags=re.S)
    by_title = {words(figure).split(" ")[0]: figure for figure in figures}
    reward = by_title["Total"]
    assert words(reward).count("run-0") == words(reward).count("run-1") == 1 and "sft" not in words(reward)
    heard = " ".join(reward.split())  # by those who cannot see the figure
    assert "run-0 0.10 → 0.40; run-1 1.10 → 1.40;" in heard
    assert "var(--c0)" in reward and "var(--c2)" in reward and "stroke-dasharray" in reward
    assert "run-0" not in by_title["KL"] and "run-1" in by_title["KL"]
    # GRPO's loss is another quantity.
    assert "3.00 → 3.00" in by_title["Loss"] and "run" not in words(by_title["Loss"])


def test_the_witness_s_scores_are_rings_in_the_figure_of_their_criterion(tmp_path):
    held = {3: {"empathy": 0.25}}
    rows = [rollout(s, i, 0.6, witness=held.get(s)) for s in range(1, 6) for i in range(2)]
    [(_, blocks)] = plots.charts_of([run_files.read_run(write_run(tmp_path / "run", rows))])
    rings = {chart.title: chart.curves[0].rings for _, charts in blocks for chart in charts}
    assert rings == {"Total reward": [], "format": [], "rubric": [], "empathy": [(3, 0.25)]}


# ---------------------------------------------------------------------------------- several runs, memory


def test_only_what_differs_is_in_the_table(tmp_path):
    sft = {"command": "sft", "options": {"data": "d", "seed": 0, "epochs": 1}, "versions": {"torch": "2"}}
    sft["machine"] = "m"
    grpo_ = {**sft, "command": "grpo", "options": {"data": "p", "seed": 0, "beta": 0.0}}
    other = {**grpo_, "options": {"data": "p", "seed": 0, "beta": 0.1}}
    without = {**grpo_, "options": {"data": "p", "seed": 1}}
    cases = [  # what one command alone knows is no difference; an option that a later version dropped is one
        ([sft, grpo_], ["data d p"], ["epochs", "beta", "seed", "torch", "machine"]),
        ([grpo_, grpo_], [], ["data", "beta", "seed"]),
        ([grpo_, without], ["seed 0 1", "beta 0.0 –"], ["data"]),
        ([sft, grpo_, other], ["beta – 0.0 0.1"], ["epochs"]),
        ([grpo_, {**grpo_, "machine": "n", "hashes": {"data": "h"}}], ["machine m n", "data – h"], ["seed"]),
        ([grpo_, {**grpo_, "options": "damaged", "versions": None}], ["data p –", "torch 2 –"], ["machine"]),
    ]
    for i, (runs, differing, silent) in enumerate(cases):
        log = [{"step": 1, "other": 0.5}]
        paths = [write_run(tmp_path / f"{i}-{j}", log=log, run=run) for j, run in enumerate(runs)]
        rows = rows_of(section(page(*paths), "differs"))
        assert [row for row in differing if row not in rows] == [], i
        assert [row for row in rows for name in silent if row.split(" ")[0] == name] == [], i


def test_several_runs_stand_side_by_side(tmp_path, full):
    log = [{"step": s, "loss": 3 - 0.1 * s} for s in range(1, 12)]
    sft = write_run(tmp_path / "sft", log=log, run={"command": "sft", "seconds": 30, "peak_memory_gb": 2.5})
    exam = json.loads((full / "run.json").read_text())["judge_exam"]
    run = {**grpo(-1, 1), "judge_exam": exam}
    twin = write_run(tmp_path / "other" / "full", run=run)  # the same directory name
    text = page(full, sft, twin)
    assert "<h3>sft</h3>" in text and f"<h3>{full}</h3>" in text and f"<h3>{twin}</h3>" in text
    assert "The SFT loss went from 2.85 (first quarter) to 1.95 (last quarter)." in text
    shared = section(text, "exam")
    # What they have in common stands there once.
    assert shared.count("UNFIT: not above chance") == 1 and shared.count("<h3>/") == 2
    rows = rows_of(section(text, "differs"))
    expected = ["reward 0.750 – –", "reward, format 0.500 – –", "SFT loss – 1.950 –", "steps 8 11 0"]
    expected += ["time 99 s 30 s –", "peak memory, GB 0.88 2.50 –"]
    assert [row for row in expected if row not in rows] == []
    assert '<section id="differs"' not in page(sft)


def test_memory_is_planned_term_by_term_and_measured(tmp_path):
    run = {"command": "sft", "memory_plan": {"base weights": 1.0, "activations": 0.5, "logits": None}}
    measured = {"peak_memory_gb": 3.0, "peak_memory_of": "this process"}
    setting = {"cuda": True, "micro": 4, "rollout": "llama", "judge_on_gpu": False}
    text = section(page(write_run(tmp_path / "run", run=run | measured | {"setting": setting})), "memory")
    assert "Measured 3.00 GB of 1.50 GB planned: 2.00 times the plan." in text
    rows = ["base weights 1.00", "activations 0.50", "planned in all 1.50"]
    rows.append("measured peak of this process 3.00")
    assert [row for row in rows if row not in rows_of(text)] == [] and "logits" not in text
    bars = re.findall(r'class="fill (\w*)" style="left:([\d.]+)%;width:([\d.]+)%', text)
    # Each bar begins where the one before ended.
    assert bars == [
        ("", "0.0", "33.3"),
        ("", "33.3", "16.7"),
        ("sum", "0.0", "50.0"),
        ("real", "0.0", "100.0"),
    ]
    assert "What fitted: micro 4, rollout llama, judge on gpu False." in text
    cpu = write_run(tmp_path / "cpu", run=run | {"setting": {**setting, "cuda": False}})
    alone = section(page(cpu), "memory")
    assert "The peak was not measured." in alone and "What fitted" not in alone


# ---------------------------------------------------------------------------------- groups


def test_tokens_are_tinted_by_how_they_moved(tmp_path):
    rows = [rollout(), rollout(sample=1, reward=0.7)]
    text = section(page(write_run(tmp_path / "run", rows, tokens=[moved(), moved(step=2)])), "groups")
    assert '<i class="u5" title="−2.000 → −1.000 (+1.000)">up</i>' in text
    assert '<i class="d5" title="−1.000 → −1.500 (−0.500)">down</i>' in text
    assert '<i title="−1.000 → −1.000 (+0.000)">still</i>' in text
    # e^1 and e^-0.5 lie outside of 1 +- 0.2.
    assert "33% of 3 tokens more likely, +0.167 on average; 2 left the clip range of 0.80 to 1.20." in text
    assert text.count('<div class="tokens">') == 1  # sample 1 has none, step 2 no replies
    cases = [
        (moved(after=[-1.0]), ["up"]),  # cut short: only what is known on both sides
        (moved(before=[None, "x", -1.0]), ["still"]),  # unknown: the token stands there without a tint
        (moved(tokens="up", before=3, after=None), []),
        (moved(before=[-1e9, -1.0, -1.0], after=[1e9, -1.0, -1.0]), ["up", "down", "still"]),
        (moved(before=[-1e300, -1.0, -1.0]), ["down", "still"]),  # larger than anything measured
        ({"step": 1, "group": 0, "sample": 0}, []),
    ]
    for i, (row, shown) in enumerate(cases):
        text = section(page(write_run(tmp_path / str(i), [rollout()], tokens=[row])), "groups")
        assert re.findall(r"<i[^>]* title=[^>]*>(\w+)</i>", text) == shown, i


def test_the_witness_s_scores_stand_beside_the_criteria(tmp_path):
    rows = [rollout(witness={"empathy": 0.31}), rollout(sample=1)]
    cards = section(page(write_run(tmp_path / "run", rows)), "groups").split("<article")[1:]
    asked = next(card for card in cards if "Sample 0" in card)
    assert "empathy 0.00 0.31" in words(asked) and 'class="ring" style="left:31.0%"' in asked
    assert "other" not in words(next(card for card in cards if "Sample 1" in card))


def test_spans_are_coloured_in_the_order_of_the_form(tmp_path):
    text = "<|answer_begin|>yes<|answer_end|><|emotion_begin|>sad<|emotion_end|><|plan_begin|>p<|plan_end|>"
    run = {"command": "grpo", "form": {"spans": ["plan", "answer"], "label": "intent", "reply": "answer"}}
    path = write_run(tmp_path / "other", [rollout(completion=text, label="refund")], run=run)
    other = section(page(path), "groups")
    for look, name, piece in (("s0", "plan", "p"), ("s1", "answer", "yes"), ("stray", "emotion", "sad")):
        assert f'<div class="span {look}"><small>{name}</small>{piece}</div>' in other
    assert "<dt>Intent to find</dt><dd>refund</dd>" in other
    old = section(page(write_run(tmp_path / "old", [rollout()])), "groups")
    assert '<div class="span s2"><small>emotion</small>sad</div>' in old
    assert "Emotion to find</dt><dd>sad" in old


def test_the_browser_shows_the_ends_the_widest_and_the_inspected_groups(tmp_path):
    rows = [rollout(s, i, 0.5 + (0.4 * i if s == 33 else 0.1 * i)) for s in range(1, 61) for i in range(2)]
    text = section(page(write_run(tmp_path / "run", rows, tokens=[moved(step=20)])), "groups")
    steps = list(map(int, re.findall(r"<b>Step (\d+)</b>", text)))
    assert {1, 20, 33, 60} <= set(steps) and steps == sorted(steps) and len(steps) == 12
    assert re.findall(r'class="group" open><summary><span class="what"><b>Step (\d+)</b>', text) == ["33"]


def test_measurements_on_held_out_prompts_are_figures(tmp_path):
    """Each component and how often written replies win, from before the first step on."""
    measured = [
        {"step": step, "n": 4, "format": 0.5, "rubric": 0.4, "wins": {"rubric": {"rate": rate}}}
        for step, rate in ((0, 0.75), (20, 0.25))
    ]
    run = write_run(tmp_path / "a", [rollout(s) for s in range(1, 6)], run=grpo(-1, 1), held_out=measured)
    charts = dict(plots.charts_of([run_files.read_run(run)])[0][1])["Held-out prompts"]
    assert [chart.title for chart in charts] == [
        "Format, held out",
        "Rubric, held out",
        "Written replies win",
    ]
    assert charts[2].curves[0].points == [(0.0, 75.0), (20.0, 25.0)]
    assert "Written replies win" in page(run)


class Scored:
    """A reward of one criterion."""

    def __init__(self, value, witness=None, refused=None):
        self.components, self.criteria = {"rubric": value}, {"empathy": value}
        self.witness = {} if witness is None else {"empathy": witness}
        self.refused = refused


def test_written_replies_against_each_model():
    """A tie is one half, an unknown or refused reply takes no part, and a model that wins is named."""
    written = {i: Scored([0.9, 0.5, 0.5, None][i % 4]) for i in range(12)}
    grpo = [Scored(0.95), Scored(0.5), Scored(0.8), Scored(0.1)] * 3
    wins = statistics.reference_wins(
        {"base": [Scored(0.1)] * 12, "grpo": grpo}, written, ["rubric", "empathy"]
    )
    assert wins["base"]["empathy"] == {"rate": 1.0, "low": 1.0, "high": 1.0, "n": 9}
    assert wins["grpo"]["rubric"]["rate"] == pytest.approx(0.5 / 3) and wins["grpo"]["rubric"]["low"] < 0.1
    refused = Scored(0.0, refused="echo")
    invalid = {"some": [Scored(0.95), refused, refused, refused] * 3, "all": [refused] * 12}
    wins |= statistics.reference_wins(invalid, written, ["rubric"])
    assert wins["some"]["rubric"] == {"rate": 0.0, "low": 0.0, "high": 0.0, "n": 3} and "all" not in wins
    assert tables.reference_table(wins, ["some"])[1] == []  # three replies are too few
    table, notes = tables.reference_table(wins, ["base", "grpo"])
    assert "100% (100% to 100%) of 9" in table.text()
    assert notes == [
        "grpo scores above the written replies on rubric, empathy: either the policy is over-optimized, or "
        "this judge reads nothing there"
    ]
    weak = {"sft": {"rubric": {"rate": 0.7, "low": 0.6, "high": 0.8, "n": 30}}}
    assert tables.reference_table(weak, ["sft"])[1] == ["written replies beat sft in under 85% on rubric"]
    rng = numpy.random.default_rng(0)
    means = statistics.witness_means({"a": [Scored(1, 0.2), Scored(1, 0.4)], "b": [Scored(1)]}, rng)
    assert means["a"]["empathy"]["mean"] == pytest.approx(0.3) and "b" not in means
