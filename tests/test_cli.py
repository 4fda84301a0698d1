"""Every expected mistake is one clear line and exit 1 or 2, never a traceback, and leaves nothing behind."""

import json
import re

import pytest
from click.testing import CliRunner

import kardia_lite as k
from kardia.models.base import embedded_gguf


def run(*arguments):
    return CliRunner().invoke(k.cli, [str(a) for a in arguments])


def one_line(result, *parts, code=1, lines=1):
    assert result.exit_code == code, (result.output, result.exception)
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit)
    message = result.stderr.strip()
    assert "Traceback" not in message
    if lines:
        assert len([line for line in message.splitlines() if line.startswith("Error")]) == 1
    for part in parts:
        assert str(part) in message, message


@pytest.fixture
def rows(tmp_path):
    """data(lines) -> a JSONL file; the good row first."""
    good = (k.DATA / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()[0]

    def make(change=None, text=None):
        value = json.loads(good)
        if change:
            change(value)
        path = tmp_path / "rows.jsonl"
        path.write_text(
            good + "\n" + (text if text is not None else json.dumps(value)) + "\n", encoding="utf-8"
        )
        return path

    return make


def answer(value):
    return value["messages"][1]


@pytest.mark.parametrize(
    ("change", "text", "parts"),
    [
        (None, '{"person": ', ["rows.jsonl:2", "one JSON object per line"]),
        (lambda v: v["messages"].reverse(), None, ["rows.jsonl:2", "roles alternate and the user begins"]),
        (lambda v: v.update(emotion="gloomy"), None, ["rows.jsonl:2", "'gloomy'", "labels in rubrics.yaml"]),
        (
            lambda v: answer(v).update(content=answer(v)["content"].replace("<|reasoning_begin|>", "")),
            None,
            ["rows.jsonl:2", "<|reasoning_begin|> is missing"],
        ),
        (
            lambda v: answer(v).update(
                content="".join(
                    reversed(re.findall(r"<\|\w+_begin\|>.*?<\|\w+_end\|>", answer(v)["content"]))
                )
            ),
            None,
            ["rows.jsonl:2", "out of order"],
        ),
    ],
    ids=["malformed JSON", "wrong role order", "unknown emotion", "missing span", "reordered spans"],
)
@pytest.mark.parametrize("command", ["data check", "sft"])
def test_bad_rows(rows, tmp_path, change, text, parts, command):
    path = rows(change, text)
    arguments = (
        ["data", "check", path]
        if command == "data check"
        else ["sft", "--data", path, "--out", tmp_path / "run"]
    )
    one_line(run(*arguments), *parts)
    assert not (tmp_path / "run").exists()


def test_missing_files(tmp_path):
    nothing = tmp_path / "nothing.jsonl"
    one_line(run("data", "check", nothing), nothing, "no such file")
    one_line(run("sft", "--data", nothing, "--out", tmp_path / "r"), nothing, "no such file")
    one_line(run("sft", "--rubric", nothing, "--out", tmp_path / "r"), nothing)
    one_line(run("sft", "--model", tmp_path / "model.gguf", "--out", tmp_path / "r"), "no such GGUF file")
    one_line(run("judge", "score", nothing, "--out", tmp_path / "o.jsonl"), nothing, "no such file")
    one_line(run("grpo", "--from", tmp_path, "--out", tmp_path / "g"), "not a run directory")
    one_line(run("export", tmp_path, "--to", tmp_path / "e"), "not a run directory")
    one_line(run("explain", tmp_path), str(tmp_path))
    one_line(run("doctor", "--model", nothing), nothing)


def test_options_are_checked_at_the_edge(tmp_path):
    for arguments in (
        ["--epochs", "-1"],
        ["--bits", "5"],
        ["--batch-size", "0"],
        ["--engine", "jax"],
        ["--nonsense"],
    ):
        result = run("sft", "--out", tmp_path / "r", *arguments)
        assert result.exit_code == 2 and arguments[0] in result.stderr and "Traceback" not in result.stderr
    assert run("export", tmp_path, "--to", tmp_path / "e", "--formats", "q9").exit_code == 2
    assert run("sft").exit_code == 2


def test_no_engine_without_its_machine(tmp_path):
    one_line(
        run("sft", "--engine", "unsloth", "--limit", 1, "--out", tmp_path / "r"),
        "--engine unsloth needs an NVIDIA GPU",
    )
    assert not (tmp_path / "r").exists()


def test_a_hub_id_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    one_line(
        run("sft", "--model", "nobody/nothing", "--out", tmp_path / "r"),
        "nobody/nothing",
        "give a local directory or .gguf",
    )
    one_line(run("sft", "--model", "not a model", "--out", tmp_path / "r"), "no such file or directory")


def test_a_run_directory_that_exists(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    one_line(run("sft", "--limit", 1, "--out", out), out, "exists already")
    one_line(run("demo", "--out", out), out, "exists already")
    assert (out / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 not a model", "not a GGUF file"),
        (b"", "not a GGUF file"),
        (b"GGUF", "truncated"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, "truncated"),
    ],
)
def test_a_judge_that_is_no_gguf(tmp_path, content, message):
    path = tmp_path / "judge.gguf"
    path.write_bytes(content)
    one_line(run("judge", "exam", "--judge", path), path, message)


def test_a_truncated_gguf(tmp_path):
    path = tmp_path / "short.gguf"
    source = embedded_gguf()
    with open(source, "rb") as file:
        path.write_bytes(file.read(source.stat().st_size // 2))
    one_line(run("judge", "exam", "--judge", path), path, "truncated GGUF")
    one_line(run("sft", "--model", path, "--limit", 1, "--out", tmp_path / "r"), path, "truncated GGUF")
    assert not (tmp_path / "r").exists()


def finished_run(path, base, adapter=None):
    """A run directory as `sft` leaves it, with an adapter of our making."""
    path.mkdir()
    facts = {"command": "sft", "options": {}, "status": "done", "bits": 16, **k.describe(base)}
    k.write_json(path / "run.json", facts)
    if adapter is not None:
        adapter.save_pretrained(path / "adapter")
    return path


def test_an_adapter_of_another_base(tmp_path, tiny, embedded):
    from peft import LoraConfig, get_peft_model

    other = get_peft_model(tiny("llama"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    path = finished_run(tmp_path / "run", embedded, other)
    result = run("export", path, "--to", tmp_path / "out")
    one_line(result, "another base", lines=0)
    assert not (tmp_path / "out").exists()
    one_line(run("chat", path, "--say", "hi"), "another base", lines=0)


def test_adapters_that_are_refused(tmp_path, tiny, embedded):
    path = finished_run(tmp_path / "run", embedded)
    one_line(run("export", path, "--to", tmp_path / "out"), "no adapter/")
    (path / "adapter").mkdir()
    (path / "adapter" / "adapter_config.json").write_text("{}")
    (path / "adapter" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    one_line(run("export", path, "--to", tmp_path / "out"), "pickle", lines=0)
    (path / "adapter" / "adapter_model.safetensors").write_bytes(b"\x00" * 9)
    one_line(run("export", path, "--to", tmp_path / "out"), "damaged adapter", lines=0)


def test_a_damaged_run_json(tmp_path):
    (tmp_path / "run.json").write_text('{"command": ')
    one_line(run("grpo", "--from", tmp_path, "--out", tmp_path / "g"), "run.json: damaged")


def test_judge_score_lists_bad_rows(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"messages": [], "response": "x"}\n{"response": 1}\nnope\n')
    one_line(run("judge", "score", path, "--out", tmp_path / "o.jsonl"), f"{path}:2", f"{path}:3")
    assert not (tmp_path / "o.jsonl").exists()


def test_data_check_shows_counts_and_the_loss_mask(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text(
        "\n".join((k.DATA / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()[:3]) + "\n",
        encoding="utf-8",
    )
    result = run("data", "check", path)
    assert (
        result.exit_code == 0
        and "3 rows are valid" in result.stderr
        and "  3         3       0       3        3" in result.stdout
    )
    assert "[[<|understanding_begin|>" in result.stdout and "<|im_end|>]]" in result.stdout


def test_data_import_goes_through_the_same_rows(tmp_path, rubric):
    source = tmp_path / "train.csv"
    source.write_text(
        "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags\nhit:1_conv:2,1,sentimental,I found a letter_comma_ an old one.,1,I found an old letter today.,5|5|5_5|5|5,\n"
    )
    out = tmp_path / "prompts.jsonl"
    result = run("data", "import", source, "--format", "empatheticdialogues", "--out", out)
    assert result.exit_code == 0 and "1 rows" in result.stdout
    assert k.load_rows([out], rubric, "prompt")[0].situation == "I found a letter, an old one."
    one_line(run("data", "import", source, "--format", "empatheticdialogues", "--out", out), "exists already")


def test_every_command_has_a_manual_and_help_is_quick():
    import subprocess
    import sys

    def commands(group, path=()):
        for name, command in group.commands.items():
            yield (*path, name)
            if hasattr(command, "commands"):
                yield from commands(command, (*path, name))

    for path in commands(k.cli):
        result = run(*path, "--help")
        assert result.exit_code == 0 and len(result.stdout) > 150, path
    code = "import sys; sys.argv = ['k', '--help']; import kardia_lite\ntry: kardia_lite.cli()\nexcept SystemExit: print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=k.HERE, capture_output=True, text=True).stdout
    assert out.strip().endswith("False False")  # --help must not wait for torch


def test_doctor_prints_the_memory_plan(tmp_path):
    result = run("doctor")
    assert (
        result.exit_code == 0
        and "memory plan" in result.stdout
        and "activations" in result.stdout
        and result.stdout.count(": fits, ") == 2
    )
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    one_line(run("doctor", "--model", tmp_path / "config.json"), "config.json has no")


def test_options_declare_themselves_once():
    """Every knob becomes an option of its command with its help, and lands in run.json under its name."""
    import dataclasses

    for cls, path in ((k.SFTOptions, ["sft"]), (k.GRPOOptions, ["grpo"]), (k.EvaluateOptions, ["evaluate"])):
        command = k.cli
        for name in path:
            command = command.commands[name]
        declared = {o.name for o in command.params}
        assert {f.name for f in dataclasses.fields(cls)} <= declared


def test_shipped_commands_find_their_data_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        k.SFTOptions().data.is_file()
        and k.GRPOOptions().data.is_file()
        and k.EvaluateOptions().exam_pairs.is_file()
    )


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        '{"response": "x"}',
        '{"messages": [{"role": "user", "content": "hi"}], "response": null}',
        '{"messages": "hello", "response": "x"}',
        '{"messages": [{"role": "User", "content": "hi"}], "response": "x"}',
        '{"messages": [{"role": "user", "content": "hi"}], "response": "x \\ud83d"}',
        "[" * 100_000,
        '{"messages": [{"role": "user"}], "response": "x"}',
    ],
)
def test_rows_that_cannot_be_scored_name_their_line(tmp_path, line):
    path = tmp_path / "replies.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    result = run("judge", "score", path, "--out", tmp_path / "out.jsonl")
    assert (
        result.exit_code == 1
        and f"{path}:1: found" in result.output
        and "Traceback" not in result.output
        and not (tmp_path / "out.jsonl").exists()
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "not UTF-8"),
        (
            b'{"criterion": "safety", "better": 5, "worse": "x", "messages": [{"role": "user", "content": "u"}]}',
            "better = 5",
        ),
        (b'{"criterion": "safety", "better": "a", "worse": "b", "messages": "hello"}', "messages = hello"),
        (
            b'{"criterion": "safety", "better": "a", "worse": "b", "messages": [{"role": "user"}]}',
            "messages = ",
        ),
    ],
)
def test_exam_pairs_that_are_none(tmp_path, content, message):
    from kardia.judge import exam

    (tmp_path / "pairs.jsonl").write_bytes(content)
    with pytest.raises(exam.ExamError, match="pairs.jsonl") as error:
        exam.load_pairs(tmp_path / "pairs.jsonl", ["safety"])
    assert message in str(error.value)


def test_the_script_names_what_it_needs():
    """`uv run kardia_lite.py demo` reads the block at its head (PEP 723); it must be requirements.txt, word for word."""
    import ast
    import re

    script = (k.HERE / "kardia_lite.py").read_text(encoding="utf-8")
    blocks = re.findall(
        r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", script
    )  # the expression of PEP 723 itself
    assert [kind for kind, *_ in blocks] == ["script"]
    block = "".join(
        line[2:] if line.startswith("# ") else line[1:] for line in blocks[0][1].splitlines(keepends=True)
    )
    named = re.search(r"dependencies = (\[.*?\])", block, re.DOTALL)[1]
    assert ast.literal_eval(named) == (k.HERE / "requirements.txt").read_text().split()
    assert 'requires-python = ">=3.10"' in block


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain"], "give a run directory, or --toy"),
        (["explain", "runs/x", "--toy"], "give a run directory, or --toy"),
    ],
)
def test_explain_wants_one_thing(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.stderr


def test_a_run_of_one_task_and_a_rubric_of_another(tmp_path, embedded):
    path = finished_run(tmp_path / "run", embedded)
    facts = json.loads((path / "run.json").read_text())
    review = k.HERE / "tests" / "code_review"
    k.write_json(path / "run.json", {**facts, "form": k.load_rubric(review / "rubrics.yaml").form.facts()})
    (path / "adapter").mkdir()
    (path / "adapter" / "adapter_config.json").write_text("{}")
    one_line(
        run("grpo", "--from", path, "--out", tmp_path / "g"),
        "was trained on answers of change, risk, verdict, comment",
        "give the --rubric it was trained with",
    )
    one_line(
        run("export", path, "--to", tmp_path / "e"),
        "was trained on answers of change, risk, verdict, comment",
    )
    assert not (tmp_path / "g").exists() and not (tmp_path / "e").exists()


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name.startswith(("tensorboard", "trackio")) else real(name, *rest),
    )
    for tracker in ("tensorboard", "trackio"):
        one_line(
            run("sft", "--limit", 1, "--track", tracker, "--out", tmp_path / "r"),
            f"--track {tracker}",
            f"pip install {tracker}",
        )
    assert not (tmp_path / "r").exists()


def test_show_names_what_is_trained(tmp_path):
    result = run("data", "check", k.DATA / "prompts.jsonl", "--show", 2)
    assert (
        "prompts.jsonl:2 as the model sees it" in result.stdout
        and "a prompt: GRPO draws the answer" in result.stdout
        and "[[<|" not in result.stdout
    )


def test_a_model_whose_memory_cannot_be_planned_trains_all_the_same(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    base, wanted = k.Base("odd", tmp_path, None, "x"), k.memory_plan.Setting(cuda=False)
    assert k.settle(base, wanted, ()) == (wanted, {})
    assert "no plan for odd (config.json has no" in capsys.readouterr().err


def test_a_run_stopped_by_its_patience_may_go_on_with_more(tmp_path):
    options = k.GRPOOptions(patience=3)
    k.Run.create(tmp_path / "run", "grpo", options, resume=False)
    assert (
        k.Run.create(tmp_path / "run", "grpo", k.GRPOOptions(patience=0), resume=True).facts["command"]
        == "grpo"
    )
    with pytest.raises(k.UserError, match="--resume with another --steps"):
        k.Run.create(tmp_path / "run", "grpo", k.GRPOOptions(patience=0, steps=7), resume=True)


def test_a_run_of_a_version_with_fewer_options_goes_on(tmp_path):
    """An option that its run.json does not know had its default then; any other value now is another run."""
    run = k.Run.create(tmp_path / "run", "grpo", k.GRPOOptions(), False)
    options = {
        name: value
        for name, value in run.facts["options"].items()
        if name not in ("embedding", "rollout_type")
    }
    with run:
        run.update(options=options)
    with k.Run.create(tmp_path / "run", "grpo", k.GRPOOptions(), True) as again:
        assert again.facts["options"] == options
    with pytest.raises(k.UserError, match="--resume with another --rollout-type"):
        k.Run.create(tmp_path / "run", "grpo", k.GRPOOptions(rollout_type="q8_0"), True)
