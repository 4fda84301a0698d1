"""rubrics.yaml: the shipped file loads, every mistake is one line with file and key."""

import functools

import pytest
import yaml

import kardia_lite as k
from kardia.core.options import PROJECT
from kardia.data.rubric import GUARDS, METHODS, AnswerFormat
from kardia.judge.judge import JudgedReply

SHIPPED = PROJECT / "rubrics.yaml"
CODE_REVIEW = PROJECT / "tests" / "code_review"


def test_the_shipped_rubric(rubric):
    names = ["relevance", "empathy", "persona_consistency", "safety", "fluency"]
    assert [c.name for c in rubric.criteria] == names
    assert rubric.rewards == {"format": 1 / 3, "emotion": 1 / 3, "rubric": 1 / 3}
    assert len(rubric.emotions) == 32 and rubric.labels["heartbroken"] == "devastated"
    assert len(set(rubric.labels.values())) == 32 and rubric.guards is None
    assert rubric.hash == "87b6469ab9b11c1c"  # exams are cached under it: it changes with the criteria only


MISTAKES = yaml.safe_load((PROJECT / "tests" / "rubric_mistakes.yaml").read_text(encoding="utf-8"))
NO_RUBRICS = ["a: [", "- 1\n- 2", "", "!!python/object/apply:os.system ['true']", "\x00", "a: &x 1\nb: *x"]
NO_RUBRICS.append("a: " + "1" * 5000)


def changed(root, changes):
    """The rubric with {"criteria.1.name": value} set; None deletes."""
    for path, value in changes.items():
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        node = functools.reduce(lambda node, part: node[part], parents, root)
        node[last] = value
        if value is None:
            del node[last]
    return yaml.safe_dump(root)


def test_mistakes_name_file_and_key(tmp_path):
    path, wrong = tmp_path / "mine.yaml", []
    shipped, _, _ = SHIPPED.read_text(encoding="utf-8").partition("emotions:\n")
    shipped += "emotions: {sad: [unhappy], faithful: [loyal], lonely: []}\n"
    texts = [(changed(yaml.safe_load(shipped), changes), expected) for changes, expected in MISTAKES]
    for text, expected in [*texts, *((text, "mine.yaml") for text in NO_RUBRICS)]:
        path.write_text(text)
        with pytest.raises(k.UserError) as error:
            k.load_rubric(path)
        message = error.value.message
        if str(path) not in message or expected not in message or "\n" in message:
            wrong.append((expected, message))
    assert wrong == []


def test_guards_can_be_chosen(tmp_path, rubric):
    path = tmp_path / "mine.yaml"
    hashes = {rubric.hash}
    for guards in ([], ["echo", "insult"], list(GUARDS)):
        path.write_text(f"{SHIPPED.read_text(encoding='utf-8')}\nguards: {guards}\n", encoding="utf-8")
        mine = k.load_rubric(path)
        assert mine.guards == tuple(guards) and mine.criteria == rubric.criteria
        hashes.add(mine.hash)
    assert len(hashes) == 4  # another choice is another exam


def test_dropped_criteria_keep_their_place_but_no_weight(rubric):
    left = rubric.without(["safety"])
    assert left.weights["safety"] == 0 and left.weights["empathy"] == 1 and len(left.criteria) == 5


def test_what_each_method_asks(rubric):
    persona = next(c for c in rubric.criteria if c.name == "persona_consistency")
    asked = {method: [cue.text for cue in persona.cues_of(method)] for method in (*METHODS, "held_out")}
    assert (
        asked["ask"] == ["\nDoes the reply fit this person? Answer:"]
        and asked["pmi"] == asked["likert"] == []
    )
    assert asked["held_out"] == [persona.held_out] and asked["contrast"] == ["\nUser:"]


def test_without_an_answer_block_the_format_is_the_default(tmp_path, rubric):
    content = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    del content["answer"]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(content))
    assert k.load_rubric(tmp_path / "old.yaml").form == rubric.form == k.DEFAULT_FORMAT


def test_another_task_has_other_spans_labels_and_prompt():
    rubric = k.load_rubric(CODE_REVIEW / "rubrics.yaml")
    assert rubric.form.names == ("change", "risk", "verdict", "comment")
    assert set(rubric.rewards) == {"format", "verdict", "rubric"} and rubric.labels["lgtm"] == "approve"
    assert AnswerFormat.of(rubric.form.facts()) == rubric.form  # through run.json and back
    assert AnswerFormat.of(None) == k.DEFAULT_FORMAT
    rows = k.load_rows([CODE_REVIEW / "dialogues.jsonl"], rubric, "dialogue")
    assert {row.label for row in rows} == set(rubric.labels.values())
    system = k.chat_messages(rows[0], 1, form=rubric.form)[0]["content"]
    assert system.startswith(
        "You review code changes for a colleague. Answer in four spans: <|change_begin|>"
    )
    assert rows[0].person in system
    text = rows[0].messages[1][1]
    answers = [text, text.replace("request_changes", "approve"), "lgtm"]
    reward = k.score_answers([(rows[0], answer) for answer in answers], rubric, None)
    assert [r.components["format"] for r in reward] == [1, 1, 0]
    assert [r.components["verdict"] for r in reward] == [1, 0, 0]
    judged = JudgedReply.from_dialogue(rows[0], "x", rubric.form)
    assert judged.messages[1][1] == k.find_span(text, "comment")  # the judge sees no spans around it


def test_rows_of_another_task_are_refused_by_name(rubric):
    with pytest.raises(k.UserError, match="emotion = None / expected emotion: a text"):
        k.load_rows([CODE_REVIEW / "dialogues.jsonl"], rubric)
