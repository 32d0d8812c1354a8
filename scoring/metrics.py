"""The metrics: FID, inception score, KID, precision and recall, copies. Pure functions from tensors to numbers.

Features are activations [N, D] of some extractor; probabilities are class probabilities [N, K]. Sums that cancel are taken
in float64. The caller has to state the extractor, the reference and the sample size of a number.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1000  # rows of a distance matrix held at a time


class Gaussian(NamedTuple):
    """Mean [D] and unbiased covariance [D, D], float64, of `n` features."""

    mean: Tensor
    covariance: Tensor
    n: int


class Estimate(NamedTuple):
    """A mean over repetitions and their standard deviation (n - 1 in the denominator)."""

    mean: float
    std: float


class Fidelity(NamedTuple):
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020). Density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


class Memorisation(NamedTuple):
    """Distances of samples to their nearest training images, compared with those of test images; see `memorisation`."""

    median_ratio: float
    percentile_ratio: float
    share_close: float


def estimate(values: list[float]) -> Estimate:
    """Mean and standard deviation of repeated measurements. The deviation of a single one is nan."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return Estimate(float(tensor.mean()), float(tensor.std()) if len(values) > 1 else float("nan"))


def gaussian(features: Tensor) -> Gaussian:
    """Fit a Gaussian to features [N, D].

    Raises:
        ValueError: fewer than two features, or one that is not finite.
    """
    _check_features(features)
    features = features.double()
    return Gaussian(features.mean(0), torch.cov(features.T), len(features))


def reweighted_gaussian(features: Tensor, classes: Tensor, shares: Tensor) -> Gaussian | None:
    """The Gaussian of features [N, D] as it would be if their classes, int64 [N], had the given `shares` [K].

    It shows whether a large FID comes from bad images, or from good ones in wrong proportions. None: a class is missing.
    """
    found = classes.bincount(minlength=len(shares)) / len(classes)
    if ((found == 0) & (shares > 0)).any():
        return None
    weights = (shares / found.clamp(min=1e-9))[classes].double()  # [N]
    features = features.double()
    mean = (weights[:, None] * features).sum(0) / weights.sum()
    return Gaussian(mean, torch.cov(features.T, aweights=weights), len(features))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians: FID for Inception features (Heusel et al. 2017, eq. 6).

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). The trace of the root is taken over the eigenvalues of the symmetric
    R S_b R with R = S_a^(1/2), which has the spectrum of S_a S_b. That needs no root of a non-symmetric matrix, and is exact
    for singular covariances too (few samples, collapsed models).

    Raises:
        ValueError: a mean or covariance is not finite.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    trace = a.covariance.trace() + b.covariance.trace() - 2 * cross
    distance = float((a.mean - b.mean).square().sum() + trace)
    if not math.isfinite(distance):  # max(0, nan) would be a perfect 0
        raise ValueError("the Fréchet distance of Gaussians that are not finite is not defined")
    return max(0.0, distance)


def variety(fake: Gaussian, real: Gaussian) -> float:
    """Total variance of generated features over that of real ones. 1: as varied as real images; 0: one image."""
    return float(fake.covariance.trace() / real.covariance.trace())


def inception_score(probabilities: Tensor, rng: torch.Generator, splits: int = 10) -> Estimate:
    """exp E KL(p(y|x) || p(y)) over `splits` shuffled parts (Salimans et al. 2016, section 4), in 1..K. Larger is better.

    Args:
        probabilities: [N, K], rows summing to 1.
        rng: generator of the shuffle, on the CPU.

    Raises:
        ValueError: fewer probabilities than splits, or one that is not finite.
    """
    if len(probabilities) < splits or not torch.isfinite(probabilities).all():
        raise ValueError(f"inception score needs at least {splits} rows of finite probabilities")
    shuffled = probabilities.double()[torch.randperm(len(probabilities), generator=rng).to(probabilities.device)]
    scores = []
    for part in shuffled.tensor_split(splits):
        entropy = -torch.special.entr(part).sum(1).mean()  # of p(y|x), negated
        marginal_entropy = torch.special.entr(part.mean(0)).sum()
        scores.append(float((marginal_entropy + entropy).exp()))
    return estimate(scores)


def kernel_distance(
    real: Tensor, fake: Tensor, rng: torch.Generator, subsets: int = 100, subset_size: int = 1000
) -> Estimate:
    """Kernel inception distance: unbiased squared MMD, kernel (x.y / D + 1)^3 (Binkowski et al. 2018, section 4).

    Args:
        real, fake: features [N, D], [M, D]; `subset_size` is cut to the smaller of N and M.
        rng: generator of the subsets (drawn without replacement), on the CPU.

    Returns:
        Mean and standard deviation over the subsets. The mean may be slightly negative for equal distributions.
    """
    _check_features(real)
    _check_features(fake)
    m = min(subset_size, len(real), len(fake))

    def draw(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=rng)[:m].to(features.device)].double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_off_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.diagonal().sum()) / (m * (m - 1))

    values = []
    for _ in range(subsets):
        x, y = draw(real), draw(fake)
        within = mean_off_diagonal(kernel(x, x)) + mean_off_diagonal(kernel(y, y))
        values.append(float(within - 2 * kernel(x, y).mean()))
    return estimate(values)


def fidelity(real: Tensor, fake: Tensor, k: int = 5, real_radius: Tensor | None = None) -> Fidelity:
    """Precision, recall, density and coverage from k-nearest-neighbour balls around features [N, D] and [M, D].

    Precision: share of samples inside a real ball. Recall: share of real features inside a sample's ball. Density: mean
    number of real balls around a sample, over k. Coverage: share of real balls that hold a sample.

    Args:
        real_radius: `ball_radius(real, k)`, if it is known.

    Raises:
        ValueError: a side has `k` features or fewer, or one that is not finite.
    """
    for features in (real, fake):
        _check_features(features, at_least=k + 1)
    real_radius = ball_radius(real, k) if real_radius is None else real_radius
    fake_radius = ball_radius(fake, k)
    balls = torch.zeros(len(fake), device=fake.device)  # real balls around each sample
    recalled, covered = 0, 0
    for rows, radius in zip(real.split(CHUNK), real_radius.split(CHUNK)):
        distance = torch.cdist(rows, fake)  # [rows, M]
        inside = distance <= radius[:, None]
        balls += inside.sum(0)
        covered += int(inside.any(1).sum())
        recalled += int((distance <= fake_radius).any(1).sum())
    return Fidelity(
        precision=float((balls > 0).float().mean()),
        recall=recalled / len(real),
        density=float(balls.mean()) / k,
        coverage=covered / len(real),
    )


def ball_radius(features: Tensor, k: int = 5) -> Tensor:
    """Distance [N] of each feature to its k-th nearest other one."""
    radii = []
    for start in range(0, len(features), CHUNK):
        distance = torch.cdist(features[start : start + CHUNK], features)
        own = torch.arange(len(distance), device=features.device)
        distance[own, own + start] = torch.inf
        radii.append(distance.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def nearest_neighbours(queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance [N] and index [N] of the nearest of `references` [M, ...] for each of `queries` [N, ...]."""
    queries, references = queries.flatten(1).float(), references.flatten(1).float()
    found = [torch.cdist(chunk, references).min(dim=1) for chunk in queries.split(CHUNK)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def memorisation(sample_distances: Tensor, test_distances: Tensor) -> Memorisation:
    """Compare distances [N], [M] of samples and of test images to their nearest training images.

    Returns:
        The ratios of the medians and of the first percentiles; copies push both towards 0. And the share of samples that are
        closer than the test images' first percentile; images as new as the test images have 0.01.
    """
    sample_distances, test_distances = sample_distances.double(), test_distances.double()
    close = test_distances.quantile(0.01)
    return Memorisation(
        median_ratio=float(sample_distances.median() / test_distances.median()),
        percentile_ratio=float(sample_distances.quantile(0.01) / close),
        share_close=float((sample_distances < close).double().mean()),
    )


def label_accuracy(probabilities: Tensor, labels: Tensor) -> float:
    """Share of rows of [N, K] whose largest probability is at the label, int64 [N]."""
    return float((probabilities.argmax(1) == labels).double().mean())


def class_gaussians(features: Tensor, labels: Tensor, num_classes: int) -> list[Gaussian | None]:
    """A Gaussian of the features [N, D] of each class. None: a class with fewer than two features."""
    parts = [features[labels == label] for label in range(num_classes)]
    return [gaussian(part) if len(part) > 1 else None for part in parts]


def class_frechet_distances(a: list[Gaussian | None], b: list[Gaussian | None]) -> list[float]:
    """The Fréchet distance of each class. nan: a side has too few features of the class."""
    return [frechet_distance(x, y) if x and y else math.nan for x, y in zip(a, b, strict=True)]


def _check_features(features: Tensor, at_least: int = 2) -> None:
    if features.ndim != 2 or len(features) < at_least:
        raise ValueError(f"at least {at_least} features in rows are needed, not {list(features.shape)}")
    if not torch.isfinite(features).all():
        raise ValueError("features must be finite")
