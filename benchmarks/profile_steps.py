"""Where the time of a training step goes, and that of an evaluation in sampling: PyTorch's profile, by operation.

The script prints the largest shares of the time that the operations themselves take; on a GPU, of the time of their kernels.
The operations below the last line make up the rest of the 100 %.

    python benchmarks/profile_steps.py --precisions bf16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import diffusion_step
import torch
import train_step
from timing import precisions, wait_for_device
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import data
from cli import CUDA_DEVICE_HELP, DATA_DIR_HELP, ArgumentParser, expanded_path, integer, run_script
from diffusion.options import PRECISIONS
from engine.cuda_graph import ORDINARY_CALLS
from utils import choose_device

WITHOUT_TARGETS = ["--stable-targets", "0"]  # they are a single operation: distances to the training digits
WARM_UP = ORDINARY_CALLS + 2  # steps before the profile; on a GPU one of them records the graph


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--precisions", nargs="+", choices=PRECISIONS, help="default: fp32, and bf16 where the device has it")
    flag("--batch-size", type=integer(1), default=128, help="images in a training step")
    flag("--steps", type=integer(1), default=5, help="profiled steps")
    flag("--rows", type=integer(1), default=12, help="operations to show")
    flag("--data-dir", type=expanded_path, default=None, help=DATA_DIR_HELP)
    flag("--device", default="auto", help=CUDA_DEVICE_HELP)
    args = parser.parse_args(argv)
    args.data_dir = args.data_dir or data.default_data_dir()
    device = choose_device(args.device, apple=False)
    digits = data.load_digits("mnist", "train", args.data_dir, device)
    gan = argparse.Namespace(**vars(args), width=32, loss="hinge")  # the trainer's defaults
    for precision in args.precisions or precisions(device):
        loops = {
            "GAN step": train_step.our_loop(gan, device, precision),
            "diffusion step without stable targets": diffusion_step.our_loop(args, digits, precision, WITHOUT_TARGETS),
            "evaluation": diffusion_step.evaluation_loop(diffusion_step.our_network(device), device, precision),
        }
        for name, loop in loops.items():
            show(f"{name}, {precision}", loop, args.steps, args.rows, device)


def show(title: str, loop: Iterator[None], steps: int, rows: int, device: torch.device) -> None:
    """Profile so many steps. Print the operations with the largest shares."""
    for _ in range(WARM_UP):
        next(loop)
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        for _ in range(steps):
            next(loop)
        wait_for_device()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU  # kernels, without the operations that launch them
    events = [event for event in profiled.key_averages() if event.device_type == kind]
    spent = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    total = sum(spent.values())
    print(f"{title}: {total / steps / 1000:.1f} ms")
    for key in sorted(spent, key=lambda key: spent[key], reverse=True)[:rows]:
        print(f"  {spent[key] / total:6.1%}  {key}")


if __name__ == "__main__":
    run_script(main)
