"""What the benchmarks share: timing loops in turn, printing their rates beside the first one's and beside what the device
can multiply, sizes of networks."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from graphs import ORDINARY_CALLS
from utils import has_bf16

LIKE_OURS = ", our allocator settings"  # in the name of a loop that also runs without them


def add_timing_flags(flag, positive_int) -> None:
    """The flags that `measure` reads."""
    flag("--batch-size", type=positive_int, default=128, help="images in a step")
    flag("--steps", type=positive_int, default=10, help="steps in a repeat")
    flag("--repeats", type=positive_int, default=5, help="timed repeats of each loop, after one to warm up")


def wait_for_device() -> None:
    """Let a GPU finish what it has been given, before a clock is read."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def precisions(device: torch.device) -> list[str]:
    """What is worth timing: bf16 where the device has it."""
    return ["fp32", "bf16"] if has_bf16(device) else ["fp32"]


class Timed(NamedTuple):
    """A loop's images/s in each repeat, and the GFLOP that a step of it takes for an image."""

    rates: list[float]
    gflop: float

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


class Loop:
    """An iterator that takes one step each time it is advanced."""

    def __init__(self, steps: Iterator):
        self.steps = steps

    def flops(self) -> int:
        """Take a step; the FLOPs of its convolutions and matrix products."""
        with FlopCounterMode(display=False) as counter:
            next(self.steps)
        return counter.get_total_flops()

    def advance(self, steps: int) -> None:
        """Take so many steps, to their end."""
        for _ in range(steps):
            next(self.steps)
        wait_for_device()

    def close(self) -> None:
        """It is not needed any more."""


class LoopApart(Loop):
    """The loop `loop(*args)` in a process of its own, with the C library's allocator settings unless it makes others."""

    def __init__(self, loop: Callable[..., Iterator], *args: object):
        self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.process.submit(_begin, loop, *args).result()

    def flops(self) -> int:
        return self.process.submit(_flops).result()

    def advance(self, steps: int) -> None:
        self.process.submit(_advance, steps).result()

    def close(self) -> None:
        self.process.shutdown()


def _begin(loop: Callable[..., Iterator], *args: object) -> None:
    global _loop
    os.environ.pop("THP_MEM_ALLOC_ENABLE", None)  # inherited, where the first process has made our settings
    _loop = Loop(loop(*args))


def _flops() -> int:
    return _loop.flops()


def _advance(steps: int) -> None:
    _loop.advance(steps)


def measure(args, loops: dict[str, Loop]) -> dict[str, Timed]:
    """Each loop timed in each repeat, the loops in turn, after a repeat to warm up, in which a GPU records what it replays
    later, and a step whose FLOPs are counted."""
    gflop = {name: loop.flops() / args.batch_size / 1e9 for name, loop in loops.items()}
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for repeat in range(args.repeats + 1):
        for name, loop in loops.items():
            start = time.perf_counter()
            loop.advance(args.steps if repeat else max(args.steps, ORDINARY_CALLS))
            if repeat:
                rates[name].append(args.steps * args.batch_size / (time.perf_counter() - start))
    for loop in loops.values():
        loop.close()
    return {name: Timed(rates[name], gflop[name]) for name in loops}


def matmul_peak(device: torch.device, precision: str) -> float:
    """GFLOP/s of a large matrix product: the fastest of several."""
    size, dtype = 8192 if device.type == "cuda" else 2048, torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        wait_for_device()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def report(args, device, loops: dict[str, Timed], what: str) -> None:
    """Print each loop's median rate, its range, its ratio to the first loop's, and its part of what the device can multiply.

    A loop's precision is fp32, or bf16 where its name says so.
    """
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {what}, "
          f"batch {args.batch_size}, {args.repeats} x {args.steps} steps")  # fmt: skip
    peaks = {precision: matmul_peak(device, precision) for precision in precisions(device)}
    print("matrix product: " + ", ".join(f"{peak:,.0f} GFLOP/s in {precision}" for precision, peak in peaks.items()))
    base = next(iter(loops.values())).rate
    for name, loop in loops.items():
        achieved, peak = loop.rate * loop.gflop, peaks["bf16" if "bf16" in name else "fp32"]
        spread = f"({min(loop.rates):.0f} to {max(loop.rates):.0f})"
        print(f"{name:42s} {loop.rate:7.0f} img/s  {spread}   x {loop.rate / base:.2f}   "
              f"{loop.gflop:.2f} GFLOP an image: {achieved:,.0f} GFLOP/s, {achieved / peak:.0%} of peak")  # fmt: skip


def size_of(network: nn.Module, device: torch.device) -> tuple[float, float]:
    """Parameters in millions, and GFLOP of an evaluation of one image, of a network called with image, time and label."""
    image, index = torch.zeros(1, 1, 28, 28, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image, index, index)
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6, counter.get_total_flops() / 1e9
