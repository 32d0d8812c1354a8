"""The samplers: from standard normal noise to images, along a grid of noise levels.

A sampler sees a network only as `denoise(x, level)`, its estimate of x0. So the same few lines serve both predictions,
guidance, and the closed-form denoisers of the tests.

    Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv 2006.11239
    Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", arXiv 2102.09672
    Song et al. 2021, "Denoising Diffusion Implicit Models", arXiv 2010.02502
    Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", arXiv 2207.12598
    Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", arXiv 2206.00364
    Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", arXiv 2211.01095
    Xue et al. 2023, "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models", arXiv 2309.05019
    Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion
        Models", arXiv 2404.07724
    Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", arXiv 2305.08891
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable

from torch import Tensor

from diffusion.process import CLEAN, Level

Denoise = Callable[[Tensor, Level], Tensor]  # (x, level) -> the estimate of x0
Normal = Callable[[], Tensor]  # -> the next standard normal noise, in the shape of x

NOISE_RANGE = (12.0, 0.08)  # of `noise_grid`: the noise-to-signal ratios between which it spaces its levels
RHO = 7  # of `noise_grid`: its levels are evenly spaced in (sigma / alpha)^(1/RHO)
# The noise-to-signal ratios at which guidance acts. With more noise it makes all samples of a digit alike; with less noise
# there is nothing left to decide (Kynkäänniemi et al. 2024).
GUIDANCE_RANGE = (0.25, 2.0)
RENEWED_BELOW = 2.0  # the noise-to-signal ratio below which unconditional `dpm_solver` adds noise


# --------------------------------------------------------------------------------------------------------------------
# Grids of noise levels


def time_grid(levels: list[Level], steps: int) -> list[Level]:
    """`steps` levels evenly spaced in time, from the most noise down, and the clean image: the grid of ancestral sampling.

    The first level is the very last time, where sampling starts (Lin et al. 2024, table 2, "trailing").

    Raises:
        ValueError: no step, or more steps than times.
    """
    _check_steps(levels, steps)
    return [levels[round(len(levels) * (1 - i / steps)) - 1] for i in range(steps)] + [CLEAN]


def noise_grid(levels: list[Level], steps: int) -> list[Level]:
    """As `time_grid`, but evenly spaced in (sigma / alpha)^(1/7) after the first level (Karras et al. 2022, eq. 5).

    More of the steps fall at middle noise, where the shape of the digit forms. Large steps cost the most there.

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
        time = max(min(below, time - 1), steps - 1 - i)  # no level twice, and one left for each step to come
        grid.append(levels[time])
    return [*grid, CLEAN]


def _check_steps(levels: list[Level], steps: int) -> None:
    if not 1 <= steps <= len(levels):
        raise ValueError(f"steps must lie in 1..{len(levels)}, the number of timesteps, not {steps}")


def evaluations(level: Level, guidance: float) -> int:
    """Network evaluations of one estimate at `level`: two where guidance acts, else one."""
    acts = guidance not in (0, 1) and GUIDANCE_RANGE[0] <= level.noise_to_signal <= GUIDANCE_RANGE[1]
    return 2 if acts else 1


# --------------------------------------------------------------------------------------------------------------------
# Samplers: standard normal x [B, ...] at the first level of `grid` -> an estimate of x0 [B, ...]


def ddpm(denoise: Denoise, x: Tensor, grid: list[Level], normal: Normal) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), with the variance of the posterior. The last step adds no noise."""
    for now, then in itertools.pairwise(grid):
        mean, variance = posterior(denoise(x, now), x, now, then)
        x = mean + math.sqrt(variance) * normal() if variance else mean
    return x


def posterior(x0: Tensor, x: Tensor, now: Level, then: Level) -> tuple[Tensor, float]:
    """Mean and variance of q(x_then | x_now, x0), for `then` less noisy than `now` (Ho et al. 2020, eqs. 6 and 7).

    For times that are not adjacent, the process is the one that visits only the grid (Nichol & Dhariwal 2021, section 4).
    """
    alpha = now.alpha / then.alpha  # of the step from `then` to `now`
    beta = 1 - alpha**2
    variance = then.sigma**2 / now.sigma**2 * beta
    mean = (then.alpha * beta * x0 + alpha * then.sigma**2 * x) / now.sigma**2
    return mean, variance


def ddim(denoise: Denoise, x: Tensor, grid: list[Level], normal: Normal, eta: float = 0.0) -> Tensor:
    """Song et al. 2021, eq. 12, of first order: deterministic for eta = 0, ancestral sampling for eta = 1.

    The noise is computed from the estimate of x0, also where `denoise` has clipped that to the range of images.
    """
    for now, then in itertools.pairwise(grid):
        x0 = denoise(x, now)
        eps = (x - now.alpha * x0) / now.sigma
        noise = eta * then.sigma / now.sigma * math.sqrt(1 - (now.alpha / then.alpha) ** 2)  # eq. 16
        x = then.alpha * x0 + math.sqrt(then.sigma**2 - noise**2) * eps
        if noise:
            x = x + noise * normal()
    return x


def dpm_solver(
    denoise: Denoise,
    x: Tensor,
    grid: list[Level],
    normal: Normal,
    eta: float = 0.0,
    renewed_below: float = RENEWED_BELOW,
) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2, of the reverse process with `eta` times the usual noise.

    eta = 0 is deterministic and of second order. eta = 1 follows the same process as ancestral sampling
    (SDE-DPM-Solver++(2M), their appendix). Every eta leads to the same distribution (tau of Xue et al. 2023, section 4). A
    step replaces a share of the noise. That removes the same share of the errors of earlier steps. So a large eta helps an
    imperfect network, but needs more steps.

    Noise is added only below the noise-to-signal ratio `renewed_below` (S_tmax of Karras et al. 2022, algorithm 2). With
    few steps, noise that is added above it draws some digits too often, even with exact estimates of x0.

    The first step, and the step that ends at the clean image, are of first order: there is nothing to extrapolate.
    """
    previous, previous_step = None, 0.0
    for now, then in itertools.pairwise(grid):
        x0 = denoise(x, now)
        step = then.half_log_snr - now.half_log_snr  # h, infinite when `then` is clean
        estimate = x0
        if previous is not None and then.sigma:
            estimate = x0 + step / (2 * previous_step) * (x0 - previous)  # extrapolated to the middle of the step
        adds_noise = eta and now.noise_to_signal <= renewed_below
        renewed = eta**2 * step if adds_noise else 0.0  # how often, on a logarithmic scale, the noise of x is replaced
        x = then.sigma / now.sigma * math.exp(-renewed) * x - then.alpha * math.expm1(-step - renewed) * estimate
        if adds_noise and then.sigma:
            x = x + then.sigma * math.sqrt(-math.expm1(-2 * renewed)) * normal()
        previous, previous_step = x0, step
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ddpm": ddpm, "ddim": ddim, "dpm-solver++": dpm_solver}
GRIDS: dict[str, Callable[..., list[Level]]] = {"ddpm": time_grid, "ddim": noise_grid, "dpm-solver++": noise_grid}
