"""What of an installation does not fit together, and the line that mends it: a GPU that torch or llama.cpp cannot use, other
versions than those that were tested. `look` gathers, `complaints` judges; nothing is installed or changed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from kardia.core import machine
from kardia.core.machine import versions


@dataclass
class Found:
    """What `complaints` goes by."""

    nvidia: str = ""  # what the driver says of the first GPU: name, driver's version
    torch_cuda: str | None = None  # the CUDA torch was built for
    cuda: bool = False  # torch can use a GPU
    llama_version: str = ""
    llama_gpu: bool = False  # llama.cpp can use one
    llama_cuda: bool = False  # it was built for CUDA at all
    bnb_cuda: bool = True
    nvcc: bool = False
    hidden: bool = False  # CUDA_VISIBLE_DEVICES shows no GPU
    windows: bool = False
    have: dict[str, str] = field(default_factory=dict)  # package -> version
    pins: dict[str, str] = field(default_factory=dict)  # package -> version that was tested


def look(home: Path) -> Found:
    """This machine and this environment. `home`: where the requirements files lie."""
    import os

    import llama_cpp
    import torch

    cuda = machine.has_gpu()
    return Found(
        nvidia=_nvidia(),
        torch_cuda=torch.version.cuda,
        cuda=cuda,
        llama_version=llama_cpp.__version__,
        llama_gpu=bool(llama_cpp.llama_supports_gpu_offload()),
        llama_cuda=any((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-cuda*")),
        bnb_cuda=not cuda or _bitsandbytes_has_cuda(),
        nvcc=shutil.which("nvcc") is not None,
        hidden=os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"),
        windows=sys.platform == "win32",
        have=versions(),
        pins=pins(home, cuda),
    )


def pins(home: Path, gpu: bool) -> dict[str, str]:
    """package -> version, of the requirements files."""
    files = [home / name for name in ("requirements.txt", *(["requirements-gpu.txt"] if gpu else []))]
    lines = [
        line for file in files if file.is_file() for line in file.read_text(encoding="utf-8").splitlines()
    ]
    return dict(
        line.strip().split("==") for line in lines if line.count("==") == 1 and not line.startswith("#")
    )


def _nvidia() -> str:
    """The driver's word on the first GPU, or "" where there is none."""
    if not (tool := shutil.which("nvidia-smi")):
        return ""
    try:
        told = subprocess.run(
            [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    lines = told.stdout.strip().splitlines()
    return (
        f"{lines[0].rpartition(',')[0]}, driver {lines[0].rpartition(',')[2].strip()}"
        if told.returncode == 0 and lines
        else ""
    )


def _bitsandbytes_has_cuda() -> bool:
    try:
        from bitsandbytes.cextension import lib

        return bool(getattr(lib, "compiled_with_cuda", False))
    except Exception:  # it may fail in many ways while it is imported, all of which mean no
        return False


def complaints(found: Found) -> list[str]:
    """One line each: what is wrong, then the command or the step that mends it."""
    out = []
    llama = f"llama-cpp-python=={found.pins.get('llama-cpp-python', found.llama_version)}"
    build = f'CMAKE_ARGS="-DGGML_CUDA=ON" pip install --force-reinstall --no-cache-dir --no-deps {llama}'
    if found.windows:
        build = f'$env:CMAKE_ARGS="-DGGML_CUDA=ON"; pip install --force-reinstall --no-cache-dir --no-deps {llama}'
    torch = found.pins.get("torch", "")
    if found.hidden and found.nvidia:
        out.append(f"CUDA_VISIBLE_DEVICES hides the GPU ({found.nvidia}): unset it")
    elif found.nvidia and not found.torch_cuda:
        how = (
            f"pip install --force-reinstall torch=={torch}"
            if not found.windows
            else f"on Windows torch comes without CUDA; take the command that pytorch.org shows for CUDA under Get Started, with torch=={torch}"
        )
        out.append(
            f"torch {found.have.get('torch', '')} was built without CUDA, and there is a GPU ({found.nvidia}): {how}"
        )
    elif found.nvidia and not found.cuda:
        out.append(
            f"torch was built for CUDA {found.torch_cuda} and cannot use the GPU ({found.nvidia}): its driver is too old for that CUDA, or the container was not given the GPU; update the driver"
        )
    gpu = found.cuda or bool(found.nvidia)
    if gpu and not found.llama_cuda and not found.llama_gpu:
        out.append(
            f"llama.cpp was built without CUDA, so judge and rollouts run on the CPU: {build}"
            + ("" if found.nvcc else "  (it needs the CUDA toolkit: nvcc is not on the PATH)")
        )
    elif gpu and found.llama_cuda and not found.llama_gpu and not found.hidden:
        out.append(
            f"llama.cpp was built for CUDA but finds no GPU, so judge and rollouts run on the CPU: build it again with the CUDA this driver knows: {build}"
        )
    if found.cuda and not found.bnb_cuda:
        out.append(
            "bitsandbytes cannot use this GPU, so 4 bits will fail: `python -m bitsandbytes` says why; usually pip install --force-reinstall bitsandbytes=="
            + found.pins.get("bitsandbytes", "")
        )
    for name, version in found.have.items():
        if name in found.pins and version.split("+")[0] != found.pins[name]:
            out.append(
                f"{name} is {version}, tested with {found.pins[name]}: pip install {name}=={found.pins[name]}"
            )
    if found.cuda and "unsloth" not in found.have:
        out.append(
            "unsloth, which is faster on this GPU, is not installed: pip install -r requirements-gpu.txt"
        )
    return out
