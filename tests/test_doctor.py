"""`doctor` on machines that are not here: what it says of each, and the line that mends just that."""

import sys
from dataclasses import replace
from types import ModuleType

from conftest import run as run_line

from kardia.cli import doctor
from kardia.core.options import PROJECT
from kardia.judge import judge
from kardia.models.base import EMBEDDED, embedded_gguf

PINS = {"torch": "2.13.0", "bitsandbytes": "0.50.2", "llama-cpp-python": "0.3.36", "trl": "1.14.2"}
HAVE = {"torch": "2.13.0+cu130", "trl": "1.14.2", "unsloth": "2026.10.7", "bitsandbytes": "0.50.2"}
GPU = {"nvidia": "NVIDIA GeForce RTX 3060, driver 580.1", "torch_cuda": "13.0", "cuda": True, "nvcc": True}
LLAMA = {"llama_version": "0.3.36", "llama_gpu": True, "llama_cuda": True}
FINE = doctor.Found(**GPU, **LLAMA, have=HAVE, pins=PINS)
NO_LLAMA = {"llama_gpu": False, "llama_cuda": False}
NO_TORCH = {"cuda": False, "torch_cuda": None}
CONFIG = """{"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
"num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": false}"""


def run(line, code=0):
    result = run_line(f"doctor {line}", ok=False)
    assert result.exit_code == code and "Traceback" not in result.output, (result.output, result.exception)
    return result


def test_each_fault_has_one_line_that_mends_it():
    rebuild = "pip install --force-reinstall --no-cache-dir --no-deps llama-cpp-python==0.3.36"
    missing = "libcudart.so.12: cannot open shared object file"
    no_cuda = f"torch 2.13.0+cpu was built without CUDA, and there is a GPU ({FINE.nvidia})"
    cannot = "llama.cpp cannot be imported"
    cases = [
        ({**NO_TORCH, "have": {"torch": "2.13.0+cpu"}}, no_cuda, f"{doctor.REINSTALL} torch==2.13.0"),
        (
            {**NO_TORCH, "windows": True},
            "was built without CUDA",
            "the command that pytorch.org shows for CUDA",
        ),
        ({"cuda": False}, "torch was built for CUDA 13.0 and cannot use the GPU", "update the driver"),
        (
            {"cuda": False, "hidden": True, "llama_gpu": False},
            "CUDA_VISIBLE_DEVICES hides the GPU",
            "unset it",
        ),
        (NO_LLAMA, "judge and rollouts run on the CPU", f'CMAKE_ARGS="-DGGML_CUDA=ON" {rebuild}'),
        ({**NO_LLAMA, "nvcc": False}, "built without CUDA", "nvcc is not on the PATH"),
        (
            {**NO_LLAMA, "windows": True},
            "built without CUDA",
            '$env:CMAKE_ARGS="-DGGML_CUDA=ON"; pip install',
        ),
        ({"llama_gpu": False}, "built for CUDA but finds no GPU", "with the CUDA this driver knows"),
        ({"bnb_cuda": False}, "bitsandbytes cannot use this GPU", "python -m bitsandbytes"),
        ({"have": {**HAVE, "trl": "1.16.0"}}, "trl is 1.16.0, tested with 1.14.2", "pip install trl==1.14.2"),
        ({"have": {"torch": "2.13.0"}}, "unsloth", "pip install -r requirements-gpu.txt"),
        ({**NO_LLAMA, "broken": {"llama.cpp": missing}}, f"{cannot} ({missing})", "LD_LIBRARY_PATH"),
        (
            {**NO_TORCH, "broken": {"torch": "No module"}},
            "torch cannot be imported (No module)",
            "torch==2.13.0",
        ),
    ]
    for change, words, mend in cases:
        lines = doctor.complaints(replace(FINE, **change))
        assert len(lines) == 1 and words in lines[0] and mend in lines[0] and "\n" not in lines[0], lines
    for fine in (FINE, doctor.Found(have={"torch": "2.13.0+cpu"}, pins=PINS)):
        assert doctor.complaints(fine) == []


def test_pins_are_those_of_the_requirements():
    assert doctor.pins(PROJECT, gpu=False)["trl"] == "1.14.2" and "unsloth" not in doctor.pins(PROJECT, False)
    assert doctor.pins(PROJECT, gpu=True)["unsloth"] == "2026.10.7"
    found = doctor.look(PROJECT)  # this machine, whatever it is
    assert found.have["torch"] and found.llama_version == found.pins["llama-cpp-python"] and not found.broken


class Broken(ModuleType):
    """A module whose library cannot be loaded."""

    def __getattr__(self, name):
        raise RuntimeError("Failed to load shared library: libcudart.so.12: cannot open shared object file")


def test_what_cannot_be_imported_is_a_line_not_a_traceback(monkeypatch):
    for name, shown in (("llama_cpp", "llama.cpp"), ("torch", "torch")):
        for module, why in ((None, f"import of {name} halted"), (Broken(name), "libcudart.so.12")):
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, name, module)
                found = doctor.look(PROJECT)
            assert why in found.broken[shown], found.broken
            assert any(f"{shown} cannot be imported" in line for line in doctor.complaints(found))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    out = run("--model nowhere.gguf").stdout
    assert "to mend   llama.cpp cannot be imported" in out and "no memory plan: it needs llama.cpp" in out


def test_a_hub_id_costs_its_config_only(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def hub(model, allow_patterns):
        asked.append((model, *allow_patterns))
        (tmp_path / "config.json").write_text(CONFIG)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    plan = run(f"--model Qwen/Qwen2.5-7B-Instruct --vram 12 --judge {embedded_gguf()}").stdout
    assert asked == [("Qwen/Qwen2.5-7B-Instruct", "config.json")] and "for a card of 12 GB" in plan
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    error = run("--model nobody/nothing", code=1).stderr
    assert "nobody/nothing: cannot be downloaded from the hub" in error and "offline, give" in error
    assert "not a model" in run("--model 'not a model'", code=1).stderr


def test_a_plan_does_not_write_the_judge(monkeypatch):
    """The embedded judge is weighed by its packaged file; in BF16 it has 270.8 MB."""
    for name in ("resolve_base", "resolve_judge"):
        monkeypatch.setattr(judge, name, None)
    size = judge.judge_sizes(EMBEDDED)["judge_bytes"]
    assert abs(size / 270.8e6 - 1) < 1e-3


def test_a_card_that_is_elsewhere(tmp_path):
    """What fits into 12 GB, from a config.json alone, with the command that takes it."""
    (tmp_path / "config.json").write_text(CONFIG)

    line = f"--model {tmp_path}/config.json --judge {embedded_gguf()}"
    small, large, least = (run(f"{line} --vram {gb}").stdout for gb in (12, 80, 4))
    assert "a card of 12 GB" in small and small.count(": fits, ") == 2 and "--embedding host" in small
    assert "--rollout-type bf16" in large and "--embedding host" not in large
    assert "does not fit" in least and "that is the least it takes" in least
    assert "--max-tokens 1024" in run(f"{line} --vram 24 --max-tokens 1024").stdout
    assert "not a finite number" in run("--vram nan", code=2).output
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    assert "config.json has no" in run(line, code=1).stderr
