"""Several processes with one result, as torchrun starts them. Each computes a share of every batch and of all samples.

Every process draws the random numbers of the whole training batch and keeps its rows. So the result depends on the number of
processes by rounding alone, except for BatchNorm, which sees the rows of its process. Decisions are exchanged over gloo, on
the CPU, so that nobody waits for a GPU. With one process, every function here is the identity.

PyTorch's DistributedDataParallel follows one backward pass of one network. A GAN's update has several, of two networks, and
some are for a second derivative. These networks are small, so their gradients are averaged in one message after each pass.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from files import ExpectedError, UsageError, is_first, is_out_of_memory, processes


class Left(ExpectedError):
    """Another process ended before their common work was done."""


def count() -> int:
    """The number of processes."""
    return processes().total


def join(device: torch.device) -> None:
    """Connect to the other processes: NCCL between GPUs, gloo between CPUs. From now on only the first one prints.

    Raises:
        UsageError: the device is an Apple GPU.
        ExpectedError: the connection fails.
    """
    if count() == 1 or dist.is_initialized():
        return
    if device.type == "mps":
        raise UsageError("several processes need CPUs or CUDA GPUs; give --device cpu, or start one process")
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:
        raise ExpectedError(f"the {count()} processes cannot meet ({error}); start them with torchrun") from error
    if not is_first():
        sys.stdout = io.StringIO()


def leave() -> None:
    """Disconnect from the other processes, at the end of the common work."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share(n: int) -> slice:
    """The rows of this process, of `n` in all."""
    rank, world, _ = processes()
    return slice(n * rank // world, n * (rank + 1) // world)


def _together(function: Callable) -> Callable:
    """Decorate a function of all processes: with one process it returns its argument; `Left` is raised when another ends."""

    @functools.wraps(function)
    def call(value: Any) -> Any:
        if count() == 1:
            return value
        try:
            return function(value)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise Left(f"another of the {count()} processes has ended ({error})") from error

    return call


@_together
def average(tensors: list[Tensor]) -> list[Tensor]:
    """Replace floating-point tensors of one device by their means over the processes, in one message."""
    flat = torch.cat([tensor.detach().flatten().float() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= count()
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_([tensor.detach() for tensor in tensors], [p.view_as(t) for p, t in zip(parts, tensors)])
    return tensors


@_together
def largest(number: int) -> int:
    """The largest of the processes' numbers."""
    numbers = torch.tensor(number)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


@_together
def total(number: int) -> int:
    """The sum of the processes' numbers."""
    numbers = torch.tensor(number)
    dist.all_reduce(numbers)
    return int(numbers)


@_together
def of_first(value: Any) -> Any:
    """The first process's value, made of primitives. The others may differ in their last bits, and all must agree."""
    values = [value]
    dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
    return values[0]


@_together
def gather(rows: Tensor) -> Tensor:
    """All rows, in order: the inverse of `share`."""
    sizes = [torch.zeros((), dtype=torch.int64) for _ in range(count())]
    dist.all_gather(sizes, torch.tensor(len(rows)))
    most = int(max(sizes))
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


def sample(generator: Any, n: int, labels: Tensor | None, rng: torch.Generator, **options: Any) -> Tensor:
    """`generator.sample` with the work divided. Every process gets all of the images, float [n, 1, 28, 28]."""
    if count() == 1:
        return generator.sample(n, labels, rng, **options)
    return gather(generator.sample(n, labels, rng, rows=share(n), **options))


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """The first process runs this block before the others, which then find its results, such as a download."""
    if not is_first():
        largest(0)
    yield
    if is_first():
        largest(0)
