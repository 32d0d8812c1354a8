"""evaluate.py and scoring/: the tables, the floor beside the models, and the figures that monitor and table share."""

from __future__ import annotations

import json
import math
import runpy

import pytest
import torch
from conftest import ROOT, SHIPPED, error_line, read_csv, reading_fewer_digits, tiny_ddpm

from checkpoint import file_sha256
from data import load_digits, to_model_range
from scoring import two_sample
from scoring.extractor import Extractor
from scoring.reference import Reference, summary
from scoring.scorer import FullScorer, Scorer, proportional_labels
from scoring.table import Table, summarise

SHIPPED_CONDITIONAL = ROOT / "checkpoints" / "best_CGAN_G.pt"
REAL, TEST, GAN, DDPM, CGAN, DDPM_BY_DIGIT = (
    "real training digits",
    "real test digits",
    "dcgan",
    "ddpm",
    "cdcgan",
    "ddpm, by digit",
)


@pytest.fixture(scope="module")
def evaluated(mnist_dir, tmp_path_factory):
    """The folder of an evaluation of three models on fewer digits, with a small two-sample test."""
    folder = tmp_path_factory.mktemp("evaluated")
    models = [SHIPPED, SHIPPED_CONDITIONAL, tiny_ddpm(folder)]
    args = ["--models", *models, "--n", 300, "--seeds", 2, "--steps", 2, "--guidance", 1.5, "--device", "cpu"]
    with reading_fewer_digits(train=2000, test=600), pytest.MonkeyPatch.context() as patch:
        for name, value in {"TRAIN": 400, "JUDGED": 200, "NEEDED": 600, "EPOCHS": 10}.items():
            patch.setattr(two_sample, name, value)
        main = runpy.run_path(str(ROOT / "evaluate.py"))["main"]
        main([*map(str, args), "--data-dir", mnist_dir, "--out-dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def rows(evaluated) -> dict[str, dict[str, str]]:
    """The rows of metrics.csv by model."""
    return {row["model"]: row for row in read_csv(evaluated / "metrics.csv")}


@pytest.fixture(scope="module")
def digit_rows(evaluated) -> list[dict[str, str]]:
    return read_csv(evaluated / "metrics_by_digit.csv")


def test_real_digits_come_first_and_class_conditional_models_last(rows):
    assert list(rows) == [REAL, TEST, GAN, DDPM, CGAN, DDPM_BY_DIGIT]


def test_the_evaluations_of_an_image_are_counted(rows):
    counts = {name: row["evaluations"] for name, row in rows.items()}
    # guidance acts at one of the two steps
    assert counts == {REAL: "", TEST: "", GAN: "1", DDPM: "2", CGAN: "1", DDPM_BY_DIGIT: "3"}


def test_real_digits_score_better_than_an_untrained_model(rows):
    assert float(rows[REAL]["fid"]) < float(rows[DDPM]["fid"])
    assert float(rows[REAL]["is"]) > float(rows[DDPM]["is"])


def test_most_samples_of_the_shipped_gan_look_real(rows):
    assert float(rows[GAN]["precision"]) > 0.5


def test_the_fid_ratio_is_the_fid_over_the_floor(rows, digit_rows):
    assert float(rows[GAN]["fid_ratio"]) == pytest.approx(float(rows[GAN]["fid"]) / float(rows[REAL]["fid"]), rel=1e-4)
    for floor, row in zip(digit_rows[:10], digit_rows[10:20]):
        assert float(row["fid_ratio"]) == pytest.approx(float(row["fid"]) / float(floor["fid"]), rel=1e-4)


def test_the_reweighted_ratio_has_the_reweighted_floor(rows):
    ratio = float(rows[GAN]["fid_reweighted"]) / float(rows[REAL]["fid_reweighted"])
    assert float(rows[GAN]["fid_ratio_reweighted"]) == pytest.approx(ratio, rel=1e-4)


def test_the_two_sample_test_tells_untrained_samples_and_not_real_digits(rows):
    assert {name for name, row in rows.items() if row["two_sample"]} == {REAL, GAN, DDPM, CGAN, DDPM_BY_DIGIT}
    assert float(rows[DDPM]["two_sample"]) > 0.95
    assert float(rows[REAL]["two_sample"]) < 0.6


def test_the_shares_of_a_row_are_those_of_its_labels(rows):
    assert float(rows[CGAN]["share_1"]) == pytest.approx(float(rows[TEST]["share_1"]), abs=0.02)
    assert sum(float(rows[GAN][f"share_{digit}"]) for digit in range(10)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["fid", "kid", "recall", "coverage", "nearest_share_close"])
def test_figures_have_their_deviation_over_the_seeds(name, rows):
    assert rows[GAN][f"{name}_std"]


def test_only_rows_with_labels_have_a_label_accuracy(rows):
    assert {name for name, row in rows.items() if row["label_accuracy"]} == {REAL, TEST, CGAN, DDPM_BY_DIGIT}


def test_precision_is_a_share(rows):
    assert all(0 <= float(row["precision"]) <= 1 for name, row in rows.items() if name != TEST)


def test_the_precision_of_the_network_is_a_column_of_its_own(rows):
    assert {name for name, row in rows.items() if row["dtype"] == "fp32"} == {GAN, DDPM, CGAN, DDPM_BY_DIGIT}


def test_the_table_by_digit_has_ten_rows_for_each_model_with_labels(digit_rows):
    expected = [(model, str(digit)) for model in (REAL, CGAN, DDPM_BY_DIGIT) for digit in range(10)]
    assert [(row["model"], row["digit"]) for row in digit_rows] == expected


def test_the_json_file_holds_both_tables_and_their_origin(evaluated, rows):
    content = json.loads((evaluated / "metrics.json").read_text())
    by_model = {row["model"]: row for row in content["rows"]}
    assert list(by_model) == list(rows)
    assert len(content["rows_by_digit"]) == 30
    assert by_model[GAN]["fid"] == pytest.approx(float(rows[GAN]["fid"]), rel=1e-5)
    assert by_model[GAN]["sha256"] == file_sha256(SHIPPED)
    assert by_model[GAN]["images_per_second"] > 100
    assert by_model[DDPM_BY_DIGIT]["sampler"] == "dpm-solver++"
    assert by_model[DDPM_BY_DIGIT]["guidance"] == 1.5
    assert "guidance" not in by_model[DDPM]
    assert content["command"].startswith("python evaluate.py --models")
    assert content["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("model", "args", "code", "reason"),
    [
        ("missing", [], 1, "does not exist"),
        ("gan", ["--steps", 20], 2, "dcgan, which has no --steps"),
        ("diffusion", ["--steps", 51], 2, "steps must be"),
        ("unconditional diffusion", ["--guidance", 2], 2, "unconditional"),
        ("diffusion of 5 classes", [], 1, "has 5 classes"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(model, args, code, reason, model_files, run, tmp_path):
    found, _, err = run("evaluate.py", "--models", model_files[model], *args, "--out-dir", tmp_path)
    assert found == code
    assert reason in error_line(err)


def test_more_samples_than_test_digits_are_compared_with_the_training_set(mnist_dir, run, tmp_path, fewer_digits):
    fewer_digits(train=600, test=200)
    models = [SHIPPED, SHIPPED_CONDITIONAL, tiny_ddpm(tmp_path)]
    args = ["--n", 300, "--seeds", 1, "--steps", 2, "--data-dir", mnist_dir, "--out-dir", tmp_path]
    code, out, err = run("evaluate.py", "--models", *models, *args)
    assert code == 0, err
    assert f"to do: {300 * (1 + 1 + 2 + 3):,} network evaluations" in out
    real, gan, *_ = read_csv(tmp_path / "metrics.csv")
    assert (real["model"], real["reference"], gan["model"]) == (REAL, "mnist train", GAN)
    assert float(real["is"]) > 9
    assert float(gan["fid"]) > 0
    assert "fid_ratio" not in gan, "there is no floor"
    by_digit = read_csv(tmp_path / "metrics_by_digit.csv")
    assert len(by_digit) == 20
    assert all("fid_ratio" not in row for row in by_digit)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err = run("evaluate.py", "--models", SHIPPED, "--out-dir", tmp_path / "file" / "reports")
    assert code == 1
    assert "cannot write in" in error_line(err)
    assert "to do" not in out


# --------------------------------------------------------------------------------------------------------------------
# scoring/scorer.py and scoring/table.py


class Recording:
    """A generator that always draws the same images."""

    def __init__(self, images: torch.Tensor):
        self.images = to_model_range(images)

    def sample(self, n: int, labels: torch.Tensor | None, rng: torch.Generator) -> torch.Tensor:
        return self.images


@pytest.fixture(scope="module")
def both_scores():
    """(the monitor's figures, evaluate.py's figures) of the same samples, reference digits and seed."""
    extractor, seed = Extractor(), 3
    train, test = (load_digits("digits", split, "unused") for split in ("train", "test"))
    real, samples = train.subset(400, "real"), train.subset(300, "samples")
    reference = Reference(summary(extractor(real.images)[0], real.labels), {})
    labels = proportional_labels(test, len(samples), seed)
    monitor = Scorer(extractor, reference, len(samples), seed, labels)
    figures, _ = FullScorer(real, test, train, extractor).score(samples.images, seed, labels)
    return monitor(Recording(samples.images)), figures


@pytest.mark.parametrize(
    ("monitor_name", "name"), [("fid", "fid"), ("is", "is"), ("is_std", "is_splits"), ("label_accuracy", "label_accuracy")]
)
def test_the_monitor_and_evaluate_give_the_same_figure(monitor_name, name, both_scores):
    monitor, full = both_scores
    assert monitor[monitor_name] == full[name]


def test_a_single_repetition_has_no_deviation():
    assert summarise(({"fid": 3.0},)) == pytest.approx({"fid": 3.0, "fid_std": math.nan}, nan_ok=True)


def test_summarise_gives_mean_and_deviation():
    assert summarise(({"fid": 1.0}, {"fid": 3.0})) == pytest.approx({"fid": 2.0, "fid_std": math.sqrt(2)})


def test_rows_before_the_floor_have_no_ratio():
    table = Table({"n": 100})
    table.add("before", [({"fid": 4.0}, [])])
    table.add("floor", [({"fid": 2.0}, [])], is_floor=True)
    table.add("after", [({"fid": 6.0}, [])])
    assert [row.get("fid_ratio") for row in table.rows] == [None, None, 3.0]
