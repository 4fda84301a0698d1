"""Strangers' models and adapters: none of their code runs, none of their pickles is read, none of their paths is followed."""

import ast
import json
import pickle
import shutil
import sys

import pytest
from click.testing import CliRunner

import kardia_lite as k
from kardia.models.weights import ExportError


def refused(*arguments):
    result = CliRunner().invoke(k.cli, [str(a) for a in arguments])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (
        result.output,
        result.exception,
    )
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    return line


@pytest.fixture
def trap(tmp_path):
    """Python that leaves a mark if it runs."""
    mark = tmp_path / "it-ran"
    return f"open({str(mark)!r}, 'w').write('x')\n", mark


@pytest.fixture
def a_model(tiny_directory, renderer):
    """A small chat model in a directory, as strangers give them away."""
    path = tiny_directory("llama", vocab_size=49152, max_position_embeddings=2048)
    renderer.tokenizer.save_pretrained(path)
    return path


SFT = ["--limit", 2, "--max-steps", 3, "--batch-size", 1, "--max-length", 900]


@pytest.mark.parametrize("kind", ["llama", "evil"])
def test_a_models_own_code_never_runs(a_model, trap, tmp_path, kind):
    code, mark = trap
    (a_model / "modeling_evil.py").write_text(
        code + "class Model: pass\nclass Config: pass\nclass Tokenizer: pass\n"
    )
    for name, add in (
        (
            "config.json",
            {
                "model_type": kind,
                "auto_map": {
                    "AutoConfig": "modeling_evil.Config",
                    "AutoModelForCausalLM": "modeling_evil.Model",
                },
            },
        ),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["modeling_evil.Tokenizer", None]}}),
    ):
        facts = json.loads((a_model / name).read_text())
        (a_model / name).write_text(json.dumps({**facts, **add}))
    if kind == "llama":  # known to transformers: trained with transformers' own code
        result = CliRunner().invoke(
            k.cli, [str(a) for a in ("sft", "--model", a_model, *SFT, "--out", tmp_path / "run")]
        )
        assert result.exit_code == 0 or "code of its own" in result.stderr, result.stderr
    else:
        assert "code of its own, which is never run here" in refused(
            "sft", "--model", a_model, *SFT, "--out", tmp_path / "run"
        )
    assert not mark.exists()


def test_pickled_weights_are_not_read(a_model, trap, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, (trap[0],))

    (a_model / "model.safetensors").unlink()
    (a_model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert "its weights are pickles (.bin, .pth), which may run code" in refused(
        "sft", "--model", a_model, *SFT, "--out", tmp_path / "run"
    )
    assert not trap[1].exists()


@pytest.fixture
def a_run(a_model, tmp_path):
    result = CliRunner().invoke(
        k.cli, [str(a) for a in ("sft", "--model", a_model, *SFT, "--out", tmp_path / "run")]
    )
    assert result.exit_code == 0, result.stderr
    return tmp_path / "run"


def test_a_pickled_adapter_is_refused_with_the_reason(a_run, trap, tmp_path, pairs):
    class Bomb:
        def __reduce__(self):
            return (exec, (trap[0],))

    (a_run / "adapter" / "adapter_model.safetensors").unlink()
    (a_run / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    for arguments in (
        [
            "grpo",
            "--from",
            a_run,
            "--rollout",
            "hf",
            "--exam-pairs",
            pairs,
            "--force-judge",
            "--out",
            tmp_path / "g",
        ],
        ["export", a_run, "--to", tmp_path / "e", "--formats", "merged"],
    ):
        assert "pickle" in refused(*arguments)
    assert not trap[1].exists()


def test_an_adapters_configuration_imports_nothing(a_run, trap, tmp_path, monkeypatch):
    """PEFT imports the module that `megatron_core` names. Ours never sees the file's own configuration."""
    (tmp_path / "evil_module.py").write_text(trap[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    path = a_run / "adapter" / "adapter_config.json"
    facts = json.loads(path.read_text())
    base = k.base_of(k.Run(a_run))
    for change in (
        {"megatron_config": {"x": 1}, "megatron_core": "evil_module"},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "evil_module"}},
        {"target_modules": "(a+)+$"},
    ):
        path.write_text(json.dumps({**facts, **change}))
        try:
            k.load_policy(base, "transformers", 16, adapter=a_run / "adapter")
        except ExportError as error:
            assert "\n" not in str(error)
        assert not trap[1].exists() and "evil_module" not in sys.modules


def test_put_on_is_what_peft_loads(a_run):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = k.base_of(k.Run(a_run))
    ours = k.load_policy(base, "transformers", 16, adapter=a_run / "adapter", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32),
        a_run / "adapter",
        is_trainable=True,
    )
    a, b = ({name: p for name, p in model.named_parameters()} for model in (ours, theirs))
    assert list(a) == list(b) and all(
        torch.equal(a[name], b[name]) and a[name].requires_grad == b[name].requires_grad for name in a
    )
    assert any(p.abs().max() > 0 for name, p in a.items() if "lora_B" in name)


def test_an_exports_book_does_not_lead_out_of_it(a_run, tmp_path):
    """export.json may be a stranger's: a file it names outside of the directory is none of the export's."""
    to, precious = tmp_path / "out", tmp_path / "precious"
    result = CliRunner().invoke(
        k.cli, [str(a) for a in ("export", a_run, "--to", to, "--formats", "merged", "--answers", 0)]
    )
    assert result.exit_code == 0, result.stderr
    precious.mkdir()
    (precious / "mine.txt").write_text("mine")
    book = json.loads((to / "export.json").read_text())
    book["formats"]["merged"].update(file="../precious", path=str(precious))
    (to / "export.json").write_text(json.dumps(book))
    shutil.rmtree(to / "merged")
    assert "export.json: damaged" in refused(
        "export", a_run, "--to", to, "--formats", "merged", "--answers", 0
    )
    assert (precious / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "path", [k.HERE / "kardia_lite.py", *sorted((k.HERE / "kardia").glob("*.py"))], ids=lambda path: path.name
)
def test_the_code_never_asks_for_it(path):
    """No remote code, no pickles, no eval or exec, no shell, no unsafe YAML, in any call of ours."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        assert (
            given.get("trust_remote_code", "False") == "False" and given.get("shell", "False") == "False"
        ), ast.unparse(node)
        assert name not in (
            "eval",
            "exec",
            "compile",
            "__import__",
            "os.system",
            "os.popen",
            "pickle.load",
            "pickle.loads",
            "torch.load",
            "yaml.unsafe_load",
            "yaml.full_load",
            "joblib.load",
            "shelve.open",
            "marshal.loads",
        ), ast.unparse(node)
        if name == "yaml.load":
            assert f"class {ast.unparse(node.args[1])}(yaml.SafeLoader)" in path.read_text(
                encoding="utf-8"
            ), ast.unparse(node)
        if name.endswith(".from_pretrained") and name.startswith("Auto"):
            assert (
                given.get("trust_remote_code") == "False"
                or "gguf_file" in ast.unparse(node)
                or "where" in ast.unparse(node)
            ), ast.unparse(node)
