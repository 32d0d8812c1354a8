"""The shipped files: their sizes, and that their figures are what the shipped weights give."""

from __future__ import annotations

import csv
import json
import runpy

import pytest
import torch
from conftest import ROOT

import data
import evaluation
from scoring import metrics
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
    limits = {"classifier.pt": 1e6}
    limits |= {f"best_{prefix}_{part}.pt": 4e6 for prefix in ("GAN", "CGAN") for part in "GD"}
    limits["best_DIFF.pt"] = 16e6
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
    assert shipped.statistics.whole.n == measured.n == 10_000
    assert metrics.frechet_distance(shipped.statistics.whole, measured) < 1e-4
    assert [part.n for part in shipped.statistics.classes] == test_digits.labels.bincount().tolist()
    assert set(shipped.floors) == set(evaluation.FLOOR_SIZES)


def test_the_floor_is_what_training_digits_reach(extractor, mnist_dir):
    """At one size, by both references; more samples give a lower floor."""
    train = data.load_digits("mnist", "train", mnist_dir).subset(12_000, "floor test")
    features, _ = extractor(train.images)
    for split in ("train", "test"):
        reference = evaluation.load_reference(split, extractor)
        floors = [reference.floors[n].fid.mean for n in evaluation.FLOOR_SIZES]
        assert floors == sorted(floors, reverse=True)
        measured, shipped = evaluation.floor(features, train.labels, 1000, reference.statistics), reference.floors[1000]
        assert measured.fid.mean == pytest.approx(shipped.fid.mean, abs=3 * shipped.fid.std)
        assert sum(measured.class_fids) == pytest.approx(sum(shipped.class_fids), rel=0.3)
        assert reference.ratio(floors[1], 1000) == 1 and reference.ratio(1.0, 1234) != reference.ratio(1.0, 1234)  # nan
        assert reference.class_ratios(shipped.class_fids, 1000) == [1.0] * 10


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


class RealDigits(torch.nn.Module):
    """A perfect conditional generator, but that it draws the digit `shift` above the one asked for."""

    def __init__(self, digits: data.Digits, shift: int):
        super().__init__()
        self.shift = shift
        self.images = [data.to_model_range(digits.images[digits.labels == digit]) for digit in range(10)]

    def sample(self, n: int, labels: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        digits = (labels + self.shift) % 10
        return torch.stack([self.images[digit][i % len(self.images[digit])] for i, digit in enumerate(digits.tolist())])


def test_a_digit_that_was_not_asked_for_shows(extractor, test_digits, mnist_dir):
    """Label accuracy and per-digit FID see what the FID over all digits cannot."""
    train = data.load_digits("mnist", "train", mnist_dir)
    scorer = evaluation.training_scorer(train, extractor, 1000, seed=0, conditional=True)
    right, wrong = (scorer(RealDigits(test_digits, shift)) for shift in (0, 1))
    assert right["label_accuracy"] > 0.98 and wrong["label_accuracy"] < 0.02
    assert right["fid"] < 3 and wrong["fid"] < 6
    for digit in range(10):
        assert right[f"fid_ratio_{digit}"] < 3 and wrong[f"fid_ratio_{digit}"] > 30


def test_a_conditional_model_is_asked_for_the_real_proportions(test_digits):
    labels = evaluation.proportional_labels(test_digits, 10_000, seed=0)
    assert torch.equal(labels.bincount(), test_digits.labels.bincount()) and not torch.equal(labels, test_digits.labels)
    again, other = (evaluation.proportional_labels(test_digits, 10_000, seed) for seed in (0, 1))
    assert torch.equal(labels, again) and not torch.equal(labels, other)
    repeated = evaluation.proportional_labels(test_digits.subset(30, "few"), 70, seed=0)
    assert torch.equal(repeated[:30], repeated[30:60]) and len(repeated) == 70


# The trainings by their title: the files that each has shipped, the generator first
EXPORTS = {
    "gan": ["best_GAN_G.pt", "best_GAN_D.pt"],
    "cgan": ["best_CGAN_G.pt", "best_CGAN_D.pt"],
    "diffusion": ["best_DIFF.pt"],
}


@pytest.mark.parametrize("title", EXPORTS)
def test_the_log_and_the_checkpoint_agree(title):
    rows = read_csv(f"{title}_training_log.csv")
    assert [int(row["epoch"]) for row in rows] == list(range(1, len(rows) + 1))
    best = min((row for row in rows if row["fid"]), key=lambda row: float(row["fid"]))
    for name in EXPORTS[title]:
        meta = load_model(CHECKPOINTS / name).meta
        assert meta["epoch"] == int(best["epoch"])
        assert f"{meta['metrics']['fid']:.6g}" == best["fid"]
        assert meta["flags"]["limit"] == 0 and meta["flags"]["dataset"] == "mnist"


@pytest.mark.parametrize("title", ["gan", "cgan"])
def test_the_shipped_generator_scores_what_its_log_says(extractor, mnist_dir, title):
    """Half precision and another machine move the figure by less than a few per cent."""
    generator = load_generator(CHECKPOINTS / EXPORTS[title][0])
    flags, figures = generator.meta["flags"], generator.meta["metrics"]
    train = data.load_digits("mnist", "train", mnist_dir)
    conditional = generator.config.num_classes > 0
    scores = evaluation.training_scorer(train, extractor, flags["eval_samples"], flags["seed"], conditional)(generator)
    assert scores["fid"] == pytest.approx(figures["fid"], rel=0.05)
    assert scores["is"] == pytest.approx(figures["is"], abs=0.05)
    assert scores.get("label_accuracy", 1) == pytest.approx(figures.get("label_accuracy", 1), abs=0.002)


def test_the_shipped_diffusion_model_scores_what_its_log_says(extractor, mnist_dir):
    """With fewer samples, as they take long: compared by what lies above the floor of either size."""
    generator = load_generator(CHECKPOINTS / "best_DIFF.pt")
    flags, figures = generator.meta["flags"], generator.meta["metrics"]
    options = {name: flags[name] for name in ("sampler", "steps", "eta", "guidance")}
    train = data.load_digits("mnist", "train", mnist_dir)
    scores = evaluation.training_scorer(train, extractor, 500, flags["seed"], False, options)(generator)
    floors = evaluation.load_reference("train", extractor).floors
    excess = figures["fid"] - floors[flags["eval_samples"]].fid.mean
    assert scores["fid"] - floors[500].fid.mean == pytest.approx(excess, abs=1)


def test_the_readme_is_what_the_report_writes():
    """Its results are those of metrics.json and of the other files in reports/."""
    report, readme = runpy.run_path(str(ROOT / "report.py")), (ROOT / "README.md").read_text()
    measured = report["read"](ROOT / "reports")
    section = report["results"](measured, report["discussion"](measured))
    assert f"{report['BEGIN']}\n{section}\n{report['END']}" in readme
    section = report["render"](report["PORTUGUESE"], measured)
    assert f"{report['BEGIN']}\n{section}\n{report['END']}" in (ROOT / report["PORTUGUESE_NAME"]).read_text()
    pictures = [f"samples/{title}_progress.gif" for title in EXPORTS]
    for name in [*pictures, "samples/infer_side_by_side.png", "samples/diffusion_denoising.gif"]:
        assert name in readme and (ROOT / name).stat().st_size > 10_000


def test_the_figures_are_those_of_the_shipped_checkpoints():
    rows = json.loads((ROOT / "reports" / "metrics.json").read_text())["rows"]
    scored = {row["checkpoint"]: row["sha256"] for row in rows if row.get("checkpoint")}
    assert scored == {f"checkpoints/{names[0]}": file_sha256(CHECKPOINTS / names[0]) for names in EXPORTS.values()}
    best = file_sha256(CHECKPOINTS / "best_DIFF.pt")[:16]
    assert {row["checkpoint"] for row in read_csv("samplers.csv")} == {best}
    assert {row["checkpoint"] for row in read_csv("pitfalls.csv") if row["model"] == "DDPM"} == {best}
