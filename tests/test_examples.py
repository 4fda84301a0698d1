"""Every example line of the manual is a line that the program takes; six of them are run for real."""

import re
import shlex
import shutil

import click
import pytest
from click.testing import CliRunner
from conftest import commands

import kardia_lite as k
from kardia.core.options import DATA, PROJECT
from kardia.models.base import embedded_gguf

EXAM = "--exam-pairs few/exam.jsonl"
# Each line as it stands in the manual, plus flags that make it short. What one makes the next one needs.
REAL = {
    "data check data/dialogues.jsonl --show 3": "",
    "sft --out runs/sft": "--limit 2 --max-steps 4 --batch-size 1 --max-length 700 --learning-rate 3e-3",
    "judge train --out judge_lora.gguf": f"--pairs few/train.jsonl {EXAM} --epochs 1",
    "judge exam": "--pairs few/exam.jsonl",
    "evaluate base runs/sft runs/grpo": f"--data few/eval.jsonl --max-tokens 8 {EXAM}",
    "chat runs/grpo": "--max-tokens 24",
}


def examples():
    """Example lines of the script's header and of every command's help, each once."""
    text = "\n".join([k.__doc__, *(command.help for _, command in commands())])
    lines = re.findall(r"^\s*(?:python )?kardia_lite\.py (\S.*)$", text, re.MULTILINE)
    return list(dict.fromkeys(re.split(r"\s{3,}", line)[0] for line in lines))


def parsed(line):
    """The name of the command that click takes `line` for. Nothing is run."""
    arguments, command, name = shlex.split(line), k.cli, []
    with click.Context(k.cli) as context:
        while isinstance(command, click.Group):
            name.append(arguments[0])
            _, command, arguments = command.resolve_command(context, arguments)
        command.make_context(name[-1], arguments)
    return " ".join(name)


def test_every_example_is_a_line_that_the_program_takes():
    shown = {parsed(line) for line in examples()}
    assert shown == {name for name, command in commands() if not hasattr(command, "commands")}
    assert set(REAL) <= set(examples())
    with pytest.raises(click.NoSuchOption):
        parsed("explain --toys")


@pytest.fixture(scope="module")
def place(tmp_path_factory, pairs):
    """A directory in which the names of the examples mean something."""
    path = tmp_path_factory.mktemp("examples")
    (path / "few").mkdir()
    for name in ("data", "rubrics.yaml"):
        (path / name).symlink_to(PROJECT / name)
    shutil.copy(pairs, path / "few" / "exam.jsonl")
    for source, name, n in (("judge_train.jsonl", "train.jsonl", 4), ("eval.jsonl", "eval.jsonl", 1)):
        lines = (DATA / source).read_text(encoding="utf-8").splitlines(keepends=True)[:n]
        (path / "few" / name).write_text("".join(lines), encoding="utf-8")
    (path / "qwen.gguf").symlink_to(embedded_gguf())
    return path


@pytest.mark.slow
def test_six_examples_run_for_real(place, monkeypatch):
    monkeypatch.chdir(place)
    for line, short in REAL.items():
        typed = "Hello there.\n/inner\n/quit\n"
        result = CliRunner().invoke(k.cli, shlex.split(f"{line} {short}"), input=typed)
        assert result.exit_code == 0, (line, result.output, result.exception)
        assert result.stdout.strip(), line  # the product is on stdout
        if line.startswith("sft"):
            shutil.copytree("runs/sft", "runs/grpo")  # a run to go on from; `demo` trains a real one
