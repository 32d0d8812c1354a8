"""scoring/two_sample.py with a small budget. benchmarks/self_check.py holds what the full budget must see."""

from __future__ import annotations

import pytest
import torch

import data
from scoring import two_sample
from scoring.extractor import Extractor
from scoring.scorer import FullScorer
from scoring.two_sample import two_sample_test

SIZES = {"TRAIN": 600, "JUDGED": 400, "NEEDED": 1000, "EPOCHS": 3}


@pytest.fixture
def small_budget(monkeypatch):
    for name, value in SIZES.items():
        monkeypatch.setattr(two_sample, name, value)


@pytest.fixture
def digits(mnist_dir) -> torch.Tensor:
    return data.load_digits("mnist", "train", mnist_dir).subset(2000, "two-sample test").images


def test_real_digits_are_not_told_from_real_digits(small_budget, digits):
    assert two_sample_test(digits[:1000], digits[1000:]).accuracy == pytest.approx(0.5, abs=0.06)


def test_inverted_digits_are_told_from_real_digits(small_budget, digits):
    found = two_sample_test(255 - digits[:1000], digits[1000:])
    assert min(found) > 0.99


def test_the_noise_has_the_deviation_of_so_many_grey_levels(digits):
    exact, noisy = (two_sample._seen(digits, noise) for noise in (0, 8))
    assert torch.equal(exact, data.to_model_range(digits))
    assert float((noisy - exact).std()) * 127.5 == pytest.approx(8, rel=0.01)


def test_the_same_images_give_the_same_accuracy_and_leave_the_random_state_alone(small_budget, digits):
    state = torch.get_rng_state()
    first, again = (two_sample_test(digits[:1000], digits[1000:]) for _ in range(2))
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)


def test_too_few_images_are_refused(digits):
    with pytest.raises(ValueError, match="16000 images"):
        two_sample_test(digits, digits)


@pytest.fixture
def scorer(mnist_dir) -> FullScorer:
    train, test = (data.load_digits("mnist", split, mnist_dir).subset(2000, "some") for split in ("train", "test"))
    return FullScorer(test, test, train, Extractor())


def test_the_scorer_compares_with_training_digits(small_budget, scorer):
    figures = scorer.told_apart(torch.zeros(1000, 1, 28, 28, dtype=torch.uint8))
    assert figures["two_sample"] == max(figures["two_sample_plain"], figures["two_sample_noisy"]) > 0.99
    assert scorer.told_apart()["two_sample"] == pytest.approx(0.5, abs=0.06)


def test_the_scorer_leaves_it_out_for_too_few_samples(scorer):
    assert scorer.told_apart(torch.zeros(1000, 1, 28, 28, dtype=torch.uint8)) == {}


def test_the_scorer_counts_black_pixels_and_digits(scorer):
    figures, _ = scorer.score(scorer.test_images[:1000], seed=0)
    assert figures["black"] == float((scorer.test_images[:1000] == 0).float().mean())
    read = scorer.probabilities[:1000].argmax(1).bincount(minlength=10) / 1000
    assert [figures[f"share_{digit}"] for digit in range(10)] == pytest.approx(read.tolist())


def test_reweighting_removes_what_wrong_shares_add_to_the_fid(scorer):
    fewer_ones = scorer.test_images[(scorer.labels != 1) | (torch.arange(2000) % 3 == 0)]
    figures, _ = scorer.score(fewer_ones, seed=0)
    assert figures["fid_reweighted"] < 0.5 * figures["fid"]


def test_reweighting_is_not_defined_without_a_digit(scorer):
    figures, _ = scorer.score(scorer.test_images[scorer.labels != 1], seed=0)
    assert figures["fid_reweighted"] != figures["fid_reweighted"]  # nan
    assert figures["share_1"] < 0.01
