"""What a run leaves to be continued, and what of it is believed: the file may be damaged, or come from somewhere else.

Everything is compared with what this code would have saved, before anything of the run is touched: `ValueError` names
what does not fit. Where a tensor of the wrong shape got as far as a fused optimizer, it would read and write beyond it.
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
from flags import fits_flag
from training import TrainState
from utils import ExpectedError, UsageError

ENTRIES = {"training", "flags", "data_dir", "state", "parts"}
# What a resumed run may change; everything else is taken from the run that is continued.
CHANGEABLE = {"epochs", "patience", "save_every", "device"}
UNRECORDED = {"data_dir", "out_dir", "given", "parser", "resume"}  # of this machine or this call, not of the run
# What the optimizers keep for each parameter, in its shape but for the scalar `step`
OPTIMIZER_STATE = {"Adam": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}


def read_last(path: Path, prefix: str) -> dict[str, Any]:
    """The content of `last_<prefix>.pt`; `ExpectedError` where it is missing, damaged, or of something else."""
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
    """Take the resumed run's flags.

    Raises:
        ValueError: they are not those of this trainer, or have values that its command line would not take.
        UsageError: a typed flag contradicts them.
    """
    flags, data_dir = saved["flags"], saved["data_dir"]
    if not isinstance(flags, dict) or flags.keys() != recorded(args).keys():
        raise ValueError("it has other flags")
    for name, value in flags.items():
        if not fits_flag(args.parser, name, value):
            raise ValueError(f"{name} is {reprlib.repr(value)}")
    if not isinstance(data_dir, (str, type(None))):
        raise ValueError("data_dir is no path")
    for name, value in flags.items():
        typed = getattr(args, name)
        if name in args.given and name in CHANGEABLE:
            continue
        if name in args.given and typed not in (value, "auto"):
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {typed} differs from the resumed run's {value}; leave it out")
        setattr(args, name, value)
    args.data_dir = args.data_dir or data_dir


def adopt_state(state: TrainState, saved: dict[str, Any], batches_per_epoch: int, batch_size: int) -> None:
    """Take the position of the resumed run, whose epochs have so many batches of so many images.

    Raises:
        ValueError: it is no position that such a run can have.
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


def restore(parts: dict[str, Any], saved: dict[str, Any]) -> None:
    """Give networks, optimizers and callbacks what they had saved.

    Raises:
        ValueError, TypeError, KeyError, RuntimeError: one of them is missing, or would have saved something else.
    """
    for name, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            part.load_state_dict(_checked(name, part, saved[name]))
            continue
        if like := part.state_dict():  # else a callback knows by itself what it takes
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


def _checked(name: str, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer, its tensors in memory of their own; of the options only the learning rates are taken."""
    like = optimizer.state_dict()["param_groups"]
    if not isinstance(saved, dict) or saved.keys() != {"state", "param_groups"} or not isinstance(saved["state"], dict):
        raise ValueError(f"{name} is no optimizer's state")
    rates = [group["lr"] for group in saved["param_groups"]]
    if len(rates) != len(like) or not all(type(rate) is float and 0 <= rate <= 1 for rate in rates):
        raise ValueError(f"{name} has the learning rates {reprlib.repr(rates)}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    expected, state = OPTIMIZER_STATE.get(type(optimizer).__name__), {}
    for number, values in saved["state"].items():
        if type(number) is not int or not 0 <= number < len(parameters) or values.keys() != (expected or values.keys()):
            raise ValueError(f"{name} keeps something else than this optimizer")
        state[number] = {}
        for key, value in values.items():
            own = torch.zeros(()) if key == "step" else torch.empty_like(parameters[number])
            check_tensor(f"{name} {key}", own, value)
            state[number][key] = own.copy_(value)
    return {"state": state, "param_groups": [{**group, "lr": rate} for group, rate in zip(like, rates)]}
