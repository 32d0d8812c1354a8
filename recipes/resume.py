"""Resuming: read the state of a saved run, and refuse one that does not fit.

The file may be damaged, or come from somewhere else. So everything is checked before anything of the run changes.
`ValueError` names what does not fit. In a fused optimizer, a tensor of the wrong shape would read and write beyond its
memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import reprlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import FORMAT, check_tensor, has_format, read_tensors
from cli import parse_again
from files import ExpectedError, UsageError, is_first, say
from loop import TrainState

ENTRIES = {"training", "flags", "data_dir", "state", "parts"}
# Flags that a resumed run may change: they take effect from its next step on
CHANGEABLE = {"epochs", "patience", "save_every", "device", "lr", "d_lr", "muon_lr", "eval_every", "compile", "precision"}
REASONS = {  # why others may not
    "the networks of the saved run have another shape": {"width", "latent_dim", "loss"},
    "the saved run counts its steps in these batches": {"batch_size", "dataset", "limit", "dry_run"},
    "the saved run draws its data and noise with it": {"seed"},
    "the saved network predicts with it": {"timesteps", "schedule", "prediction"},
}
UNRECORDED = {"data_dir", "out_dir", "given", "parser", "resume", "before"}  # of this machine or this call, not of the run
# What the optimizers keep for each parameter, in its shape (`step` is a scalar)
OPTIMIZER_STATE = {"Adam": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}


def read_last(path: Path, prefix: str) -> dict[str, Any]:
    """The content of `last_<prefix>.pt`. `ExpectedError`: it is missing, damaged, or no such state."""
    if not path.exists():
        raise ExpectedError(f"there is no run to resume: {path} does not exist; leave out --resume, or give its --out-dir")
    saved = read_tensors(path)
    if not has_format(saved, ENTRIES) or saved["training"] != prefix:
        raise ExpectedError(f"{path} is not the state of a {prefix} training of format {FORMAT}; start a new run")
    return saved


def recorded(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that belong to the run."""
    return {name: value for name, value in vars(args).items() if name not in UNRECORDED}


def adopt_flags(args: argparse.Namespace, saved: dict[str, Any]) -> None:
    """Set `args` to the flags of the resumed run, except the changeable ones that were typed.

    Raises:
        ValueError: the flags are not those of this trainer, or its command line would not accept their values.
        UsageError: a typed flag contradicts them.
    """
    flags = saved["flags"]
    data_dir = saved["data_dir"]
    if not isinstance(flags, dict) or flags.keys() != recorded(args).keys():
        raise ValueError("it has other flags")
    changed = []
    parsed = vars(parse_again(args.parser, flags))
    for name, value in flags.items():
        if type(parsed[name]) is not type(value) or parsed[name] != value:
            raise ValueError(f"{name} is {reprlib.repr(value)}")
    if not isinstance(data_dir, (str, type(None))):
        raise ValueError("data_dir is no path")
    for name, value in flags.items():
        typed, flag = getattr(args, name), "--" + name.replace("_", "-")
        if name not in args.given or typed == value:
            setattr(args, name, value)
        elif name == "muon_lr" and not (typed and value):
            raise UsageError(f"{flag} {typed} would train other weights than the resumed run's {value}; leave it out")
        elif name in CHANGEABLE:
            changed.append(f"{flag} {typed} (before: {value})")
        else:
            reason = next((why for why, names in REASONS.items() if name in names), "the saved run depends on it")
            raise UsageError(f"{flag} {typed} differs from the resumed run's {value}; leave it out: {reason}")
    args.data_dir = args.data_dir or data_dir
    args.before = flags
    if changed and is_first():
        say(f"this run goes on with {', '.join(changed)}")


def adopt_state(state: TrainState, saved: dict[str, Any], batches_per_epoch: int, batch_size: int) -> None:
    """Set `state` to the position of the resumed run. An epoch has `batches_per_epoch` batches of `batch_size` images.

    Raises:
        ValueError: such a run cannot have this position.
    """
    fresh = vars(TrainState())
    if not isinstance(saved, dict) or saved.keys() != {field.name for field in dataclasses.fields(TrainState)}:
        raise ValueError("its state has other entries")
    if wrong := [name for name, value in saved.items() if type(value) is not type(fresh[name])]:
        raise ValueError(f"{wrong[0]} is {reprlib.repr(saved[wrong[0]])}")
    found = TrainState(**saved)
    if not (found.epoch >= 0 and 0 <= found.batch <= batches_per_epoch):
        raise ValueError(f"there is no batch {found.batch} of epoch {found.epoch + 1}")
    if found.step != found.epoch * batches_per_epoch + found.batch or found.images != found.step * batch_size:
        raise ValueError(f"step {found.step} is not batch {found.batch} of epoch {found.epoch + 1}")
    if not (math.isfinite(found.seconds) and found.seconds >= 0):
        raise ValueError(f"it took {found.seconds} seconds")
    if not all(isinstance(name, str) and type(x) is float and math.isfinite(x) for name, x in found.loss_sums.items()):
        raise ValueError("its losses are no numbers")
    _check_log(found)
    vars(state).update(saved)


def _check_log(state: TrainState) -> None:
    for number, row in enumerate(state.log, 1):
        if not isinstance(row, dict) or row.get("epoch") != number or not all(map(_is_figure, row.items())):
            raise ValueError(f"row {number} of the log is {reprlib.repr(row)}")
    if len(state.log) != state.epoch or not 0 <= state.best_epoch <= state.epoch:
        raise ValueError(f"there are {len(state.log)} rows and a best epoch {state.best_epoch} in {state.epoch} epochs")
    best = state.log[state.best_epoch - 1] if state.best_epoch else {"fid": math.inf, "fid_ratio": math.nan}
    if best.get("fid") != state.best_fid or "fid_ratio" not in best:
        raise ValueError(f"the best FID is not that of epoch {state.best_epoch}")


def _is_figure(item: tuple[Any, Any]) -> bool:
    name, value = item
    return type(value) is str if name == "warning" else isinstance(name, str) and type(value) in (int, float)


def restore(parts: dict[str, Any], saved: dict[str, Any], factors: dict[str, float]) -> None:
    """Give networks, optimizers and callbacks their saved state.

    `factors`: name of an optimizer -> what its saved learning rate is multiplied by, if the flag has changed.

    Raises:
        ValueError, TypeError, KeyError, RuntimeError: a part is missing, or has other content.
    """
    for name, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            part.load_state_dict(_checked(name, part, saved[name], factors.get(name, 1.0)))
            continue
        if like := part.state_dict():  # else the callback checks its state itself
            _check_alike(name, like, saved[name])
        part.load_state_dict(saved[name])


def _check_alike(name: str, like: Any, value: Any) -> None:
    """`ValueError` unless `value` has the structure, types and shapes of `like`, and finite tensors."""
    if isinstance(like, Tensor):
        check_tensor(name, like, value)
    elif isinstance(like, dict):
        if not isinstance(value, dict) or like.keys() != value.keys():
            raise ValueError(f"{name} has other entries")
        for key in like:
            _check_alike(f"{name} {key}", like[key], value[key])
    elif isinstance(like, (list, tuple)):
        if type(value) is not type(like) or len(value) != len(like):
            raise ValueError(f"{name} has another length")
        for part, other in zip(like, value):
            _check_alike(name, part, other)
    elif type(value) is not type(like):
        raise ValueError(f"{name} is {reprlib.repr(value)}")


def _checked(name: str, optimizer: torch.optim.Optimizer, saved: dict[str, Any], factor: float) -> dict[str, Any]:
    """The saved state of an optimizer, in new memory. Of its options, only the learning rates are taken."""
    like = optimizer.state_dict()["param_groups"]
    if not isinstance(saved, dict) or saved.keys() != {"state", "param_groups"} or not isinstance(saved["state"], dict):
        raise ValueError(f"{name} is no optimizer's state")
    rates = [group["lr"] for group in saved["param_groups"]]
    if len(rates) != len(like) or not all(type(rate) is float and 0 <= rate <= 1 for rate in rates):
        raise ValueError(f"{name} has the learning rates {reprlib.repr(rates)}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    expected = OPTIMIZER_STATE.get(type(optimizer).__name__)
    state: dict[int, dict[str, Tensor]] = {}
    for number, values in saved["state"].items():
        if type(number) is not int or not 0 <= number < len(parameters) or values.keys() != (expected or values.keys()):
            raise ValueError(f"{name} keeps something else than this optimizer")
        state[number] = {}
        for key, value in values.items():
            own = torch.zeros(()) if key == "step" else torch.empty_like(parameters[number])
            check_tensor(f"{name} {key}", own, value)
            state[number][key] = own.copy_(value)
    return {"state": state, "param_groups": [{**group, "lr": rate * factor} for group, rate in zip(like, rates)]}
