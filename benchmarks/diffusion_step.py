"""How fast is a diffusion training step, and an evaluation in sampling? Ours against Hugging Face diffusers' UNet2DModel of
like size.

Both networks have 28x28, 14x14 and 7x7 pixels, attention at 7x7, a class embedding, and parameters and FLOPs that differ by
1 % (printed; theirs takes odd widths to match). Theirs is trained as their unconditional example does: noise by
DDPMScheduler, mean squared error, gradient clip, AdamW, EMAModel. Ours: `DiffusionStep` as train_diffusion.py assembles it,
with its EMA; without stable targets, which are work that theirs has none of; and without Muon, as theirs. Both get the same
tensor-resident batches. An evaluation in sampling is one of the network alone, without gradients, of as many images as our
sampler gives it. The training loops run in turn, each in a process of its own, theirs also as it comes, without our
allocator settings; then the evaluations, in turn in one process. Needs requirements-dev.txt.

    python benchmarks/diffusion_step.py
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from timing import LIKE_OURS, Loop, LoopApart, add_timing_flags, measure, precisions, report, size_of
from torch.nn import functional as F

import data
import denoising
import flags
import train_diffusion
from callbacks import EMA
from models import CHUNK_SIZE, build
from training import TrainState
from utils import ask_for_huge_pages, autocast, choose_device, run_script

OURS = {  # flags of the trainer
    "ours": [],
    "ours without stable targets": ["--stable-targets", "0"],
    "ours with Adam alone, without stable targets": ["--stable-targets", "0", "--muon-lr", "0"],
}


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    add_timing_flags(parser.add_argument, flags.positive_int)
    parser.add_argument("--data-dir", default=None, help="where MNIST/raw lies (default: $MNIST_DIR, else data)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args()
    args.data_dir = args.data_dir or data.default_data_dir()

    device = our_settings(args)
    loops = {"diffusers, fp32": LoopApart(on_digits, their_loop, args, device, "fp32")} if device.type == "cpu" else {}
    for precision in precisions(device):
        loops[f"diffusers, {precision}{LIKE_OURS}"] = LoopApart(with_our_settings, their_loop, args, precision)
        for name, given in OURS.items():
            loops[f"{name}, {precision}"] = LoopApart(with_our_settings, our_loop, args, precision, given)
    timed = measure(args, loops)
    sampling = argparse.Namespace(**vars(args) | {"batch_size": CHUNK_SIZE[device.type]})
    evaluations = {
        f"{name}, {precision}": Loop(evaluation_loop(network(device), device, precision))
        for precision in precisions(device)
        for name, network in (("diffusers", their_network), ("ours", our_network))
    }
    evaluated = measure(sampling, evaluations)

    for name, network in (("ours", our_network(device)), ("diffusers", their_network(device))):
        parameters, gflop = size_of(network, device)
        print(f"{name}: {parameters:.3f} million parameters, {gflop:.3f} GFLOP forward")
    report(args, device, timed, "EMA, gradient clip and optimizer included")
    for precision in precisions(device):
        theirs = timed[f"diffusers, {precision}{LIKE_OURS}"].rate
        ratios = ", ".join(f"{name} {timed[f'{name}, {precision}'].rate / theirs:.2f}" for name in OURS)
        print(f"to diffusers with our allocator settings, {precision}: {ratios}")
    report(sampling, device, evaluated, "one evaluation in sampling")


def our_settings(args) -> torch.device:
    """Make the trainer's allocator settings."""
    ask_for_huge_pages()
    return choose_device(args.device)


def with_our_settings(loop, args, *others):
    return on_digits(loop, args, our_settings(args), *others)


def on_digits(loop, args, device, *others):
    return loop(args, data.load_digits("mnist", "train", args.data_dir, device), *others)


def batches(args, digits):
    """The same batches for both, epoch after epoch."""
    for epoch in itertools.count():
        yield from data.epoch_batches(digits, args.batch_size, 0, epoch)


def our_network(device):
    torch.manual_seed(0)
    return build("ddpm").to(device)


def their_network(device, classes: int | None = data.NUM_CLASSES + 1):
    """A UNet2DModel whose widths give our numbers of parameters and FLOPs; `classes` is None for one without labels."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=28, in_channels=1, out_channels=1, block_out_channels=(16, 24, 140), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=35, num_class_embeds=classes,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ).to(device)  # fmt: skip


def their_loop(args, digits, precision: str):
    """The update of diffusers' example of unconditional training; a step each time the iterator is advanced."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    device = digits.images.device
    network, scheduler = their_network(device), DDPMScheduler(num_train_timesteps=1000)
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


def our_loop(args, digits, precision: str, given: Sequence[str] = ()):
    """The update and EMA of train_diffusion.py with the `given` flags; a step each time the iterator is advanced."""
    torch.manual_seed(0)
    trainer, state = train_diffusion.parse_args([*given]), TrainState()
    network, _, step = denoising.assemble(trainer, state, digits, precision)
    ema = EMA(network, trainer.ema_decay)
    for images, labels in batches(args, digits):
        state.count(step(images, labels), len(images))
        ema.after_step(state)
        yield


def evaluation_loop(network, device, precision: str, n: int | None = None):
    """One evaluation of the network, of n images (by default our sampler's chunk), each time the iterator is advanced."""
    n = n or CHUNK_SIZE[device.type]
    x, time = torch.randn(n, 1, 28, 28, device=device), torch.full((n,), 500, device=device)
    labels = torch.arange(n, device=device) % data.NUM_CLASSES
    network.eval()
    while True:
        with torch.no_grad(), autocast(device, precision):
            network(x, time, labels)
        yield


if __name__ == "__main__":
    run_script(main)
