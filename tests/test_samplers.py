"""Schedules, forward process and samplers: against Hugging Face diffusers, and against a case with a known solution."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.stats
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

import diffusion
import flags
import models
from data import load_digits, to_model_range
from diffusion import CLEAN, Level

THEIR_NAME = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTION = {"eps": "epsilon", "v": "v_prediction"}
BOTH = pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
EITHER = pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
GRIDS = pytest.mark.parametrize("grid", [diffusion.time_grid, diffusion.noise_grid])


def theirs(scheduler, schedule: str, prediction: str = "eps", **options):
    return scheduler(num_train_timesteps=1000, beta_schedule=THEIR_NAME[schedule], beta_start=1e-4, beta_end=0.02,
                     prediction_type=PREDICTION[prediction], **options)  # fmt: skip


def network(x: torch.Tensor, time: int) -> torch.Tensor:
    """Something smooth in place of a trained network."""
    return torch.sin(2 * x + time / 300)


def denoiser(prediction: str, low: float = -math.inf, high: float = math.inf):
    def denoise(x, level):
        output = network(x, level.time)
        return diffusion.clean_estimate(prediction, output, x, level.alpha, level.sigma).clamp(low, high)

    return denoise


def run_theirs(scheduler, x: torch.Tensor, steps: int, seed: int = 0, **options) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    rng = torch.Generator().manual_seed(seed)
    for time in scheduler.timesteps:
        x = scheduler.step(network(x, int(time)), time, x, generator=rng, **options).prev_sample
    return x


# --------------------------------------------------------------------------------------------------------------------
# Schedules and the forward process


@BOTH
def test_schedules_are_the_ones_that_others_use(schedule):
    expected = theirs(DDPMScheduler, schedule)
    betas = diffusion.betas(schedule, 1000)
    assert betas.dtype == torch.float64 and torch.allclose(betas.float(), expected.betas, atol=1e-6)
    levels = diffusion.noise_levels(schedule, 1000)
    assert [level.time for level in levels] == list(range(1000))
    alpha_bar = torch.tensor([level.alpha**2 for level in levels], dtype=torch.float32)
    assert torch.allclose(alpha_bar, expected.alphas_cumprod, atol=1e-5)
    assert all(level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-12) for level in levels)
    assert levels[-1].sigma > 0.9999 and levels[0].sigma < 0.011


@BOTH
@pytest.mark.parametrize("timesteps", [2, 10, 100, 4000])
def test_schedules_of_any_length_end_in_noise(schedule, timesteps):
    betas = diffusion.betas(schedule, timesteps)
    assert betas.shape == (timesteps,) and betas.min() > 0 and betas.max() < 1
    sigmas = [level.sigma for level in diffusion.noise_levels(schedule, timesteps)]
    assert sigmas == sorted(sigmas) and (sigmas[-1] > 0.999 or timesteps < 10)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="linear, cosine"):
        diffusion.betas("sigmoid", 1000)
    for function in (diffusion.target, diffusion.clean_estimate):
        with pytest.raises(ValueError, match="eps, v"):
            function("x0", torch.zeros(1), torch.zeros(1), 0.6, 0.8)


def test_the_command_line_names_what_there_is():
    """flags.py repeats the names, because --help must not wait for torch."""
    parser = flags.ArgumentParser("")
    flags.add_diffusion_flags(parser)
    choices = {action.dest: action.choices for action in parser._actions}
    assert set(choices["sampler"]) == set(diffusion.SAMPLERS)
    for name in ("MAX_ETA", "DEFAULT_STEPS", "DEFAULT_ETA", "DIGIT_ETA"):
        assert getattr(flags, name) == getattr(models, name)
    assert set(choices["schedule"]) == set(diffusion.SCHEDULES)
    assert set(choices["prediction"]) == set(diffusion.PREDICTIONS)
    assert flags.guidance_weight(str(models.MAX_GUIDANCE)) == models.MAX_GUIDANCE
    parser = flags.ArgumentParser("")
    flags.add_sampling_flags(parser)
    assert f"default: {models.DEFAULT_STEPS}" in parser.format_help()
    shown = " ".join(parser.format_help().split())
    assert f"default: {models.DEFAULT_ETA:g}, {models.DIGIT_ETA:g} for digits on demand;" in shown


@BOTH
def test_the_forward_process_and_the_targets_agree(schedule):
    expected = theirs(DDPMScheduler, schedule)
    x0, eps, time = torch.rand(5, 1, 4, 4) * 2 - 1, torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 500, 998, 999])
    levels = [diffusion.noise_levels(schedule, 1000)[t] for t in time.tolist()]
    alpha, sigma = (torch.tensor([[[[value]]] for value in values]) for values in zip(*[level[1:] for level in levels]))
    x = diffusion.diffuse(x0, eps, alpha, sigma)
    assert torch.allclose(x, expected.add_noise(x0, eps, time), atol=1e-5)
    assert torch.allclose(diffusion.target("v", x0, eps, alpha, sigma), expected.get_velocity(x0, eps, time), atol=1e-5)
    assert torch.equal(diffusion.target("eps", x0, eps, alpha, sigma), eps)


@EITHER
def test_the_clean_estimate_inverts_the_target(prediction):
    x0, eps, (_, alpha, sigma) = (
        torch.randn(50).double(),
        torch.randn(50).double(),
        diffusion.noise_levels("cosine", 1000)[700],
    )
    output = diffusion.target(prediction, x0, eps, alpha, sigma)
    x = diffusion.diffuse(x0, eps, alpha, sigma)
    assert torch.allclose(diffusion.clean_estimate(prediction, output, x, alpha, sigma), x0)


def test_times_are_spread_evenly():
    rng = torch.Generator().manual_seed(0)
    assert sorted(diffusion.stratified_times(1000, 1000, rng).tolist()) == list(range(1000))
    few = torch.stack([diffusion.stratified_times(10, 1000, rng) for _ in range(2000)])
    assert all(sorted(row) == list(range(10)) for row in (few // 100).tolist())  # one in each tenth
    counts = (few[:, 0] // 100).bincount(minlength=10)  # and each of them anywhere
    assert counts.min() > 140 and counts.max() < 260
    assert diffusion.stratified_times(1, 2, rng).shape == (1,)


def test_a_power_below_one_favours_noisy_times():
    """P(t < T s) = s^(1 / power), to the evenness of the grid."""
    times = diffusion.stratified_times(10_000, 1000, torch.Generator().manual_seed(0), power=0.75)
    assert times.min() >= 0 and times.max() == 999
    for s in (0.1, 0.5, 0.9):
        assert (times < 1000 * s).double().mean().item() == pytest.approx(s ** (1 / 0.75), abs=1e-3)


# --------------------------------------------------------------------------------------------------------------------
# Samplers against diffusers, step after step on its grids


@pytest.mark.parametrize("steps", [1, 7, 10, 15, 100, 1000])
def test_the_grid_is_the_trailing_one(steps):
    levels = diffusion.noise_levels("cosine", 1000)
    grid = diffusion.time_grid(levels, steps)
    scheduler = theirs(DDIMScheduler, "cosine", timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert [level.time for level in grid[:-1]] == scheduler.timesteps.tolist()
    assert grid[0] is levels[-1] and grid[-1] is CLEAN


@BOTH
@pytest.mark.parametrize(("timesteps", "steps"), [(1000, 5), (1000, 15), (1000, 50), (400, 10)])
def test_the_noise_grid_is_theirs_between_its_ends(schedule, timesteps, steps):
    """Karras et al. evenly space the roots with both ends, we the middles of the parts: ours are theirs at odd places."""
    levels = diffusion.noise_levels(schedule, timesteps)
    grid = diffusion.noise_grid(levels, steps)
    coarse, fine = diffusion.NOISE_RANGE
    scheduler = theirs(DPMSolverMultistepScheduler, schedule, "v", use_karras_sigmas=True)
    expected = scheduler._convert_to_karras(torch.tensor([coarse, fine]), num_inference_steps=2 * steps - 1)[1::2]
    found = [level.sigma / level.alpha for level in grid[1:-1]]
    gaps = [levels[level.time + 1].sigma / levels[level.time + 1].alpha - noise for level, noise in zip(grid[1:-1], found)]
    assert grid[0] is levels[-1] and grid[-1] is CLEAN
    assert all(noise <= wanted < noise + gap for noise, gap, wanted in zip(found, gaps, expected))


@GRIDS
@BOTH
@pytest.mark.parametrize("timesteps", [2, 10, 1000])
def test_grids_descend_and_reach_all_levels(grid, schedule, timesteps):
    levels = diffusion.noise_levels(schedule, timesteps)
    for steps in {1, 2, timesteps // 2, timesteps - 1, timesteps} - {0}:
        times = [level.time for level in grid(levels, steps)]
        assert len(times) == steps + 1 and times[0] == timesteps - 1 and times[-1] == -1
        assert all(then < now for now, then in itertools.pairwise(times))
    assert grid(levels, timesteps) == [*reversed(levels), CLEAN]


@GRIDS
@pytest.mark.parametrize("steps", [0, -1, 11])
def test_impossible_grids_are_refused(grid, steps):
    with pytest.raises(ValueError, match=r"1\.\.10"):
        grid(diffusion.noise_levels("cosine", 10), steps)


@BOTH
@EITHER
@pytest.mark.parametrize("time", [0, 1, 17, 500, 998, 999])
def test_an_ancestral_step_has_their_mean_and_variance(schedule, prediction, time):
    scheduler = theirs(DDPMScheduler, schedule, prediction, clip_sample=True, variance_type="fixed_small")
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)  # in float32, 1 - alpha_bar has few digits left
    levels = diffusion.noise_levels(schedule, 1000)
    now, then = levels[time], levels[time - 1] if time else CLEAN
    x = torch.randn(4, 1, 7, 7)
    _, variance = diffusion.posterior(x, x, now, then)
    # They keep the last variance away from zero, and do not use it either
    expected = float(scheduler._get_variance(time))
    assert variance == (pytest.approx(expected, rel=1e-4) if time else 0) and expected > 0
    ours = diffusion.ddpm(denoiser(prediction, -1, 1), x, [now, then], torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(1)
    assert torch.allclose(ours, scheduler.step(network(x, time), time, x, generator=rng).prev_sample, atol=1e-5)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("schedule", "clip"), [("linear", False), ("linear", True), ("cosine", True)])
@EITHER
def test_ddim_agrees(steps, eta, clip, prediction, schedule):
    """Also with x0 clipped to the range of images, and the noise that this implies, as `DDPM.denoise` does.

    Without that, the cosine schedule divides a noise prediction by an alpha near zero, and both drown in rounding.
    """
    scheduler = theirs(DDIMScheduler, schedule, prediction, clip_sample=clip, timestep_spacing="trailing")
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    x, grid = torch.randn(4, 1, 7, 7), diffusion.time_grid(diffusion.noise_levels(schedule, 1000), steps)
    expected = run_theirs(scheduler, x, steps, eta=eta, use_clipped_model_output=clip)
    bounds = (-1, 1) if clip else (-math.inf, math.inf)
    ours = diffusion.ddim(denoiser(prediction, *bounds), x, grid, torch.Generator().manual_seed(0), eta=eta)
    scale = expected.abs().max().clamp(min=1)  # unclipped, predictions that no training has tamed grow large
    assert torch.allclose(ours / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 10, 20])
@pytest.mark.parametrize(("eta", "algorithm"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
@BOTH
def test_dpm_solver_agrees(steps, schedule, eta, algorithm):
    scheduler = theirs(DPMSolverMultistepScheduler, schedule, "v", algorithm_type=algorithm, solver_order=2,
                       timestep_spacing="trailing", final_sigmas_type="zero")  # fmt: skip
    x, grid = torch.randn(4, 1, 7, 7), diffusion.time_grid(diffusion.noise_levels(schedule, 1000), steps)
    ours = diffusion.dpm_solver(denoiser("v"), x, grid, torch.Generator().manual_seed(0), eta, renewed_below=math.inf)
    assert torch.allclose(ours, run_theirs(scheduler, x, steps), atol=1e-5)


def test_ddim_with_eta_1_is_ancestral_sampling():
    x, grid = torch.randn(4, 1, 7, 7).double(), diffusion.time_grid(diffusion.noise_levels("cosine", 1000), 40)
    ddim = diffusion.ddim(denoiser("v", -1, 1), x, grid, torch.Generator().manual_seed(3), eta=1.0)
    ddpm = diffusion.ddpm(denoiser("v", -1, 1), x, grid, torch.Generator().manual_seed(3))
    assert torch.allclose(ddim, ddpm, atol=1e-9)


def test_the_posterior_mean_is_bayes_rule():
    """Against the densities written out, in float64."""
    rng = torch.Generator().manual_seed(0)
    images, x = torch.randn(7, 5, generator=rng).double(), torch.randn(3, 5, generator=rng).double()
    alpha, sigma = torch.tensor([[0.9], [0.5], [0.0]]).double(), torch.tensor([[0.4], [0.8], [1.0]]).double()
    possible = torch.ones(3, 7, dtype=torch.bool)
    possible[1, ::2] = False
    found = diffusion.posterior_mean(x, alpha, sigma, images, images.square().sum(1), possible)
    for row in range(3):
        density = torch.distributions.Normal(alpha[row] * images, sigma[row])
        weight = density.log_prob(x[row]).sum(1).exp() * possible[row]
        assert torch.allclose(found[row], (weight[:, None] * images).sum(0) / weight.sum())
    assert torch.allclose(found[2], images.mean(0))  # pure noise tells nothing


# --------------------------------------------------------------------------------------------------------------------
# A Gaussian as data: the best denoiser, the exact flow and the exact distribution are known in closed form

MEAN, DEVIATION = 0.3, 0.5


def spread(level) -> float:
    """The deviation of x at a noise level."""
    return math.hypot(level.alpha * DEVIATION, level.sigma)


def best_denoiser(x: torch.Tensor, level) -> torch.Tensor:
    """E[x0 | x], by conditioning the joint Gaussian."""
    return MEAN + level.alpha * (DEVIATION / spread(level)) ** 2 * (x - level.alpha * MEAN)


def flow_error(sampler: str, grid: list[Level]) -> float:
    """Largest distance to the exact probability flow (Song et al., arXiv 2011.13456): x keeps its standard score."""
    x, (start, *_, end) = torch.linspace(-2, 2, 9).double(), grid
    exact = end.alpha * MEAN + spread(end) / spread(start) * (x - start.alpha * MEAN)
    return float((diffusion.SAMPLERS[sampler](best_denoiser, x, grid, torch.Generator()) - exact).abs().max())


def orders(errors: list[float]) -> list[float]:
    """Of convergence, given the errors at 1, 2, 4, ... times as many steps."""
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


def log_snr_grid(steps: int) -> list[Level]:
    """Levels at equal steps of lambda from -3 to 3: the h in which the orders are stated."""
    lambdas = [-3 + 6 * i / steps for i in range(steps + 1)]
    return [Level(i, 1 / math.sqrt(1 + math.exp(-2 * x)), 1 / math.sqrt(1 + math.exp(2 * x))) for i, x in enumerate(lambdas)]


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm-solver++", 2)])
def test_deterministic_samplers_converge_at_their_order(sampler, order):
    errors = [flow_error(sampler, log_snr_grid(steps)) for steps in (40, 80, 160, 320)]
    assert orders(errors) == pytest.approx([order] * 3, abs=0.15)
    assert errors[-1] < (0.01 if order == 1 else 1e-4)


def test_on_their_own_grid_the_second_order_pays_at_once():
    levels = diffusion.noise_levels("cosine", 1000)
    ddim, solver = ([flow_error(name, diffusion.time_grid(levels, steps)) for steps in (10, 20, 50, 100, 1000)]
                    for name in ("ddim", "dpm-solver++"))  # fmt: skip
    assert all(b < a / 2 for a, b in zip(ddim, solver))
    assert solver[1] < 0.01 and ddim[-1] < 0.01


def test_ancestral_sampling_converges_to_the_distribution():
    """Its deviation is wrong by about 1 / steps."""
    levels, errors = diffusion.noise_levels("cosine", 10_000), []
    for steps in (25, 50, 100, 200):
        x = torch.randn(200_000, generator=torch.Generator().manual_seed(steps)).double()
        found = diffusion.ddpm(best_denoiser, x, diffusion.time_grid(levels, steps), torch.Generator().manual_seed(0))
        assert float(found.mean()) == pytest.approx(MEAN, abs=0.01)
        errors.append(DEVIATION - float(found.std()))
    assert errors[-1] < 0.015
    assert orders(errors) == pytest.approx([1] * 3, abs=0.25)


@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
def test_the_noise_of_dpm_solver_leaves_the_distribution_as_it_is(eta):
    x, levels = torch.randn(200_000, generator=torch.Generator().manual_seed(1)).double(), log_snr_grid(400)
    start, *_, end = levels
    x = start.alpha * MEAN + spread(start) * x
    found = diffusion.dpm_solver(best_denoiser, x, levels, torch.Generator().manual_seed(0), eta)
    assert float(found.mean()) == pytest.approx(end.alpha * MEAN, abs=0.005)
    assert float(found.std()) == pytest.approx(spread(end), rel=0.01)
    correlation = float(torch.corrcoef(torch.stack([x, found]))[0, 1])
    assert correlation < 0.99  # the noise did act


def test_dpm_solver_renews_noise_below_its_bound_alone():
    """The states of a sampling with noise are those of one without, up to the first step from below the bound."""
    levels, seen = log_snr_grid(40), {}
    for eta in (0.0, 1.5):
        states = seen[eta] = []
        x = torch.randn(100, generator=torch.Generator().manual_seed(1)).double()

        def denoise(x, level, states=states):
            states.append(x)
            return best_denoiser(x, level)

        diffusion.dpm_solver(denoise, x, levels, torch.Generator().manual_seed(0), eta)
    same = [torch.equal(*states) for states in zip(*seen.values(), strict=True)]
    below = [level.noise_to_signal <= diffusion.RENEWED_BELOW for level in levels]
    assert same == [True] + [not acted for acted in below[:-2]] and 3 < sum(same) < 37


@pytest.mark.parametrize(("renewed_below", "fair"), [(diffusion.RENEWED_BELOW, True), (math.inf, False)])
def test_noise_that_is_renewed_too_early_favours_some_digits(mnist_dir, renewed_below, fair):
    """Data of 500 images have an exact denoiser, so whatever is drawn too often comes from the sampler: its default one."""
    digits = load_digits("mnist", "train", mnist_dir, torch.device("cpu")).subset(500, "few")
    images = to_model_range(digits.images).flatten(1)
    squares, any_of_them = images.square().sum(1), torch.ones(1, len(images), dtype=torch.bool)

    def denoise(x, level):
        alpha, sigma = (torch.full((len(x), 1), value) for value in (level.alpha, level.sigma))
        return diffusion.posterior_mean(x, alpha, sigma, images, squares, any_of_them)

    grid = diffusion.noise_grid(diffusion.noise_levels("cosine", 1000), models.DEFAULT_STEPS)
    noise = torch.randn(4000, 784, generator=torch.Generator().manual_seed(1))
    x = diffusion.dpm_solver(denoise, noise, grid, torch.Generator().manual_seed(0), models.DEFAULT_ETA, renewed_below)
    drawn = digits.labels[(2 * x @ images.T - squares).argmax(1)].bincount(minlength=10)  # as the nearest image is labelled
    expected = digits.labels.bincount(minlength=10) * (len(x) / len(digits))
    p_value = scipy.stats.chisquare(drawn.numpy(), expected.numpy()).pvalue
    assert p_value > 1e-3 if fair else p_value < 1e-9


def test_the_noise_of_dpm_solver_forgives():
    """A denoiser that was wrong at first is forgotten; without noise its error stays."""
    levels = log_snr_grid(100)
    x = torch.zeros(100_000).double()

    def misled(x, level):
        return best_denoiser(x, level) + (level.time < 30)

    def mean(eta):
        return float(diffusion.dpm_solver(misled, x, levels, torch.Generator().manual_seed(0), eta).mean())

    exact = levels[-1].alpha * MEAN
    assert abs(mean(2.0) - exact) < abs(mean(1.0) - exact) < abs(mean(0.0) - exact) / 2
