"""A bigger judge teaches a small one: what is read, kept, compared, and learned."""

import json
from types import SimpleNamespace

import pytest
from conftest import run

import kardia_lite as k
from kardia.judge import teacher, train
from kardia.judge.judge import JudgedReply


def row(reply, said="It rains.", **more):
    return {"messages": [{"role": "user", "content": said}], "response": reply, **more}


def write(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


class Teacher:
    """Longer is better; counts what it is asked."""

    asked: list[str] = []
    info = {"n_params": 2 * 10**9, "gpu": False}

    def __init__(self, *arguments, gpu_layers):
        pass

    def numbers(self, replies, wanted, guarded):
        assert {method for _, method in wanted} == {"likert"} and not guarded
        assert len({reply.context for reply in replies}) == 1  # a conversation is decoded once
        Teacher.asked += [reply.reply for reply in replies]
        raws = [float(len(reply.reply)) for reply in replies]
        return [{(c.name, m): raw if c.name == "empathy" else None for c, m in wanted} for raw in raws]


@pytest.fixture
def judge(monkeypatch, tmp_path):
    monkeypatch.setattr(teacher, "Judge", Teacher)
    monkeypatch.setattr(teacher, "cache_directory", lambda: tmp_path)
    Teacher.asked = []
    return write(tmp_path / "big.gguf", "weights")


def test_replies_of_files_and_of_runs(tmp_path, rubric):
    spans = {"understanding": "u", "reasoning": "r", "emotion": "sad", "response": "Oh no."}
    drawn = {"completion": k.render_answer(spans), "person": "Ana", "situation": "Rain."}
    unformed = {**drawn, "completion": "no spans"}
    run_directory = tmp_path / "run"
    run_directory.mkdir()
    asked = row("x")["messages"]
    lines = [{"messages": asked, **facts} for facts in (drawn, drawn, unformed)]
    write(run_directory / "completions.jsonl", *lines)
    snow = [row(text, said="It snows.") for text in "cd"]
    file = write(tmp_path / "mine.jsonl", row("a"), row("b"), row("a"), *snow)
    found = teacher.load_replies([run_directory, file], rubric)
    assert [reply.reply for reply in found] == ["Oh no.", "a", "b", "c", "d"]  # each once
    assert found[0] == JudgedReply("Ana", "Rain.", (("user", "It rains."),), "Oh no.")


def test_mistakes_in_replies(tmp_path, rubric):
    for rows, expected in (
        ([row("a"), {"messages": 5}], r"mine.jsonl:2: found .* / expected \{messages: "),
        ([row("a"), row("b", said="It snows.")], "2 different replies, and not two conversations"),
    ):
        with pytest.raises(k.UserError, match=expected):
            teacher.load_replies([write(tmp_path / "mine.jsonl", *rows)], rubric)
    with pytest.raises(k.UserError, match="no such file; expected JSONL rows"):
        teacher.load_replies([tmp_path / "none.jsonl"], rubric)
    for line in ("--teacher x.gguf", "--replies x.jsonl"):
        result = run(f"judge train {line} --out {tmp_path}/j.gguf", ok=False)
        assert result.exit_code == 1 and "--teacher needs --replies" in result.output


def test_nothing_is_read_twice(judge, rubric, tmp_path):
    replies = [JudgedReply("", "", (("user", "hi"),), text) for text in ("a", "bb", "ccc")]
    first = teacher.read_by_teacher(None, judge, replies[:2], rubric)
    kept = next(tmp_path.glob("teacher-*.jsonl"))
    with open(kept, "a", encoding="utf-8") as file:
        file.write('{"reply": "torn')  # killed while writing
    again = teacher.read_by_teacher(None, judge, replies, rubric)
    assert teacher.read_by_teacher(None, judge, replies, rubric) == again
    assert Teacher.asked == ["a", "bb", "ccc"]
    assert again[:2] == first == [(replies[0], {"empathy": 1.0}), (replies[1], {"empathy": 2.0})]


def test_soft_pairs_follow_the_teacher_and_hold_conversations_out(rubric):
    readings = [
        (JudgedReply("", "", (("user", f"turn {i}"),), f"reply {n}"), {"empathy": float(n)})
        for i in range(16)
        for n in (1, 2, 4, 4)
    ]
    learn, test = teacher.soft_pairs(readings, seed=0)
    assert (len(learn), len(test)) == (14 * teacher.MOST, 2 * teacher.MOST)
    said = [{pair["messages"][0]["content"] for pair in pairs} for pairs in (learn, test)]
    assert len(said[1]) == 2 and not said[0] & said[1]
    by_gap = {}
    for pair in learn + test:
        gap = int(pair["better"][-1]) - int(pair["worse"][-1])
        by_gap.setdefault(gap, set()).add(round(pair["target"], 6))
    assert set(by_gap) <= {1, 2, 3} and all(len(targets) == 1 for targets in by_gap.values())
    targets = [by_gap[gap].pop() for gap in sorted(by_gap)]
    assert targets == sorted(targets) and 0.5 < targets[0] < targets[-1] < 1
    with pytest.raises(k.UserError, match="tells too few replies apart"):
        teacher.soft_pairs([(reply, {"empathy": 3.0}) for reply, _ in readings], seed=0)


def test_soft_targets_are_learned_as_they_are(tiny):
    """A target of 0.7 draws the margins to log(0.7 / 0.3) apart, and no further."""
    import math

    from test_judge import tiny_judge

    model, margins = tiny_judge(tiny, [], "?", "fluency", 8)
    facts = {"criterion": "fluency", "person": "", "situation": "", "messages": row("x")["messages"]}
    pair = {**facts, "better": "abc", "worse": "zyx", "target": 0.7}
    options = SimpleNamespace(epochs=60, learning_rate=1e-2, batch_size=1, seed=0)
    train.train(model, margins, [pair], options, lambda *_: None)
    better, worse = margins(pair).tolist()
    assert better - worse == pytest.approx(math.log(0.7 / 0.3), abs=0.05)
