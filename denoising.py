"""The diffusion model's update, and the assembly of its training."""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

import data
import diffusion
import distributed
from checkpoint import file_sha256, load_generator
from experiment import Experiment
from graphs import Replayed
from guard import Guard
from models import DDPM, build
from muon import Muon
from training import TrainState
from unet import MOST_ON_GPU
from utils import UsageError, ask_for_huge_pages, autocast, reseeded

DRY_RUN_STEPS = 5  # evaluations in a dry run's sampling


class StableTargets:
    """What x0 is on average, given x_t and its label, over all the training digits that x_t may come from.

    To aim at it instead of the very digit that the noise was added to changes the expectation of no gradient, and takes
    away its noise where it is largest: where many digits can have become the same x_t (Xu et al. 2023, arXiv 2302.00670,
    with the training set as the reference batch). So it is done for the `share` of a batch that has the most noise.
    """

    def __init__(self, digits: data.Digits, share: float):
        self.images, self.labels, self.share = data.to_model_range(digits.images).flatten(1), digits.labels, share
        self.squares = self.images.square().sum(1)

    def __call__(self, x: Tensor, x0: Tensor, labels: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x0 [B, 1, 28, 28] with its noisiest rows replaced. A label that is no digit stands for any of them."""
        rows = sigma.flatten().topk(math.ceil(self.share * len(x))).indices  # a fixed number: no wait for the device
        wanted = labels[rows, None]  # [rows, 1]
        possible = (wanted == self.labels) | (wanted >= data.NUM_CLASSES)  # [rows, N]
        with torch.autocast(x.device.type, enabled=False):  # differences of large numbers
            noisy, alpha, sigma = (tensor[rows].flatten(1) for tensor in (x, alpha, sigma))
            mean = diffusion.posterior_mean(noisy, alpha, sigma, self.images, self.squares, possible)
        return x0.index_copy(0, rows, mean.unflatten(1, x0.shape[1:]))


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
        expected: StableTargets | None = None,
    ):
        self.model, self.optimizers, self.state, self.seed = model, optimizers, state, seed
        self.precision, self.grad_clip = precision, grad_clip
        self.label_dropout, self.time_power, self.expected = label_dropout, time_power, expected
        self.guard = Guard()  # the model's buffers are constants
        self.rng = torch.Generator(next(model.parameters()).device)
        self.replayed = Replayed(self.update, self.rng, optimizers)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        reseeded(self.rng, self.seed, "diffusion", self.state.step)
        return self.replayed(images, labels)

    def update(self, images: Tensor, labels: Tensor, _variant: None) -> dict[str, Tensor]:
        """The update, with the random numbers that `rng` draws next, by this process's share of the batch's examples."""
        self.guard.keep()
        rows, how = distributed.share(len(images)), (self.label_dropout, self.time_power, self.expected)
        examples = self.model.examples(images, labels, self.rng, *how)
        with autocast(images.device, self.precision):
            loss = self.model.loss(*(tensor[rows] for tensor in examples))
        return {"loss": self.guard.update(loss, *self.optimizers.values(), clip=self.grad_clip)}


def train_ddpm(args: argparse.Namespace) -> None:
    """Train the diffusion model: the whole of train_diffusion.py but its flags."""
    if args.dry_run and not args.resume:
        args.steps = min(args.steps, DRY_RUN_STEPS)
    ask_for_huge_pages()
    run = Experiment(args, "DIFF", "diffusion", slow_sampling=True)
    try:
        model, optimizers, step = assemble(args, run.state, run.digits, run.precision)
    except ValueError as error:
        raise UsageError(f"{error}; choose another value") from error
    if args.init and not args.resume:
        args.init = load_weights(model, args.init)
    if not args.label_dropout:
        print("--label-dropout 0: what this model samples without a label, or with guidance, will mean nothing")
    if args.compile == "on":
        model.unet.compile()
    sampling = {name: getattr(args, name) for name in ("sampler", "steps", "eta", "guidance")}
    sampling["precision"] = run.precision
    exports = {"": ("ddpm", model)}
    run.train(step, model, {"model": model}, optimizers, exports, sampling, two_way=args.label_dropout > 0)


def assemble(
    args: argparse.Namespace, state: TrainState, digits: data.Digits, precision: str
) -> tuple[DDPM, dict[str, torch.optim.Optimizer], DiffusionStep]:
    """The model, optimizers and update that the trainer's flags describe, on the device of its training digits.

    Raises:
        ValueError: the model cannot be built so, or a GPU cannot train it with such batches.
    """
    rows = distributed.share(args.batch_size)
    if digits.images.is_cuda and rows.stop - rows.start > MOST_ON_GPU:
        raise ValueError(f"--batch-size {args.batch_size} is more than {MOST_ON_GPU} images for each GPU")
    model = build("ddpm", width=args.width, timesteps=args.timesteps, schedule=args.schedule, prediction=args.prediction)
    model.to(digits.images.device)
    optimizers = make_optimizers(model, args.lr, args.muon_lr, precision)
    step = DiffusionStep(
        model,
        optimizers,
        state,
        args.seed,
        precision,
        grad_clip=args.grad_clip,
        label_dropout=args.label_dropout,
        time_power=args.time_power,
        expected=StableTargets(digits, args.stable_targets) if args.stable_targets else None,
    )
    return model, optimizers, step


def make_optimizers(model: DDPM, lr: float, muon_lr: float, precision: str = "fp32") -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices and convolutions between the U-Net's first and last layer, Adam for the rest, by the names of
    their learning rates; Adam for all with a `muon_lr` of 0."""
    parameters = dict(model.named_parameters())
    outside = ("unet.stem.", "unet.head.", "unet.label.")
    hidden = [name for name, p in parameters.items() if p.ndim > 1 and not name.startswith(outside)] if muon_lr else []
    others = [p for name, p in parameters.items() if name not in hidden]
    on_gpu = next(model.parameters()).is_cuda
    optimizers = {"lr": torch.optim.Adam(others, lr=lr, fused=True, capturable=on_gpu)}
    if hidden:
        optimizers["muon_lr"] = Muon([parameters[name] for name in hidden], lr=muon_lr, precision=precision)
    return optimizers


def load_weights(model: DDPM, path: str) -> str:
    """Give `model` the weights of a checkpoint; returns the first digits of the file's SHA-256, to be recorded.

    Raises:
        UsageError: the file holds another model, or one of another shape or kind.
    """
    source = load_generator(path)
    if source.model_name != "ddpm" or source.config != model.config:
        raise UsageError(f"--init {path} holds a {source.model_name} with {source.config}, and this is {model.config}")
    model.load_state_dict(source.state_dict())
    return file_sha256(path)[:16]
