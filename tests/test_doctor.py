"""`doctor` on machines that are not here: what it says of each, and that the line mends just that."""

from dataclasses import replace

import pytest
from click.testing import CliRunner

import kardia_lite as k
from kardia.cli import doctor

PINS = {"torch": "2.13.0", "bitsandbytes": "0.50.2", "llama-cpp-python": "0.3.36", "trl": "1.14.2"}
FINE = doctor.Found(
    nvidia="NVIDIA GeForce RTX 3060, driver 580.1",
    torch_cuda="13.0",
    cuda=True,
    llama_version="0.3.36",
    llama_gpu=True,
    llama_cuda=True,
    bnb_cuda=True,
    nvcc=True,
    have={"torch": "2.13.0+cu130", "trl": "1.14.2", "unsloth": "2026.10.7", "bitsandbytes": "0.50.2"},
    pins=PINS,
)


@pytest.mark.parametrize(
    "found", [FINE, doctor.Found(have={"torch": "2.13.0+cpu"}, pins=PINS)], ids=["a GPU", "no GPU"]
)
def test_nothing_to_mend_nothing_said(found):
    assert doctor.complaints(found) == []


@pytest.mark.parametrize(
    ("change", "words", "mend"),
    [
        (
            {"torch_cuda": None, "cuda": False, "have": {"torch": "2.13.0+cpu"}},
            "torch 2.13.0+cpu was built without CUDA, and there is a GPU (NVIDIA GeForce RTX 3060, driver 580.1)",
            "pip install --force-reinstall torch==2.13.0",
        ),
        (
            {"torch_cuda": None, "cuda": False, "windows": True},
            "was built without CUDA",
            "the command that pytorch.org shows for CUDA",
        ),
        ({"cuda": False}, "torch was built for CUDA 13.0 and cannot use the GPU", "update the driver"),
        (
            {"cuda": False, "hidden": True, "llama_gpu": False},
            "CUDA_VISIBLE_DEVICES hides the GPU",
            "unset it",
        ),
        (
            {"llama_gpu": False, "llama_cuda": False},
            "judge and rollouts run on the CPU",
            'CMAKE_ARGS="-DGGML_CUDA=ON" pip install --force-reinstall --no-cache-dir --no-deps llama-cpp-python==0.3.36',
        ),
        (
            {"llama_gpu": False, "llama_cuda": False, "nvcc": False},
            "built without CUDA",
            "nvcc is not on the PATH",
        ),
        (
            {"llama_gpu": False, "llama_cuda": False, "windows": True},
            "built without CUDA",
            '$env:CMAKE_ARGS="-DGGML_CUDA=ON"; pip install',
        ),
        ({"llama_gpu": False}, "built for CUDA but finds no GPU", "with the CUDA this driver knows"),
        ({"bnb_cuda": False}, "bitsandbytes cannot use this GPU", "python -m bitsandbytes"),
        (
            {"have": {**FINE.have, "trl": "1.16.0"}},
            "trl is 1.16.0, tested with 1.14.2",
            "pip install trl==1.14.2",
        ),
        ({"have": {"torch": "2.13.0"}}, "unsloth", "pip install -r requirements-gpu.txt"),
    ],
)
def test_each_fault_has_one_line_that_mends_it(change, words, mend):
    told = doctor.complaints(replace(FINE, **change))
    assert len(told) == 1 and words in told[0] and mend in told[0] and "\n" not in told[0], told


def test_pins_are_those_of_the_requirements():
    assert doctor.pins(k.HERE, gpu=False)["trl"] == "1.14.2" and "unsloth" not in doctor.pins(
        k.HERE, gpu=False
    )
    assert doctor.pins(k.HERE, gpu=True)["unsloth"] == "2026.10.7"
    found = doctor.look(k.HERE)  # this machine, whatever it is
    assert found.have["torch"] and found.llama_version == found.pins["llama-cpp-python"]


def test_a_card_that_is_elsewhere(tmp_path):
    """What fits into 12 GB, from a config.json alone, with the command that takes it; and what is asked for too much."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": false}'
    )

    def told(*more):
        result = CliRunner().invoke(k.cli, ["doctor", "--model", str(tmp_path / "config.json"), *more])
        assert result.exit_code == 0, result.output
        return result.stdout

    small, large = told("--vram", "12"), told("--vram", "80")
    assert "a card of 12 GB" in small and small.count(": fits, ") == 2 and "--embedding host" in small
    assert "--rollout-type bf16" in large and "--embedding host" not in large
    assert "does not fit" in told("--vram", "4") and "that is the least it can take" in told("--vram", "4")
    assert "--max-tokens 1024" in told("--vram", "24", "--max-tokens", "1024")
    result = CliRunner().invoke(k.cli, ["doctor", "--vram", "nan"])
    assert result.exit_code == 2 and "not a finite number" in result.output
