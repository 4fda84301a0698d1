"""Importers: small files in the exact published formats, with invented text."""

import json
import tracemalloc
from unittest.mock import Mock

import pyarrow
import pytest
from pyarrow import parquet

from kardia.core.console import UserError
from kardia.data import importers
from kardia.data.importers import CSV_HEADER, import_dataset
from kardia.data.rows import NO_PROFILE

LABELS = "afraid angry annoyed anxious ashamed disgusted guilty jealous joyful proud sad".split()
EMOTIONS = {label: label for label in LABELS} | {"fearful": "afraid", "worried": "anxious"}
OURS = (
    "<|understanding_begin|>Ines broke a jug.<|understanding_end|><|reasoning_begin|>It was her aunt's."
    "<|reasoning_end|><|emotion_begin|>sad<|emotion_end|>"
    "<|response_begin|>Which part did you keep?<|response_end|>"
)
CARD = (
    "<understanding>\n Ines broke a jug. </understanding>\n\n<reasoning>It was her aunt's.</reasoning>\n"
    "<emotion> Sad. </emotion>\n<response>Which part did you keep?\n</response>\n"
)


def kardia(*contents, **changes):
    """A KardiaBench record; contents alternate user, assistant."""
    row = {"person": "Ines, 40, potter.", "mbti": "ISFP", "emotion": "sad", "situation": "A jug broke."}
    turns = enumerate(contents or ("The jug fell.", OURS))
    row["messages"] = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in turns]
    row = row | {"anon_username": "kiln"} | changes
    return {key: value for key, value in row.items() if value is not ...}


def esconv(*turns, emotion="anxiety", **changes):
    dialog = [{"speaker": speaker, "annotation": {}, "content": text} for speaker, text in turns]
    return {"emotion_type": emotion, "situation": "The mill closes.", "dialog": dialog, **changes}


def put(path, *lines, newline="\n"):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + newline for line in lines)
    path.write_bytes(text.encode())
    return path


def run(source, format, tmp_path, **options):
    target = tmp_path / "out" / "rows.jsonl"
    report = import_dataset(source, format, target, EMOTIONS, **options)
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n")[:-1]]
    assert report.rows == len(rows) == report.prompts + report.dialogues
    return rows, report


def problem(source, format, tmp_path, **options):
    """The one-line error; whatever went wrong, an older target stays and no temporary file does."""
    (tmp_path / "older").mkdir(exist_ok=True)
    target = put(tmp_path / "older" / "rows.jsonl", "older")
    with pytest.raises(UserError) as caught:
        import_dataset(source, format, target, EMOTIONS, **options)
    assert target.read_text() == "older\n" and [p.name for p in target.parent.iterdir()] == ["rows.jsonl"]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- KardiaBench


def test_both_tag_forms_become_ours_and_other_turns_are_counted(tmp_path):
    fine = [OURS, CARD, OURS.replace("|><|", "|>\n <|").replace(">sad<", "> SAD\n<")]
    other = ["Which part did you keep?", OURS + " Bye.", "Hello. " + OURS, OURS[:-5]]
    for old, new in [
        ("<|emotion_begin|>sad<|emotion_end|>", ""),
        ("Ines broke a jug.", " "),  # an empty span
        ("<|reasoning_begin|>", "so <|reasoning_begin|>"),
        ("aunt's.", "aunt's.<|understanding_begin|>"),  # a tag within a span
        ("<|response_end|>", "</response>"),  # mixed forms
    ]:
        other.append(OURS.replace(old, new))
    source = put(tmp_path / "a.jsonl", *(kardia("Hm.", content) for content in [*fine, *other]))
    rows, report = run(source, "kardiabench", tmp_path)
    assert [row["messages"][1] for row in rows] == [{"role": "assistant", "content": OURS}] * len(fine)
    assert rows[0]["messages"][0] == {"role": "user", "content": "Hm."}
    assert list(rows[0]) == ["person", "mbti", "emotion", "situation", "anon_username", "messages"]
    assert report.dialogues == 3 and report.skipped == {"assistant turn is not the four spans": len(other)}
    assert report.examples["assistant turn is not the four spans"][0].startswith("a.jsonl:4: turn 2: Which")


def test_optional_fields_system_message_text_column_and_prompt_rows(tmp_path):
    prompt = kardia("It fell.", OURS, "I kept the handle.", mbti=None, anon_username=...)
    prompt["messages"].insert(0, {"role": "system", "content": "Four spans, please."})
    as_text = {**prompt, "messages": json.dumps(prompt["messages"])}  # went through a CSV
    rows, report = run(put(tmp_path / "a.jsonl", prompt, as_text), "kardiabench", tmp_path)
    assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant", "user"]
    assert rows[0]["mbti"] == "" and rows[0]["anon_username"].startswith("user_")
    assert rows[0] == rows[1] and (report.prompts, report.dialogues) == (2, 0)


def test_unusable_records_are_counted_and_listed(tmp_path):
    bad = [kardia(emotion="Zesty")] * 7 + [kardia("It fell.", OURS.replace(">sad<", ">wistful<"))]
    bad += [
        kardia(person=" "),
        kardia(messages=...),
        kardia(messages=[{"role": "assistant", "content": OURS}]),
    ]
    bad += [["a list"], kardia("broken \ud83d half"), '{"person": "torn']
    source = put(tmp_path / "a.jsonl", *bad, "", kardia(emotion=" Fearful "))
    rows, report = run(source, "kardiabench", tmp_path)
    assert [row["emotion"] for row in rows] == ["afraid"]
    assert sum(report.skipped.values()) == len(bad) and report.skipped["emotion has no known label"] == 7
    assert report.unmapped == {"zesty": 7, "wistful": 1}
    assert report.examples["emotion has no known label"] == [f"a.jsonl:{n}: Zesty" for n in range(1, 6)]
    assert report.examples["malformed JSON"][0].startswith("a.jsonl:14: Unterminated string")
    assert all(len(report.examples[reason]) == min(5, n) for reason, n in report.skipped.items())
    lines = report.skipped_list.read_text(encoding="utf-8").splitlines()
    assert report.skipped_list.name == "rows.jsonl.skipped.txt" and len(lines) == len(bad)
    assert lines[0] == "a.jsonl:1: emotion has no known label: Zesty"
    assert lines[-1].startswith("a.jsonl:14: malformed JSON: Unterminated")
    _, report = run(put(tmp_path / "b.jsonl", kardia()), "kardiabench", tmp_path)
    assert report.skipped_list is None  # and the older list is gone
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["rows.jsonl"]


def test_a_directory_and_one_split_of_it(tmp_path):
    data = tmp_path / "data"
    (data / ".cache").mkdir(parents=True)
    put(data / "test-a.jsonl", kardia(situation="first"))
    odd = kardia(emotion="odd")
    (data / "train-b.json").write_text(json.dumps([kardia(situation="second"), odd], indent=2))
    records = [kardia(situation=f"row {n}", anon_username=None) for n in range(150)]
    parquet.write_table(pyarrow.Table.from_pylist([*records, odd]), data / "train-c.parquet")
    put(data / "dataset_infos.json", {"not": "a row"})
    put(data / ".cache" / "train.json", {"not": "a row"})
    rows, report = run(data, "kardiabench", tmp_path)
    assert [row["situation"] for row in rows] == ["first", "second", *(f"row {n}" for n in range(150))]
    places = ["train-b.json: record 2: odd", "train-c.parquet: row 151: odd"]
    assert report.examples == {"emotion has no known label": places}
    _, report = run(data, "kardiabench", tmp_path, split="train")
    assert report.files == {str(data / "train-b.json"): 1, str(data / "train-c.parquet"): 150}
    expected = "no file with 'valid' in its name (there are test-a.jsonl, train-b.json, train-c.parquet)"
    assert expected in problem(data, "kardiabench", tmp_path, split="valid")
    (tmp_path / "empty").mkdir()
    assert "no ESConv.json in this directory" in problem(tmp_path / "empty", "esconv", tmp_path)
    source = put(tmp_path / "a.jsonl", kardia())
    for target in (source, tmp_path / "empty"):
        with pytest.raises(UserError, match="cannot be the target"):
            import_dataset(source, "kardiabench", target, EMOTIONS)
    assert source.read_text() and not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- EmpatheticDialogues and ESConv


def test_empathetic_dialogues(tmp_path):
    source = put(
        tmp_path / "train.csv",
        CSV_HEADER,
        'hit:0_conv:1,1,fearful,A "dog_comma_ loose,12,It ran_comma_ barking_comma_ at me!,5|5|5_2|2|5,',
        'hit:0_conv:1,2,fearful,A "dog_comma_ loose,13,Did it bite?,5|5|5_2|2|5,',
        'hit:0_conv:1,3,fearful,A "dog_comma_ loose,12,No_comma_ luckily.,5|5|5_2|2|5,',
        "hit:2_conv:5,1,proud,My kite flew,14,It stayed up.,5|5|5",  # 7 fields
        "hit:2_conv:5,2,proud,My kite flew,15,How long?,5|5|5,<HIT>,,",  # more than 8
        "hit:3_conv:6,2,sad,Rain,15,Only the listener is here.,5|5|5,",
        "hit:4_conv:7,1,zen,Tea,16,It steamed.,5|5|5,",
        "hit:5_conv:8,1,sad,torn",
        newline="\r\n",
    )
    rows, report = run(source, "empatheticdialogues", tmp_path)
    opening = [row["messages"] for row in rows]
    assert opening == [[{"role": "user", "content": t}] for t in ("It ran, barking, at me!", "It stayed up.")]
    assert rows[0]["situation"] == 'A "dog, loose' and [row["emotion"] for row in rows] == ["afraid", "proud"]
    assert (rows[0]["person"], rows[0]["mbti"]) == (NO_PROFILE, "")
    assert rows[0]["anon_username"] == rows[1]["anon_username"] != ""
    assert report.prompts == 2 and report.unmapped == {"zen": 1} and len(report.skipped) == 3
    assert report.examples["conversation without a user turn"] == ["train.csv:7"]
    assert report.examples["malformed line"][0].startswith("train.csv:9: ")
    for name in ("test.csv", "train.csv", "notes.csv"):  # conversations of two files stay apart
        put(tmp_path / name, "\ufeff" + CSV_HEADER, f"c,1,sad,Rain,1,from {name},5,")
    rows, _ = run(tmp_path, "empatheticdialogues", tmp_path)
    assert [row["messages"][0]["content"] for row in rows] == ["from train.csv", "from test.csv"]


def test_esconv_opening_turns_and_nouns(tmp_path):
    talk = [("supporter", "Hello!\n"), ("seeker", " The mill \n"), ("seeker", "")]
    talk += [("seeker", "shuts in May."), ("supporter", "Oh."), ("seeker", "Yes.")]
    old = [("usr", "I froze on stage."), ("sys", "And then?")]
    records = [esconv(*talk), *(esconv(*old, emotion=noun) for noun in importers.ESCONV_LABELS)]
    records += [esconv(*old, emotion="Worried"), esconv(*old, emotion="pain"), esconv(("sys", "Anyone?"))]
    records += [esconv(("bot", "x")), esconv(*old, dialog=None)]
    source = tmp_path / "ESConv.json"
    source.write_text(json.dumps(records, indent=4), encoding="utf-8-sig")
    rows, report = run(source, "esconv", tmp_path)
    assert rows[0]["messages"] == [{"role": "user", "content": "The mill shuts in May."}]
    facts = [rows[0][key] for key in ("person", "mbti", "emotion", "situation")]
    assert facts == [NO_PROFILE, "", "anxious", "The mill closes."]
    assert [row["emotion"] for row in rows[1:]] == [*importers.ESCONV_LABELS.values(), "anxious"]
    assert report.unmapped == {"pain": 1} and report.prompts == len(rows) == 12
    places = [place for (place,) in report.examples.values()]
    details = ["13: pain", "14", "15: bot", "16: None"]
    assert places == [f"ESConv.json: record {detail}" for detail in details]


# ---------------------------------------------------------------- memory, failures, the hub


def test_lines_stream_and_a_huge_list_is_refused(tmp_path):
    record, calls, source = json.dumps(kardia("word " * 3000)), [], tmp_path / "big.json"
    count = 40_000_000 // len(record)
    with open(source, "w") as out:
        out.writelines([record + "\n"] * count)
    tracemalloc.start()
    report = import_dataset(
        source, "kardiabench", tmp_path / "a.jsonl", EMOTIONS, lambda *at: calls.append(at)
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.rows == count and peak < 30_000_000
    size = source.stat().st_size
    assert calls == sorted(calls) and calls[-1] == (size, size) and 10 < len(calls) < 100
    source.write_text("[" + " " * 5000)
    with open(source, "r+b") as sparse:
        sparse.truncate(importers.LARGEST_LIST + 1)
    assert "a JSON list over 512 MB: convert it to JSONL" in problem(source, "esconv", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row_group", [200, 10**6])
def test_parquet_streams_whatever_its_row_groups(row_group, tmp_path):
    source, record = tmp_path / "big.parquet", kardia("word " * 3000)
    table = pyarrow.Table.from_pylist([{**record, "anon_username": f"user{i}"} for i in range(5000)])
    parquet.write_table(table, source, row_group_size=row_group, compression="none", use_dictionary=False)
    del table
    before, peak = pyarrow.total_allocated_bytes(), []

    def measure(*_):
        peak.append(pyarrow.total_allocated_bytes() - before)

    _, report = run(source, "kardiabench", tmp_path, on_progress=measure)
    assert report.rows == 5000 and source.stat().st_size > 70_000_000 and max(peak) < 20_000_000


def test_a_failure_half_way_leaves_no_target(tmp_path):
    source = put(tmp_path / "a.jsonl", *[kardia("x" * 1000)] * 30)
    with pytest.raises(KeyboardInterrupt):
        import_dataset(
            source, "kardiabench", tmp_path / "b.jsonl", EMOTIONS, Mock(side_effect=KeyboardInterrupt)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_hub_failures_say_what_to_do(tmp_path, monkeypatch):
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    response = httpx.Response(403, request=httpx.Request("GET", "http://hub.invalid"))
    download = Mock()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for error, expected in [
        (errors.GatedRepoError("no\nentry", response=response), "GatedRepoError: no"),
        (errors.OfflineModeIsEnabled("offline mode is on"), "OfflineModeIsEnabled: offline mode is on"),
        (httpx.ConnectError("no route\nto host"), "ConnectError: no route"),
        (ConnectionError("reset"), "ConnectionError: reset"),
    ]:
        download.side_effect = error
        message = problem("Jhcircle/KardiaBench", "kardiabench", tmp_path)
        assert f"Jhcircle/KardiaBench: cannot be downloaded ({expected}): " in message
        for step in ("accept the conditions", "`hf auth login`", "check the network and HF_HUB_OFFLINE"):
            assert step in message
        assert message.endswith("bring that folder here and import it")
    asked = [call.args[0] for call in download.call_args_list]
    assert asked[:2] == list(importers.HUB_IDS)  # it is published under both spellings
    (tmp_path / "cache").mkdir()
    put(tmp_path / "cache" / "train.jsonl", kardia())
    download.side_effect, download.return_value = None, str(tmp_path / "cache")
    assert len(run("jhcircle/kadiabench", "kardiabench", tmp_path)[0]) == 1
