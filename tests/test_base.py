"""Bases on disk and their answers: what the cache keeps, what is refused, what `generate` ignores."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kardia.core.console import UserError
from kardia.models import base
from kardia.models.base import Base
from kardia.models.generate import torch_answers, torch_logits

ROOT = Path(__file__).resolve().parent.parent

MAKER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from kardia.core.files import file_lock
target = Path(sys.argv[2])
with file_lock(target):
    if not target.exists():
        time.sleep(1)
        target.write_text("made")
        print("I made it")
"""


@pytest.mark.slow
def test_two_processes_make_a_thing_once(tmp_path):
    """Two commands started side by side on an empty cache once wrote over each other's temporary files."""
    command = [sys.executable, "-c", MAKER, str(ROOT), str(tmp_path / "thing")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(outputs) == ["", "I made it\n"] and (tmp_path / "thing").read_text() == "made"


def test_the_attention_is_measured_once_per_machine(tmp_path, monkeypatch):
    measured, files = [], [Path("a.gguf"), Path("b.gguf")]
    monkeypatch.setattr(base, "fused_is_faster", lambda worker, gguf: measured.append(gguf) or faster)
    for faster in (True, False):
        monkeypatch.setenv("KARDIA_CACHE", str(tmp_path / str(faster)))
        assert [base.fused_attention(None, file) for file in files] == [faster, faster]
    assert measured == [files[0], files[0]]
    monkeypatch.setattr(base, "describe_machine", lambda: "another one")
    base.fused_attention(None, files[1])
    assert len(measured) == 3


def test_what_is_no_base_is_one_line_and_a_base_is_found_again(tiny_directory, tmp_path):
    directory = tiny_directory("llama")
    config = json.loads((directory / "config.json").read_text())
    quantized = {"quantization_config": {"quant_method": "gptq"}}
    for name, changes, says in (
        ("no-weights", {}, "no *.safetensors there; --model wants a model with its weights"),
        ("pickles", {}, "its weights are pickles (.bin, .pth), which may run code when read"),
        ("quantized", quantized, "its weights are quantized already"),
    ):
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps({**config, **changes}))
        if name == "pickles":
            (path / "pytorch_model.bin").write_bytes(b"x")
        if name == "quantized":
            (path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
        with pytest.raises(UserError) as error:
            base.resolve_base(str(path))
        assert says in error.value.message and "\n" not in error.value.message
    (tmp_path / "empty").mkdir()
    for model, says in ((tmp_path / "empty", "no config.json"), ("no such/thing/here", "no such file")):
        with pytest.raises(UserError, match=says):
            base.resolve_base(str(model))
    made = base.resolve_base(str(directory))
    facts = json.loads(json.dumps(made.facts()))  # as in run.json
    assert base.base_of_run(facts, tmp_path) == made and made.gguf(16) is None
    with pytest.raises(UserError, match="its base /gone is gone; put it back, or train again"):
        base.base_of_run({**facts, "base": "/gone"}, tmp_path)


def test_who_draws_the_answers(tiny_directory, capsys):
    alone = Base("m", tiny_directory("llama"), None, "x")
    twin = Base("m", alone.directory, Path("m.gguf"), "x")
    capsys.readouterr()
    assert [twin.rollouts(asked) for asked in ("auto", "llama", "hf")] == ["llama", "llama", "hf"]
    assert capsys.readouterr().err == ""
    assert alone.rollouts("auto") == "hf" and "m has no GGUF" in capsys.readouterr().err
    with pytest.raises(UserError, match="--rollout llama needs the base's GGUF"):
        alone.rollouts("llama")
    alone.check_context(200, 56, "rows.jsonl:3")
    says = "rows.jsonl:3: its prompt of 200 tokens with --max-tokens 57 is over the 256"
    with pytest.raises(UserError, match=says):
        alone.check_context(200, 57, "rows.jsonl:3")


class Tokenizer:
    """Ids as text."""

    eos_token_id, pad_token_id = 2, 0

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(str(i) for i in row.tolist() if i not in (0, 2)) for row in rows]


PROMPTS = [[1, 5, 6, 7], [1, 9], [1, 5, 6]]


def test_greedy_answers_take_nothing_from_the_bases_generation_config(tiny):
    """Qwen2.5 ships a repetition penalty and top_p: answers in torch would differ from those in llama.cpp."""
    model = tiny("llama")
    plain = torch_answers(model, Tokenizer(), PROMPTS, 12)
    first = [int(row.argmax()) for row in torch_logits(model, PROMPTS)]
    assert [int(answer.split()[0]) for answer in plain] == first and any(" " in answer for answer in plain)
    odd = {
        "repetition_penalty": 1.3,
        "top_k": 1,
        "top_p": 0.1,
        "no_repeat_ngram_size": 1,
        "min_new_tokens": 3,
    }
    model.generation_config.update(**odd)
    ids = torch.tensor(PROMPTS[:1])
    penalized = model.generate(ids, max_new_tokens=12, do_sample=False)[:, 4:]
    assert Tokenizer().batch_decode(penalized, True) != plain[:1]  # the trap is real
    assert torch_answers(model, Tokenizer(), PROMPTS, 12) == plain
    model.generation_config.update(**odd)
    sampled = {torch_answers(model, Tokenizer(), PROMPTS[:1], 6, 1.0, seed)[0] for seed in range(5)}
    assert len(sampled) > 1  # top_k 1 would leave one
