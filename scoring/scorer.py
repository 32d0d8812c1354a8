"""Score a generator: the few figures of the trainers' monitor, and every figure of evaluate.py.

Samples are rounded to uint8 once, before any metric.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data import NUM_CLASSES, Digits, to_uint8
from engine import distributed
from files import UsageError
from scoring import metrics, two_sample
from scoring.extractor import Extractor
from scoring.reference import Reference, load_reference, measure_reference
from utils import keyed_generator

NEIGHBOURHOOD = 10_000  # features on either side of precision, recall, density and coverage
DIGIT_SHARE = 0.01  # of the samples: a digit counts as drawn from this share on


class Core(NamedTuple):
    """The figures that the monitor and evaluate.py have in common. `label_accuracy` is None without labels."""

    fid: float
    inception: metrics.Estimate
    label_accuracy: float | None


def core_figures(
    fake: metrics.Gaussian, real: metrics.Gaussian, probabilities: Tensor, seed: int, labels: Tensor | None = None
) -> Core:
    """FID, inception score and label accuracy of samples.

    Args:
        fake, real: Gaussians of the features of samples and of real digits.
        probabilities: class probabilities [N, K] of the samples.
        seed: of the inception score's splits.
        labels: int64 [N], the classes that the samples should show.
    """
    return Core(
        fid=metrics.frechet_distance(fake, real),
        inception=metrics.inception_score(probabilities, keyed_generator("cpu", seed, "splits")),
        label_accuracy=None if labels is None else metrics.label_accuracy(probabilities, labels.to(probabilities.device)),
    )


def proportional_labels(digits: Digits, n: int, seed: int) -> Tensor:
    """`n` labels with the shares of `digits`: its labels, shuffled and repeated, int64 [n] on the CPU.

    A class-conditional model draws these classes, so its FID has no part that comes from wrong shares.
    """
    order = torch.randperm(len(digits), generator=keyed_generator("cpu", seed, "labels"))
    return digits.labels.cpu()[order].repeat(-(-n // len(order)))[:n]


# --------------------------------------------------------------------------------------------------------------------
# The monitor of a training


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores a generator on `n` samples of fixed noise, after an epoch.

    With `labels`, int64 [n], it draws those classes, and adds label accuracy and the FID ratio of each digit. `options` are
    those of the generator's `sample`.
    """

    extractor: Extractor
    reference: Reference
    n: int
    seed: int
    labels: Tensor | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, generator: Any) -> dict[str, float]:
        """FID, its ratio to the floor, and inception score. `digits` and `variety` show a collapse.

        `digits` is the number of digits with at least 1 % of the samples; for `variety` see `metrics.variety`.
        """
        # Not `sampling_rng`: evaluate.py must not score the very samples that chose the epoch
        rng = keyed_generator("cpu", self.seed, "scoring")
        samples = distributed.sample(generator, self.n, self.labels, rng, **self.options)
        features, probabilities = self.extractor(to_uint8(samples))
        fake, real = metrics.gaussian(features), self.reference.statistics.whole
        core = core_figures(fake, real, probabilities, self.seed, self.labels)
        shares = probabilities.argmax(1).bincount(minlength=NUM_CLASSES) / self.n
        figures = {
            "fid": core.fid,
            "fid_ratio": self.reference.ratio(core.fid, self.n),
            "is": core.inception.mean,
            "is_std": core.inception.std,
            "digits": int((shares >= DIGIT_SHARE).sum()),
            "variety": metrics.variety(fake, real),
        }
        if self.labels is None or core.label_accuracy is None:
            return figures
        return figures | {"label_accuracy": core.label_accuracy, **self._digit_ratios(features, self.labels)}

    def _digit_ratios(self, features: Tensor, labels: Tensor) -> dict[str, float]:
        classes = metrics.class_gaussians(features, labels.to(features.device), NUM_CLASSES)
        fids = metrics.class_frechet_distances(classes, self.reference.statistics.classes)
        return {f"fid_ratio_{digit}": ratio for digit, ratio in enumerate(self.reference.class_ratios(fids, self.n))}


@dataclasses.dataclass(frozen=True)
class TwoWayScorer:
    """Scores a model with labels and without them.

    The figures are class-conditional, and so is the `fid` that chooses the best epoch. The unconditional FID would be a bad
    judge: it moves with the shares of the digits, which change by chance from epoch to epoch.
    """

    unconditional: Scorer
    conditional: Scorer

    def __call__(self, generator: Any) -> dict[str, float]:
        unconditional = self.unconditional(generator)
        renamed = {f"{name}_unconditional": unconditional[name] for name in ("fid", "fid_ratio")}
        return {**self.conditional(generator), **renamed}


def training_scorer(
    digits: Digits,
    extractor: Extractor,
    n: int,
    seed: int,
    conditional: bool,
    options: dict[str, Any] | None = None,
    two_way: bool = False,
) -> Scorer | TwoWayScorer:
    """The scorer of a training on `digits`.

    MNIST is compared with the shipped statistics of its training set, also with --limit. The embedded digits are compared
    with their training part. A conditional model draws the labels of the training set; with `two_way` it is also scored
    without.

    Raises:
        UsageError: there are too few digits.
    """
    if len(digits) < 2:
        raise UsageError("one training digit has no statistics to compare with; give a larger --limit")
    shipped = digits.name == "mnist"
    reference = load_reference("train", extractor) if shipped else measure_reference(digits, extractor, (n,))
    unconditional = Scorer(extractor, reference, n, seed, None, options or {})
    if not conditional:
        return unconditional
    with_labels = dataclasses.replace(unconditional, labels=proportional_labels(digits, n, seed))
    return TwoWayScorer(unconditional, with_labels) if two_way else with_labels


# --------------------------------------------------------------------------------------------------------------------
# Every figure


class FullScorer:
    """Scores images by every figure. What all rows share is computed once.

    Args:
        reference: the real digits to compare with: the test set, or the training set for more samples than that has.
        test, train: both splits, for the distances to the nearest training digits.
        extractor: `Extractor`, or `inception.InceptionExtractor`.
    """

    def __init__(self, reference: Digits, test: Digits, train: Digits, extractor: Any):
        self.extractor = extractor
        self.labels = reference.labels
        self.features, self.probabilities = extractor(reference.images)
        self.statistics = metrics.gaussian(self.features)
        self.neighbours = _at_most(self.features, NEIGHBOURHOOD, 0)
        self.radius = metrics.ball_radius(self.neighbours)
        self.test_images = test.images
        self.train_images = train.images
        self.shares = self.labels.bincount(minlength=NUM_CLASSES) / len(self.labels)  # of the digits

    @functools.cached_property
    def test_distances(self) -> Tensor:
        """Distance of each test digit to the nearest training digit, float32 [N]. Computing it takes seconds."""
        return metrics.nearest_neighbours(self.test_images, self.train_images)[0]

    def own_figures(self) -> dict[str, float]:
        """Inception score and label accuracy of the reference digits themselves."""
        figures = {"is": metrics.inception_score(self.probabilities, keyed_generator("cpu", 0, "splits")).mean}
        if self.extractor.knows_digits:
            figures["label_accuracy"] = metrics.label_accuracy(self.probabilities, self.labels)
            figures |= _named_shares(self.shares)
        return figures

    def told_apart(self, images: Tensor | None = None) -> dict[str, float]:
        """The two-sample test of images uint8 [N, 1, 28, 28] against training digits; see two_sample.py.

        None: of other training digits. Fewer than 16,000 images on a side: no figure.
        """
        digits = self._shuffled_training_digits
        real, other = digits[: two_sample.NEEDED], digits[two_sample.NEEDED :]
        images = other if images is None else images.to(digits.device)
        if min(len(images), len(real)) < two_sample.NEEDED:
            return {}
        found = two_sample.two_sample_test(images, real)
        return {"two_sample": found.accuracy, "two_sample_plain": found.plain, "two_sample_noisy": found.noisy}

    @functools.cached_property
    def _shuffled_training_digits(self) -> Tensor:
        order = torch.randperm(len(self.train_images), generator=keyed_generator("cpu", "two-sample"))
        return self.train_images[order[: 2 * two_sample.NEEDED].to(self.train_images.device)]

    def score(
        self, images: Tensor, seed: int, labels: Tensor | None = None, memorised: bool = True
    ) -> tuple[dict[str, float], list[dict[str, float]]]:
        """Every figure of uint8 images [N, 1, 28, 28], and with `labels` int64 [N] those of each digit.

        Args:
            seed: of subsets and splits.
            memorised: False leaves out the distances to training digits, which say nothing about training digits.
        """
        images = images.to(self.train_images.device)
        features, probabilities = self.extractor(images)
        shown = {"black": float((images == 0).float().mean())}
        if self.extractor.knows_digits:
            shown |= self._proportions(features, probabilities.argmax(1))
        else:
            labels = None
        core = core_figures(metrics.gaussian(features), self.statistics, probabilities, seed, labels)
        scores = {
            "fid": core.fid,
            "kid": metrics.kernel_distance(self.features, features, keyed_generator("cpu", seed, "kid")).mean,
            "is": core.inception.mean,
            "is_splits": core.inception.std,
            **self._fidelity(_at_most(features, NEIGHBOURHOOD, seed))._asdict(),
            **shown,
        }
        if memorised:
            distances, _ = metrics.nearest_neighbours(images, self.train_images)
            found = metrics.memorisation(distances, self.test_distances)
            scores |= {f"nearest_{name}": value for name, value in found._asdict().items()}
        if labels is None or core.label_accuracy is None:
            return scores, []
        scores["label_accuracy"] = core.label_accuracy
        labels = labels.to(features.device)
        return scores, [self._score_digit(digit, features, probabilities, labels) for digit in range(NUM_CLASSES)]

    def _proportions(self, features: Tensor, classes: Tensor) -> dict[str, float]:
        """The share of each digit among the samples, and the FID if these shares were right."""
        right = metrics.reweighted_gaussian(features, classes, self.shares)
        fid = metrics.frechet_distance(right, self.statistics) if right else math.nan
        return {"fid_reweighted": fid, **_named_shares(classes.bincount(minlength=NUM_CLASSES) / len(classes))}

    def _fidelity(self, features: Tensor) -> metrics.Fidelity:
        return metrics.fidelity(self.neighbours, features, real_radius=self.radius)

    def _score_digit(self, digit: int, features: Tensor, probabilities: Tensor, labels: Tensor) -> dict[str, float]:
        chosen = labels == digit
        real = self.features[self.labels == digit]
        fake = features[chosen]
        return {
            "fid": metrics.frechet_distance(metrics.gaussian(fake), metrics.gaussian(real)),
            **metrics.fidelity(real, fake)._asdict(),
            "label_accuracy": metrics.label_accuracy(probabilities[chosen], labels[chosen]),
        }


def _named_shares(shares: Tensor) -> dict[str, float]:
    return {f"share_{digit}": float(share) for digit, share in enumerate(shares)}


def _at_most(features: Tensor, n: int, seed: int) -> Tensor:
    """A random `n` of the rows, or all of fewer. Figures of neighbourhoods need equal sizes to be comparable."""
    if len(features) <= n:
        return features
    return features[torch.randperm(len(features), generator=keyed_generator("cpu", seed, "subset"))[:n].to(features.device)]
