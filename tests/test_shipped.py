"""The shipped files: their sizes, and that their figures are what the shipped weights give."""

from __future__ import annotations

import csv

import pytest
import torch
from conftest import ROOT

import data
import evaluation
import metrics
from checkpoint import file_sha256, load_generator, load_model, save_model
from utils import keyed_generator

CHECKPOINTS = ROOT / "checkpoints"


@pytest.fixture(scope="module")
def extractor():
    return evaluation.Extractor()


@pytest.fixture(scope="module")
def test_digits(mnist_dir):
    return data.load_digits("mnist", "test", mnist_dir)


def read_csv(name: str) -> list[dict[str, str]]:
    with (ROOT / "reports" / name).open() as file:
        return list(csv.DictReader(file))


def test_sizes():
    limits = {"classifier.pt": 1e6, "best_GAN_G.pt": 4e6, "best_GAN_D.pt": 4e6}
    for name, limit in limits.items():
        assert (CHECKPOINTS / name).stat().st_size < limit, name
    assert file_sha256(CHECKPOINTS / "classifier.pt") == evaluation.CLASSIFIER_SHA256


def test_the_classifier_is_a_good_ruler(extractor, test_digits):
    features, probabilities = extractor(test_digits.images)
    assert 64 <= features.shape[1] <= 128
    assert metrics.label_accuracy(probabilities, test_digits.labels) >= 0.995
    assert metrics.inception_score(probabilities, keyed_generator("cpu", 0, "splits")).mean >= 9.8


def test_the_reference_statistics_are_the_test_sets(extractor, test_digits):
    shipped = evaluation.load_reference("test", extractor)
    measured = metrics.gaussian(extractor(test_digits.images)[0])
    assert shipped.statistics.n == measured.n == 10_000
    assert metrics.frechet_distance(shipped.statistics, measured) < 1e-4
    assert set(shipped.floors) == set(evaluation.FLOOR_SIZES)


def test_the_floor_is_what_training_digits_reach(extractor, mnist_dir):
    """At one size, by both references; more samples give a lower floor."""
    train = data.load_digits("mnist", "train", mnist_dir).subset(12_000, "floor test")
    features, _ = extractor(train.images)
    for split in ("train", "test"):
        reference = evaluation.load_reference(split, extractor)
        floors = [reference.floors[n].mean for n in evaluation.FLOOR_SIZES]
        assert floors == sorted(floors, reverse=True)
        measured = evaluation.floor(features, 1000, reference.statistics)
        assert measured.mean == pytest.approx(reference.floors[1000].mean, abs=3 * reference.floors[1000].std)
        assert reference.ratio(floors[1], 1000) == 1 and reference.ratio(1.0, 1234) != reference.ratio(1.0, 1234)  # nan


def test_a_statistics_file_of_another_classifier_is_refused(extractor, tmp_path):
    content = evaluation.read_tensors(CHECKPOINTS / evaluation.STATISTICS_NAME)
    evaluation.write_tensors(tmp_path / "other.pt", {**content, "classifier_sha256": "0" * 64})
    with pytest.raises(evaluation.ExpectedError, match="another classifier"):
        evaluation.load_reference("train", extractor, tmp_path / "other.pt")
    evaluation.write_tensors(tmp_path / "foreign.pt", {"format": 1, "classifier_sha256": extractor.sha256})
    with pytest.raises(evaluation.ExpectedError, match="no statistics file"):
        evaluation.load_reference("train", extractor, tmp_path / "foreign.pt")


def test_another_classifier_is_no_ruler(extractor, tmp_path):
    network = load_model(CHECKPOINTS / "classifier.pt")
    with torch.no_grad():
        network.head.bias[0] += 0.1
    save_model(tmp_path / "classifier.pt", "classifier", network, {})
    with pytest.raises(evaluation.ExpectedError, match="not the pinned classifier"):
        evaluation.Extractor(path=tmp_path / "classifier.pt")
    assert evaluation.Extractor(path=tmp_path / "classifier.pt", sha256="").sha256 != extractor.sha256


def test_the_score_moves_with_the_damage(extractor, test_digits):
    """Noise and blur are worse the stronger they are; real digits are best."""
    reference = evaluation.load_reference("test", extractor)
    few = test_digits.subset(2000, "damage").images

    def fid(images: torch.Tensor) -> float:
        return metrics.frechet_distance(metrics.gaussian(extractor(images)[0]), reference.statistics)

    noise = torch.randn(few.shape, generator=keyed_generator("cpu", "noise"))
    noisy = [fid((few + level * noise).clamp(0, 255).to(torch.uint8)) for level in (0, 8, 32, 64)]
    assert noisy == sorted(noisy) and noisy[1] > 1.2 * noisy[0]
    blurred = fid(torch.nn.functional.avg_pool2d(few.float(), 3, stride=1, padding=1).round().to(torch.uint8))
    assert blurred > 3 * noisy[0]


def test_the_log_and_the_checkpoint_agree():
    rows = read_csv("gan_training_log.csv")
    assert [int(row["epoch"]) for row in rows] == list(range(1, len(rows) + 1))
    best = min((row for row in rows if row["fid"]), key=lambda row: float(row["fid"]))
    for name in ("best_GAN_G.pt", "best_GAN_D.pt"):
        meta = load_model(CHECKPOINTS / name).meta
        assert meta["epoch"] == int(best["epoch"])
        assert f"{meta['metrics']['fid']:.6g}" == best["fid"]
        assert meta["flags"]["limit"] == 0 and meta["flags"]["dataset"] == "mnist"


def test_the_shipped_generator_scores_what_its_log_says(extractor):
    """Half precision and another machine move the figure by less than a few per cent."""
    generator = load_generator(CHECKPOINTS / "best_GAN_G.pt")
    flags, figures = generator.meta["flags"], generator.meta["metrics"]
    reference = evaluation.load_reference("train", extractor)
    scores = evaluation.Scorer(extractor, reference, flags["eval_samples"], flags["seed"])(generator)
    assert scores["fid"] == pytest.approx(figures["fid"], rel=0.05)
    assert scores["is"] == pytest.approx(figures["is"], abs=0.05)


def test_the_readme_states_the_measured_figures():
    readme = (ROOT / "README.md").read_text()
    for row in read_csv("metrics.csv"):
        for name in ("fid", "is", "precision", "recall"):
            assert f"{float(row[name]):.3f}" in readme, (row["model"], name)
    for name in ("samples/infer_side_by_side.png", "samples/gan_progress.gif"):
        assert name in readme and (ROOT / name).stat().st_size > 10_000
