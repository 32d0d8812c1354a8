"""Scoring a generator: the pinned extractor, the reference statistics, the real-versus-real floor.

What the trainers' monitor and evaluate.py share. Samples are rounded to uint8 once, before any metric.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import distributed
import metrics
from checkpoint import FORMAT, MAX_MODEL_BYTES, file_sha256, has_format, load_model, read_tensors, write_tensors
from data import NUM_CLASSES, Digits, load_digits, to_model_range, to_uint8
from metrics import Estimate, Gaussian
from utils import ExpectedError, UsageError, keyed_generator

CHECKPOINTS = Path(__file__).parent / "checkpoints"
CLASSIFIER_SHA256 = "0721f5905ba150b02c92f010b7f543d1a8d15754b544f67b358196077fdc6b08"
STATISTICS_NAME = "classifier_statistics.pt"
FLOOR_SUBSETS = 8
FLOOR_SIZES = (500, 1000, 2000, 5000, 10_000)
NEIGHBOURHOOD = 10_000  # features on either side of precision, recall, density and coverage
DIGIT_SHARE = 0.01  # of the samples: so many of a digit, and it counts as drawn
CHUNK = 250  # images a forward pass: the fastest on a CPU, whose caches larger ones leave


class Extractor:
    """The digit classifier as a ruler: uint8 images -> features and class probabilities, always in fp32.

    Raises:
        ExpectedError: the file is missing, or is not the pinned one (`sha256`; an empty string accepts any).
    """

    knows_digits = True

    def __init__(
        self, device: torch.device | str = "cpu", path: Path = CHECKPOINTS / "classifier.pt", sha256: str = CLASSIFIER_SHA256
    ):
        self.network = load_model(path, device).to(memory_format=torch.channels_last)
        if self.network.model_name != "classifier":
            raise ExpectedError(f"{path} holds a {self.network.model_name}, not the classifier; restore the shipped file")
        self.device, self.sha256 = torch.device(device), file_sha256(path)
        if sha256 and self.sha256 != sha256:
            raise ExpectedError(f"{path} is not the pinned classifier, so its figures could not be compared; restore it")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [N, 1, 28, 28] -> features [N, D] and class probabilities [N, K], float32."""
        if images.dtype != torch.uint8:
            raise ValueError(f"images are scored as uint8, not {images.dtype}; see data.to_uint8")
        parts = []
        for chunk in images.split(CHUNK):
            chunk = to_model_range(chunk.to(self.device)).contiguous(memory_format=torch.channels_last)
            features = self.network.features(chunk)
            parts.append((features, self.network.head(features).softmax(1)))
        features, probabilities = zip(*parts)
        return torch.cat(features), torch.cat(probabilities)


class Statistics(NamedTuple):
    """Gaussians of features: of all, and of each class (None for a class with fewer than two)."""

    whole: Gaussian
    classes: list[Gaussian | None]


class Floor(NamedTuple):
    """FID of real digits: mean and deviation over eight subsets; and its mean class by class, nan for a class too small."""

    fid: Estimate
    class_fids: list[float]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What samples are compared with: statistics of real features, and the floor by sample size.

    The floor is the FID that real training digits reach against this reference at the same size, over eight random
    subsets. No subset is part of its own reference: against the training set, each is compared with the digits that it
    leaves.
    """

    statistics: Statistics
    floors: dict[int, Floor]

    def ratio(self, fid: float, n: int) -> float:
        """FID over the floor at `n` samples; nan where that floor was not measured."""
        return fid / self.floors[n].fid.mean if n in self.floors else math.nan

    def class_ratios(self, fids: list[float], n: int) -> list[float]:
        """The same class by class, at `n` samples of all classes together."""
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
    return Reference(Statistics(gaussians[0], gaussians[1:]), floors)


def measure_reference(digits: Digits, extractor: Extractor, floor_sizes: tuple[int, ...]) -> Reference:
    """Statistics of a training set, with the floor of each size that leaves at least half of the digits."""
    features, _ = extractor(digits.images)
    sizes = [n for n in floor_sizes if n <= len(digits) // 2]
    return Reference(summary(features, digits.labels), {n: floor(features, digits.labels, n) for n in sizes})


def summary(features: Tensor, labels: Tensor) -> Statistics:
    """The statistics of features [N, D] of digits with labels [N]."""
    return Statistics(metrics.gaussian(features), metrics.class_gaussians(features, labels, NUM_CLASSES))


def floor(features: Tensor, labels: Tensor, n: int, reference: Statistics | None = None) -> Floor:
    """FID of `n` of the real training `features` [N, D] to `reference`, or without one to the rest of them."""
    fids, class_fids = [], []
    for subset in range(FLOOR_SUBSETS):
        order = torch.randperm(len(features), generator=keyed_generator("cpu", "floor", subset)).to(features.device)
        chosen, rest = (summary(features[part], labels[part]) for part in (order[:n], order[n:]))
        real = reference or rest
        fids.append(metrics.frechet_distance(chosen.whole, real.whole))
        class_fids.append(metrics.class_frechet_distances(chosen.classes, real.classes))
    return Floor(metrics.estimate(fids), torch.tensor(class_fids, dtype=torch.float64).mean(0).tolist())


def write_statistics(extractor: Extractor, data_dir: str | os.PathLike, path: Path) -> None:
    """Measure the statistics and floors of both splits of MNIST and write them, tied to the classifier's hash."""
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


def _on_cpu(gaussian: Gaussian) -> tuple[Tensor, Tensor, int]:
    return gaussian.mean.cpu(), gaussian.covariance.cpu(), gaussian.n


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores a generator on `n` samples of fixed noise: what the monitor calls after an epoch.

    With `labels`, int64 [n], it asks for those classes, and adds label accuracy and per-digit FID to its figures.
    `options` are those of the generator's `sample`.
    """

    extractor: Extractor
    reference: Reference
    n: int
    seed: int
    labels: Tensor | None = None
    options: dict = dataclasses.field(default_factory=dict)

    def __call__(self, generator: nn.Module) -> dict[str, float]:
        """FID, its ratio to the floor, and inception score of `generator`'s samples; and how many digits there are among
        them (1 % of the samples each), and how varied they are (see `metrics.variety`), by which collapse shows."""
        rng = keyed_generator("cpu", self.seed, "scoring")
        samples = distributed.sample(generator, self.n, self.labels, rng, **self.options)
        features, probabilities = self.extractor(to_uint8(samples))
        gaussian, real = metrics.gaussian(features), self.reference.statistics
        fid = metrics.frechet_distance(gaussian, real.whole)
        score = metrics.inception_score(probabilities, keyed_generator("cpu", self.seed, "splits"))
        shares = probabilities.argmax(1).bincount(minlength=NUM_CLASSES) / self.n
        figures = {
            "fid": fid, "fid_ratio": self.reference.ratio(fid, self.n), "is": score.mean, "is_std": score.std,
            "digits": int((shares >= DIGIT_SHARE).sum()), "variety": metrics.variety(gaussian, real.whole),
        }  # fmt: skip
        return figures if self.labels is None else figures | self._class_figures(features, probabilities)

    def _class_figures(self, features: Tensor, probabilities: Tensor) -> dict[str, float]:
        labels = self.labels.to(features.device)
        classes = metrics.class_gaussians(features, labels, NUM_CLASSES)
        fids = metrics.class_frechet_distances(classes, self.reference.statistics.classes)
        ratios = {f"fid_ratio_{digit}": ratio for digit, ratio in enumerate(self.reference.class_ratios(fids, self.n))}
        return {"label_accuracy": metrics.label_accuracy(probabilities, labels), **ratios}


@dataclasses.dataclass
class TwoWayScorer:
    """Scores a model that draws any digit and the digits that are asked for: the figures are those of any digit, with
    label accuracy and per-digit FID of the asked ones, and their FID as `fid_asked`."""

    any_digit: Scorer
    asked: Scorer

    def __call__(self, generator: nn.Module) -> dict[str, float]:
        asked = self.asked(generator)
        renamed = {f"{name}_asked": asked[name] for name in ("fid", "fid_ratio")}
        return {**asked, **self.any_digit(generator), **renamed}


def training_scorer(
    digits: Digits,
    extractor: Extractor,
    n: int,
    seed: int,
    conditional: bool,
    options: dict | None = None,
    two_way: bool = False,
) -> Scorer | TwoWayScorer:
    """The scorer of a training on `digits`: against the shipped training-set statistics of MNIST (also with --limit),
    or against the training part of the embedded digits. A conditional model is asked for the training set's labels; with
    `two_way` it also draws without any."""
    if len(digits) < 2:
        raise UsageError("one training digit has no statistics to compare with; give a larger --limit")
    shipped = digits.name == "mnist"
    reference = load_reference("train", extractor) if shipped else measure_reference(digits, extractor, (n,))
    any_digit = Scorer(extractor, reference, n, seed, None, options or {})
    if not conditional:
        return any_digit
    asked = dataclasses.replace(any_digit, labels=proportional_labels(digits, n, seed))
    return TwoWayScorer(any_digit, asked) if two_way else asked


def proportional_labels(digits: Digits, n: int, seed: int) -> Tensor:
    """The labels of `digits` over and over, shuffled, the first `n` of them, int64 [n] on the CPU.

    Asking a conditional model for the reference's own labels makes class proportions cost nothing in the FID.
    """
    order = torch.randperm(len(digits), generator=keyed_generator("cpu", seed, "labels"))
    return digits.labels.cpu()[order].repeat(-(-n // len(order)))[:n]


class RealDigits:
    """Real digits as the reference of `score`, with what every row shares computed once.

    Args:
        reference: what the samples are compared with: the test set, or the training set for more samples than it has.
        test, train: both splits, for the memorisation figures.
        extractor: `Extractor`, or one of the same kind.
    """

    def __init__(self, reference: Digits, test: Digits, train: Digits, extractor: Extractor):
        self.extractor, self.labels = extractor, reference.labels
        self.features, self.probabilities = extractor(reference.images)
        self.statistics = metrics.gaussian(self.features)
        self.neighbours = _at_most(self.features, NEIGHBOURHOOD, 0)
        self.radius = metrics.ball_radius(self.neighbours)
        self.test_images, self.train_images = test.images, train.images

    @functools.cached_property
    def test_distances(self) -> Tensor:
        """From each test digit to the nearest training digit, float32 [N]: seconds of work, so where it is asked for."""
        return metrics.nearest_neighbours(self.test_images, self.train_images)[0]

    def own_figures(self) -> dict[str, float]:
        """What the reference digits reach by themselves: the marks of label accuracy and inception score."""
        inception = metrics.inception_score(self.probabilities, keyed_generator("cpu", 0, "splits"))
        figures = {"is": inception.mean}
        if self.extractor.knows_digits:
            figures["label_accuracy"] = metrics.label_accuracy(self.probabilities, self.labels)
        return figures

    def score(
        self, images: Tensor, seed: int, labels: Tensor | None = None, memorised: bool = True
    ) -> tuple[dict[str, float], list[dict[str, float]]]:
        """Every figure of uint8 images [N, 1, 28, 28], and those of each digit where `labels` [N] were asked for.

        Args:
            seed: decides the subsets and splits.
            memorised: False leaves out the figures that compare with the training digits: of those, they say nothing.
        """
        features, probabilities = self.extractor(images)
        inception = metrics.inception_score(probabilities, keyed_generator("cpu", seed, "splits"))
        scores = {
            "fid": metrics.frechet_distance(metrics.gaussian(features), self.statistics),
            "kid": metrics.kernel_distance(self.features, features, keyed_generator("cpu", seed, "kid")).mean,
            "is": inception.mean,
            "is_splits": inception.std,
            **self._fidelity(_at_most(features, NEIGHBOURHOOD, seed))._asdict(),
        }
        if memorised:
            distances, _ = metrics.nearest_neighbours(images, self.train_images)
            found = metrics.memorisation(distances, self.test_distances)
            scores |= {f"nearest_{name}": value for name, value in found._asdict().items()}
        if labels is None or not self.extractor.knows_digits:
            return scores, []
        labels = labels.to(features.device)
        scores["label_accuracy"] = metrics.label_accuracy(probabilities, labels)
        return scores, [self._score_digit(digit, features, probabilities, labels) for digit in range(NUM_CLASSES)]

    def _fidelity(self, features: Tensor) -> metrics.Fidelity:
        return metrics.fidelity(self.neighbours, features, real_radius=self.radius)

    def _score_digit(self, digit: int, features: Tensor, probabilities: Tensor, labels: Tensor) -> dict[str, float]:
        asked, real = labels == digit, self.features[self.labels == digit]
        fake = features[asked]
        return {
            "fid": metrics.frechet_distance(metrics.gaussian(fake), metrics.gaussian(real)),
            **metrics.fidelity(real, fake)._asdict(),
            "label_accuracy": metrics.label_accuracy(probabilities[asked], labels[asked]),
        }


def _at_most(features: Tensor, n: int, seed: int) -> Tensor:
    """A random `n` of the rows, or all of fewer: the figures of neighbourhoods need equal sizes to be compared."""
    if len(features) <= n:
        return features
    return features[torch.randperm(len(features), generator=keyed_generator("cpu", seed, "subset"))[:n].to(features.device)]
