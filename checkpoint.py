"""The project's files: self-describing models and resumable training state, made of plain tensors and primitives.

A model file is `{"format", "model", "config", "weights", "meta"}`. A training file is `{"format", "training", ...}`. Both
are torch ZIP files. They are read with `weights_only=True`, after `engine/safe_archive.py` has checked the container. Equal
runs give equal model files: a file holds no path and no time.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from engine.safe_archive import check_archive
from files import ExpectedError, atomic_path, cannot_read, expanded, say
from models import build

FORMAT = 1
MAX_MODEL_BYTES = 256 * 2**20  # far above every model of this project: bounds what a hostile file can allocate
MAX_TRAINING_BYTES = 8 * 2**30
RANDOM_FILLS = (torch.Tensor.normal_, torch.Tensor.uniform_)


def save_model(path: str | os.PathLike[str], name: str, model: Any, meta: dict[str, Any], half: bool = True) -> None:
    """Write a self-describing model file.

    Args:
        name: the model's name in the registry.
        meta: primitives to store beside the weights: epoch, metrics, flags, versions.
        half: store floating-point weights in float16, where they fit.

    Raises:
        ExpectedError: a weight is not finite, or the file cannot be written. The old file is kept.
    """
    weights = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    for key, value in weights.items():
        if value.is_floating_point():
            if not torch.isfinite(value).all():
                raise ExpectedError(f"weight {key!r} of {name} is not finite, so {path} was not written; lower --lr")
            if half and torch.isfinite(value.half()).all():  # a number above 65,504 needs more than float16
                weights[key] = value.half()
    config = {field: getattr(model.config, field) for field in model.config.__dataclass_fields__}
    content = {"format": FORMAT, "model": name, "config": config, "weights": weights, "meta": meta}
    write_tensors(path, content)


def load_generator(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Any:
    """The generator in a model file, in eval mode on `device`. It can be sampled, and needs no architecture flags.

    The network has `.model_name` and `.meta` as the file states them.

    Raises:
        ExpectedError: the file is missing, damaged, of another kind, or does not fit the model that it names.
    """
    model = load_model(path, device)
    if not hasattr(model, "sample"):
        raise ExpectedError(f"{path} holds a {model.model_name}, which cannot be sampled; give a generator's file (…_G.pt)")
    return model


def load_model(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Any:
    """Any model of the registry, in eval mode on `device`, in float32. Errors as for `load_generator`."""
    content = read_tensors(path, MAX_MODEL_BYTES)
    if type(training := content.get("training")) is str:
        raise ExpectedError(
            f"{path} is the state of a training, for --resume; give its model, {_models_beside(path, training)}"
        )
    if not has_format(content, {"model", "config", "weights", "meta"}):
        raise ExpectedError(f"{path} is not a model checkpoint of format {FORMAT}; it may be another program's")
    name, config, weights = content["model"], content["config"], content["weights"]
    try:
        if not isinstance(name, str) or not all(isinstance(content[part], dict) for part in ("config", "weights", "meta")):
            raise ValueError("its entries have the wrong types")
        with torch.device("meta"), _NoInitialisation():  # checks names and shapes before it allocates memory
            _check_weights(build(name, **config).state_dict(), weights)
        model = build(name, **config)
        model.load_state_dict(weights)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ExpectedError(f"{path} does not fit its model ({error}); train or download it again") from error
    model.model_name, model.meta = name, content["meta"]
    return model.to(device).eval()


def _models_beside(path: str | os.PathLike[str], training: str) -> str:
    """The best model of a training state: the file that is there, or its name."""
    files = (expanded(path).parent / f"best_{training[:20]}{suffix}.pt" for suffix in ("_G", ""))
    return next((str(file) for file in files if file.is_file()), "a best_….pt")


def write_tensors(path: str | os.PathLike[str], content: dict) -> None:
    """Write a dict of tensors and primitives atomically. Equal content gives equal bytes."""
    buffer = io.BytesIO()  # not a path: torch would write its name into the archive
    torch.save(_with_shared_strings(content), buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _with_shared_strings(value: object) -> object:
    """The same content, with one object for equal strings. pickle writes a repeated object as a reference."""
    if isinstance(value, dict):
        return {_with_shared_strings(key): _with_shared_strings(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_with_shared_strings, value))
    return sys.intern(value) if type(value) is str else value


def read_tensors(path: str | os.PathLike[str], max_bytes: int = MAX_TRAINING_BYTES) -> dict:
    """The dict in a file of `write_tensors`, on the CPU. No code from the file is run.

    Raises:
        ExpectedError: the file is missing, damaged, too large, or holds anything but a dict of tensors and primitives.
    """
    path = expanded(path)
    try:
        if not path.is_file():
            raise ExpectedError(f"{path} does not exist (or is no file); train the model first, or give another path")
        check_archive(path, max_bytes)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except ExpectedError:
        raise
    except Exception as error:  # a damaged or hostile file can make the reader raise anything
        raise cannot_read(path, error, "is damaged or no checkpoint ({reason}); train or download it again") from error
    if not isinstance(content, dict):
        raise ExpectedError(f"{path} is no checkpoint of this project: it holds a {type(content).__name__}")
    return content


def has_format(content: dict, entries: set[str]) -> bool:
    """Whether a file's content has this version's format and these entries."""
    return type(content.get("format")) is int and content["format"] == FORMAT and entries <= content.keys()


def keep_previous(path: Path) -> None:
    """Keep the present file as `….previous.pt` before a new run replaces it, and say so."""
    if path.exists():
        previous = path.with_suffix(f".previous{path.suffix}")
        with atomic_path(previous) as temporary:
            temporary.write_bytes(path.read_bytes())
        say(f"this run will replace {path}; the present file is kept as {previous}")


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    return hashlib.sha256(expanded(path).read_bytes()).hexdigest()


class _NoInitialisation(TorchFunctionMode):
    """Skips the initialisation of parameters: on the meta device it would import torch's compiler, 1.6 seconds."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init" or function in RANDOM_FILLS:
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))


def _check_weights(expected: dict, weights: dict) -> None:
    """`ValueError` unless `weights` has the expected names, shapes and types, and only finite numbers."""
    if missing := sorted(expected.keys() - weights.keys()):
        raise ValueError(f"weights missing: {', '.join(missing[:3])}")
    if extra := sorted(map(str, weights.keys() - expected.keys())):
        raise ValueError(f"unknown weights: {', '.join(extra[:3])}")
    for key, like in expected.items():
        check_tensor(f"weight {key}", like, weights[key])


def check_tensor(name: str, like: torch.Tensor, value: object) -> None:
    """`ValueError` unless `value` is a tensor of the shape and type of `like`, with finite numbers in its own memory."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.shape != like.shape:
        raise ValueError(f"{name} must be a tensor of shape {list(like.shape)}")
    if value.is_floating_point() != like.is_floating_point() or value.is_complex():
        raise ValueError(f"{name} has type {value.dtype}")
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise ValueError(f"{name} repeats its numbers")
    if not torch.isfinite(value.to(like.dtype)).all():
        raise ValueError(f"{name} is not finite")
