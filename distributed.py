"""Several processes with one result, as torchrun starts them: each computes a share of every batch and of all samples.

Randomness is drawn for the whole batch by every process, which then keeps its rows, so that the result depends on their
number by rounding alone (but for BatchNorm, which sees its process's rows). What they agree on goes over gloo, on the CPU,
so that nobody waits for a GPU. Of one process alone, every function here is the identity.

PyTorch's DistributedDataParallel follows one backward pass of one network; a GAN's step has several of two, some of them for
a second derivative. These networks are small, so their gradients are averaged in one message when a backward pass is over.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import OUT_OF_MEMORY, ExpectedError, is_first


class Left(ExpectedError):
    """Another process has ended, before what was to be done together was done."""


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join(device: torch.device) -> None:
    """Meet the other processes: NCCL between GPUs, gloo between CPUs. From now on only the first one prints.

    Raises:
        ExpectedError: they cannot be met.
    """
    if count() == 1 or dist.is_initialized():
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:
        raise ExpectedError(f"the {count()} processes cannot meet ({error}); start them with torchrun") from error
    if not is_first():
        sys.stdout = io.StringIO()


def leave() -> None:
    """Part from the other processes, at the end of their common work."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share(n: int) -> slice:
    """Which of `n` rows are this process's."""
    rank, world = int(os.environ.get("RANK", 0)), count()
    return slice(n * rank // world, n * (rank + 1) // world)


def _together(function: Callable) -> Callable:
    """A function of the group, that raises `Left` where another process has ended."""

    @functools.wraps(function)
    def call(value: Any) -> Any:
        if count() == 1:
            return value
        try:
            return function(value)
        except RuntimeError as error:
            if any(words in str(error) for words in OUT_OF_MEMORY):
                raise
            raise Left(f"another of the {count()} processes has ended ({error})") from error

    return call


@_together
def average(tensors: list[Tensor]) -> list[Tensor]:
    """Replace floating-point tensors of one device by their means over the processes; in one message."""
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
    """The first process's value, of primitives: the others' may differ in their last bits, and they decide alike."""
    values = [value]
    dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
    return values[0]


@_together
def gather(rows: Tensor) -> Tensor:
    """All rows, in order, of what `share` has divided."""
    sizes = [torch.zeros((), dtype=torch.int64) for _ in range(count())]
    dist.all_gather(sizes, torch.tensor(len(rows)))
    most = int(max(sizes))
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])


def sample(generator: nn.Module, n: int, labels: Tensor | None, rng: torch.Generator, **options: Any) -> Tensor:
    """`generator.sample`, with the work divided; every process gets all of the images, float [n, 1, 28, 28]."""
    if count() == 1:
        return generator.sample(n, labels, rng, **options)
    return gather(generator.sample(n, labels, rng, rows=share(n), **options))


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """The first process goes through this block before the others, who find what it has left, such as a download."""
    if not is_first():
        largest(0)
    yield
    if is_first():
        largest(0)
