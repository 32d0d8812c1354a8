"""Checks that the models share: the fields of a config, and the arguments of `sample`."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Iterator

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


def check_choice(config: object, name: str, choices: tuple[str, ...]) -> None:
    """`ValueError` unless the field is one of the choices."""
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{type(config).__name__}.{name} must be one of {', '.join(choices)}, not {reprlib.repr(value)}")


def check_request(n: int, labels: Tensor | None, num_classes: int, chunk_size: int) -> None:
    """`ValueError` unless n and chunk_size are at least 1, and labels are None or int64 [n] in 0..num_classes-1."""
    if n < 1 or chunk_size < 1:
        raise ValueError(f"n and chunk_size must be at least 1, not {n} and {chunk_size}")
    if labels is None:
        return
    if not num_classes:
        raise ValueError("labels were given to an unconditional model; leave them out, or load a conditional checkpoint")
    if labels.shape != (n,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 of shape [{n}], not {labels.dtype} of {list(labels.shape)}")
    if not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise ValueError(f"labels must lie in 0..{num_classes - 1}")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Eval mode inside the block. Gives the model's device."""
    was_training = model.training
    model.eval()
    try:
        yield next(model.parameters()).device
    finally:
        model.train(was_training)
