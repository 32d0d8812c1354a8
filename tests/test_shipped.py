"""The shipped files: their sizes, and that the shipped weights give the shipped figures."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from conftest import ROOT

import data
from checkpoint import file_sha256, load_generator, load_model, read_tensors, save_model, write_tensors
from files import ExpectedError
from scoring import metrics
from scoring.extractor import CLASSIFIER_SHA256, Extractor
from scoring.reference import FLOOR_SIZES, STATISTICS_NAME, floor, load_reference
from scoring.scorer import core_figures, proportional_labels, training_scorer
from utils import keyed_generator, sampling_rng

CHECKPOINTS = ROOT / "checkpoints"


@pytest.fixture(scope="module")
def extractor():
    return Extractor()


@pytest.fixture(scope="module")
def test_digits(mnist_dir):
    return data.load_digits("mnist", "test", mnist_dir)


def read_csv(name: str) -> list[dict[str, str]]:
    with (ROOT / "reports" / name).open() as file:
        return list(csv.DictReader(file))


SIZE_LIMITS = {"classifier.pt": 1e6, "best_DIFF.pt": 16e6}
SIZE_LIMITS |= {f"best_{prefix}_{part}.pt": 4e6 for prefix in ("GAN", "CGAN") for part in "GD"}


@pytest.mark.parametrize("name", SIZE_LIMITS)
def test_checkpoints_stay_below_their_size_limits(name):
    assert (CHECKPOINTS / name).stat().st_size < SIZE_LIMITS[name]


def test_the_shipped_classifier_is_the_pinned_one():
    assert file_sha256(CHECKPOINTS / "classifier.pt") == CLASSIFIER_SHA256


def test_the_classifier_knows_the_test_digits(extractor, test_digits):
    features, probabilities = extractor(test_digits.images)
    assert 64 <= features.shape[1] <= 128
    assert metrics.label_accuracy(probabilities, test_digits.labels) >= 0.995
    assert metrics.inception_score(probabilities, keyed_generator("cpu", 0, "splits")).mean >= 9.8


def test_the_reference_statistics_are_those_of_the_test_set(extractor, test_digits):
    shipped = load_reference("test", extractor)
    measured = metrics.gaussian(extractor(test_digits.images)[0])
    assert shipped.statistics.whole.n == measured.n == 10_000
    assert metrics.frechet_distance(shipped.statistics.whole, measured) < 1e-4
    assert [part.n for part in shipped.statistics.classes] == test_digits.labels.bincount().tolist()
    assert set(shipped.floors) == set(FLOOR_SIZES)


def test_the_floor_is_what_training_digits_reach(extractor, mnist_dir):
    """Measured again at one size, against both references. More samples give a lower floor."""
    train = data.load_digits("mnist", "train", mnist_dir).subset(12_000, "floor test")
    features, _ = extractor(train.images)
    for split in ("train", "test"):
        reference = load_reference(split, extractor)
        floors = [reference.floors[n].fid.mean for n in FLOOR_SIZES]
        assert floors == sorted(floors, reverse=True)
        measured, shipped = floor(features, train.labels, 1000, reference.statistics), reference.floors[1000]
        assert measured.fid.mean == pytest.approx(shipped.fid.mean, abs=3 * shipped.fid.std)
        assert sum(measured.class_fids) == pytest.approx(sum(shipped.class_fids), rel=0.3)
        assert reference.ratio(floors[1], 1000) == 1
        assert math.isnan(reference.ratio(1.0, 1234)), "the floor of this size is not known"
        assert reference.class_ratios(shipped.class_fids, 1000) == [1.0] * 10


def test_a_statistics_file_of_another_classifier_is_refused(extractor, tmp_path):
    content = read_tensors(CHECKPOINTS / STATISTICS_NAME)
    write_tensors(tmp_path / "other.pt", {**content, "classifier_sha256": "0" * 64})
    with pytest.raises(ExpectedError, match="another classifier"):
        load_reference("train", extractor, tmp_path / "other.pt")
    write_tensors(tmp_path / "foreign.pt", {"format": 1, "classifier_sha256": extractor.sha256})
    with pytest.raises(ExpectedError, match="no statistics file"):
        load_reference("train", extractor, tmp_path / "foreign.pt")


def test_another_classifier_is_accepted_only_without_a_hash(extractor, tmp_path):
    network = load_model(CHECKPOINTS / "classifier.pt")
    with torch.no_grad():
        network.head.bias[0] += 0.1
    save_model(tmp_path / "classifier.pt", "classifier", network, {})
    with pytest.raises(ExpectedError, match="not the pinned classifier"):
        Extractor(path=tmp_path / "classifier.pt")
    assert Extractor(path=tmp_path / "classifier.pt", sha256="").sha256 != extractor.sha256


class RealDigits(torch.nn.Module):
    """A perfect conditional generator, except that it draws the digit `shift` above the chosen one."""

    def __init__(self, digits: data.Digits, shift: int):
        super().__init__()
        self.shift = shift
        self.images = [data.to_model_range(digits.images[digits.labels == digit]) for digit in range(10)]

    def sample(self, n: int, labels: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        digits = (labels + self.shift) % 10
        return torch.stack([self.images[digit][i % len(self.images[digit])] for i, digit in enumerate(digits.tolist())])


def test_wrong_digits_show_in_label_accuracy_and_the_fid_of_each_digit(extractor, test_digits, mnist_dir):
    """The FID over all digits cannot see them."""
    train = data.load_digits("mnist", "train", mnist_dir)
    scorer = training_scorer(train, extractor, 1000, seed=0, conditional=True)
    right, wrong = (scorer(RealDigits(test_digits, shift)) for shift in (0, 1))
    assert right["label_accuracy"] > 0.98
    assert wrong["label_accuracy"] < 0.02
    assert right["fid"] < 3
    assert wrong["fid"] < 6
    for digit in range(10):
        assert right[f"fid_ratio_{digit}"] < 3
        assert wrong[f"fid_ratio_{digit}"] > 30


def test_proportional_labels_have_the_shares_of_the_digits_in_another_order(test_digits):
    labels = proportional_labels(test_digits, 10_000, seed=0)
    assert torch.equal(labels.bincount(), test_digits.labels.bincount())
    assert not torch.equal(labels, test_digits.labels)


def test_the_order_of_proportional_labels_follows_from_the_seed(test_digits):
    labels, again, other = (proportional_labels(test_digits, 10_000, seed) for seed in (0, 0, 1))
    assert torch.equal(labels, again)
    assert not torch.equal(labels, other)


def test_proportional_labels_repeat_when_there_are_too_few_digits(test_digits):
    repeated = proportional_labels(test_digits.subset(30, "few"), 70, seed=0)
    assert len(repeated) == 70
    assert torch.equal(repeated[:30], repeated[30:60])


# The shipped files of each training, the generator first
EXPORTS = {
    "gan": ["best_GAN_G.pt", "best_GAN_D.pt"],
    "cgan": ["best_CGAN_G.pt", "best_CGAN_D.pt"],
    "diffusion": ["best_DIFF.pt"],
}


@pytest.mark.parametrize("title", EXPORTS)
def test_checkpoints_hold_an_epoch_of_their_log(title):
    """The best one of a GAN. The last one of the diffusion model, whose learning rate has fallen to zero there."""
    rows = read_csv(f"{title}_training_log.csv")
    assert [int(row["epoch"]) for row in rows] == list(range(1, len(rows) + 1))
    best = rows[-1] if title == "diffusion" else min((row for row in rows if row["fid"]), key=lambda row: float(row["fid"]))
    for name in EXPORTS[title]:
        meta = load_model(CHECKPOINTS / name).meta
        assert meta["epoch"] == int(best["epoch"])
        assert f"{meta['metrics']['fid']:.6g}" == best["fid"]
        assert meta["flags"]["limit"] == 0
        assert meta["flags"]["dataset"] == "mnist"


@pytest.mark.parametrize(("title", "model"), [("gan", "dcgan"), ("cgan", "cdcgan")])
def test_the_shipped_generator_scores_what_the_report_says(extractor, test_digits, title, model):
    """Half precision and another machine change the FID by a few per cent at most."""
    (row,) = (row for row in read_csv("metrics.csv") if row["model"] == model)
    generator, real = load_generator(CHECKPOINTS / EXPORTS[title][0]), load_reference("test", extractor).statistics.whole
    scores = []
    for seed in range(3):
        labels = proportional_labels(test_digits, 10_000, seed) if generator.config.num_classes else None
        features, probabilities = extractor(data.to_uint8(generator.sample(10_000, labels, sampling_rng(seed))))
        scores.append(core_figures(metrics.gaussian(features), real, probabilities, seed, labels))
    assert sum(score.fid for score in scores) / 3 == pytest.approx(float(row["fid"]), rel=0.05)
    assert sum(score.inception.mean for score in scores) / 3 == pytest.approx(float(row["is"]), abs=0.05)
    if row["label_accuracy"]:
        accuracy = sum(score.label_accuracy for score in scores) / 3
        assert accuracy == pytest.approx(float(row["label_accuracy"]), abs=0.002)


def test_the_shipped_diffusion_model_scores_what_the_table_of_samplers_says(extractor, mnist_dir):
    """Fewer samples are drawn, because they take long. So the FID above the floor of either size is compared."""
    setting = {"drawn": "class-conditional", "sampler": "dpm-solver++", "steps": "10", "guidance": "1", "seed": "1"}
    (row,) = (row for row in read_csv("samplers.csv") if setting.items() <= row.items())
    generator = load_generator(CHECKPOINTS / "best_DIFF.pt")
    options = {"sampler": row["sampler"], "steps": int(row["steps"]), "eta": float(row["eta"]), "guidance": 1.0}
    train = data.load_digits("mnist", "train", mnist_dir)
    scores = training_scorer(train, extractor, 500, 1, True, options)(generator)
    floors = load_reference("train", extractor).floors
    excess = float(row["fid"]) - floors[int(row["n"])].fid.mean
    assert scores["fid"] - floors[500].fid.mean == pytest.approx(excess, abs=1)


def test_the_figures_are_those_of_the_shipped_checkpoints():
    rows = json.loads((ROOT / "reports" / "metrics.json").read_text())["rows"]
    scored = {row["checkpoint"]: row["sha256"] for row in rows if row.get("checkpoint")}
    assert scored == {f"checkpoints/{names[0]}": file_sha256(CHECKPOINTS / names[0]) for names in EXPORTS.values()}
    best = file_sha256(CHECKPOINTS / "best_DIFF.pt")[:16]
    assert {row["checkpoint"] for row in read_csv("samplers.csv")} == {best}
    assert {row["checkpoint"] for row in read_csv("pitfalls.csv") if row["model"] == "DDPM"} == {best}


PICTURES = [*(f"{title}_progress.gif" for title in EXPORTS), "infer_side_by_side.png", "diffusion_denoising.gif"]


@pytest.mark.parametrize("name", PICTURES)
def test_a_shipped_picture_is_not_blank(name):
    assert (ROOT / "samples" / name).stat().st_size > 10_000
