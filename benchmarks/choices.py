"""What each choice for speed gives: our training steps, and evaluations in sampling, with one choice undone at a time.

There are five tables: the GAN's step, the conditional GAN's, the diffusion model's, an evaluation in sampling, and a whole
call of `sample`. The conditional GAN's table holds only choices that matter there in another way than for the GAN.

Each changed loop is timed beside the loop as it is. The two run in turn, each in a process of its own, as in a training. A
ratio below 1 means that the choice pays. The result is printed.

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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from diffusion_step import batches, evaluation_loop, our_network
from timing import LoopApart, Timed, add_timing_flags, measure, precisions, report
from torch import Tensor, nn
from torch.nn import functional as F
from train_step import loader

import data
import models
import train_cgan
import train_diffusion
import train_gan
from callbacks import EMA
from cli import CUDA_DEVICE_HELP, DATA_DIR_HELP, ArgumentParser, expanded_path, run_script
from diffusion.options import PRECISIONS
from engine import muon
from engine.guard import Guard
from engine.muon import Muon
from loop import TrainState
from models import CHUNK_SIZE, ClassBatchNorm2d, GeneratorConfig
from networks.unet import Attention
from recipes import ddpm, gan
from utils import SamplingNoise, ask_for_huge_pages, choose_device, keyed_generator

AS_IS = "as it is"
NO_GRAPH = "no CUDA graph"
ALLOCATOR = "the C library's allocator settings"
SHARED = [
    "Adam not fused",
    "EMA tensor by tensor",
    "losses fetched in every step",
    "a DataLoader's batches",
    "compiled",
    NO_GRAPH,
    ALLOCATOR,
]
OTHER_FORMAT = "the other memory format"  # of channels last and contiguous
OTHER_BATCHES = "Muon's batches of the other device"  # of one for each shape, and one for all
GAN = [OTHER_FORMAT, "convolution as stem", "real and fake in two passes", "D's unused gradients computed", *SHARED]
CGAN = ["class gains in fp32", NO_GRAPH, ALLOCATOR]
DIFFUSION = [OTHER_FORMAT, "fused attention", OTHER_BATCHES, *SHARED]
ONE_STREAM = "one stream of noise"
SAMPLED = {"cpu": 500, "cuda": 10_000}  # images in a step of the sampling's table
CHUNKS = {"cpu": (25, 50, 125, 500), "cuda": (125, 500, 1000, 5000)}
CHUNK_CHOICES = [f"chunks of {n}" for n in sorted({*CHUNKS["cpu"], *CHUNKS["cuda"]})]
SAMPLING = [OTHER_FORMAT, "fused attention", "compiled", ALLOCATOR, *CHUNK_CHOICES]


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--what", nargs="+", choices=TABLES, default=[*TABLES], help="the tables to make")
    flag("--precisions", nargs="+", choices=PRECISIONS, help="default: fp32, and bf16 where the device has it")
    flag(
        "--undo",
        nargs="+",
        choices=sorted({*GAN, *CGAN, *DIFFUSION, *SAMPLING, ONE_STREAM}),
        help="undo these choices only (default: all)",
    )
    add_timing_flags(parser)
    flag("--data-dir", type=expanded_path, default=None, help=DATA_DIR_HELP)
    flag("--device", default="auto", help=CUDA_DEVICE_HELP)
    parser.set_defaults(steps=5, repeats=3)
    args = parser.parse_args(argv)
    args.data_dir = args.data_dir or data.default_data_dir()

    device = choose_device(args.device, apple=False)
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
    """The choices that have a meaning on the device."""
    sizes = {*CHUNKS["cpu"], *CHUNKS["cuda"]} - {*CHUNKS[device.type]}
    elsewhere = {ALLOCATOR if device.type == "cuda" else NO_GRAPH, *(f"chunks of {n}" for n in sizes)}
    return [choice for choice in choices if choice not in elsewhere]


def sized(args: argparse.Namespace, what: str, device: torch.device) -> argparse.Namespace:
    """The arguments, with the number of images in a step of that table."""
    batch_size = SAMPLED[device.type] if what in ("sampling", "call") else args.batch_size
    return argparse.Namespace(**vars(args) | {"batch_size": batch_size})


def time_pair(args: argparse.Namespace, what: str, precision: str, choice: str) -> dict[str, Timed]:
    """Time the loop as it is and the changed one."""
    return measure(args, {name: LoopApart(loop, args, what, precision, name) for name in (AS_IS, choice)})


def loop(args: argparse.Namespace, what: str, precision: str, choice: str) -> Iterator[None]:
    """A loop of the table `what`, with its trainer's allocator settings unless these are the choice to undo."""
    device = torch.device("cpu")
    if choice != ALLOCATOR:
        if what == "diffusion":
            ask_for_huge_pages()
        device = choose_device(args.device, apple=False)
    digits = data.load_digits("mnist", "train", args.data_dir, device)
    return TABLES[what][0](args, digits, precision, choice)


def gan_loop(args: argparse.Namespace, digits: data.Digits, precision: str, choice: str, classes: int = 0) -> Iterator[None]:
    """The trainer's step with its EMA and one choice undone. Each advance takes a step."""
    torch.manual_seed(0)
    script, name = (train_cgan, "cdcgan") if classes else (train_gan, "dcgan")
    trainer = script.parse_args([])
    state = TrainState()
    device = digits.images.device
    networks, optimizers, step = gan.assemble(trainer, state, device, precision, name, classes)
    generator: Any = networks["generator"]
    discriminator: Any = networks["discriminator"]
    if choice == "convolution as stem":
        generator.stem = ConvolutionStem(generator.config).to(device)
        optimizers["generator"] = torch.optim.Adam(
            generator.parameters(), lr=trainer.lr, betas=(trainer.beta1, 0.999), fused=True, capturable=device.type == "cuda"
        )
    elif choice == "Adam not fused":
        optimizers.update({name: unfused(optimizer) for name, optimizer in optimizers.items()})
        step.guard = OpenGuard(generator, discriminator)
    elif choice == "D's unused gradients computed":
        discriminator.requires_grad_ = lambda _: discriminator
    elif choice == "real and fake in two passes":
        step._judge = functools.partial(two_passes, discriminator)  # type: ignore[method-assign]  # the choice is undone
    for network in networks.values():
        change_network(network, choice)
    step.graph.active &= choice != NO_GRAPH
    yield from steps(args, digits, step, state, generator, choice)


def diffusion_loop(args: argparse.Namespace, digits: data.Digits, precision: str, choice: str) -> Iterator[None]:
    """The trainer's step with its EMA and one choice undone. Each advance takes a step."""
    torch.manual_seed(0)
    trainer = train_diffusion.parse_args([])
    state = TrainState()
    network, optimizers, step = ddpm.assemble(trainer, state, digits, precision)
    if choice == "Adam not fused":
        optimizers["others"] = unfused(optimizers["others"])
        step.guard = OpenGuard()
    elif choice == OTHER_BATCHES:
        together = digits.images.device.type != "cuda"
        muon._batches = functools.partial(swapped_batches, muon._batches, together)  # the choice is undone
    change_network(network, choice)
    step.graph.active &= choice != NO_GRAPH
    yield from steps(args, digits, step, state, network, choice)


def steps(
    args: argparse.Namespace,
    digits: data.Digits,
    step: Callable[[Tensor, Tensor], dict[str, Tensor]],
    state: TrainState,
    averaged: nn.Module,
    choice: str,
) -> Iterator[None]:
    """What both trainings do around their step."""
    ema = SlowEMA(averaged, 0.999) if choice == "EMA tensor by tensor" else EMA(averaged, 0.999)
    source: Iterable[tuple[Tensor, Tensor]] = batches(args, digits)
    if choice == "a DataLoader's batches":
        source = loader(args)
    for images, labels in source:
        losses = step(images.to(digits.images.device), labels.to(digits.images.device))
        state.count(losses, len(images))
        ema.after_step(state)
        if choice == "losses fetched in every step":
            state.mean_losses()
        yield


def sampling_loop(_args: argparse.Namespace, digits: data.Digits, precision: str, choice: str) -> Iterator[None]:
    """Each advance evaluates the network on `SAMPLED` images, in chunks."""
    device = digits.images.device
    chunk = int(choice.removeprefix("chunks of ")) if choice.startswith("chunks") else CHUNK_SIZE[device.type]
    network = our_network(device)
    change_network(network, choice)
    evaluations = evaluation_loop(network, device, precision, chunk)
    while True:
        for _ in range(SAMPLED[device.type] // chunk):
            next(evaluations)
        yield


def call_loop(_args: argparse.Namespace, digits: data.Digits, precision: str, choice: str) -> Iterator[None]:
    """Each advance is a call of the diffusion model's `sample` for `SAMPLED` images, with the default options."""
    device = digits.images.device
    network: Any = our_network(device)
    if choice == ONE_STREAM:
        models.SamplingNoise = OneStream  # type: ignore[misc]  # the choice is undone
    while True:
        network.sample(SAMPLED[device.type], precision=precision)
        yield


TABLES: dict[str, tuple[Callable[..., Iterator[None]], list[str]]] = {
    "gan": (gan_loop, GAN),
    "cgan": (functools.partial(gan_loop, classes=data.NUM_CLASSES), CGAN),
    "diffusion": (diffusion_loop, DIFFUSION),
    "sampling": (sampling_loop, SAMPLING),
    "call": (call_loop, [ONE_STREAM]),
}


# --------------------------------------------------------------------------------------------------------------------
# Choices undone


def change_network(network: nn.Module, choice: str) -> None:
    """Undo a choice that belongs to the network. Another choice changes nothing."""
    if choice == "compiled":
        network.compile()
    elif choice == OTHER_FORMAT:
        convolutions = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
        if all(convolution.weight.is_contiguous() for convolution in convolutions):
            network.to(memory_format=torch.channels_last)
            return
        network.to(memory_format=torch.contiguous_format)
        for convolution in convolutions:
            convolution.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    elif choice in FORWARD:
        kind, forward = FORWARD[choice]
        for module in network.modules():
            if isinstance(module, kind):
                module.forward = types.MethodType(forward, module)


def fused_attention(self: Attention, x: Tensor, _condition: Tensor) -> Tensor:
    """`Attention.forward` with PyTorch's fused kernel."""
    tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
    q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, HW, C / heads]
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, HW, C]
    return x + self.out(mixed).transpose(1, 2).unflatten(2, x.shape[2:])


def gains_in_fp32(self: ClassBatchNorm2d, x: Tensor, labels: Tensor) -> Tensor:
    """`ClassBatchNorm2d.forward` with gains and biases in the type that they are stored in."""
    return self.norm(x) * self.gain(labels)[:, :, None, None] + self.bias(labels)[:, :, None, None]


FORWARD: dict[str, tuple[type[nn.Module], Callable[..., Tensor]]] = {
    "fused attention": (Attention, fused_attention),
    "class gains in fp32": (ClassBatchNorm2d, gains_in_fp32),
}


class OneStream(SamplingNoise):
    """All images' noise from one generator: an image depends on how many there are."""

    def __init__(self, key: int, purpose: str, images: range, device: torch.device | str):
        self.device = device
        self.images = images
        self.generator = keyed_generator(device, key, purpose)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(len(self.images), *shape, generator=self.generator, device=self.device)


class ConvolutionStem(nn.Module):
    """The generator's first layer as the paper's transposed convolution: latent [B, Z] -> [B, 7 * 7 * 4w]."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.convolution = nn.ConvTranspose2d(config.latent_dim, 4 * config.width, 7)
        nn.init.normal_(self.convolution.weight, std=math.sqrt(2 / config.latent_dim))

    def forward(self, z: Tensor) -> Tensor:
        return self.convolution(z[:, :, None, None]).permute(0, 2, 3, 1).flatten(1)


def two_passes(discriminator: nn.Module, real: Tensor, fake: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`GANStep._judge` with a pass for each side."""
    return discriminator(real, labels), discriminator(fake, labels)


def swapped_batches(batches: Callable[..., Any], swapped: bool, matrices: list[Tensor], together: bool) -> Any:
    """`muon._batches` with `swapped` in place of `together`."""
    return batches(matrices, together=swapped)


def unfused(fused: torch.optim.Optimizer) -> torch.optim.Adam:
    """PyTorch's default implementation of Adam, for the same parameters with the same settings."""
    (group,) = fused.param_groups
    return torch.optim.Adam(group["params"], lr=group["lr"], betas=group["betas"], capturable=group["capturable"])


class OpenGuard(Guard):
    """A guard that holds back only Muon. It lets every step of Adam pass: without `fused`, Adam cannot be held back."""

    def step(self, loss: Tensor, norm: Tensor, *optimizers: torch.optim.Optimizer) -> Tensor:
        guarded = [optimizer for optimizer in optimizers if isinstance(optimizer, Muon)]
        for optimizer in optimizers:
            if optimizer not in guarded:
                optimizer.step()
        return super().step(loss, norm, *guarded)


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
