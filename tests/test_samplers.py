"""diffusion/samplers.py: against Hugging Face diffusers, and against data with a known solution."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.stats
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from test_process import each_prediction, each_schedule, theirs

from data import load_digits, to_model_range
from diffusion import process, samplers
from diffusion.options import DEFAULT_STEPS, UNCONDITIONAL_ETA
from diffusion.process import CLEAN, Level

each_grid = pytest.mark.parametrize("grid", [samplers.time_grid, samplers.noise_grid])


def network(x: torch.Tensor, time: int) -> torch.Tensor:
    """Something smooth in place of a trained network."""
    return torch.sin(2 * x + time / 300)


def denoiser(prediction: str, low: float = -math.inf, high: float = math.inf):
    def denoise(x, level):
        output = network(x, level.time)
        return process.clean_estimate(prediction, output, x, level.alpha, level.sigma).clamp(low, high)

    return denoise


def normal_like(x: torch.Tensor, seed: int = 0):
    """A source of noise for the samplers."""
    rng = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(x.shape, generator=rng, dtype=x.dtype)


def run_theirs(scheduler, x: torch.Tensor, steps: int, seed: int = 0, **options) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    rng = torch.Generator().manual_seed(seed)
    for time in scheduler.timesteps:
        x = scheduler.step(network(x, int(time)), time, x, generator=rng, **options).prev_sample
    return x


# --------------------------------------------------------------------------------------------------------------------
# Grids and steps against diffusers


@pytest.mark.parametrize("steps", [1, 7, 10, 15, 100, 1000])
def test_the_time_grid_is_the_trailing_grid_of_diffusers(steps):
    levels = process.noise_levels("cosine", 1000)
    grid = samplers.time_grid(levels, steps)
    scheduler = theirs(DDIMScheduler, "cosine", timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert [level.time for level in grid[:-1]] == scheduler.timesteps.tolist()
    assert grid[0] is levels[-1]
    assert grid[-1] is CLEAN


@each_schedule
@pytest.mark.parametrize(("timesteps", "steps"), [(1000, 5), (1000, 15), (1000, 50), (400, 10)])
def test_the_noise_grid_is_that_of_diffusers_between_its_ends(schedule, timesteps, steps):
    """Karras et al. space the roots evenly, ends included. Ours are the middles of the parts: every second one of theirs."""
    levels = process.noise_levels(schedule, timesteps)
    grid = samplers.noise_grid(levels, steps)
    coarse, fine = samplers.NOISE_RANGE
    scheduler = theirs(DPMSolverMultistepScheduler, schedule, "v", use_karras_sigmas=True)
    expected = scheduler._convert_to_karras(torch.tensor([coarse, fine]), num_inference_steps=2 * steps - 1)[1::2]
    found = [level.sigma / level.alpha for level in grid[1:-1]]
    gaps = [levels[level.time + 1].sigma / levels[level.time + 1].alpha - noise for level, noise in zip(grid[1:-1], found)]
    assert grid[0] is levels[-1]
    assert grid[-1] is CLEAN
    assert all(noise <= wanted < noise + gap for noise, gap, wanted in zip(found, gaps, expected))


@each_grid
@each_schedule
@pytest.mark.parametrize("timesteps", [2, 10, 1000])
def test_grids_go_from_the_last_level_down_to_the_clean_image(grid, schedule, timesteps):
    levels = process.noise_levels(schedule, timesteps)
    for steps in {1, 2, timesteps // 2, timesteps - 1, timesteps} - {0}:
        times = [level.time for level in grid(levels, steps)]
        assert len(times) == steps + 1
        assert times[0] == timesteps - 1
        assert times[-1] == -1
        assert all(then < now for now, then in itertools.pairwise(times))
    assert grid(levels, timesteps) == [*reversed(levels), CLEAN]


@each_grid
@pytest.mark.parametrize("steps", [0, -1, 11])
def test_grids_of_too_few_or_too_many_steps_are_refused(grid, steps):
    with pytest.raises(ValueError, match=r"1\.\.10"):
        grid(process.noise_levels("cosine", 10), steps)


@each_schedule
@each_prediction
@pytest.mark.parametrize("time", [0, 1, 17, 500, 998, 999])
def test_an_ancestral_step_has_the_mean_and_variance_of_diffusers(schedule, prediction, time):
    scheduler = theirs(DDPMScheduler, schedule, prediction, clip_sample=True, variance_type="fixed_small")
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)  # in float32, 1 - alpha_bar has few digits left
    levels = process.noise_levels(schedule, 1000)
    now, then = levels[time], levels[time - 1] if time else CLEAN
    x = torch.randn(4, 1, 7, 7)
    _, variance = samplers.posterior(x, x, now, then)
    # diffusers keeps the last variance away from zero, but does not use it
    expected = float(scheduler._get_variance(time))
    assert expected > 0
    assert variance == (pytest.approx(expected, rel=1e-4) if time else 0)
    ours = samplers.ddpm(denoiser(prediction, -1, 1), x, [now, then], normal_like(x, 1))
    rng = torch.Generator().manual_seed(1)
    assert torch.allclose(ours, scheduler.step(network(x, time), time, x, generator=rng).prev_sample, atol=1e-5)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("schedule", "clip"), [("linear", False), ("linear", True), ("cosine", True)])
@each_prediction
def test_ddim_agrees_with_diffusers(steps, eta, clip, prediction, schedule):
    """Also with x0 clipped to the range of images, as `DDPM.denoise` does.

    Without clipping, the cosine schedule divides a noise prediction by an alpha near zero, and rounding dominates.
    """
    scheduler = theirs(DDIMScheduler, schedule, prediction, clip_sample=clip, timestep_spacing="trailing")
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    x, grid = torch.randn(4, 1, 7, 7), samplers.time_grid(process.noise_levels(schedule, 1000), steps)
    expected = run_theirs(scheduler, x, steps, eta=eta, use_clipped_model_output=clip)
    bounds = (-1, 1) if clip else (-math.inf, math.inf)
    ours = samplers.ddim(denoiser(prediction, *bounds), x, grid, normal_like(x), eta=eta)
    scale = expected.abs().max().clamp(min=1)  # without clipping, the estimates of an untrained network grow
    assert torch.allclose(ours / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 10, 20])
@pytest.mark.parametrize(("eta", "algorithm"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
@each_schedule
def test_dpm_solver_agrees_with_diffusers(steps, schedule, eta, algorithm):
    options = {"algorithm_type": algorithm, "solver_order": 2, "final_sigmas_type": "zero"}
    scheduler = theirs(DPMSolverMultistepScheduler, schedule, "v", timestep_spacing="trailing", **options)
    x, grid = torch.randn(4, 1, 7, 7), samplers.time_grid(process.noise_levels(schedule, 1000), steps)
    ours = samplers.dpm_solver(denoiser("v"), x, grid, normal_like(x), eta, renewed_below=math.inf)
    assert torch.allclose(ours, run_theirs(scheduler, x, steps), atol=1e-5)


def test_ddim_with_eta_1_is_ancestral_sampling():
    x, grid = torch.randn(4, 1, 7, 7).double(), samplers.time_grid(process.noise_levels("cosine", 1000), 40)
    ddim = samplers.ddim(denoiser("v", -1, 1), x, grid, normal_like(x, 3), eta=1.0)
    ddpm = samplers.ddpm(denoiser("v", -1, 1), x, grid, normal_like(x, 3))
    assert torch.allclose(ddim, ddpm, atol=1e-9)


# --------------------------------------------------------------------------------------------------------------------
# Gaussian data: the best denoiser, the exact flow and the exact distribution are known in closed form

MEAN, DEVIATION = 0.3, 0.5


def spread(level) -> float:
    """The deviation of x at a noise level."""
    return math.hypot(level.alpha * DEVIATION, level.sigma)


def best_denoiser(x: torch.Tensor, level) -> torch.Tensor:
    """E[x0 | x], by conditioning the joint Gaussian."""
    return MEAN + level.alpha * (DEVIATION / spread(level)) ** 2 * (x - level.alpha * MEAN)


def flow_error(sampler: str, grid: list[Level]) -> float:
    """Largest distance to the exact probability flow (arXiv 2011.13456), in which x keeps its standard score."""
    x, (start, *_, end) = torch.linspace(-2, 2, 9).double(), grid
    exact = end.alpha * MEAN + spread(end) / spread(start) * (x - start.alpha * MEAN)
    return float((samplers.SAMPLERS[sampler](best_denoiser, x, grid, normal_like(x)) - exact).abs().max())


def orders(errors: list[float]) -> list[float]:
    """Orders of convergence, given the errors at 1, 2, 4, ... times as many steps."""
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


def log_snr_grid(steps: int) -> list[Level]:
    """Levels at equal steps of lambda = log(alpha / sigma), from -3 to 3."""
    lambdas = [-3 + 6 * i / steps for i in range(steps + 1)]
    return [Level(i, 1 / math.sqrt(1 + math.exp(-2 * x)), 1 / math.sqrt(1 + math.exp(2 * x))) for i, x in enumerate(lambdas)]


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm-solver++", 2)])
def test_deterministic_samplers_converge_at_their_order(sampler, order):
    errors = [flow_error(sampler, log_snr_grid(steps)) for steps in (40, 80, 160, 320)]
    assert orders(errors) == pytest.approx([order] * 3, abs=0.15)
    assert errors[-1] < (0.01 if order == 1 else 1e-4)


def test_dpm_solver_has_less_than_half_the_error_of_ddim():
    levels = process.noise_levels("cosine", 1000)
    grids = [samplers.time_grid(levels, steps) for steps in (10, 20, 50, 100, 1000)]
    ddim, solver = ([flow_error(name, grid) for grid in grids] for name in ("ddim", "dpm-solver++"))
    assert all(b < a / 2 for a, b in zip(ddim, solver))
    assert solver[1] < 0.01
    assert ddim[-1] < 0.01


def test_ancestral_sampling_converges_to_the_distribution():
    """The error of its standard deviation falls as 1 / steps."""
    levels, errors = process.noise_levels("cosine", 10_000), []
    for steps in (25, 50, 100, 200):
        x = torch.randn(200_000, generator=torch.Generator().manual_seed(steps)).double()
        found = samplers.ddpm(best_denoiser, x, samplers.time_grid(levels, steps), normal_like(x))
        assert float(found.mean()) == pytest.approx(MEAN, abs=0.01)
        errors.append(DEVIATION - float(found.std()))
    assert errors[-1] < 0.015
    assert orders(errors) == pytest.approx([1] * 3, abs=0.25)


@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
def test_the_noise_of_dpm_solver_keeps_the_distribution(eta):
    x, levels = torch.randn(200_000, generator=torch.Generator().manual_seed(1)).double(), log_snr_grid(400)
    start, *_, end = levels
    x = start.alpha * MEAN + spread(start) * x
    found = samplers.dpm_solver(best_denoiser, x, levels, normal_like(x), eta)
    assert float(found.mean()) == pytest.approx(end.alpha * MEAN, abs=0.005)
    assert float(found.std()) == pytest.approx(spread(end), rel=0.01)
    correlation = float(torch.corrcoef(torch.stack([x, found]))[0, 1])
    assert correlation < 0.99, "without noise, x would follow from the start"


def test_dpm_solver_adds_noise_only_below_its_bound():
    """The states with and without noise are equal up to the first step from a level below the bound."""
    levels, seen = log_snr_grid(40), {}
    for eta in (0.0, 1.5):
        states = seen[eta] = []
        x = torch.randn(100, generator=torch.Generator().manual_seed(1)).double()

        def denoise(x, level, states=states):
            states.append(x)
            return best_denoiser(x, level)

        samplers.dpm_solver(denoise, x, levels, normal_like(x), eta)
    same = [torch.equal(*states) for states in zip(*seen.values(), strict=True)]
    below = [level.noise_to_signal <= samplers.RENEWED_BELOW for level in levels]
    assert same == [True] + [not acted for acted in below[:-2]]
    assert 3 < sum(same) < 37


@pytest.mark.parametrize(("renewed_below", "fair"), [(samplers.RENEWED_BELOW, True), (math.inf, False)])
def test_noise_at_the_first_levels_makes_some_digits_too_frequent(mnist_dir, renewed_below, fair):
    """With the exact denoiser of 500 images, wrong frequencies can only come from the sampler."""
    digits = load_digits("mnist", "train", mnist_dir, torch.device("cpu")).subset(500, "few")
    images = to_model_range(digits.images).flatten(1)
    squares, any_of_them = images.square().sum(1), torch.ones(1, len(images), dtype=torch.bool)

    def denoise(x, level):
        alpha, sigma = (torch.full((len(x), 1), value) for value in (level.alpha, level.sigma))
        return process.posterior_mean(x, alpha, sigma, images, squares, any_of_them)

    grid = samplers.noise_grid(process.noise_levels("cosine", 1000), DEFAULT_STEPS)
    noise = torch.randn(4000, 784, generator=torch.Generator().manual_seed(1))
    x = samplers.dpm_solver(denoise, noise, grid, normal_like(noise), UNCONDITIONAL_ETA, renewed_below)
    drawn = digits.labels[(2 * x @ images.T - squares).argmax(1)].bincount(minlength=10)  # of the nearest images
    expected = digits.labels.bincount(minlength=10) * (len(x) / len(digits))
    p_value = scipy.stats.chisquare(drawn.numpy(), expected.numpy()).pvalue
    assert p_value > 1e-3 if fair else p_value < 1e-9


def test_the_noise_of_dpm_solver_removes_early_errors():
    """The errors of a denoiser that is wrong at first stay without noise."""
    levels = log_snr_grid(100)
    x = torch.zeros(100_000).double()

    def misled(x, level):
        return best_denoiser(x, level) + (level.time < 30)

    def mean(eta):
        return float(samplers.dpm_solver(misled, x, levels, normal_like(x), eta).mean())

    exact = levels[-1].alpha * MEAN
    assert abs(mean(2.0) - exact) < abs(mean(1.0) - exact) < abs(mean(0.0) - exact) / 2
