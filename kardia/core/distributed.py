"""Know which of several processes this is (`accelerate launch kardia_lite.py sft|grpo`) and agree with them.

Gradients are DistributedDataParallel's business: transformers' Trainer wraps the model. Every process takes
whole dialogues and whole groups; process 0 prints and writes. With one process all this does nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


def size() -> int:
    """Return how many processes train one model, as a launcher (accelerate, torchrun) set it."""
    launched = "RANK" in os.environ and "MASTER_ADDR" in os.environ
    return _number("WORLD_SIZE", 1) if launched else 1


def rank() -> int:
    """Return this process's number over all machines; process 0 prints and writes."""
    return _number("RANK", 0) if size() > 1 else 0


def local_rank() -> int:
    """Return this process's number on its machine, which is the number of its GPU."""
    return _number("LOCAL_RANK", 0) if size() > 1 else 0


def local_size() -> int:
    """Return how many of the processes run on this machine."""
    return _number("LOCAL_WORLD_SIZE", size()) if size() > 1 else 1


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


@contextmanager
def process_group() -> Iterator[None]:
    """Connect the processes (nccl between GPUs, gloo between CPUs); the process ends with this block."""
    if size() == 1:
        yield
        return
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    # Process 0 alone takes the judge's exam, for which the others may wait a long time.
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=12))
    yield
    wait()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Taking Python down under gloo's threads sometimes aborts, which a launcher reports as a failure.
    os._exit(0)


def gather(value: T) -> list[T]:
    """Return every process's `value`, in the order of the processes, in each of them."""
    if size() == 1:
        return [value]
    import torch

    values: list[Any] = [None] * size()
    torch.distributed.all_gather_object(values, value)
    return values


def any_of(flag: bool) -> bool:
    """Return whether `flag` is true in any process. All processes must call this."""
    return any(gather(flag))


def same(value: T) -> T:
    """Return process 0's value in all processes."""
    return gather(value)[0]


def wait() -> None:
    """Wait until all processes are here."""
    gather(None)


def first(work: Callable[[], T]) -> T | None:
    """Run `work` in process 0. The others wait and get None, or exit quietly if it failed: 0 prints why."""
    if size() == 1:
        return work()
    result = None
    try:
        if rank() == 0:
            result = work()
    except BaseException:
        gather("failed")
        raise
    if "failed" in gather("done"):
        speak_after_the_first()
        sys.exit(1)
    return result


def speak_after_the_first() -> None:
    """Give process 0 time to print first: a launcher then ends the others, which met the same mistake."""
    if rank() > 0:
        time.sleep(2)
