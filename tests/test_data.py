"""Rows: errors come all at once with their line; the shipped files keep what data/README.md promises."""

import json
import operator
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

import kardia_lite as k
from kardia.data import overview, rows

ANSWER = k.render_answer({"understanding": "u", "reasoning": "r", "emotion": "sad", "response": "p"})


def row(**changes):
    value = {"person": "Ana, 40.", "mbti": "ISFJ", "emotion": "sad", "situation": "Rain."}
    value |= {"anon_username": "a", "messages": messages(("user", "hi"), ("assistant", ANSWER)), **changes}
    return {key: v for key, v in value.items() if v is not ...}


def messages(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def answered(text):
    return messages(("user", "a"), ("assistant", text))


def write(path, *rows):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def refusal(path, rubric, kind="any"):
    with pytest.raises(k.UserError) as error:
        k.load_rows([path], rubric, kind)
    return error.value.message


def test_rows_that_are_fine(tmp_path, rubric):
    """BOM and CRLF, blank lines, missing optional keys; U+2028, U+2029 and U+0085 end no line."""
    text = "one\u2028two\u2029three\u0085four"
    path = tmp_path / "d.jsonl"
    prompt = row(messages=messages(("user", "hi")))
    lines = [row(), "", prompt, row(mbti=..., anon_username=...), row(situation=text)]
    encoded = [json.dumps(line, ensure_ascii=False) if line else "" for line in lines]
    path.write_bytes(("\ufeff" + "\r\n".join(encoded)).encode())
    found = k.load_rows([path], rubric)
    assert [r.is_prompt for r in found] == [False, True, False, False] and found[3].situation == text
    assert [r.where for r in found] == [f"{path}:{line}" for line in (1, 3, 4, 5)]
    turns = (("user", "hi"), ("assistant", ANSWER))
    assert found[0] == k.Dialogue("Ana, 40.", "ISFJ", "sad", "Rain.", "a", turns, f"{path}:1")
    assert (found[2].mbti, found[2].anon_username) == ("", "")


WRONG = [  # what stands in line 2, what is found, what is expected
    ("{", "found '{'", "one JSON object per line"),
    ("[1]", "found list", "a JSON object"),
    (row(person=...), "person = None", "person: a text"),
    (row(person=" "), "person = ", "person: a text"),
    (row(situation=["x"] * 100_000), "situation = [", "situation: a text"),
    (row(person="x" * 100_001), "person of 100,001 characters", "at most 100,000"),
    (row(emotion="gloomy"), "emotion 'gloomy'", "one of the labels"),
    (row(emotion="heartbroken"), "emotion 'heartbroken'", "is it 'devastated'?"),
    (row(messages=[]), "messages", "a list of"),
    (row(messages=[1]), "messages[0] without content", "a text"),
    (row(messages=messages(("assistant", ANSWER))), "messages[0].role 'assistant'", "'user'"),
    (row(messages=messages(("user", "a"), ("user", "b"))), "messages[1].role 'user'", "'assistant'"),
    (row(messages=messages(("user", " "))), "messages[0] without content", "a text"),
    (row(messages=messages(("user", "x" * 100_001))), "messages[0] of 100,001", "at most 100,000"),
    (row(messages=answered("plain")), "<|understanding_begin|> is missing", "this order"),
    (row(messages=answered(ANSWER.replace("sad", "gloomy"))), "emotion span 'gloomy'", "one of the labels"),
    (row(mbti=3), "mbti = 3", "mbti: a text"),
    ("[" * 100_000, "nested too deeply", "one JSON object"),
]


def test_errors_name_the_line(tmp_path, rubric):
    failures = []
    for bad, found, expected in WRONG:
        path = write(tmp_path / "d.jsonl", row(), bad)
        line = refusal(path, rubric).splitlines()[1]
        if not (line.startswith(f"{path}:2: found") and found in line and expected in line.split(" / ")[1]):
            failures.append(line)
    assert not failures


def test_all_errors_at_once(tmp_path, rubric):
    twice = row(person="", messages=messages(("user", "a"), ("user", "b")))  # person, role, and no four spans
    path = write(tmp_path / "d.jsonl", "{", row(emotion="x"), twice, *["nope"] * 100)
    lines = refusal(path, rubric).splitlines()
    assert lines[0] == "105 problems in the data:" and len(lines) == 52 and lines[-1] == "... and 55 more"
    assert sum(line.startswith(f"{path}:3: ") for line in lines) == 3
    flood = refusal(write(path, *["nope"] * (rows.MOST_ERRORS + 50)), rubric).splitlines()
    assert flood[0] == "over 10000 problems in the data:" and flood[-1] == "... and over 9950 more"
    many = rows.row_errors(row(messages=[0] * 10**6), rubric, "x:1", k.parse_answer)
    assert len(many) < 30 and refusal(write(path, "{"), rubric).startswith("1 problem in the data:\n")
    assert "no rows" in refusal(write(path, ""), rubric) and "no such file" in refusal(tmp_path / "x", rubric)
    path.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refusal(path, rubric)


def test_prompts_where_dialogues_are_wanted(tmp_path, rubric):
    path = write(tmp_path / "d.jsonl", row(messages=messages(("user", "hi"))))
    expected = f"{path}:1: found a row that ends with user / expected a dialogue"
    assert expected in refusal(path, rubric, "dialogue")
    assert "ends with assistant / expected a prompt" in refusal(write(path, row()), rubric, "prompt")
    assert len(k.load_rows([path], rubric, "dialogue")) == 1


def test_a_mood_may_change_within_a_dialogue(tmp_path, rubric):
    hopeful = ANSWER.replace("sad", "hopeful")
    turns = messages(("user", "a"), ("assistant", ANSWER), ("user", "b"), ("assistant", hopeful))
    found = k.load_rows([write(tmp_path / "d.jsonl", row(messages=turns))], rubric)
    lines = "\n".join(overview.describe(found, sorted(rubric.emotions)))
    assert "1 of 2 answers name another emotion than their row" in lines


def load(name, rubric):
    return k.load_rows([k.DATA / f"{name}.jsonl"], rubric)


def test_shipped_data_is_balanced_and_splits_share_no_person(rubric):
    files = {name: load(name, rubric) for name in ("dialogues", "eval", "prompts")}
    for name, (count, per_emotion) in {"dialogues": (128, 4), "eval": (64, 2), "prompts": (320, 10)}.items():
        counts = Counter(r.label for r in files[name])
        assert len(files[name]) == count and set(counts.values()) == {per_emotion}
    persons = {name: {r.person for r in rows} for name, rows in files.items()}
    assert len(persons["dialogues"]) >= 40
    assert not persons["eval"] & (persons["dialogues"] | persons["prompts"])
    assert not any(r.is_prompt for r in files["dialogues"] + files["eval"])
    assert all(r.is_prompt for r in files["prompts"])


def spans_of(*rows):
    """(row, span name, text) of every assistant span."""
    for r in rows:
        for _, content in r.messages[1::2]:
            yield from ((r, name, text) for name, text in k.parse_answer(content).items())


@pytest.mark.parametrize("name", ["dialogues", "eval"])
def test_shipped_answers_have_the_papers_lengths(name, rubric):
    """KardiaBench's means are 41, 53 and 27 words (arXiv 2512.01282); a response is never longer than 35."""
    words, questions = {}, []
    for _, span, text in spans_of(*load(name, rubric)):
        words.setdefault(span, []).append(len(text.split()))
        if span == "response":
            questions.append(text.endswith("?"))
    for span, expected in {"understanding": 41, "reasoning": 53, "response": 27}.items():
        assert abs(sum(words[span]) / len(words[span]) - expected) < 2, span
    assert max(words["response"]) <= 35 and min(words["response"]) < 20
    # A listener who always ends with a question is an interviewer.
    assert 0.4 < sum(questions) / len(questions) < 0.75


def test_shipped_texts_are_written_not_generated(rubric):
    """No two spans begin alike (four words), five-word runs hardly recur, no two rows are alike."""
    rows = load("dialogues", rubric) + load("eval", rubric)
    spans = [(span, overview.words(text)) for _, span, text in spans_of(*rows) if span != "emotion"]
    assert max(Counter((span, *words[:4]) for span, words in spans).values()) == 1
    rows += load("prompts", rubric)
    runs = {}
    for i, r in enumerate(rows):
        asked = [text for role, text in r.messages if role == "user"]
        for text in [r.situation, *asked, *(text for _, _, text in spans_of(r))]:
            found = overview.words(text)
            for run in zip(*(found[shift:] for shift in range(5))):
                runs.setdefault(run, set()).add(i)
    assert sum(len(where) > 1 for where in runs.values()) < 0.001 * len(runs)
    assert not overview.near_duplicates(map(overview.question, rows), 0.1)
    assert not overview.near_duplicates(map(overview.answers, rows), 0.1)


RULES = yaml.safe_load(Path(__file__).with_name("data_rules.yaml").read_text(encoding="utf-8"))
EXAMPLES = RULES.pop("examples")
RULES = {name: re.compile("".join(text.splitlines()), re.I) for name, text in RULES.items()}


def test_shipped_responses_claim_no_humanity_and_give_no_diagnosis_or_medication_advice(rubric):
    for name, texts in EXAMPLES.items():
        assert all(RULES[name].search(text) for text in texts)  # the rules can fail
    spans = spans_of(*load("dialogues", rubric), *load("eval", rubric))
    responses = [text for _, span, text in spans if span == "response"]
    assert [text for text in responses for name in EXAMPLES if RULES[name].search(text)] == []


@pytest.mark.parametrize(("name", "at_least"), [("dialogues", 6), ("eval", 3)])
def test_shipped_dialogues_that_touch_crisis_point_to_help(name, at_least, rubric):
    rows, crisis = load(name, rubric), RULES["crisis"]
    touched = [r for r in rows if crisis.search(f"{r.situation} {r.messages[0][1]}")]
    assert len(touched) >= at_least
    for r in touched:
        responses = [text for _, span, text in spans_of(r) if span == "response"]
        assert any(RULES["help"].search(text) for text in responses), (r.where, responses)


def test_the_judge_exam_is_large_and_its_answer_key_sides_with_no_cheap_cue(rubric):
    from kardia.judge import cues, exam

    names = [c.name for c in rubric.criteria]
    rows = exam.load_pairs(k.DATA / "judge_exam.jsonl", [*names, exam.REFERENCE])
    counts = Counter(row["criterion"] for row in rows)
    assert min(counts[name] for name in names) >= 60 and counts[exam.REFERENCE] >= 30
    assert len({row["register"] for row in rows}) >= 9
    for name in names:
        pairs = [row for row in rows if row["criterion"] == name]
        report = cues.cue_report(pairs, [(1.0, 0.0)] * len(pairs))
        known = {cue: entry["key"] for cue, entry in report.items() if entry["n"] >= cues.FEWEST}
        assert {cue: key for cue, key in known.items() if not 0.45 <= key <= 0.55} == {}, name
        # Every reply stands in one pair: the pairs are independent.
        used = Counter((exam.situation(p), p[key]) for p in pairs for key in ("better", "worse"))
        assert max(used.values()) == 1
    persons = {row["person"] for row in rows if row["criterion"] != exam.REFERENCE} - {""}
    others = [r for name in ("dialogues", "eval", "prompts") for r in load(name, rubric)]
    assert len(persons) >= 30 and not any(r.person in persons for r in others)


def test_what_a_judge_learns_from_shares_nothing_with_its_exam(rubric):
    from kardia.judge import exam

    names = [c.name for c in rubric.criteria]
    learn, test = (
        exam.load_pairs(k.DATA / f"judge_{name}.jsonl", [*names, exam.REFERENCE])
        for name in ("train", "exam")
    )
    assert min(Counter(row["criterion"] for row in learn).values()) >= 80
    for facts in (exam.situation, *map(operator.itemgetter, ("person", "better", "worse"))):
        assert not (set(map(facts, learn)) & set(map(facts, test))) - {""}
