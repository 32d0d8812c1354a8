"""recipes/run.py and recipes/resume.py: whole runs of every trainer, interrupted and resumed."""

from __future__ import annotations

import contextlib
import math
import os
import runpy
import shutil
import signal

import pytest
from conftest import ROOT, error_line, read_csv
from forked import run_forked
from trainers import TRAINERS, log_rows, same, training_file

import callbacks
import train_gan
from checkpoint import load_generator, load_model, read_tensors
from engine.guard import Guard
from files import Interrupted
from loop import TrainState
from recipes import resume
from scoring.scorer import Scorer


def test_a_run_writes_its_log_its_best_checkpoint_and_its_gif(whole_run, trainer):
    rows = log_rows(whole_run, trainer)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    losses, rates = (["loss"], ["lr", "muon_lr"]) if trainer.prefix == "DIFF" else (["loss_d", "loss_g"], ["lr", "d_lr"])
    by_class = [] if trainer.prefix == "GAN" else ["label_accuracy", *(f"fid_ratio_{digit}" for digit in range(10))]
    by_class += ["fid_unconditional", "fid_ratio_unconditional"] if trainer.prefix == "DIFF" else []
    warnings = [row.pop("warning", "") for row in rows]  # possible after so little training
    assert all(warning == "" or "mode collapse" in warning or "dead discriminator" in warning for warning in warnings)
    scores = ["fid", "fid_ratio", "is", "is_std", "digits", "variety"]
    assert list(rows[0]) == ["epoch", "step", "images", *losses, *scores, *by_class, *rates]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    generator = load_generator(whole_run / "checkpoints" / f"best_{trainer.exports[0]}.pt")
    best = min(rows, key=lambda row: float(row["fid"]))
    assert generator.meta["epoch"] == int(best["epoch"])
    assert generator.meta["flags"]["dataset"] == "digits"
    assert "out_dir" not in generator.meta["flags"], "equal runs give equal files"
    assert (whole_run / "samples" / f"{trainer.title}_progress.gif").stat().st_size > 1000


@pytest.mark.parametrize("where", ["in the middle of an epoch", "while scoring"])
def test_an_interrupted_run_resumes_to_the_same_files(where, whole_run, trainer, tmp_path, run, monkeypatch):
    steps, scorings = [], []
    original_step, original_score = trainer.step.__call__, Scorer.__call__

    def stepping(self, *args):
        steps.append(1)
        if where == "in the middle of an epoch" and len(steps) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return original_step(self, *args)

    def scoring(self, *args):
        scorings.append(1)
        if where == "while scoring" and len(scorings) == (3 if trainer.prefix == "DIFF" else 2):  # of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return original_score(self, *args)

    monkeypatch.setattr(trainer.step, "__call__", stepping)
    monkeypatch.setattr(Scorer, "__call__", scoring)
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
def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_file(call, whole_run, trainer, tmp_path, run, monkeypatch):
    """The run ends at a loss that is nan. When it is resumed from its last good state, it gives the files of a whole run."""
    calls, step = [], Guard.step

    def poisoned(self, loss, norm, *optimizers):
        calls.append(1)
        if len(calls) == call:  # as if the loss had been nan before its backward pass
            loss, norm = loss * math.nan, norm * math.nan
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                for parameter in group["params"]:
                    parameter.grad.fill_(math.nan)
        return step(self, loss, norm, *optimizers)

    with monkeypatch.context() as patch:
        patch.setattr(Guard, "step", poisoned)
        code, _, err = run(trainer.script, *trainer.flags, "--out-dir", tmp_path)
    name = {"DIFF": "loss"}.get(trainer.prefix, "loss_g" if call % 2 == 0 else "loss_d")
    number = call if trainer.prefix == "DIFF" else (call + 1) // 2
    assert code == 1
    assert f"{name} or its gradient is not finite at step {number};" in error_line(err)
    assert run(trainer.script, "--resume", "--out-dir", tmp_path)[0] == 0
    assert log_rows(tmp_path, trainer) == log_rows(whole_run, trainer)
    assert same(training_file(tmp_path, trainer), training_file(whole_run, trainer))


def test_resuming_is_refused_without_a_run_after_its_end_or_with_other_flags(whole_run, trainer, tmp_path, run):
    assert "no run to resume" in error_line(run(trainer.script, "--resume", "--out-dir", tmp_path)[2])
    assert "larger --epochs" in error_line(run(trainer.script, "--resume", "--out-dir", whole_run)[2])
    code, _, err = run(trainer.script, "--resume", "--out-dir", whole_run, "--width", 16)
    assert code == 2
    assert "--width 16 differs" in error_line(err)


SMALL_RUN = ["--dataset", "digits", "--width", 8, "--batch-size", 256, "--eval-samples", 100, "--device", "cpu"]


def test_resume_without_a_folder_continues_the_latest_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("train_gan.py", *SMALL_RUN, "--epochs", 1, "--limit", 512)[0] == 0
    assert run("train_gan.py", *SMALL_RUN, "--epochs", 1)[0] == 0
    code, out, err = run("train_gan.py", "--resume", "--epochs", 2)
    assert code == 0, err
    assert "runs/digits/checkpoints/last_GAN.pt" in out


def test_a_new_run_keeps_the_state_that_it_replaces(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("train_gan.py", *SMALL_RUN, "--epochs", 1)[0] == 0
    folder = tmp_path / "runs" / "digits" / "checkpoints"
    finished = (folder / "last_GAN.pt").read_bytes()
    with monkeypatch.context() as patch:  # a run that is interrupted at once, because --resume was forgotten
        patch.setattr(callbacks.ProgressGIF, "on_start", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert run("train_gan.py", *SMALL_RUN, "--epochs", 1)[0] == 130
    assert (folder / "last_GAN.previous.pt").read_bytes() == finished
    assert read_tensors(folder / "last_GAN.pt")["state"]["step"] == 1


def test_the_same_seed_gives_the_same_files(whole_run, trainer, tmp_path, run):
    assert run(trainer.script, *trainer.flags, "--out-dir", tmp_path)[0] == 0
    names = [f"checkpoints/best_{export}.pt" for export in trainer.exports] + [f"samples/{trainer.title}_progress.gif"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (whole_run / name).read_bytes()
    assert log_rows(tmp_path, trainer) == log_rows(whole_run, trainer)
    assert same(training_file(tmp_path, trainer), training_file(whole_run, trainer))


@pytest.mark.parametrize("trainer", TRAINERS[:1], indirect=True, ids=["gan"])  # the trainers share this code
def test_the_best_files_of_an_older_run_survive_repeated_resuming(trainer, tmp_path, run):
    """The run is killed before its first step, and again after it has written its first best epoch."""
    for export in trainer.exports:
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / f"best_{export}.pt").write_text("an older run")
    args = ["--out-dir", tmp_path]
    result = run_forked("tests/killed.py", "SIGKILL", "step", 1, trainer.script, *trainer.flags, *args)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert "kept as" in result.stdout
    result = run_forked("tests/killed.py", "SIGKILL", "renaming", 3, trainer.script, "--resume", *args)
    assert result.returncode == -signal.SIGKILL
    assert run(trainer.script, "--resume", *args)[0] == 0
    for export in trainer.exports:
        assert (tmp_path / "checkpoints" / f"best_{export}.previous.pt").read_text() == "an older run"
        assert load_model(tmp_path / "checkpoints" / f"best_{export}.pt")


@pytest.mark.parametrize("trainer", TRAINERS[:1], indirect=True, ids=["gan"])  # the trainers share this code
def test_a_deleted_best_file_is_written_again(whole_run, trainer, tmp_path, run):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    best = folder / "checkpoints" / f"best_{trainer.exports[0]}.pt"
    best.unlink()
    code, out, err = run(trainer.script, "--resume", "--epochs", 4, "--out-dir", folder)
    assert code == 0, err
    assert "not all of them exist" in out
    assert load_generator(best).meta["epoch"] == 4


@pytest.mark.parametrize("trainer", TRAINERS[:1], indirect=True, ids=["gan"])  # the trainers share this code
def test_a_second_run_in_the_same_folder_is_refused_while_the_first_trains(trainer, tmp_path, run, monkeypatch):
    outcomes, step = [], trainer.step.__call__

    def stepping(self, *args):
        if not outcomes:
            outcomes.append("running")
            outcomes.append(run_forked(trainer.script, *trainer.flags, "--out-dir", tmp_path))
        return step(self, *args)

    monkeypatch.setattr(trainer.step, "__call__", stepping)
    code, _, err = run(trainer.script, *trainer.flags, "--epochs", 1, "--out-dir", tmp_path)
    assert code == 0, err
    assert outcomes[1].returncode == 1
    assert "another training is writing to" in error_line(outcomes[1].stderr)
    assert not list(tmp_path.rglob(".*"))


# --------------------------------------------------------------------------------------------------------------------
# A run is resumed without one of the things that it has saved

NEEDED_PARTS = {
    "gan": ["generator", "discriminator", "generator optimizer", "discriminator optimizer"],
    "cgan": ["generator", "discriminator", "generator optimizer", "discriminator optimizer"],
    "diffusion": ["model", "others optimizer", "matrices optimizer"],
}
NEEDED_HOOKS = ["ema", "gif", "early_stopping", "lr_schedule"]
NEEDED_STATE = ["epoch", "batch", "step", "images", "best_fid", "best_epoch", "loss_sums", "log"]


@pytest.fixture(scope="module")
def plateau_run(trainer, tmp_path_factory):
    """(interrupted, whole): a run whose FID gets worse with every epoch, stopped in its last epoch, and completed."""
    folders, steps = [tmp_path_factory.mktemp(name) for name in ("interrupted", "whole")], []
    original = trainer.step.__call__

    def stepping(self, *args):
        steps.append(1)
        if len(steps) == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)

    main = runpy.run_path(str(ROOT / trainer.script))["main"]
    flags = [*trainer.flags, "--lr-schedule", "plateau", "--patience", 2]
    with worsening_fid(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.step, "__call__", stepping)
        with pytest.raises(Interrupted):
            main([*map(str, flags), "--out-dir", str(folders[0])])
        shutil.copytree(folders[0], folders[1], dirs_exist_ok=True)
        main(["--resume", "--out-dir", str(folders[1])])
    return folders


@contextlib.contextmanager
def worsening_fid():
    """The FID grows with every epoch: 5, 6, 7."""
    original = callbacks.FIDMonitor.after_epoch

    def monitored(self, state):
        self.score = lambda model: {"fid": 5.0 + state.epoch, "fid_ratio": 1.0}
        original(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks.FIDMonitor, "after_epoch", monitored)
        yield


def resume_without(missing, folder, trainer, monkeypatch):
    """Resume the run in `folder` as if `missing`, a part or a field of the state, had not been saved."""
    restore, adopt_state = resume.restore, resume.adopt_state

    def restore_the_others(parts, saved, factors):
        restore({name: part for name, part in parts.items() if name != missing}, saved, factors)

    def adopt_the_others(state, saved, *sizes):
        adopt_state(state, saved, *sizes)
        if missing in saved:
            setattr(state, missing, getattr(TrainState(), missing))

    with worsening_fid(), monkeypatch.context() as patch:
        patch.setattr(resume, "restore", restore_the_others)
        patch.setattr(resume, "adopt_state", adopt_the_others)
        runpy.run_path(str(ROOT / trainer.script))["main"](["--resume", "--out-dir", str(folder)])


def test_every_saved_part_and_number_is_needed_to_resume(trainer, plateau_run, tmp_path, monkeypatch):
    interrupted, whole = plateau_run
    saved = read_tensors(interrupted / "checkpoints" / f"last_{trainer.prefix}.pt")
    needed = [*NEEDED_PARTS[trainer.title], *NEEDED_HOOKS]
    assert {name for name, part in saved["parts"].items() if part} == set(needed)
    assert set(saved["state"]) == {*NEEDED_STATE, "seconds", "row", "stop_reason"}  # the last two are empty here
    for missing in ("nothing", *needed, *NEEDED_STATE):
        folder = tmp_path / missing
        shutil.copytree(interrupted, folder)
        try:
            resume_without(missing, folder, trainer, monkeypatch)
            unharmed = same(training_file(folder, trainer), training_file(whole, trainer))
            unharmed &= log_rows(folder, trainer) == log_rows(whole, trainer)
        except (IndexError, KeyError, ZeroDivisionError):
            unharmed = False
        assert unharmed == (missing == "nothing"), missing


GAN_RUN = ["--dataset", "digits", "--width", 8, "--batch-size", 256, "--eval-samples", 100, "--device", "cpu", "--epochs", 1]


@pytest.mark.parametrize("schedule", ["constant", "plateau"])
def test_a_resumed_run_may_change_its_learning_rates(schedule, run, tmp_path):
    assert run("train_gan.py", *GAN_RUN, "--lr-schedule", schedule, "--out-dir", tmp_path)[0] == 0
    code, out, err = run("train_gan.py", "--resume", "--epochs", 2, "--lr", 1e-5, "--d-lr", 2e-5, "--out-dir", tmp_path)
    assert code == 0, err
    assert "this run goes on with --epochs 2 (before: 1), --lr 1e-05 (before: 0.0005), --d-lr 2e-05 (before: 0.0015)" in out
    rows = read_csv(tmp_path / "reports" / "gan_training_log.csv")
    assert [row["lr"] for row in rows] == ["0.0005", "1e-05"]
    assert [row["d_lr"] for row in rows] == ["0.0015", "2e-05"]
    assert read_tensors(tmp_path / "checkpoints" / "last_GAN.pt")["flags"]["lr"] == 1e-5


def test_the_cosine_of_a_resumed_run_falls_from_its_new_rate(run, tmp_path):
    assert run("train_gan.py", *GAN_RUN, "--out-dir", tmp_path)[0] == 0
    assert run("train_gan.py", "--resume", "--epochs", 2, "--lr", 1e-5, "--out-dir", tmp_path)[0] == 0
    rows = read_csv(tmp_path / "reports" / "gan_training_log.csv")
    assert 0 <= float(rows[1]["lr"]) <= 1e-5


def test_a_resumed_run_is_checked_against_its_own_epochs(run, tmp_path):
    assert train_gan.parse_args(["--resume", "--eval-every", "80"]).eval_every == 80  # more than the default --epochs
    assert run("train_gan.py", *GAN_RUN, "--out-dir", tmp_path)[0] == 0
    code, _, err = run("train_gan.py", "--resume", "--eval-every", 80, "--out-dir", tmp_path)
    assert code == 2
    assert "--eval-every 80 is more than the run's 1 epochs" in error_line(err)


def test_a_resumed_run_may_be_scored_less_often_and_in_another_precision(run, tmp_path):
    assert run("train_gan.py", *GAN_RUN, "--out-dir", tmp_path)[0] == 0
    changes = ["--epochs", 3, "--eval-every", 2, "--precision", "bf16"]
    code, _, err = run("train_gan.py", "--resume", *changes, "--out-dir", tmp_path)
    assert code == 0, err
    rows = read_csv(tmp_path / "reports" / "gan_training_log.csv")
    assert [bool(row["fid"]) for row in rows] == [True, True, False]
    assert read_tensors(tmp_path / "checkpoints" / "last_GAN.pt")["flags"]["precision"] == "bf16"


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        (["--width", 16], "another shape"),
        (["--batch-size", 128], "counts its steps"),
        (["--seed", 1], "data and noise"),
        (["--loss", "bce"], "another shape"),
        (["--beta1", 0.5], "depends on it"),
    ],
)
def test_what_a_resumed_run_cannot_change_is_refused_with_the_reason(flag, reason, run, tmp_path):
    assert run("train_gan.py", *GAN_RUN, "--out-dir", tmp_path)[0] == 0
    code, _, err = run("train_gan.py", "--resume", "--epochs", 2, *flag, "--out-dir", tmp_path)
    assert code == 2
    assert reason in error_line(err)


def test_muon_cannot_be_switched_off_in_a_resumed_run(whole_run, trainer, run):
    if trainer.prefix == "DIFF":
        code, _, err = run(trainer.script, "--resume", "--epochs", 9, "--muon-lr", 0, "--out-dir", whole_run)
        assert code == 2
        assert "would train other weights" in error_line(err)
