"""evaluate.py as a user calls it: its tables, and an evaluation that is interrupted."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import ROOT, SHIPPED, error_line, read_csv, tiny_ddpm

import evaluation
import utils
from checkpoint import file_sha256, read_tensors, write_tensors


def test_evaluate_puts_the_floor_beside_the_model(mnist_dir, run, tmp_path, fewer_digits):
    fewer_digits(train=8000, test=2000)
    models = [SHIPPED, ROOT / "checkpoints" / "best_CGAN_G.pt", tiny_ddpm(tmp_path)]
    args = ["--n", 500, "--seeds", 2, "--steps", 2, "--guidance", 1.5, "--data-dir", mnist_dir, "--out-dir", tmp_path]
    code, _, err = run("evaluate.py", "--models", *models, *args)
    assert code == 0, err
    rows = real, test, gan, ddpm, cgan, by_digit = read_csv(tmp_path / "metrics.csv")
    names = [row["model"] for row in rows]
    assert names == ["real training digits", "real test digits", "dcgan", "ddpm", "cdcgan", "ddpm, by digit"]
    assert [row["evaluations"] for row in rows] == ["", "", "1", "2", "1", "3"]  # guidance acts at one of two steps
    assert float(real["fid"]) < float(gan["fid"]) and float(real["is"]) > float(gan["is"])
    assert float(gan["fid_ratio"]) == pytest.approx(float(gan["fid"]) / float(real["fid"]), rel=1e-4)
    assert all(gan[f"{name}_std"] for name in ("fid", "kid", "recall", "coverage", "nearest_share_close"))
    assert all(row["label_accuracy"] for row in (real, test, cgan, by_digit))
    assert not gan["label_accuracy"] and not ddpm["label_accuracy"]
    assert (
        all(0 <= float(row["precision"]) <= 1 for row in (real, gan, ddpm, cgan, by_digit)) and float(gan["precision"]) > 0.5
    )
    assert [row["dtype"] for row in rows] == ["", "", *["fp32"] * 4]
    by_digit = read_csv(tmp_path / "metrics_by_digit.csv")
    assert [(row["model"], row["digit"]) for row in by_digit] == [
        (model, str(digit)) for model in ("real training digits", "cdcgan", "ddpm, by digit") for digit in range(10)
    ]
    for floor, row in zip(by_digit[:10], by_digit[10:20]):
        assert float(row["fid_ratio"]) == pytest.approx(float(row["fid"]) / float(floor["fid"]), rel=1e-4)
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["model"] for row in content["rows"]] == names and len(content["rows_by_digit"]) == 30
    assert content["rows"][2]["fid"] == pytest.approx(float(gan["fid"]), rel=1e-5)
    assert content["rows"][2]["sha256"] == file_sha256(SHIPPED) and content["rows"][2]["images_per_second"] > 100
    assert (by_digit_row := content["rows"][5])["sampler"] == "dpm-solver++" and by_digit_row["guidance"] == 1.5
    assert content["command"].startswith("python evaluate.py --models") and content["versions"]["torch"] == torch.__version__
    for args, reason in (
        ([tmp_path / "none.pt"], "does not exist"),
        ([SHIPPED, "--steps", 20], "dcgan, which has no --steps"),
        ([models[2], "--steps", 51], "steps must be"),
        ([tiny_ddpm(tmp_path, num_classes=0), "--guidance", 2], "unconditional"),
        ([tiny_ddpm(tmp_path, num_classes=5)], "has 5 classes"),
    ):
        code, _, err = run("evaluate.py", "--models", *args, "--out-dir", tmp_path)
        assert code == (2 if len(args) > 1 else 1) and reason in error_line(err)


def test_more_samples_than_test_digits_are_compared_with_the_training_set(mnist_dir, run, tmp_path, fewer_digits):
    fewer_digits(train=900, test=300)
    models = [SHIPPED, ROOT / "checkpoints" / "best_CGAN_G.pt", tiny_ddpm(tmp_path)]
    args = ["--n", 400, "--seeds", 1, "--steps", 2, "--data-dir", mnist_dir, "--out-dir", tmp_path]
    code, out, err = run("evaluate.py", "--models", *models, *args)
    assert code == 0 and f"to do: {400 * (1 + 1 + 2 + 3):,} network evaluations" in out, err
    real, gan, *_ = read_csv(tmp_path / "metrics.csv")
    assert (real["model"], real["reference"], gan["model"]) == ("real training digits", "mnist train", "dcgan")
    assert float(real["is"]) > 9 and float(gan["fid"]) > 0 and "fid_ratio" not in gan
    by_digit = read_csv(tmp_path / "metrics_by_digit.csv")
    assert len(by_digit) == 20 and all("fid_ratio" not in row for row in by_digit)


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_figures(mnist_dir, run, tmp_path, fewer_digits, monkeypatch):
    """What was scored is not scored again, unless its file is damaged or belongs to something else."""
    fewer_digits(train=900, test=300)
    args = ["--models", SHIPPED, tiny_ddpm(tmp_path), "--seeds", 2, "--steps", 2, "--data-dir", mnist_dir]
    unfinished, score, calls, floors = tmp_path / "out" / "scores.unfinished.pt", evaluation.RealDigits.score, [], 8

    def scoring(self, *args, **kwargs):
        calls.append(1)
        if not unfinished.parent.with_name("whole").exists() and len(calls) == floors + 4:
            raise KeyboardInterrupt
        return score(self, *args, **kwargs)

    def evaluated(folder, n=200, commit="0123"):
        calls.clear()
        monkeypatch.setattr(utils, "provenance", lambda: {"git": commit})
        code = run("evaluate.py", *args, "--n", n, "--out-dir", tmp_path / folder)[0]
        return code, len(calls) - floors

    monkeypatch.setattr(evaluation.RealDigits, "score", scoring)
    assert evaluated("out", commit="0123-dirty") == (130, 4) == evaluated("out", commit="0123-dirty")
    assert evaluated("out") == (130, 4) and [path.name for path in unfinished.parent.iterdir()] == [unfinished.name]
    for folder in ("whole", "damaged", "larger", "hostile"):
        (tmp_path / folder).mkdir()
    content = read_tensors(unfinished)
    write_tensors(
        tmp_path / "hostile" / unfinished.name, content | {"scores": dict.fromkeys(content["scores"], ({"fid": "x"}, []))}
    )
    (tmp_path / "damaged" / unfinished.name).write_bytes(unfinished.read_bytes()[:-100])
    shutil.copy(unfinished, tmp_path / "larger")
    assert evaluated("out") == (0, 3) and not unfinished.exists()
    assert evaluated("damaged") == evaluated("whole") == evaluated("larger", n=210) == evaluated("hostile") == (0, 6)
    for table in ("metrics.csv", "metrics_by_digit.csv"):
        whole, resumed, damaged = (
            [{name: value for name, value in row.items() if "images_per_second" not in name} for row in read_csv(file)]
            for file in (tmp_path / folder / table for folder in ("whole", "out", "damaged"))
        )
        assert whole == resumed == damaged


def test_a_folder_that_cannot_be_written_is_said_before_the_work(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err = run("evaluate.py", "--models", SHIPPED, "--out-dir", tmp_path / "file" / "reports")
    assert code == 1 and "cannot write in" in error_line(err) and "to do" not in out
