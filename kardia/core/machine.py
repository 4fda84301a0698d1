"""What this machine has and what is in use of it. (What a run will take is planned in kardia/budget.py.)"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path

from kardia.core import distributed


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in (
        "torch",
        "transformers",
        "trl",
        "peft",
        "bitsandbytes",
        "datasets",
        "accelerate",
        "gguf",
        "llama-cpp-python",
        "unsloth",
        "unsloth_zoo",
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def describe_machine() -> str:
    total = system_memory_gb()
    return f"{default_threads()} x {cpu_name()}, {total:.0f} GB memory, {gpu_line()}"


def system_memory_gb() -> float:
    """Physical memory in GB (10^9 bytes); 0 if it cannot be told."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    except (AttributeError, ValueError, OSError):
        try:
            import psutil

            return psutil.virtual_memory().total / GB
        except ImportError:
            return 0.0


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def has_fast_bf16() -> bool:
    """Does the CPU multiply bfloat16 itself (AVX512-BF16 or AMX)? Without it bf16 is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def compute_dtype():
    """bfloat16 where the hardware multiplies it, else float32."""
    import torch

    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return (
        torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() and has_fast_bf16() else torch.float32
    )


def proof_dtype(n_parameters: int):
    """float32 where it fits: the proof is not to be blurred by bfloat16's rounding."""
    import psutil
    import torch

    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    return torch.float32 if 6 * n_parameters < free else compute_dtype()


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def gpu_line() -> str:
    """The GPU torch can use, in words, or "no GPU"."""
    if not has_gpu():
        return "no GPU"
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{properties.name}, {properties.total_memory / GB:.0f} GB"


def keep_freed_pages() -> None:
    """Tell glibc to keep large freed blocks instead of returning them to the system: torch's activations then reuse
    pages that are mapped already (one CPU training pass: 2.2 s -> 1.9 s). No effect elsewhere."""
    import ctypes

    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def release_memory() -> None:
    """Collect what is garbage and give the freed pages back to the system, between two models."""
    import ctypes
    import gc

    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    if "torch" in sys.modules and has_gpu():
        sys.modules["torch"].cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Is this error the lack of memory, on a GPU, in this process or in the llama.cpp worker?"""
    text = f"{type(error).__name__} {error}"
    return (
        isinstance(error, MemoryError)
        or isinstance(error, RuntimeError)
        and any(
            word in text
            for word in (
                "OutOfMemory",
                "out of memory",
                "can't allocate memory",
                "not enough memory",
                "ALLOC_FAILED",
            )
        )
    )


def available_gb() -> float:
    """Memory a run may still take: free on the GPU, else what the system can give; 0 if it cannot be told."""
    import psutil

    if has_gpu():
        import torch

        return torch.cuda.mem_get_info()[0] / GB
    return psutil.virtual_memory().available / GB


def free_for_us() -> float:
    """GB a run may take from its beginning: what is free, and on a GPU what it took of that to be asked (kardia/budget.py plans for it)."""
    return available_gb() + (CONTEXT["torch"] if has_gpu() else 0.0)


def fits_on_gpu(n_bytes: float) -> bool:
    """Does a model of `n_bytes` fit beside what the GPU holds now, with room for its activations?"""
    if not has_gpu():
        return False
    import torch

    return 1.3 * n_bytes < torch.cuda.mem_get_info()[0]


class PeakSampler:
    """The largest `used_gb` of samples taken every few seconds: reading how much of 4 GB is shared takes the kernel 0.07 s, in
    which llama.cpp's threads wait for each other; and what torch freed is kept (`keep_freed_pages`), so a peak stays to be seen."""

    every = 3.0  # seconds

    @property
    def of(self) -> str:
        return "all that was in use on the GPU" if has_gpu() else "this process and the llama.cpp worker"

    def __init__(self) -> None:
        import threading

        self.peak, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> PeakSampler:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, used_gb())

    def _run(self) -> None:
        while not self._stop.wait(self.every):
            self.peak = max(self.peak, used_gb())


def processes_gb() -> float:
    """Memory of this process and its children (the llama.cpp worker), pages they share counted once where the system can tell."""
    import psutil

    me, total = psutil.Process(), 0
    for process in [me, *me.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss if sys.platform == "linux" else process.memory_info().rss
        except (psutil.Error, AttributeError):
            continue
    return total / GB


def used_gb(age: float = 0.0) -> float:
    """What a run takes of the memory that is short: on a GPU what is in use there, by whomever; else `processes_gb`. A value
    read less than `age` seconds ago will do."""
    now = time.monotonic()
    if now - _used["at"] >= age or not _used["gb"]:
        if has_gpu():
            import torch

            free, total = torch.cuda.mem_get_info(
                distributed.local_rank()
            )  # a thread's own "current device" is always the first
            gb = (total - free) / GB
        else:
            gb = processes_gb()
        _used.update(at=now, gb=gb)
    return _used["gb"]


_used = {"at": 0.0, "gb": 0.0}


def keep_on_host(model) -> None:
    """Move a model's embedding table to the computer's own memory, where it is only looked up: 1.1 GB of a 7B model's 5.5 in 4 bits.
    The rows of a pass, some megabytes, come over the bus. An output matrix that is the same table (tied) must stay on the GPU."""
    import torch

    inner = model.get_input_embeddings()
    if model.get_output_embeddings().weight is inner.weight:
        raise ValueError("its output matrix is the same table")

    class OnHost(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["inner"] = inner.to("cpu").requires_grad_(
                False
            )  # not as a child: nobody is to move it, or to take its place for the model's

        @property
        def weight(self):
            return self.inner.weight

        def forward(self, ids):
            return self.inner(ids.to("cpu")).to(ids.device)

    model.set_input_embeddings(OnHost())
    release_memory()


def read_config(path: Path) -> dict:
    """config.json of a directory, or the file itself; ValueError in one line if it is neither."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a readable config.json ({str(error)[:120]})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: not a JSON object")
    return config


def default_threads() -> int:
    """Cores this process may use (a container's quota of CPUs shows in the affinity mask on Linux)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


GB, GIB = 1e9, 2**30
CONTEXT = {
    "torch": 0.5,
    "llama.cpp": 0.4,
}  # GB a process takes by having started CUDA. Assumed: 0.3 to 0.5 since kernels are loaded when first used (CUDA 12.2); torch's with cuBLAS's workspaces
