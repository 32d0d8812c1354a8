"""Every file is written whole or not at all: with a full disk, after a killed process, beside another writer."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_models import small

from checkpoint import save_model, write_tensors
from figures import charts, images
from files import ExpectedError, atomic_path, write_csv, write_json

NOISE = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8)
PIXELS = NOISE[:, 0].numpy()


WRITERS = {
    "model.pt": lambda path: save_model(path, "dcgan", small("dcgan"), {}),
    "state.pt": lambda path: write_tensors(path, {"x": torch.randn(5000)}),
    "log.csv": lambda path: write_csv(path, [{"epoch": i, "loss": i / 7} for i in range(1000)]),
    "metrics.json": lambda path: write_json(path, {"rows": list(range(5000))}),
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
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write_csv(tmp_path / "a.csv", [{"x": 1}])
    finally:
        os.umask(before)
    assert (tmp_path / "a.csv").stat().st_mode & 0o777 == mode


def test_temporary_files_of_ended_processes_are_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = tmp_path / f".a.{gone.pid}.abc123.csv"
    of_another_file, being_written = tmp_path / f".ab.{gone.pid}.abc123.csv", tmp_path / f".a.{os.getppid()}.abc123.csv"
    mine, foreign = tmp_path / f".a.{os.getpid()}.abc123.csv", tmp_path / ".a.previous.csv"
    for path in (left, of_another_file, being_written, mine, foreign):
        path.touch()
    write_csv(tmp_path / "a.csv", [{"x": 1}])
    assert set(tmp_path.iterdir()) == {tmp_path / "a.csv", of_another_file, being_written, foreign}


def test_an_error_while_writing_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "new" / "a.bin") as temporary:
        temporary.write_bytes(np.zeros(10).tobytes())
        raise ZeroDivisionError
    assert not list((tmp_path / "new").iterdir())


def test_a_symbolic_link_is_followed_and_kept(tmp_path):
    (tmp_path / "link.csv").symlink_to("target.csv")
    write_csv(tmp_path / "link.csv", [{"x": 1}])
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "target.csv").read_text() == "x\n1\n"


def test_a_pipe_and_a_folder_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (tmp_path / "pipe.csv", tmp_path):
        with pytest.raises(ExpectedError, match="no ordinary file"):
            write_csv(path, [{"x": 1}])
    assert (tmp_path / "pipe.csv").is_fifo()


def test_an_impossible_path_is_named_in_the_error(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.csv", tmp_path / f"{'a' * 300}.csv"):
        with pytest.raises(ExpectedError, match=rf"cannot write .*{path.name} "):
            write_csv(path, [{"x": 1}])
    write_csv(tmp_path / f"{'a' * 251}.csv", [{"x": 1}])  # the longest possible name


def test_missing_and_nan_figures_are_empty_cells(tmp_path):
    write_csv(tmp_path / "a.csv", [{"a": 1, "b": 0.123456789}, {"a": 2, "c": math.nan}])
    assert (tmp_path / "a.csv").read_text() == "a,b,c\n1,0.123457,\n2,,\n"
