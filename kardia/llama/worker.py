"""The wall to llama.cpp: one worker process that owns every GGUF, and the two things we ask of it.

Torch lives on one side, llama.cpp on the other. The worker (spawned, its own OpenMP policy) holds the judge and, for
rollouts, the policy's base with the current LoRA. When llama.cpp aborts, the training process survives: `Worker.call`
starts a new worker, loads the same models again and replays the request once.

    Worker.rollout   prompt decoded once, its KV cells shared by the group or copied (llama_memory_seq_cp), batched sampling,
                     waiting prompts take the place of finished ones
    Worker.branches  log-probabilities of continuations of one context: the only question the judge ever asks

Inside the worker everything is token ids and numpy; texts are tokenized with special=False unless the text is ours,
so `<|im_end|>` inside a reply is eleven harmless characters and never a turn of its own.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kardia.core import distributed
from kardia.core.machine import default_threads
from kardia.llama.engine import Engine
from kardia.llama.errors import LlamaError, LlamaOutOfMemory
from kardia.llama.gguf_header import check_gguf


def _serve(pipe, parent_path: list[str], gpu: str | None) -> None:
    """The worker's main loop: one request, one answer; ends when the parent closes the pipe or is gone."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C belongs to the parent, which then ends us in good order
    if (
        sys.platform == "linux"
    ):  # a parent that is killed takes us along at once, and not when the request is done
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    # Threads spin between the many small decodes of a rollout (twice the speed of sleeping ones), but give the cores
    # back to torch a few milliseconds after the last one.
    os.environ.setdefault("OMP_WAIT_POLICY", "active")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000000")
    sys.path[:] = parent_path
    engine = None
    while True:
        try:
            method, kwargs = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            engine = engine or Engine()
            engine.tell = lambda done: pipe.send(("done", done))
            answer = ("ok", getattr(engine, method)(**kwargs))
        except LlamaOutOfMemory as error:
            answer = ("memory", str(error))
        except LlamaError as error:
            answer = ("user", str(error))
        except Exception as error:  # a bug: hand the whole story to the parent, which raises it there
            import traceback

            answer = ("bug", f"{error!r}\n{traceback.format_exc()}")
        try:
            pipe.send(answer)
        except (BrokenPipeError, OSError):
            return


# ---------------------------------------------------------------------------------- the parent's side


class Worker:
    """A handle on the worker process. `with Worker() as worker: worker.load("judge", path)`."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or max(1, default_threads() // distributed.local_size())
        self._loads: dict[str, dict] = {}  # role -> arguments of load, to do it again after a crash
        self._loras: dict[str, str | None] = {}
        self.info: dict[str, dict] = {}
        self.restarts = 0
        self._process = self._pipe = None
        self._progress: Callable[[int], None] = lambda done: None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context(
            "spawn"
        )  # never fork a process that has started torch's threads
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, list(sys.path), own_gpu()), daemon=True, name="kardia-llama"
        )
        self._process.start()
        theirs.close()

    def close(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.join(5)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self._process = self._pipe = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def _once(self, method: str, kwargs: dict) -> Any:
        if self._process is None or not self._process.is_alive():
            self.close()
            self._start()
            for role, arguments in self._loads.items():
                self.info[role] = self._exchange("load", {"role": role, **arguments})
            for role, path in self._loras.items():
                if path:
                    self._exchange("set_lora", {"role": role, "path": path})
        return self._exchange(method, kwargs)

    def _exchange(self, method: str, kwargs: dict) -> Any:
        self._pipe.send((method, kwargs))
        while (message := self._pipe.recv())[0] == "done":
            self._progress(message[1])
        status, answer = message
        if status in ("user", "memory"):
            raise (LlamaError if status == "user" else LlamaOutOfMemory)(answer)
        if status == "bug":
            raise RuntimeError(f"llama worker: {answer}")
        return answer

    def call(self, method: str, **kwargs) -> Any:
        """One request. A worker that died in it is replaced and the request replayed once; twice is an error."""
        try:
            return self._once(method, kwargs)
        except (EOFError, ConnectionError, OSError):
            code = self._reap()
            self.restarts += 1
            print(f"llama worker ended with code {code} during {method}; starting it again", file=sys.stderr)
        try:
            return self._once(method, kwargs)
        except (EOFError, ConnectionError, OSError) as error:
            raise LlamaOutOfMemory(
                f"llama.cpp ended twice (exit code {self._reap()}) during {method}: out of memory, or a GGUF it cannot run"
            ) from error

    def _reap(self) -> int | None:
        process = self._process
        if process is not None:
            process.join(5)
        code = process.exitcode if process is not None else None
        self.close()
        return code

    def load(self, role: str, path: str | Path, gpu_layers: int = 0, fused: bool = False) -> dict:
        """Load a GGUF under a role name ("judge", "policy"); returns what its header says. Loading it twice is free.

        fused, for rollouts on a CPU: llama.cpp's fused attention, with a stream of KV cells per sequence, instead of the
        plain one over cells that a group shares. Which is faster depends on the CPU: `fused_is_faster` measures it.
        """
        arguments = {
            "path": str(check_gguf(path)),
            "gpu_layers": gpu_layers,
            "threads": self.threads,
            "fused": fused,
        }
        if self._loads.get(role) != arguments:
            self.info[role] = self.call("load", role=role, **arguments)
            self._loads[role], self._loras[role] = arguments, None
        return self.info[role]

    @property
    def has_gpu(self) -> bool:
        """Can llama.cpp, as it was built, use a GPU that is here? The worker is asked: torch's process is to load none of CUDA twice."""
        return self.call("has_gpu")

    def holds(self, role: str, path: str | Path) -> dict | None:
        """The arguments `load` was called with, if that is what is loaded."""
        arguments = self._loads.get(role)
        return arguments if arguments and arguments["path"] == str(path) else None

    def unload(self, role: str) -> None:
        if self._loads.pop(role, None):
            self._loras.pop(role, None)
            self.call("unload", role=role)

    def set_lora(self, role: str, path: str | Path | None) -> None:
        self.call("set_lora", role=role, path=str(path) if path else None)
        self._loras[role] = str(path) if path else None

    def tokenize(self, role: str, texts: list[str], special: bool = False) -> list[list[int]]:
        return self.call("tokenize", role=role, texts=texts, special=special)

    def rollout(
        self,
        prompts: list[list[int]],
        *,
        group: int,
        max_tokens: int,
        seeds: list[int],
        stop: list[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        role: str = "policy",
        parallel: int = 32,
        progress: Callable[[int], None] | None = None,
        stream: bool = False,
        longest: int = 0,
    ) -> list[dict]:
        """See `_Engine.rollout`. `seeds`: one per completion, prompt-major; the same seeds give the same rollouts.
        `progress` is told how many completions have ended; with `stream` (one prompt, group 1) each token as it is drawn."""
        if len(seeds) != len(prompts) * group:
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts x {group}")
        self._progress = progress or (lambda done: None)
        return self.call(
            "rollout",
            role=role,
            prompts=prompts,
            group=group,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            seeds=seeds,
            stop=stop,
            parallel=parallel,
            stream=stream,
            longest=longest,
        )

    def branches(
        self,
        role: str,
        prefix: list[int],
        replies: list[list[int]],
        suffixes: list,
        score_reply: bool = False,
    ) -> list[dict]:
        return self.call(
            "branches", role=role, prefix=prefix, replies=replies, suffixes=suffixes, score_reply=score_reply
        )

    def next_logits(self, role: str, prompts: list[list[int]]):
        return self.call("next_logits", role=role, prompts=prompts)

    def quantize(self, source: str | Path, target: str | Path, file_type: str) -> None:
        self.call("quantize", source=str(source), target=str(target), file_type=file_type)


def fused_is_faster(worker: Worker, path: str | Path, rounds: int = 3) -> bool:
    """Decode a group of 8 a little way in both manners, in turns; compares the best rounds. A few seconds for a small model."""
    best = {True: math.inf, False: math.inf}
    for fused in (True, False) * rounds:  # the machine's moods are fair to both
        role = f"attention {fused}"
        n_vocab = worker.load(role, path, fused=fused)["n_vocab"]
        prompt = (
            [100 + i % (n_vocab // 2) for i in range(300)]
            if n_vocab > 1000
            else [i % n_vocab for i in range(300)]
        )
        began = time.perf_counter()
        worker.rollout([prompt], group=8, max_tokens=12, seeds=list(range(8)), stop=[], role=role)
        best[fused] = min(best[fused], time.perf_counter() - began)
    for fused in best:
        worker.unload(f"attention {fused}")
    return best[True] < best[False]


def own_gpu() -> str | None:
    """The GPU of this process among several that train together, as CUDA_VISIBLE_DEVICES names it: llama.cpp would otherwise lay
    a model's layers over all GPUs it sees. None: one process, or no GPU is to be seen; the environment says it already."""
    if distributed.size() == 1 or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (
        visible[distributed.local_rank()]
        if distributed.local_rank() < len(visible)
        else str(distributed.local_rank())
    )
