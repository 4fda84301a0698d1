"""Foreign models and adapters: their code never runs, their pickles and outward paths are not read."""

import ast
import json
import pickle
import shutil
import sys

import pytest
from conftest import run
from test_disk import refused

import kardia_lite as k
from kardia.core.options import PROJECT

SFT = "--limit 2 --max-steps 3 --batch-size 1 --max-length 900"


class Bomb:
    """Unpickled, it runs `code`."""

    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return (exec, (self.code,))


@pytest.fixture
def trap(tmp_path):
    """(Python that leaves a mark if it runs, the mark)."""
    mark = tmp_path / "it-ran"
    return f"open({str(mark)!r}, 'w').write('x')\n", mark


@pytest.fixture
def model(tiny_directory, renderer):
    """A small chat model in a directory, as people give them away."""
    path = tiny_directory("llama", vocab_size=49152, max_position_embeddings=2048)
    renderer.tokenizer.save_pretrained(path)
    return path


def change(path, **facts):
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


@pytest.mark.slow
def test_nothing_in_a_models_directory_runs(model, trap, tmp_path):
    (code, mark), line = trap, f"sft --model {model} {SFT} --out {tmp_path}"
    classes = "class Model: pass\nclass Config: pass\nclass Tokenizer: pass\n"
    (model / "modeling_evil.py").write_text(code + classes)
    classes = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.Tokenizer", None]})
    change(model / "config.json", model_type="evil", auto_map=classes)
    assert "code of its own, which is never run here" in refused(f"{line}/evil") and not mark.exists()
    # A type that transformers knows is trained with transformers' own code.
    change(model / "config.json", model_type="llama")
    result = run(f"{line}/llama", ok=False)
    assert result.exit_code == 0 or "code of its own" in result.stderr, result.stderr
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(code)))
    assert "its weights are pickles (.bin, .pth), which may run code" in refused(f"{line}/pickles")
    assert not mark.exists()


@pytest.mark.slow
def test_what_others_put_into_a_run_and_its_export(model, trap, tmp_path, pairs, monkeypatch):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (code, mark), to, precious = trap, tmp_path / "out", tmp_path / "precious"
    trained = tmp_path / "run"
    run(f"sft --model {model} {SFT} --out {trained}")
    adapter, base = trained / "adapter", k.base_of_run(k.Run(trained).facts, trained)

    # Our own loader of an adapter gives what PEFT's gives.
    ours = k.load_policy(base, "transformers", 16, adapter=adapter, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(theirs, adapter, is_trainable=True)
    a, b = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert list(a) == list(b) and any(p.abs().max() > 0 for name, p in a.items() if "lora_B" in name)
    for name in a:
        assert torch.equal(a[name], b[name]) and a[name].requires_grad == b[name].requires_grad, name

    # PEFT imports the module that `megatron_core` names; ours never sees the file's own configuration.
    (tmp_path / "evil_module.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = (adapter / "adapter_config.json").read_text()
    parent = {"base_model_class": "X", "parent_library": "evil_module"}
    megatron = {"megatron_config": {"x": 1}, "megatron_core": "evil_module"}
    for facts in (megatron, {"auto_mapping": parent}, {"target_modules": "(a+)+$"}):
        change(adapter / "adapter_config.json", **facts)
        try:
            k.load_policy(base, "transformers", 16, adapter=adapter)
        except Exception as error:
            assert type(error).__module__.startswith("kardia") and "\n" not in str(error)
        assert not mark.exists() and "evil_module" not in sys.modules
        (adapter / "adapter_config.json").write_text(config)

    # export.json may come from somebody else: a file that it names outside of the directory is left alone.
    export = f"export {trained} --formats merged --answers 0 --to"
    run(f"{export} {to}")
    precious.mkdir()
    (precious / "mine.txt").write_text("mine")
    book = json.loads((to / "export.json").read_text())
    book["formats"]["merged"].update(file="../precious", path=str(precious))
    (to / "export.json").write_text(json.dumps(book))
    shutil.rmtree(to / "merged")
    assert "export.json: damaged" in refused(f"{export} {to}")
    assert (precious / "mine.txt").read_text() == "mine"

    # A pickled adapter is refused, with the reason.
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(code)))
    judge = f"--exam-pairs {pairs} --force-judge --witness none"
    grpo = f"grpo --from {trained} --rollout hf {judge} --out {tmp_path}/g"
    for line in (grpo, f"{export} {tmp_path}/e"):
        assert "pickle" in refused(line) and not mark.exists()


FORBIDDEN = "eval exec compile __import__ os.system os.popen pickle.load pickle.loads torch.load joblib.load"
FORBIDDEN += " yaml.unsafe_load yaml.full_load shelve.open marshal.loads"


def test_our_code_never_asks_for_it():
    """No remote code, no pickles, no eval or exec, no shell, no unsafe YAML, in any call of ours."""
    paths = [PROJECT / "kardia_lite.py", *sorted((PROJECT / "kardia").rglob("*.py"))]
    assert len(paths) > 30
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for node in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
            where, name = f"{path}: {ast.unparse(node)}", ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert given.get("trust_remote_code", "False") == "False" == given.get("shell", "False"), where
            assert name not in FORBIDDEN.split(), where
            if name == "yaml.load":
                assert f"class {ast.unparse(node.args[1])}(yaml.SafeLoader)" in text, where
            if name.endswith(".from_pretrained") and name.startswith("Auto"):
                ours = "gguf_file" in where or "where" in ast.unparse(node)
                assert given.get("trust_remote_code") == "False" or ours, where
