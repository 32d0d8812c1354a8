"""What does the same time give in other repositories? Diffusion models of like size, trained for the same minutes.

Ours, Hugging Face diffusers' UNet2DModel and denoising-diffusion-pytorch's Unet, of the same FLOPs and nearly as many
parameters, all unconditional, on the same batches of MNIST, each with the recipe that its repository trains by: schedule,
prediction, optimizer, learning rate, average. Then each draws samples with the same number of steps of DDIM, and of
DPM-Solver++ if it has that. They are scored as ours are, against the training set; 64 of them are drawn beside the table.
Timed are the steps alone, and the sampling. Their recipes are made for longer trainings: --peer-lr gives them another
learning rate. GANs are compared in train_step.py.

    pip install -r benchmarks/requirements-peers.txt
    python benchmarks/peers.py --minutes 20
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from diffusion_step import their_network
from timing import precisions, size_of, wait_for_device
from torch import Tensor, nn
from torch.nn import functional as F

import data
import flags
import plots
import train_diffusion
from callbacks import EMA, ScheduledLR
from denoising import DiffusionStep, StableTargets, make_optimizers
from evaluation import FLOOR_SIZES, Extractor, Scorer, load_reference
from models import CHUNK_SIZE, build
from training import TrainState
from utils import ask_for_huge_pages, autocast, choose_device, keyed_generator, run_script, write_csv

CHUNK = CHUNK_SIZE["cpu"]  # samples at a time, in all of them
UNTIMED_STEPS, TIMED_STEPS = 10, 30  # of a trial: the former warm up, and a GPU records what it replays later


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--peers", nargs="+", choices=PEERS, default=[*PEERS], help="whom to compare")
    flag("--precisions", nargs="+", choices=("fp32", "bf16"), help="of ours (default: fp32, and bf16 where it is fast)")
    flag("--minutes", type=flags.positive_float, default=20.0, help="of training for each")
    flag("--batch-size", type=flags.positive_int, default=128, help="images in a step")
    flag("--ddim-steps", type=flags.positive_int, default=50, help="network evaluations of a sample by DDIM")
    flag("--dpm-solver-steps", type=flags.positive_int, default=15, help="the same by DPM-Solver++")
    flag("--n", type=int, choices=FLOOR_SIZES, default=2000, help="samples to score: a size whose floor is known")
    flag("--peer-lr", type=flags.positive_float, default=1e-4, help="learning rate of the others; 1e-4 is their own")
    flag("--data-dir", default=None, help="where MNIST/raw lies (default: $MNIST_DIR, else data)")
    flag("--device", default="auto", help="auto, cpu, cuda, ...")
    flag("--out", type=Path, default=Path("runs/peers.csv"), help="the table to write")
    args = parser.parse_args()

    ask_for_huge_pages()
    device = choose_device(args.device)
    digits = data.load_digits("mnist", "train", args.data_dir or data.default_data_dir(), device)
    extractor, rows = Extractor(device), []
    scorer = Scorer(extractor, load_reference("train", extractor), args.n, seed=0)
    for name in args.peers:
        for precision in (args.precisions or precisions(device)) if name == "ours" else ["fp32"]:
            for figures, images in measure(args, PEERS[name], precision, digits, scorer):
                rows.append({"peer": name, "precision": precision, **figures})
                picture = plots.image_grid(data.to_uint8(images[:64]))
                plots.write_png(args.out.with_name(f"{args.out.stem}_{name}_{precision}_{figures['sampler']}.png"), picture)
                print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                                for key, value in rows[-1].items()), flush=True)  # fmt: skip
                write_csv(args.out, rows)
    print(f"wrote {args.out}")


class Peer(NamedTuple):
    """A model in training. `step` takes images [B, 1, 28, 28] in [-1, 1]; a sampler (n, steps, rng) gives n of them."""

    network: nn.Module  # called with images, times and labels, to count its FLOPs
    step: Callable[[Tensor], None]
    samplers: dict[str, Callable[[int, int, torch.Generator], Tensor]]


class Drawn(nn.Module):
    """A generator of the given samples, for the scorer."""

    def __init__(self, images: Tensor):
        super().__init__()
        self.images = images

    def sample(self, n: int, labels: None, rng: torch.Generator) -> Tensor:
        return self.images[:n]


def measure(
    args, make: Callable[..., Peer], precision: str, digits: data.Digits, scorer: Scorer
) -> Iterator[tuple[dict[str, str | int | float], Tensor]]:
    """Train one, after a short trial that tells how many steps fit into the time; figures and samples of each sampler."""
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
        figures = scorer(Drawn(images))
        yield {"parameters_m": parameters, "gflop": gflop, "minutes": seconds / 60, "training_steps": steps,
               "images_per_second": steps * args.batch_size / seconds, "n": args.n, "sampler": sampler,
               "evaluations": evaluations, "evaluations_per_second": rate,
               **{name: figures[name] for name in ("fid", "fid_ratio", "is")}}, images  # fmt: skip


def train(
    args, make: Callable[..., Peer], precision: str, digits: data.Digits, steps: int, untimed: int = 0
) -> tuple[float, Peer]:
    """(seconds, the model) after so many steps from the beginning, of which the first may be untimed."""
    torch.manual_seed(0)
    peer = make(args, digits, steps, precision)
    batches = (batch for epoch in itertools.count() for batch in data.epoch_batches(digits, args.batch_size, 0, epoch))
    for number, (images, _) in enumerate(itertools.islice(batches, steps)):
        if number == untimed:
            wait_for_device()
            start = time.perf_counter()
        peer.step(images)
    wait_for_device()
    return time.perf_counter() - start, peer


def ours(args, digits: data.Digits, steps: int, precision: str) -> Peer:
    """The defaults of train_diffusion.py, without classes, at the batch size of all."""
    flags, state = train_diffusion.parse_args([]), TrainState()
    model = build("ddpm", num_classes=0, width=flags.width, schedule=flags.schedule, prediction=flags.prediction)
    model.to(digits.images.device)
    optimizers, ema = make_optimizers(model, flags.lr, flags.muon_lr, precision), EMA(model, flags.ema_decay)
    targets = StableTargets(digits, flags.stable_targets)

    def any_digit(x: Tensor, x0: Tensor, labels: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return targets(x, x0, torch.full_like(labels, data.NUM_CLASSES), alpha, sigma)

    update = DiffusionStep(model, optimizers, state, 0, precision, flags.grad_clip, 0.0, flags.time_power, any_digit)
    schedule = ScheduledLR([*optimizers.values()], min(flags.warmup_steps, steps // 10), steps)
    schedule.on_start(state)

    def step(images: Tensor) -> None:
        state.count(update(images, torch.zeros(len(images), dtype=torch.int64, device=images.device)), len(images))
        ema.after_step(state)
        schedule.after_step(state)

    def sample(sampler: str, n: int, steps: int, rng: torch.Generator) -> Tensor:
        return ema.model.sample(n, rng=rng, sampler=sampler, steps=steps, precision=precision, chunk_size=CHUNK)

    return Peer(model, step, {sampler: functools.partial(sample, sampler) for sampler in ("ddim", "dpm-solver++")})


def diffusers(args, digits: data.Digits, steps: int, precision: str) -> Peer:
    """Their example of unconditional training: linear schedule, noise prediction, AdamW with a warm-up and a cosine.

    Sampling starts at the last time and goes by clipped estimates of x0 (DDIM: and the noise that they imply), as ours and
    the other peer's does; by the defaults of their schedulers, a network that is not trained to the end looks far worse.
    """
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel

    device = digits.images.device
    network = their_network(device, classes=None)
    noising = DDPMScheduler(num_train_timesteps=1000)
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
    def sample(scheduler, options: dict[str, bool], n: int, steps: int, rng: torch.Generator) -> Tensor:
        ema.copy_to(network.parameters())
        network.eval()
        parts = []
        for x in torch.randn(n, 1, 28, 28, generator=rng).to(device).split(CHUNK):
            scheduler.set_timesteps(steps)  # and forget the estimates of the last chunk
            for t in scheduler.timesteps:
                with autocast(device, precision):
                    noise = network(x, t).sample.float()
                x = scheduler.step(noise, t, x, **options).prev_sample
            parts.append(x)
        return torch.cat(parts)

    samplers = {
        "ddim": functools.partial(sample, ddim, {"use_clipped_model_output": True}),
        "dpm-solver++": functools.partial(sample, dpm_solver, {}),
    }
    return Peer(TwoInputs(network), step, samplers)


def denoising_diffusion_pytorch(args, digits: data.Digits, steps: int, precision: str) -> Peer:
    """Their Trainer's update: sigmoid schedule, v prediction, Adam at a constant rate, an average every ten steps."""
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
        torch.manual_seed(0)  # they draw from the global generator
        drawer = ema.ema_model.eval()
        drawer.sampling_timesteps, drawer.is_ddim_sampling = steps, True
        with autocast(device, precision):
            parts = [drawer.sample(min(CHUNK, n - done)) for done in range(0, n, CHUNK)]
        return torch.cat(parts).float() * 2 - 1

    return Peer(TwoInputs(network), step, {"ddim": sample})


class TwoInputs(nn.Module):
    """A network that takes no labels, as one that is called with some."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        return self.network(x, time)


PEERS = {"ours": ours, "diffusers": diffusers, "denoising-diffusion-pytorch": denoising_diffusion_pytorch}


if __name__ == "__main__":
    run_script(main)
