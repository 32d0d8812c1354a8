"""How fast is a GAN training step? Ours against the plain loop of the classic DCGAN example, on the very same networks.

The plain loop: fp32, a DataLoader with ToTensor and Normalize, separate backward passes with all gradients, ordinary
Adam, `.item()` in every step, no EMA. Ours: `GANStep` on the tensor-resident data, the fused optimizer and the EMA.
In turn, each in a process of its own: the plain loop as it comes, the plain loop with our allocator settings, and ours in
both precisions. Reported are images/s (median of the repeats) and the ratio to the first line.

    python benchmarks/train_step.py
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from timing import LIKE_OURS, LoopApart, add_timing_flags, measure, precisions, report
from torch import nn

import data
import flags
import train_gan
from adversarial import LOSSES, assemble
from callbacks import EMA
from models import build
from training import TrainState
from utils import choose_device, run_script


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--width", type=flags.positive_int, default=32, help="channels of both networks")
    flag(
        "--loss",
        choices=("hinge", "bce"),
        default="hinge",
        help="loss of our step, and both loops' discriminator norm with it (the plain loop's loss is BCE)",
    )
    add_timing_flags(flag, flags.positive_int)
    flag("--workers", type=flags.natural, default=0, help="loader processes of the plain loop")
    flag("--data-dir", default=None, help="where MNIST/raw lies (default: $MNIST_DIR, else data)")
    flag("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args()
    args.data_dir = args.data_dir or data.default_data_dir()

    device = choose_device(args.device)
    data.batches_per_epoch(data.load_digits("mnist", "train", args.data_dir), args.batch_size)  # checks both
    theirs = "plain loop, fp32"
    loops = {theirs: LoopApart(plain_loop, args, device)} if device.type == "cpu" else {}
    loops |= {theirs + LIKE_OURS: LoopApart(with_our_settings, plain_loop, args)}
    for precision in precisions(device):
        loops[f"ours, {precision}, EMA"] = LoopApart(with_our_settings, our_loop, args, precision)
    report(args, device, measure(args, loops), f"width {args.width}, {args.loss}")


def with_our_settings(loop, args, *others):
    """The loop with the allocator settings that `choose_device` makes."""
    return loop(args, choose_device(args.device), *others)


def plain_loop(args, device):
    """The update of the classic DCGAN example; a step each time the iterator is advanced."""
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


def loader(args, workers: int = 0):
    """The batches of a DataLoader as in the classic example, epoch after epoch."""
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    dataset = datasets.MNIST(args.data_dir, train=True, transform=transform)
    epoch = torch.utils.data.DataLoader(
        dataset, batch_size=args.batch_size, shuffle=True, drop_last=True, num_workers=workers
    )
    return itertools.chain.from_iterable(itertools.repeat(epoch))


def our_loop(args, device, precision: str):
    """`GANStep` with its EMA, as train_gan.py has them; a step each time the iterator is advanced."""
    digits = data.load_digits("mnist", "train", args.data_dir, device)
    trainer, state = train_gan.parse_args(["--loss", args.loss, "--width", str(args.width)]), TrainState()
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
