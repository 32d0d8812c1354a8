"""Quality after the same time in other repositories: diffusion models of like size, trained for the same minutes.

The peers are ours, Hugging Face diffusers' UNet2DModel and denoising-diffusion-pytorch's Unet. All are unconditional. They
have the same FLOPs and nearly as many parameters, and see the same batches of MNIST. Each has the recipe of its own
repository: schedule, prediction, optimizer, learning rate, average.

Then each draws samples with the same number of steps of DDIM, and of DPM-Solver++ if it has that. The samples are scored by
the monitor's scorer, against the training set. The clock covers the training steps and the sampling alone.

Their recipes are made for longer trainings; --peer-lr gives them another learning rate. The results are written to --out. A
picture beside it shows 64 samples of each row. GANs are compared in train_step.py.

    pip install -r benchmarks/requirements-peers.txt
    python benchmarks/peers.py --minutes 20
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from diffusion_step import their_network
from timing import precisions, size_of, wait_for_device
from torch import Tensor, nn
from torch.nn import functional as F

import data
import train_diffusion
from callbacks import EMA, ScheduledLR
from cli import CUDA_DEVICE_HELP, DATA_DIR_HELP, ArgumentParser, expanded_path, integer, number, run_script
from diffusion.options import PRECISIONS
from figures.images import image_grid, write_png
from files import check_outputs, expanded, write_csv
from loop import TrainState
from models import CHUNK_SIZE, build
from recipes.ddpm import DiffusionStep, StableTargets, make_optimizers
from scoring.extractor import Extractor
from scoring.reference import FLOOR_SIZES, load_reference
from scoring.scorer import Scorer
from utils import ask_for_huge_pages, autocast, choose_device, keyed_generator

CHUNK = CHUNK_SIZE["cpu"]  # samples at a time, in all of them
# Steps of a trial. The first ones warm up, and a GPU records its graphs in them.
UNTIMED_STEPS = 10
TIMED_STEPS = 30


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--peers", nargs="+", choices=PEERS, default=[*PEERS], help="the repositories to compare")
    flag("--precisions", nargs="+", choices=PRECISIONS, help="of ours (default: fp32, and bf16 where the device has it)")
    flag("--minutes", type=number("(0, inf)"), default=20.0, help="of training for each")
    flag("--batch-size", type=integer(1), default=128, help="images in a step")
    flag("--ddim-steps", type=integer(1), default=50, help="network evaluations of a sample by DDIM")
    flag("--dpm-solver-steps", type=integer(1), default=15, help="network evaluations of a sample by DPM-Solver++")
    flag("--n", type=int, choices=FLOOR_SIZES, default=2000, help="samples to score: a size whose floor is known")
    flag("--peer-lr", type=number("(0, inf)"), default=1e-4, help="learning rate of the others; 1e-4 is their own")
    flag("--data-dir", type=expanded_path, default=None, help=DATA_DIR_HELP)
    flag("--device", default="auto", help=CUDA_DEVICE_HELP)
    flag("--out", type=expanded, default=Path("runs/peers.csv"), help="the table to write")
    args = parser.parse_args(argv)
    check_outputs(("--out", args.out, (".csv",)))

    ask_for_huge_pages()
    device = choose_device(args.device, apple=False)
    digits = data.load_digits("mnist", "train", args.data_dir or data.default_data_dir(), device)
    extractor = Extractor(device)
    scorer = Scorer(extractor, load_reference("train", extractor), args.n, seed=0)
    rows: list[dict[str, Any]] = []
    for name in args.peers:
        for precision in (args.precisions or precisions(device)) if name == "ours" else ["fp32"]:
            for figures, images in measure(args, PEERS[name], precision, digits, scorer):
                row = {"peer": name, "precision": precision, **figures}
                rows.append(row)
                picture = args.out.with_name(f"{args.out.stem}_{name}_{precision}_{figures['sampler']}.png")
                write_png(picture, image_grid(data.to_uint8(images[:64])))
                cells = (
                    f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
                )
                print("  ".join(cells), flush=True)
                write_csv(args.out, rows)
    print(f"wrote {args.out}")


class Peer(NamedTuple):
    """A model in training. `step` takes images [B, 1, 28, 28] in [-1, 1]. A sampler (n, steps, rng) gives n images."""

    network: nn.Module  # called with images, times and labels, to count its FLOPs
    step: Callable[[Tensor], None]
    samplers: dict[str, Callable[[int, int, torch.Generator], Tensor]]


class Drawn(nn.Module):
    """A generator that returns samples which are drawn already. The scorer takes it for a model."""

    def __init__(self, images: Tensor):
        super().__init__()
        self.images = images

    def sample(self, n: int, labels: None, rng: torch.Generator) -> Tensor:
        return self.images[:n]


def measure(
    args: argparse.Namespace, make: Callable[..., Peer], precision: str, digits: data.Digits, scorer: Scorer
) -> Iterator[tuple[dict[str, str | int | float], Tensor]]:
    """Train a peer, and give the figures and the samples of each of its samplers.

    A short trial comes first. It tells how many steps fit into the minutes.
    """
    seconds, _ = train(args, make, precision, digits, UNTIMED_STEPS + TIMED_STEPS, UNTIMED_STEPS)
    steps = max(1, round(TIMED_STEPS / seconds * 60 * args.minutes))
    seconds, peer = train(args, make, precision, digits, steps)
    parameters, gflop = size_of(peer.network, digits.images.device)
    for sampler, evaluations in (("ddim", args.ddim_steps), ("dpm-solver++", args.dpm_solver_steps)):
        if sampler not in peer.samplers:
            continue
        start = time.perf_counter()
        images = peer.samplers[sampler](args.n, evaluations, keyed_generator("cpu", "peers")).cpu()
        rate = args.n * evaluations / (time.perf_counter() - start)
        scores = scorer(Drawn(images))
        figures: dict[str, str | int | float] = {
            "parameters_m": parameters,
            "gflop": gflop,
            "minutes": seconds / 60,
            "training_steps": steps,
            "images_per_second": steps * args.batch_size / seconds,
            "n": args.n,
            "sampler": sampler,
            "evaluations": evaluations,
            "evaluations_per_second": rate,
        }
        yield figures | {name: scores[name] for name in ("fid", "fid_ratio", "is")}, images


def train(
    args: argparse.Namespace,
    make: Callable[..., Peer],
    precision: str,
    digits: data.Digits,
    steps: int,
    untimed: int = 0,
) -> tuple[float, Peer]:
    """Train a new model for so many steps, the first of them untimed. Returns the seconds and the model."""
    torch.manual_seed(0)
    peer = make(args, digits, steps, precision)
    batches = (batch for epoch in itertools.count() for batch in data.epoch_batches(digits, args.batch_size, 0, epoch))
    for done, (images, _) in enumerate(itertools.islice(batches, steps)):
        if done == untimed:
            wait_for_device()
            start = time.perf_counter()
        peer.step(images)
    wait_for_device()
    return time.perf_counter() - start, peer


# --------------------------------------------------------------------------------------------------------------------
# The peers


class UnconditionalTargets(StableTargets):
    """Stable targets of a model without classes: every digit is possible."""

    def __call__(self, x: Tensor, x0: Tensor, labels: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return super().__call__(x, x0, torch.full_like(labels, data.NUM_CLASSES), alpha, sigma)


def ours(args: argparse.Namespace, digits: data.Digits, steps: int, precision: str) -> Peer:
    """The flags of train_diffusion.py --preset cpu, without classes, at the common batch size."""
    trainer = train_diffusion.parse_args(["--preset", "cpu"])
    state = TrainState()
    options = {name: getattr(trainer, name) for name in ("width", "schedule", "prediction", "black")}
    model = build("ddpm", num_classes=0, **options)
    model.to(digits.images.device)
    optimizers = make_optimizers(model, trainer.lr, trainer.muon_lr, precision)
    ema = EMA(model, trainer.ema_decay)
    update = DiffusionStep(
        model,
        optimizers,
        state,
        0,
        precision,
        grad_clip=trainer.grad_clip,
        label_dropout=0.0,
        time_power=trainer.time_power,
        stable_targets=UnconditionalTargets(model, digits, trainer.stable_targets),
    )
    schedule = ScheduledLR([*optimizers.values()], min(trainer.warmup_steps, steps // 10), steps)
    schedule.on_start(state)

    def step(images: Tensor) -> None:
        labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        state.count(update(images, labels), len(images))
        ema.after_step(state)
        schedule.after_step(state)

    def sample(sampler: str, n: int, steps: int, rng: torch.Generator) -> Tensor:
        averaged: Any = ema.model
        return averaged.sample(n, rng=rng, sampler=sampler, steps=steps, precision=precision, chunk_size=CHUNK)

    return Peer(model, step, {sampler: functools.partial(sample, sampler) for sampler in ("ddim", "dpm-solver++")})


def diffusers(args: argparse.Namespace, digits: data.Digits, steps: int, precision: str) -> Peer:
    """Their example of unconditional training: linear schedule, noise prediction, AdamW with a warm-up and a cosine.

    Sampling starts at the last time and follows clipped estimates of x0, as ours and the other peer's does. For DDIM, the
    noise is the one that the clipped estimate implies. With the defaults of their schedulers, a network that is not trained
    to the end looks far worse.
    """
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel

    device = digits.images.device
    network = their_network(device, classes=None)
    noising: Any = DDPMScheduler(num_train_timesteps=1000)
    ddim = DDIMScheduler(timestep_spacing="trailing")
    dpm_solver = DPMSolverMultistepScheduler(timestep_spacing="trailing", thresholding=True)  # at 1: clipping
    ema = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.peer_lr, betas=(0.95, 0.999), weight_decay=1e-6)
    rates = get_cosine_schedule_with_warmup(optimizer, min(500, steps // 10), steps)

    def step(images: Tensor) -> None:
        noise = torch.randn_like(images)
        times = torch.randint(0, 1000, (len(images),), device=device)
        with autocast(device, precision):
            loss = F.mse_loss(network(noising.add_noise(images, noise, times), times).sample.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        ema.step(network.parameters())

    @torch.no_grad()
    def sample(scheduler: Any, options: dict[str, bool], n: int, steps: int, rng: torch.Generator) -> Tensor:
        ema.copy_to(network.parameters())
        network.eval()
        parts = []
        for x in torch.randn(n, 1, 28, 28, generator=rng).to(device).split(CHUNK):
            scheduler.set_timesteps(steps)  # this also clears the estimates of the last chunk
            for t in scheduler.timesteps:
                with autocast(device, precision):
                    noise = network(x, t).sample.float()
                x = scheduler.step(noise, t, x, **options).prev_sample
            parts.append(x)
        return torch.cat(parts)

    samplers: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
        "ddim": functools.partial(sample, ddim, {"use_clipped_model_output": True}),
        "dpm-solver++": functools.partial(sample, dpm_solver, {}),
    }
    return Peer(TwoInputs(network), step, samplers)


def denoising_diffusion_pytorch(args: argparse.Namespace, digits: data.Digits, steps: int, precision: str) -> Peer:
    """The update of their Trainer: sigmoid schedule, v prediction, Adam at a constant rate, an average every ten steps."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA as TheirEMA

    device = digits.images.device
    network = Unet(dim=12, dim_mults=(1, 3, 13), channels=1)
    model = GaussianDiffusion(network, image_size=28).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.peer_lr, betas=(0.9, 0.99))
    ema = TheirEMA(model, beta=0.995, update_every=10)

    def step(images: Tensor) -> None:
        with autocast(device, precision):
            loss = model((images + 1) / 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    def sample(n: int, steps: int, rng: torch.Generator) -> Tensor:
        torch.manual_seed(0)  # their sampler draws from the global generator
        averaged = ema.ema_model.eval()
        averaged.sampling_timesteps = steps
        averaged.is_ddim_sampling = True
        with autocast(device, precision):
            parts = [averaged.sample(min(CHUNK, n - done)) for done in range(0, n, CHUNK)]
        return torch.cat(parts).float() * 2 - 1

    return Peer(TwoInputs(network), step, {"ddim": sample})


class TwoInputs(nn.Module):
    """Lets a network without labels be called with image, time and labels."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        return self.network(x, time)


PEERS: dict[str, Callable[..., Peer]] = {
    "ours": ours,
    "diffusers": diffusers,
    "denoising-diffusion-pytorch": denoising_diffusion_pytorch,
}


if __name__ == "__main__":
    run_script(main)
