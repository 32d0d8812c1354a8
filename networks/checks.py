"""Checks that the models share: the fields of a config, and the arguments of `sample`."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def check_int(config: object, name: str, low: int, high: int, step: int = 1) -> None:
    """`ValueError` unless the field is an int in low..high and a multiple of `step`.

    Configs also come from files, which may hold anything.
    """
    value = getattr(config, name)
    kind = f"a multiple of {step}" if step > 1 else "an integer"
    if type(value) is not int or not low <= value <= high or value % step:
        raise ValueError(f"{type(config).__name__}.{name} must be {kind} in {low}..{high}, not {reprlib.repr(value)}")


def check_number(config: object, name: str, low: float, high: float) -> None:
    """`ValueError` unless the field is a number in low..high."""
    value = getattr(config, name)
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"{type(config).__name__}.{name} must be a number in {low}..{high}, not {reprlib.repr(value)}")


def check_choice(config: object, name: str, choices: tuple[str, ...]) -> None:
    """`ValueError` unless the field is one of the choices."""
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{type(config).__name__}.{name} must be one of {', '.join(choices)}, not {reprlib.repr(value)}")


def checked_labels(n: int, labels: Any, num_classes: int, chunk_size: int) -> Tensor | None:
    """The labels of a call of `sample` as int64 [n], or None. `labels`: integers [n], or one integer for all `n`.

    Raises:
        ValueError: n or chunk_size below 1; labels that are no integers, of another shape, or not in 0..num_classes-1.
    """
    if n < 1 or chunk_size < 1:
        raise ValueError(f"n and chunk_size must be at least 1, not {n} and {chunk_size}")
    if labels is None:
        return None
    if not num_classes:
        raise ValueError("labels were given to an unconditional model; leave them out, or load a conditional checkpoint")
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"labels must be integers ({error})") from error
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, not {labels.dtype}")
    if labels.ndim == 0:
        labels = labels.expand(n)
    if labels.shape != (n,):
        raise ValueError(f"labels must have the shape [{n}], not {list(labels.shape)}")
    labels = labels.long()  # torch has no minimum of the wider unsigned types
    if not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise ValueError(f"labels must lie in 0..{num_classes - 1}")
    return labels


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Eval mode inside the block. Gives the model's device."""
    was_training = model.training
    model.eval()
    try:
        yield next(model.parameters()).device
    finally:
        model.train(was_training)
