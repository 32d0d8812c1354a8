"""Speed of a GAN's training step: ours beside the plain loop of the classic DCGAN example, with the same networks.

The plain loop runs in fp32, with a DataLoader, ordinary Adam, a backward pass for each loss, and `.item()` in every step. It
has no EMA. Ours is `GANStep` with fused Adam and the EMA, on tensors that stay on the device.

Each loop runs in a process of its own, in turn: the plain loop, the plain loop with our allocator settings, and ours in each
precision. The result is printed: images/s, the median of the repeats, and the ratio to the first line.

    python benchmarks/train_step.py
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from timing import WITH_OUR_ALLOCATOR, Loop, LoopApart, add_timing_flags, measure, precisions, report
from torch import Tensor, nn

import data
import train_gan
from callbacks import EMA
from cli import CUDA_DEVICE_HELP, DATA_DIR_HELP, ArgumentParser, expanded_path, integer, run_script
from loop import TrainState
from models import build
from recipes.gan import LOSSES, assemble
from utils import choose_device

PLAIN = "plain loop, fp32"


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--width", type=integer(1), default=32, help="channels of both networks")
    flag(
        "--loss",
        choices=("hinge", "bce"),
        default="hinge",
        help="loss of our step, and the discriminator norm that belongs to it in both loops (the plain loop's loss is BCE)",
    )
    add_timing_flags(parser)
    flag("--workers", type=integer(0), default=0, help="loader processes of the plain loop")
    flag("--data-dir", type=expanded_path, default=None, help=DATA_DIR_HELP)
    flag("--device", default="auto", help=CUDA_DEVICE_HELP)
    args = parser.parse_args(argv)
    args.data_dir = args.data_dir or data.default_data_dir()

    device = choose_device(args.device, apple=False)
    data.batches_per_epoch(data.load_digits("mnist", "train", args.data_dir), args.batch_size)  # checks both
    loops: dict[str, Loop] = {}
    if device.type == "cpu":
        loops[PLAIN] = LoopApart(plain_loop, args, device)
    loops[PLAIN + WITH_OUR_ALLOCATOR] = LoopApart(with_our_settings, plain_loop, args)
    for precision in precisions(device):
        loops[f"ours, {precision}, EMA"] = LoopApart(with_our_settings, our_loop, args, precision)
    report(args, device, measure(args, loops), f"width {args.width}, {args.loss}")


def with_our_settings(
    loop: Callable[..., Iterator[Any]], args: argparse.Namespace, *others: object
) -> Iterator[tuple[float, float] | None]:
    """The loop with the allocator settings that `choose_device` makes."""
    return loop(args, choose_device(args.device, apple=False), *others)


def plain_loop(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[float, float]]:
    """The update of the classic DCGAN example. Each advance takes a step."""
    torch.manual_seed(0)
    generator = build("dcgan", width=args.width).to(device)
    discriminator = build("dcgan_discriminator", width=args.width, norm=LOSSES[args.loss].norm).to(device)
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    bce = nn.BCEWithLogitsLoss()
    ones = torch.ones(args.batch_size, device=device)

    for images, _ in loader(args, args.workers):
        images = images.to(device)
        discriminator.zero_grad()
        error_real = bce(discriminator(images), ones)
        error_real.backward()
        fake = generator(torch.randn(len(images), generator.config.latent_dim, device=device))
        error_fake = bce(discriminator(fake.detach()), 0 * ones)
        error_fake.backward()
        optimizer_d.step()
        generator.zero_grad()
        error_g = bce(discriminator(fake), ones)
        error_g.backward()
        optimizer_g.step()
        yield (error_real + error_fake).item(), error_g.item()


def loader(args: argparse.Namespace, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a DataLoader as in the classic example, epoch after epoch."""
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    dataset = datasets.MNIST(args.data_dir, train=True, transform=transform)
    epoch: torch.utils.data.DataLoader = torch.utils.data.DataLoader(
        dataset, batch_size=args.batch_size, shuffle=True, drop_last=True, num_workers=workers
    )
    return itertools.chain.from_iterable(itertools.repeat(epoch))


def our_loop(args: argparse.Namespace, device: torch.device, precision: str) -> Iterator[None]:
    """`GANStep` with its EMA, as in train_gan.py. Each advance takes a step."""
    digits = data.load_digits("mnist", "train", args.data_dir, device)
    trainer = train_gan.parse_args(["--loss", args.loss, "--width", str(args.width)])
    state = TrainState()
    torch.manual_seed(0)
    networks, _, step = assemble(trainer, state, device, precision, "dcgan", num_classes=0)
    ema = EMA(networks["generator"], trainer.ema_decay)
    for epoch in itertools.count():
        for images, labels in data.epoch_batches(digits, args.batch_size, 0, epoch):
            state.count(step(images, labels), len(images))
            ema.after_step(state)
            yield


if __name__ == "__main__":
    run_script(main)
