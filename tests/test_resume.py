"""Whole runs of every trainer on the embedded digits, interrupted and resumed."""

from __future__ import annotations

import csv
import math
import os
import runpy
import signal
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, error_line

import evaluation
from adversarial import GANStep
from checkpoint import load_generator, read_tensors
from denoising import DiffusionStep
from guard import Guard

FLAGS = ["--dataset", "digits", "--epochs", 3, "--width", 8, "--batch-size", 256, "--eval-samples", 200, "--device", "cpu"]


class Trainer(NamedTuple):
    script: str
    prefix: str
    title: str
    step: type
    exports: list[str]
    flags: list[object]


TRAINERS = [
    Trainer("train_gan.py", "GAN", "gan", GANStep, ["GAN_G", "GAN_D"], FLAGS),
    Trainer("train_cgan.py", "CGAN", "cgan", GANStep, ["CGAN_G", "CGAN_D"], FLAGS),
    Trainer("train_diffusion.py", "DIFF", "diffusion", DiffusionStep, ["DIFF"], [*FLAGS, "--steps", 2]),
]


@pytest.fixture(scope="module", params=TRAINERS, ids=[trainer.title for trainer in TRAINERS])
def trainer(request):
    return request.param


@pytest.fixture(scope="module")
def whole_run(trainer, tmp_path_factory):
    """The folder of an uninterrupted training on the embedded digits."""
    folder = tmp_path_factory.mktemp("whole")
    runpy.run_path(str(ROOT / trainer.script))["main"]([*map(str, trainer.flags), "--out-dir", str(folder)])
    return folder


def training_file(folder, trainer):
    """All that the last state holds, but for the seconds."""
    content = read_tensors(folder / "checkpoints" / f"last_{trainer.prefix}.pt")
    content["state"] = {key: value for key, value in content["state"].items() if key not in ("seconds", "log")}
    return content


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def log_rows(folder, trainer):
    with (folder / "reports" / f"{trainer.title}_training_log.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def test_digits_train_end_to_end(whole_run, trainer):
    rows = log_rows(whole_run, trainer)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    losses, rates = (["loss"], ["lr"]) if trainer.prefix == "DIFF" else (["loss_d", "loss_g"], ["lr", "d_lr"])
    by_class = [] if trainer.prefix == "GAN" else ["label_accuracy", *(f"fid_ratio_{digit}" for digit in range(10))]
    assert list(rows[0]) == [
        "epoch", "step", "images", *losses, "fid", "fid_ratio", "is", "is_std", *by_class, *rates]  # fmt: skip
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    generator = load_generator(whole_run / "checkpoints" / f"best_{trainer.exports[0]}.pt")
    best = min(rows, key=lambda row: float(row["fid"]))
    assert generator.meta["epoch"] == int(best["epoch"])
    assert generator.meta["flags"]["dataset"] == "digits" and "out_dir" not in generator.meta["flags"]
    assert (whole_run / "samples" / f"{trainer.title}_progress.gif").stat().st_size > 1000


@pytest.mark.parametrize("where", ["in the middle of an epoch", "while scoring"])
def test_an_interrupted_run_resumes_to_the_same_bits(where, whole_run, trainer, tmp_path, run, monkeypatch):
    steps, scorings = [], []
    original_step, original_score = trainer.step.__call__, evaluation.Scorer.__call__

    def stepping(self, *args):
        steps.append(1)
        if where == "in the middle of an epoch" and len(steps) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return original_step(self, *args)

    def scoring(self, *args):
        scorings.append(1)
        if where == "while scoring" and len(scorings) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original_score(self, *args)

    monkeypatch.setattr(trainer.step, "__call__", stepping)
    monkeypatch.setattr(evaluation.Scorer, "__call__", scoring)
    code, _, err = run(trainer.script, *trainer.flags, "--out-dir", tmp_path)
    assert code == (130 if where == "in the middle of an epoch" else 143)
    assert "--resume --out-dir" in err
    assert len(log_rows(tmp_path, trainer)) == 1
    code, _, err = run(trainer.script, "--resume", "--out-dir", tmp_path)
    assert code == 0, err
    assert log_rows(tmp_path, trainer) == log_rows(whole_run, trainer)
    assert same(training_file(tmp_path, trainer), training_file(whole_run, trainer))
    pictures = [f"samples/{trainer.title}_progress.gif"]
    for name in [f"checkpoints/best_{export}.pt" for export in trainer.exports] + pictures:
        assert (tmp_path / name).read_bytes() == (whole_run / name).read_bytes()
    assert not list(tmp_path.rglob("*previous*"))


@pytest.mark.parametrize("call", [13, 14])
def test_a_bad_number_ends_the_run_before_it_does_harm(call, whole_run, trainer, tmp_path, run, monkeypatch):
    """One update's loss is made nan: the run ends, and goes on from its last good state as if nothing had been."""
    calls, update = [], Guard.update

    def poisoned(self, loss, *args):
        calls.append(1)
        return update(self, loss * math.nan if len(calls) == call else loss, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Guard, "update", poisoned)
        code, _, err = run(trainer.script, *trainer.flags, "--out-dir", tmp_path)
    name = {"DIFF": "loss"}.get(trainer.prefix, "loss_g" if call % 2 == 0 else "loss_d")
    step = call if trainer.prefix == "DIFF" else (call + 1) // 2
    assert code == 1 and f"{name} or its gradient is not finite at step {step};" in error_line(err)
    assert run(trainer.script, "--resume", "--out-dir", tmp_path)[0] == 0
    assert log_rows(tmp_path, trainer) == log_rows(whole_run, trainer)
    assert same(training_file(tmp_path, trainer), training_file(whole_run, trainer))


def test_resuming_says_what_it_cannot_do(whole_run, trainer, tmp_path, run):
    assert "no run to resume" in error_line(run(trainer.script, "--resume", "--out-dir", tmp_path)[2])
    assert "larger --epochs" in error_line(run(trainer.script, "--resume", "--out-dir", whole_run)[2])
    code, _, err = run(trainer.script, "--resume", "--out-dir", whole_run, "--width", 16)
    assert code == 1 and "--width 16 differs" in error_line(err)
