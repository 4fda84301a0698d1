"""Several processes that train one model: `accelerate launch kardia_lite.py sft|grpo ..`, on many GPUs or machines.

Every process holds the whole model and takes its share of each step: whole dialogues, whole groups. The mean of their gradients is
the gradient of one process with the same global batch. Process 0 speaks and writes; the others only work.

DistributedDataParallel is left out: it synchronizes from hooks of its own forward pass, which our packed rows do not take, and a
pass that ran out of memory would leave its buckets half full. A LoRA's gradient is small, so one sum at the end of a step will do.
With one process every function here does nothing, or the plain thing.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class OthersFailed(MemoryError):
    """Another process ran out of memory: this one goes down the ladder with it."""


def size() -> int:
    """How many processes train together: what a launcher (accelerate, torchrun) says in the environment."""
    return _number("WORLD_SIZE", 1) if "RANK" in os.environ and "MASTER_ADDR" in os.environ else 1


def rank() -> int:
    """Which of them this is, over all machines; 0 speaks and writes."""
    return _number("RANK", 0) if size() > 1 else 0


def local_rank() -> int:
    """Which of this machine's processes, and so which GPU."""
    return _number("LOCAL_RANK", 0) if size() > 1 else 0


def local_size() -> int:
    return _number("LOCAL_WORLD_SIZE", size()) if size() > 1 else 1


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


@contextmanager
def met() -> Iterator[None]:
    """Meet the other processes (nccl between GPUs, gloo between CPUs); when all are done, the process ends with this block. They may wait
    for hours: a judge's exam is sat by the first."""
    if size() == 1:
        yield
        return
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=12))
    wait()  # so that what the first exchange allocates is there before memory is short
    yield
    wait()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        0
    )  # all is written, and taking Python down under gloo's threads sometimes ends in an abort, which a launcher calls a failure


def _device():
    import torch

    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.distributed.get_backend() == "nccl"
        else torch.device("cpu")
    )


def any_of(flag: bool) -> bool:
    """Is `flag` true in any process? All must ask."""
    if size() == 1:
        return flag
    import torch

    if "flag" not in _kept:
        _kept["flag"] = torch.zeros(1, device=_device())
    _kept["flag"].fill_(float(flag))
    torch.distributed.all_reduce(_kept["flag"], torch.distributed.ReduceOp.MAX)
    return bool(_kept["flag"].item())


_kept: dict[str, Any] = {}


def wait() -> None:
    """Until all are here."""
    any_of(False)


def gather(value: T) -> list[T]:
    """`value` of every process, in their order, in each of them."""
    if size() == 1:
        return [value]
    import torch

    values: list[Any] = [None] * size()
    torch.distributed.all_gather_object(values, value)
    return values


def sums(values: list[float]) -> list[float]:
    """Each number summed over all processes."""
    return [sum(column) for column in zip(*gather(values))] if size() > 1 else values


def first(work: Callable[[], T]) -> T | None:
    """`work()` in process 0 while the others wait; they get None, or leave quietly if it failed: process 0 says why."""
    if size() == 1:
        return work()
    done = None
    try:
        done = work() if rank() == 0 else None
    except BaseException:
        gather("failed")
        raise
    if "failed" in gather("done"):
        speak_after_the_first()  # time for it to be heard
        sys.exit(1)
    return done


def same(value: T) -> T:
    """Process 0's value, in all."""
    return gather(value)[0]


def all_or_none(work: Callable[[], T], out_of_memory: Callable[[BaseException], bool]) -> T:
    """`work()`; if memory ran out in any process, all of them raise. What follows `work` may then be a collective operation."""
    if size() == 1:
        return work()
    result = error = None
    try:
        result = work()
    except Exception as problem:
        if not out_of_memory(problem):
            raise
        error = problem
    try:
        if any_of(error is not None):
            raise error or OthersFailed("another process is out of memory")
        return result
    finally:
        del error  # its traceback holds this frame, and the tensors of the pass


def join(trainer) -> None:
    """A transformers Trainer whose gradients meet here, at the end of a step, and not in hooks of a wrapped forward pass."""
    if size() == 1:
        return
    import torch

    trainer.accelerator.prepare_model = functools.partial(
        trainer.accelerator.prepare_model, evaluation_mode=True
    )
    if trainer.args.device.type == "cpu":
        trainer.args.__dict__["_setup_devices"] = torch.device(
            "cpu"
        )  # accelerate says cpu:0, where torch cannot load a checkpoint


def guard_forward(module, out_of_memory: Callable[[BaseException], bool]) -> None:
    """Make a module's training passes `all_or_none`: for a loss of other people's, which exchanges numbers after it."""
    if size() == 1:
        return
    import torch

    forward = module.forward
    module.forward = lambda *rows, **more: (
        all_or_none(lambda: forward(*rows, **more), out_of_memory)
        if torch.is_grad_enabled()
        else forward(*rows, **more)
    )


def in_one_order(examples: int, seed: int, rows: int, epoch: Callable[[], int]):
    """A sampler for a dataset of `examples`, then blank ones up to `rows`: the order in which one process would take the
    examples (transformers' shuffle), whose consecutive batches go to the processes in turn. Without blank ones accelerate fills
    the last batch with examples from the beginning, which would then count twice. `epoch` is asked at its beginning: accelerate does
    not find this sampler when a run goes on in the middle of one."""
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import Sampler

    class InOneOrder(Sampler):
        def __init__(self) -> None:
            self.shuffled = SeedableRandomSampler(range(examples), data_seed=seed)

        def __iter__(self):
            self.shuffled.set_epoch(epoch())
            yield from self.shuffled
            yield from range(examples, rows)

        def __len__(self) -> int:
            return rows

    return InOneOrder()


def start_alike(parameters) -> None:
    """Trained weights of process 0, to all."""
    if size() > 1:
        import torch

        for parameter in parameters:
            shared = parameter.data.to(_device())
            torch.distributed.broadcast(shared, 0)
            parameter.data.copy_(shared)


def mean_gradients(parameters) -> None:
    """The mean over all processes takes the place of each gradient: what one process with all their rows would have had."""
    if size() > 1:
        import torch

        parameters = list(parameters)
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in parameters]
        )
        torch.distributed.all_reduce(flat)
        for parameter, gradient in zip(parameters, flat.div_(size()).split([p.numel() for p in parameters])):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype).clone()


def speak_after_the_first() -> None:
    """Before a process other than 0 says what stopped it: if all met the same mistake, the launcher ends it meanwhile."""
    if rank() > 0:
        time.sleep(2)
