"""Every expected mistake is one clear line and exit 1 or 2, never a traceback, and leaves nothing behind."""

import ast
import dataclasses
import json
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner
from conftest import commands

import kardia_lite as k
from kardia.core.options import DATA, PROJECT
from kardia.models.base import embedded_gguf


def run(*arguments):
    return CliRunner().invoke(k.cli, [str(a) for a in arguments])


def one_line(result, *parts, code=1):
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error")]) == 1, result.stderr
    for part in parts:
        assert str(part) in result.stderr, result.stderr


def lines_of(file):
    return (DATA / file).read_text(encoding="utf-8").splitlines()


def test_bad_rows(tmp_path):
    """(Every rule of a row is in test_data.py.)"""
    good, path = lines_of("dialogues.jsonl")[0], tmp_path / "rows.jsonl"
    backwards = json.loads(good)
    backwards["messages"].reverse()
    spans = re.findall(r"<\|\w+_begin\|>.*?<\|\w+_end\|>", good)
    for line, words in (
        (json.dumps(backwards), "roles alternate and the user begins"),
        (good.replace(spans[0] + spans[1], spans[1] + spans[0]), "out of order"),
    ):
        path.write_text(f"{good}\n{line}\n", encoding="utf-8")
        one_line(run("data", "check", path), "rows.jsonl:2", words)
        one_line(run("sft", "--data", path, "--out", tmp_path / "run"), "rows.jsonl:2", words)
    assert not (tmp_path / "run").exists()


def test_missing_files(tmp_path):
    nothing, out = tmp_path / "nothing.jsonl", tmp_path / "out"
    for line, *words in (
        (("data", "check", nothing), nothing, "no such file"),
        (("sft", "--data", nothing, "--out", out), nothing, "no such file"),
        (("sft", "--rubric", nothing, "--out", out), nothing),
        (("sft", "--model", tmp_path / "model.gguf", "--out", out), "no such GGUF file"),
        (("judge", "score", nothing, "--out", out), nothing, "no such file"),
        (("grpo", "--from", tmp_path, "--out", out), "not a run directory"),
        (("export", tmp_path, "--to", out), "not a run directory"),
        (("explain", tmp_path), tmp_path),
        (("doctor", "--model", nothing), nothing),
        (("data", "import", nothing, "--format", "esconv", "--out", out), nothing),
    ):
        one_line(run(*line), *words)
    assert not out.exists()


def test_options_are_checked_at_the_edge():
    lines = "epochs -1", "bits 5", "batch-size 0", "engine jax", "nonsense 1"
    for line in [f"sft --out r --{line}" for line in lines]:
        result, flag = run(*line.split()), line.split()[3]
        assert result.exit_code == 2 and flag in result.stderr and "Traceback" not in result.stderr, line
    assert run("sft").exit_code == 2
    for line in (["explain"], ["explain", "runs/x", "--toy"]):
        result = run(*line)
        assert result.exit_code == 2 and "give a run directory, or --toy" in result.stderr


def test_what_this_machine_cannot_do(tiny_directory, tmp_path, monkeypatch):
    out, base = tmp_path / "r", tiny_directory("llama")
    result = run("sft", "--engine", "unsloth", "--model", base, "--limit", 1, "--out", out)
    one_line(result, "--engine unsloth needs an NVIDIA GPU")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = run("sft", "--model", "nobody/nothing", "--out", out)
    one_line(hub, "nobody/nothing", "give a local directory or .gguf")
    one_line(run("sft", "--model", "not a model", "--out", out), "no such file or directory")
    assert not out.exists()


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec

    def without(name, *rest):
        return None if name.startswith(("tensorboard", "trackio")) else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    for tracker in ("tensorboard", "trackio"):
        result = run("sft", "--limit", 1, "--track", tracker, "--out", tmp_path / "r")
        one_line(result, f"--track {tracker}", f"pip install {tracker}")
    assert not (tmp_path / "r").exists()


def test_a_run_directory_that_exists(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    one_line(run("sft", "--limit", 1, "--out", out), out, "exists already")
    one_line(run("demo", "--out", out), out, "exists already")
    assert (out / "precious.txt").read_text() == "mine"


def test_a_judge_or_base_that_is_no_whole_gguf(tmp_path):
    path, source = tmp_path / "odd.gguf", embedded_gguf()
    with open(source, "rb") as file:
        half = file.read(source.stat().st_size // 2)
    for content, message in ((b"PK\x03\x04 not a model", "not a GGUF file"), (half, "truncated GGUF")):
        path.write_bytes(content)
        one_line(run("judge", "exam", "--judge", path), path, message)
        one_line(run("sft", "--model", path, "--limit", 1, "--out", tmp_path / "r"), path, message)
    assert not (tmp_path / "r").exists()


# ---------------------------------------------------------------------------------- runs


def test_a_run_of_one_task_and_a_rubric_of_another(tiny_directory, tmp_path):
    finished, base = tmp_path / "run", k.resolve_base(str(tiny_directory("llama")))
    facts = {"command": "sft", "options": {}, "status": "done", "bits": 16, "model": base.name}
    facts |= {"base": str(base.directory), "base_gguf": None, "base_hash": base.hash}
    rubric = k.load_rubric(PROJECT / "tests" / "code_review" / "rubrics.yaml")
    (finished / "adapter").mkdir(parents=True)
    (finished / "run.json").write_text(json.dumps({**facts, "form": rubric.form.facts()}))
    (finished / "adapter" / "adapter_config.json").write_text("{}")
    other = "was trained on answers of change, risk, verdict, comment"
    out = tmp_path / "o"
    one_line(run("grpo", "--from", finished, "--out", out), other, "give the --rubric it was trained with")
    one_line(run("export", finished, "--to", out, "--answers", 0), other)
    assert not out.exists()


def test_what_a_resumed_run_may_change(tmp_path):
    """An option that its run.json does not know had its default then; any other value now is another run."""
    run = k.Run.create(tmp_path / "run", "grpo", k.GRPOOptions(patience=3), False)
    unknown = ("embedding", "rollout_type")
    options = {name: value for name, value in run.facts["options"].items() if name not in unknown}
    with run:
        run.update(options=options)
    with k.Run.create(tmp_path / "run", "grpo", k.GRPOOptions(patience=0), True) as again:
        assert set(again.facts["options"]) == set(options)
    for change in ({"steps": 7}, {"rollout_type": "q8_0"}):
        flag = next(iter(change)).replace("_", "-")
        with pytest.raises(k.UserError, match=f"--resume with another --{flag}"):
            k.Run.create(tmp_path / "run", "grpo", k.GRPOOptions(patience=0, **change), True)


# ---------------------------------------------------------------------------------- data and judge commands


def test_data_check_shows_counts_and_the_loss_mask(tmp_path, little):
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(lines_of("dialogues.jsonl")[:3]) + "\n", encoding="utf-8")
    result = run("data", "check", path, "--model", little)
    assert result.exit_code == 0 and "3 rows are valid" in result.stderr
    assert "  3         3       0       3        3" in result.stdout
    assert "[[<|understanding_begin|>" in result.stdout and "<|im_end|>]]" in result.stdout
    assert "over --max-length 1536: none" in result.stdout
    result = run("data", "check", path, "--model", little, "--max-length", 64, "--show", 0)
    assert "over --max-length 64: 3 (they lose their last turns" in result.stdout
    assert "[[" not in result.stdout
    path.write_text("\n".join(lines_of("prompts.jsonl")[:2]) + "\n", encoding="utf-8")
    shown = run("data", "check", path, "--model", little, "--show", 2).stdout
    assert "few.jsonl:2 as the model sees it" in shown and "a prompt: GRPO draws the answer" in shown
    assert "[[<|" not in shown


def test_data_import_goes_through_the_same_rows(tmp_path, rubric):
    source, out = tmp_path / "train.csv", tmp_path / "prompts.jsonl"
    source.write_text(
        "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags\n"
        "hit:1_conv:2,1,sentimental,I found a letter_comma_ an old one.,1,I found a letter.,5|5|5_5|5|5,\n"
    )
    line = ("data", "import", source, "--format", "empatheticdialogues", "--out", out)
    result = run(*line)
    assert result.exit_code == 0 and "1 rows" in result.stdout
    assert k.load_rows([out], rubric, "prompt")[0].situation == "I found a letter, an old one."
    one_line(run(*line), "exists already")


def test_rows_that_cannot_be_scored_name_their_line(tmp_path):
    path, user = tmp_path / "replies.jsonl", '[{"role": "user", "content": "hi"}]'
    for line in (
        "[]",
        "nope",
        '{"response": "x"}',
        f'{{"messages": {user}, "response": null}}',
        '{"messages": "hello", "response": "x"}',
        '{"messages": [{"role": "User", "content": "hi"}], "response": "x"}',
        f'{{"messages": {user}, "response": "x \\ud83d"}}',
        "[" * 100_000,
        '{"messages": [{"role": "user"}], "response": "x"}',
    ):
        path.write_text(f'{{"messages": {user}, "response": "x"}}\n{line}\n{line}\n', encoding="utf-8")
        result = run("judge", "score", path, "--out", tmp_path / "out.jsonl")
        one_line(result, f"{path}:2: found", f"{path}:3: found")
    assert not (tmp_path / "out.jsonl").exists()


# ---------------------------------------------------------------------------------- the manual


def test_every_command_has_a_manual_and_help_is_quick():
    for name, _ in commands():
        result = run(*name.split(), "--help")
        assert result.exit_code == 0 and len(result.stdout) > 150, name
        if "Commands:" in result.stdout:  # a help that is cut off helps nobody
            assert "..." not in result.stdout.partition("Commands:")[2], result.stdout
    assert "..." not in run("--help").stdout.partition("Commands:")[2]
    listed = re.findall(r"(?m)^  (\w+)  ", run("--help").stdout.partition("Commands:")[2])
    order = "doctor data sft grpo judge evaluate export explain report chat demo"
    assert listed == order.split()  # the order in which a run happens
    heavy = {"torch", "transformers", "llama_cpp", "scipy"}
    code = f"import sys, kardia_lite; print({heavy} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True).stdout
    assert out.strip() == "set()"  # --help must not wait for them


def test_options_declare_themselves_once():
    """Every field of an options record is an option of its command; shipped files are found from anywhere."""
    for cls, name in ((k.SFTOptions, "sft"), (k.GRPOOptions, "grpo"), (k.EvaluateOptions, "evaluate")):
        declared = {option.name for option in k.cli.commands[name].params}
        assert {f.name for f in dataclasses.fields(cls)} <= declared
    assert all(path.is_absolute() for path in (k.SFTOptions().data, k.EvaluateOptions().exam_pairs))
    assert k.SFTOptions().data.is_file() and k.GRPOOptions().data.is_file()


def test_the_script_names_what_it_needs():
    """`uv run kardia_lite.py demo` reads the block at its head (PEP 723); it must be requirements.txt."""
    script = (PROJECT / "kardia_lite.py").read_text(encoding="utf-8")
    # the expression of PEP 723 itself
    blocks = re.findall(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", script)
    assert [kind for kind, *_ in blocks] == ["script"]
    block = re.sub(r"(?m)^# ?", "", blocks[0][1])
    named = re.search(r"dependencies = (\[.*?\])", block, re.DOTALL)[1]
    required = (PROJECT / "requirements.txt").read_text().split()
    assert ast.literal_eval(named) == required and not any("pytest" in name for name in required)
    assert 'requires-python = ">=3.10"' in block
