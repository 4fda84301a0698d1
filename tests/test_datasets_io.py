"""Importers: small files in the exact published formats, with invented text."""

import json
import tracemalloc

import pytest

from kardia.data import importers
from kardia.data.importers import CSV_HEADER, ImportProblem, import_dataset
from kardia.data.rows import NO_PROFILE

LABELS = (
    "afraid",
    "angry",
    "annoyed",
    "anxious",
    "ashamed",
    "disgusted",
    "guilty",
    "jealous",
    "joyful",
    "proud",
    "sad",
)
EMOTIONS = {label: label for label in LABELS} | {"fearful": "afraid", "worried": "anxious"}

OURS = (
    "<|understanding_begin|>Ines broke a jug.<|understanding_end|><|reasoning_begin|>It was her aunt's.<|reasoning_end|>"
    "<|emotion_begin|>sad<|emotion_end|><|response_begin|>Which part of it did you keep?<|response_end|>"
)
CARD = (
    "<understanding>\n Ines broke a jug. </understanding>\n\n<reasoning>It was her aunt's.</reasoning>\n"
    "<emotion> Sad. </emotion>\n<response>Which part of it did you keep?\n</response>\n"
)


def kardia(*contents, **changes):
    """A KardiaBench record; contents alternate user, assistant."""
    turns = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": text}
        for i, text in enumerate(contents or ("The jug fell.", OURS))
    ]
    row = {
        "person": "Ines, 40, potter.",
        "mbti": "ISFP",
        "emotion": "sad",
        "situation": "A jug broke.",
        "anon_username": "kiln",
        "messages": turns,
    }
    return {key: value for key, value in (row | changes).items() if value is not ...}


def esconv(*turns, emotion="anxiety", **changes):
    dialog = [{"speaker": speaker, "annotation": {}, "content": text} for speaker, text in turns]
    row = {
        "experience_type": "Current",
        "emotion_type": emotion,
        "problem_type": "job crisis",
        "situation": "The mill closes.",
        "dialog": dialog,
    }
    return row | changes


def put(path, *lines, newline="\n"):
    path.write_bytes(
        "".join((line if isinstance(line, str) else json.dumps(line)) + newline for line in lines).encode()
    )
    return path


def run(source, format, tmp_path, **options):
    target = tmp_path / "out" / "rows.jsonl"
    report = import_dataset(source, format, target, EMOTIONS, **options)
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n")[:-1]]
    assert report.rows == len(rows) == report.prompts + report.dialogues
    return rows, report


def problem(source, format, tmp_path):
    """The one-line error; whatever went wrong, an older target stays and no temporary file does."""
    (tmp_path / "older").mkdir()
    target = put(tmp_path / "older" / "rows.jsonl", "older")
    with pytest.raises(ImportProblem) as caught:
        import_dataset(source, format, target, EMOTIONS)
    assert target.read_text() == "older\n" and [p.name for p in target.parent.iterdir()] == ["rows.jsonl"]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- KardiaBench


@pytest.mark.parametrize(
    "content", [OURS, CARD, OURS.replace("|><|", "|>\n <|").replace(">sad<", "> SAD\n<")]
)
def test_both_tag_forms_become_ours(content, tmp_path):
    rows, report = run(put(tmp_path / "a.jsonl", kardia("The jug fell.", content)), "kardiabench", tmp_path)
    assert rows[0]["messages"] == [
        {"role": "user", "content": "The jug fell."},
        {"role": "assistant", "content": OURS},
    ]
    assert list(rows[0]) == ["person", "mbti", "emotion", "situation", "anon_username", "messages"]
    assert (report.dialogues, report.prompts, report.skipped) == (1, 0, {})


@pytest.mark.parametrize(
    "content",
    [
        "Which part did you keep?",
        OURS.replace("<|emotion_begin|>sad<|emotion_end|>", ""),
        OURS.replace("Ines broke a jug.", " "),  # an empty span
        OURS + " Bye.",
        "Hello. " + OURS,
        OURS.replace("<|reasoning_begin|>", "so <|reasoning_begin|>"),
        OURS.replace("aunt's.", "aunt's.<|understanding_begin|>"),  # a tag within a span
        OURS.replace("<|response_end|>", "</response>"),  # mixed forms
        OURS[:-5],
    ],
)
def test_other_assistant_turns_are_counted(content, tmp_path):
    rows, report = run(put(tmp_path / "a.jsonl", kardia("Hm.", content), kardia()), "kardiabench", tmp_path)
    assert len(rows) == 1 and report.skipped == {"assistant turn is not the four spans": 1}
    assert report.examples["assistant turn is not the four spans"][0].startswith("a.jsonl:1: turn 2: ")


def test_optional_fields_system_message_and_prompt_rows(tmp_path):
    system = {"role": "system", "content": "Four spans, please."}
    prompt = kardia("It fell.", OURS, "I kept the handle.", mbti=None, anon_username=...)
    prompt["messages"].insert(0, system)
    rows, report = run(put(tmp_path / "a.jsonl", prompt, prompt), "kardiabench", tmp_path)
    assert [turn["role"] for turn in rows[0]["messages"]] == ["user", "assistant", "user"]
    assert rows[0]["mbti"] == "" and rows[0]["anon_username"].startswith("user_")
    assert rows[0] == rows[1] and (report.prompts, report.dialogues) == (2, 0)


def test_unusable_records_are_counted_by_reason_with_at_most_five_places(tmp_path):
    bad = [
        *[kardia(emotion="Zesty")] * 7,
        kardia("It fell.", OURS.replace(">sad<", ">wistful<")),
        kardia(person=" "),
        kardia(messages=...),
        kardia(messages=[{"role": "assistant", "content": OURS}]),
        ["a list"],
        kardia("broken \ud83d half"),
        '{"person": "torn',
    ]
    rows, report = run(
        put(tmp_path / "a.jsonl", *bad, "", kardia(emotion=" Fearful ")), "kardiabench", tmp_path
    )
    assert [row["emotion"] for row in rows] == ["afraid"]
    assert sum(report.skipped.values()) == len(bad) and report.skipped["emotion has no known label"] == 7
    assert report.unmapped == {"zesty": 7, "wistful": 1}
    assert report.examples["emotion has no known label"] == [f"a.jsonl:{n}: Zesty" for n in range(1, 6)]
    assert report.examples["malformed JSON"][0].startswith("a.jsonl:14: Unterminated string")
    assert {reason: len(places) for reason, places in report.examples.items()} == {
        r: min(5, n) for r, n in report.skipped.items()
    }


def test_bom_and_crlf_and_line_separators_inside_text(tmp_path):
    record = json.dumps(kardia("one\u2028two"), ensure_ascii=False)
    rows, report = run(
        put(tmp_path / "a.jsonl", "\ufeff" + record, record, newline="\r\n"), "kardiabench", tmp_path
    )
    assert [row["messages"][0]["content"] for row in rows] == ["one\u2028two"] * 2 and not report.skipped


def test_a_directory_of_jsonl_json_and_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = tmp_path / "data"
    data.mkdir()
    put(data / "a.jsonl", kardia(situation="first"))
    (data / "b.json").write_text(json.dumps([kardia(situation="second"), kardia(emotion="odd")], indent=2))
    records = [kardia(situation=f"row {n}", anon_username=None) for n in range(150)]
    parquet.write_table(pyarrow.Table.from_pylist(records), data / "c.parquet")
    put(data / "dataset_infos.json", {"not": "a row"})
    rows, report = run(data, "kardiabench", tmp_path)
    assert [row["situation"] for row in rows] == ["first", "second", *(f"row {n}" for n in range(150))]
    assert report.examples["emotion has no known label"] == [
        f"b.json:{2 + json.dumps(kardia(), indent=1).count(chr(10)) + 1}: odd"
    ]


# ---------------------------------------------------------------- EmpatheticDialogues


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
    assert [row["messages"] for row in rows] == [
        [{"role": "user", "content": "It ran, barking, at me!"}],
        [{"role": "user", "content": "It stayed up."}],
    ]
    assert rows[0]["situation"] == 'A "dog, loose' and [row["emotion"] for row in rows] == ["afraid", "proud"]
    assert (rows[0]["person"], rows[0]["mbti"]) == (NO_PROFILE, "") and rows[0]["anon_username"] == rows[1][
        "anon_username"
    ] != ""
    assert report.prompts == 2 and report.unmapped == {"zen": 1}
    assert report.skipped == {
        "conversation without a user turn": 1,
        "emotion has no known label": 1,
        "malformed line": 1,
    }
    assert report.examples["conversation without a user turn"] == ["train.csv:7"]
    assert report.examples["malformed line"][0].startswith("train.csv:9: ")


def test_empathetic_dialogues_directory_keeps_conversations_of_files_apart(tmp_path):
    for name in ("test.csv", "train.csv", "notes.csv"):
        put(tmp_path / name, "\ufeff" + CSV_HEADER, f"c,1,sad,Rain,1,from {name},5,")
    rows, _ = run(tmp_path, "empatheticdialogues", tmp_path)
    assert [row["messages"][0]["content"] for row in rows] == ["from train.csv", "from test.csv"]


# ---------------------------------------------------------------- ESConv


def test_esconv_opening_turns_and_nouns(tmp_path):
    talk = [
        ("supporter", "Hello!\n"),
        ("seeker", " The mill \n"),
        ("seeker", ""),
        ("seeker", "shuts in May."),
        ("supporter", "Oh."),
        ("seeker", "Yes."),
    ]
    old = [("usr", "I froze on stage."), ("sys", "And then?")]
    records = [
        esconv(*talk),
        *(esconv(*old, emotion=noun) for noun in importers.ESCONV_LABELS),
        esconv(*old, emotion="Worried"),
    ]
    records += [
        esconv(*old, emotion="pain"),
        esconv(("sys", "Anyone?")),
        esconv(("bot", "x")),
        esconv(*old, dialog=None),
    ]
    source = tmp_path / "ESConv.json"
    source.write_text(json.dumps(records, indent=4), encoding="utf-8-sig")
    rows, report = run(source, "esconv", tmp_path)
    assert rows[0]["messages"] == [{"role": "user", "content": "The mill shuts in May."}]
    assert rows[0] | {"messages": 0, "anon_username": 0} == {
        "person": NO_PROFILE,
        "mbti": "",
        "emotion": "anxious",
        "situation": "The mill closes.",
        "anon_username": 0,
        "messages": 0,
    }
    assert [row["emotion"] for row in rows[1:]] == [*importers.ESCONV_LABELS.values(), "anxious"]
    assert report.unmapped == {"pain": 1} and report.prompts == len(rows) == 12
    assert set(report.skipped) == {
        "emotion has no known label",
        "conversation without a user turn",
        "unknown speaker",
        "dialog missing or not a list of turns",
    }


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_a_list_reads_the_same_whatever_the_window(chunk, tmp_path, monkeypatch):
    """Every cut falls somewhere nasty once: in a number, an escape, a literal, a two-byte letter, between elements."""
    monkeypatch.setattr(importers, "CHUNK", chunk)
    values = [{"a": 'x"\\é\u2028', "b": [1.5e-7, None, True]}, 1234, [], {}, "é", [[{"c": {}}]]]
    path = tmp_path / "x.json"
    for text in (json.dumps(values), json.dumps(values, indent=1, ensure_ascii=False), "[]", " [ ] \n"):
        path.write_text("\ufeff" + text, encoding="utf-8")
        found = list(importers._array(path, importers._Meter(1, None)))
        assert [value for _, value in found] == json.loads(text)
        for line, value in found:
            if isinstance(value, dict):
                assert text.split("\n")[line - 1].lstrip(" [").startswith("{")


@pytest.mark.parametrize(
    "text, expected",
    [
        ('[{"a": 1},\n{"b": "cut', ":2: malformed JSON list"),
        ('[{"a": 1},\n{"b": 2}', ":2: malformed JSON list"),
        (
            '[{"a": 1},\n\n{"b": 2 "c": 3},\n{"d": 4}]',
            ":3: malformed JSON list, unreadable from here (Expecting ',' delimiter",
        ),
        ('[{"a": 1}\n{"b": 2}]', ":2: expected , or ] of the JSON list, found {"),
        ('[{"a": 1}]\n[{"b": 2}]', ":2: expected the end of the JSON list, found ["),
        ('[{"a": "' + 200_000 * "x" + '"}]', "a list element over 0 MB"),
    ],
)
def test_a_torn_list_is_an_error_with_its_line(text, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(importers, "MAX_ELEMENT", 1000)
    assert expected in problem(put(tmp_path / "ESConv.json", text, newline=""), "esconv", tmp_path)


# ---------------------------------------------------------------- any source


@pytest.mark.parametrize(
    "format, content, expected",
    [
        ("kardiabench", None, "no such file"),
        ("kardiabench", b"", "the file is empty"),
        ("kardiabench", b"\n \n", "no rows in it"),
        ("esconv", b" []", "no rows in it"),
        ("esconv", b"PK\x03\x04zip", "a binary file"),
        ("kardiabench", '{"a": 1}'.encode("utf-16"), "a binary file"),
        ("kardiabench", b"PAR1 and nothing more", "a.file"),
        ("kardiabench", b'{"a": 1}\n\n{"b": "caf\xe9"}\n', "a.file:3: not UTF-8"),
        ("esconv", b'[{"a": 1},\n{"b": "caf\xe9"}]', "a.file:2: not UTF-8"),
        ("empatheticdialogues", b"id,text\n1,x\n", f"a.file:1: expected header {CSV_HEADER}, found id,text"),
        ("empatheticdialogues", b"\xef\xbb\xbf", "found nothing"),
        (
            "kardiabench",
            b"{torn\n{torn\n[1]\n",
            "none of its 3 records can be used: 2 x malformed JSON (a.file:1: ",
        ),
        (
            "goemotions",
            b"x",
            "unknown format 'goemotions': use one of kardiabench, empatheticdialogues, esconv",
        ),
    ],
)
def test_unusable_sources_are_one_line(format, content, expected, tmp_path):
    source = tmp_path / "a.file"
    if content is not None:
        source.write_bytes(content)
    assert expected in problem(source, format, tmp_path)


def test_directory_without_data_and_target_problems(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no ESConv.json in this directory" in problem(tmp_path / "empty", "esconv", tmp_path)
    source = put(tmp_path / "a.jsonl", kardia())
    for target in (source, tmp_path / "empty"):
        with pytest.raises(ImportProblem, match="cannot be the target"):
            import_dataset(source, "kardiabench", target, EMOTIONS)
    assert source.read_text() and not list(tmp_path.glob(".*"))


def test_a_failure_half_way_leaves_no_target(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    source = put(tmp_path / "a.jsonl", *[kardia("x" * 100_000)] * 30)
    with pytest.raises(KeyboardInterrupt):
        import_dataset(source, "kardiabench", tmp_path / "rows.jsonl", EMOTIONS, stop)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("format", ["kardiabench", "esconv"])
def test_thirty_megabytes_stream(format, tmp_path):
    record = json.dumps(
        kardia("word " * 3000) if format == "kardiabench" else esconv(("seeker", "word " * 3000))
    )
    source, count, calls = tmp_path / "big.json", 30_000_000 // len(record), []
    with open(source, "w") as out:  # one line for the list, as json.dump writes it
        separator, brackets = (", ", "[]") if format == "esconv" else ("\n", ("", ""))
        out.write(brackets[0] + record + (separator + record) * (count - 1) + brackets[1])
    tracemalloc.start()
    report = import_dataset(
        source, format, tmp_path / "rows.jsonl", EMOTIONS, lambda done, total: calls.append((done, total))
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.rows == count and peak < 20_000_000
    size = source.stat().st_size
    assert calls == sorted(calls) and calls[-1] == (size, size) and 20 < len(calls) < 40


# ---------------------------------------------------------------- the hub, without one


def hub_error(name):
    httpx = pytest.importorskip("httpx")
    from huggingface_hub import errors

    if name in ("ConnectError", "ReadTimeout"):
        return getattr(httpx, name)("no route\nto host")
    if name in ("GatedRepoError", "RepositoryNotFoundError", "HfHubHTTPError"):
        status = {"GatedRepoError": 403, "RepositoryNotFoundError": 404, "HfHubHTTPError": 401}[name]
        return getattr(errors, name)(
            "no\nentry", response=httpx.Response(status, request=httpx.Request("GET", "http://hub.invalid"))
        )
    return getattr(errors, name, ConnectionError)("no\nentry")


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "GatedRepoError",
            "accept the conditions on the dataset's page with your account, run `hf auth login`",
        ),
        ("RepositoryNotFoundError", "run `hf auth login`"),
        ("HfHubHTTPError", "run `hf auth login`"),
        ("LocalTokenNotFoundError", "run `hf auth login`"),
        ("LocalEntryNotFoundError", "check the network"),
        ("OfflineModeIsEnabled", "offline mode is on (HF_HUB_OFFLINE): unset it"),
        ("ConnectError", "cannot be downloaded (ConnectError: no route to host): check the network"),
        ("ReadTimeout", "check the network"),
        ("ConnectionError", "check the network"),
    ],
)
def test_hub_failures_say_what_to_do(name, expected, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    error, asked = hub_error(name), []

    def refuse(repo, **options):
        asked.append(repo)
        raise error

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    message = problem("Jhcircle/KardiaBench", "kardiabench", tmp_path)
    assert expected in message and message.endswith("bring that folder here and import it")
    both = ["Jhcircle/KardiaBench", "Jhcircle/KadiaBench"]
    assert asked == (both if name == "RepositoryNotFoundError" else both[:1])


def test_hub_files_are_read_like_a_directory(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "cache").mkdir()
    put(tmp_path / "cache" / "train.jsonl", kardia())
    monkeypatch.setattr(
        hub, "snapshot_download", lambda repo, repo_type, allow_patterns: str(tmp_path / "cache")
    )
    assert len(run("jhcircle/kadiabench", "kardiabench", tmp_path)[0]) == 1


# ---------------------------------------------------------------- what was read, what was not


def test_every_skipped_record_is_listed(tmp_path):
    source = put(tmp_path / "a.jsonl", kardia(), *[kardia(emotion=f"mood {i}") for i in range(9)], "{torn")
    _, report = run(source, "kardiabench", tmp_path)
    lines = report.skipped_list.read_text(encoding="utf-8").splitlines()
    assert (
        report.skipped_list.name == "rows.jsonl.skipped.txt"
        and len(lines) == sum(report.skipped.values()) == 10
    )
    assert lines[0] == "a.jsonl:2: emotion has no known label: mood 0" and lines[-1].startswith(
        "a.jsonl:11: malformed JSON"
    )
    _, report = run(put(tmp_path / "b.jsonl", kardia()), "kardiabench", tmp_path)
    assert report.skipped_list is None and [p.name for p in (tmp_path / "out").iterdir()] == [
        "rows.jsonl"
    ]  # the older list is gone


def test_one_split_of_a_directory(tmp_path):
    folder = tmp_path / "bench"
    folder.mkdir()
    put(folder / "train-00000.jsonl", kardia(), kardia())
    put(folder / "test-00000.jsonl", kardia())
    _, report = run(folder, "kardiabench", tmp_path, split="train")
    assert report.files == {str(folder / "train-00000.jsonl"): 2}
    _, report = run(folder, "kardiabench", tmp_path)
    assert list(report.files.values()) == [1, 2]
    with pytest.raises(
        ImportProblem,
        match=r"no file with 'valid' in its name \(there are test-00000.jsonl, train-00000.jsonl\)",
    ):
        import_dataset(folder, "kardiabench", tmp_path / "x.jsonl", EMOTIONS, split="valid")


def test_messages_that_went_through_a_text_column(tmp_path):
    record = kardia()
    rows, _ = run(
        put(tmp_path / "a.jsonl", {**record, "messages": json.dumps(record["messages"])}, kardia()),
        "kardiabench",
        tmp_path,
    )
    assert rows[0] == rows[1]


@pytest.mark.parametrize("row_group", [200, 10**6])
def test_parquet_streams_whatever_its_row_groups(row_group, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    source, record = tmp_path / "big.parquet", kardia("word " * 3000)
    table = pyarrow.Table.from_pylist([{**record, "anon_username": f"user{i}"} for i in range(5000)])
    parquet.write_table(table, source, row_group_size=row_group, compression="none", use_dictionary=False)
    del table
    before, peak = pyarrow.total_allocated_bytes(), []
    _, report = run(
        source,
        "kardiabench",
        tmp_path,
        progress=lambda *_: peak.append(pyarrow.total_allocated_bytes() - before),
    )
    assert report.rows == 5000 and source.stat().st_size > 70_000_000 and max(peak) < 20_000_000
