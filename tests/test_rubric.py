"""rubrics.yaml: the shipped file loads, every mistake is one line with file and key."""

import pytest
import yaml

import kardia_lite as k

SHIPPED = k.HERE / "rubrics.yaml"


def test_the_shipped_rubric(rubric):
    assert [c.name for c in rubric.criteria] == ["relevance", "empathy", "persona_consistency", "safety", "fluency"]
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
        (lambda r: r["emotions"].update(sad=["Faithful"]), "emotions.sad: found 'Faithful' / expected a word that does not already mean 'faithful'"),
        (lambda r: r["emotions"].update(sad=["blue"], lonely=["Blue"]), "expected a word that does not already mean"),
        (lambda r: r["criteria"][0].update(cues=5), "criteria[0].cues: found '5'"),
        (lambda r: r["criteria"][0].update(method=[]), "criteria[0].method"),
        (lambda r: r["criteria"][0].update(method=["ask", "ask"]), "criteria[0].method"),
        (lambda r: r["criteria"][0].update(ask=3), "criteria[0].ask"),
    ],
)
def test_mistakes_name_file_and_key(tmp_path, change, message):
    content = yaml.safe_load(SHIPPED.read_text())
    change(content)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(k.UserError) as error:
        k.load_rubric(path)
    assert str(path) in error.value.message and message in error.value.message and "\n" not in error.value.message


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "", "!!python/object/apply:os.system ['true']", "\x00"])
def test_what_is_no_rubric(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(k.UserError, match="mine.yaml"):
        k.load_rubric(path)


def test_dropped_criteria_keep_their_place_but_no_weight(rubric):
    left = rubric.without(["safety"])
    assert left.weights["safety"] == 0 and left.weights["empathy"] == 1 and len(left.criteria) == 5
