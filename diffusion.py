"""The mathematics of diffusion: noise schedules, the forward process, training targets, and samplers, without a network.

An image x0 is mixed with noise into x_t = alpha_t x0 + sigma_t eps with eps ~ N(0, I) and alpha_t^2 + sigma_t^2 = 1, at
the times t = 0, ..., T - 1, the last of which is almost pure noise. In Ho et al. 2020, alpha_t^2 is the cumulative product
of 1 - beta. A sampler sees a network only as `denoise(x, level)`, its estimate of x0; so the same few lines serve either
prediction, guidance, and the closed-form denoisers of the tests.

    Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv 2006.11239
    Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", arXiv 2102.09672
    Song et al. 2021, "Denoising Diffusion Implicit Models", arXiv 2010.02502
    Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", arXiv 2202.00512
    Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", arXiv 2211.01095
    Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364
    Xu et al. 2023, "Stable Target Field for Reduced Variance Score Estimation in Diffusion Models", arXiv 2302.00670
    Xue et al. 2023, "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models", arXiv 2309.05019
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable
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
        """sigma / alpha, which Karras et al. (2022) call sigma: 0 for a clean image."""
        return self.sigma / self.alpha

    @property
    def half_log_snr(self) -> float:
        """lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio; infinite for a clean image."""
        return math.log(self.alpha / self.sigma) if self.sigma else math.inf


CLEAN = Level(-1, 1.0, 0.0)
NOISE_RANGE, RHO = (12.0, 0.08), 7  # of `noise_grid`: noise-to-signal ratios, and the root that is evenly spaced
# The noise-to-signal ratios at which guidance acts. Where there is more noise it makes all samples of a digit alike, where
# there is less it has nothing left to decide (Kynkäänniemi et al. 2024, arXiv 2404.07724).
GUIDANCE_RANGE = (0.25, 2.0)
RENEWED_BELOW = 2.0  # the noise-to-signal ratio below which `dpm_solver` renews noise, where any digit may come out


def betas(schedule: str, timesteps: int) -> Tensor:
    """The variances beta_t of the forward process, float64 [timesteps], in (0, 1).

    `linear`: Ho et al. 2020, section 4, where 1000 steps go from 1e-4 to 0.02; scaled to other numbers of steps.
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
    """The level of every time, from the finest noise (time 0) to the coarsest (Ho et al. 2020, eq. 4)."""
    alpha_bar = (1 - betas(schedule, timesteps)).cumprod(0)
    return [Level(t, math.sqrt(a), math.sqrt(1 - a)) for t, a in enumerate(alpha_bar.tolist())]


def time_grid(levels: list[Level], steps: int) -> list[Level]:
    """`steps` levels evenly spaced in time, from the coarsest down, and the clean image: where ancestral sampling evaluates.

    The first one is the very last time, whose noise sampling starts from (Lin et al. 2024, arXiv 2305.08891, table 2,
    "trailing"). With as many steps as times it is all of them.

    Raises:
        ValueError: no step, or more steps than times.
    """
    _check_steps(levels, steps)
    return [levels[round(len(levels) * (1 - i / steps)) - 1] for i in range(steps)] + [CLEAN]


def noise_grid(levels: list[Level], steps: int) -> list[Level]:
    """As `time_grid`, but after the coarsest level evenly spaced in (sigma / alpha)^(1/7) (Karras et al. 2022, eq. 5).

    More of the steps fall to the noise in which it is decided what a sample shall be, where large ones cost the most.

    Raises:
        ValueError: no step, or more steps than times.
    """
    _check_steps(levels, steps)
    coarse, fine = NOISE_RANGE[0] ** (1 / RHO), NOISE_RANGE[1] ** (1 / RHO)
    time = len(levels) - 1
    grid = [levels[time]]
    for i in range(1, steps):  # the middle of each of steps - 1 parts
        noise = (coarse + (i - 0.5) / (steps - 1) * (fine - coarse)) ** RHO
        below = bisect.bisect_right(levels, noise, key=lambda level: level.noise_to_signal) - 1
        time = max(min(below, time - 1), steps - 1 - i)  # each once, and one left for each of those to come
        grid.append(levels[time])
    return [*grid, CLEAN]


def _check_steps(levels: list[Level], steps: int) -> None:
    if not 1 <= steps <= len(levels):
        raise ValueError(f"steps must lie in 1..{len(levels)}, the number of timesteps, not {steps}")


def evaluations(level: Level, guidance: float) -> int:
    """Network evaluations that an estimate at `level` takes: two where guidance acts, else one."""
    acts = guidance not in (0, 1) and GUIDANCE_RANGE[0] <= level.noise_to_signal <= GUIDANCE_RANGE[1]
    return 2 if acts else 1


# --------------------------------------------------------------------------------------------------------------------
# The forward process, and what a network learns to predict. Here alpha and sigma are floats, or tensors that broadcast.


def diffuse(x0: Tensor, eps: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """x_t of clean images x0 and standard normal eps, both [B, ...] (Ho et al. 2020, eq. 4)."""
    return alpha * x0 + sigma * eps


def _check_prediction(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, not {prediction!r}")


def target(prediction: str, x0: Tensor, eps: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """What the network is to predict: the noise (Ho et al. 2020, eq. 14), or v (Salimans & Ho 2022, section 4)."""
    _check_prediction(prediction)
    return eps if prediction == "eps" else alpha * eps - sigma * x0


def clean_estimate(prediction: str, output: Tensor, x: Tensor, alpha: float, sigma: float) -> Tensor:
    """The estimate of x0 that a network's `output` at x implies: `target` solved for x0."""
    _check_prediction(prediction)
    return (x - sigma * output) / alpha if prediction == "eps" else alpha * x - sigma * output


def posterior_mean(x: Tensor, alpha: Tensor, sigma: Tensor, images: Tensor, squares: Tensor, possible: Tensor) -> Tensor:
    """E[x0 | x_t], [B, D], where x0 is one of N images, each as likely as another (Xu et al. 2023, eq. 5).

    Args:
        x: noisy images [B, D] at levels of which alpha and sigma are [B, 1].
        images: the clean ones, [N, D], and `squares`, their squared norms [N].
        possible: bool [B, N], which of them x can come from; for each x at least one.
    """
    log_likelihood = (alpha / sigma.square() * x) @ images.T
    log_likelihood.addcmul_(-alpha.square() / (2 * sigma.square()), squares)  # + const; in place: N is large
    return log_likelihood.masked_fill_(~possible, -math.inf).softmax(1) @ images


def stratified_times(n: int, timesteps: int, rng: torch.Generator, power: float = 1.0) -> Tensor:
    """int64 [n] times in 0..timesteps-1 on the generator's device, distributed as timesteps * u^power, u uniform.

    With a power of 1 every time is equally likely; a lesser one favours the noisier times, where an image's large shapes
    are decided. The u share one offset into an even grid: the loss of a batch varies less (Kingma et al. 2021,
    arXiv 2107.00630, appendix I.1).
    """
    offset = torch.rand(1, generator=rng, device=rng.device, dtype=torch.float64)
    grid = torch.arange(n, device=rng.device, dtype=torch.float64) / n
    return (((offset + grid) % 1) ** power * timesteps).long().clamp(max=timesteps - 1)


# --------------------------------------------------------------------------------------------------------------------
# Samplers: standard normal x [B, ...] at the first level of `grid` -> an estimate of x0, along the grid

Denoise = Callable[[Tensor, Level], Tensor]


def posterior(x0: Tensor, x: Tensor, now: Level, then: Level) -> tuple[Tensor, float]:
    """Mean and variance of q(x_then | x_now, x0), for `then` less noisy than `now` (Ho et al. 2020, eqs. 6 and 7).

    For adjacent times these are the paper's; for others, those of the process that visits only the grid (Nichol &
    Dhariwal 2021, section 4).
    """
    alpha = now.alpha / then.alpha  # of the step from `then` to `now`
    beta = 1 - alpha**2
    variance = then.sigma**2 / now.sigma**2 * beta
    mean = (then.alpha * beta * x0 + alpha * then.sigma**2 * x) / now.sigma**2
    return mean, variance


def ddpm(denoise: Denoise, x: Tensor, grid: list[Level], rng: torch.Generator) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), with the posterior's variance; the last step adds no noise."""
    for now, then in itertools.pairwise(grid):
        mean, variance = posterior(denoise(x, now), x, now, then)
        x = mean + math.sqrt(variance) * _normal_like(x, rng) if variance else mean
    return x


def ddim(denoise: Denoise, x: Tensor, grid: list[Level], rng: torch.Generator, eta: float = 0.0) -> Tensor:
    """Song et al. 2021, eq. 12: deterministic for eta = 0, ancestral sampling for eta = 1. First order.

    The noise is that which the estimate of x0 implies, also where `denoise` has clipped it to the range of images.
    """
    for now, then in itertools.pairwise(grid):
        x0 = denoise(x, now)
        eps = (x - now.alpha * x0) / now.sigma
        noise = eta * then.sigma / now.sigma * math.sqrt(1 - (now.alpha / then.alpha) ** 2)  # eq. 16
        x = then.alpha * x0 + math.sqrt(then.sigma**2 - noise**2) * eps
        if noise:
            x = x + noise * _normal_like(x, rng)
    return x


def dpm_solver(
    denoise: Denoise,
    x: Tensor,
    grid: list[Level],
    rng: torch.Generator,
    eta: float = 0.0,
    renewed_below: float = RENEWED_BELOW,
) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2, of the reverse process with `eta` times the usual noise.

    eta = 0 is the flow without noise: deterministic, second order. eta = 1 is the reverse of the forward process, which
    ancestral sampling follows too (SDE-DPM-Solver++(2M), their appendix). Any eta leads to the same distribution (tau of
    Xue et al. 2023, section 4): the noise is taken away again by `denoise`, and an error of earlier steps with it, so
    that a large one forgives an imperfect network, and wants more steps. So it acts only below a noise-to-signal ratio of
    `renewed_below` (Karras et al. 2022, algorithm 2, whose bound is S_tmax): above, few steps with renewed noise draw some
    digits more often than others, even with the exact estimates of x0.

    Its first step is of first order; so is one that ends at the clean image, where the extrapolation has no meaning.
    """
    previous, previous_step = None, 0.0
    for now, then in itertools.pairwise(grid):
        x0 = denoise(x, now)
        step = then.half_log_snr - now.half_log_snr  # h, infinite when `then` is clean
        estimate = x0
        if previous is not None and then.sigma:
            estimate = x0 + step / (2 * previous_step) * (x0 - previous)  # extrapolated to the middle of the step
        acts = eta and now.noise_to_signal <= renewed_below
        renewed = eta**2 * step if acts else 0.0  # how often, on a logarithmic scale, the noise of x is replaced
        x = then.sigma / now.sigma * math.exp(-renewed) * x - then.alpha * math.expm1(-step - renewed) * estimate
        if acts and then.sigma:
            x = x + then.sigma * math.sqrt(-math.expm1(-2 * renewed)) * _normal_like(x, rng)
        previous, previous_step = x0, step
    return x


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm-solver++": dpm_solver}
GRIDS = {"ddpm": time_grid, "ddim": noise_grid, "dpm-solver++": noise_grid}


def evaluations_per_image(levels: list[Level], sampler: str, steps: int, guidance: float) -> int:
    """Network evaluations that sampling an image takes; errors as of `GRIDS`."""
    return sum(evaluations(level, guidance) for level in GRIDS[sampler](levels, steps)[:-1])


def _normal_like(x: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
