"""Checks the metrics: every figure must get worse with damage, and ours must agree with independent implementations.

Damage: random training digits are scored against the test set, as samples are. They are scored as they are, with noise,
blurred, shifted, and with whole classes missing. A figure that should see a damage must get worse with each of its levels.

Two-sample test: it must not tell real digits from real digits, and must tell a haze, a slight blur and a missing digit.

Agreement: FID and inception score of these digits, undamaged and with the strongest level of each damage, are compared with
the textbook formula (scipy) and with torchmetrics, in float64.

The figures are written to reports/self_check.csv; the comparisons are printed. If a check fails, the exit code is 1 and the
last line names it.

    python benchmarks/self_check.py
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

import data
from cli import CUDA_DEVICE_HELP, DATA_DIR_HELP, ArgumentParser, expanded_path, integer, run_script
from files import ExpectedError, check_outputs, expanded, write_csv
from scoring import metrics, two_sample
from scoring.extractor import Extractor
from scoring.scorer import FullScorer
from utils import choose_device, keyed_generator

BETTER_WHEN = {
    "fid": "low",
    "kid": "low",
    "is": "high",
    "precision": "high",
    "recall": "high",
    "density": "high",
    "coverage": "high",
}
MAX_DIGITS = 12_000

# The largest relative differences that pass. With 500, 5,000 and 12,000 digits, they were at most 7.4e-7 for the FID and
# 8e-16 for the inception score. Some units of the classifier never fire, so the covariances are singular. The square roots
# of their rounding errors remain in the FID, and weigh most where it is small.
FID_BOUND = 1e-5
INCEPTION_SCORE_BOUND = 1e-10


# --------------------------------------------------------------------------------------------------------------------
# Damage


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
    """`level` pixels to the right. What leaves the image comes back on the left, where digits are empty."""
    return digits.images[:n].roll(level, dims=-1)


def incomplete(digits: data.Digits, n: int, level: int) -> Tensor:
    """Without the last `level` classes. Other digits of the remaining classes take their places."""
    return digits.images[digits.labels < 10 - level][:n]


Damage = Callable[[data.Digits, int, int], Tensor]

# Damage -> its levels, and the figures that must see it
DAMAGES: dict[Damage, tuple[tuple[int, ...], tuple[str, ...]]] = {
    noisy: ((0, 10, 20, 40, 80), ("fid", "kid", "precision", "density", "coverage")),
    blurred: ((0, 1, 2, 3), ("fid", "kid", "precision", "density", "coverage")),
    shifted: ((0, 1, 2, 4), ("fid", "kid", "precision", "density", "coverage")),
    incomplete: ((0, 1, 3, 5, 8), ("fid", "kid", "is", "recall", "coverage")),
}


def damaged(damage: Damage, digits: data.Digits, n: int, level: int) -> Tensor:
    """uint8 [n, 1, 28, 28]."""
    return damage(digits, n, level).float().round().clamp(0, 255).to(torch.uint8)


# --------------------------------------------------------------------------------------------------------------------
# What the two-sample test must see: damage -> the images of some digits, and the bounds of the accuracy


def hazy(images: Tensor, level: int) -> Tensor:
    """Up to `level` grey levels more in each pixel."""
    haze = torch.randint(level + 1, images.shape, generator=keyed_generator("cpu", "haze", level))
    return images + haze.to(images.device)


def slightly_blurred(images: Tensor, level: int) -> Tensor:
    """`level` percent of the mean over 3x3 pixels."""
    return torch.lerp(images, F.avg_pool2d(images, 3, stride=1, padding=1), level / 100)


SEEN = 0.6
# Without one of ten digits, the best possible accuracy is 0.55: a tenth of the real digits gives itself away
TOLD_APART: list[tuple[str, int, float, float]] = [
    ("real", 0, 0.48, 0.52),
    ("hazy", 1, SEEN, 1),
    ("hazy", 2, SEEN, 1),
    ("slightly blurred", 15, SEEN, 1),
    ("incomplete", 1, 0.52, 0.57),
]


def compared_with_real(digits: data.Digits, damage: str, level: int) -> two_sample.TwoSample:
    """The two-sample test of shuffled digits with a damage against other ones."""
    real, others = digits.images[: two_sample.NEEDED], digits.select(torch.arange(two_sample.NEEDED, len(digits)))
    if damage == "incomplete":
        return two_sample.two_sample_test(incomplete(others, two_sample.NEEDED, level), real)
    images = others.images[: two_sample.NEEDED].float()
    images = {"real": lambda images, _: images, "hazy": hazy, "slightly blurred": slightly_blurred}[damage](images, level)
    return two_sample.two_sample_test(images.round().clamp(0, 255).to(torch.uint8), real)


# --------------------------------------------------------------------------------------------------------------------
# The checks


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("--n", type=integer(10, 10**6), default=5000, help=f"digits at each level, at most {MAX_DIGITS}")
    flag("--data-dir", type=expanded_path, default=None, help=DATA_DIR_HELP)
    flag("--device", default="auto", help=CUDA_DEVICE_HELP)
    flag("--out", type=expanded, default=Path("reports/self_check.csv"), help="the table to write")
    args = parser.parse_args(argv)
    check_outputs(("--out", args.out, (".csv",)))
    if args.n > MAX_DIGITS:
        parser.error(f"--n {args.n} is more than the {MAX_DIGITS} training digits of the two classes that remain in the end")

    device = choose_device(args.device, apple=False)
    data_dir = args.data_dir or data.default_data_dir()
    train, test = (data.load_digits("mnist", split, data_dir, device) for split in ("train", "test"))
    scorer = FullScorer(test, test, train, Extractor(device))
    digits = train.subset(len(train), "self check")  # shuffled
    rows: list[dict[str, Any]] = []
    blind = []
    for damage, (levels, watched) in DAMAGES.items():
        figures = [score(scorer, damaged(damage, digits, args.n, level)) for level in levels]
        blind += [f"{name} of {damage.__name__} digits" for name in watched if not worsens(name, figures)]
        for level, row in zip(levels, figures):
            rows.append({"damage": damage.__name__, "level": level, "n": args.n, **row})
            print(f"{damage.__name__:10s} {level:3d}  ", "  ".join(f"{name} {row[name]:.3f}" for name in BETTER_WHEN))
    for damage_name, level, low, high in TOLD_APART:
        found = compared_with_real(digits, damage_name, level)
        rows.append({"damage": damage_name, "level": level, "n": two_sample.JUDGED, "two_sample": found.accuracy})
        print(f"{damage_name} {level}: told from real digits in {found.accuracy:.3f} of cases; wanted {low} to {high}")
        if not low <= found.accuracy <= high:
            blind.append(f"the two-sample accuracy of {damage_name} digits")
    write_csv(args.out, rows)
    print(f"wrote {args.out}")
    different = compare(scorer, digits, args.n)
    if blind:
        raise ExpectedError(f"these figures do not see every damage: {', '.join(blind)}; do not trust them")
    if different:
        raise ExpectedError(f"these figures differ from another implementation: {', '.join(different)}; do not trust them")
    print("every figure gets worse with every level of the damages that it should see")
    print("FID and inception score agree with the independent implementations")


def score(scorer: FullScorer, images: Tensor) -> dict[str, float]:
    """The figures of uint8 images [N, 1, 28, 28]."""
    figures, _ = scorer.score(images, seed=0, memorised=False)
    return {name: figures[name] for name in BETTER_WHEN}


def worsens(name: str, figures: list[dict[str, float]]) -> bool:
    """Whether the figure gets worse from each level to the next."""
    sign = 1 if BETTER_WHEN[name] == "low" else -1
    return all(sign * (after[name] - before[name]) > 0 for before, after in itertools.pairwise(figures))


def compare(scorer: FullScorer, digits: data.Digits, n: int) -> list[str]:
    """Print our figures beside those of other implementations. Returns the comparisons that exceed their bound."""
    different = []
    for name, images in compared_images(digits, n):
        features, _ = scorer.extractor(images)
        for figure, other, ours, theirs, bound in comparisons(scorer, features):
            difference = abs(ours - theirs) / theirs
            print(f"{name:13s} {figure:15s}  ours {ours:.9g}  {other} {theirs:.9g}  relative difference {difference:.1e}")
            if not difference <= bound:  # also where it is nan
                different.append(f"{figure} of {name} digits from {other} by {difference:.1e}")
    return different


def compared_images(digits: data.Digits, n: int) -> Iterator[tuple[str, Tensor]]:
    """Undamaged digits, then the strongest level of each damage: a name, and uint8 images [n, 1, 28, 28]."""
    yield "undamaged", digits.images[:n]
    for damage, (levels, _) in DAMAGES.items():
        yield f"{damage.__name__} {levels[-1]}", damaged(damage, digits, n, levels[-1])


def comparisons(scorer: FullScorer, features: Tensor) -> Iterator[tuple[str, str, float, float, float]]:
    """Of features [N, D], against the test set: (figure, other implementation, our value, its value, bound)."""
    real = scorer.features
    fid = metrics.frechet_distance(metrics.gaussian(features), scorer.statistics)
    yield "FID", "scipy", fid, textbook_fid(real, features), FID_BOUND
    yield "FID", "torchmetrics", fid, torchmetrics_fid(real, features), FID_BOUND
    with torch.no_grad():
        logits = scorer.extractor.network.head(features).double()
    score = metrics.inception_score(logits.softmax(1), keyed_generator("cpu", 0), splits=1).mean
    yield "inception score", "torchmetrics", score, torchmetrics_inception_score(logits), INCEPTION_SCORE_BOUND


# --------------------------------------------------------------------------------------------------------------------
# Independent implementations


def textbook_fid(real: Tensor, fake: Tensor) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features [N, D] and [M, D], with scipy's matrix root."""
    a, b = (features.cpu().double().numpy() for features in (real, fake))
    covariance_a, covariance_b = (np.cov(features, rowvar=False) for features in (a, b))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)  # of singular covariances, see FID_BOUND
        root = scipy.linalg.sqrtm(covariance_a @ covariance_b).real
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariance_a + covariance_b - 2 * root))


class PassOn(nn.Module):
    """Stands in for torchmetrics' Inception network: it takes features [N, D] for images, and returns them."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def torchmetrics_fid(real: Tensor, fake: Tensor) -> float:
    """FID of features [N, D] and [M, D] by torchmetrics."""
    metric = FrechetInceptionDistance(feature=PassOn(real.shape[1])).set_dtype(torch.float64)
    metric.update(real.cpu().double(), real=True)
    metric.update(fake.cpu().double(), real=False)
    return float(metric.compute())


def torchmetrics_inception_score(logits: Tensor) -> float:
    """Inception score of class logits [N, K], in one split, by torchmetrics."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of its memory, and of the deviation of a single split
        metric = InceptionScore(feature=PassOn(logits.shape[1]), splits=1)
        metric.update(logits.cpu())
        return float(metric.compute()[0])


if __name__ == "__main__":
    run_script(main)
