"""DDPM.sample: its options, guidance, and the number of network evaluations."""

from __future__ import annotations

import math

import pytest
import torch
from test_models import small

from diffusion import process, samplers
from diffusion.options import CONDITIONAL_ETA, CONDITIONAL_STEPS, DEFAULT_STEPS, UNCONDITIONAL_ETA
from utils import SamplingNoise, keyed_generator, sampling_key

DETERMINISTIC = ["dpm-solver++", "ddim"]
DIGITS = [3, 1, 4, 1]


@pytest.fixture
def network():
    return small("ddpm")


def draw(network, n: int = 4, labels=None, seed: int = 0, **options) -> torch.Tensor:
    labels = None if labels is None else torch.tensor(labels)
    return network.sample(n, labels, keyed_generator("cpu", seed), **{"steps": 5, **options})


def sizes_of_evaluations(module: torch.nn.Module) -> list[int]:
    """A list that grows by the number of images of each call of the module."""
    sizes = []
    module.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    return sizes


@pytest.mark.parametrize("sampler", [*DETERMINISTIC, "ddpm"])
@pytest.mark.parametrize("labels", [None, [0, 3, 3, 9]])
def test_the_seed_decides_the_samples(sampler, labels, network):
    first, again, other = (draw(network, 4, labels, seed, sampler=sampler) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std() > 0.1
    assert first.abs().max() <= 1


@pytest.mark.parametrize(
    "options",
    [{}, {"eta": 0.0}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "ddpm"}, {"guidance": 2.0}],
)
def test_the_chunk_size_changes_no_pixel_by_a_grey_level(options, network):
    whole, parts = (draw(network, 7, list(range(7)), chunk_size=size, **options) for size in (7, 3))
    assert (whole - parts).abs().max() < 1 / 127.5


@pytest.mark.parametrize(
    "options",
    [{}, {"eta": 0.0}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "ddpm"}, {"guidance": 2.0}],
)
def test_an_image_is_the_same_among_other_images_of_other_labels(options, network):
    many = draw(network, 40, [3] * 5 + [8] * 35, **options)
    few = draw(network, 36, [1] * 34 + [8] * 2, **options)
    assert (many[34:36] - few[34:36]).abs().max() < 1 / 127.5
    assert (many[:34] - few[:34]).abs().max() > 1 / 127.5  # there the labels differ


# --------------------------------------------------------------------------------------------------------------------
# Labels and guidance


def test_without_labels_the_null_class_is_sampled(network):
    seen = []
    network.unet.label.register_forward_hook(lambda module, inputs, output: seen.extend(inputs[0].tolist()))
    draw(network)
    assert seen == [10] * (4 * 5)


def test_without_labels_the_guidance_scale_changes_nothing(network):
    plain = draw(network)
    sizes = sizes_of_evaluations(network.unet)
    assert torch.equal(plain, draw(network, guidance=3.0))
    assert sizes == [4] * 5


def test_guidance_scale_0_ignores_the_labels(network):
    assert torch.equal(draw(network), draw(network, labels=[0, 1, 2, 3], guidance=0.0))


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("prediction", process.PREDICTIONS)
def test_guidance_extrapolates_from_the_unconditional_noise_estimate(guidance, prediction):
    """eps = u + w (c - u) holds for the noise, whatever the network predicts."""
    network = small("ddpm", prediction=prediction).eval()
    level, x, labels = network.levels[10], torch.randn(4, 1, 28, 28) * 0.1, torch.arange(4)

    def noise(labels, guidance=1.0):
        with torch.no_grad():
            x0 = network.denoise(x, level, labels, guidance)
        assert x0.abs().max() < 1  # nothing was clipped, so the noise follows from x0
        return (x - level.alpha * x0) / level.sigma

    unconditional, conditional = noise(torch.full((4,), 10)), noise(labels)
    assert (unconditional - conditional).abs().max() > 1e-3
    assert torch.allclose(noise(labels, guidance), unconditional + guidance * (conditional - unconditional), atol=1e-5)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_guidance_scales_0_and_1_cost_one_evaluation(guidance, network):
    sizes = sizes_of_evaluations(network.unet)
    draw(network, 4, [1, 2, 3, 4], guidance=guidance)
    assert sizes == [4] * 5
    assert network.evaluations(steps=5, guidance=guidance) == 5


def test_another_guidance_scale_costs_a_second_evaluation_at_middle_noise(network):
    sizes, levels = sizes_of_evaluations(network.unet), []
    low, high = samplers.GUIDANCE_RANGE
    draw(network, 4, [1, 2, 3, 4], guidance=1.5, watch=lambda x, level: levels.append(level))
    inside = [low <= level.sigma / level.alpha <= high for level in levels]
    assert sizes == [8 if acts else 4 for acts in inside]
    assert 0 < sum(inside) < 5
    assert network.evaluations(steps=5, guidance=1.5) == 5 + sum(inside)


LOW, HIGH = samplers.GUIDANCE_RANGE


@pytest.mark.parametrize(("noise", "acts"), [(LOW * 0.99, False), (LOW, True), (HIGH, True), (HIGH * 1.01, False)])
def test_guidance_acts_within_its_range_including_the_ends(noise, acts, network):
    x, labels = torch.randn(4, 1, 28, 28), torch.arange(4)
    level = process.Level(20, alpha := (1 + noise**2) ** -0.5, alpha * noise)
    network.eval()
    with torch.no_grad():
        guided, plain = (network.denoise(x, level, labels, guidance) for guidance in (3.0, 1.0))
    assert torch.equal(guided, plain) != acts


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_a_batch_of_mixed_labels_gives_what_batches_of_one_label_give(sampler, network):
    mixed = draw(network, 4, [7, 0, 7, 2], sampler=sampler)
    for digit, rows in ((7, [0, 2]), (0, [1]), (2, [3])):
        same = draw(network, 4, [digit] * 4, sampler=sampler)
        assert torch.allclose(mixed[rows], same[rows], atol=1e-4), digit
        assert not torch.allclose(mixed[3 - rows[0]], same[3 - rows[0]], atol=1e-4), digit


def test_an_unconditional_model_refuses_guidance():
    with pytest.raises(ValueError, match="guidance"):
        small("ddpm", num_classes=0).sample(2, guidance=2.0)


# --------------------------------------------------------------------------------------------------------------------
# Steps and options


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, DEFAULT_STEPS),
        ({"labels": [3, 4]}, CONDITIONAL_STEPS),
        ({"labels": [3, 4], "guidance": 0.0}, DEFAULT_STEPS),  # unconditional
        ({"labels": [3, 4], "sampler": "ddim"}, DEFAULT_STEPS),
        ({"sampler": "ddpm"}, 50),
        ({"steps": 3, "sampler": "ddpm"}, 3),
    ],
)
def test_a_sampling_visits_so_many_levels_from_noise_to_clean(options, steps, network):
    seen = []
    network.sample(2, **options, watch=lambda x, level: seen.append(level.time))
    assert len(seen) == steps
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == 49


def test_a_model_of_few_timesteps_takes_all_of_them():
    seen = []
    small("ddpm", timesteps=10).sample(2, watch=lambda x, level: seen.append(level.time))
    assert seen == list(range(9, -1, -1))


def test_watch_sees_the_initial_noise_and_changes_no_sample(network):
    seen = []
    watched = draw(network, watch=lambda x, level: seen.append((x, level)))
    start, level = seen[0]
    key = sampling_key(keyed_generator("cpu", 0))
    assert torch.equal(start, SamplingNoise(key, "start", range(4), "cpu").normal(1, 28, 28))
    assert level.sigma > 0.999
    assert torch.equal(watched, draw(network))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sampler": "euler"}, "sampler"), ({"steps": 0}, "steps"), ({"steps": 51}, "steps"), ({"eta": 10.5}, "eta"),
        ({"guidance": -1.0}, "guidance"), ({"guidance": math.nan}, "guidance"), ({"guidance": 101.0}, "guidance"),
        ({"steps": 2.5}, "steps"), ({"chunk_size": 0}, "chunk"),
        ({"eta": 1.5, "sampler": "ddim"}, "eta"), ({"eta": math.nan, "sampler": "ddim"}, "eta"),
        ({"eta": 0.5, "sampler": "ddpm"}, "eta"), ({"eta": -0.1}, "eta"),
        ({"precision": "fp16"}, "precision"),
    ],
)  # fmt: skip
def test_options_out_of_bounds_are_refused(options, named, network):
    with pytest.raises(ValueError, match=named):
        draw(network, **options)


def test_sample_options_fills_in_the_defaults(network):
    options = network.sample_options()
    assert options == {"sampler": "dpm-solver++", "steps": 15, "guidance": 1.0, "eta": 2.5, "precision": "fp32"}
    assert network.sample_options(with_labels=True) == {**options, "steps": CONDITIONAL_STEPS, "eta": CONDITIONAL_ETA}
    assert {*options, "watch"} == set(network.SAMPLE_OPTIONS)


def test_evaluations_follow_from_sampler_and_steps(network):
    assert network.evaluations() == 15
    assert network.evaluations(sampler="ddpm") == 50
    assert network.evaluations(sampler="ddim", steps=7) == 7


def test_bf16_gives_nearly_the_samples_of_fp32(network):
    exact, rounded = (draw(network, precision=precision) for precision in ("fp32", "bf16"))
    assert 0 < (exact - rounded).abs().mean() < 0.02
    assert rounded.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------------
# Stochasticity


def test_eta_makes_dpm_solver_random(network):
    plain, again, some, more = (draw(network, eta=eta) for eta in (0.0, 0.0, 1.0, 2.5))
    assert torch.equal(plain, again)
    assert not torch.equal(plain, some)
    assert not torch.equal(some, more)


def test_the_default_eta_depends_on_the_labels(network):
    assert torch.equal(draw(network), draw(network, eta=UNCONDITIONAL_ETA))
    assert torch.equal(draw(network, labels=DIGITS), draw(network, labels=DIGITS, eta=CONDITIONAL_ETA))


def levels_with_noise(network, **options) -> list[bool]:
    """For the state after each step, except the last: whether it depends on eta."""
    states = {0.0: [], 1.0: []}
    for eta, seen in states.items():
        draw(network, eta=eta, watch=lambda x, level, seen=seen: seen.append(x), **options)
    return [not torch.equal(plain, noisy) for plain, noisy in zip(*states.values())][1:]


def test_class_conditional_sampling_adds_noise_from_the_first_level_on(network):
    assert levels_with_noise(network, labels=DIGITS) == [True] * 4


def test_unconditional_sampling_adds_noise_only_below_its_bound(network):
    noise = [level.noise_to_signal for level in samplers.noise_grid(network.levels, 5)[:4]]
    assert levels_with_noise(network) == [ratio <= samplers.RENEWED_BELOW for ratio in noise]


def test_guidance_scale_0_adds_noise_as_unconditional_sampling_does(network):
    assert levels_with_noise(network, labels=DIGITS, guidance=0.0) == levels_with_noise(network)


def test_eta_makes_ddim_random_up_to_ancestral_sampling(network):
    every = network.config.timesteps  # then both samplers visit the same levels
    plain, some, full = (draw(network, sampler="ddim", eta=eta, steps=every) for eta in (0.0, 0.5, 1.0))
    assert not torch.equal(plain, some)
    assert not torch.equal(some, full)
    assert torch.allclose(full, draw(network, sampler="ddpm", steps=every), atol=1e-4)
