"""Speed of a diffusion training step, and of an evaluation in sampling: ours beside Hugging Face diffusers' UNet2DModel.

Both networks have 28x28, 14x14 and 7x7 pixels, attention at 7x7, and a class embedding. The widths of theirs are chosen so
that its parameters and FLOPs are within 2 % of ours; the script prints both.

Their step follows their example of unconditional training: DDPMScheduler, mean squared error, gradient clip, AdamW and
EMAModel. Ours is `DiffusionStep` with its EMA. It is timed as the trainer has it, then without stable targets, then also
without Muon. Theirs has neither, so only the last one does equal work. All loops take the same batches.

An evaluation in sampling is of the network alone, without gradients, of as many images as our sampler gives it.

The training loops run in turn, each in a process of its own. Theirs also runs without our allocator settings. Then the
evaluations run in turn, in one process. The result is printed. Needs requirements-dev.txt.

    python benchmarks/diffusion_step.py
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from timing import WITH_OUR_ALLOCATOR, Loop, LoopApart, add_timing_flags, measure, precisions, report, size_of
from torch import Tensor, nn
from torch.nn import functional as F

import data
import train_diffusion
from callbacks import EMA
from cli import CUDA_DEVICE_HELP, DATA_DIR_HELP, ArgumentParser, expanded_path, run_script
from loop import TrainState
from models import CHUNK_SIZE, build
from recipes.ddpm import assemble
from utils import ask_for_huge_pages, autocast, choose_device

OURS: dict[str, list[str]] = {  # flags of the trainer
    "ours": [],
    "ours without stable targets": ["--stable-targets", "0"],
    "ours with Adam alone, without stable targets": ["--stable-targets", "0", "--muon-lr", "0"],
}


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    add_timing_flags(parser)
    parser.add_argument("--data-dir", type=expanded_path, default=None, help=DATA_DIR_HELP)
    parser.add_argument("--device", default="auto", help=CUDA_DEVICE_HELP)
    args = parser.parse_args(argv)
    args.data_dir = args.data_dir or data.default_data_dir()

    device = our_settings(args)
    loops: dict[str, Loop] = {}
    if device.type == "cpu":
        loops["diffusers, fp32"] = LoopApart(on_digits, their_loop, args, device, "fp32")
    for precision in precisions(device):
        theirs = f"diffusers, {precision}{WITH_OUR_ALLOCATOR}"
        loops[theirs] = LoopApart(with_our_settings, their_loop, args, precision)
        for name, given in OURS.items():
            loops[f"{name}, {precision}"] = LoopApart(with_our_settings, our_loop, args, precision, given)
    timed = measure(args, loops)
    sampling = argparse.Namespace(**vars(args) | {"batch_size": CHUNK_SIZE[device.type]})
    networks: dict[str, Callable[[torch.device], nn.Module]] = {"diffusers": their_network, "ours": our_network}
    evaluations = {
        f"{name}, {precision}": Loop(evaluation_loop(network(device), device, precision))
        for precision in precisions(device)
        for name, network in networks.items()
    }
    evaluated = measure(sampling, evaluations)

    for name, network in networks.items():
        parameters, gflop = size_of(network(device), device)
        print(f"{name}: {parameters:.3f} million parameters, {gflop:.3f} GFLOP forward")
    report(args, device, timed, "EMA, gradient clip and optimizer included")
    for precision in precisions(device):
        base = timed[f"diffusers, {precision}{WITH_OUR_ALLOCATOR}"].rate
        ratios = ", ".join(f"{name} {timed[f'{name}, {precision}'].rate / base:.2f}" for name in OURS)
        print(f"ratio to diffusers with our allocator settings, {precision}: {ratios}")
    report(sampling, device, evaluated, "one evaluation in sampling")


def our_settings(args: argparse.Namespace) -> torch.device:
    """Make the trainer's allocator settings. Returns the device."""
    ask_for_huge_pages()
    return choose_device(args.device, apple=False)


def with_our_settings(loop: Callable[..., Iterator[None]], args: argparse.Namespace, *others: object) -> Iterator[None]:
    """The loop on MNIST, with the trainer's allocator settings."""
    return on_digits(loop, args, our_settings(args), *others)


def on_digits(
    loop: Callable[..., Iterator[None]], args: argparse.Namespace, device: torch.device, *others: object
) -> Iterator[None]:
    """The loop on MNIST."""
    return loop(args, data.load_digits("mnist", "train", args.data_dir, device), *others)


def batches(args: argparse.Namespace, digits: data.Digits) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of all loops, epoch after epoch."""
    for epoch in itertools.count():
        yield from data.epoch_batches(digits, args.batch_size, 0, epoch)


def our_network(device: torch.device) -> nn.Module:
    """A U-Net with the trainer's defaults."""
    torch.manual_seed(0)
    return build("ddpm").to(device)


def their_network(device: torch.device, classes: int | None = data.NUM_CLASSES + 1) -> Any:
    """A UNet2DModel with about our parameters and FLOPs. `classes=None`: without labels."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    network: Any = UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 24, 140),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=35,
        num_class_embeds=classes,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    return network.to(device)


def their_loop(args: argparse.Namespace, digits: data.Digits, precision: str) -> Iterator[None]:
    """The update of diffusers' example of unconditional training. Each advance takes a step."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    device = digits.images.device
    network = their_network(device)
    scheduler: Any = DDPMScheduler(num_train_timesteps=1000)
    ema = EMAModel(network.parameters(), decay=0.999, use_ema_warmup=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    for images, labels in batches(args, digits):
        noise = torch.randn(images.shape, device=device)
        time = torch.randint(0, 1000, (len(images),), device=device)
        noisy = scheduler.add_noise(images, noise, time)
        with autocast(device, precision):
            loss = F.mse_loss(network(noisy, time, labels).sample.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        yield


def our_loop(args: argparse.Namespace, digits: data.Digits, precision: str, given: Sequence[str] = ()) -> Iterator[None]:
    """The update and EMA of train_diffusion.py with the `given` flags. Each advance takes a step."""
    torch.manual_seed(0)
    trainer = train_diffusion.parse_args([*given])
    state = TrainState()
    network, _, step = assemble(trainer, state, digits, precision)
    ema = EMA(network, trainer.ema_decay)
    for images, labels in batches(args, digits):
        state.count(step(images, labels), len(images))
        ema.after_step(state)
        yield


def evaluation_loop(network: nn.Module, device: torch.device, precision: str, n: int | None = None) -> Iterator[None]:
    """Each advance evaluates the network on n images (default: our sampler's chunk)."""
    n = n or CHUNK_SIZE[device.type]
    x = torch.randn(n, 1, 28, 28, device=device)
    time = torch.full((n,), 500, device=device)
    labels = torch.arange(n, device=device) % data.NUM_CLASSES
    network.eval()
    while True:
        with torch.no_grad(), autocast(device, precision):
            network(x, time, labels)
        yield


if __name__ == "__main__":
    run_script(main)
