"""Do the figures see damage? Real digits are damaged more and more, and every figure must move the way it should.

Random training digits are scored against the test set as samples are: as they are, with noise, blurred, shifted, and with
whole classes missing. Results go to reports/self_check.csv; a figure that does not get worse with every level of a damage
that it should see is named, and the exit code is 1.

    python benchmarks/self_check.py
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch import Tensor
from torch.nn import functional as F

import data
import flags
from evaluation import Extractor, RealDigits
from utils import ExpectedError, choose_device, keyed_generator, run_script, write_csv

BETTER_WHEN = {"fid": "low", "kid": "low", "is": "high", "precision": "high", "recall": "high", "density": "high",
               "coverage": "high"}  # fmt: skip
MAX_DIGITS = 12_000


def noisy(digits: data.Digits, n: int, level: int) -> Tensor:
    """Gaussian noise of `level` grey levels."""
    images = digits.images[:n].float()
    noise = torch.randn(images.shape, generator=keyed_generator("cpu", "noise")).to(images.device)
    return images + level * noise


def blurred(digits: data.Digits, n: int, level: int) -> Tensor:
    """The mean over 3x3 pixels, `level` times."""
    images = digits.images[:n].float()
    for _ in range(level):
        images = F.avg_pool2d(images, 3, stride=1, padding=1)
    return images


def shifted(digits: data.Digits, n: int, level: int) -> Tensor:
    """`level` pixels to the right; what leaves the image comes back on the left, where digits are empty."""
    return digits.images[:n].roll(level, dims=-1)


def incomplete(digits: data.Digits, n: int, level: int) -> Tensor:
    """Without the last `level` classes, whose places are taken by other digits of the rest."""
    return digits.images[digits.labels < 10 - level][:n]


# Damage -> its levels, and the figures that must see it
DAMAGES: dict[Callable[[data.Digits, int, int], Tensor], tuple[tuple[int, ...], tuple[str, ...]]] = {
    noisy: ((0, 10, 20, 40, 80), ("fid", "kid", "precision", "density", "coverage")),
    blurred: ((0, 1, 2, 3), ("fid", "kid", "precision", "density", "coverage")),
    shifted: ((0, 1, 2, 4), ("fid", "kid", "precision", "density", "coverage")),
    incomplete: ((0, 1, 3, 5, 8), ("fid", "kid", "is", "recall", "coverage")),
}


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--n", type=flags.sample_count, default=5000, help=f"digits at each level, at most {MAX_DIGITS}")
    flag("--data-dir", default=None, help="where MNIST/raw lies (default: $MNIST_DIR, else data)")
    flag("--device", default="auto", help="auto, cpu, cuda, ...")
    flag("--out", type=Path, default=Path("reports/self_check.csv"), help="the table to write")
    args = parser.parse_args()
    if args.n > MAX_DIGITS:
        parser.error(
            f"--n {args.n} is more than the {MAX_DIGITS} training digits of the two classes that are left at the end"
        )

    device = choose_device(args.device)
    data_dir = args.data_dir or data.default_data_dir()
    train, test = (data.load_digits("mnist", split, data_dir, device) for split in ("train", "test"))
    reference, digits = RealDigits(test, test, train, Extractor(device)), train.subset(len(train), "self check")  # shuffled
    rows, blind = [], []
    for damage, (levels, watched) in DAMAGES.items():
        figures = [score(reference, damage(digits, args.n, level)) for level in levels]
        rows += [{"damage": damage.__name__, "level": level, "n": args.n, **row} for level, row in zip(levels, figures)]
        blind += [f"{name} of {damage.__name__} digits" for name in watched if not worsens(name, figures)]
        for row in rows[-len(levels) :]:
            print(f"{row['damage']:10s} {row['level']:3d}  ", "  ".join(f"{name} {row[name]:.3f}" for name in BETTER_WHEN))
    write_csv(args.out, rows)
    print(f"wrote {args.out}")
    if blind:
        raise ExpectedError(f"these figures do not get worse with every level: {', '.join(blind)}; do not trust them")
    print("every figure gets worse with every level of what it should see")


def score(reference: RealDigits, images: Tensor) -> dict[str, float]:
    figures, _ = reference.score(images.float().round().clamp(0, 255).to(torch.uint8), seed=0, memorised=False)
    return {name: figures[name] for name in BETTER_WHEN}


def worsens(name: str, figures: list[dict[str, float]]) -> bool:
    """Whether the figure gets worse from each level to the next."""
    sign = 1 if BETTER_WHEN[name] == "low" else -1
    return all(sign * (b[name] - a[name]) > 0 for a, b in itertools.pairwise(figures))


if __name__ == "__main__":
    run_script(main)
