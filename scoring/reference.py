"""What samples are compared with: Gaussians of real features, and the floor that real digits reach against them."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoint import FORMAT, MAX_MODEL_BYTES, has_format, read_tensors, write_tensors
from data import NUM_CLASSES, Digits, load_digits
from files import ExpectedError
from scoring import metrics
from scoring.extractor import CHECKPOINTS, Extractor
from scoring.metrics import Estimate, Gaussian
from utils import keyed_generator

STATISTICS_NAME = "classifier_statistics.pt"
FLOOR_SUBSETS = 8
FLOOR_SIZES = (500, 1000, 2000, 5000, 10_000)


class Statistics(NamedTuple):
    """Gaussians of features: of all digits, and of each class. None: a class with fewer than two digits."""

    whole: Gaussian
    classes: list[Gaussian | None]


class Floor(NamedTuple):
    """FID of real digits: mean and deviation over eight subsets. And its mean for each class, nan for a class too small."""

    fid: Estimate
    class_fids: list[float]


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of real features, and the floor by sample size.

    The floor is the FID of real training digits at the same sample size, over eight random subsets. No subset is part of its
    reference: against the training set, each is compared with the remaining digits.
    """

    statistics: Statistics
    floors: dict[int, Floor]

    def ratio(self, fid: float, n: int) -> float:
        """FID over the floor at `n` samples. nan: that floor was not measured."""
        return fid / self.floors[n].fid.mean if n in self.floors else math.nan

    def class_ratios(self, fids: list[float], n: int) -> list[float]:
        """The same for each class, at `n` samples of all classes together."""
        floors = self.floors[n].class_fids if n in self.floors else [math.nan] * len(fids)
        return [fid / floor for fid, floor in zip(fids, floors)]


def load_reference(split: str, extractor: Extractor, path: Path = CHECKPOINTS / STATISTICS_NAME) -> Reference:
    """The shipped statistics of MNIST's `train` or `test` split.

    Raises:
        ExpectedError: the file is missing, damaged, or belongs to another classifier.
    """
    content = read_tensors(path, MAX_MODEL_BYTES)
    if not has_format(content, {"classifier_sha256", "train", "test"}):
        raise ExpectedError(f"{path} is no statistics file of format {FORMAT}; restore the shipped one")
    if content["classifier_sha256"] != extractor.sha256:
        raise ExpectedError(
            f"{path} belongs to another classifier; run train_classifier.py --statistics-only --out-dir checkpoints"
        )
    try:
        return _reference(content[split], extractor.device)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ExpectedError(
            f"{path} does not hold the statistics of ten digits ({error}); restore the shipped one"
        ) from error


def _reference(part: dict, device: torch.device) -> Reference:
    gaussians = []
    for mean, covariance, n in (part["whole"], *part["classes"]):
        d = len(mean)
        if mean.shape != (d,) or covariance.shape != (d, d) or not isinstance(n, int):
            raise ValueError("a mean and its covariance do not fit")
        if not (torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
            raise ValueError("they are not finite")
        gaussians.append(Gaussian(mean.double().to(device), covariance.double().to(device), n))
    if len({len(mean) for mean, _, _ in gaussians}) > 1 or len(gaussians) != 1 + NUM_CLASSES:
        raise ValueError("they are not of ten classes")
    floors = {int(n): Floor(Estimate(*map(float, fid)), [*map(float, fids)]) for n, (fid, fids) in part["floors"].items()}
    if any(len(floor.class_fids) != NUM_CLASSES for floor in floors.values()):
        raise ValueError("a floor is not of ten classes")
    return Reference(Statistics(gaussians[0], [*gaussians[1:]]), floors)


def measure_reference(digits: Digits, extractor: Extractor, floor_sizes: tuple[int, ...]) -> Reference:
    """Statistics of a training set, with the floor of each size that is at most half of it."""
    features, _ = extractor(digits.images)
    sizes = [n for n in floor_sizes if n <= len(digits) // 2]
    labels = digits.labels.to(features.device)
    return Reference(summary(features, labels), {n: floor(features, labels, n) for n in sizes})


def summary(features: Tensor, labels: Tensor) -> Statistics:
    """The statistics of features [N, D] of digits with labels [N]."""
    return Statistics(metrics.gaussian(features), metrics.class_gaussians(features, labels, NUM_CLASSES))


def floor(features: Tensor, labels: Tensor, n: int, reference: Statistics | None = None) -> Floor:
    """FID of `n` of the training `features` [N, D] to `reference`. None: to the remaining features."""
    fids, class_fids = [], []
    for subset in range(FLOOR_SUBSETS):
        order = torch.randperm(len(features), generator=keyed_generator("cpu", "floor", subset)).to(features.device)
        chosen, rest = (summary(features[part], labels[part]) for part in (order[:n], order[n:]))
        real = reference or rest
        fids.append(metrics.frechet_distance(chosen.whole, real.whole))
        class_fids.append(metrics.class_frechet_distances(chosen.classes, real.classes))
    return Floor(metrics.estimate(fids), torch.tensor(class_fids, dtype=torch.float64).mean(0).tolist())


def write_statistics(extractor: Extractor, data_dir: str | os.PathLike[str], path: Path) -> None:
    """Measure the statistics and floors of both splits of MNIST, and write them with the classifier's hash."""
    train = load_digits("mnist", "train", data_dir, extractor.device)
    test = load_digits("mnist", "test", data_dir, extractor.device)
    train_features, test_features = extractor(train.images)[0], extractor(test.images)[0]
    test_statistics = summary(test_features, test.labels)

    def part(statistics: Statistics, reference: Statistics | None) -> dict:
        floors = {n: floor(train_features, train.labels, n, reference) for n in FLOOR_SIZES}
        return {
            "whole": _on_cpu(statistics.whole),
            "classes": [_on_cpu(gaussian) for gaussian in statistics.classes],
            "floors": {n: (tuple(fid), class_fids) for n, (fid, class_fids) in floors.items()},
        }

    write_tensors(
        path,
        {
            "format": FORMAT,
            "classifier_sha256": extractor.sha256,
            "train": part(summary(train_features, train.labels), None),
            "test": part(test_statistics, test_statistics),
        },
    )


def _on_cpu(gaussian: Gaussian | None) -> tuple[Tensor, Tensor, int]:
    if gaussian is None:
        raise ValueError("a class has fewer than two digits, and so no statistics")
    return gaussian.mean.cpu(), gaussian.covariance.cpu(), gaussian.n
