"""How the GANs are trained: their losses, the update of a batch, and the assembly that both trainers share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import distributed
from engine.cuda_graph import RecordedUpdate
from engine.guard import Guard, average_over_processes, gradient_norm
from files import UsageError
from loop import TrainState
from models import Discriminator, Generator, build
from recipes.run import Run
from utils import autocast, reseeded

# The weight of real images with a wrong label in the discriminator's loss. Reed et al. (2016) give them that of generated
# images. On digits, samples then become alike: label accuracy passes that of real digits, and the FID rises from epoch 3 on.
MISMATCH_WEIGHT = 0.1
PENALTY_EVERY = 4  # steps; the penalty's weight grows in proportion (lazy regularisation: Karras et al. 2020, section 3.1)


class GANLoss(NamedTuple):
    """The losses, from logits [B] of real and generated images; the discriminator's normalisation; its gradient penalty."""

    discriminator: Callable[[Tensor, Tensor], Tensor]  # (real, fake) -> scalar
    # (real, real with a wrong label) -> what the discriminator's loss gains (GAN-CLS: Reed et al. 2016, section 4.2)
    mismatch: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor | None, Tensor], Tensor]  # (real if paired else None, fake) -> scalar
    norm: str
    penalty: float  # weight gamma of R1 + R2
    paired: bool  # whether the generator's loss reads the real logits


LOSSES = {
    # Non-saturating loss with BatchNorm in the discriminator: Goodfellow et al. 2014, section 3; Radford et al. 2016.
    "bce": GANLoss(
        discriminator=lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),
        mismatch=lambda real, wrong: F.softplus(wrong).mean(),
        generator=lambda real, fake: F.softplus(-fake).mean(),
        norm="batch",
        penalty=0.0,
        paired=False,
    ),
    # Hinge loss with spectral normalisation: Miyato et al. 2018, eqs. 16 and 17.
    "hinge": GANLoss(
        discriminator=lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
        mismatch=lambda real, wrong: F.relu(1 + wrong).mean(),
        generator=lambda real, fake: -fake.mean(),
        norm="spectral",
        penalty=0.0,
        paired=False,
    ),
    # Relativistic pairing with zero-centred gradient penalties on both sides: R3GAN, Huang et al. 2024, section 2.
    "relativistic": GANLoss(
        discriminator=lambda real, fake: F.softplus(fake - real).mean(),
        mismatch=lambda real, wrong: F.softplus(wrong - real).mean(),
        generator=lambda real, fake: F.softplus(real - fake).mean(),  # type: ignore[operator]  # paired: real is given
        norm="none",
        penalty=1.0,
        paired=True,
    ),
}


class GANStep:
    """One update of the discriminator, then one of the generator, with the same batch and noise.

    A call takes images [B, 1, 28, 28] in [-1, 1] and labels int64 [B]. It returns `loss_d` and `loss_g`, scalars on the
    device, nan where the guard skipped an update. `optimizers` has the keys `generator` and `discriminator`.
    """

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        optimizers: dict[str, torch.optim.Optimizer],
        loss: GANLoss,
        state: TrainState,
        seed: int,
        precision: str,
    ):
        self.generator = generator
        self.discriminator = discriminator
        self.optimizers = optimizers
        self.loss = loss
        self.state = state
        self.seed = seed
        self.precision = precision
        self.conditional = generator.config.num_classes > 0
        self.rng = torch.Generator(next(generator.parameters()).device)
        self.guard = Guard(generator, discriminator)
        self.graph = RecordedUpdate(self.update, self.rng, optimizers)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        reseeded(self.rng, self.seed, "noise", self.state.step)
        penalised = self.loss.penalty > 0 and self.state.step % PENALTY_EVERY == 0
        return self.graph(images, labels, variant=penalised)

    def update(self, images: Tensor, labels: Tensor, penalised: bool) -> dict[str, Tensor]:
        """Both updates, on this process's rows of the batch. `penalised`: with gradient penalties."""
        rows = distributed.share(len(images))
        z = torch.randn(len(images), self.generator.config.latent_dim, generator=self.rng, device=images.device)[rows]
        right_and_wrong = self._with_wrong_labels(labels)[:, rows] if self.conditional else None  # [2, B]
        own_labels = right_and_wrong[0] if right_and_wrong is not None else None  # [B]
        real = self.generator.encode(images[rows])  # [B, 1, 28, 28]
        self.guard.keep()

        # Generated images, for both updates
        with autocast(images.device, self.precision):
            fake = self.generator(z, own_labels)  # [B, 1, 28, 28]

        # Discriminator: forward, loss, backward, step
        self.discriminator.requires_grad_(True)
        real_d = real.detach().requires_grad_(penalised)
        fake_d = fake.detach().requires_grad_(penalised)
        with autocast(images.device, self.precision):
            real_logit, fake_logit = self._judge(real_d, fake_d, right_and_wrong)  # [B] each, with classes [2, B]
            if right_and_wrong is None:
                loss_d = self.loss.discriminator(real_logit, fake_logit)
            else:
                (real_logit, wrong_logit), (fake_logit, _) = real_logit, fake_logit
                loss_d = self.loss.discriminator(real_logit, fake_logit)
                loss_d = loss_d + MISMATCH_WEIGHT * self.loss.mismatch(real_logit, wrong_logit)
        if penalised:
            penalty = gradient_penalty(real_logit, real_d) + gradient_penalty(fake_logit, fake_d)
            loss_d = loss_d + 0.5 * PENALTY_EVERY * self.loss.penalty * penalty
        optimizer = self.optimizers["discriminator"]
        optimizer.zero_grad()
        loss_d.backward()
        loss_d = average_over_processes(loss_d, optimizer)
        loss_d = self.guard.step(loss_d, gradient_norm(optimizer), optimizer)  # optimizer.step(), if both are finite

        # Generator: forward, loss, backward, step
        self.discriminator.requires_grad_(False)  # saves a third of its backward pass
        with autocast(images.device, self.precision):
            paired_logit = self.discriminator(real, own_labels) if self.loss.paired else None
            loss_g = self.loss.generator(paired_logit, self.discriminator(fake, own_labels))
        optimizer = self.optimizers["generator"]
        optimizer.zero_grad()
        loss_g.backward()
        loss_g = average_over_processes(loss_g, optimizer)
        loss_g = self.guard.step(loss_g, gradient_norm(optimizer), optimizer)  # optimizer.step(), if both are finite

        self.guard.restore()
        return {"loss_d": loss_d, "loss_g": loss_g}

    def _with_wrong_labels(self, labels: Tensor) -> Tensor:
        """[2, B]: the labels [B], and for each of them another class, drawn uniformly."""
        classes = self.generator.config.num_classes
        wrong = labels + torch.randint(1, classes, labels.shape, generator=self.rng, device=labels.device)
        return torch.stack([labels, wrong % classes])

    def _judge(self, real: Tensor, fake: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [B] of real and of generated images. Labels [K, B] give logits [K, B].

        One pass is faster than two. But BatchNorm would mix the statistics of the two sides.
        """
        if self.loss.norm == "batch":
            return self.discriminator(real, labels), self.discriminator(fake, labels)
        both = torch.cat([real, fake]).contiguous(memory_format=torch.channels_last)  # [2B, 1, 28, 28]
        logits = self.discriminator(both, None if labels is None else labels.repeat(1, 2))  # [2B] or [K, 2B]
        real_logit, fake_logit = logits.chunk(2, -1)
        return real_logit, fake_logit

    def loss_of_guessing(self) -> float:
        """The loss of a discriminator whose logits are all zero."""
        zero = torch.zeros(1)
        mismatch = MISMATCH_WEIGHT * float(self.loss.mismatch(zero, zero)) if self.conditional else 0.0
        return float(self.loss.discriminator(zero, zero)) + mismatch


def gradient_penalty(logit: Tensor, images: Tensor) -> Tensor:
    """Mean squared norm of the gradient of the logits [B] at their images [B, ...] (R1: Mescheder et al. 2018, eq. 9)."""
    (gradient,) = torch.autograd.grad(logit.sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1).mean()


def train_gan(args: argparse.Namespace, name: str, num_classes: int, prefix: str, title: str) -> None:
    """Train the GAN called `name` in the registry: all of train_gan.py and train_cgan.py except their flags."""
    run = Run(args, prefix, title)
    penalised = LOSSES[args.loss].penalty > 0
    if penalised and args.compile == "on":
        raise UsageError(f"--compile on has no double backward, which --loss {args.loss} needs; use --compile off")
    try:
        networks, optimizers, step = assemble(args, run.state, run.device, run.precision, name, num_classes)
    except ValueError as error:
        raise UsageError(f"{error}; choose another value") from error
    if run.compiled and not penalised:
        for network in networks.values():
            network.compile()
    generator, discriminator = networks.values()
    run.train(
        step,
        model=generator,
        networks=networks,
        optimizers=optimizers,
        rates={"lr": optimizers["generator"], "d_lr": optimizers["discriminator"]},
        exports={"G": (name, generator), "D": (f"{name}_discriminator", discriminator)},
        guessing=step.loss_of_guessing(),
    )


def assemble(
    args: argparse.Namespace, state: TrainState, device: torch.device, precision: str, name: str, num_classes: int
) -> tuple[dict[str, nn.Module], dict[str, torch.optim.Optimizer], GANStep]:
    """The networks, the optimizers and the update that the trainer's flags describe, on a device.

    Raises:
        ValueError: a flag is out of the bounds of the networks' configs.
    """
    loss = LOSSES[args.loss]
    generator = build(name, latent_dim=args.latent_dim, width=args.width, num_classes=num_classes, black=args.black)
    discriminator = build(f"{name}_discriminator", width=args.width, num_classes=num_classes, norm=loss.norm)
    networks = {"generator": generator, "discriminator": discriminator}
    for network in networks.values():
        network.to(device, memory_format=torch.channels_last)  # faster convolutions on CPU and GPU

    def adam(network: nn.Module, lr: float) -> torch.optim.Optimizer:
        capturable = device.type == "cuda"
        return torch.optim.Adam(network.parameters(), lr=lr, betas=(args.beta1, 0.999), fused=True, capturable=capturable)

    optimizers = {"generator": adam(generator, args.lr), "discriminator": adam(discriminator, args.d_lr)}
    return networks, optimizers, GANStep(generator, discriminator, optimizers, loss, state, args.seed, precision)
