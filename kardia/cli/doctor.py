"""Find what does not fit together in an installation and the line that mends it; plan the memory of runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import click

from kardia.cli.process import configure_process
from kardia.core import machine
from kardia.core.console import UserError, one_line
from kardia.core.options import PROJECT, Finite, option, options
from kardia.judge.judge import judge_sizes
from kardia.models import memory_plan
from kardia.models.base import EMBEDDED, config_of
from kardia.models.memory_terms import usable

REINSTALL = "pip install --force-reinstall"


@dataclass
class DoctorOptions:
    """Hold the options of `doctor`."""

    model: str = option(EMBEDDED, "Base of the memory plan: .gguf, directory, hub id, or a config.json.")
    bits: int = option(0, "Plan for 4 or 16 bits (0: 4 on a GPU, 16 on a CPU).", choices=(0, 4, 16))
    max_length: int = option(2048, "SFT: tokens of the longest dialogue.", min=64)
    prompt: int = option(512, "GRPO: tokens of the longest prompt.", min=1)
    max_tokens: int = option(256, "GRPO: longest answer, tokens.", min=8)
    group_size: int = option(8, "GRPO: answers per prompt.", min=2)
    judge: str = option(EMBEDDED, "GRPO: the judge (a .gguf file).")


VRAM = "Plan for a card of so many GB (default: what is free)."


@click.command()
@click.option("--vram", type=Finite(1, 4096), metavar="GB", help=VRAM)
@options(DoctorOptions)
def doctor(options: DoctorOptions, vram: float | None) -> None:
    """Show what this machine can train, and what mends the rest.

    Every fault that is found comes with the line that mends it, then the memory plan with the flags that fit.
    It needs a config.json only, and no GPU: --vram asks about a card that is elsewhere. Of a hub id only that
    file is loaded.

    \b
    kardia_lite.py doctor
    kardia_lite.py doctor --model config.json --vram 12
    """
    configure_process(False, options.model)
    found = look(PROJECT)
    faults = [f"  to mend   {fault}" for fault in complaints(found)]
    click.echo("\n".join([*_machine_lines(found), *faults]))
    if found.broken:
        click.echo(f"\nno memory plan: it needs {' and '.join(found.broken)}")
        return
    card = found.cuda or vram is not None
    gb = usable(vram) if vram else machine.free_for_us()
    wanted = {"model": options.model, "length": options.max_length, "prompt": options.prompt}
    wanted |= {"completion": options.max_tokens, "group": options.group_size}
    wanted |= {"cuda": card, "checkpointing": card, "llama_gpu": found.llama_gpu or vram is not None}
    wanted["bits"] = options.bits or (4 if card else 16)
    wanted["item"] = 2 if card else machine.compute_dtype().itemsize
    try:
        config = config_of(options.model)
        lines = memory_plan.advice(config, gb, **wanted, **judge_sizes(options.judge))
    except ValueError as error:
        raise UserError(str(error)) from error
    place = f"the {gb:.2f} GB free here"
    if vram:
        place = f"a card of {vram:g} GB, of which {gb:.2f} GB can be used"
    smaller = "makes its micro-batch and its logits chunk smaller by itself"
    title = f"memory plan of {options.model} for {place}; a run that still runs out of memory {smaller}"
    click.echo("\n".join(["", title, *lines]))


@dataclass
class Found:
    """The facts that `complaints` judges."""

    nvidia: str = ""  # the driver's words on the first GPU: name, driver's version
    torch_cuda: str | None = None  # the CUDA torch was built for
    cuda: bool = False  # torch can use a GPU
    llama_version: str = ""
    llama_gpu: bool = False  # llama.cpp can use one
    llama_cuda: bool = False  # llama.cpp was built for CUDA at all
    bnb_cuda: bool = True
    nvcc: bool = False
    hidden: bool = False  # CUDA_VISIBLE_DEVICES shows no GPU
    windows: bool = False
    broken: dict[str, str] = field(default_factory=dict)  # torch or llama.cpp -> why it cannot be imported
    have: dict[str, str] = field(default_factory=dict)  # package -> version
    pins: dict[str, str] = field(default_factory=dict)  # package -> version that was tested


def look(home: Path) -> Found:
    """Return the facts of this machine and environment. The requirements files are in `home`."""
    found = Found(nvidia=_nvidia(), have=machine.versions(), nvcc=shutil.which("nvcc") is not None)
    found.hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    found.windows = sys.platform == "win32"
    try:
        import torch

        found.torch_cuda, found.cuda = torch.version.cuda, machine.has_gpu()
    except Exception as error:  # a library that does not fit raises errors of many kinds
        found.broken["torch"] = one_line(error)
    try:
        import llama_cpp

        found.llama_version = llama_cpp.__version__
        found.llama_gpu = bool(llama_cpp.llama_supports_gpu_offload())
        found.llama_cuda = any((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-cuda*"))
    except Exception as error:
        found.broken["llama.cpp"] = one_line(error)
    found.bnb_cuda = not found.cuda or _bitsandbytes_has_cuda()
    found.pins = pins(home, found.cuda)
    return found


def _machine_lines(found: Found) -> list[str]:
    """Return lines about the machine, the versions, the engine and llama.cpp."""
    lines = ["versions    " + ", ".join(f"{name} {value}" for name, value in found.have.items())]
    if "torch" not in found.broken:
        engines = "transformers"
        if found.cuda and "unsloth" in found.have:
            engines = "unsloth, for llama, mistral, qwen2 and qwen3, else transformers"
        bits = "4-bit NF4" if found.cuda else "16-bit"
        dtype = str(machine.compute_dtype()).removeprefix("torch.")
        lines.insert(0, f"machine     {machine.describe_machine()}")
        lines.append(f"engine      {engines} ({bits} by default, computing in {dtype})")
    if "llama.cpp" not in found.broken:
        place = "GPU, as far as they fit" if found.llama_gpu else "CPU"
        lines.append(f"llama.cpp   {found.llama_version}, judge and rollouts on the {place}")
    return lines


def pins(home: Path, gpu: bool) -> dict[str, str]:
    """Return {package: version} of the requirements files."""
    names = ["requirements.txt", "requirements-gpu.txt"] if gpu else ["requirements.txt"]
    files = [home / name for name in names]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    return dict(re.findall(r"^([\w.-]+)==([\w.+]+)$", text, re.MULTILINE))


def _nvidia() -> str:
    """Return the driver's words on the first GPU, or "" where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    name, _, driver = done.stdout.strip().partition("\n")[0].rpartition(",")
    return f"{name}, driver {driver.strip()}" if name else ""


def _bitsandbytes_has_cuda() -> bool:
    try:
        from bitsandbytes.cextension import lib

        return bool(getattr(lib, "compiled_with_cuda", False))
    except Exception:  # it may fail in many ways while it is imported, all of which mean no
        return False


def complaints(found: Found) -> list[str]:
    """Return one line per fault: what is wrong, then the command or the step that mends it."""
    out = [fault for fault in (_torch(found), _llama(found)) if fault]
    if found.cuda and not found.bnb_cuda:
        mend = f"{REINSTALL} bitsandbytes=={found.pins.get('bitsandbytes', '')}"
        why = "`python -m bitsandbytes` says why"
        out.append(f"bitsandbytes cannot use this GPU, so 4 bits will fail: {why}; usually {mend}")
    for name, version in found.have.items():
        pin = found.pins.get(name)
        if pin and version.split("+")[0] != pin:
            out.append(f"{name} is {version}, tested with {pin}: pip install {name}=={pin}")
    if found.cuda and "unsloth" not in found.have:
        out.append("--engine unsloth is not installed: pip install -r requirements-gpu.txt")
    return out


def _torch(found: Found) -> str:
    """Return the fault of torch and what mends it, or ""."""
    package, gpu = f"torch=={found.pins.get('torch', '')}", f"the GPU ({found.nvidia})"
    mend = f"{REINSTALL} {package}"
    if "torch" in found.broken:
        return f"torch cannot be imported ({found.broken['torch']}): {mend}"
    if not found.nvidia or found.cuda:
        return ""
    if found.hidden:
        return f"CUDA_VISIBLE_DEVICES hides {gpu}: unset it"
    if found.torch_cuda:
        why = "its driver is too old for that CUDA, or the container was not given the GPU"
        return f"torch was built for CUDA {found.torch_cuda} and cannot use {gpu}: {why}; update the driver"
    if found.windows:
        mend = "on Windows torch comes without CUDA; take the command that pytorch.org shows for CUDA under "
        mend += f"Get Started, with {package}"
    version = found.have.get("torch", "")
    return f"torch {version} was built without CUDA, and there is a GPU ({found.nvidia}): {mend}"


def _llama(found: Found) -> str:
    """Return the fault of llama.cpp and what mends it, or ""."""
    package = f"llama-cpp-python=={found.pins.get('llama-cpp-python', found.llama_version)}"
    install = f"{REINSTALL} --no-cache-dir --no-deps {package}"
    build = f'CMAKE_ARGS="-DGGML_CUDA=ON" {install}'
    if found.windows:
        build = f'$env:CMAKE_ARGS="-DGGML_CUDA=ON"; {install}'
    gpu, on_cpu = found.cuda or bool(found.nvidia), "so judge and rollouts run on the CPU"
    if "llama.cpp" in found.broken:
        # A CUDA build whose libcudart is not on the loader's path ends here.
        way = f"put CUDA's libraries on LD_LIBRARY_PATH, or build it again: {build}" if gpu else install
        return f"llama.cpp cannot be imported ({found.broken['llama.cpp']}): {way}"
    if not gpu or found.llama_gpu:
        return ""
    if not found.llama_cuda:
        hint = "" if found.nvcc else "  (it needs the CUDA toolkit: nvcc is not on the PATH)"
        return f"llama.cpp was built without CUDA, {on_cpu}: {build}{hint}"
    if found.hidden:
        return ""
    again = "build it again with the CUDA this driver knows"
    return f"llama.cpp was built for CUDA but finds no GPU, {on_cpu}: {again}: {build}"
