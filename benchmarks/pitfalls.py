"""What known mistakes do to the figures: each mistake is made on purpose, with the shipped models and with real digits.

Studies of this size have reported diffusion models behind GANs, FIDs of 47 and 78, and inception scores below 2. These
mistakes lead to such results:

- sampling with another noise schedule than in training;
- an average of the weights that leaves out BatchNorm's statistics;
- pixels in another range than the metric expects;
- few samples, without a floor to compare with.

Each row stands beside the same model without the mistake. All are scored by the monitor's scorer, against the training set.
The results are written to reports/pitfalls.csv.

    python benchmarks/pitfalls.py
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
from checkpoint import file_sha256, load_generator
from cli import CUDA_DEVICE_HELP, DATA_DIR_HELP, ArgumentParser, expanded_path, integer, run_script
from diffusion import process, samplers
from diffusion.options import PRECISIONS
from files import ExpectedError, check_outputs, expanded, find_default, write_csv
from models import DDPM
from networks.checks import evaluating
from scoring.extractor import Extractor
from scoring.reference import FLOOR_SIZES
from scoring.scorer import training_scorer
from utils import autocast, choose_device

CHUNK = 125  # images at a time; the noise of the steps depends on it, and so do the figures
FIGURES = ("fid", "fid_ratio", "is", "label_accuracy")


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--gan", type=expanded_path, default=None, help="a DCGAN's checkpoint (default: the shipped one)")
    flag(
        "--diffusion",
        type=expanded_path,
        default=None,
        help="a diffusion model's checkpoint (default: the shipped one)",
    )
    flag("--n", type=int, choices=FLOOR_SIZES, default=10_000, help="GAN samples and real digits in a scoring")
    flag("--diffusion-n", type=int, choices=FLOOR_SIZES, default=500, help="diffusion samples in a scoring")
    flag(
        "--steps",
        type=integer(1),
        default=200,
        help="steps of ancestral sampling; a schedule of so many timesteps is one of the mistakes",
    )
    flag("--data-dir", type=expanded_path, default=None, help=DATA_DIR_HELP)
    flag("--device", default="auto", help=CUDA_DEVICE_HELP)
    flag("--precision", choices=PRECISIONS, default="fp32", help="of the diffusion model's evaluations")
    flag("--out", type=expanded, default=Path("reports/pitfalls.csv"), help="the table to write")
    args = parser.parse_args(argv)
    check_outputs(("--out", args.out, (".csv",)))
    args.gan = args.gan or find_default("checkpoints/best_GAN_G.pt")
    args.diffusion = args.diffusion or find_default("checkpoints/best_DIFF.pt")

    device = choose_device(args.device, apple=False)
    gan = load_generator(args.gan, device)
    ddpm = load_generator(args.diffusion, device)
    is_gan = not gan.SAMPLE_OPTIONS and not gan.config.num_classes
    is_ddpm = "sampler" in ddpm.SAMPLE_OPTIONS and ddpm.config.num_classes == data.NUM_CLASSES
    if not (is_gan and is_ddpm):
        raise ExpectedError("--gan wants the checkpoint of an unconditional GAN, --diffusion that of a DDPM of ten classes")
    if args.steps > ddpm.config.timesteps:
        raise ExpectedError(f"--steps {args.steps} is more than the model's {ddpm.config.timesteps} timesteps")
    data_dir = args.data_dir or data.default_data_dir()
    train, test = (data.load_digits("mnist", split, data_dir, device) for split in ("train", "test"))
    extractor = Extractor(device)
    origin = {"DCGAN": file_sha256(args.gan)[:16], "DDPM": file_sha256(args.diffusion)[:16]}
    rows: list[dict[str, Any]] = []
    for model, mistake, n, sample in cases(args, gan, ddpm, test):
        scorer = training_scorer(train, extractor, n, 0, conditional=model == "DDPM")
        scores = scorer(Samples(sample))
        figures = {name: scores[name] for name in FIGURES if name in scores}
        rows.append({"model": model, "mistake": mistake, "n": n, **figures, "checkpoint": origin.get(model, "")})
        cells = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(f"{model:12s} {mistake:60s} n {n:6d}   {cells}")
    write_csv(args.out, rows)
    print(f"wrote {args.out}")


Sample = Callable[..., Tensor]  # (n, labels, rng) -> images, as a generator's `sample`


class Samples(nn.Module):
    """A generator whose `sample` is the given function."""

    def __init__(self, sample: Sample):
        super().__init__()
        self.sample = sample


def cases(args: argparse.Namespace, gan: Any, ddpm: DDPM, test: data.Digits) -> Iterator[tuple[str, str, int, Sample]]:
    """(model, mistake, n, how it is sampled). Each model's first row is without a mistake."""

    def real(n: int, labels: None, rng: torch.Generator) -> Tensor:
        return data.to_model_range(test.images[torch.randperm(len(test), generator=rng)[:n]])

    for name, sample in (("real digits", real), ("DCGAN", gan.sample)):
        yield name, "", args.n, sample
        yield name, "pixels in [0, 1], cut to integers", args.n, in_unit_range(sample)
        yield name, "pixels in [-1, 1], read as [0, 1]", args.n, in_symmetric_range(sample)
    yield "DCGAN", "average of the parameters alone: BatchNorm's mean 0, variance 1", args.n, without_statistics(gan).sample
    for n in reversed(FLOOR_SIZES):
        if n < args.n:
            yield "DCGAN", "fewer samples", n, gan.sample
    steps = args.steps
    schedule = ddpm.config.schedule
    timesteps = ddpm.config.timesteps
    other = next(name for name in process.SCHEDULES if name != schedule)
    grids = {
        "": samplers.time_grid(ddpm.levels, steps),
        f"sampled as if trained with {steps} timesteps": samplers.time_grid(process.noise_levels(schedule, steps), steps),
        f"pure noise taken for time {steps} of {timesteps}": [*reversed(ddpm.levels[:steps]), process.CLEAN],
        f"{other} schedule at sampling": samplers.time_grid(process.noise_levels(other, timesteps), steps),
    }
    for mistake, grid in grids.items():
        yield "DDPM", mistake, args.diffusion_n, ancestral(ddpm, grid, args.precision)


def in_unit_range(sample: Sample) -> Sample:
    """Pixels in [0, 1], cut to integers, where the metric expects 0..255. The whitest pixels become 1, all others 0."""
    return lambda n, labels, rng: ((sample(n, labels, rng) + 1) / 2).floor() / 127.5 - 1


def in_symmetric_range(sample: Sample) -> Sample:
    """Pixels in [-1, 1], read as [0, 1]. Everything below the middle becomes black."""
    return lambda n, labels, rng: sample(n, labels, rng).clamp(0, 1) * 2 - 1


def without_statistics(gan: Any) -> Any:
    """A copy whose BatchNorm statistics have their initial values, as if only the parameters had been averaged."""
    blind = copy.deepcopy(gan)
    for module in blind.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return blind


def ancestral(ddpm: DDPM, grid: list[process.Level], precision: str) -> Sample:
    """Ancestral sampling along `grid`. Its levels and times need not be those of the training."""

    def sample(n: int, labels: Tensor, rng: torch.Generator) -> Tensor:
        noise = torch.randn(n, 1, 28, 28, generator=rng)
        parts = []
        with (
            evaluating(ddpm) as device,
            autocast(device, precision),
            torch.no_grad(),
            tqdm(total=n * (len(grid) - 1), unit="eval", leave=False, disable=None) as bar,
        ):
            step_rng = torch.Generator(device).manual_seed(0)
            for x, classes in zip(noise.split(CHUNK), labels.to(device).split(CHUNK)):

                def denoise(x: Tensor, level: process.Level, classes: Tensor = classes) -> Tensor:
                    bar.update(len(x))
                    return ddpm.denoise(x, level, classes)

                def normal(x: Tensor = x) -> Tensor:
                    return torch.randn(x.shape, generator=step_rng, device=device)

                parts.append(samplers.ddpm(denoise, x.to(device), grid, normal))
        return torch.cat(parts)

    return sample


if __name__ == "__main__":
    run_script(main)
