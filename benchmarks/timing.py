"""What the benchmarks share: timing loops in turn, printing their rates beside the first one's, sizes of networks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from utils import has_bf16


def add_timing_flags(flag, positive_int) -> None:
    """The flags that `measure` reads."""
    flag("--batch-size", type=positive_int, default=128, help="images in a step")
    flag("--steps", type=positive_int, default=10, help="steps in a repeat")
    flag("--repeats", type=positive_int, default=5, help="timed repeats of each loop, after one to warm up")


def precisions(device: torch.device) -> list[str]:
    """What is worth timing: bf16 where the device has it."""
    return ["fp32", "bf16"] if has_bf16(device) else ["fp32"]


def measure(args, loops: dict[str, Iterator]) -> dict[str, list[float]]:
    """Images/s of each loop in each repeat, the loops in turn, after one repeat to warm up.

    A loop takes one training step each time it is advanced.
    """
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for repeat in range(args.repeats + 1):
        for name, loop in loops.items():
            start = time.perf_counter()
            for _ in range(args.steps):
                next(loop)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                rates[name].append(args.steps * args.batch_size / (time.perf_counter() - start))
    return rates


def report(args, device, rates: dict[str, list[float]], what: str) -> None:
    """Print the median rate of each loop, its range, and its ratio to the first loop's."""
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {what}, "
          f"batch {args.batch_size}, {args.repeats} x {args.steps} steps")  # fmt: skip
    base = statistics.median(next(iter(rates.values())))
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:42s} {median:7.0f} img/s  ({min(values):.0f} to {max(values):.0f})   x {median / base:.2f}")


def size_of(network: nn.Module, device: torch.device) -> tuple[float, float]:
    """Parameters in millions, and GFLOP of an evaluation of one image, of a network called with image, time and label."""
    image, index = torch.zeros(1, 1, 28, 28, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image, index, index)
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6, counter.get_total_flops() / 1e9
