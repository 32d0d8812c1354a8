"""recipes/ddpm.py: the loss of the diffusion model, its stable targets, and its update."""

from __future__ import annotations

import math

import pytest
import torch
from test_models import small

from data import Digits, to_model_range
from diffusion import process
from loop import TrainState
from models import build
from recipes.ddpm import DiffusionStep, StableTargets, make_optimizers
from utils import keyed_generator


def make_step(
    network,
    lr: float = 1e-3,
    grad_clip: float = 1.0,
    precision: str = "fp32",
    label_dropout: float = 0.1,
    time_power: float = 1.0,
    stable_targets: StableTargets | None = None,
) -> DiffusionStep:
    """The update of a network by SGD."""
    optimizers = {"others": torch.optim.SGD(network.parameters(), lr=lr, fused=True)}
    return DiffusionStep(
        network, optimizers, TrainState(), 0, precision, grad_clip, label_dropout, time_power, stable_targets
    )


def loss_and_gradient(step: DiffusionStep, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The loss of an update, and its whole gradient in one vector."""
    loss = float(step(images, labels)["loss"])
    return loss, torch.cat([parameter.grad.flatten() for parameter in step.model.parameters()])


def inputs_of(network, images: torch.Tensor, labels: torch.Tensor, **options) -> tuple[torch.Tensor, ...]:
    """What the network is given in one update: noisy images, times and labels."""
    seen = []
    hook = network.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs))
    make_step(network, lr=0.0, **options)(images, labels)
    hook.remove()
    return tuple(seen)


# --------------------------------------------------------------------------------------------------------------------
# Loss


class Oracle(torch.nn.Module):
    """Predicts perfectly, because it knows the clean images."""

    def __init__(self, network, images):
        super().__init__()
        self.config, self.alpha, self.sigma = network.config, network.alpha, network.sigma
        self.images = images
        self.shift = torch.nn.Parameter(torch.zeros(()))  # something to train

    def forward(self, x, time, labels):
        time = (time * self.config.timesteps / 1000).round().long()
        alpha, sigma = (values[time][:, None, None, None] for values in (self.alpha, self.sigma))
        eps = (x - alpha * self.images) / sigma
        return process.target(self.config.prediction, self.images, eps, alpha, sigma) + self.shift


@pytest.mark.parametrize("timesteps", [50, 1000])
@pytest.mark.parametrize("schedule", process.SCHEDULES)
@pytest.mark.parametrize("prediction", process.PREDICTIONS)
class TestLoss:
    @pytest.fixture
    def network(self, prediction, schedule, timesteps):
        return build("ddpm", width=8, prediction=prediction, schedule=schedule, timesteps=timesteps)

    @pytest.fixture
    def batch(self):
        return torch.randn(64, 1, 28, 28), torch.arange(64) % 10  # images of variance 1, like the noise

    def test_of_a_network_that_predicts_zero_is_one(self, network, batch):
        assert float(make_step(network)(*batch)["loss"]) == pytest.approx(1, abs=0.03)  # a new network predicts zero

    def test_of_a_perfect_prediction_is_zero(self, network, batch):
        network.unet = Oracle(network, batch[0])
        assert float(make_step(network)(*batch)["loss"]) < 1e-4


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_label_dropout_hides_its_share_of_the_labels(share):
    images, labels = torch.zeros(5000, 1, 28, 28), torch.arange(5000) % 10
    network = build("ddpm", width=8)
    network.unet = Oracle(network, images)  # the network itself would take seconds
    _, _, shown = inputs_of(network, images, labels, label_dropout=share)
    hidden = shown == 10
    assert hidden.float().mean() == pytest.approx(share, abs=0.02)
    assert torch.equal(shown[~hidden], labels[~hidden])


def test_an_unconditional_model_sees_only_its_null_class():
    network = small("ddpm", num_classes=0)
    _, _, shown = inputs_of(network, torch.zeros(20, 1, 28, 28), torch.arange(20) % 10)
    assert not shown.any()  # its null class is number 0


def test_the_time_power_favours_noisy_times():
    images, labels = torch.rand(64, 1, 28, 28), torch.arange(64) % 10
    network = small("ddpm", timesteps=1000)
    uniform, noisy = (inputs_of(network, images, labels, time_power=power)[1].float().mean() for power in (1.0, 0.5))
    assert float(uniform) == pytest.approx(500, abs=10)
    assert float(noisy) == pytest.approx(667, abs=10)


# --------------------------------------------------------------------------------------------------------------------
# Stable targets


@pytest.fixture
def five_digits() -> Digits:
    images = torch.randint(0, 256, (5, 1, 28, 28), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return Digits(images, torch.tensor([4, 4, 4, 7, 8]), "digits")


def test_the_noisiest_rows_get_the_mean_of_their_possible_digits(five_digits):
    images = to_model_range(five_digits.images)
    x0, x = images[[0, 1, 3, 4]], torch.randn(4, 1, 28, 28)
    alpha, sigma = (torch.tensor(values).view(4, 1, 1, 1) for values in ([1e-4, 1e-4, 1e-4, 0.9], [1.0, 1.0, 1.0, 0.4]))
    targets = StableTargets(small("ddpm"), five_digits, share=0.75)(x, x0, torch.tensor([4, 10, 7, 8]), alpha, sigma)
    assert torch.allclose(targets[0], images[:3].mean(0), atol=0.05), "label 4: the mean of the three fours"
    assert torch.allclose(targets[1], images.mean(0), atol=0.05), "null class: the mean of all digits"
    assert torch.equal(targets[2], images[3]), "label 7: the only seven"
    assert torch.equal(targets[3], x0[3]), "the least noisy row keeps its target"


def test_with_little_noise_a_stable_target_is_the_digit_itself(five_digits):
    images = to_model_range(five_digits.images)
    alpha, sigma = torch.full((5, 1, 1, 1), 0.9), torch.full((5, 1, 1, 1), 0.4)
    targets = StableTargets(small("ddpm"), five_digits, share=0.99)(images * 0.9, images, torch.full((5,), 10), alpha, sigma)
    assert torch.allclose(targets, images, atol=1e-5)


class Gain(torch.nn.Module):
    """In place of the U-Net: a trained factor for each pixel of the noisy image."""

    def __init__(self, start: float):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.full((1, 28, 28), start))

    def forward(self, x, time, labels):
        return self.gain * x


@pytest.mark.parametrize(("prediction", "gain"), [("eps", 1.0), ("v", 0.0)])  # gains at which the noise itself costs least
def test_stable_targets_keep_the_mean_gradient_and_lower_its_variance(prediction, gain, five_digits):
    network = build("ddpm", width=8, prediction=prediction)
    network.unet = Gain(gain)
    images, labels = to_model_range(five_digits.images).repeat(2, 1, 1, 1), five_digits.labels.repeat(2)
    draws = 300

    def gradients(stable_targets):
        """For several draws of the noise, [draws, pixels]."""
        options = {"label_dropout": 0.5, "time_power": 0.1, "stable_targets": stable_targets}
        step, found = make_step(network, lr=0.0, grad_clip=0.0, **options), []
        for step.seed in range(draws):
            found.append(loss_and_gradient(step, images, labels)[1])
        return torch.stack(found)

    plain, stable = gradients(None), gradients(StableTargets(small("ddpm"), five_digits, 0.99))
    assert stable.var(0).mean() < 0.98 * plain.var(0).mean()
    error = (plain.mean(0) - stable.mean(0)).norm() / plain.std(0).norm()
    assert error < 1.5 / math.sqrt(draws)


# --------------------------------------------------------------------------------------------------------------------
# The gap below black


def test_the_network_learns_the_gap(monkeypatch, five_digits):
    network, seen = small("ddpm", black=-1.5), []
    original = process.target
    monkeypatch.setattr(process, "target", lambda *args: (seen.append(args[1]), original(*args))[1])
    images = five_digits.images.clamp(min=1)
    images[:, :, :5] = 0
    targets = StableTargets(network, Digits(images, five_digits.labels, "digits"), share=0.5)
    assert float(targets.images.min()) == -1.5
    make_step(network, stable_targets=targets)(to_model_range(images), five_digits.labels)
    assert torch.equal(seen[0][:, :, :5], torch.full((5, 1, 5, 28), -1.5))


def test_estimates_reach_into_the_gap_and_samples_do_not():
    network = small("ddpm", black=-2.0).eval()
    torch.nn.init.constant_(network.unet.head.bias, 50.0)  # v = 50 everywhere: estimates far below black
    with torch.no_grad():
        estimate = network.denoise(torch.zeros(1, 1, 28, 28), network.levels[-1], torch.tensor([3]))
    assert float(estimate.max()) == -2
    assert float(network.sample(1, steps=3).min()) == -1


# --------------------------------------------------------------------------------------------------------------------
# The update


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_moves_every_weight(precision):
    network = small("ddpm", width=16)  # at width 8, a group has one channel, and a bias before it has no effect
    before = {key: value.clone() for key, value in network.named_parameters()}
    loss = make_step(network, precision=precision)(torch.rand(64, 1, 28, 28) * 2 - 1, torch.arange(64) % 10)["loss"]
    assert loss.isfinite()
    assert not loss.requires_grad
    assert [key for key, value in network.named_parameters() if torch.equal(before[key], value)] == []


@pytest.fixture
def distance_moved():
    """A function: how far one update with learning rate 1 moves the weights, for a bound of the gradient's norm."""

    def update(grad_clip: float) -> float:
        network = small("ddpm")
        before = torch.nn.utils.parameters_to_vector(network.parameters()).detach().clone()
        make_step(network, lr=1.0, grad_clip=grad_clip)(torch.randn(16, 1, 28, 28) * 50, torch.arange(16) % 10)
        return (torch.nn.utils.parameters_to_vector(network.parameters()) - before).norm().item()

    return update


def test_a_large_gradient_is_clipped_to_its_bound(distance_moved):
    assert distance_moved(grad_clip=1e-2) == pytest.approx(1e-2, rel=1e-3)


def test_a_bound_of_zero_does_not_clip(distance_moved):
    assert distance_moved(grad_clip=0.0) > 1


def test_times_and_noise_follow_from_the_step_number():
    images, labels = torch.rand(16, 1, 28, 28), torch.arange(16) % 10
    step = make_step(small("ddpm"), lr=0.0)
    first, again = step(images, labels)["loss"], step(images, labels)["loss"]
    step.state.step = 1
    assert torch.equal(first, again)
    assert not torch.equal(first, step(images, labels)["loss"])


@pytest.mark.parametrize(("muon_lr", "steps"), [(0, 120), (0.02, 60)])
def test_samples_become_the_only_training_image(muon_lr, steps):
    network = build("ddpm", width=8, timesteps=100)
    picture = torch.full((1, 28, 28), -1.0)
    picture[:, 8:20, 12:16] = 1.0
    images, labels = picture.expand(8, 1, 28, 28), torch.zeros(8, dtype=torch.int64)
    step = DiffusionStep(network, make_optimizers(network, 1e-2, muon_lr), TrainState(), 0, "fp32", 1.0, 0.1, 1.0)
    for step.state.step in range(steps):
        step(images, labels)
    samples = network.sample(4, rng=keyed_generator("cpu", 0), steps=5)
    assert (samples - picture).abs().mean() < 0.1
