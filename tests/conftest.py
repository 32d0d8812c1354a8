"""Fixtures: the data folder, and scripts that run in this process or in their own."""

from __future__ import annotations

import contextlib
import csv
import functools
import os
import runpy
import subprocess
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one core for each worker; torch reads this at its import
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from test_models import small
from trainers import TRAINERS

import data
from checkpoint import save_model
from cli import run_script
from scoring import reference

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "checkpoints" / "best_GAN_G.pt"
META = {"epoch": 3, "metrics": {"fid": 1.5}, "flags": {}, "versions": {}}  # of the file of `saved`


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def embedded_digits_read_once():
    """scikit-learn parses a text file of its digits at every call, which takes longer than a training step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_read_embedded_digits", functools.cache(data._read_embedded_digits))
        yield


@pytest.fixture(scope="session")
def mnist_dir() -> str:
    folder = data.default_data_dir()
    if not data.has_mnist(folder):
        pytest.skip(f"MNIST is not in {folder} (set MNIST_DIR)")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a script's `main` in this process, which is much faster. Gives (exit code, stdout, stderr)."""

    def call(script: str, *args: object):
        main = runpy.run_path(str(ROOT / script))["main"]
        code = 0
        try:
            run_script(lambda: main([str(arg) for arg in args]))
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


@contextlib.contextmanager
def reading_fewer_digits(train: int, test: int):
    """Every script reads only so many digits of each split."""
    load, sizes = data.load_digits, {"train": train, "test": test}
    with pytest.MonkeyPatch.context() as patch:
        for module in (data, reference):
            patch.setattr(module, "load_digits", lambda *args: load(*args).subset(sizes[args[1]], "few"))
        yield


@pytest.fixture
def fewer_digits():
    """A function that makes every script read only so many digits of each split."""
    with contextlib.ExitStack() as stack:
        yield lambda train, test: stack.enter_context(reading_fewer_digits(train, test))


def run_process(script: str, *args: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """Run a script in a process of its own, as a user would."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


def error_line(stderr: str) -> str:
    """The one line that a failed script printed. Fails if there are more lines, such as a traceback."""
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: "), stderr
    return lines[0]


def read_csv(path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def saved(tmp_path):
    """A small generator and its file."""
    network = small("dcgan")
    path = tmp_path / "best_GAN_G.pt"
    save_model(path, "dcgan", network, META)
    return network, path


def tiny_ddpm(folder, **config):
    """Write an untrained diffusion model. Returns its path."""
    path = folder / f"tiny{''.join(f'_{name}_{value}' for name, value in config.items())}.pt"
    save_model(path, "ddpm", small("ddpm", **config), {})
    return path


@pytest.fixture(scope="session")
def model_files(tmp_path_factory) -> dict[str, Path]:
    """Files that can be sampled, and files that cannot, by what they are."""
    folder = tmp_path_factory.mktemp("model files")
    shipped = {"gan": "best_GAN_G", "discriminator": "best_GAN_D", "classifier": "classifier"}
    files = {name: ROOT / "checkpoints" / f"{file}.pt" for name, file in shipped.items()}
    files |= {name: folder / f"{name}.pt" for name in ("missing", "truncated")}
    files["truncated"].write_bytes(SHIPPED.read_bytes()[:10_000])
    files["diffusion"] = tiny_ddpm(folder)
    files["unconditional diffusion"] = tiny_ddpm(folder, num_classes=0)
    files["diffusion of 5 classes"] = tiny_ddpm(folder, num_classes=5)
    files["diffusion of 40 timesteps"] = tiny_ddpm(folder, timesteps=40)
    return files


@pytest.fixture(scope="session", params=TRAINERS, ids=[trainer.title for trainer in TRAINERS])
def trainer(request):
    return request.param


@pytest.fixture(scope="session")
def whole_run(trainer, tmp_path_factory):
    """The folder of an uninterrupted training on the embedded digits."""
    folder = tmp_path_factory.mktemp("whole")
    runpy.run_path(str(ROOT / trainer.script))["main"]([*map(str, trainer.flags), "--out-dir", str(folder)])
    return folder
