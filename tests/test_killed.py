"""Trainers that are stopped or killed at any moment, in their own processes (killed.py)."""

from __future__ import annotations

import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from forked import run_forked
from PIL import Image
from trainers import TRAINERS, log_rows, same, training_file

from checkpoint import load_model, read_tensors

PLACES = {"step": 12, "sampling": 6, "scoring": 3, "writing": 12, "flushing": 15, "renaming": 15}  # the latest call of each


def check_files(folder, trainer, before: set[str]) -> int:
    """Check that every file can be read, and that no earlier one is missing. Returns the number of steps that are saved."""
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {name for name in before if not Path(name).name.startswith(".")} <= files
    before |= files
    for path in folder.glob("checkpoints/[!.]*.pt"):
        read_tensors(path) if "last" in path.name else load_model(path)
    for path in folder.glob("samples/[!.]*.gif"):
        with Image.open(path) as gif:
            for i in range(gif.n_frames):
                gif.seek(i)
                gif.load()  # raises where a frame is not whole
    last = folder / "checkpoints" / f"last_{trainer.prefix}.pt"
    steps = read_tensors(last)["state"]["step"] if last.exists() else 0
    assert not steps or len(log_rows(folder, trainer)) >= steps // 5
    return steps


def survive(kills: int, trainer, whole_run, tmp_path, seed: int) -> None:
    """Kill runs of the trainer at random moments, and resume each to its end. Compare the results with the whole run."""
    rng, survived, run_number = random.Random(seed), 0, 0
    while survived < kills:
        folder, known, saved, code = tmp_path / str(run_number), set(), 0, -signal.SIGKILL
        while code:
            place = rng.choice(list(PLACES)) if survived < kills else "step"
            count = rng.randint(1, PLACES[place]) if survived < kills else 1000
            flags = ["--resume"] if saved else trainer.flags
            result = run_forked("tests/killed.py", "SIGKILL", place, count, trainer.script, *flags, "--out-dir", folder)
            code = result.returncode
            assert code in (0, -signal.SIGKILL), result.stderr
            survived += code != 0
            steps = check_files(folder, trainer, known)
            assert steps >= saved, (place, count)
            saved = steps
        assert log_rows(folder, trainer) == log_rows(whole_run, trainer)
        assert same(training_file(folder, trainer), training_file(whole_run, trainer))
        for export in trainer.exports:
            name = f"checkpoints/best_{export}.pt"
            assert (folder / name).read_bytes() == (whole_run / name).read_bytes()
        assert not list(folder.rglob(".*")), "temporary files are left"
        run_number += 1


@pytest.mark.parametrize(("signum", "place"), [("SIGINT", "evaluation"), ("SIGTERM", "scoring")])
def test_a_signal_stops_sampling_and_scoring_within_seconds(signum, place, trainer, tmp_path):
    result = run_forked("tests/killed.py", signum, place, 1, trainer.script, *trainer.flags, "--out-dir", tmp_path)
    ended = time.time()
    assert result.returncode == 128 + signal.Signals[signum]
    assert f"{trainer.script} --resume --out-dir {tmp_path}" in result.stderr
    began = re.search(r"signal at ([\d.]+)", result.stdout)
    assert ended - float(began[1]) < 5  # a second or two on an idle machine


@pytest.mark.parametrize("trainer", TRAINERS[:1], indirect=True, ids=["gan"])  # the trainers share this code
def test_a_second_ctrl_c_ends_the_process_during_a_slow_step(trainer, tmp_path):
    result = run_forked("tests/killed.py", "twice", "step", 2, trainer.script, *trainer.flags, "--out-dir", tmp_path)
    assert result.returncode == -signal.SIGINT, result.stderr  # a shell shows 130
    began = re.search(r"signal at ([\d.]+)", result.stdout)
    assert time.time() - float(began[1]) < 5
    assert read_tensors(tmp_path / "checkpoints" / f"last_{trainer.prefix}.pt")["state"]["step"] == 0


@pytest.mark.parametrize("trainer", TRAINERS[:1], indirect=True, ids=["gan"])  # the trainers share this code
@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "| head -n 1"])
def test_a_training_continues_when_its_output_is_closed(closed, trainer, tmp_path, whole_run):
    command = [sys.executable, str(ROOT / trainer.script), *trainer.flags, "--out-dir", tmp_path]
    line = f"set -o pipefail; {shlex.join(map(str, command))} {closed}"
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "error" not in result.stderr.lower()
    assert log_rows(tmp_path, trainer) == log_rows(whole_run, trainer)


def test_two_kills_do_not_change_the_result_of_a_run(whole_run, trainer, tmp_path):
    survive(2, trainer, whole_run, tmp_path, seed=TRAINERS.index(trainer))


@pytest.mark.long
def test_twenty_kills_do_not_change_the_result_of_runs(whole_run, trainer, tmp_path):
    survive(20, trainer, whole_run, tmp_path, seed=100 + TRAINERS.index(trainer))
