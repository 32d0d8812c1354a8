"""Fixtures: the data folder, and scripts that run in this process or in their own."""

from __future__ import annotations

import csv
import os
import runpy
import subprocess
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one core for each worker; torch reads this at its import
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from trainers import TRAINERS

import data
from cli import run_script
from scoring import reference

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "checkpoints" / "best_GAN_G.pt"


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


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


@pytest.fixture
def fewer_digits(monkeypatch):
    """A function that makes every script read only so many digits of each split."""
    load = data.load_digits

    def limit(train: int, test: int) -> None:
        for module in (data, reference):
            monkeypatch.setattr(
                module, "load_digits", lambda *args: load(*args).subset({"train": train, "test": test}[args[1]], "few")
            )

    return limit


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


def tiny_ddpm(folder, **config):
    """Write an untrained diffusion model. Returns its path."""
    from test_models import small

    from checkpoint import save_model

    path = folder / f"tiny{''.join(f'_{name}_{value}' for name, value in config.items())}.pt"
    save_model(path, "ddpm", small("ddpm", **config), {})
    return path


@pytest.fixture(scope="session", params=TRAINERS, ids=[trainer.title for trainer in TRAINERS])
def trainer(request):
    return request.param


@pytest.fixture(scope="session")
def whole_run(trainer, tmp_path_factory):
    """The folder of an uninterrupted training on the embedded digits."""
    folder = tmp_path_factory.mktemp("whole")
    runpy.run_path(str(ROOT / trainer.script))["main"]([*map(str, trainer.flags), "--out-dir", str(folder)])
    return folder
