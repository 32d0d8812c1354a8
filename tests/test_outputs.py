"""Every output is whole or not there: a full disk, a killed process, another one that is still writing."""

from __future__ import annotations

import contextlib
import os
import resource
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_models import small

from figures import charts
from figures import images
from checkpoint import save_model, write_tensors
from utils import ExpectedError, atomic_path, write_csv, write_json

NOISE = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8)
PIXELS = NOISE[:, 0].numpy()


def rewrite_readme(path) -> None:
    report = runpy.run_path(str(ROOT / "report.py"))
    if not path.exists():
        path.write_text(f"before\n{report['BEGIN']}\n{report['END']}\nafter\n")
    report["write_readme"](path, "| FID |\n" * 1000)


WRITERS = {
    "model.pt": lambda path: save_model(path, "dcgan", small("dcgan"), {}),
    "state.pt": lambda path: write_tensors(path, {"x": torch.randn(5000)}),
    "log.csv": lambda path: write_csv(path, [{"epoch": i, "loss": i / 7} for i in range(1000)]),
    "metrics.json": lambda path: write_json(path, {"rows": list(range(5000))}),
    "README.md": rewrite_readme,
    "grid.png": lambda path: images.write_png(path, images.image_grid(NOISE)),
    "progress.gif": lambda path: images.write_gif(path, NOISE[:, 0]),
    "side_by_side.png": lambda path: images.write_side_by_side(path, [("noise", NOISE)]),
    "chart.png": lambda path: charts.neighbours(path, [("noise", PIXELS[:10], PIXELS[10:40].reshape(10, 3, 28, 28))]),
}


@contextlib.contextmanager
def full_disk(allowed: int):
    """No file of this process can grow beyond `allowed` bytes: writing fails in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_keeps_the_old_file(name, tmp_path):
    path = tmp_path / name
    WRITERS[name](path)
    before = path.read_bytes()
    for allowed in (0, 2000):
        assert len(before) > allowed
        with full_disk(allowed), pytest.raises(ExpectedError, match=rf"cannot write .*{name} .*previous version is kept"):
            WRITERS[name](path)
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write_csv(tmp_path / "a.csv", [{"x": 1}])
    finally:
        os.umask(before)
    assert (tmp_path / "a.csv").stat().st_mode & 0o777 == mode


def test_what_killed_processes_left_is_swept(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = tmp_path / f".a.{gone.pid}.abc123.csv"
    of_another_file, being_written = tmp_path / f".ab.{gone.pid}.abc123.csv", tmp_path / f".a.{os.getppid()}.abc123.csv"
    mine, foreign = tmp_path / f".a.{os.getpid()}.abc123.csv", tmp_path / ".a.previous.csv"
    for path in (left, of_another_file, being_written, mine, foreign):
        path.touch()
    write_csv(tmp_path / "a.csv", [{"x": 1}])
    assert set(tmp_path.iterdir()) == {tmp_path / "a.csv", of_another_file, being_written, foreign}


def test_an_error_inside_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "new" / "a.bin") as temporary:
        temporary.write_bytes(np.zeros(10).tobytes())
        raise ZeroDivisionError
    assert not list((tmp_path / "new").iterdir())


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link.csv").symlink_to("target.csv")
    write_csv(tmp_path / "link.csv", [{"x": 1}])
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "target.csv").read_text() == "x\n1\n"


def test_what_is_no_ordinary_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (tmp_path / "pipe.csv", tmp_path):
        with pytest.raises(ExpectedError, match="no ordinary file"):
            write_csv(path, [{"x": 1}])
    assert (tmp_path / "pipe.csv").is_fifo()


def test_what_cannot_be_made_is_said_by_its_own_name(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.csv", tmp_path / f"{'a' * 300}.csv"):
        with pytest.raises(ExpectedError, match=rf"cannot write .*{path.name} "):
            write_csv(path, [{"x": 1}])
    write_csv(tmp_path / f"{'a' * 251}.csv", [{"x": 1}])  # the longest name that there is
