"""What known mistakes do to the figures: each is made on purpose, with the shipped models and with real digits.

Studies of this size have reported diffusion models behind GANs, FIDs of 47 and 78, and inception scores below 2. Here are
mistakes that lead there, beside the same model without them: a noise schedule at sampling that is not the one of the
training, an average of the weights that leaves BatchNorm's statistics out, pixels in another range than the metric reads,
too few samples without a floor. Scored as the monitor does, against the training set. Results go to reports/pitfalls.csv.

    python benchmarks/pitfalls.py
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import diffusion
import flags
from checkpoint import file_sha256, load_generator
from evaluation import FLOOR_SIZES, Extractor, training_scorer
from interface import evaluating
from utils import ExpectedError, autocast, choose_device, run_script, write_csv

CHUNK = 125  # images at a time; the noise of the steps, and so the figures, depend on it


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--gan", default="checkpoints/best_GAN_G.pt", help="checkpoint of a DCGAN")
    flag("--diffusion", default="checkpoints/best_DIFF.pt", help="checkpoint of a diffusion model")
    flag("--n", type=int, choices=FLOOR_SIZES, default=10_000, help="GAN samples and real digits in a scoring")
    flag("--diffusion-n", type=int, choices=FLOOR_SIZES, default=500, help="diffusion samples in a scoring")
    flag("--steps", type=flags.positive_int, default=200,
         help="steps of ancestral sampling; a schedule of so many timesteps is one of the mistakes")  # fmt: skip
    flag("--data-dir", default=None, help="where MNIST/raw lies (default: $MNIST_DIR, else data)")
    flag("--device", default="auto", help="auto, cpu, cuda, ...")
    flag("--precision", choices=("fp32", "bf16"), default="fp32", help="of the diffusion model's evaluations")
    flag("--out", type=Path, default=Path("reports/pitfalls.csv"), help="the table to write")
    args = parser.parse_args()

    device = choose_device(args.device)
    gan, ddpm = load_generator(args.gan, device), load_generator(args.diffusion, device)
    wrong = "sampler" not in ddpm.SAMPLE_OPTIONS or ddpm.config.num_classes != data.NUM_CLASSES
    if "sampler" in gan.SAMPLE_OPTIONS or gan.config.num_classes or wrong:
        raise ExpectedError("--gan wants the checkpoint of an unconditional GAN, --diffusion that of a DDPM of ten classes")
    if args.steps > ddpm.config.timesteps:
        raise ExpectedError(f"--steps {args.steps} is more than the model's {ddpm.config.timesteps} timesteps")
    train, test = (
        data.load_digits("mnist", split, args.data_dir or data.default_data_dir(), device) for split in ("train", "test")
    )
    extractor, rows = Extractor(device), []
    origin = {"DCGAN": file_sha256(args.gan)[:16], "DDPM": file_sha256(args.diffusion)[:16]}
    for model, mistake, n, sample in cases(args, gan, ddpm, test):
        scorer = training_scorer(train, extractor, n, 0, conditional=model == "DDPM")
        figures = scorer(Samples(sample))
        kept = {name: figures[name] for name in ("fid", "fid_ratio", "is", "label_accuracy") if name in figures}
        rows.append({"model": model, "mistake": mistake, "n": n, **kept, "checkpoint": origin.get(model, "")})
        print(f"{model:12s} {mistake:60s} n {n:6d}  ", "  ".join(f"{name} {value:.4g}" for name, value in kept.items()))
    write_csv(args.out, rows)
    print(f"wrote {args.out}")


Sample = Callable[[int, Tensor | None, torch.Generator], Tensor]  # (n, labels, rng) -> images, as a generator's `sample`


class Samples(nn.Module):
    """A generator whose `sample` is the given function."""

    def __init__(self, sample: Sample):
        super().__init__()
        self.sample = sample


def cases(args, gan: nn.Module, ddpm: nn.Module, test: data.Digits) -> Iterator[tuple[str, str, int, Sample]]:
    """(model, mistake, n, how it is sampled); no mistake comes first."""

    def real(n: int, labels: Tensor | None, rng: torch.Generator) -> Tensor:
        return data.to_model_range(test.images[torch.randperm(len(test), generator=rng)[:n]])

    for name, sample in (("real digits", real), ("DCGAN", gan.sample)):
        yield name, "", args.n, sample
        yield name, "pixels in [0, 1], cut to integers", args.n, in_unit_range(sample)
        yield name, "pixels in [-1, 1], read as [0, 1]", args.n, in_symmetric_range(sample)
    yield "DCGAN", "average of the parameters alone: BatchNorm's mean 0, variance 1", args.n, without_statistics(gan).sample
    for n in (n for n in reversed(FLOOR_SIZES) if n < args.n):
        yield "DCGAN", "fewer samples", n, gan.sample
    config, steps = ddpm.config, args.steps
    other = next(name for name in diffusion.SCHEDULES if name != config.schedule)
    grids = {
        "": diffusion.time_grid(ddpm.levels, steps),
        f"sampled as if trained with {steps} timesteps": diffusion.time_grid(
            diffusion.noise_levels(config.schedule, steps), steps
        ),
        f"pure noise taken for time {steps} of {config.timesteps}": [*reversed(ddpm.levels[:steps]), diffusion.CLEAN],
        f"{other} schedule at sampling": diffusion.time_grid(diffusion.noise_levels(other, config.timesteps), steps),
    }
    for mistake, grid in grids.items():
        yield "DDPM", mistake, args.diffusion_n, ancestral(ddpm, grid, args.precision)


def in_unit_range(sample: Sample) -> Sample:
    """Pixels of [0, 1] cut to integers, where the metric expects 0..255: all of them are 0 but the whitest, which are 1."""
    return lambda n, labels, rng: ((sample(n, labels, rng) + 1) / 2).floor() / 127.5 - 1


def in_symmetric_range(sample: Sample) -> Sample:
    """Pixels of [-1, 1] taken for [0, 1]: everything below the middle becomes black."""
    return lambda n, labels, rng: sample(n, labels, rng).clamp(0, 1) * 2 - 1


def without_statistics(gan: nn.Module) -> nn.Module:
    """A copy whose BatchNorm statistics are as they were created, as if only the parameters had been averaged."""
    blind = copy.deepcopy(gan)
    for module in blind.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return blind


def ancestral(ddpm: nn.Module, grid: list[diffusion.Level], precision: str) -> Sample:
    """Ancestral sampling along `grid`, whose levels and times need not be those of the training."""

    def sample(n: int, labels: Tensor, rng: torch.Generator) -> Tensor:
        noise, parts = torch.randn(n, 1, 28, 28, generator=rng), []
        with (
            evaluating(ddpm) as device,
            autocast(device, precision),
            torch.no_grad(),
            tqdm(total=n * (len(grid) - 1), unit="eval", leave=False, disable=None) as bar,
        ):
            step_rng = torch.Generator(device).manual_seed(0)
            for x, classes in zip(noise.split(CHUNK), labels.to(device).split(CHUNK)):

                def denoise(x: Tensor, level: diffusion.Level, classes: Tensor = classes) -> Tensor:
                    bar.update(len(x))
                    return ddpm.denoise(x, level, classes)

                parts.append(diffusion.ddpm(denoise, x.to(device), grid, step_rng))
        return torch.cat(parts)

    return sample


if __name__ == "__main__":
    run_script(main)
