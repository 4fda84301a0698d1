"""Every example line of the manual (the header and each command's --help) is executed, for real, with the embedded model.

A line is run as it stands in a directory where what it names exists (a stand-in where that would be a download), plus flags
that make it short: fewer rows, one step, few exam pairs.
"""

import json
import re
import shlex
import shutil

import pytest
from click.testing import CliRunner

import kardia_lite as k
from kardia.models.base import embedded_gguf

pytestmark = pytest.mark.real

EXAM = "--exam-pairs few/exam.jsonl"
SHORT = {
    "sft": "--limit 2 --max-steps 4 --batch-size 1 --max-length 700 --learning-rate 3e-3",
    "grpo": f"--steps 1 --group-size 2 --max-tokens 16 {EXAM} --force-judge",
    "evaluate": f"--data few/eval.jsonl --max-tokens 8 {EXAM}",
    "export": f"--data few/eval.jsonl --answers 1 --max-tokens 8 {EXAM}",
    "judge exam": "--pairs few/exam.jsonl",
    "judge score": "--pairs few/exam.jsonl",
    "judge train": f"--pairs few/train.jsonl {EXAM} --epochs 1",
    "chat": "--max-tokens 24",
    "sft --model qwen.gguf --bits 4 --data mine.jsonl --out runs/mine": "--limit 2 --max-steps 1 --batch-size 1 --max-length 700",
    # other judges than the one all tests share: the exam is sat anew, so a shorter one
    "judge exam --judge qwen2.5-7b-instruct-q4_k_m.gguf": "--pairs few/one.jsonl",
    "judge exam --judge-lora judge_lora.gguf": "--pairs few/one.jsonl",
}
LONG_ANSWERS = {"chat runs/grpo": "Hello there.\n/inner\n/quit\n"}  # what is typed into an open-ended talk


def commands(group=None, path=()):
    for name, command in (group or k.cli).commands.items():
        yield " ".join((*path, name)), command
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))


def examples():
    """Example lines in the order of the commands, each once."""
    lines = []
    for text in (k.__doc__, *(command.help for _, command in commands())):
        lines += [
            re.split(r"\s{3,}", line)[0]
            for line in re.findall(r"^\s*(?:python )?kardia_lite\.py (\S.*)$", text or "", re.MULTILINE)
        ]
    order = [name for name, _ in commands()]
    return sorted(
        dict.fromkeys(lines),
        key=lambda line: order.index("judge train" if "--judge-lora" in line else command_of(line)),
    )  # needs what `judge train` makes


def command_of(line):
    return max((name for name, _ in commands() if line == name or line.startswith(f"{name} ")), key=len)


def first(source, target, n):
    target.write_text(
        "".join(source.read_text(encoding="utf-8").splitlines(keepends=True)[:n]), encoding="utf-8"
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory, embedded, pairs):
    """A directory in which every name of the examples means something."""
    path = tmp_path_factory.mktemp("examples")
    for name in (
        "data",
        "rubrics.yaml",
    ):  # the defaults are relative to where the command line was built: the repository
        (path / name).symlink_to(k.HERE / name)
    for folder in ("few", "Jhcircle/KardiaBench", "empatheticdialogues"):
        (path / folder).mkdir(parents=True)
    shutil.copy(pairs, path / "few" / "exam.jsonl")
    first(pairs, path / "few" / "one.jsonl", 1)
    first(k.DATA / "judge_train.jsonl", path / "few" / "train.jsonl", 4)
    first(k.DATA / "eval.jsonl", path / "few" / "eval.jsonl", 1)
    first(k.DATA / "dialogues.jsonl", path / "mine.jsonl", 2)
    for stand_in in ("qwen.gguf", "qwen2.5-7b-instruct-q4_k_m.gguf", "model.gguf"):
        (path / stand_in).symlink_to(embedded_gguf())
    shutil.copy(embedded.directory / "config.json", path / "config.json")
    first(k.DATA / "dialogues.jsonl", path / "Jhcircle/KardiaBench/train.jsonl", 2)
    (path / "empatheticdialogues/train.csv").write_text(
        "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags\nhit:1_conv:2,1,sentimental,I found a letter_comma_ an old one.,1,I found an old letter today.,5|5|5_5|5|5,\n"
    )
    (path / "ESConv.json").write_text(
        json.dumps(
            [
                {
                    "emotion_type": "sadness",
                    "problem_type": "breakup with partner",
                    "situation": "My partner left me last week.",
                    "dialog": [
                        {"speaker": "seeker", "annotation": {}, "content": "I feel lost without him."},
                        {"speaker": "supporter", "annotation": {}, "content": "I am sorry."},
                    ],
                }
            ]
        )
    )
    (path / "replies.jsonl").write_text(
        json.dumps(
            {"messages": [{"role": "user", "content": "My dog died."}], "response": "What was he like?"}
        )
        + "\n"
    )
    return path


def test_there_is_an_example_for_every_command():
    shown = {command_of(line) for line in examples()}
    assert shown >= {name for name, command in commands() if not hasattr(command, "commands")}


@pytest.mark.parametrize("line", examples())
def test_example(place, monkeypatch, line):
    monkeypatch.chdir(place)
    few = {"exam_pairs": place / "few" / "exam.jsonl"}
    monkeypatch.setattr(k, "DEMO_SFT", {**k.DEMO_SFT, "limit": 2, "batch_size": 1, "max_steps": 4})
    monkeypatch.setattr(
        k,
        "DEMO_GRPO",
        {
            **k.DEMO_GRPO,
            "steps": 1,
            "group_size": 2,
            "micro_batch": 0,
            "max_tokens": 16,
            "force_judge": True,
            **few,
        },
    )
    monkeypatch.setattr(k, "DEMO_EVALUATE", {"data": place / "few" / "eval.jsonl", "max_tokens": 8, **few})
    monkeypatch.setattr(
        k, "DEMO_EXPORT", {"data": place / "few" / "eval.jsonl", "answers": 1, "max_tokens": 8, **few}
    )
    result = CliRunner().invoke(
        k.cli,
        shlex.split(f"{line} {SHORT.get(line) or SHORT.get(command_of(line), '')}"),
        input=LONG_ANSWERS.get(line),
    )
    assert result.exit_code == 0, (line, result.output, result.exception)
    assert result.stdout.strip(), line  # the product is on stdout
    if line == "demo":
        page = (place / "runs" / "demo" / "report.html").read_text(encoding="utf-8")
        assert "memory" in page.lower() and (place / "runs" / "demo" / "grpo" / "tokens.jsonl").is_file()
