"""diffusion/process.py: schedules and the forward process, against Hugging Face diffusers and closed forms."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from diffusion import process

THEIR_NAME = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
THEIR_PREDICTION = {"eps": "epsilon", "v": "v_prediction"}
each_schedule = pytest.mark.parametrize("schedule", process.SCHEDULES)
each_prediction = pytest.mark.parametrize("prediction", process.PREDICTIONS)


def theirs(scheduler, schedule: str, prediction: str = "eps", **options):
    """A scheduler of diffusers with 1000 timesteps."""
    return scheduler(
        num_train_timesteps=1000,
        beta_schedule=THEIR_NAME[schedule],
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type=THEIR_PREDICTION[prediction],
        **options,
    )


@each_schedule
def test_schedules_are_those_of_diffusers(schedule):
    expected = theirs(DDPMScheduler, schedule)
    betas = process.betas(schedule, 1000)
    assert betas.dtype == torch.float64
    assert torch.allclose(betas.float(), expected.betas, atol=1e-6)
    levels = process.noise_levels(schedule, 1000)
    assert [level.time for level in levels] == list(range(1000))
    alpha_bar = torch.tensor([level.alpha**2 for level in levels], dtype=torch.float32)
    assert torch.allclose(alpha_bar, expected.alphas_cumprod, atol=1e-5)
    assert all(level.alpha**2 + level.sigma**2 == pytest.approx(1, abs=1e-12) for level in levels)
    assert levels[-1].sigma > 0.9999
    assert levels[0].sigma < 0.011


@each_schedule
@pytest.mark.parametrize("timesteps", [2, 10, 100, 4000])
def test_schedules_of_any_length_go_up_to_nearly_pure_noise(schedule, timesteps):
    betas = process.betas(schedule, timesteps)
    assert betas.shape == (timesteps,)
    assert 0 < betas.min() <= betas.max() < 1
    sigmas = [level.sigma for level in process.noise_levels(schedule, timesteps)]
    assert sigmas == sorted(sigmas)
    assert sigmas[-1] > 0.999 or timesteps < 10


def test_unknown_schedules_and_predictions_are_refused():
    with pytest.raises(ValueError, match="linear, cosine"):
        process.betas("sigmoid", 1000)
    for function in (process.target, process.clean_estimate):
        with pytest.raises(ValueError, match="eps, v"):
            function("x0", torch.zeros(1), torch.zeros(1), 0.6, 0.8)


@each_schedule
def test_noisy_images_and_targets_are_those_of_diffusers(schedule):
    expected = theirs(DDPMScheduler, schedule)
    x0, eps, time = torch.rand(5, 1, 4, 4) * 2 - 1, torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 500, 998, 999])
    levels = [process.noise_levels(schedule, 1000)[t] for t in time.tolist()]
    alpha, sigma = (torch.tensor([[[[value]]] for value in values]) for values in zip(*[level[1:] for level in levels]))
    x = process.diffuse(x0, eps, alpha, sigma)
    assert torch.allclose(x, expected.add_noise(x0, eps, time), atol=1e-5)
    assert torch.allclose(process.target("v", x0, eps, alpha, sigma), expected.get_velocity(x0, eps, time), atol=1e-5)
    assert torch.equal(process.target("eps", x0, eps, alpha, sigma), eps)


@each_prediction
def test_the_clean_estimate_inverts_the_target(prediction):
    x0, eps = torch.randn(2, 50).double()
    _, alpha, sigma = process.noise_levels("cosine", 1000)[700]
    output = process.target(prediction, x0, eps, alpha, sigma)
    x = process.diffuse(x0, eps, alpha, sigma)
    assert torch.allclose(process.clean_estimate(prediction, output, x, alpha, sigma), x0)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def test_as_many_training_times_as_timesteps_are_all_timesteps(rng):
    assert sorted(process.stratified_times(1000, 1000, rng).tolist()) == list(range(1000))


def test_ten_training_times_lie_in_ten_different_tenths(rng):
    batches = torch.stack([process.stratified_times(10, 1000, rng) for _ in range(2000)])
    assert all(sorted(row) == list(range(10)) for row in (batches // 100).tolist())
    counts = (batches[:, 0] // 100).bincount(minlength=10)
    assert 140 < counts.min() <= counts.max() < 260, "a row of the batch may have any time"


def test_a_single_training_time_can_be_drawn(rng):
    assert process.stratified_times(1, 2, rng).shape == (1,)


def test_a_power_below_one_favours_noisy_times(rng):
    """P(t < s T) = s^(1 / power)."""
    times = process.stratified_times(10_000, 1000, rng, power=0.75)
    assert times.min() >= 0
    assert times.max() == 999
    for s in (0.1, 0.5, 0.9):
        assert (times < 1000 * s).double().mean().item() == pytest.approx(s ** (1 / 0.75), abs=1e-3)


def test_the_posterior_mean_follows_bayes_rule():
    """Against the densities, in float64."""
    rng = torch.Generator().manual_seed(0)
    images, x = torch.randn(7, 5, generator=rng).double(), torch.randn(3, 5, generator=rng).double()
    alpha, sigma = torch.tensor([[0.9], [0.5], [0.0]]).double(), torch.tensor([[0.4], [0.8], [1.0]]).double()
    possible = torch.ones(3, 7, dtype=torch.bool)
    possible[1, ::2] = False
    found = process.posterior_mean(x, alpha, sigma, images, images.square().sum(1), possible)
    for row in range(3):
        density = torch.distributions.Normal(alpha[row] * images, sigma[row])
        weight = density.log_prob(x[row]).sum(1).exp() * possible[row]
        assert torch.allclose(found[row], (weight[:, None] * images).sum(0) / weight.sum())
    assert torch.allclose(found[2], images.mean(0)), "pure noise tells nothing"
