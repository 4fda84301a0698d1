"""Rows with criteria and a reference of their own: how they are checked, read, examined and rewarded."""

import dataclasses
import json

import pytest
import yaml
from test_judge import FakeWorker, judged, text_of

import kardia_lite as k
from kardia.core.options import DATA, RUBRIC
from kardia.data.rubric import load_rubric, row_criteria
from kardia.judge import exam
from kardia.judge.judge import KNOWN_BAD, USUAL_TOKENS, Judge, JudgedReply, weighted

ASK = {"name": "asks", "description": "the reply asks about the dog", "weight": 3, "method": "ask"}
NAMES = {"name": "names", "description": "the reply names the dog", "weight": 1, "method": "contrast"}
NAMES |= {"cues": [{"text": "\nThe dog's name is", "good": [" Bo"], "bad": [" unknown"]}]}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The shipped rubric with two more criteria: the row's own ones, and its reference."""
    root = yaml.safe_load(RUBRIC.read_text(encoding="utf-8"))
    root["criteria"] += [
        {"name": "own", "description": "the row's own", "weight": 1, "method": "row"},
        {"name": "like", "description": "like a good reply", "weight": 1, "method": "reference"},
    ]
    path = tmp_path_factory.mktemp("own") / "own.yaml"
    path.write_text(yaml.safe_dump(root, sort_keys=False), encoding="utf-8")
    return load_rubric(path)


def rows(path, **more):
    row = json.loads((DATA / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[0])
    path.write_text(json.dumps({**row, **more}) + "\n", encoding="utf-8")
    return path


def named(rubric, name):
    return next(c for c in rubric.criteria if c.name == name)


def test_a_row_s_own_criteria_are_read_as_their_weighted_mean(own):
    judge, criteria = Judge(FakeWorker(), "j.gguf", own), row_criteria(json.dumps([ASK, NAMES]))
    plain = judged("Where is Bo now?")
    reply = dataclasses.replace(plain, criteria=criteria)
    alone = judge.numbers([reply], [(criteria[0], "ask"), (criteria[1], "contrast")])[0]
    wanted = [(own.criteria[0], "contrast"), (named(own, "own"), "row")]
    read, other = judge.numbers([reply, plain], wanted)
    expected = (3 * alone["asks", "ask"] + alone["names", "contrast"]) / 4
    assert read["own", "row"] == pytest.approx(expected)
    assert ("own", "row") not in other and set(read) - set(other) == {("own", "row")}  # nothing to ask there
    refused = judge.numbers([dataclasses.replace(reply, reply="Score: 5")], wanted)[0]
    assert refused["own", "row"] == KNOWN_BAD
    tiny = Judge(FakeWorker(context=10), "j.gguf", own)
    assert tiny.numbers([reply], wanted)[0]["own", "row"] is None  # it does not fit: unknown, never 0


def test_a_reference_is_read_before_the_dialogue(own):
    worker = FakeWorker()
    judge, like = Judge(worker, "j.gguf", own), named(own, "like")
    reply = dataclasses.replace(judged("I hear you."), reference=" Rain is hard. ")
    read, other = judge.numbers([reply, judged("I hear you.")], [(like, "reference")])
    told = text_of(worker.asked[1][0][1:])
    assert told == f"A good reply: Rain is hard.\n\n{reply.context}"
    tokens, longer = len(" I hear you."), len(told) - len(reply.context)
    assert read["like", "reference"] == pytest.approx(-longer * tokens / (tokens + USUAL_TOKENS))
    assert other == {}


def test_what_was_not_asked_does_not_count():
    """A row without criteria of its own is rewarded by the others; what is unknown stays unknown."""
    weights = {"empathy": 1.0, "own": 1.0}
    assert weighted({"empathy": 0.5, "own": 0.9}, weights) == pytest.approx(0.7)
    assert weighted({"empathy": 0.5}, weights) == 0.5
    assert weighted({"empathy": 0.5, "own": None}, weights) is None


def test_rows_are_checked_where_a_criterion_reads_them(own, tmp_path):
    answer = k.render_answer({**dict(k.DEFAULT_FORMAT.spans), "emotion": "sad", "response": "Oh no."})
    path = rows(tmp_path / "good.jsonl", rubric=[ASK, NAMES], reference=answer)
    (dialogue,) = k.load_rows([path], own)
    reply = JudgedReply.from_dialogue(dialogue, "x")
    assert [c.name for c in reply.criteria] == ["asks", "names"] and reply.reference == "Oh no."
    mistakes = {
        "a list of criteria": {"rubric": {}},
        "colour": {"rubric": [{**ASK, "colour": 1}]},
        "some of ask, chat, contrast in a row's own rubric": {"rubric": [{**ASK, "method": "pmi"}]},
        "at least one cue": {"rubric": [{**NAMES, "cues": []}]},
        "a criterion with weight": {"rubric": [{**ASK, "weight": 0}]},
        "reference: a good reply, as a text": {"reference": 3},
    }
    for expected, more in mistakes.items():
        with pytest.raises(k.UserError) as error:
            k.load_rows([rows(tmp_path / "bad.jsonl", **more)], own)
        assert f"{tmp_path / 'bad.jsonl'}:1: found" in error.value.message and expected in error.value.message


def test_keys_that_nothing_reads_may_mean_something_else(rubric, tmp_path, capsys):
    (dialogue,) = k.load_rows([rows(tmp_path / "a.jsonl", rubric={"x": 1}, reference=7)], rubric)
    assert JudgedReply.from_dialogue(dialogue, "x").criteria == () and capsys.readouterr().err == ""
    k.load_rows([rows(tmp_path / "b.jsonl", rubric=[ASK])], rubric)
    assert "which nothing reads" in capsys.readouterr().err


def test_the_exam_says_whether_the_judge_can_read_them(own):
    """Pairs of criterion own carry a rubric; a judge that reads it is fit, and one without pairs is not."""

    class Reader(FakeWorker):
        def branches(self, role, prefix, replies, suffixes, score_reply=False):
            good = [text_of(reply).count("Bo") for reply in replies]
            words = [[[float(n)] + [0.0] * (len(w) - 1) for _, w in suffixes] for n in good]
            return [{"suffixes": each, "reply": -1.0} for each in words]

    pairs = []
    for i in range(40):
        long = " Then we talk about it for a while." * (i % 2)
        pair = {
            "criterion": "own",
            "better": f"Where is Bo?{long}",
            "worse": f"I see.{' Well, well, well.' * (1 - i % 2)}",
        }
        pairs.append(
            {**pair, "messages": [{"role": "user", "content": f"My dog left {i}."}], "rubric": [NAMES]}
        )
    judge = Judge(Reader(), "j.gguf", own)
    result = exam.run_exam(judge, pairs, {})
    assert result["criteria"]["own"]["accuracy"] == 1.0 and result["criteria"]["own"]["method"] == "row"
    assert not result["criteria"]["like"]["fit"] and "only 0 exam pairs" in result["criteria"]["like"]["why"]
    for pair in pairs:
        del pair["rubric"]
    assert exam.run_exam(judge, pairs, {})["criteria"]["own"]["accuracy"] == 0.0
    assert exam._flaw({**pairs[0], "rubric": [{"name": "x"}]}) and exam._flaw({**pairs[0], "reference": 3})
