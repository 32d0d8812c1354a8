"""The adversarial update, its losses, and the assembly that both GAN trainers share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distributed
from experiment import Experiment
from graphs import Replayed
from guard import Guard
from models import build
from training import TrainState
from utils import UsageError, autocast, reseeded


class GANLoss(NamedTuple):
    """Losses of the logits [B] of real and generated images, the discriminator's norm, and its gradient penalty.

    `mismatch` is what the discriminator's loss gains for real images with a wrong label (GAN-CLS: Reed et al. 2016,
    section 4.2), at a weight of MISMATCH_WEIGHT.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]  # (real, fake) -> scalar
    mismatch: Callable[[Tensor, Tensor], Tensor]  # (real, real with a wrong label) -> scalar
    generator: Callable[[Tensor, Tensor], Tensor]
    norm: str
    penalty: float  # weight gamma of R1 + R2
    paired: bool  # whether the generator's loss looks at real logits


LOSSES = {
    # Non-saturating loss with BatchNorm in the discriminator: Goodfellow et al. 2014, section 3; Radford et al. 2016.
    "bce": GANLoss(
        lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),
        lambda real, wrong: F.softplus(wrong).mean(),
        lambda real, fake: F.softplus(-fake).mean(),
        norm="batch", penalty=0.0, paired=False,
    ),
    # Hinge loss with spectral normalisation: Miyato et al. 2018, eqs. 16 and 17.
    "hinge": GANLoss(
        lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
        lambda real, wrong: F.relu(1 + wrong).mean(),
        lambda real, fake: -fake.mean(),
        norm="spectral", penalty=0.0, paired=False,
    ),
    # Relativistic pairing with zero-centred gradient penalties on both sides: R3GAN, Huang et al. 2024, section 2.
    "relativistic": GANLoss(
        lambda real, fake: F.softplus(fake - real).mean(),
        lambda real, wrong: F.softplus(wrong - real).mean(),
        lambda real, fake: F.softplus(real - fake).mean(),
        norm="none", penalty=1.0, paired=True,
    ),
}  # fmt: skip


# The paper gives wrong labels the weight of the generated images. On digits that ends in prototypes: label accuracy
# passes that of real digits, while the FID gets worse from the third epoch on.
MISMATCH_WEIGHT = 0.1
PENALTY_EVERY = 4  # steps; the penalty is weighted up in turn (lazy regularisation: Karras et al. 2020, section 3.1)


class GANStep:
    """One update of the discriminator, then one of the generator, on the same batch and noise.

    Calling it with images [B, 1, 28, 28] in [-1, 1] and labels [B] returns the two losses as device scalars, nan where
    an update was held back (see guard.py).
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        optimizers: dict[str, torch.optim.Optimizer],
        loss: GANLoss,
        state: TrainState,
        seed: int,
        precision: str,
    ):
        self.generator, self.discriminator, self.loss = generator, discriminator, loss
        self.optimizers, self.state, self.seed, self.precision = optimizers, state, seed, precision
        self.guard = Guard(generator, discriminator)
        self.conditional = generator.config.num_classes > 0
        self.rng = torch.Generator(next(generator.parameters()).device)
        self.replayed = Replayed(self.update, self.rng, optimizers)

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        reseeded(self.rng, self.seed, "noise", self.state.step)
        penalised = self.loss.penalty > 0 and self.state.step % PENALTY_EVERY == 0
        return self.replayed(images, labels, variant=penalised)

    def update(self, images: Tensor, labels: Tensor, penalised: bool) -> dict[str, Tensor]:
        """Both updates, with the random numbers that `rng` draws next; `penalised`: with gradient penalties."""
        rows = distributed.share(len(images))
        noise = torch.randn(len(images), self.generator.config.latent_dim, generator=self.rng, device=images.device)[rows]
        questions = self._questions(labels)[:, rows] if self.conditional else None  # [2, B]
        images, labels = images[rows], questions[0] if self.conditional else None
        self.guard.keep()
        with autocast(images.device, self.precision):
            fake = self.generator(noise, labels)  # [B, 1, 28, 28], used by both updates

        loss_d = self._update_discriminator(images, fake.detach(), questions, penalised)
        loss_g = self._update_generator(images, fake, labels)
        self.guard.restore()
        return {"loss_d": loss_d, "loss_g": loss_g}

    def loss_of_guessing(self) -> float:
        """The discriminator's loss where all of its logits are zero."""
        zero = torch.zeros(1)
        mismatch = MISMATCH_WEIGHT * float(self.loss.mismatch(zero, zero)) if self.conditional else 0.0
        return float(self.loss.discriminator(zero, zero)) + mismatch

    def _questions(self, labels: Tensor) -> Tensor:
        """[2, B]: the labels, and for each of them another one, uniformly."""
        classes = self.generator.config.num_classes
        wrong = labels + torch.randint(1, classes, labels.shape, generator=self.rng, device=labels.device)
        return torch.stack([labels, wrong % classes])

    def _update_discriminator(self, real: Tensor, fake: Tensor, questions: Tensor | None, penalised: bool) -> Tensor:
        self.discriminator.requires_grad_(True)
        if penalised:
            real, fake = real.detach().requires_grad_(), fake.requires_grad_()
        with autocast(real.device, self.precision):
            if questions is None:
                real_logit, fake_logit = self._judge(real, fake)
                loss = self.loss.discriminator(real_logit, fake_logit)
            else:
                (real_logit, wrong_logit), (fake_logit, _) = self._judge(real, fake, questions)
                loss = self.loss.discriminator(real_logit, fake_logit)
                loss = loss + MISMATCH_WEIGHT * self.loss.mismatch(real_logit, wrong_logit)
        total = loss
        if penalised:
            penalty = gradient_penalty(real_logit, real) + gradient_penalty(fake_logit, fake)
            total = loss + 0.5 * PENALTY_EVERY * self.loss.penalty * penalty
        return self.guard.update(total, self.optimizers["d_lr"])

    def _judge(self, real: Tensor, fake: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The logits [B] of both, with labels [K, B] those of each question, [K, B].

        In one pass, which is faster, unless BatchNorm would mix their statistics.
        """
        if self.loss.norm == "batch":
            return self.discriminator(real, labels), self.discriminator(fake, labels)
        both = torch.cat([real, fake]).contiguous(memory_format=torch.channels_last)  # [2B, 1, 28, 28]
        real_logit, fake_logit = self.discriminator(both, None if labels is None else labels.repeat(1, 2)).chunk(2, -1)
        return real_logit, fake_logit

    def _update_generator(self, real: Tensor, fake: Tensor, labels: Tensor | None) -> Tensor:
        self.discriminator.requires_grad_(False)  # its weight gradients would be thrown away: a third of its backward
        with autocast(real.device, self.precision):
            real_logit = self.discriminator(real, labels) if self.loss.paired else None
            loss = self.loss.generator(real_logit, self.discriminator(fake, labels))
        return self.guard.update(loss, self.optimizers["lr"])


def gradient_penalty(logit: Tensor, images: Tensor) -> Tensor:
    """Mean squared gradient norm of the logits [B] at their images [B, ...] (R1: Mescheder et al. 2018, eq. 9)."""
    (gradient,) = torch.autograd.grad(logit.sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1).mean()


def train_gan(args: argparse.Namespace, name: str, num_classes: int, prefix: str, title: str) -> None:
    """Train the GAN called `name` in the registry: the whole of train_gan.py and train_cgan.py but their flags."""
    run = Experiment(args, prefix, title)
    if LOSSES[args.loss].penalty and args.compile == "on":
        raise UsageError(f"--compile on has no double backward, which --loss {args.loss} needs; use --compile off")
    try:
        networks, optimizers, step = assemble(args, run.state, run.device, run.precision, name, num_classes)
    except ValueError as error:
        raise UsageError(f"{error}; choose another value") from error
    if args.compile == "on":
        for network in networks.values():
            network.compile()
    generator, discriminator = networks.values()
    exports = {"G": (name, generator), "D": (f"{name}_discriminator", discriminator)}
    run.train(step, generator, networks, optimizers, exports, guessing=step.loss_of_guessing())


def assemble(
    args: argparse.Namespace, state: TrainState, device: torch.device, precision: str, name: str, num_classes: int
) -> tuple[dict[str, nn.Module], dict[str, torch.optim.Optimizer], GANStep]:
    """The generator and discriminator, the optimizers and the update that the trainer's flags describe, on a device.

    Raises:
        ValueError: the networks cannot be built so.
    """
    loss = LOSSES[args.loss]
    generator = build(name, latent_dim=args.latent_dim, width=args.width, num_classes=num_classes)
    discriminator = build(f"{name}_discriminator", width=args.width, num_classes=num_classes, norm=loss.norm)
    networks = {"generator": generator, "discriminator": discriminator}
    for network in networks.values():
        network.to(device, memory_format=torch.channels_last)  # faster convolutions on CPU and GPU
    how = {"betas": (args.beta1, 0.999), "fused": True, "capturable": device.type == "cuda"}
    optimizers = {
        "lr": torch.optim.Adam(generator.parameters(), lr=args.lr, **how),
        "d_lr": torch.optim.Adam(discriminator.parameters(), lr=args.d_lr, **how),
    }
    return networks, optimizers, GANStep(generator, discriminator, optimizers, loss, state, args.seed, precision)
