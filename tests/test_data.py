"""Rows: errors come all at once with their line; the shipped files keep what data/README.md promises."""

import json
import re
from collections import Counter

import pytest

import kardia_lite as k

ANSWER = k.render_answer({"understanding": "u", "reasoning": "r", "emotion": "sad", "response": "p"})


def row(**changes):
    value = {"person": "Ana, 40.", "mbti": "ISFJ", "emotion": "sad", "situation": "Rain.", "anon_username": "a", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ANSWER}]}
    return {key: v for key, v in {**value, **changes}.items() if v is not ...}


def messages(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def test_a_good_row_and_a_prompt(tmp_path, rubric):
    path = write(tmp_path / "d.jsonl", row(), "", row(messages=messages(("user", "hi"))), row(mbti=..., anon_username=...))
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
        (row(messages=messages(("user", "a"), ("assistant", "plain"))), "<|understanding_begin|> is missing", "in this order"),
        (row(messages=messages(("user", "a"), ("assistant", ANSWER.replace("sad", "angry")))), "emotion span 'angry'", "the row's emotion 'sad'"),
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
        assert len(files[name]) == count and set(Counter(r.emotion for r in files[name]).values()) == {per_emotion}
    persons = {name: {r.person for r in rows} for name, rows in files.items()}
    assert len(persons["dialogues"]) >= 40
    assert not persons["eval"] & (persons["dialogues"] | persons["prompts"])
    assert not any(r.is_prompt for r in files["dialogues"] + files["eval"]) and all(r.is_prompt for r in files["prompts"])


def test_shipped_answers_have_the_papers_lengths(rubric):
    words = {name: [] for name in ("understanding", "reasoning", "response")}
    for r in load("dialogues.jsonl", rubric) + load("eval.jsonl", rubric):
        for role, content in r.messages:
            if role == "assistant":
                for name, text in k.parse_answer(content).items():
                    if name in words:
                        words[name].append(len(text.split()))
    assert max(words["response"]) <= 36 and 24 <= sum(words["response"]) / len(words["response"]) <= 33
    assert 30 <= sum(words["understanding"]) / len(words["understanding"]) <= 48
    assert 40 <= sum(words["reasoning"]) / len(words["reasoning"]) <= 60


def test_shipped_texts_are_written_not_generated(rubric):
    """No two answers begin alike (four words) more than twice, and few five-word runs recur between dialogues."""
    openings, runs = Counter(), {}
    for i, r in enumerate(load("dialogues.jsonl", rubric) + load("eval.jsonl", rubric)):
        for role, content in r.messages:
            for text in k.parse_answer(content).values() if role == "assistant" else [content]:
                words = re.findall(r"[a-z']+", text.lower())
                if len(words) > 4:
                    openings[tuple(words[:4])] += 1
                for j in range(len(words) - 4):
                    runs.setdefault(tuple(words[j : j + 5]), set()).add(i)
    assert max(openings.values()) <= 2
    assert sum(len(where) > 1 for where in runs.values()) < 0.003 * len(runs)


def test_shipped_responses_claim_no_humanity_and_give_no_diagnosis(rubric):
    forbidden = re.compile(r"\b(as a human|i am human|when i was (a child|young|your age)|my (own )?(mother|father|wife|husband|childhood)|you (have|are suffering from) (depression|ptsd|bipolar|an anxiety disorder)|mg\b|your dosage|stop taking)", re.I)
    for r in load("dialogues.jsonl", rubric) + load("eval.jsonl", rubric):
        for role, content in r.messages:
            if role == "assistant":
                response = k.parse_answer(content)["response"]
                assert not forbidden.search(response), (r.where, response)


def test_the_judge_exam_does_not_reward_length(rubric):
    from kardia import exam

    pairs = exam.load_pairs(k.DATA / "judge_exam.jsonl", [c.name for c in rubric.criteria])
    assert len(pairs) >= 120 and min(Counter(p["criterion"] for p in pairs).values()) >= 20
    longer = sum(len(p["better"]) > len(p["worse"]) for p in pairs) / len(pairs)
    assert 0.45 <= longer <= 0.55
