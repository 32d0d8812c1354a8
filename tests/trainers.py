"""The three trainers, the flags of a short run, and what such a run leaves behind."""

from __future__ import annotations

import csv
from typing import NamedTuple

import torch

from checkpoint import read_tensors
from recipes.ddpm import DiffusionStep
from recipes.gan import GANStep

# Three epochs of five steps
FLAGS = ["--dataset", "digits", "--epochs", 3, "--width", 8, "--batch-size", 64, "--limit", 320, "--eval-samples", 160,
         "--eval-every", 1, "--device", "cpu"]  # fmt: skip
DIFFUSION_FLAGS = [*FLAGS, "--steps", 2, "--batch-size", 32, "--limit", 160, "--eval-samples", 80]


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
    Trainer("train_diffusion.py", "DIFF", "diffusion", DiffusionStep, ["DIFF"], DIFFUSION_FLAGS),
]


def training_file(folder, trainer):
    """Everything in the last state, except the times."""
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
