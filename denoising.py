"""The diffusion model's update, and the assembly of its training."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from checkpoint import file_sha256, load_generator
from experiment import Experiment
from guard import Guard
from models import DDPM, build
from muon import Muon
from training import TrainState
from utils import ExpectedError, autocast, keyed_generator

DRY_RUN_STEPS = 5  # evaluations in a dry run's sampling


class DiffusionStep:
    """One update of the U-Net (Ho et al. 2020, algorithm 1), with times and noise keyed by the step.

    Calling it with images [B, 1, 28, 28] in [-1, 1] and labels [B] returns the loss as a device scalar, nan
    where the update was held back (see guard.py).
    """

    def __init__(
        self,
        model: DDPM,
        optimizers: dict[str, torch.optim.Optimizer],
        state: TrainState,
        seed: int,
        precision: str,
        grad_clip: float,
        label_dropout: float,
        time_power: float,
    ):
        self.model, self.optimizers, self.state, self.seed = model, optimizers, state, seed
        self.precision, self.grad_clip = precision, grad_clip
        self.label_dropout, self.time_power = label_dropout, time_power
        self.guard = Guard()  # the model's buffers are constants

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        rng = keyed_generator(images.device, self.seed, "diffusion", self.state.step)
        with autocast(images.device, self.precision):
            loss = self.model.loss(images, labels, rng, self.label_dropout, self.time_power)
        return {"loss": self.guard.update(loss, *self.optimizers.values(), clip=self.grad_clip)}


def train_ddpm(args: argparse.Namespace) -> None:
    """Train the diffusion model: the whole of train_diffusion.py but its flags."""
    if args.dry_run and not args.resume:
        args.steps = min(args.steps, DRY_RUN_STEPS)
    run = Experiment(args, "DIFF", "diffusion", slow_sampling=True)
    try:
        model, optimizers, step = assemble(args, run.state, run.device, run.precision)
    except ValueError as error:
        raise ExpectedError(f"{error}; choose another value") from error
    if args.init and not args.resume:
        args.init = load_weights(model, args.init)
    if not args.label_dropout:
        print("--label-dropout 0: what this model samples without a label, or with guidance, will mean nothing")
    if args.compile == "on":
        model.unet.compile()
    sampling = {"sampler": args.sampler, "steps": args.steps, "guidance": args.guidance}
    exports = {"": ("ddpm", model)}
    run.train(step, model, {"model": model}, optimizers, exports, sampling, two_way=args.label_dropout > 0)


def assemble(
    args: argparse.Namespace, state: TrainState, device: torch.device, precision: str
) -> tuple[DDPM, dict[str, torch.optim.Optimizer], DiffusionStep]:
    """The model, optimizers and update that the trainer's flags describe.

    Raises:
        ValueError: the model cannot be built so.
    """
    model = build("ddpm", width=args.width, timesteps=args.timesteps, schedule=args.schedule, prediction=args.prediction)
    model.to(device)
    optimizers = make_optimizers(model, args.lr, args.muon_lr)
    step = DiffusionStep(
        model,
        optimizers,
        state,
        args.seed,
        precision,
        grad_clip=args.grad_clip,
        label_dropout=args.label_dropout,
        time_power=args.time_power,
    )
    return model, optimizers, step


def make_optimizers(model: DDPM, lr: float, muon_lr: float) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices and convolutions between the U-Net's first and last layer, Adam for the rest, by the names of
    their learning rates; Adam for all with a `muon_lr` of 0."""
    parameters = dict(model.named_parameters())
    outside = ("unet.stem.", "unet.head.", "unet.label.")
    hidden = [name for name, p in parameters.items() if p.ndim > 1 and not name.startswith(outside)] if muon_lr else []
    others = [p for name, p in parameters.items() if name not in hidden]
    optimizers = {"lr": torch.optim.Adam(others, lr=lr, fused=True)}
    if hidden:
        optimizers["muon_lr"] = Muon([parameters[name] for name in hidden], lr=muon_lr)
    return optimizers


def load_weights(model: DDPM, path: str) -> str:
    """Give `model` the weights of a checkpoint; returns the first digits of the file's SHA-256, to be recorded.

    Raises:
        ExpectedError: the file holds another model, or one of another shape or kind.
    """
    source = load_generator(path)
    if source.model_name != "ddpm" or source.config != model.config:
        raise ExpectedError(f"--init {path} holds a {source.model_name} with {source.config}, and this is {model.config}")
    model.load_state_dict(source.state_dict())
    return file_sha256(path)[:16]
