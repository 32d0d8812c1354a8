"""What the benchmarks of speed share: loops that are timed in turn, the report of their rates, and sizes of networks."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cli import integer
from engine.cuda_graph import ORDINARY_CALLS
from utils import has_bf16

WITH_OUR_ALLOCATOR = ", our allocator settings"  # in the name of a loop that is also timed without them


def add_timing_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `measure` reads."""
    flag = parser.add_argument
    flag("--batch-size", type=integer(1), default=128, help="images in a step")
    flag("--steps", type=integer(1), default=10, help="steps in a repeat")
    flag("--repeats", type=integer(1), default=5, help="timed repeats of each loop, after one to warm up")


def wait_for_device() -> None:
    """Wait until a GPU has finished its work. Call it before a clock is read."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def precisions(device: torch.device) -> list[str]:
    """The precisions that are worth timing: fp32, and bf16 where the device has it."""
    return ["fp32", "bf16"] if has_bf16(device) else ["fp32"]


# --------------------------------------------------------------------------------------------------------------------
# Loops


class Loop:
    """An iterator that takes one step each time it is advanced."""

    def __init__(self, steps: Iterator[Any]):
        self.steps = steps

    def flops(self) -> int:
        """Take a step. Returns the FLOPs of its convolutions and matrix products."""
        with FlopCounterMode(display=False) as counter:
            next(self.steps)
        return counter.get_total_flops()

    def advance(self, steps: int) -> None:
        """Take so many steps, and wait for the last one."""
        for _ in range(steps):
            next(self.steps)
        wait_for_device()

    def close(self) -> None:
        """End the loop's process, if it has one of its own."""


class LoopApart(Loop):
    """The loop `loop(*args)` in a process of its own. It starts with the C library's allocator settings."""

    def __init__(self, loop: Callable[..., Iterator[Any]], *args: object):
        self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.process.submit(_begin, loop, *args).result()

    def flops(self) -> int:
        return self.process.submit(_flops).result()

    def advance(self, steps: int) -> None:
        self.process.submit(_advance, steps).result()

    def close(self) -> None:
        self.process.shutdown()


_loop: Loop  # of a process of `LoopApart`


def _begin(loop: Callable[..., Iterator[Any]], *args: object) -> None:
    global _loop
    os.environ.pop("THP_MEM_ALLOC_ENABLE", None)  # inherited, if the first process has made our settings
    _loop = Loop(loop(*args))


def _flops() -> int:
    return _loop.flops()


def _advance(steps: int) -> None:
    _loop.advance(steps)


# --------------------------------------------------------------------------------------------------------------------
# Measuring and reporting


class Timed(NamedTuple):
    """A loop's images/s in each repeat, and the GFLOP of its step for one image."""

    rates: list[float]
    gflop: float

    @property
    def rate(self) -> float:
        """The median."""
        return statistics.median(self.rates)


def measure(args: argparse.Namespace, loops: dict[str, Loop]) -> dict[str, Timed]:
    """Time the loops in turn, in every repeat.

    Two things come first: a step whose FLOPs are counted, and a repeat that warms up. A GPU records its graphs in the
    latter.
    """
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
    """GFLOP/s of a large matrix product: the fastest of 20."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        wait_for_device()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def report(args: argparse.Namespace, device: torch.device, loops: dict[str, Timed], what: str) -> None:
    """Print each loop's median rate and range, its ratio to the first loop, and its share of the matrix product's rate.

    A loop's precision is bf16 if its name says so, else fp32.
    """
    protocol = f"batch {args.batch_size}, {args.repeats} x {args.steps} steps"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {what}, {protocol}")
    peaks = {precision: matmul_peak(device, precision) for precision in precisions(device)}
    print("matrix product: " + ", ".join(f"{peak:,.0f} GFLOP/s in {precision}" for precision, peak in peaks.items()))
    base = next(iter(loops.values())).rate
    for name, loop in loops.items():
        achieved = loop.rate * loop.gflop
        share = achieved / peaks["bf16" if "bf16" in name else "fp32"]
        spread = f"({min(loop.rates):.0f} to {max(loop.rates):.0f})"
        work = f"{loop.gflop:.2f} GFLOP an image: {achieved:,.0f} GFLOP/s, {share:.0%} of peak"
        print(f"{name:42s} {loop.rate:7.0f} img/s  {spread}   x {loop.rate / base:.2f}   {work}")


def size_of(network: nn.Module, device: torch.device) -> tuple[float, float]:
    """Millions of parameters, and GFLOP of an evaluation of one image. The network takes image, time and label."""
    image = torch.zeros(1, 1, 28, 28, device=device)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image, index, index)
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6, counter.get_total_flops() / 1e9
