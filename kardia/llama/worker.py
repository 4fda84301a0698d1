"""Run llama.cpp in one worker process, which owns every GGUF.

Torch lives on one side, llama.cpp on the other. The worker (spawned, with its own OpenMP policy) holds the
judge and, for rollouts, the policy's base with the current LoRA. When llama.cpp aborts, the training process
survives: `Worker.call` starts a new worker, loads the same models again and repeats the request once.

Inside the worker everything is token ids and numpy. Texts are tokenized with special=False unless the text is
ours, so `<|im_end|>` inside a reply is eleven harmless characters and never a turn of its own.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kardia.core import distributed
from kardia.core.console import say
from kardia.core.machine import default_threads, release_memory
from kardia.llama.engine import Engine, Suffixes
from kardia.llama.errors import LlamaError, LlamaOutOfMemory
from kardia.llama.gguf_header import check_gguf
from kardia.llama.sampling import Sampling


def _serve(pipe, parent_path: list[str], gpu: str | None) -> None:
    """Answer requests, one at a time, until the parent closes the pipe or is gone."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    # Ctrl-C belongs to the parent, which then ends the worker in good order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        # PR_SET_PDEATHSIG: a killed parent takes the worker along at once, not after its request.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # Threads spin between the many small decodes of a rollout (twice the speed of sleeping ones), but give
    # the cores back to torch a few milliseconds after the last one.
    os.environ.setdefault("OMP_WAIT_POLICY", "active")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000000")
    sys.path[:] = parent_path
    engine = None
    while True:
        try:
            method, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            engine = engine or Engine(lambda done: pipe.send(("progress", done)))
            engine.log_lines.clear()
            answer = ("ok", getattr(engine, method)(**arguments))
        except LlamaError as error:
            answer = (type(error), error.message)
        except MemoryError as error:
            answer = (LlamaOutOfMemory, str(error))
        except Exception as error:  # a bug: the parent raises it, with the whole story
            answer = (RuntimeError, f"llama worker: {error!r}\n{traceback.format_exc()}")
        try:
            pipe.send(answer)
        except OSError:
            return


class Worker:
    """A handle on the worker process. `with Worker() as worker: worker.load("judge", path)`."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or max(1, default_threads() // distributed.local_size())
        self._loads: dict[str, dict] = {}  # role -> arguments of `load`, to repeat it after a crash
        self._loras: dict[str, str | None] = {}
        self.info: dict[str, dict] = {}
        self.restarts = 0
        self._process = self._pipe = None
        self._on_progress: Callable[[int], None] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, list(sys.path), own_gpu())
        self._process = context.Process(target=_serve, args=arguments, daemon=True, name="kardia-llama")
        self._process.start()
        theirs.close()

    def close(self) -> int | None:
        """End the worker process, which gives all its memory back; return its exit code."""
        if self._process is None:
            return None
        self._pipe.close()
        self._process.join(5)
        self._process.kill()
        self._process.join()
        code, self._process = self._process.exitcode, None
        return code

    @property
    def pid(self) -> int | None:
        """Return the worker's process id, None while there is no process."""
        return self._process.pid if self._process else None

    def call(self, method: str, **arguments: Any) -> Any:
        """Return the answer to one request; if the worker dies, a new one repeats it once.

        Raises LlamaOutOfMemory if that one dies too, and otherwise what the engine raised.
        """
        try:
            return self._once(method, arguments)
        except (EOFError, OSError):
            code = self.close()
            self.restarts += 1
            say(f"llama worker ended with code {code} during {method}; starting it again")
        release_memory()  # it may have died for want of memory that torch holds and does not use
        try:
            return self._once(method, arguments)
        except (EOFError, OSError) as error:
            died = f"llama.cpp ended twice (exit code {self.close()}) during {method}"
            raise LlamaOutOfMemory(f"{died}: out of memory, or a GGUF it cannot run") from error

    def _once(self, method: str, arguments: dict) -> Any:
        if self._process is None or not self._process.is_alive():
            self.close()
            self._start()
            for role, load in self._loads.items():
                self.info[role] = self._exchange("load", {"role": role, **load})
                if self._loras[role]:
                    self._exchange("set_lora", {"role": role, "path": self._loras[role]})
        return self._exchange(method, arguments)

    def _exchange(self, method: str, arguments: dict) -> Any:
        self._pipe.send((method, arguments))
        status, answer = self._pipe.recv()
        while status == "progress":
            if self._on_progress is not None:
                self._on_progress(answer)
            status, answer = self._pipe.recv()
        if status != "ok":
            raise status(answer)
        return answer

    def load(self, role: str, path: str | Path, gpu_layers: int = 0, fused: bool = False) -> dict:
        """Load a GGUF under a role name ("judge", "policy") and return what its header says; twice is free.

        fused, for rollouts on a CPU: fused attention, with a stream of KV cells per sequence, instead of the
        plain one over cells that a group shares. `fused_is_faster` measures which is faster here.
        """
        arguments = {"path": str(check_gguf(path)), "gpu_layers": gpu_layers}
        arguments |= {"threads": self.threads, "fused": fused}
        if self._loads.get(role) != arguments:
            self.info[role] = self.call("load", role=role, **arguments)
            self._loads[role], self._loras[role] = arguments, None
        return self.info[role]

    @property
    def has_gpu(self) -> bool:
        """Return whether llama.cpp, as it was built, can use a GPU of this machine."""
        return self.call("has_gpu")  # the worker is asked: torch's process must not load CUDA twice

    def holds(self, role: str, path: str | Path) -> dict | None:
        """Return the arguments that `load` was called with if this GGUF is loaded in the role."""
        arguments = self._loads.get(role)
        return arguments if arguments and arguments["path"] == str(path) else None

    def unload(self, role: str) -> None:
        """Free the model of a role, if there is one."""
        if self._loads.pop(role, None):
            self.call("unload", role=role)

    def set_lora(self, role: str, path: str | Path | None) -> None:
        """Swap the LoRA of a role; None takes it off."""
        lora = str(path) if path else None
        self.call("set_lora", role=role, path=lora)
        self._loras[role] = lora

    def tokenize(self, role: str, texts: list[str], special: bool = False) -> list[list[int]]:
        """Return the token ids of each text."""
        return self.call("tokenize", role=role, texts=texts, special=special)

    def rollout(
        self,
        prompts: list[list[int]],
        *,
        group: int,
        seeds: list[int],
        role: str = "policy",
        on_progress: Callable[[int], None] | None = None,
        stream: bool = False,
        parallel: int = 32,
        longest: int = 0,
        **sampling: Any,
    ) -> list[dict]:
        """Sample completions (see `Engine.rollout`); `sampling` are the fields of `Sampling`.

        `seeds`: one per completion, prompt-major; the same seeds give the same completions.
        `parallel`: how many are decoded at once, at least one group.
        `longest`: tokens of later prompts, for which the context has to suffice.
        `on_progress` gets how many have ended; with `stream` (one prompt, group 1) each token.
        """
        if len(seeds) != len(prompts) * group:
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts x {group}")
        self._on_progress = on_progress
        request = {"prompts": prompts, "group": group, "seeds": seeds, "stream": stream}
        request |= {"how": Sampling(**sampling), "parallel": parallel, "longest": longest}
        return self.call("rollout", role=role, **request)

    def branches(
        self, role: str, prefix: list[int], replies: list[list[int]], suffixes: Suffixes, score_reply=False
    ) -> list[dict]:
        """Return the log-probs of every reply's continuations (see `Engine.branches`)."""
        request = {"prefix": prefix, "replies": replies, "suffixes": suffixes, "score_reply": score_reply}
        return self.call("branches", role=role, **request)

    def next_logits(self, role: str, prompts: list[list[int]]) -> Any:
        """Return the logits of the token after each prompt: float32 [prompts, V]."""
        return self.call("next_logits", role=role, prompts=prompts)

    def quantize(self, source: str | Path, target: str | Path, file_type: str) -> None:
        """Write a quantized copy of a GGUF (`file_type`: q8_0, q4_k_m, ...)."""
        self.call("quantize", source=str(source), target=str(target), file_type=file_type)


def fused_is_faster(worker: Worker, path: str | Path, rounds: int = 3) -> bool:
    """Return whether fused attention decodes a group of 8 faster; some seconds for a small model."""
    best = {True: math.inf, False: math.inf}
    for fused in (True, False) * rounds:  # in turns, and the best of each: other load hits both alike
        role = f"attention {fused}"
        n_vocab = worker.load(role, path, fused=fused)["n_vocab"]
        first = 100 if n_vocab > 1000 else 0  # the first ids are special tokens
        prompt = [first + i % (n_vocab // 2) for i in range(300)]
        began = time.perf_counter()
        worker.rollout([prompt], group=8, max_tokens=12, seeds=list(range(8)), role=role)
        best[fused] = min(best[fused], time.perf_counter() - began)
    for fused in best:
        worker.unload(f"attention {fused}")
    return best[True] < best[False]


def own_gpu() -> str | None:
    """Return the GPU of this process as CUDA_VISIBLE_DEVICES names it, None if it is alone or sees no GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if distributed.size() == 1 or visible in ("", "-1"):
        return None
    # llama.cpp would lay a model's layers over all the GPUs that it sees, those of other processes too.
    names = [name for name in (visible or "").split(",") if name]
    local = distributed.local_rank()
    return names[local] if local < len(names) else str(local)
