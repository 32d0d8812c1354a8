"""How the diffusion model is trained: the update of a batch, its targets, and the assembly of the training."""

from __future__ import annotations

import argparse
import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional as F

import data
from checkpoint import file_sha256, load_generator
from diffusion import process
from diffusion.options import OPTION_NAMES
from engine import distributed
from engine.cuda_graph import RecordedUpdate
from engine.guard import Guard, average_over_processes, clip_gradients
from engine.muon import Muon
from files import UsageError
from loop import TrainState
from models import DDPM, build
from recipes.run import Run
from utils import ask_for_huge_pages, autocast, reseeded

DRY_RUN_STEPS = 5  # network evaluations of a sample in a dry run


class StableTargets:
    """Training targets with less variance (Xu et al. 2023, arXiv 2302.00670, with the training set as the reference batch).

    At high noise, many digits can give the same x_t. Their mean, given x_t and its label, is a better target than the one
    digit that x_t was made from. The expected gradient is the same. The `share` of a batch with the most noise gets it.
    """

    def __init__(self, model: DDPM, digits: data.Digits, share: float):
        self.images = model.encode(data.to_model_range(digits.images)).flatten(1)  # [N, 784]
        self.squares = self.images.square().sum(1)  # [N]
        self.labels = digits.labels  # [N]
        self.share = share

    def __call__(self, x: Tensor, x0: Tensor, labels: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x0 [B, 1, 28, 28] with its noisiest rows replaced. The null class stands for every digit."""
        rows = sigma.flatten().topk(math.ceil(self.share * len(x))).indices  # a fixed number: no wait for the device
        wanted = labels[rows, None]  # [rows, 1]
        possible = (wanted == self.labels) | (wanted >= data.NUM_CLASSES)  # [rows, N]
        with torch.autocast(x.device.type, enabled=False):  # fp32, for small differences of large numbers
            noisy, alpha, sigma = (tensor[rows].flatten(1) for tensor in (x, alpha, sigma))
            mean = process.posterior_mean(noisy, alpha, sigma, self.images, self.squares, possible)
        return x0.index_copy(0, rows, mean.unflatten(1, x0.shape[1:]))


class DiffusionStep:
    """One update of the U-Net (Ho et al. 2020, algorithm 1), with times and noise seeded by the step.

    A call takes images [B, 1, 28, 28] in [-1, 1] and labels int64 [B]. It returns `loss`, a scalar on the device, nan where
    the guard skipped the update. `optimizers` has the keys `matrices` (Muon) and `others` (Adam).

    Args:
        label_dropout: share of labels replaced by the null class (Ho & Salimans 2022, algorithm 1), in [0, 1).
        time_power: see `process.stratified_times`.
        grad_clip: largest norm of the gradient; 0: no bound.
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
        stable_targets: StableTargets | None = None,
    ):
        self.model = model
        self.optimizers = optimizers
        self.state = state
        self.seed = seed
        self.precision = precision
        self.grad_clip = grad_clip
        self.label_dropout = label_dropout
        self.time_power = time_power
        self.stable_targets = stable_targets
        self.rng = torch.Generator(next(model.parameters()).device)
        self.guard = Guard()  # the model's buffers are constants
        self.graph = RecordedUpdate(self.update, self.rng, optimizers)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        reseeded(self.rng, self.seed, "diffusion", self.state.step)
        return self.graph(images, labels)

    def update(self, images: Tensor, labels: Tensor, _variant: None = None) -> dict[str, Tensor]:
        """The update, on this process's rows of the batch."""
        config = self.model.config
        rows = distributed.share(len(images))
        optimizers = list(self.optimizers.values())
        self.guard.keep()
        images = self.model.encode(images)  # [B, 1, 28, 28]

        # Times, noise, dropped labels
        time = process.stratified_times(len(images), config.timesteps, self.rng, self.time_power)  # [B]
        alpha = self.model.alpha[time][:, None, None, None]  # [B, 1, 1, 1]
        sigma = self.model.sigma[time][:, None, None, None]  # [B, 1, 1, 1]
        noise = torch.randn(images.shape, generator=self.rng, device=images.device)  # [B, 1, 28, 28]
        label_dropout = self.label_dropout if config.num_classes else 1.0
        dropped = torch.rand(len(labels), generator=self.rng, device=images.device) < label_dropout  # [B]
        labels = labels.masked_fill(dropped, config.num_classes)
        noisy = process.diffuse(images, noise, alpha, sigma)  # [B, 1, 28, 28]

        # Target
        if self.stable_targets:
            mean = self.stable_targets(noisy, images, labels, alpha, sigma)
            noise = noise + alpha / sigma * (images - mean)  # so that mean and noise still mix to the same noisy image
            images = mean
        target = process.target(config.prediction, images, noise, alpha, sigma)  # [B, 1, 28, 28]

        # Forward, loss
        with autocast(images.device, self.precision):
            loss = F.mse_loss(self.model(noisy[rows], time[rows], labels[rows]), target[rows])  # Ho et al. 2020, eq. 14

        # Backward, clip, step
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        loss = average_over_processes(loss, *optimizers)
        norm = clip_gradients(self.grad_clip, *optimizers)
        return {"loss": self.guard.step(loss, norm, *optimizers)}  # optimizer.step() for each, if loss and norm are finite


def train_ddpm(args: argparse.Namespace) -> None:
    """Train the diffusion model: all of train_diffusion.py except its flags."""
    if args.dry_run and not args.resume:
        args.steps = min(args.steps or DRY_RUN_STEPS, DRY_RUN_STEPS)
    ask_for_huge_pages()
    run = Run(args, "DIFF", "diffusion", slow_sampling=True)
    try:
        model, optimizers, step = assemble(args, run.state, run.digits, run.precision)
    except ValueError as error:
        raise UsageError(f"{error}; choose another value") from error
    if args.init and not args.resume:
        args.init = load_weights(model, args.init)
    if not args.label_dropout:
        print("--label-dropout 0: samples without labels, and with guidance, will mean nothing")
    if run.compiled:
        model.unet.compile()
    columns = {"others": "lr", "matrices": "muon_lr"}
    run.train(
        step,
        model=model,
        networks={"model": model},
        optimizers=optimizers,
        rates={columns[name]: optimizer for name, optimizer in optimizers.items()},
        exports={"": ("ddpm", model)},
        sample_options={name: getattr(args, name) for name in OPTION_NAMES},
        two_way=args.label_dropout > 0,
    )


def assemble(
    args: argparse.Namespace, state: TrainState, digits: data.Digits, precision: str
) -> tuple[DDPM, dict[str, torch.optim.Optimizer], DiffusionStep]:
    """The model, the optimizers and the update that the trainer's flags describe, on the device of the training digits.

    Raises:
        ValueError: a flag is out of the bounds of the model's config.
    """
    options = {name: getattr(args, name) for name in ("width", "timesteps", "schedule", "prediction", "black")}
    model = build("ddpm", **options)
    faster = torch.channels_last if digits.images.is_cuda else torch.contiguous_format
    model.to(digits.images.device, memory_format=faster)
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
        stable_targets=StableTargets(model, digits, args.stable_targets) if args.stable_targets else None,
    )
    return model, optimizers, step


def make_optimizers(model: DDPM, lr: float, muon_lr: float, precision: str = "fp32") -> dict[str, torch.optim.Optimizer]:
    """`matrices`: Muon for the matrices and convolutions between the U-Net's first and last layer. `others`: Adam.

    A `muon_lr` of 0 leaves everything to Adam.
    """
    parameters = dict(model.named_parameters())
    outside = ("unet.stem.", "unet.head.", "unet.label.")
    hidden = [name for name, p in parameters.items() if p.ndim > 1 and not name.startswith(outside)] if muon_lr else []
    others = [p for name, p in parameters.items() if name not in hidden]
    on_gpu = next(model.parameters()).is_cuda
    optimizers: dict[str, torch.optim.Optimizer] = {"others": torch.optim.Adam(others, lr=lr, fused=True, capturable=on_gpu)}
    if hidden:
        optimizers["matrices"] = Muon([parameters[name] for name in hidden], lr=muon_lr, precision=precision)
    return optimizers


def load_weights(model: DDPM, path: str) -> str:
    """Give `model` the weights of a checkpoint. Returns the first 16 digits of the file's SHA-256, for the record.

    Raises:
        UsageError: the file holds another model, or one of another config; `black` may differ.
    """
    source = load_generator(path)
    if source.model_name != "ddpm" or dataclasses.replace(source.config, black=model.config.black) != model.config:
        raise UsageError(f"--init {path} holds a {source.model_name} with {source.config}, and this is {model.config}")
    model.load_state_dict(source.state_dict())
    return file_sha256(path)[:16]
