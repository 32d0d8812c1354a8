"""What does each choice for speed give? Our GAN steps, our diffusion step and evaluations in sampling, as they are and with
one choice undone at a time (of the conditional GAN, those that the other one has not).

A ratio below 1 means that the choice pays. Each changed loop is timed beside the one as it is, the two in turn, each in a
process of its own, as in a training.

    python benchmarks/choices.py
    python benchmarks/choices.py --what diffusion --precisions bf16 --steps 10
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from diffusion_step import batches, evaluation_loop, our_network
from timing import LoopApart, Timed, add_timing_flags, measure, precisions, report
from torch import Tensor, nn
from torch.nn import functional as F
from train_step import loader

import adversarial
import data
import denoising
import flags
import train_cgan
import train_diffusion
import train_gan
from callbacks import EMA
from models import CHUNK_SIZE, ClassBatchNorm2d
from training import TrainState
from unet import AdaptiveGroupNorm, Attention
from utils import ask_for_huge_pages, choose_device, run_script

AS_IS = "as it is"
NO_GRAPH = "no CUDA graph"
ALLOCATOR = "the C library's allocator settings"
SHARED = ["Adam not fused", "EMA tensor by tensor", "losses fetched in every step", "a DataLoader's batches", "compiled"]
SHARED += [NO_GRAPH, ALLOCATOR]
ONE_PASS = "scale and shift after the norm"
GAN = ["contiguous", "convolution as stem", "real and fake in two passes", "D's unused gradients computed", *SHARED]
CGAN = ["class gains in fp32", NO_GRAPH, ALLOCATOR]
DIFFUSION = ["channels last", "fused attention", ONE_PASS, *SHARED]
SAMPLED = {"cpu": 500, "cuda": 10_000}  # images in a step of the sampling's table
CHUNKS = {"cpu": (25, 50, 125, 500), "cuda": (125, 500, 1000, 5000)}
SAMPLING = ["channels last", "fused attention", ONE_PASS, "compiled", ALLOCATOR]
SAMPLING += [f"chunks of {n}" for n in sorted({*CHUNKS["cpu"], *CHUNKS["cuda"]})]


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--what", nargs="+", choices=TABLES, default=[*TABLES], help="the tables to make")
    flag("--precisions", nargs="+", choices=("fp32", "bf16"), help="default: fp32, and bf16 where it is fast")
    flag("--undo", nargs="+", choices=sorted({*GAN, *CGAN, *DIFFUSION, *SAMPLING}),
         help="these choices only (default: all)")  # fmt: skip
    add_timing_flags(flag, flags.positive_int)
    flag("--data-dir", default=None, help="where MNIST/raw lies (default: $MNIST_DIR, else data)")
    flag("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.set_defaults(steps=5, repeats=3)
    args = parser.parse_args()
    args.data_dir = args.data_dir or data.default_data_dir()

    device = choose_device(args.device)
    for what, precision in itertools.product(args.what, args.precisions or precisions(device)):
        choices = possible(TABLES[what][1], device)
        if args.undo is not None:
            choices = [choice for choice in choices if choice in args.undo]
        if not choices:
            print(f"{what}, {precision}: has none of these choices on {device}")
            continue
        table = sized(args, what, device)
        pairs = {choice: time_pair(table, what, precision, choice) for choice in choices}
        as_it_is = Timed([rate for pair in pairs.values() for rate in pair[AS_IS].rates], pairs[choices[0]][AS_IS].gflop)
        report(table, device, {f"{AS_IS}, {precision}": as_it_is}, f"{what}, {precision}")
        for choice, pair in pairs.items():
            ratios = [changed / kept for changed, kept in zip(pair[choice].rates, pair[AS_IS].rates)]
            print(f"{choice:42s} x {statistics.median(ratios):.2f}   ({min(ratios):.2f} to {max(ratios):.2f})")


def possible(choices: list[str], device: torch.device) -> list[str]:
    """Those that mean something on the device."""
    sizes = {*CHUNKS["cpu"], *CHUNKS["cuda"]} - {*CHUNKS[device.type]}
    elsewhere = {ALLOCATOR if device.type == "cuda" else NO_GRAPH, *(f"chunks of {n}" for n in sizes)}
    return [choice for choice in choices if choice not in elsewhere]


def sized(args, what: str, device: torch.device) -> argparse.Namespace:
    """The arguments, with the number of images in a step of that table."""
    return argparse.Namespace(**vars(args) | {"batch_size": SAMPLED[device.type] if what == "sampling" else args.batch_size})


def time_pair(args, what: str, precision: str, choice: str) -> dict[str, Timed]:
    """The loop as it is and the changed one."""
    return measure(args, {name: LoopApart(loop, args, what, precision, name) for name in (AS_IS, choice)})


def loop(args, what: str, precision: str, choice: str) -> Iterator[None]:
    """That loop of the table, with the allocator settings of its trainer unless these are what is undone."""
    ours = choice != ALLOCATOR
    if ours and what == "diffusion":
        ask_for_huge_pages()
    device = choose_device(args.device) if ours else torch.device("cpu")
    digits = data.load_digits("mnist", "train", args.data_dir, device)
    return TABLES[what][0](args, digits, precision, choice)


def gan_loop(args, digits: data.Digits, precision: str, choice: str, classes: int = 0) -> Iterator[None]:
    """The trainer's step with its EMA, with one choice undone; a step each time the iterator is advanced."""
    torch.manual_seed(0)
    script, name = (train_cgan, "cdcgan") if classes else (train_gan, "dcgan")
    trainer, state = script.parse_args([]), TrainState()
    networks, optimizers, step = adversarial.assemble(trainer, state, digits.images.device, precision, name, classes)
    generator, discriminator = networks.values()
    if choice == "convolution as stem":
        generator.stem = ConvolutionStem(generator.config).to(digits.images.device)
        how = {"fused": True, "capturable": digits.images.is_cuda}
        optimizers["lr"] = torch.optim.Adam(generator.parameters(), lr=trainer.lr, **how)
    elif choice == "Adam not fused":
        optimizers.update({name: UnfusedAdam(optimizer) for name, optimizer in optimizers.items()})
    elif choice == "D's unused gradients computed":
        discriminator.requires_grad_ = lambda _: discriminator
    elif choice == "real and fake in two passes":
        step._judge = lambda real, fake: (discriminator(real), discriminator(fake))
    for network in networks.values():
        change_network(network, choice)
    step.replayed.active &= choice != NO_GRAPH
    yield from steps(args, digits, step, state, generator, choice)


def diffusion_loop(args, digits: data.Digits, precision: str, choice: str) -> Iterator[None]:
    """The trainer's step with its EMA, with one choice undone; a step each time the iterator is advanced."""
    torch.manual_seed(0)
    trainer, state = train_diffusion.parse_args([]), TrainState()
    network, optimizers, step = denoising.assemble(trainer, state, digits, precision)
    if choice == "Adam not fused":
        optimizers["lr"] = UnfusedAdam(optimizers["lr"])
    change_network(network, choice)
    step.replayed.active &= choice != NO_GRAPH
    yield from steps(args, digits, step, state, network, choice)


def steps(args, digits: data.Digits, step: Callable, state: TrainState, averaged: nn.Module, choice: str) -> Iterator[None]:
    """What both trainings do around their step."""
    ema = SlowEMA(averaged, 0.999) if choice == "EMA tensor by tensor" else EMA(averaged, 0.999)
    for images, labels in loader(args) if choice == "a DataLoader's batches" else batches(args, digits):
        losses = step(images.to(digits.images.device), labels.to(digits.images.device))
        state.count(losses, len(images))
        ema.after_step(state)
        if choice == "losses fetched in every step":
            state.mean_losses()
        yield


def sampling_loop(_args, digits: data.Digits, precision: str, choice: str) -> Iterator[None]:
    """One evaluation of many images, in chunks, each time the iterator is advanced."""
    kind = digits.images.device.type
    chunk = int(choice.removeprefix("chunks of ")) if choice.startswith("chunks") else CHUNK_SIZE[kind]
    network = our_network(digits.images.device)
    change_network(network, choice)
    evaluations = evaluation_loop(network, digits.images.device, precision, chunk)
    while True:
        for _ in range(SAMPLED[kind] // chunk):
            next(evaluations)
        yield


TABLES = {
    "gan": (gan_loop, GAN),
    "cgan": (functools.partial(gan_loop, classes=data.NUM_CLASSES), CGAN),
    "diffusion": (diffusion_loop, DIFFUSION),
    "sampling": (sampling_loop, SAMPLING),
}


# --------------------------------------------------------------------------------------------------------------------
# Choices undone


def change_network(network: nn.Module, choice: str) -> None:
    """Undo a choice that is one of the network's."""
    if choice == "compiled":
        network.compile()
    elif choice == "channels last":
        network.to(memory_format=torch.channels_last)
    elif choice == "contiguous":
        network.to(memory_format=torch.contiguous_format)
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    elif choice in FORWARD:
        kind, forward = FORWARD[choice]
        for module in network.modules():
            if isinstance(module, kind):
                module.forward = types.MethodType(forward, module)


def fused_attention(self: Attention, x: Tensor, _condition: Tensor) -> Tensor:
    """`Attention.forward` by PyTorch's fused kernel."""
    tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
    q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, HW, C / heads]
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, HW, C]
    return x + self.out(mixed).transpose(1, 2).unflatten(2, x.shape[2:])


def scale_and_shift_after(self: AdaptiveGroupNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`AdaptiveGroupNorm.forward` as its formula says."""
    return nn.GroupNorm.forward(self, x) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


def gains_in_fp32(self: ClassBatchNorm2d, x: Tensor, labels: Tensor) -> Tensor:
    """`ClassBatchNorm2d.forward` with gains and biases of the type that they are stored in."""
    return self.norm(x) * self.gain(labels)[:, :, None, None] + self.bias(labels)[:, :, None, None]


FORWARD = {
    "fused attention": (Attention, fused_attention),
    ONE_PASS: (AdaptiveGroupNorm, scale_and_shift_after),
    "class gains in fp32": (ClassBatchNorm2d, gains_in_fp32),
}


class ConvolutionStem(nn.Module):
    """The generator's first layer as the paper's transposed convolution: latent [B, Z] -> [B, 7 * 7 * 4w]."""

    def __init__(self, config):
        super().__init__()
        self.convolution = nn.ConvTranspose2d(config.latent_dim, 4 * config.width, 7)
        nn.init.normal_(self.convolution.weight, std=math.sqrt(2 / config.latent_dim))

    def forward(self, z: Tensor) -> Tensor:
        return self.convolution(z[:, :, None, None]).permute(0, 2, 3, 1).flatten(1)


class UnfusedAdam(torch.optim.Adam):
    """PyTorch's default in place of a fused one. `Guard` takes it for such, although it cannot be held back."""

    def __init__(self, fused: torch.optim.Adam):
        (group,) = fused.param_groups
        super().__init__(group["params"], lr=group["lr"], betas=group["betas"], capturable=group["capturable"])
        self.defaults["fused"] = True

    def step(self) -> None:
        self.found_inf = None
        super().step()


class SlowEMA(EMA):
    """Without `foreach`."""

    @torch.no_grad()
    def after_step(self, state: TrainState) -> None:
        for average, value in zip(self._averages, self._values):
            average.lerp_(value, 1 - self.decay)
        for average, value in zip(self._counters, self._counts):
            average.copy_(value)


if __name__ == "__main__":
    run_script(main)
