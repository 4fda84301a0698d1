"""What people said: rated replies come in from formats as published, and a judge is compared with them."""

import json

import numpy as np
import pytest
from conftest import lines_of, run
from test_judge import FakeJudge

import kardia_lite as k
from kardia.data import people
from kardia.judge import agreement
from kardia.results.tables import people_table

# A few records of each format, with texts of our own.
EPITOME = """sp_id,rp_id,seeker_post,response_post,level,rationales
a_1,r_1,"My dog died, and the house is so quiet","Oh no, I am so sorry. That quiet is hard.",2,so sorry|
a_2,r_2,Failed the exam again,You can retake it in May.,0,
a_3,r_3,"He said ""no"" twice",Hm.,1,
"""
USR = [
    {
        "context": "hi , how are you ?\nfine , i just fed my geese .\n",
        "fact": "i keep geese .",
        "responses": [
            {"response": "how many geese do you have ?\n", "model": "human"}
            | {"Natural": [3, 3, 3], "Maintains Context": [3, 3, 2], "Overall": [5, 5, 4], "Engaging": [3]},
            {"response": "i am a lawyer lawyer .\n", "model": "seq2seq"}
            | {"Natural": [1, 1, 2], "Maintains Context": [1, 1, 1], "Overall": [1, 2, 1], "Engaging": [1]},
        ],
    }
]
DIASAFETY = [
    {"context": "I feel dizzy", "response": "Sit down, and ring a doctor.", "label": "Safe", "category": "x"},
    {"context": "I feel dizzy", "response": "Have another drink.", "label": "Unsafe", "category": "x"},
]
GRADE = [
    {"Dataset": "empatheticdialogues_eval", "Context": "I lost my keys.|||Oh no! Where?|||On the ice."}
    | {"Response": "Did they fall through?", "HumanScores": "[5, 5, 4, 5]"},
    {"Dataset": "empatheticdialogues_eval", "Context": "I lost my keys.|||Oh no! Where?|||On the ice."}
    | {"Response": "I like ice cream.", "HumanScores": [1, 2, 1, 1]},
    {"Dataset": "dailydialog", "Context": "Hi.", "Response": "Hello.", "HumanScores": [3, 3]},
]
COLA = 'gj04\t1\t\tThe geese that he fed were loud.\ngj04\t0\t*\tHe fed the "geese were loud.\n'
FILES = {
    "epitome": ("emotional-reactions-reddit.csv", EPITOME),
    "usr": ("pc_usr_data.json", json.dumps(USR)),
    "diasafety": ("val.json", json.dumps(DIASAFETY)),
    "grade": ("human_judgement.json", json.dumps(GRADE)),
    "cola": ("in_domain_dev.tsv", COLA),
}


def source_of(kind, directory):
    name, text = FILES[kind]
    (directory / name).write_text(text, encoding="utf-8-sig")  # a BOM, as Windows tools leave it
    return directory / name


@pytest.mark.parametrize(
    ("kind", "sets"),
    [
        ("epitome", {("epitome-emotional-reactions", "empathy"): (1, 1, 1)}),
        ("usr", {("usr-personachat", c): (1, 1, 0) for c in ("fluency", "relevance", "overall")}),
        ("diasafety", {("diasafety-val", "safety"): (1, 1, 0)}),
        (
            "grade",
            {
                ("grade-empatheticdialogues", "relevance"): (1, 1, 0),
                ("grade-dailydialog", "relevance"): (0, 0, 1),
            },
        ),
        ("cola", {("cola", "fluency"): (1, 1, 0)}),
    ],
)
def test_formats_as_published(kind, sets, tmp_path):
    counts = people.import_rated(source_of(kind, tmp_path), kind, tmp_path / "out.jsonl")
    assert {key: (n["high"], n["low"], n["between"]) for key, n in counts.items()} == sets
    rows = people.load_rated(tmp_path / "out.jsonl", ["empathy", "safety", "relevance", "fluency"])
    assert sorted(row["y"] for row in rows) == [0] * (len(rows) // 2) + [1] * (len(rows) // 2)
    assert all(row["messages"][-1]["role"] == "user" and row["response"].strip() for row in rows)
    roles = [message["role"] for message in rows[0]["messages"]]
    assert roles == {"usr": ["assistant", "user"], "grade": ["user", "assistant", "user"]}.get(kind, ["user"])


def test_what_is_no_such_file_is_one_line_and_nothing_is_written(tmp_path):
    target = tmp_path / "out.jsonl"
    for kind in FILES:
        for number, (name, text) in enumerate(FILES.values()):
            wrong = tmp_path / f"{number}-{name}"
            wrong.write_text(text, encoding="utf-8")
            if FILES[kind] == (name, text):
                continue
            result = run(f"data import {wrong} --format {kind} --out {target}", ok=False)
            assert result.exit_code == 1 and len(result.output.strip().splitlines()) == 1, (kind, name)
            assert kind in result.output and not target.exists()
    for bad, why in (("none.csv", "cannot be read"), (".", "a directory")):
        result = run(f"data import {tmp_path / bad} --format epitome --out {target}", ok=False)
        assert result.exit_code == 1 and why in result.output
    (tmp_path / "between.csv").write_text("\n".join([EPITOME.splitlines()[0], "a,b,Hm,Hm,1,"]))
    result = run(f"data import {tmp_path}/between.csv --format epitome --out {target}", ok=False)
    assert "no reply in it that people rated clearly" in result.output


def test_flaws_of_a_rated_file_are_lines(tmp_path):
    good = {"set": "mine", "criterion": "empathy", "y": 1, "response": "Oh."}
    good["messages"] = [{"role": "user", "content": "hi"}]
    flaws = [good | {"y": 2}, good | {"y": True}, good | {"response": " "}, good | {"messages": 3}, [1]]
    for wrong in ([], [{"role": "listener", "content": "hi"}], [{"role": "user", "content": None}]):
        flaws.append(good | {"messages": wrong})
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, flaws)), encoding="utf-8")
    with pytest.raises(k.UserError) as error:
        people.load_rated(path, ["empathy"])
    found = [line.split(" / ")[0].split(": found ")[1] for line in error.value.message.splitlines()]
    assert found == ["y = 2", "y = True", "response = ", "messages = 3", "list"] + found[5:]
    assert len(found) == 8 and all(line.startswith("messages = [") for line in found[5:])
    result = run(f"judge exam --people {tmp_path}/none.jsonl", ok=False)
    assert result.exit_code == 1 and "no such file of rated replies" in result.output
    path.write_text(json.dumps(good | {"criterion": "charm"}), encoding="utf-8")
    with pytest.raises(k.UserError, match="no rated reply for empathy or overall"):
        people.load_rated(path, ["empathy"])


def test_auc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    scores, rated = rng.integers(0, 6, 60) / 5, rng.integers(0, 2, 60)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[rated == 1] for b in scores[rated == 0]]
    value = agreement.auc(scores, rated)
    assert value == pytest.approx(sum(pairs) / len(pairs))
    low, high = agreement.auc_interval(scores, rated)
    assert low < value < high and 0.1 < high - low < 0.4
    assert agreement.auc([1.0, 2.0], [1, 1]) is None and agreement.auc([], []) is None


def test_a_judge_is_compared_with_people_once_and_the_result_is_kept(rubric, tmp_path):
    rows = [
        {"set": "posts", "criterion": criterion, "y": i % 2, "response": ("kind " if i % 2 else "cold ") * 3}
        | {"messages": [{"role": "user", "content": f"post {i}"}]}
        for criterion in ("empathy", "overall")
        for i in range(20)
    ]
    path = tmp_path / "posts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    asked = []

    def number(reply, criterion, method):
        asked.append(criterion)
        if criterion == "safety" and "post 3" in reply.messages[0][1]:
            return None
        return float(reply.reply.startswith("kind"))

    judge = FakeJudge(rubric, number)
    found = agreement.compare_with_people(judge, "judge-a", path)
    empathy, overall = found
    assert (empathy["n"], empathy["auc"], empathy["unknown"]) == (20, 1.0, 0) and empathy["length"] == 0.5
    assert (overall["n"], overall["auc"], overall["unknown"]) == (19, 1.0, 1)  # one criterion is not known
    assert asked.count("empathy") == 40 and asked.count("fluency") == 20
    assert agreement.compare_with_people(judge, "judge-a", path) == found and len(asked) == 120
    assert agreement.known_agreement("judge-a") == found and agreement.known_agreement("judge-b") == []
    again = [entry | {"auc": 0.9} for entry in found]
    assert agreement.merged([found, again]) == again  # a corrected file takes the place of the old one
    coin = {"set": "s", "criterion": "safety", "n": 9, "auc": 0.5, "low": 0.3, "high": 0.7, "length": None}
    wrong = coin | {"auc": 0.2, "low": 0.1, "high": 0.4}
    text = people_table([*found, coin, wrong]).text()
    assert [text.count(word) for word in ("agrees", "no better than a coin", "CONTRADICTS")] == [2, 1, 1]


@pytest.mark.slow
def test_the_exam_command_reports_people(pairs, tmp_path):
    """The whole way: a published file, rows, the exam with AUC, and the same result in the JSON."""
    run(f"data import {source_of('diasafety', tmp_path)} --format diasafety --out {tmp_path}/rated.jsonl")
    assert len(lines_of(tmp_path / "rated.jsonl")) == 2
    line = f"judge exam --pairs {pairs} --people {tmp_path}/rated.jsonl --json {tmp_path}/exam.json"
    output = run(line).output
    assert "what people rated" in output and "diasafety-val, safety" in output
    found = json.loads((tmp_path / "exam.json").read_text(encoding="utf-8"))["people"]
    assert [(entry["set"], entry["n"]) for entry in found] == [("diasafety-val", 2)]
