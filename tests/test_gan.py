"""The adversarial step and its losses."""

from __future__ import annotations

import pytest
import torch
from test_models import small

from recipes.gan import LOSSES, MISMATCH_WEIGHT, GANStep, gradient_penalty
from loop import TrainState
from utils import keyed_generator


def make_step(loss: str, name: str = "dcgan", precision: str = "fp32", optimizer=torch.optim.Adam):
    generator, discriminator = small(name), small(f"{name}_discriminator", norm=LOSSES[loss].norm)
    networks = {"lr": generator, "d_lr": discriminator}
    optimizers = {key: optimizer(network.parameters(), fused=True) for key, network in networks.items()}
    return GANStep(generator, discriminator, optimizers, LOSSES[loss], TrainState(), 0, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["dcgan", "cdcgan"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_moves_both_networks(loss, name, precision):
    step = make_step(loss, name, precision)
    networks = (step.generator, step.discriminator)
    before = [{key: value.clone() for key, value in network.named_parameters()} for network in networks]
    losses = step(torch.rand(16, 1, 28, 28) * 2 - 1, torch.arange(16) % 10)
    assert set(losses) == {"loss_d", "loss_g"}
    assert all(loss.isfinite() and not loss.requires_grad for loss in losses.values())
    for old, network in zip(before, networks):
        moved = {key for key, value in network.named_parameters() if not torch.equal(old[key], value)}
        still = old.keys() - moved
        assert still <= ({"head.bias"} if loss != "bce" else set()), still  # it cancels out of a difference of logits


def reference_losses(kind: str, real: torch.Tensor, fake: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(discriminator's, generator's), from the papers' formulas."""
    if kind == "bce":
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        one, zero = torch.ones_like(real), torch.zeros_like(real)
        return bce(real, one) + bce(fake, zero), bce(fake, one)
    if kind == "hinge":
        return (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean(), -fake.mean()
    return -(real - fake).sigmoid().log().mean(), -(fake - real).sigmoid().log().mean()


@pytest.mark.parametrize("kind", LOSSES)
def test_the_losses_are_the_papers(kind):
    real, fake = torch.randn(64) * 2, torch.randn(64) * 2
    expected = reference_losses(kind, real, fake)
    assert torch.allclose(LOSSES[kind].discriminator(real, fake), expected[0], atol=1e-5)
    assert torch.allclose(LOSSES[kind].generator(real, fake), expected[1], atol=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_mismatch_costs_what_a_fake_does(kind):
    """The discriminator's loss but for the part of the real images, which it has once."""
    real, wrong = torch.randn(64) * 2, torch.randn(64) * 2
    expected = reference_losses(kind, real, wrong)[0]
    if kind != "relativistic":
        expected = expected - reference_losses(kind, real, torch.full((64,), -1e4))[0]
    assert torch.allclose(LOSSES[kind].mismatch(real, wrong), expected, atol=1e-5)


def test_wrong_labels_are_fakes_to_the_discriminator():
    step = make_step("relativistic", "cdcgan")
    step.state.step = 1  # a step without a penalty
    images, labels = torch.rand(16, 1, 28, 28) * 2 - 1, torch.arange(16) % 10
    drawn = keyed_generator("cpu", 0, "noise", 1)  # first the noise, then the wrong labels
    noise = torch.randn(16, 100, generator=drawn)
    step.rng.set_state(drawn.get_state())
    with torch.no_grad():
        fake = step.generator(noise, labels)
        wrong_labels = step._questions(labels)[1]
        asked = ((images, labels), (fake, labels), (images, wrong_labels))
        real, made, wrong = (step.discriminator(x, y) for x, y in asked)
    as_fakes = [reference_losses("relativistic", real, fakes)[0] for fakes in (made, wrong)]
    expected = as_fakes[0] + MISMATCH_WEIGHT * as_fakes[1]
    assert float(step(images, labels)["loss_d"]) == pytest.approx(float(expected), rel=1e-4)

    drawn = step._questions(torch.full((9000,), 3))[1].bincount(minlength=10)
    assert drawn[3] == 0 and all(abs(count - 1000) < 150 for i, count in enumerate(drawn.tolist()) if i != 3)


def test_the_gradient_penalty_of_a_known_function():
    """logit = w.x has the gradient w everywhere."""
    images, w = torch.randn(5, 1, 4, 4, requires_grad=True), torch.randn(16)
    assert gradient_penalty(images.flatten(1) @ w, images) == pytest.approx(float(w.square().sum()), rel=1e-5)


def test_the_update_is_the_textbook_one():
    """The step's gradients against the plain formulation: everything with gradients, two losses, two updates."""
    step, plain = make_step("bce", optimizer=torch.optim.SGD), make_step("bce", optimizer=torch.optim.SGD)
    plain.generator.load_state_dict(step.generator.state_dict())
    plain.discriminator.load_state_dict(step.discriminator.state_dict())
    images = torch.rand(8, 1, 28, 28) * 2 - 1
    step(images, torch.zeros(8, dtype=torch.int64))

    bce, one = torch.nn.functional.binary_cross_entropy_with_logits, torch.ones(8)
    noise = torch.randn(8, 100, generator=keyed_generator("cpu", 0, "noise", 0))
    fake = plain.generator(noise)
    plain.optimizers["d_lr"].zero_grad()
    bce(plain.discriminator(images), one).backward()
    bce(plain.discriminator(fake.detach()), 0 * one).backward()
    plain.optimizers["d_lr"].step()
    plain.optimizers["lr"].zero_grad()
    bce(plain.discriminator(fake), one).backward()
    plain.optimizers["lr"].step()
    for ours, theirs in ((step.generator, plain.generator), (step.discriminator, plain.discriminator)):
        for key, value in theirs.state_dict().items():
            assert torch.allclose(ours.state_dict()[key].float(), value.float(), atol=1e-4), key


@pytest.mark.parametrize("loss", LOSSES)
def test_one_pass_judges_as_two_would(loss):
    """Also by class; with BatchNorm each side must keep its own statistics."""
    step = make_step(loss, "cdcgan")
    real, fake, labels = torch.rand(8, 1, 28, 28), -torch.rand(8, 1, 28, 28), torch.arange(8)
    step.discriminator(real, labels), step.discriminator.eval()  # fixes the power iteration of spectral norm
    if loss == "bce":
        step.discriminator.train()
    both = step._judge(real, fake, labels[None])
    for together, images in zip(both, (real, fake)):
        assert torch.allclose(together[0], step.discriminator(images, labels), atol=1e-5)
