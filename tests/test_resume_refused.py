"""recipes/resume.py: a saved state that does not fit its run is refused before anything is written."""

from __future__ import annotations

import copy
import math
import shutil

import pytest
import torch
from conftest import error_line
from trainers import TRAINERS, same, training_file

from checkpoint import read_tensors, write_tensors


def with_state(**changes):
    return lambda content: content["state"].update(changes)


def with_flag(**changes):
    return lambda content: content["flags"].update(changes)


def with_part(name, value):
    return lambda content: content["parts"].update({name: value})


def with_log(change):
    return lambda content: change(content["state"]["log"])


def adam_of(content) -> str:
    """The name of the saved Adam."""
    return next(name for name in ("generator optimizer", "others optimizer") if name in content["parts"])


def with_adam(change):
    """Change what Adam keeps of its first parameter."""
    return lambda content: change(content["parts"][adam_of(content)]["state"][0])


def with_options(**changes):
    return lambda content: content["parts"][adam_of(content)]["param_groups"][0].update(changes)


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
    "adam 5": lambda content: content["parts"].update({adam_of(content): 5}),
    "adam of 5": lambda content: content["parts"].update({adam_of(content): {"state": {0: 5}, "param_groups": []}}),
    "adam too small": with_adam(lambda state: state.update(exp_avg=torch.zeros(1))),
    "adam repeated": with_adam(lambda state: state.update(exp_avg=torch.zeros(1).expand(2**40))),
    "adam repeated in shape": with_adam(lambda state: state.update(exp_avg=torch.zeros(1).expand(state["exp_avg"].shape))),
    "adam missing": with_adam(lambda state: state.pop("exp_avg")),
    "adam more": with_adam(lambda state: state.update(foo=torch.zeros(1))),
    "adam nan": with_adam(lambda state: state["exp_avg"].fill_(math.nan)),
    "adam integers": with_adam(lambda state: state.update(exp_avg=state["exp_avg"].long())),
    "adam complex": with_adam(lambda state: state.update(exp_avg=state["exp_avg"] + 1j)),
    "adam step of three": with_adam(lambda state: state.update(step=torch.ones(3))),
    "adam of another": lambda content: content["parts"][adam_of(content)]["state"].update({10**6: {"step": torch.ones(())}}),
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


each_kind = pytest.mark.parametrize("trainer", TRAINERS[::2], indirect=True, ids=["gan", "diffusion"])  # cgan is like gan


@pytest.fixture(scope="module")
def finished_run(whole_run, trainer, tmp_path_factory):
    """(folder, path of the last state, its content) of a copy of the whole run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(whole_run, folder)
    path = folder / "checkpoints" / f"last_{trainer.prefix}.pt"
    return folder, path, read_tensors(path)


@each_kind
@pytest.mark.parametrize("change", HOSTILE_STATES.values(), ids=HOSTILE_STATES)
def test_a_state_that_does_not_fit_is_refused_in_one_line(change, finished_run, trainer, run):
    folder, path, content = finished_run
    content = copy.deepcopy(content)
    change(content)
    write_tensors(path, content)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    code, _, err = run(trainer.script, "--resume", "--epochs", 4, "--out-dir", folder)
    assert code == 1
    assert "start a new run" in error_line(err)
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}, "no file has changed"


@each_kind
def test_only_the_learning_rate_of_an_optimizer_is_read_from_a_file(whole_run, trainer, tmp_path, run):
    """Other options could make a fused optimizer write beyond its memory."""
    folders = [tmp_path / "unchanged", tmp_path / "changed"]
    for folder in folders:
        shutil.copytree(whole_run, folder)
    path = folders[1] / "checkpoints" / f"last_{trainer.prefix}.pt"
    content = read_tensors(path)
    with_options(fused=False, betas="xx", amsgrad=True, foreach=5)(content)
    write_tensors(path, content)
    for folder in folders:
        assert run(trainer.script, "--resume", "--epochs", 4, "--out-dir", folder)[0] == 0
    assert same(*(training_file(folder, trainer) for folder in folders))
