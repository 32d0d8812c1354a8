"""Trainings and evaluations of several processes: what two give is what one gives, but for rounding."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, error_line, read_csv, run_process, tiny_ddpm
from test_models import small

from engine import distributed
from checkpoint import read_tensors
from utils import keyed_generator

FLAGS = ["--dataset", "digits", "--batch-size", 128, "--width", 8, "--eval-samples", 100, "--device", "cpu"]
# Of width 16: at 8 a group normalisation has one channel, which takes a bias before it away, and of a bias without effect
# rounding alone decides where Adam takes it
DIFFUSION = [*FLAGS, "--width", 16, "--limit", 384, "--steps", 2, "--lr-schedule", "constant", "--warmup-steps", 0]
WEIGHT_ROUNDING = 2e-5  # of weights after six steps: sums of another order, which the optimizers magnify


def torchrun(script: Path | str, *args: object, processes: int = 2, **options) -> subprocess.Popen:
    """Start a script as several processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, str(ROOT / script), *map(str, args)], cwd=ROOT, env=environment, **pipes, **options)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.terminate()  # which ends the script's processes too
    return process.returncode, out, err


def train(folder: Path, processes: int, *args: object) -> None:
    args = [*args, "--out-dir", folder]
    if processes == 1:
        result = run_process("train_diffusion.py", *args)
        assert result.returncode == 0, result.stderr
    else:
        code, _, err = finish(torchrun("train_diffusion.py", *args, processes=processes))
        assert code == 0, err


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The network and its average in a run's last state."""
    parts = read_tensors(folder / "checkpoints" / "last_DIFF.pt")["parts"]
    return {f"{part} {name}": value for part in ("model", "ema") for name, value in parts[part].items()}


def test_twice_64_is_128_and_a_run_resumes_with_another_number_of_processes(tmp_path):
    train(tmp_path / "1", 1, *DIFFUSION, "--epochs", 2)
    expected, log = weights(tmp_path / "1"), read_csv(tmp_path / "1" / "reports" / "diffusion_training_log.csv")
    for first, then in ((2, 1), (1, 2)):
        folder = tmp_path / f"{first}, then {then}"
        train(folder, first, *DIFFUSION, "--epochs", 1)
        train(folder, then, "--resume", "--epochs", 2)
        found = weights(folder)
        assert expected.keys() == found.keys()
        moved = [(found[name] - value).abs().max() for name, value in expected.items()]
        assert max(moved) < WEIGHT_ROUNDING, (folder.name, max(moved))
        rows = read_csv(folder / "reports" / "diffusion_training_log.csv")
        for row, like in zip(rows, log, strict=True):
            assert row["images"] == like["images"]
            for name in ("loss", "fid", "fid_asked"):
                assert float(row[name]) == pytest.approx(float(like[name]), rel=1e-3), folder.name


def test_processes_share_everything():
    code, out, err = finish(torchrun("tests/ranks.py"))
    assert code == 0 and "all is well" in out, err


@pytest.mark.parametrize("script, prefix", [("train_gan.py", "GAN"), ("train_cgan.py", "CGAN")])
def test_gans_train_on_two_and_stop_together(script, prefix, tmp_path):
    process = torchrun(script, *FLAGS, "--epochs", 100000, "--no-early-stop", "--out-dir", tmp_path, start_new_session=True)
    lines = [process.stdout.readline()]
    assert lines[0].startswith("epoch 1/100000"), finish(process)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code != 0 and len(re.findall("stopped by signal 2", err)) == 1, err
    assert f"torchrun --nproc-per-node=2 {ROOT / script} --resume --out-dir {tmp_path}" in err
    saved = read_tensors(tmp_path / "checkpoints" / f"last_{prefix}.pt")["state"]
    assert saved["epoch"] >= 1 and len(re.findall("^epoch", "".join(lines) + out, re.M)) == saved["epoch"]
    code, out, err = finish(torchrun(script, "--resume", "--out-dir", tmp_path, "--epochs", saved["epoch"] + 1))
    assert code == 0 and out.count("all epochs completed") == 1, err


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path):
    code, _, err = finish(torchrun("train_gan.py", *FLAGS, "--batch-size", 129, "--epochs", 1, "--out-dir", tmp_path))
    assert code != 0 and err.count("error: --batch-size 129 cannot be divided among 2 processes") == 1, err


def test_an_evaluation_is_shared(mnist_dir, tmp_path):
    args = ["--models", tiny_ddpm(tmp_path), "--n", 200, "--seeds", 2, "--steps", 2, "--device", "cpu", "--out-dir"]
    result = run_process("tests/ranks.py", *args, tmp_path / "one")
    assert result.returncode == 0, result.stderr
    code, out, err = finish(torchrun("tests/ranks.py", *args, tmp_path / "two"))
    assert code == 0 and out.count("\nwrote") == 1, err
    one, two = (read_csv(tmp_path / folder / "metrics.csv") for folder in ("one", "two"))
    assert [row["device"] for row in two] == ["2 x cpu"] * len(one)
    for row, like in zip(one, two):
        for name in ("model", "repeats", "evaluations", "sha256"):
            assert row[name] == like[name]
        for name in ("fid", "is", "recall", "label_accuracy"):
            assert row[name] == like[name] == "" or float(row[name]) == pytest.approx(float(like[name]), rel=1e-3, abs=1e-3)


def test_without_torchrun_they_cannot_meet(tmp_path):
    result = run_process("train_gan.py", *FLAGS, "--out-dir", tmp_path, WORLD_SIZE="2")
    assert result.returncode == 1 and "cannot meet" in error_line(result.stderr)


@pytest.mark.parametrize("name", ["dcgan", "cdcgan", "ddpm"])
def test_rows_do_not_depend_on_which_are_drawn(name):
    network = small(name)
    whole, *parts = (network.sample(8, None, keyed_generator("cpu", 0), chunk_size=2, rows=rows)
                     for rows in (slice(None), slice(0, 4), slice(4, 8)))  # fmt: skip
    assert torch.equal(whole, torch.cat(parts))


def test_a_loss_is_the_mean_of_its_shares():
    network, images, labels = small("ddpm"), torch.rand(8, 1, 28, 28), torch.arange(8)
    examples = network.examples(images, labels, keyed_generator("cpu", 0), 0.5)
    whole, *parts = (network.loss(*(tensor[rows] for tensor in examples)).item()
                     for rows in (slice(None), slice(0, 4), slice(4, 8)))  # fmt: skip
    assert whole == pytest.approx(sum(parts) / 2, rel=1e-6) and parts[0] != parts[1]


def test_a_full_memory_is_not_taken_for_another_process_that_ended(monkeypatch):
    def fails(message: str):
        def call(*_):
            raise RuntimeError(message)

        return call

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "all_reduce", fails("Connection closed by peer"))
    with pytest.raises(distributed.Left, match="another of the 2 processes has ended"):
        distributed.largest(1)
    monkeypatch.setattr(torch.distributed, "all_reduce", fails("CUDA out of memory. Tried to allocate 2.00 GiB"))
    with pytest.raises(RuntimeError, match="out of memory"):
        distributed.average([torch.ones(1)])


def test_of_one_process_nothing_is_asked():
    assert distributed.count() == 1 and distributed.share(5) == slice(0, 5)
    rows = torch.arange(3)
    assert distributed.gather(rows) is rows and distributed.largest(2) == 2 == distributed.total(2)
