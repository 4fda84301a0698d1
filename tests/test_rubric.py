"""rubrics.yaml: the shipped file loads, every mistake is one line with file and key."""

import pytest
import yaml

import kardia_lite as k

SHIPPED = k.HERE / "rubrics.yaml"


def test_the_shipped_rubric(rubric):
    assert [c.name for c in rubric.criteria] == [
        "relevance",
        "empathy",
        "persona_consistency",
        "safety",
        "fluency",
    ]
    assert rubric.rewards == {"format": 1 / 3, "emotion": 1 / 3, "rubric": 1 / 3}
    assert len(rubric.emotions) == 32 and rubric.labels["heartbroken"] == "devastated"
    assert len(set(rubric.labels.values())) == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(colour=1), "rubric.colour: found 'unknown key'"),
        (lambda r: r.pop("rewards"), "rubric.rewards: found 'nothing'"),
        (lambda r: r.update(version=2), "version: found '2' / expected 1"),
        (lambda r: r["rewards"].update(format=0, emotion=0, rubric=0), "rewards: found 'all weights zero'"),
        (lambda r: r["rewards"].update(format=-1), "rewards.format"),
        (lambda r: r["rewards"].update(format=True), "rewards.format"),
        (lambda r: r["rewards"].update(format=float("nan")), "rewards.format"),
        (lambda r: r["criteria"][1].update(name="relevance"), "criteria[1].name"),
        (lambda r: r["criteria"][1].update(method="vibes"), "criteria[1].method"),
        (lambda r: r["criteria"][0].pop("cues"), "criteria[0].cues"),
        (lambda r: r["criteria"][0]["cues"][0].update(good=[]), "criteria[0].cues[0].good"),
        (lambda r: r["criteria"][0]["cues"][0].update(mood=1), "criteria[0].cues[0].mood"),
        (lambda r: [c.update(weight=0) for c in r["criteria"]], "criteria: found 'all weights zero'"),
        (lambda r: r.update(criteria=[]), "criteria"),
        (lambda r: r.update(emotions={"sad": []}), "emotions"),
        (lambda r: r.update(emotions=5), "emotions: found '5' / expected a mapping"),
        (
            lambda r: r["emotions"].update(sad=["Faithful"]),
            "emotions.sad: found 'Faithful' / expected a word that does not already mean 'faithful'",
        ),
        (
            lambda r: r["emotions"].update(sad=["blue"], lonely=["Blue"]),
            "expected a word that does not already mean",
        ),
        (lambda r: r["criteria"][0].update(cues=5), "criteria[0].cues: found '5'"),
        (lambda r: r["criteria"][0].update(method=[]), "criteria[0].method"),
        (lambda r: r["criteria"][0].update(method=["ask", "ask"]), "criteria[0].method"),
        (lambda r: r["criteria"][0].update(ask=3), "criteria[0].ask"),
        (lambda r: r["criteria"][0].update(held_out=""), "criteria[0].held_out"),
        (
            lambda r: r.update(labels={"a": [], "b": []}),
            "rubric.emotions: found 'unknown key'",
        ),  # one of the two
        (lambda r: r.update(answer=5), "answer: found '5' / expected a mapping"),
        (lambda r: r["answer"].pop("system"), "answer.system: found 'nothing'"),
        (lambda r: r["answer"].update(spans=["a", "b"]), "answer.spans"),
        (lambda r: r["answer"].update(spans={"emotion": "x"}), "answer.spans"),
        (lambda r: r["answer"]["spans"].update({"Two words": "x"}), "answer.spans: found 'Two words'"),
        (
            lambda r: r["answer"]["spans"].update({"rubric": "x"}),
            "answer.spans: found 'rubric'",
        ),  # a component of the reward already
        (lambda r: r["answer"]["spans"].update({"reasoning": 3}), "answer.spans.reasoning"),
        (
            lambda r: r["answer"].update(label="verdict"),
            "answer.label: found 'verdict' / expected one of the spans",
        ),
        (lambda r: r["answer"].update(label=["emotion"]), "answer.label"),
        (
            lambda r: r["answer"].update(reply="emotion"),
            "answer.reply: found 'emotion' / expected another span",
        ),
        (
            lambda r: r["answer"]["spans"].update(person="x") or r["answer"].update(label="person"),
            "answer.label: found 'person'",
        ),  # a key of every row
        (
            lambda r: r["answer"]["spans"].update(mood="x") or r["answer"].update(label="mood"),
            "rewards.emotion: found 'unknown key' / expected format, mood, rubric",
        ),
    ],
)
def test_mistakes_name_file_and_key(tmp_path, change, message):
    content = yaml.safe_load(SHIPPED.read_text())
    change(content)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(k.UserError) as error:
        k.load_rubric(path)
    assert (
        str(path) in error.value.message
        and message in error.value.message
        and "\n" not in error.value.message
    )


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "", "!!python/object/apply:os.system ['true']", "\x00"])
def test_what_is_no_rubric(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(k.UserError, match="mine.yaml"):
        k.load_rubric(path)


def test_dropped_criteria_keep_their_place_but_no_weight(rubric):
    left = rubric.without(["safety"])
    assert left.weights["safety"] == 0 and left.weights["empathy"] == 1 and len(left.criteria) == 5


def test_without_an_answer_block_the_form_is_kardias(tmp_path, rubric):
    content = yaml.safe_load(SHIPPED.read_text())
    del content["answer"]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(content))
    assert k.load_rubric(tmp_path / "old.yaml").form == rubric.form == k.DEFAULT_FORMAT


def test_another_task_has_other_spans_labels_and_prompt():
    rubric = k.load_rubric(k.HERE / "tests" / "code_review" / "rubrics.yaml")
    assert (
        rubric.form.names == ("change", "risk", "verdict", "comment")
        and set(rubric.rewards) == {"format", "verdict", "rubric"}
        and rubric.labels["lgtm"] == "approve"
    )
    assert (
        k.AnswerFormat.of(rubric.form.facts()) == rubric.form and k.AnswerFormat.of(None) == k.DEFAULT_FORMAT
    )  # through run.json and back
    rows = k.load_rows([k.HERE / "tests" / "code_review" / "dialogues.jsonl"], rubric, "dialogue")
    assert {row.label for row in rows} == set(rubric.labels.values())
    system = k.chat_messages(rows[0], 1, form=rubric.form)[0]["content"]
    assert (
        system.startswith("You review code changes for a colleague. Answer in four spans: <|change_begin|>")
        and rows[0].person in system
    )
    text = rows[0].messages[1][1]
    reward = k.score_answers(
        [(rows[0], text), (rows[0], text.replace("request_changes", "approve")), (rows[0], "lgtm")],
        rubric,
        None,
    )
    assert [r.components["format"] for r in reward] == [1, 1, 0] and [
        r.components["verdict"] for r in reward
    ] == [1, 0, 0]
    assert k.as_item(rows[0], "x", rubric.form).messages[1][1] == k.find_span(
        text, "comment"
    )  # the judge sees the comment, not the spans around it


def test_rows_of_another_task_are_refused_by_name(rubric):
    with pytest.raises(k.UserError, match="emotion = None / expected emotion: a text"):
        k.load_rows([k.HERE / "tests" / "code_review" / "dialogues.jsonl"], rubric)
