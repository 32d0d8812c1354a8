"""Whole runs of every trainer on the embedded digits, interrupted and resumed."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, error_line, run_process
from PIL import Image

import callbacks
import evaluation
from adversarial import GANStep
from checkpoint import load_generator, load_model, read_tensors, write_tensors
from denoising import DiffusionStep
from experiment import Experiment
from guard import Guard
from training import TrainState
from utils import Interrupted

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
    Trainer("train_diffusion.py", "DIFF", "diffusion", DiffusionStep, ["DIFF"],
            [*FLAGS, "--steps", 2, "--batch-size", 64, "--limit", 320, "--eval-samples", 160]),  # as many steps, and quicker
]  # fmt: skip


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
    losses, rates = (["loss"], ["lr", "muon_lr"]) if trainer.prefix == "DIFF" else (["loss_d", "loss_g"], ["lr", "d_lr"])
    by_class = [] if trainer.prefix == "GAN" else ["label_accuracy", *(f"fid_ratio_{digit}" for digit in range(10))]
    by_class += ["fid_asked", "fid_ratio_asked"] if trainer.prefix == "DIFF" else []
    warnings = [row.pop("warning", "") for row in rows]  # with so little training there may be some
    assert all(warning == "" or "mode collapse" in warning or "dead discriminator" in warning for warning in warnings)
    scores = ["fid", "fid_ratio", "is", "is_std", "digits", "variety"]
    assert list(rows[0]) == ["epoch", "step", "images", *losses, *scores, *by_class, *rates]
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
        if where == "while scoring" and len(scorings) == (3 if trainer.prefix == "DIFF" else 2):  # of the second epoch
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

    def poisoned(self, loss, *optimizers, **clip):
        calls.append(1)
        return update(self, loss * math.nan if len(calls) == call else loss, *optimizers, **clip)

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
    assert code == 2 and "--width 16 differs" in error_line(err)


def test_resume_alone_continues_the_last_run(run, tmp_path, monkeypatch):
    """Wherever its flags have put it; and what a new run replaces is kept."""
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "digits", "--width", 8, "--batch-size", 256, "--eval-samples", 100, "--device", "cpu"]
    assert run("train_gan.py", *flags, "--epochs", 1, "--limit", 512)[0] == 0
    assert run("train_gan.py", *flags, "--epochs", 1)[0] == 0
    code, out, err = run("train_gan.py", "--resume", "--epochs", 2)
    assert code == 0 and "runs/digits/checkpoints/last_GAN.pt" in out, err
    folder = tmp_path / "runs" / "digits" / "checkpoints"
    finished = (folder / "last_GAN.pt").read_bytes()
    with monkeypatch.context() as patch:  # a run that is interrupted at once, where --resume was forgotten
        patch.setattr(callbacks.ProgressGIF, "on_start", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert run("train_gan.py", *flags, "--epochs", 1)[0] == 130
    assert (folder / "last_GAN.previous.pt").read_bytes() == finished
    assert read_tensors(folder / "last_GAN.pt")["state"]["step"] == 1


def test_the_same_seed_gives_the_same_files(whole_run, trainer, tmp_path, run):
    assert run(trainer.script, *trainer.flags, "--out-dir", tmp_path)[0] == 0
    names = [f"checkpoints/best_{export}.pt" for export in trainer.exports] + [f"samples/{trainer.title}_progress.gif"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (whole_run / name).read_bytes()
    assert log_rows(tmp_path, trainer) == log_rows(whole_run, trainer)
    assert same(training_file(tmp_path, trainer), training_file(whole_run, trainer))


@pytest.mark.parametrize("trainer", TRAINERS[:1], indirect=True, ids=["gan"])  # the code is shared
def test_a_new_run_keeps_what_it_replaces_however_often_it_is_resumed(trainer, tmp_path, run):
    """Stopped before its first step and after its first best epoch was written: an older run's best is still there."""
    for export in trainer.exports:
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / f"best_{export}.pt").write_text("an older run")
    args = ["--out-dir", tmp_path]
    result = run_process("tests/killed.py", "SIGKILL", "step", 1, trainer.script, *trainer.flags, *args)
    assert result.returncode == -signal.SIGKILL and "kept as" in result.stdout, result.stderr
    result = run_process("tests/killed.py", "SIGKILL", "renaming", 3, trainer.script, "--resume", *args)
    assert result.returncode == -signal.SIGKILL
    assert run(trainer.script, "--resume", *args)[0] == 0
    for export in trainer.exports:
        assert (tmp_path / "checkpoints" / f"best_{export}.previous.pt").read_text() == "an older run"
        assert load_model(tmp_path / "checkpoints" / f"best_{export}.pt")


@pytest.mark.parametrize("trainer", TRAINERS[:1], indirect=True, ids=["gan"])  # the code is shared
def test_a_best_file_that_was_deleted_is_written_again(whole_run, trainer, tmp_path, run):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    best = folder / "checkpoints" / f"best_{trainer.exports[0]}.pt"
    best.unlink()
    code, out, err = run(trainer.script, "--resume", "--epochs", 4, "--out-dir", folder)
    assert code == 0 and "not all there any more" in out, err
    assert load_generator(best).meta["epoch"] == 4


@pytest.mark.parametrize("trainer", TRAINERS[:1], indirect=True, ids=["gan"])  # the code is shared
def test_two_runs_cannot_write_the_same_files(trainer, tmp_path, run, monkeypatch):
    """The second one is refused while the first one trains."""
    outcomes, step = [], trainer.step.__call__

    def stepping(self, *args):
        if not outcomes:
            outcomes.append("running")
            outcomes.append(run_process(trainer.script, *trainer.flags, "--out-dir", tmp_path))
        return step(self, *args)

    monkeypatch.setattr(trainer.step, "__call__", stepping)
    code, _, err = run(trainer.script, *trainer.flags, "--epochs", 1, "--out-dir", tmp_path)
    assert code == 0, err
    assert outcomes[1].returncode == 1 and "another training is writing to" in error_line(outcomes[1].stderr)
    assert not list(tmp_path.rglob(".*"))


def with_state(**changes):
    return lambda content: content["state"].update(changes)


def with_flag(**changes):
    return lambda content: content["flags"].update(changes)


def with_part(name, value):
    return lambda content: content["parts"].update({name: value})


def with_log(change):
    return lambda content: change(content["state"]["log"])


def with_adam(change):
    """Change what Adam keeps of its first parameter."""
    return lambda content: change(content["parts"]["lr"]["state"][0])


def with_options(**changes):
    return lambda content: content["parts"]["lr"]["param_groups"][0].update(changes)


def with_weight(change):
    def apply(content):
        name = next(name for name in ("generator", "model") if name in content["parts"])
        key = next(key for key, value in content["parts"][name].items() if value.is_floating_point())
        content["parts"][name][key] = change(content["parts"][name][key])

    return apply


HOSTILE_STATES = {
    "state 5": lambda content: content.update(state=5),
    "state [[1]]": lambda content: content.update(state=[[1]]),
    "no state": lambda content: content.update(state={}),
    "epoch x": with_state(epoch="x"),
    "epoch -1": with_state(epoch=-1),
    "epoch 2 of 3": with_state(epoch=2),
    "batch 10^9": with_state(batch=10**9),
    "batch -1": with_state(batch=-1),
    "step 7": with_state(step=7),
    "images 1": with_state(images=1),
    "seconds nan": with_state(seconds=math.nan),
    "seconds -1": with_state(seconds=-1.0),
    "best epoch 99": with_state(best_epoch=99),
    "best epoch -1": with_state(best_epoch=-1),
    "best fid nan": with_state(best_fid=math.nan),
    "best fid -5": with_state(best_fid=-5.0),
    "losses x": with_state(loss_sums={"loss_d": "x"}),
    "log 5": with_state(log=5),
    "log [5]": with_state(log=[5, 5, 5]),
    "log empty rows": with_state(log=[{}, {}, {}]),
    "log shorter": with_log(lambda log: log.pop()),
    "log fid x": with_log(lambda log: log[0].update(fid="x")),
    "log without fid": with_log(lambda log: [row.pop("fid") for row in log]),
    "log without ratio": with_log(lambda log: [row.pop("fid_ratio") for row in log]),
    "log with a tensor": with_log(lambda log: log[0].update(fid=torch.zeros(3))),
    "flags 5": lambda content: content.update(flags=5),
    "no flags": lambda content: content.update(flags={}),
    "data dir 5": lambda content: content.update(data_dir=5),
    "batch size 0": with_flag(batch_size=0),
    "batch size x": with_flag(batch_size="x"),
    "batch size True": with_flag(batch_size=True),
    "seed x": with_flag(seed="x"),
    "seed 2^70": with_flag(seed=2**70),
    "seed -1": with_flag(seed=-1),
    "lr x": with_flag(lr="x"),
    "lr nan": with_flag(lr=math.nan),
    "lr -1": with_flag(lr=-1.0),
    "lr 1": with_flag(lr=1),
    "ema decay 7": with_flag(ema_decay=7.0),
    "ema 3": with_flag(ema=3),
    "dataset foo": with_flag(dataset="foo"),
    "limit -1": with_flag(limit=-1),
    "limit x": with_flag(limit="x"),
    "device list": with_flag(device=["cpu"]),
    "precision foo": with_flag(precision="foo"),
    "lr schedule foo": with_flag(lr_schedule="foo"),
    "eval every 0": with_flag(eval_every=0),
    "eval samples -5": with_flag(eval_samples=-5),
    "eval samples none": with_flag(epochs=None),
    "save every -1": with_flag(save_every=-1),
    "warmup a tensor": with_flag(warmup_steps=torch.ones(3)),
    "unknown flag": with_flag(foo=1),
    "no parts": lambda content: content.update(parts={}),
    "parts 5": lambda content: content.update(parts=5),
    "adam 5": with_part("lr", 5),
    "adam of 5": with_part("lr", {"state": {0: 5}, "param_groups": []}),
    "adam too small": with_adam(lambda state: state.update(exp_avg=torch.zeros(1))),
    "adam repeated": with_adam(lambda state: state.update(exp_avg=torch.zeros(1).expand(2**40))),
    "adam repeated in shape": with_adam(lambda state: state.update(exp_avg=torch.zeros(1).expand(state["exp_avg"].shape))),
    "adam missing": with_adam(lambda state: state.pop("exp_avg")),
    "adam more": with_adam(lambda state: state.update(foo=torch.zeros(1))),
    "adam nan": with_adam(lambda state: state["exp_avg"].fill_(math.nan)),
    "adam integers": with_adam(lambda state: state.update(exp_avg=state["exp_avg"].long())),
    "adam complex": with_adam(lambda state: state.update(exp_avg=state["exp_avg"] + 1j)),
    "adam step of three": with_adam(lambda state: state.update(step=torch.ones(3))),
    "adam of another": lambda content: content["parts"]["lr"]["state"].update({10**6: {"step": torch.ones(())}}),
    "adam lr x": with_options(lr="x"),
    "adam lr nan": with_options(lr=math.nan),
    "weight smaller": with_weight(lambda weight: weight.flatten()[:1]),
    "weight nan": with_weight(lambda weight: weight.fill_(math.nan)),
    "ema other": with_part("ema", {"x": torch.zeros(3)}),
    "early stopping list": with_part("early_stopping", []),
    "early stopping x": with_part("early_stopping", {"without_gain": "x"}),
    "early stopping tensor": with_part("early_stopping", {"without_gain": torch.ones(3)}),
    "gif strings": with_part("gif", {"frames": ["x", "y"]}),
    "gif smaller": with_part("gif", {"frames": torch.zeros(4, 3, 3, dtype=torch.uint8)}),
    "gif floats": with_part("gif", {"frames": torch.zeros(4, 242, 242)}),
    "gif 5": with_part("gif", 5),
}


@pytest.mark.parametrize("trainer", TRAINERS[::2], indirect=True, ids=["gan", "diffusion"])  # cgan is as gan here
def test_a_state_that_does_not_fit_is_refused(whole_run, trainer, tmp_path, run):
    """Whatever is changed in it: one line, before anything is written."""
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    path = folder / "checkpoints" / f"last_{trainer.prefix}.pt"
    for name, change in HOSTILE_STATES.items():
        content = read_tensors(whole_run / "checkpoints" / path.name)
        change(content)
        write_tensors(path, content)
        before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        code, _, err = run(trainer.script, "--resume", "--epochs", 4, "--out-dir", folder)
        assert code == 1 and "start a new run" in error_line(err), (name, err)
        assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}, name


@pytest.mark.parametrize("trainer", TRAINERS[::2], indirect=True, ids=["gan", "diffusion"])  # cgan is as gan here
def test_options_of_an_optimizer_are_the_codes_own(whole_run, trainer, tmp_path, run):
    """But for the learning rate, a file cannot change how a fused optimizer works."""
    folders = [tmp_path / "as it was", tmp_path / "changed"]
    for folder in folders:
        shutil.copytree(whole_run, folder)
    path = folders[1] / "checkpoints" / f"last_{trainer.prefix}.pt"
    content = read_tensors(path)
    with_options(fused=False, betas="xx", amsgrad=True, foreach=5)(content)
    write_tensors(path, content)
    for folder in folders:
        assert run(trainer.script, "--resume", "--epochs", 4, "--out-dir", folder)[0] == 0
    assert same(*(training_file(folder, trainer) for folder in folders))


# --------------------------------------------------------------------------------------------------------------------
# What if one of the things that a resumed run needs were left out?

NEEDED_PARTS = {
    "gan": ["generator", "discriminator", "lr", "d_lr"],
    "cgan": ["generator", "discriminator", "lr", "d_lr"],
    "diffusion": ["model", "lr", "muon_lr"],
}
NEEDED_HOOKS = ["ema", "gif", "early_stopping", "lr_schedule"]
NEEDED_STATE = ["epoch", "batch", "step", "images", "best_fid", "best_epoch", "loss_sums", "log"]


@pytest.fixture(scope="module")
def plateau_run(trainer, tmp_path_factory):
    """(interrupted, whole): a run whose FID gets worse from epoch to epoch, stopped in its last one, and to its end."""
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
    """Every scoring of a run gives a higher FID than the one before: 5, 6, 7 by epoch."""
    original = callbacks.FIDMonitor.after_epoch

    def monitored(self, state):
        self.score = lambda model: {"fid": 5.0 + state.epoch, "fid_ratio": 1.0}
        original(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks.FIDMonitor, "after_epoch", monitored)
        yield


def resume_without(missing, folder, trainer, monkeypatch):
    """Resume the run in `folder` as if `missing`, a part or a field of the state, had not been saved."""
    restore, adopt = Experiment._restore, Experiment._adopt_state

    def adopt_the_rest(self, saved):
        adopt(self, saved)
        if missing in saved:
            setattr(self.state, missing, getattr(TrainState(), missing))

    with worsening_fid(), monkeypatch.context() as patch:
        patch.setattr(Experiment, "_adopt_state", adopt_the_rest)
        patch.setattr(
            Experiment, "_restore", lambda self, parts: restore(self, {k: v for k, v in parts.items() if k != missing})
        )
        runpy.run_path(str(ROOT / trainer.script))["main"](["--resume", "--out-dir", str(folder)])


def test_nothing_that_a_resumed_run_needs_can_be_left_out(trainer, plateau_run, tmp_path, monkeypatch):
    interrupted, whole = plateau_run
    saved = read_tensors(interrupted / "checkpoints" / f"last_{trainer.prefix}.pt")
    needed = [*NEEDED_PARTS[trainer.title], *NEEDED_HOOKS]
    assert {name for name, part in saved["parts"].items() if part} == set(needed)
    assert set(saved["state"]) == {*NEEDED_STATE, "seconds", "row", "stop_reason"}  # of which the latter two are empty here
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


# --------------------------------------------------------------------------------------------------------------------
# Killed at any moment

PLACES = {"step": 12, "sampling": 6, "scoring": 3, "writing": 12, "flushing": 15, "renaming": 15}  # and their latest call


def check_files(folder, trainer, before: set[str]) -> int:
    """Everything there can be read, and what was there still is; gives the number of steps that are saved."""
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
    """Kill runs of the trainer at random moments, resuming each, until all are survived; compare with the whole run."""
    rng, survived, run_number = random.Random(seed), 0, 0
    while survived < kills:
        folder, known, saved, code = tmp_path / str(run_number), set(), 0, -signal.SIGKILL
        while code:
            place = rng.choice(list(PLACES)) if survived < kills else "step"
            count = rng.randint(1, PLACES[place]) if survived < kills else 1000
            flags = ["--resume"] if saved else trainer.flags
            result = run_process("tests/killed.py", "SIGKILL", place, count, trainer.script, *flags, "--out-dir", folder)
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
def test_sampling_and_scoring_stop_within_seconds(signum, place, trainer, tmp_path):
    result = run_process("tests/killed.py", signum, place, 1, trainer.script, *trainer.flags, "--out-dir", tmp_path)
    ended = time.time()
    assert result.returncode == 128 + signal.Signals[signum]
    assert f"{trainer.script} --resume --out-dir {tmp_path}" in result.stderr
    began = re.search(r"signal at ([\d.]+)", result.stdout)
    assert ended - float(began[1]) < 5  # a second or two, on a machine that has other things to do


@pytest.mark.parametrize("trainer", TRAINERS[:1], indirect=True, ids=["gan"])  # the code is shared
def test_a_second_ctrl_c_does_not_wait_for_a_slow_step(trainer, tmp_path):
    result = run_process("tests/killed.py", "twice", "step", 2, trainer.script, *trainer.flags, "--out-dir", tmp_path)
    assert result.returncode == -signal.SIGINT, result.stderr  # a shell shows 130
    began = re.search(r"signal at ([\d.]+)", result.stdout)
    assert time.time() - float(began[1]) < 5
    assert read_tensors(tmp_path / "checkpoints" / f"last_{trainer.prefix}.pt")["state"]["step"] == 0


@pytest.mark.parametrize("trainer", TRAINERS[:1], indirect=True, ids=["gan"])  # the code is shared
@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "| head -n 1"])
def test_a_training_goes_on_where_nobody_listens(closed, trainer, tmp_path, whole_run):
    command = [sys.executable, str(ROOT / trainer.script), *trainer.flags, "--out-dir", tmp_path]
    line = f"set -o pipefail; {shlex.join(map(str, command))} {closed}"
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "error" not in result.stderr.lower(), result.stderr
    assert log_rows(tmp_path, trainer) == log_rows(whole_run, trainer)


def test_a_killed_run_is_resumed(whole_run, trainer, tmp_path):
    survive(2, trainer, whole_run, tmp_path, seed=TRAINERS.index(trainer))


@pytest.mark.long
def test_twenty_killed_runs_are_resumed(whole_run, trainer, tmp_path):
    survive(20, trainer, whole_run, tmp_path, seed=100 + TRAINERS.index(trainer))
