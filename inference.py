"""Draw chosen digits with a class-conditional model: a PNG for each sample, and a strip for each digit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import (
    DEVICE_HELP,
    OUT_DIR,
    SEED,
    ArgumentParser,
    add_sampling_flags,
    expanded_path,
    integer,
    run_script,
    sampling_options,
)
from files import UsageError, check_writable, find_default
from utils import choose_device, sampling_rng

if TYPE_CHECKING:
    from torch import Tensor

MODEL = "checkpoints/best_CGAN_G.pt"
STRIP_COLUMNS = 20  # a longer strip goes on in a second row


def digit_choice(text: str) -> str | int:
    """argparse type: a digit, or `all`."""
    if text == "all":
        return text
    if text not in {str(digit) for digit in range(10)}:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a digit in 0..9 nor 'all'")
    return int(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--model", type=expanded_path, default=None, help=f"checkpoint of a class-conditional model (default: {MODEL})")
    flag("--digit", type=digit_choice, nargs="+", default=["all"], help="digits to draw, such as 9, or 3 5 8, or all")
    flag("--samples", type=integer(1, 1024), default=10, help="samples of each digit")
    flag(
        *reversed(OUT_DIR),
        type=expanded_path,
        default="digit_samples",
        help="folder for the pictures; those of the same name are replaced",
    )
    add_sampling_flags(parser)
    flag("--seed", type=SEED, default=0, help="seed of the noise; a digit looks the same whatever others are drawn")
    flag("--device", default="auto", help=DEVICE_HELP)
    args = parser.parse_args(argv)
    if args.guidance == 0:
        parser.error("--guidance 0 would ignore the digit; leave it out, or use infer.py")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    from checkpoint import load_generator
    from figures.images import image_grid, write_png

    args.model = args.model or find_default(MODEL)
    generator = load_generator(args.model, choose_device(args.device))
    options = sampling_options(args, generator, args.model)
    digits = chosen_digits(args.digit, generator.config.num_classes, args.model)
    folder = Path(args.outdir)
    check_writable(folder)
    for digit in digits:
        images = draw(generator, digit, args.samples, args.seed, options)
        for number, image in enumerate(images, start=1):
            picture = folder / f"digit_{digit}_{number:03d}.png"
            write_png(picture, image[0].numpy())
            print(picture)
        strip = folder / f"digit_{digit}.png"
        write_png(strip, image_grid(images, columns=min(args.samples, STRIP_COLUMNS)))
        print(strip)


def chosen_digits(choices: list[str | int], num_classes: int, model: str) -> list[int]:
    """The digits of `--digit` in ascending order, each once.

    Raises:
        UsageError: the model is unconditional, or lacks one of the digits.
    """
    if not num_classes:
        raise UsageError(
            f"{model} is unconditional, so it cannot draw a chosen digit; give a conditional checkpoint (best_CGAN_G.pt, "
            "best_DIFF.pt), or use infer.py"
        )
    digits = set(range(num_classes)) if "all" in choices else {int(choice) for choice in choices}
    if missing := sorted(digit for digit in digits if digit >= num_classes):
        raise UsageError(f"{model} has no digit {missing[0]}, only 0..{num_classes - 1}; give one of those")
    return sorted(digits)


def draw(generator: Any, digit: int, n: int, seed: int, options: dict[str, Any]) -> Tensor:
    """Samples of `digit`, uint8 [n, 1, 28, 28] on the CPU. They do not depend on the other digits that are drawn."""
    import torch

    from data import to_uint8

    labels = torch.full((n,), digit)
    return to_uint8(generator.sample(n, labels, sampling_rng(seed), **options)).cpu()


if __name__ == "__main__":
    run_script(main)
