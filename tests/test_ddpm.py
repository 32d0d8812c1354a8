"""The diffusion model: its loss, its options of sampling, and its training step."""

from __future__ import annotations

import math
import types

import pytest
import torch
from test_models import small

import diffusion
import train_diffusion
from data import Digits, to_model_range
from recipes.ddpm import DiffusionStep, StableTargets, assemble, make_optimizers
from models import DEFAULT_ETA, DEFAULT_STEPS, DIGIT_ETA, build
from loop import TrainState
from networks.unet import UNet
from utils import keyed_generator

DETERMINISTIC = ["dpm-solver++", "ddim"]


def draw(network, n: int = 4, labels=None, seed: int = 0, **options) -> torch.Tensor:
    labels = None if labels is None else torch.tensor(labels)
    return network.sample(n, labels, keyed_generator("cpu", seed), **{"steps": 5, **options})


# --------------------------------------------------------------------------------------------------------------------
# Loss


class Oracle(torch.nn.Module):
    """Knows the clean images, so it can give the perfect prediction."""

    def __init__(self, network, images):
        super().__init__()
        self.network, self.images = network, images

    def forward(self, x, time, labels):
        config = self.network.config
        time = (time * config.timesteps / 1000).round().long()
        alpha, sigma = (values[time][:, None, None, None] for values in (self.network.alpha, self.network.sigma))
        eps = (x - alpha * self.images) / sigma
        return diffusion.target(config.prediction, self.images, eps, alpha, sigma)


@pytest.mark.parametrize("timesteps", [50, 1000])
@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_the_loss_of_a_perfect_prediction_is_zero_and_of_none_is_one(prediction, schedule, timesteps):
    network = build("ddpm", width=8, prediction=prediction, schedule=schedule, timesteps=timesteps)
    images, labels = torch.randn(64, 1, 28, 28), torch.arange(64) % 10  # of variance 1, as the noise
    rng = torch.Generator().manual_seed(0)
    assert network.loss(*network.examples(images, labels, rng, 0.1)).item() == pytest.approx(1, abs=0.03)  # it predicts zero
    network.unet = Oracle(network, images)
    assert float(network.loss(*network.examples(images, labels, rng, 0.1))) < 1e-4


def test_the_share_of_hidden_labels():
    images, labels = torch.zeros(5000, 1, 28, 28), torch.arange(5000) % 10
    network = build("ddpm", width=8)
    for share in (0.0, 0.1, 0.5):
        _, _, shown, _ = network.examples(images, labels, torch.Generator().manual_seed(0), share)
        hidden = shown == 10
        assert hidden.float().mean() == pytest.approx(share, abs=0.02)
        assert torch.equal(shown[~hidden], labels[~hidden])
    unconditional = build("ddpm", width=8, num_classes=0)
    _, _, shown, _ = unconditional.examples(images, labels, torch.Generator().manual_seed(0), 0.1)
    assert not shown.any()  # its only class is the null class


# --------------------------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("sampler", [*DETERMINISTIC, "ddpm"])
@pytest.mark.parametrize("labels", [None, [0, 3, 3, 9]])
def test_one_seed_gives_one_picture(sampler, labels):
    network = small("ddpm")
    first, again, other = (draw(network, 4, labels, seed, sampler=sampler) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() >= -1 and first.max() <= 1 and first.std() > 0.1


@pytest.mark.parametrize(
    "options",
    [{}, {"eta": 0.0}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 1.0}, {"sampler": "ddpm"}, {"guidance": 2.0}],
)
def test_chunks_give_the_same_picture_within_a_grey_level(options):
    network = small("ddpm")
    whole, parts = (draw(network, 7, list(range(7)), chunk_size=size, **options) for size in (7, 3))
    assert (whole - parts).abs().max() < 1 / 127.5


def test_no_labels_means_the_null_class():
    network, seen = small("ddpm"), []
    network.unet.label.register_forward_hook(lambda module, inputs, output: seen.extend(inputs[0].tolist()))
    free = draw(network)
    assert set(seen) == {10} and len(seen) == 4 * 5  # one evaluation a step, also with guidance
    assert torch.equal(free, draw(network, guidance=3.0)) and len(seen) == 2 * 4 * 5
    assert torch.equal(free, draw(network, labels=[0, 1, 2, 3], guidance=0.0))


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_guidance_goes_along_the_line_through_both_noise_estimates(guidance, prediction):
    """eps = u + w (c - u), in terms of the noise whatever the network predicts."""
    network = small("ddpm", prediction=prediction).eval()
    level, x, labels = network.levels[10], torch.randn(4, 1, 28, 28) * 0.1, torch.arange(4)

    def noise(labels, guidance=1.0):
        with torch.no_grad():
            x0 = network.denoise(x, level, labels, guidance)
        assert x0.abs().max() < 1  # nothing was clipped, so x0 tells the noise
        return (x - level.alpha * x0) / level.sigma

    free, asked = noise(torch.full((4,), 10)), noise(labels)
    assert (free - asked).abs().max() > 1e-3
    assert torch.allclose(noise(labels, guidance), free + guidance * (asked - free), atol=1e-5)


def test_guidance_0_and_1_cost_one_evaluation():
    network, sizes = small("ddpm"), []
    network.unet.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    for guidance in (0.0, 1.0):
        sizes.clear()
        draw(network, 4, [1, 2, 3, 4], guidance=guidance)
        assert sizes == [4] * 5
        assert diffusion.evaluations_per_image(network.levels, "dpm-solver++", 5, guidance) == 5


def test_guidance_acts_at_middle_noise():
    """Two evaluations within the range, ends included; outside of it, and for no other guidance, the labels alone."""
    network, sizes, levels = small("ddpm").eval(), [], []
    low, high = diffusion.GUIDANCE_RANGE
    network.unet.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    draw(network, 4, [1, 2, 3, 4], guidance=1.5, watch=lambda x, level: levels.append(level))
    inside = [low <= level.sigma / level.alpha <= high for level in levels]
    assert sizes == [8 if acts else 4 for acts in inside] and 0 < sum(inside) < 5
    assert diffusion.evaluations_per_image(network.levels, "dpm-solver++", 5, 1.5) == 5 + sum(inside)
    x, labels = torch.randn(4, 1, 28, 28), torch.arange(4)
    for noise, acts in ((low * 0.99, False), (low, True), (high, True), (high * 1.01, False)):
        level = diffusion.Level(20, alpha := (1 + noise**2) ** -0.5, alpha * noise)
        with torch.no_grad():
            guided, plain = (network.denoise(x, level, labels, guidance) for guidance in (3.0, 1.0))
        assert torch.equal(guided, plain) != acts


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_a_batch_may_mix_digits(sampler):
    """Each image is what it would be if all of the batch had its label."""
    network = small("ddpm")
    mixed = draw(network, 4, [7, 0, 7, 2], sampler=sampler)
    for digit, rows in ((7, [0, 2]), (0, [1]), (2, [3])):
        same = draw(network, 4, [digit] * 4, sampler=sampler)
        assert torch.allclose(mixed[rows], same[rows], atol=1e-4)
        assert not torch.allclose(mixed[3 - rows[0]], same[3 - rows[0]], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "steps"), [({}, DEFAULT_STEPS), ({"sampler": "ddpm"}, 50), ({"steps": 3, "sampler": "ddpm"}, 3)]
)
def test_the_number_of_evaluations(options, steps):
    seen = []
    small("ddpm").sample(2, **options, watch=lambda x, level: seen.append(level.time))
    assert len(seen) == steps and seen == sorted(seen, reverse=True) and seen[0] == 49
    seen.clear()
    small("ddpm", timesteps=10).sample(2, watch=lambda x, level: seen.append(level.time))
    assert seen == list(range(9, -1, -1))  # there are no more


def test_watching_sees_the_noise_that_the_sampler_starts_from():
    seen = []
    samples = draw(small("ddpm"), watch=lambda x, level: seen.append((x, level)))
    start, level = seen[0]
    assert torch.equal(start, torch.randn(4, 1, 28, 28, generator=keyed_generator("cpu", 0)))
    assert level.sigma > 0.999 and torch.equal(samples, draw(small_again(), watch=None))


def small_again():
    torch.manual_seed(0)
    return small("ddpm")


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
def test_options_out_of_bounds_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        draw(small("ddpm"), **options)


def test_an_unconditional_model_cannot_be_guided():
    with pytest.raises(ValueError, match="guidance"):
        small("ddpm", num_classes=0).sample(2, guidance=2.0)


def test_the_options_in_full():
    network = small("ddpm")
    assert network.sample_options() == {
        "sampler": "dpm-solver++", "steps": 15, "guidance": 1.0, "eta": 2.5, "precision": "fp32",
    }  # fmt: skip
    assert network.sample_options(asked=True)["eta"] == DIGIT_ETA
    assert network.sample_options(sampler="ddim")["eta"] == network.sample_options(sampler="ddim", asked=True)["eta"] == 0
    assert network.sample_options(sampler="ddpm", guidance=2.0)["steps"] == 50
    assert set(network.sample_options()) | {"watch"} == set(network.SAMPLE_OPTIONS)


def test_bf16_is_another_precision_of_the_same_samples():
    network = small("ddpm")
    exact, rounded = (draw(network, precision=precision) for precision in ("fp32", "bf16"))
    assert 0 < (exact - rounded).abs().mean() < 0.02 and rounded.dtype == torch.float32


def test_eta_makes_dpm_solver_random():
    network = small("ddpm")
    plain, some, default = (draw(network, eta=eta) for eta in (0.0, 1.0, None))
    assert not torch.equal(plain, some) and not torch.equal(some, default)
    assert torch.equal(default, draw(network, eta=DEFAULT_ETA)) and torch.equal(plain, draw(network, eta=0.0))


def test_for_digits_on_demand_noise_is_renewed_at_every_level(monkeypatch):
    network = small("ddpm")
    asked, any_digit = (draw(network, eta=DIGIT_ETA, labels=labels) for labels in ([3, 1, 4, 1], None))
    assert torch.equal(asked, draw(network, labels=[3, 1, 4, 1]))  # it is the default
    monkeypatch.setattr(diffusion.dpm_solver, "__defaults__", (0.0, 0.0))  # renewed at no level
    assert torch.equal(asked, draw(network, eta=DIGIT_ETA, labels=[3, 1, 4, 1]))
    bounded = draw(network, eta=DIGIT_ETA)
    assert not torch.equal(any_digit, bounded) and torch.equal(bounded, draw(network, eta=0.0))


def test_eta_makes_ddim_random():
    network = small("ddpm")
    every = network.config.timesteps  # where both visit the same levels
    plain, some, full = (draw(network, sampler="ddim", eta=eta, steps=every) for eta in (0.0, 0.5, 1.0))
    assert not torch.equal(plain, some) and not torch.equal(some, full)
    assert torch.allclose(full, draw(network, sampler="ddpm", steps=every), atol=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# Stable targets


def five_digits() -> Digits:
    images = torch.randint(0, 256, (5, 1, 28, 28), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return Digits(images, torch.tensor([4, 4, 4, 7, 8]), "digits")


def test_the_noisiest_rows_aim_at_what_they_may_come_from():
    digits = five_digits()
    images = to_model_range(digits.images)
    x0, x = images[[0, 1, 3, 4]], torch.randn(4, 1, 28, 28)
    alpha, sigma = (torch.tensor(values).view(4, 1, 1, 1) for values in ([1e-4, 1e-4, 1e-4, 0.9], [1.0, 1.0, 1.0, 0.4]))
    targets = StableTargets(digits, share=0.75)(x, x0, torch.tensor([4, 10, 7, 8]), alpha, sigma)
    assert torch.allclose(targets[0], images[:3].mean(0), atol=0.05)  # any four
    assert torch.allclose(targets[1], images.mean(0), atol=0.05)  # any digit
    assert torch.equal(targets[2], images[3])  # the only seven
    assert torch.equal(targets[3], x0[3])  # little noise: as it was
    clear = StableTargets(digits, share=0.99)(images * 0.9, images, torch.full((5,), 10), alpha[[3] * 5], sigma[[3] * 5])
    assert torch.allclose(clear, images, atol=1e-5)


@pytest.mark.parametrize("prediction", diffusion.PREDICTIONS)
def test_stable_targets_keep_the_gradient_and_quieten_it(prediction):
    """Over many draws of noise, the mean gradient is the same and its variance much smaller."""
    digits, network = five_digits(), small("ddpm", timesteps=1000, prediction=prediction)
    torch.nn.init.normal_(network.unet.head.weight, std=0.1)
    images, labels = to_model_range(digits.images).repeat(8, 1, 1, 1), digits.labels.repeat(8)

    def gradients(expected):
        seeds = (torch.Generator().manual_seed(seed) for seed in range(30))
        losses = (network.loss(*network.examples(images, labels, rng, 0.5, 0.1, expected)) for rng in seeds)
        return torch.cat([torch.autograd.grad(loss, network.unet.head.weight)[0].flatten(1) for loss in losses])

    plain, stable = gradients(None), gradients(StableTargets(digits, 0.99))
    assert stable.var(0).mean() < plain.var(0).mean()
    error = (plain.mean(0) - stable.mean(0)).norm() / plain.std(0).norm()
    assert error < 3 / math.sqrt(30)


# --------------------------------------------------------------------------------------------------------------------
# The training step


def test_a_gpu_refuses_a_batch_that_it_cannot_normalise():
    digits = types.SimpleNamespace(images=types.SimpleNamespace(is_cuda=True))
    with pytest.raises(ValueError, match="8192 is more than 8191 images for each GPU"):
        assemble(train_diffusion.parse_args(["--batch-size", "8192"]), TrainState(), digits, "fp32")


def make_step(network, grad_clip: float = 1.0, precision: str = "fp32", lr: float = 1e-3) -> DiffusionStep:
    optimizers = {"lr": torch.optim.SGD(network.parameters(), lr=lr, fused=True)}
    return DiffusionStep(network, optimizers, TrainState(), 0, precision, grad_clip, label_dropout=0.1, time_power=1.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_moves_every_weight(precision):
    network = small("ddpm", width=16)  # at 8, a group has one channel, and a bias before it has no effect
    before = {key: value.clone() for key, value in network.named_parameters()}
    step = make_step(network, precision=precision)
    loss = step(torch.rand(64, 1, 28, 28) * 2 - 1, torch.arange(64) % 10)["loss"]
    assert loss.isfinite() and not loss.requires_grad
    assert all(not torch.equal(before[key], value) for key, value in network.named_parameters())


def test_the_gradient_is_clipped_to_its_norm():
    images, labels = torch.randn(16, 1, 28, 28) * 50, torch.arange(16) % 10
    for clip in (1e-2, 0.0):
        network = small_again()
        before = [parameter.detach().clone() for parameter in network.parameters()]
        make_step(network, clip, lr=1.0)(images, labels)
        after = [parameter.detach() for parameter in network.parameters()]
        moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(before, after)))
        assert moved == pytest.approx(clip, rel=1e-3) if clip else moved > 1


def test_the_step_number_decides_times_and_noise():
    images, labels = torch.rand(16, 1, 28, 28), torch.arange(16) % 10
    step = make_step(small("ddpm"), lr=1e-12)
    first, again = step(images, labels)["loss"], step(images, labels)["loss"]
    step.state.step = 1
    assert torch.equal(first, again) and not torch.equal(first, step(images, labels)["loss"])


def test_the_power_reaches_the_times(monkeypatch):
    images, labels, seen = torch.rand(64, 1, 28, 28), torch.arange(64) % 10, []
    network = small("ddpm", timesteps=1000)
    monkeypatch.setattr(network, "forward", lambda x, time, labels: seen.append(time) or x * network.unet.head.bias)
    for power in (1.0, 0.5):
        optimizers = {"lr": torch.optim.SGD(network.parameters(), fused=True)}
        DiffusionStep(network, optimizers, TrainState(), 0, "fp32", 1.0, 0.1, power)(images, labels)
    uniform, noisy = (times.float().mean().item() for times in seen)
    assert uniform == pytest.approx(500, abs=10) and noisy == pytest.approx(667, abs=10)


@pytest.mark.parametrize("muon_lr", [0, 3e-3])
def test_it_learns_a_picture(muon_lr):
    """A few steps on one picture: the samples move from noise to that picture."""
    network = build("ddpm", width=8, timesteps=100)
    picture = torch.full((1, 28, 28), -1.0)
    picture[:, 8:20, 12:16] = 1.0
    images, labels = picture.expand(16, 1, 28, 28), torch.zeros(16, dtype=torch.int64)
    step = DiffusionStep(network, make_optimizers(network, 3e-3, muon_lr), TrainState(), 0, "fp32", 1.0, 0.1, 1.0)
    for i in range(150):
        step.state.step = i
        step(images, labels)
    assert (draw(network, 4) - picture).abs().mean() < 0.1


def test_the_null_class_is_the_last_one():
    assert UNet(8, 10).label.num_embeddings == 11 and UNet(8, 0).label.num_embeddings == 1
