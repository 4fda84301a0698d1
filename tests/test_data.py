"""Rows: errors come all at once with their line; the shipped files keep what data/README.md promises."""

import json
import re
from collections import Counter

import pytest

import kardia_lite as k
from kardia.data import overview

ANSWER = k.render_answer({"understanding": "u", "reasoning": "r", "emotion": "sad", "response": "p"})


def row(**changes):
    value = {
        "person": "Ana, 40.",
        "mbti": "ISFJ",
        "emotion": "sad",
        "situation": "Rain.",
        "anon_username": "a",
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ANSWER}],
    }
    return {key: v for key, v in {**value, **changes}.items() if v is not ...}


def messages(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def write(path, *rows):
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return path


def test_a_good_row_and_a_prompt(tmp_path, rubric):
    path = write(
        tmp_path / "d.jsonl",
        row(),
        "",
        row(messages=messages(("user", "hi"))),
        row(mbti=..., anon_username=...),
    )
    rows = k.load_rows([path], rubric)
    assert [r.is_prompt for r in rows] == [False, True, False]
    assert rows[0].where == f"{path}:1" and rows[1].where == f"{path}:3"


@pytest.mark.parametrize(
    ("bad", "found", "expected"),
    [
        ("{", "found '{'", "one JSON object per line"),
        ("[1]", "found list", "a JSON object"),
        (row(person=...), "person = None", "person: a text"),
        (row(emotion="gloomy"), "emotion 'gloomy'", "one of the labels"),
        (row(emotion="heartbroken"), "emotion 'heartbroken'", "is it 'devastated'?"),
        (row(messages=[]), "messages", "a list of"),
        (row(messages=messages(("assistant", ANSWER))), "messages[0].role 'assistant'", "'user'"),
        (row(messages=messages(("user", "a"), ("user", "b"))), "messages[1].role 'user'", "'assistant'"),
        (row(messages=messages(("user", " "))), "messages[0] without content", "a text"),
        (
            row(messages=messages(("user", "a"), ("assistant", "plain"))),
            "<|understanding_begin|> is missing",
            "in this order",
        ),
        (
            row(messages=messages(("user", "a"), ("assistant", ANSWER.replace("sad", "gloomy")))),
            "emotion span 'gloomy'",
            "one of the labels",
        ),
        (row(mbti=3), "mbti = 3", "mbti: a text"),
        ("[" * 100_000, "nested too deeply", "one JSON object"),
    ],
)
def test_errors_name_the_line(tmp_path, rubric, bad, found, expected):
    path = write(tmp_path / "d.jsonl", row(), bad)
    with pytest.raises(k.UserError) as error:
        k.load_rows([path], rubric)
    line = error.value.message.splitlines()[1]
    assert line.startswith(f"{path}:2: found") and found in line and expected in line


def test_a_mood_may_change_within_a_dialogue(tmp_path, rubric):
    turns = (
        ("user", "a"),
        ("assistant", ANSWER),
        ("user", "b"),
        ("assistant", ANSWER.replace("sad", "hopeful")),
    )
    (row_,) = k.load_rows([write(tmp_path / "d.jsonl", row(messages=messages(*turns)))], rubric)
    assert "1 of 2 answers name another emotion than their row" in "\n".join(
        overview.describe([row_], sorted(rubric.emotions))
    )


def test_all_errors_at_once(tmp_path, rubric):
    path = write(tmp_path / "d.jsonl", "{", row(emotion="x"), row(person=""), *["nope"] * 100)
    with pytest.raises(k.UserError) as error:
        k.load_rows([path], rubric)
    lines = error.value.message.splitlines()
    assert lines[0].startswith("103 problems") and len(lines) == 52 and lines[-1] == "... and 53 more"


def test_bom_and_crlf_are_fine(tmp_path, rubric):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row()).encode() + b"\r\n")
    assert len(k.load_rows([path], rubric)) == 1


def test_only_a_line_feed_ends_a_row(tmp_path, rubric):
    """U+2028, U+2029 and U+0085 are line ends to str.splitlines and may stand inside anybody's text."""
    text = "one\u2028two\u2029three\u0085four"
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row(situation=text), ensure_ascii=False) + "\n", encoding="utf-8")
    assert k.load_rows([path], rubric)[0].situation == text


def test_not_utf8(tmp_path, rubric):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(k.UserError, match="not UTF-8"):
        k.load_rows([path], rubric)


def test_prompts_where_dialogues_are_wanted(tmp_path, rubric):
    path = write(tmp_path / "d.jsonl", row(messages=messages(("user", "hi"))))
    with pytest.raises(k.UserError, match="expected a dialogue"):
        k.load_rows([path], rubric, "dialogue")


def load(name, rubric):
    return k.load_rows([k.DATA / name], rubric)


def test_shipped_data_is_balanced_and_splits_share_no_person(rubric):
    files = {name: load(f"{name}.jsonl", rubric) for name in ("dialogues", "eval", "prompts")}
    for name, (count, per_emotion) in {"dialogues": (128, 4), "eval": (64, 2), "prompts": (320, 10)}.items():
        assert len(files[name]) == count and set(Counter(r.label for r in files[name]).values()) == {
            per_emotion
        }
    persons = {name: {r.person for r in rows} for name, rows in files.items()}
    assert len(persons["dialogues"]) >= 40
    assert not persons["eval"] & (persons["dialogues"] | persons["prompts"])
    assert not any(r.is_prompt for r in files["dialogues"] + files["eval"]) and all(
        r.is_prompt for r in files["prompts"]
    )


def spans_of(*rows):
    """(row, span name, text) of every assistant span."""
    for r in rows:
        for role, content in r.messages:
            if role == "assistant":
                yield from ((r, name, text) for name, text in k.parse_answer(content).items())


@pytest.mark.parametrize("name", ["dialogues", "eval"])
def test_shipped_answers_have_the_papers_lengths(name, rubric):
    """KardiaBench's means are 41, 53 and 27 words (arXiv 2512.01282); a response is never longer than 35."""
    words = {}
    for _, span, text in spans_of(*load(f"{name}.jsonl", rubric)):
        words.setdefault(span, []).append(len(text.split()))
    for span, expected in {"understanding": 41, "reasoning": 53, "response": 27}.items():
        assert abs(sum(words[span]) / len(words[span]) - expected) < 2, span
    assert max(words["response"]) <= 35 and min(words["response"]) < 20
    questions = [
        text.endswith("?") for _, span, text in spans_of(*load(f"{name}.jsonl", rubric)) if span == "response"
    ]
    assert (
        0.4 < sum(questions) / len(questions) < 0.75
    )  # a listener who always ends with a question is an interviewer


def test_shipped_texts_are_written_not_generated(rubric):
    """No two spans begin alike (four words), hardly any five-word run recurs between rows, no two rows are alike."""
    rows = load("dialogues.jsonl", rubric) + load("eval.jsonl", rubric)
    openings = Counter(
        (span, *overview.words(text)[:4]) for _, span, text in spans_of(*rows) if span != "emotion"
    )
    assert max(openings.values()) == 1
    rows += load("prompts.jsonl", rubric)
    runs = {}
    for i, r in enumerate(rows):
        for text in [
            r.situation,
            *[text for role, text in r.messages if role == "user"],
            *[text for _, _, text in spans_of(r)],
        ]:
            for run in overview.shingles(text) if len(overview.words(text)) >= 5 else []:
                runs.setdefault(run, set()).add(i)
    assert sum(len(where) > 1 for where in runs.values()) < 0.001 * len(runs)
    assert not overview.near_duplicates(map(overview.question, rows), 0.1) and not overview.near_duplicates(
        map(overview.answers, rows), 0.1
    )


CLAIMS = re.compile(
    r"\b(as a (human|person|mother|father|parent) (myself|too)|i('m| am) (a )?(human|person|too)\b|when i was (a child|young|your age|little)|my (own )?(mother|father|wife|husband|childhood|kids|therapist)"
    r"|i('ve| have) been there|it happened to me|i (once )?(lost|buried) my)",
    re.I,
)
DIAGNOSES = re.compile(
    r"\byou('re| are|'ve| have)? (probably |clearly |may |might )?(have |are suffering from |suffer from )?(clinical(ly)? )?(depress(ed|ion)|ptsd|bipolar|an? (anxiety|panic|eating|personality) disorder|adhd|autis(m|tic))",
    re.I,
)
MEDICATION = re.compile(
    r"\b(\d+ ?mg|dos(e|age)s? of|(take|try|stop|skip|double|halve|start) (taking )?(your|the|some|more|fewer|a) (pills?|tablets?|meds|medication|antidepressants?|sertraline|insulin|painkillers?|sleeping))\b",
    re.I,
)


def test_shipped_responses_claim_no_humanity_and_give_no_diagnosis_or_medication_advice(rubric):
    for r, span, text in spans_of(*load("dialogues.jsonl", rubric), *load("eval.jsonl", rubric)):
        if span == "response":
            for pattern in (CLAIMS, DIAGNOSES, MEDICATION):
                assert not pattern.search(text), (r.where, text)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (CLAIMS, "I've been there, it gets better."),
        (CLAIMS, "My own mother said so."),
        (DIAGNOSES, "You clearly have depression."),
        (DIAGNOSES, "you have PTSD"),
        (MEDICATION, "Just double your pills tonight."),
        (MEDICATION, "50 mg will do"),
        (MEDICATION, "stop taking the medication"),
    ],
)
def test_the_patterns_above_can_fail(pattern, text):
    assert pattern.search(text)


CRISIS = re.compile(
    r"(kill(ing)? (myself|himself|herself|him|her)|end(ing)? (it|my life|things)\b|not (be|wake up|wake) (here|any ?more)|don'?t want to (live|wake|be here)|suicid|hurt(ing)? myself|cut(ting)? myself|better off without me"
    r"|want(ed)? to (die|live)|not wanted to live|want(ed)? to hurt|deleting myself|shoved me|beats? me|choke|strangl|overdos|took (too many|all)|pills|chest pain|not breathing|won'?t wake)",
    re.I,
)
HELP = re.compile(
    r"(emergency|ambulance|crisis line|helpline|lifeline|hotline|call|ring|phone|doctor|pharmacist|nurse|police|hospital|someone|somebody|neighbour|tell \w+|with you)",
    re.I,
)


@pytest.mark.parametrize(("name", "at_least"), [("dialogues", 6), ("eval", 3)])
def test_shipped_dialogues_that_touch_crisis_point_to_help(name, at_least, rubric):
    touched = [r for r in load(f"{name}.jsonl", rubric) if CRISIS.search(f"{r.situation} {r.messages[0][1]}")]
    assert len(touched) >= at_least
    for r in touched:
        responses = [text for _, span, text in spans_of(r) if span == "response"]
        assert any(HELP.search(text) for text in responses), (r.where, responses)


TRAPS = {
    "longer_worse",
    "flowery",
    "quotes_rubric",
    "asks_for_5",
    "repeats_user",
    "safe_but_empty",
    "warm_ignores_persona",
    "fluent_but_dangerous",
    "shorter_better",
}


def test_the_judge_exam_has_its_hard_pairs_and_does_not_reward_length(rubric):
    from kardia.judge import exam

    pairs = exam.load_pairs(k.DATA / "judge_exam.jsonl", [c.name for c in rubric.criteria])
    assert len(pairs) >= 120 and min(Counter(p["criterion"] for p in pairs).values()) >= 20
    assert TRAPS <= {p["trap"] for p in pairs}
    longer = sum(len(p["better"]) > len(p["worse"]) for p in pairs) / len(pairs)
    assert 0.45 <= longer <= 0.55
    for p in pairs:
        assert not any(pattern.search(p["better"]) for pattern in (CLAIMS, DIAGNOSES)), p["better"]
    persons = {p["person"] for p in pairs}
    assert not any(
        r.person in persons
        for name in ("dialogues", "eval", "prompts")
        for r in load(f"{name}.jsonl", rubric)
    )
