"""Trainings and evaluations of several processes: two give what one gives, except for rounding."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, error_line, read_csv, run_process, tiny_ddpm
from forked import Forked, run_forked
from test_ddpm import loss_and_gradient, make_step
from test_models import small

from checkpoint import read_tensors
from engine import distributed
from utils import keyed_generator

FLAGS = ["--dataset", "digits", "--batch-size", 128, "--width", 8, "--eval-samples", 100, "--device", "cpu"]
# Width 16: at width 8, a group of the normalisation has one channel, so a bias before it has no effect. Then rounding alone
# decides where Adam moves that bias.
DIFFUSION = [*FLAGS, "--width", 16, "--batch-size", 64, "--limit", 192, "--eval-samples", 96, "--steps", 2,
             "--eval-every", 1, "--lr-schedule", "constant", "--warmup-steps", 0]  # fmt: skip
WEIGHT_ROUNDING = 2e-5  # of weights after six steps: sums in another order, which the optimizers magnify
TRAINERS = {"GAN": "train_gan.py", "CGAN": "train_cgan.py"}


class Pair:
    """A script in two processes with the variables that torchrun would set."""

    def __init__(self, script: str, *args: object):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        self.processes = [
            Forked(script, list(map(str, args)), {**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]

    def finish(self) -> tuple[list[int], str, str]:
        """(exit codes, stdout, stderr), the output of both processes."""
        results = [process.result() for process in self.processes]
        return (
            [result.returncode for result in results],
            "".join(result.stdout for result in results),
            "".join(result.stderr for result in results),
        )


def train(run, folder: Path, processes: int, *args: object) -> None:
    args = [*args, "--out-dir", folder]
    if processes == 1:
        code, _, err = run("train_diffusion.py", *args)
        assert code == 0, err
    else:
        codes, _, err = Pair("train_diffusion.py", *args).finish()
        assert codes == [0, 0], err


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The network and its average in a run's last state."""
    parts = read_tensors(folder / "checkpoints" / "last_DIFF.pt")["parts"]
    return {f"{part} {name}": value for part in ("model", "ema") for name, value in parts[part].items()}


@pytest.fixture(scope="module")
def run_of_one_process(tmp_path_factory):
    """The folder of two epochs on one process."""
    folder = tmp_path_factory.mktemp("one process")
    result = run_forked("train_diffusion.py", *DIFFUSION, "--epochs", 2, "--out-dir", folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_gives_the_same_weights_when_the_number_of_processes_changes(first, then, run_of_one_process, run, tmp_path):
    train(run, tmp_path, first, *DIFFUSION, "--epochs", 1)
    train(run, tmp_path, then, "--resume", "--epochs", 2)
    expected, found = weights(run_of_one_process), weights(tmp_path)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < WEIGHT_ROUNDING, name
    rows, wanted = (read_csv(path / "reports" / "diffusion_training_log.csv") for path in (tmp_path, run_of_one_process))
    for row, like in zip(rows, wanted, strict=True):
        assert row["images"] == like["images"]
        for name in ("loss", "fid", "fid_unconditional"):
            assert float(row[name]) == pytest.approx(float(like[name]), rel=1e-3), name


def test_two_processes_agree_on_values_samples_and_gan_steps():
    codes, out, err = Pair("tests/ranks.py").finish()
    assert codes == [0, 0], err
    assert "all is well" in out


def wait_for_an_epoch(process: Forked) -> None:
    end = time.monotonic() + 60
    while "epoch 1/" not in process.stdout:
        assert time.monotonic() < end, process.result()
        time.sleep(0.05)


@pytest.mark.parametrize("prefix", TRAINERS)
def test_two_processes_stop_together_and_resume(prefix, tmp_path):
    script = TRAINERS[prefix]
    pair = Pair(script, *FLAGS, "--epochs", 100000, "--no-early-stop", "--out-dir", tmp_path)
    wait_for_an_epoch(pair.processes[0])
    for process in pair.processes:
        process.send_signal(signal.SIGINT)
    codes, out, err = pair.finish()
    assert codes == [130, 130], err
    assert len(re.findall("stopped by signal 2", err)) == 1, err
    assert f"torchrun --nproc-per-node=2 {ROOT / script} --resume --out-dir {tmp_path}" in err
    saved = read_tensors(tmp_path / "checkpoints" / f"last_{prefix}.pt")["state"]
    assert saved["epoch"] >= 1
    assert len(re.findall("^epoch", out, re.M)) == saved["epoch"]
    codes, out, err = Pair(script, "--resume", "--out-dir", tmp_path, "--epochs", saved["epoch"] + 1).finish()
    assert codes == [0, 0], err
    assert out.count("all epochs completed") == 1


def test_torchrun_starts_a_training_and_passes_its_signal_on(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    flags = [*FLAGS, "--epochs", 100000, "--no-early-stop", "--out-dir", tmp_path]
    command = [*torchrun, str(ROOT / "train_gan.py"), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        line = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.terminate()  # torchrun then ends the training's processes too
    assert line.startswith("epoch 1/100000"), err
    assert process.returncode != 0
    assert len(re.findall("stopped by signal 2", err)) == 1, err
    assert f"torchrun --nproc-per-node=2 {ROOT / 'train_gan.py'} --resume --out-dir {tmp_path}" in err
    assert read_tensors(tmp_path / "checkpoints" / "last_GAN.pt")["state"]["epoch"] >= 1


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path):
    codes, _, err = Pair("train_gan.py", *FLAGS, "--batch-size", 129, "--epochs", 1, "--out-dir", tmp_path).finish()
    assert codes == [2, 2]
    assert err.count("error: --batch-size 129 cannot be divided among 2 processes") == 1, err


def test_two_processes_share_an_evaluation(mnist_dir, tmp_path):
    args = ["evaluate.py", "--models", tiny_ddpm(tmp_path), "--n", 200, "--seeds", 2, "--steps", 2, "--device", "cpu"]
    alone = run_forked("tests/ranks.py", *args, "--out-dir", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    codes, out, err = Pair("tests/ranks.py", *args, "--out-dir", tmp_path / "two").finish()
    assert codes == [0, 0], err
    assert out.count("\nwrote") == 1
    one, two = (read_csv(tmp_path / folder / "metrics.csv") for folder in ("one", "two"))
    assert [row["device"] for row in two] == ["2 x cpu"] * len(one)
    for row, like in zip(one, two):
        for name in ("model", "repeats", "evaluations", "sha256"):
            assert row[name] == like[name]
        for name in ("fid", "is", "recall", "label_accuracy"):
            assert row[name] == like[name] == "" or float(row[name]) == pytest.approx(float(like[name]), rel=1e-3, abs=1e-3)


def test_processes_that_cannot_meet_are_told_to_use_torchrun(tmp_path):
    result = run_process("train_gan.py", *FLAGS, "--out-dir", tmp_path, WORLD_SIZE="2", RANK="0")
    assert result.returncode == 1
    line = error_line(result.stderr)
    assert "cannot meet" in line
    assert "torchrun" in line


@pytest.mark.parametrize("name", ["dcgan", "cdcgan", "ddpm"])
def test_samples_do_not_depend_on_the_rows_of_a_process(name):
    network = small(name)
    whole, *parts = (
        network.sample(8, None, keyed_generator("cpu", 0), chunk_size=2, rows=rows)
        for rows in (slice(None), slice(0, 4), slice(4, 8))
    )
    assert torch.equal(whole, torch.cat(parts))


def test_loss_and_gradient_of_a_batch_are_the_means_of_its_shares(monkeypatch):
    images, labels = torch.rand(8, 1, 28, 28), torch.arange(8)
    step = make_step(small("ddpm"), lr=0.0, grad_clip=0.0, label_dropout=0.5)

    def update(rows: slice) -> tuple[float, torch.Tensor]:
        monkeypatch.setattr(distributed, "share", lambda n: rows)
        return loss_and_gradient(step, images, labels)

    (whole, gradient), *shares = map(update, (slice(0, 8), slice(0, 4), slice(4, 8)))
    losses, gradients = zip(*shares)
    assert whole == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert torch.allclose(gradient, sum(gradients) / 2, rtol=1e-4, atol=1e-6)
    assert losses[0] != losses[1]


@pytest.fixture
def failing_exchange(monkeypatch):
    """A function that makes every exchange between processes fail with a message."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")

    def fail_with(message: str) -> None:
        def all_reduce(*_):
            raise RuntimeError(message)

        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)

    return fail_with


def test_a_closed_connection_means_that_another_process_has_ended(failing_exchange):
    failing_exchange("Connection closed by peer")
    with pytest.raises(distributed.Left, match="another of the 2 processes has ended"):
        distributed.largest(1)


def test_a_full_memory_does_not_mean_that_another_process_has_ended(failing_exchange):
    failing_exchange("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(RuntimeError, match="out of memory"):
        distributed.average([torch.ones(1)])


def test_with_one_process_every_exchange_is_the_identity():
    rows = torch.arange(3)
    assert distributed.count() == 1
    assert distributed.share(5) == slice(0, 5)
    assert distributed.gather(rows) is rows
    assert distributed.largest(2) == 2
    assert distributed.total(2) == 2
