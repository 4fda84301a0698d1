"""What `data check` sees in a mix of files: near-duplicates, leaks, balance."""

import json
import random
import time

import pytest
from conftest import run

import kardia_lite as k
from kardia.data import overview, rows

TEXT = "My sister sold our mother's piano without asking and a neighbour helped to carry it down on a Tuesday"
OTHER = "The ferry was late again so I sat on my rucksack and watched two boys teach a third how to whistle"


def dialogue(where, person="Ana, 40.", user=TEXT, name="", emotion="sad", answer=None):
    spans = {"understanding": "u", "reasoning": "r", "emotion": emotion, "response": answer}
    reply = (("assistant", k.render_answer(spans)),) if answer else ()
    return k.Dialogue(person, "ISFJ", emotion, "The piano.", name, (("user", user), *reply), where)


def test_words():
    for text, expected in [
        ("It's, well: DON\u2019T!", ["it's", "well", "don't"]),
        ("caf\u00e9 na\u00efve", ["caf\u00e9", "na\u00efve"]),
        ("\u6211\u5f88\u96be\u8fc7 ok", ["\u6211", "\u5f88", "\u96be", "\u8fc7", "ok"]),  # no spaces: signs
        ("\uff28\uff49 \U0001f600", ["hi"]),  # full-width letters are letters; an emoji is no word
        ("", []),
    ]:
        assert overview.words(text) == expected


def test_near_duplicates_are_found_and_others_are_not():
    changed = TEXT.replace("sister", "brother").replace("Tuesday", "Friday")
    texts = [TEXT, OTHER, changed, TEXT.upper() + "!", OTHER.split(" so ")[0], "", "", "Oh no!", "oh no"]
    pairs = overview.near_duplicates(texts)
    assert [pair[:2] for pair in pairs] == [(0, 2), (0, 3), (7, 8)]
    assert 0.3 < pairs[0][2] < 1 == pairs[1][2] == pairs[2][2]  # case and punctuation do not matter
    assert overview.near_duplicates([]) == overview.near_duplicates(["", ""]) == []


def test_the_similarity_is_the_jaccard_index_of_five_word_runs():
    random.seed(0)
    texts = []
    for _ in range(60):
        start = random.randrange(40)
        texts.append(" ".join(f"w{n}" for n in range(start, start + random.randrange(5, 60))))
    runs = [set(zip(*(text.split()[shift:] for shift in range(5)))) for text in texts]
    for first, second, similarity in overview.near_duplicates(texts[:30]):
        every = [len(runs[i] & runs[second]) / len(runs[i] | runs[second]) for i in range(second)]
        assert similarity == pytest.approx(max(every)) == pytest.approx(every[first])


def test_a_frame_shared_by_thousands_costs_no_square():
    """A template: every text shares a long frame. All but the first are found, and the links stay few."""
    frame = "Dear listener, this is the story of what happened to me last week and I would like to hear about"
    began = time.process_time()
    pairs = overview.near_duplicates(f"{frame} item{i} thing{i}" for i in range(3000))
    assert len(pairs) == 2999 and time.process_time() - began < 5


@pytest.mark.slow
def test_twenty_thousand_rows_take_seconds():
    random.seed(0)
    vocabulary = random.choices(range(30_000), [1 / (n + 3) for n in range(30_000)], k=100_000)
    texts = [" ".join(f"w{n}" for n in random.choices(vocabulary, k=60)) for _ in range(20_000)]
    texts[10_000:10_100] = [text + " more" for text in texts[:100]]
    began = time.process_time()
    assert [pair[:2] for pair in overview.near_duplicates(texts)] == [(n, n + 10_000) for n in range(100)]
    assert time.process_time() - began < 20


def test_leaks_by_profile_and_by_user_name():
    mix = [
        dialogue("a.jsonl:1", "Ana, 40."),
        dialogue("a.jsonl:2", "Bo, 9.", name="bo"),
        dialogue("b.jsonl:1", "ana 40"),  # the same profile, written another way
        dialogue("b.jsonl:2", "Bo, ten now.", name="BO"),
        dialogue("b.jsonl:3", "Cy, 70.", name="cy"),
        dialogue("a.jsonl:3", rows.NO_PROFILE),
        dialogue("b.jsonl:4", rows.NO_PROFILE),
    ]
    found = dict(overview.leaks(mix))
    assert set(found) == {"Ana, 40.", "ana 40", "Bo, 9.", "Bo, ten now."}
    assert found["Bo, 9."] == ["a.jsonl", "b.jsonl"] and overview.leaks(mix[:2] + mix[4:]) == []


def test_repeats_name_both_places_and_files_first():
    later = dialogue("b.jsonl:7", "Bo, 9.", user=TEXT + " indeed")
    lines = "\n".join(overview.repeats([dialogue("a.jsonl:1"), dialogue("a.jsonl:2"), later]))
    assert "warning: 2 near-duplicate questions (situation and first turn), 1 of them between files" in lines
    assert lines.index("b.jsonl:7 is like a.jsonl:1") < lines.index("a.jsonl:2 is like a.jsonl:1")
    assert "near-duplicate answers: none" in lines and "persons shared between files: none" in lines


def test_describe_counts_labels_missing_labels_and_repeated_openings():
    answer, moods = "It sounds like you had a day", ["proud", *["sad"] * 5]
    mix = [dialogue(f"a.jsonl:{i}", answer=answer, emotion=mood) for i, mood in enumerate(moods)]
    lines = "\n".join(overview.describe(mix, ["proud", "sad", "trusting"]))
    assert "a.jsonl       6         6       0       1        2" in lines
    assert "sad                 5" in lines and "without any row: trusting" in lines
    assert "rows per person: 6 to 6, median 6; the most: Ana, 40." in lines
    assert "understanding 1 (1 to 1), reasoning 1 (1 to 1), response 7 (7 to 7)" in lines
    assert "6 of 6 response spans begin with 'it sounds like you'" in lines
    mix.append(dialogue("b.jsonl:1", emotion="sad"))
    lines = "\n".join(overview.describe(mix, ["proud", "sad"]))
    assert "rows per emotion (a.jsonl + b.jsonl):" in lines and "= 5 + 1" in lines and "all " in lines
    assert "rows per emotion: 1 of each of the 1 in b.jsonl" in overview.describe(mix[-1:], ["sad"])


def test_histogram_counts_every_row_once():
    lines = overview.histogram([5, 5, 6, 30, 104], 30)
    assert sum(int(line.split()[1]) for line in lines) == 5 and sum("<- limit" in line for line in lines) == 1


@pytest.mark.slow  # the tokenizer comes out of the real model's GGUF
def test_the_command_on_a_mix_of_files(tmp_path, embedded):
    def row(user, **changes):
        value = {"person": "Ana, 40.", "emotion": "sad", "situation": "The piano."}
        return json.dumps(value | {"messages": [{"role": "user", "content": user}]} | changes)

    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text(row(TEXT) + "\n" + row(OTHER, situation="The ferry."), encoding="utf-8")
    b.write_text(row(TEXT + " sorry", emotion="angry"), encoding="utf-8")
    out = run(f"data check {a} {b} --max-length 64 --show 2").stdout
    assert "warning: 1 near-duplicate questions (situation and first turn), 1 of them between files" in out
    assert "warning: 1 persons stand in more than one file" in out and "over --max-length 64: 3" in out
    assert "watched two boys" in out.split("as the model sees it")[1]
