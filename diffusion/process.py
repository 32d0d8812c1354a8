"""The forward process of diffusion: noise schedules, noisy images, and what a network learns to predict.

An image x0 is mixed with noise, x_t = alpha_t x0 + sigma_t eps, where eps ~ N(0, I) and alpha_t^2 + sigma_t^2 = 1. The times
are t = 0, ..., T - 1, and the last one is almost pure noise. In Ho et al. 2020, alpha_t^2 is the cumulative product of 1 -
beta.

    Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv 2006.11239
    Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", arXiv 2102.09672
    Kingma et al. 2021, "Variational Diffusion Models", arXiv 2107.00630
    Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", arXiv 2202.00512
    Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364
    Xu et al. 2023, "Stable Target Field for Reduced Variance Score Estimation in Diffusion Models", arXiv 2302.00670
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SCHEDULES = ("linear", "cosine")
PREDICTIONS = ("eps", "v")


# --------------------------------------------------------------------------------------------------------------------
# Noise schedules


class Level(NamedTuple):
    """A noise level: x = alpha x0 + sigma eps. `time` is its index in the schedule, -1 for a clean image."""

    time: int
    alpha: float
    sigma: float

    @property
    def noise_to_signal(self) -> float:
        """sigma / alpha, which Karras et al. (2022) call sigma. It is 0 for a clean image."""
        return self.sigma / self.alpha

    @property
    def half_log_snr(self) -> float:
        """lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio. It is infinite for a clean image."""
        return math.log(self.alpha / self.sigma) if self.sigma else math.inf


CLEAN = Level(-1, 1.0, 0.0)


def betas(schedule: str, timesteps: int) -> Tensor:
    """The variances beta_t of the forward process, float64 [timesteps], in (0, 1).

    `linear`: Ho et al. 2020, section 4, where 1000 timesteps go from 1e-4 to 0.02; scaled for other numbers of timesteps.
    `cosine`: Nichol & Dhariwal 2021, eq. 17.

    Raises:
        ValueError: another schedule.
    """
    if schedule == "linear":
        scale = 1000 / timesteps
        return torch.linspace(1e-4 * scale, 0.02 * scale, timesteps, dtype=torch.float64, device="cpu").clamp(max=0.999)
    if schedule == "cosine":
        t = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64, device="cpu")
        alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")


def noise_levels(schedule: str, timesteps: int) -> list[Level]:
    """The level of every time, from the least noise (time 0) to the most (Ho et al. 2020, eq. 4)."""
    alpha_bar = (1 - betas(schedule, timesteps)).cumprod(0)
    return [Level(t, math.sqrt(a), math.sqrt(1 - a)) for t, a in enumerate(alpha_bar.tolist())]


# --------------------------------------------------------------------------------------------------------------------
# Noisy images and training targets. Here alpha and sigma are floats, or tensors that broadcast.


def diffuse(x0: Tensor, eps: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """x_t of clean images x0 and standard normal eps, both [B, ...] (Ho et al. 2020, eq. 4)."""
    return alpha * x0 + sigma * eps


def target(prediction: str, x0: Tensor, eps: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """What the network predicts: `eps`, the noise (Ho et al. 2020, eq. 14), or `v` (Salimans & Ho 2022, section 4).

    Raises:
        ValueError: another prediction.
    """
    _check_prediction(prediction)
    return eps if prediction == "eps" else alpha * eps - sigma * x0


def clean_estimate(prediction: str, output: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
    """The estimate of x0 that a network's `output` at x implies: `target` solved for x0. Errors as for `target`."""
    _check_prediction(prediction)
    return (x - sigma * output) / alpha if prediction == "eps" else alpha * x - sigma * output


def _check_prediction(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, not {prediction!r}")


def posterior_mean(x: Tensor, alpha: Tensor, sigma: Tensor, images: Tensor, squares: Tensor, possible: Tensor) -> Tensor:
    """E[x0 | x_t], [B, D], when x0 is one of N equally likely images (Xu et al. 2023, eq. 5).

    Args:
        x: noisy images [B, D], at levels whose alpha and sigma are [B, 1].
        images: the clean images [N, D]; `squares`: their squared norms [N].
        possible: bool [B, N], the images that each x can come from. Each row needs at least one.
    """
    log_likelihood = (alpha / sigma.square() * x) @ images.T
    log_likelihood.addcmul_(-alpha.square() / (2 * sigma.square()), squares)  # + const; in place: N is large
    return log_likelihood.masked_fill_(~possible, -math.inf).softmax(1) @ images


def stratified_times(n: int, timesteps: int, rng: torch.Generator, power: float = 1.0) -> Tensor:
    """Training times int64 [n] in 0..timesteps-1, distributed as timesteps * u^power with u uniform in [0, 1).

    With power 1 every time is equally likely. A smaller power favours noisy times, where the large shapes are decided.
    The u are an even grid with one random offset, so the loss of a batch varies less (Kingma et al. 2021, appendix I.1).
    """
    offset = torch.rand(1, generator=rng, device=rng.device, dtype=torch.float32)
    grid = torch.arange(n, device=rng.device, dtype=torch.float32) / n
    return (((offset + grid) % 1) ** power * timesteps).long().clamp(max=timesteps - 1)
