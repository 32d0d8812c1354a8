"""scoring/metrics.py, against independent implementations and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from scoring import metrics


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(n: int, d: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    g = rng(seed)
    return torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g) + shift


def sqrtm_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The formula of the paper, with scipy's matrix root."""
    a, b = a.double().numpy(), b.double().numpy()
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(s @ t).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root))


def test_variety_is_the_ratio_of_total_variances():
    real = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))
    whole = metrics.gaussian(real)
    assert metrics.variety(whole, whole) == 1
    assert metrics.variety(metrics.gaussian(real / 2 + 3), whole) == pytest.approx(0.25)
    assert metrics.variety(metrics.gaussian(real[:1].expand(50, 8)), whole) == 0


def test_frechet_distance_against_sqrtm():
    a, b = correlated(500, 32, 1), correlated(400, 32, 2, shift=0.3)
    ours = metrics.frechet_distance(metrics.gaussian(a), metrics.gaussian(b))
    assert ours == pytest.approx(sqrtm_distance(a, b), rel=1e-8)


def test_frechet_distance_against_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flatten(nn.Module):
        num_features = 48

        def forward(self, images):
            return images.flatten(1)[:, :48].double()

    a, b = torch.rand(300, 3, 4, 4), torch.rand(200, 3, 4, 4) ** 2
    theirs = FrechetInceptionDistance(feature=Flatten(), normalize=True, input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    ours = metrics.frechet_distance(*(metrics.gaussian(Flatten()(x)) for x in (a, b)))
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_frechet_distance_of_known_gaussians():
    """For commuting covariances: |m|^2 + sum (sqrt s - sqrt t)^2."""
    s, t, m = torch.tensor([4.0, 9.0, 0.0]), torch.tensor([1.0, 16.0, 25.0]), torch.tensor([1.0, 2.0, 2.0])
    a = metrics.Gaussian(torch.zeros(3).double(), torch.diag(s).double(), 10)
    b = metrics.Gaussian(m.double(), torch.diag(t).double(), 10)
    assert metrics.frechet_distance(a, b) == pytest.approx(9 + 1 + 1 + 25)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(b, a))


def test_frechet_distance_of_a_collapsed_model():
    """All samples are equal, so their covariance is zero."""
    real = correlated(1000, 64, 3)
    collapsed = real[:1].repeat(50, 1)
    statistics = metrics.gaussian(real)
    expected = float((collapsed[0].double() - statistics.mean).square().sum() + statistics.covariance.trace())
    assert metrics.frechet_distance(metrics.gaussian(collapsed), statistics) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_fewer_samples_than_dimensions():
    real = correlated(1000, 64, 3)
    statistics, few = metrics.gaussian(real), metrics.gaussian(real[:20])
    assert metrics.frechet_distance(few, statistics) == pytest.approx(sqrtm_distance(real[:20], real), rel=1e-4)
    assert metrics.frechet_distance(few, statistics) == pytest.approx(metrics.frechet_distance(statistics, few), rel=1e-6)


def test_a_frechet_distance_that_is_not_finite_is_an_error():
    a, b = metrics.gaussian(torch.randn(9, 3)), metrics.gaussian(torch.randn(9, 3))
    with pytest.raises(ValueError, match="not finite"):
        metrics.frechet_distance(a._replace(mean=a.mean * math.nan), b)


@pytest.mark.parametrize("features", [torch.ones(1, 4), torch.ones(4), torch.full((5, 4), math.nan)])
def test_features_that_are_too_few_or_not_finite_are_refused(features):
    with pytest.raises(ValueError, match="features"):
        metrics.gaussian(features)


def test_inception_score_against_torchmetrics():
    """With one split, so that the shuffle does not matter."""
    from torchmetrics.image.inception import InceptionScore

    class Logits(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :10].float() / 40

    images = torch.randint(0, 256, (400, 3, 8, 8), dtype=torch.uint8)
    theirs = InceptionScore(feature=Logits(), splits=1)
    theirs.update(images)
    ours = metrics.inception_score(Logits()(images).softmax(1), rng(), splits=1)
    assert ours.mean == pytest.approx(float(theirs.compute()[0]), rel=1e-5)


def test_inception_score_of_known_distributions():
    certain = torch.eye(10).repeat(100, 1)
    assert metrics.inception_score(certain, rng(), splits=1).mean == pytest.approx(10)
    assert metrics.inception_score(torch.full((100, 10), 0.1), rng()).mean == pytest.approx(1)
    assert metrics.inception_score(certain[:1].repeat(100, 1), rng()).mean == pytest.approx(1)  # a single class
    ten = metrics.inception_score(certain, rng(), splits=10)
    assert 9 < ten.mean < 10
    assert ten.std > 0


def test_inception_score_needs_a_row_for_each_split():
    with pytest.raises(ValueError, match="at least 10 rows"):
        metrics.inception_score(torch.eye(5), rng())


def test_kernel_distance_against_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    a, b = correlated(200, 16, 4).double(), correlated(200, 16, 5, shift=0.5).double()
    ours = metrics.kernel_distance(
        a, b, rng(), subsets=1, subset_size=200
    )  # one subset of all rows: the order does not matter
    assert ours.mean == pytest.approx(float(poly_mmd(a, b)), rel=1e-9)


def test_kernel_distance_of_equal_distributions_is_zero_on_average():
    same = metrics.kernel_distance(torch.randn(3000, 8), torch.randn(3000, 8), rng(), subsets=50, subset_size=200)
    assert abs(same.mean) < 3 * same.std / math.sqrt(50) + 1e-3


def test_kernel_distance_of_shifted_features_is_positive():
    assert metrics.kernel_distance(torch.randn(500, 8), torch.randn(500, 8) + 1, rng()).mean > 0.1


def test_all_figures_agree_with_torch_fidelity():
    """On the same features. Each subset is the whole, so that its choice does not matter."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, fake = correlated(300, 16, 6).double(), correlated(300, 16, 7, shift=0.5).double()
    statistics = (fid_features_to_statistics(features) for features in (real, fake))
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert metrics.frechet_distance(metrics.gaussian(real), metrics.gaussian(fake)) == pytest.approx(theirs, rel=1e-8)

    theirs = isc_features_to_metric(fake, splits=1)["inception_score_mean"]
    assert metrics.inception_score(fake.softmax(1), rng(), splits=1).mean == pytest.approx(theirs, rel=1e-9)

    theirs = kid_features_to_metric(real, fake, kid_subsets=1, kid_subset_size=300, verbose=False)
    ours = metrics.kernel_distance(real, fake, rng(), subsets=1, subset_size=300)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)

    theirs = prc_features_to_metric(fake, real, prc_neighborhood=5, verbose=False)
    ours = metrics.fidelity(real, fake, k=5)
    assert 0 < ours.precision != ours.recall < 1
    assert (ours.precision, ours.recall) == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)


def brute_fidelity(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """The definitions, in loops."""

    def radius(points, i):
        return sorted(np.linalg.norm(points[i] - q) for j, q in enumerate(points) if j != i)[k - 1]

    real_radius = [radius(real, i) for i in range(len(real))]
    fake_radius = [radius(fake, i) for i in range(len(fake))]
    distance = np.array([[np.linalg.norm(r - f) for f in fake] for r in real])
    in_real = distance <= np.array(real_radius)[:, None]
    in_fake = distance <= np.array(fake_radius)[None]
    return in_real.any(0).mean(), in_fake.any(1).mean(), in_real.sum() / (k * len(fake)), in_real.any(1).mean()


def test_fidelity_against_the_definitions(monkeypatch):
    real, fake = torch.randn(70, 3).double(), torch.randn(50, 3).double() * 1.3 + 0.4
    monkeypatch.setattr(metrics, "CHUNK", 16)  # smaller than the features, so that there are several chunks
    assert metrics.fidelity(real, fake, k=3) == pytest.approx(brute_fidelity(real.numpy(), fake.numpy(), 3))


def test_samples_of_the_real_distribution_have_high_precision():
    assert metrics.fidelity(torch.randn(1000, 4), torch.randn(1000, 4)).precision > 0.9


def test_samples_of_one_mode_have_high_precision_but_low_recall_and_coverage():
    one_mode = metrics.fidelity(torch.randn(1000, 4), torch.randn(1000, 4) * 0.1)
    assert one_mode.precision > 0.95
    assert one_mode.recall < 0.05
    assert one_mode.coverage < 0.3


def test_samples_far_from_all_real_features_score_zero():
    assert metrics.fidelity(torch.randn(1000, 4), torch.randn(1000, 4) + 20) == (0, 0, 0, 0)


def test_fidelity_needs_more_samples_than_neighbours():
    with pytest.raises(ValueError, match="at least 6"):
        metrics.fidelity(torch.randn(1000, 4), torch.randn(5, 4))


@pytest.fixture
def train():
    return torch.rand(500, 1, 6, 6)


@pytest.fixture
def other_images():
    return torch.rand(300, 1, 6, 6)


def test_the_nearest_neighbour_of_a_training_image_is_itself(train):
    distance, index = metrics.nearest_neighbours(train[:40], train)
    assert torch.equal(index, torch.arange(40))
    assert distance.max() < 1e-2


def test_nearest_neighbours_against_the_definition(train, other_images):
    expected = (other_images[:, None] - train[None]).flatten(2).norm(dim=2).min(1)
    distance, index = metrics.nearest_neighbours(other_images, train)
    assert torch.allclose(distance, expected.values, atol=1e-4)
    assert torch.equal(index, expected.indices)


def test_memorisation_of_copies_is_complete(train, other_images):
    samples, test = (metrics.nearest_neighbours(images, train)[0] for images in (train[:100] + 0.001, other_images))
    copies = metrics.memorisation(samples, test)
    assert copies.share_close == 1
    assert copies.median_ratio < 0.1
    assert copies.percentile_ratio < 0.1


def test_memorisation_of_new_images_is_that_of_test_images(train, other_images):
    new = torch.rand(2000, 1, 6, 6)
    samples, test = (metrics.nearest_neighbours(images, train)[0] for images in (new, other_images))
    found = metrics.memorisation(samples, test)
    assert found.share_close < 0.05
    assert found.median_ratio == pytest.approx(1, abs=0.05)


def test_label_accuracy_is_the_share_of_right_predictions():
    assert metrics.label_accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75


def test_an_estimate_is_mean_and_standard_deviation():
    assert metrics.estimate([1.0, 2.0, 3.0]) == (2.0, 1.0)


def test_class_distances_compare_equal_classes():
    features, labels = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)), torch.arange(400) % 4
    moved = features + torch.tensor([0.0, 1.0, 2.0, 3.0])[labels][:, None]
    a, b = (metrics.class_gaussians(x, labels, 4) for x in (features, moved))
    assert metrics.class_frechet_distances(a, b) == pytest.approx([6 * shift**2 for shift in range(4)], abs=1e-6)


def test_a_class_that_is_too_small_has_no_distance():
    labels = torch.tensor([0] * 9 + [1])
    classes = metrics.class_gaussians(torch.randn(10, 3), labels, 3)
    assert classes[0].n == 9
    assert classes[1:] == [None, None]
    distances = metrics.class_frechet_distances(classes, classes)
    assert distances[0] < 1e-9
    assert all(math.isnan(value) for value in distances[1:])
