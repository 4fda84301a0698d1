"""Describe this machine and what is in use of it. (models/memory_plan.py plans what a run will take.)"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from kardia.core import distributed

GB, GIB = 1e9, 2**30
# GB that a process takes by starting CUDA, torch's with cuBLAS's workspaces. Assumed, not measured: 0.3 to
# 0.5 since kernels are loaded when they are first used (CUDA 12.2).
CONTEXT = {"torch": 0.5, "llama.cpp": 0.4}
PACKAGES = "torch transformers trl peft bitsandbytes datasets accelerate gguf llama-cpp-python unsloth"
PACKAGES += " unsloth_zoo"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that a run's numbers depend on."""
    from importlib import metadata

    result = {"python": platform.python_version()}
    for name in PACKAGES.split():
        with suppress(metadata.PackageNotFoundError):
            result[name] = metadata.version(name)
    return result


def describe_machine() -> str:
    """Return CPU, memory and GPU in one line."""
    import psutil

    names = [line.split(":", 1)[1] for line in cpu_info().splitlines() if line.startswith("model name")]
    cpu = " ".join(names[0].split()) if names else platform.processor() or platform.machine()
    memory, gpu = psutil.virtual_memory().total / GB, "no GPU"
    if has_gpu():
        import torch

        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = f"{properties.name}, {properties.total_memory / GB:.0f} GB"
    return f"{_logical_cpus()} x {cpu}, {memory:.0f} GB memory, {gpu}"


def cpu_info() -> str:
    """Return what Linux says of the CPUs, elsewhere ""."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _logical_cpus() -> int:
    # On Linux a container's share shows in the affinity mask.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def default_threads() -> int:
    """Return how many threads should compute: one per physical core (hyper-threads share its multipliers)."""
    import psutil

    return min(_logical_cpus(), psutil.cpu_count(logical=False) or _logical_cpus())


def has_gpu() -> bool:
    """Return whether torch can use a GPU."""
    import torch

    return torch.cuda.is_available()


def compute_dtype():
    """Return bfloat16 where the hardware multiplies it, float16 on an older GPU, else float32."""
    import torch

    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float16
    # A CPU without AVX512-BF16 and AMX is faster in float32. Its flags are asked first: builds without
    # MKL-DNN (Macs) do not have the other question.
    if re.search("avx512_bf16|amx_bf16", cpu_info()) and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32


def proof_dtype(n_parameters: int):
    """Return float32 if a model of that size fits, as bfloat16 blurs a proof; else `compute_dtype()`."""
    import torch

    return torch.float32 if 6 * n_parameters < available_gb() * GB else compute_dtype()


def keep_freed_pages() -> None:
    """Tell glibc to keep large freed blocks, for activations to reuse (one CPU pass: 2.2 -> 1.9 s)."""
    import ctypes

    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def release_memory() -> None:
    """Collect garbage and give freed memory back to the system and the GPU, for the next model or process."""
    import ctypes
    import gc

    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    if "torch" in sys.modules and has_gpu():
        sys.modules["torch"].cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error is the lack of memory, on a GPU, in this process or in the llama.cpp worker."""
    # LlamaOutOfMemory says so itself; this folder must not import it.
    if isinstance(error, MemoryError) or getattr(error, "out_of_memory", False) is True:
        return True
    signs = "OutOfMemory|out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"
    return isinstance(error, RuntimeError) and bool(re.search(signs, f"{type(error).__name__} {error}"))


def available_gb() -> float:
    """Return the GB that a run may still take: free on the GPU, else what the system can give."""
    if has_gpu():
        import torch

        return torch.cuda.mem_get_info()[0] / GB
    import psutil

    return psutil.virtual_memory().available / GB


def free_for_us() -> float:
    """Return the GB that a run may take in all: asking a GPU has already taken its CUDA context."""
    return available_gb() + (CONTEXT["torch"] if has_gpu() else 0.0)


def fits_on_gpu(n_bytes: float) -> bool:
    """Return whether a model of `n_bytes` and its activations fit beside what the GPU holds now."""
    return has_gpu() and 1.3 * n_bytes < available_gb() * GB


def _processes_gb() -> float:
    """Return the GB of this process and its children (llama.cpp), shared pages counted once on Linux."""
    import psutil

    me, total = psutil.Process(), 0
    for process in [me, *me.children(recursive=True)]:
        with suppress(psutil.Error):
            total += process.memory_full_info().pss if sys.platform == "linux" else process.memory_info().rss
    return total / GB


_last_reading = {"time": 0.0, "gb": 0.0}


def used_gb(age: float = 0.0) -> float:
    """Return the GB in use on the GPU, or without one by our processes, as read at most `age` seconds ago."""
    if _last_reading["gb"] and time.monotonic() - _last_reading["time"] < age:
        return _last_reading["gb"]
    if has_gpu():
        import torch

        # The device must be named: in a thread of its own the current device is always the first.
        free, total = torch.cuda.mem_get_info(distributed.local_rank())
        gb = (total - free) / GB
    else:
        gb = _processes_gb()
    _last_reading.update(time=time.monotonic(), gb=gb)
    return gb


class PeakSampler:
    """The largest `used_gb` of samples taken every few seconds while a `with` block runs, in `peak`."""

    # Reading how much of 4 GB is shared takes the kernel 0.07 s, in which llama.cpp's threads wait for each
    # other. What torch freed is kept (`keep_freed_pages`), so that a peak can still be seen later.
    every = 3.0  # seconds

    def __init__(self) -> None:
        self.peak, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def of(self) -> str:
        """Return in words what `peak` counts."""
        return "all that was in use on the GPU" if has_gpu() else "this process and the llama.cpp worker"

    def __enter__(self) -> PeakSampler:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, used_gb())

    def _run(self) -> None:
        while not self._stop.wait(self.every):
            self.peak = max(self.peak, used_gb())


def read_config(path: Path) -> dict:
    """Return config.json of a directory, or of the file itself. Raises ValueError in one line."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a readable config.json ({str(error)[:120]})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: not a JSON object")
    return config
