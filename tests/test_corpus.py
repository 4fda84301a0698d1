"""What `data check` sees in a mix of files: near-duplicates, leaks, balance."""

import json
import random

import pytest
from click.testing import CliRunner

import kardia_lite as k
from kardia.data import overview, rows

TEXT = "My sister sold our mother's piano without asking me and I found out from a neighbour who helped carry it down the stairs on a wet Tuesday"
OTHER = "The ferry was late again so I sat on my rucksack and watched two boys teach a third how to whistle through a blade of grass"


def dialogue(
    where, person="Ana, 40.", user=TEXT, situation="The piano.", name="", emotion="sad", answer=None
):
    spans = {"understanding": "u", "reasoning": "r", "emotion": emotion, "response": answer}
    messages = (("user", user),) + ((("assistant", k.render_answer(spans)),) if answer else ())
    return k.Dialogue(person, "ISFJ", emotion, situation, name, messages, where)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's, well: DON\u2019T!", ["it's", "well", "don't"]),
        ("caf\u00e9 na\u00efve", ["caf\u00e9", "na\u00efve"]),
        (
            "\u6211\u5f88\u96be\u8fc7 ok",
            ["\u6211", "\u5f88", "\u96be", "\u8fc7", "ok"],
        ),  # no spaces: every sign is a word
        ("\uff28\uff49 \U0001f600", ["hi"]),  # full-width letters are letters; an emoji is no word
        ("", []),
    ],
)
def test_words(text, expected):
    assert overview.words(text) == expected


def test_near_duplicates_are_found_and_others_are_not():
    changed = TEXT.replace("sister", "brother").replace("wet Tuesday", "dry Friday")
    pairs = overview.near_duplicates(
        [TEXT, OTHER, changed, TEXT.upper() + "!", OTHER.split(" so ")[0], "", ""]
    )
    assert [(p.first, p.second) for p in pairs] == [(0, 2), (0, 3)]
    assert 0.3 < pairs[0].similarity < 1 and pairs[1].similarity == 1  # case and punctuation do not matter


def test_the_sketch_estimates_the_true_overlap():
    """Bottom-k against the exact Jaccard similarity, on texts much longer than the sketch."""
    random.seed(0)
    for share in (0.2, 0.5, 0.8):
        common = [f"w{random.randrange(10**6)}" for _ in range(int(3000 * share))]
        a, b = (
            " ".join(common + [f"w{random.randrange(10**6)}" for _ in range(3000 - len(common))])
            for _ in range(2)
        )
        exact = len(overview.shingles(a) & overview.shingles(b)) / len(
            overview.shingles(a) | overview.shingles(b)
        )
        sketches = [frozenset(sorted(overview.shingles(t))[: overview.SKETCH]) for t in (a, b)]
        assert abs(overview.resemblance(*sketches) - exact) < 0.12


def test_a_frame_shared_by_thousands_costs_no_square():
    """A template: every text shares a long frame. All but the first are found, and the index stays small."""
    frame = "Dear listener, this is the story of what happened to me last week and I would like to hear from you about"
    pairs = overview.near_duplicates(f"{frame} item{i} thing{i}" for i in range(3000))
    assert len(pairs) == 2999


def test_leaks_by_profile_and_by_user_name():
    rows = [
        dialogue("a.jsonl:1", "Ana, 40."),
        dialogue("a.jsonl:2", "Bo, 9.", name="bo"),
        dialogue("b.jsonl:1", "ana 40"),  # the same profile, written another way
        dialogue("b.jsonl:2", "Bo, ten now.", name="BO"),
        dialogue("b.jsonl:3", "Cy, 70.", name="cy"),
        dialogue("a.jsonl:3", rows.NO_PROFILE),
        dialogue("b.jsonl:4", rows.NO_PROFILE),
    ]
    found = dict(overview.leaks(rows))
    assert set(found) == {"Ana, 40.", "ana 40", "Bo, 9.", "Bo, ten now."} and found["Bo, 9."] == [
        "a.jsonl",
        "b.jsonl",
    ]
    assert overview.leaks(rows[:2] + rows[4:]) == []


def test_repeats_name_both_places_and_files_first():
    rows = [
        dialogue("a.jsonl:1"),
        dialogue("a.jsonl:2"),
        dialogue("b.jsonl:7", "Bo, 9.", user=TEXT + " indeed"),
    ]
    lines = "\n".join(overview.repeats(rows))
    assert "warning: 2 near-duplicate questions (situation and first turn), 1 of them between files" in lines
    assert lines.index("b.jsonl:7 is like a.jsonl:1") < lines.index("a.jsonl:2 is like a.jsonl:1")
    assert "near-duplicate answers: none" in lines and "persons shared between files: none" in lines


def test_describe_counts_labels_missing_labels_and_repeated_openings():
    rows = [
        dialogue(f"a.jsonl:{i}", answer="It sounds like you had a day", emotion="sad" if i else "proud")
        for i in range(6)
    ]
    lines = "\n".join(overview.describe(rows, ["proud", "sad", "trusting"]))
    assert "sad                 5" in lines and "without any row: trusting" in lines
    assert "6 of 6 response spans begin with 'it sounds like you'" in lines


def test_histogram_counts_every_row_once():
    lines = overview.histogram([5, 5, 6, 30, 104], 30)
    assert sum(int(line.split()[1]) for line in lines) == 5 and sum("<- limit" in line for line in lines) == 1


def test_the_command_on_a_mix_of_files(tmp_path, embedded):
    def row(user, **changes):
        return {
            "person": "Ana, 40.",
            "emotion": "sad",
            "situation": "The piano.",
            "messages": [{"role": "user", "content": user}],
            **changes,
        }

    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text(
        json.dumps(row(TEXT)) + "\n" + json.dumps(row(OTHER, situation="The ferry.")), encoding="utf-8"
    )
    b.write_text(json.dumps(row(TEXT + " sorry", emotion="angry")), encoding="utf-8")
    result = CliRunner().invoke(k.cli, ["data", "check", str(a), str(b), "--max-length", "64", "--show", "2"])
    out = result.stdout
    assert result.exit_code == 0, result.output
    assert "warning: 1 near-duplicate questions (situation and first turn), 1 of them between files" in out
    assert "warning: 1 persons stand in more than one file" in out and "over --max-length 64: 3" in out
    assert "watched two boys" in out.split("as the model sees it")[1]
