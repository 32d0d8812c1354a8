"""Where does the time of a training step go, and that of an evaluation in sampling? PyTorch's profile of ours, by operation.

Shares of the time that the operations themselves take, on a GPU that of their kernels; what is left of 100 % are operations
below the last one shown.

    python benchmarks/profile_steps.py --precisions bf16
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import diffusion_step
import torch
import train_step
from timing import precisions, wait_for_device
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import data
import flags
from graphs import ORDINARY_CALLS
from utils import choose_device, run_script

WITHOUT_TARGETS = ["--stable-targets", "0"]  # of which all is one operation: distances to the training digits
WARM_UP = ORDINARY_CALLS + 2  # steps before the profile; on a GPU one of them records the graph


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--precisions", nargs="+", choices=("fp32", "bf16"), help="default: fp32, and bf16 where it is fast")
    flag("--batch-size", type=flags.positive_int, default=128, help="images in a training step")
    flag("--steps", type=flags.positive_int, default=5, help="profiled")
    flag("--rows", type=flags.positive_int, default=12, help="operations to show")
    flag("--data-dir", default=None, help="where MNIST/raw lies (default: $MNIST_DIR, else data)")
    flag("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args()
    args.data_dir, device = args.data_dir or data.default_data_dir(), choose_device(args.device)
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


def show(title: str, loop, steps: int, rows: int, device: torch.device) -> None:
    """Print the shares of the operations of so many steps, the largest first."""
    for _ in range(WARM_UP):
        next(loop)
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        for _ in range(steps):
            next(loop)
        wait_for_device()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU  # kernels, not also the operations that launch them
    events = [e for e in profiled.key_averages() if e.device_type == kind]
    spent = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events}
    total = sum(spent.values())
    print(f"{title}: {total / steps / 1000:.1f} ms")
    for key in sorted(spent, key=spent.get, reverse=True)[:rows]:
        print(f"  {spent[key] / total:6.1%}  {key}")


if __name__ == "__main__":
    run_script(main)
