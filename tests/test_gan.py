"""recipes/gan.py: the losses and the update of both networks."""

from __future__ import annotations

import pytest
import torch
from test_models import small

from loop import TrainState
from recipes.gan import LOSSES, MISMATCH_WEIGHT, GANStep, gradient_penalty
from utils import keyed_generator


def make_step(loss: str, name: str = "dcgan", precision: str = "fp32", optimizer=torch.optim.Adam):
    generator, discriminator = small(name), small(f"{name}_discriminator", norm=LOSSES[loss].norm)
    networks = {"generator": generator, "discriminator": discriminator}
    optimizers = {key: optimizer(network.parameters(), fused=True) for key, network in networks.items()}
    return GANStep(generator, discriminator, optimizers, LOSSES[loss], TrainState(), 0, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["dcgan", "cdcgan"])
@pytest.mark.parametrize("loss", LOSSES)
def test_an_update_moves_every_weight_of_both_networks(loss, name, precision):
    step = make_step(loss, name, precision)
    networks = (step.generator, step.discriminator)
    before = [{key: value.clone() for key, value in network.named_parameters()} for network in networks]
    losses = step(torch.rand(16, 1, 28, 28) * 2 - 1, torch.arange(16) % 10)
    assert set(losses) == {"loss_d", "loss_g"}
    assert all(loss.isfinite() for loss in losses.values())
    assert not any(loss.requires_grad for loss in losses.values())
    for old, network in zip(before, networks):
        moved = {key for key, value in network.named_parameters() if not torch.equal(old[key], value)}
        still = old.keys() - moved
        assert still <= ({"head.bias"} if loss != "bce" else set()), still  # it cancels in a difference of logits


@pytest.mark.parametrize("loss", LOSSES)
def test_the_discriminator_sees_real_images_with_the_gap(loss):
    step, seen = make_step(loss), []
    step.generator = small("dcgan", black=-1.5)
    step.discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(float(inputs[0][0].detach().min())))
    step(torch.full((16, 1, 28, 28), -1.0), torch.arange(16))
    assert seen[0] == -1.5


def reference_losses(kind: str, real: torch.Tensor, fake: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of discriminator and generator, from the papers' formulas."""
    if kind == "bce":
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        one, zero = torch.ones_like(real), torch.zeros_like(real)
        return bce(real, one) + bce(fake, zero), bce(fake, one)
    if kind == "hinge":
        return (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean(), -fake.mean()
    return -(real - fake).sigmoid().log().mean(), -(fake - real).sigmoid().log().mean()


@pytest.mark.parametrize("kind", LOSSES)
def test_the_losses_are_those_of_the_papers(kind):
    real, fake = torch.randn(64) * 2, torch.randn(64) * 2
    expected = reference_losses(kind, real, fake)
    assert torch.allclose(LOSSES[kind].discriminator(real, fake), expected[0], atol=1e-5)
    assert torch.allclose(LOSSES[kind].generator(real, fake), expected[1], atol=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_real_image_with_a_wrong_label_costs_what_a_fake_costs(kind):
    """The mismatch loss is the discriminator's loss without its part of the real images."""
    real, wrong = torch.randn(64) * 2, torch.randn(64) * 2
    expected = reference_losses(kind, real, wrong)[0]
    if kind != "relativistic":
        expected = expected - reference_losses(kind, real, torch.full((64,), -1e4))[0]
    assert torch.allclose(LOSSES[kind].mismatch(real, wrong), expected, atol=1e-5)


def test_the_discriminator_learns_that_wrong_labels_are_fakes():
    step = make_step("relativistic", "cdcgan")
    step.state.step = 1  # a step without gradient penalty
    images, labels = torch.rand(16, 1, 28, 28) * 2 - 1, torch.arange(16) % 10
    drawn = keyed_generator("cpu", 0, "noise", 1)  # first the noise, then the wrong labels
    noise = torch.randn(16, 100, generator=drawn)
    step.rng.set_state(drawn.get_state())
    with torch.no_grad():
        fake = step.generator(noise, labels)
        wrong_labels = step._with_wrong_labels(labels)[1]
        pairs = ((images, labels), (fake, labels), (images, wrong_labels))
        real, made, wrong = (step.discriminator(x, y) for x, y in pairs)
    as_fakes = [reference_losses("relativistic", real, fakes)[0] for fakes in (made, wrong)]
    expected = as_fakes[0] + MISMATCH_WEIGHT * as_fakes[1]
    assert float(step(images, labels)["loss_d"]) == pytest.approx(float(expected), rel=1e-4)


def test_wrong_labels_are_uniform_over_the_other_classes():
    right, wrong = make_step("relativistic", "cdcgan")._with_wrong_labels(torch.full((9000,), 3))
    counts = wrong.bincount(minlength=10).tolist()
    assert (right == 3).all()
    assert counts.pop(3) == 0
    assert all(abs(count - 1000) < 150 for count in counts)


def test_the_gradient_penalty_of_a_linear_function_is_its_squared_slope():
    images, w = torch.randn(5, 1, 4, 4, requires_grad=True), torch.randn(16)
    assert gradient_penalty(images.flatten(1) @ w, images) == pytest.approx(float(w.square().sum()), rel=1e-5)


def test_the_update_is_the_one_of_the_textbook():
    """Two losses and two backward passes, without the savings of GANStep."""
    step, plain = make_step("bce", optimizer=torch.optim.SGD), make_step("bce", optimizer=torch.optim.SGD)
    plain.generator.load_state_dict(step.generator.state_dict())
    plain.discriminator.load_state_dict(step.discriminator.state_dict())
    images = torch.rand(8, 1, 28, 28) * 2 - 1
    step(images, torch.zeros(8, dtype=torch.int64))

    bce, one = torch.nn.functional.binary_cross_entropy_with_logits, torch.ones(8)
    noise = torch.randn(8, 100, generator=keyed_generator("cpu", 0, "noise", 0))
    fake = plain.generator(noise)
    plain.optimizers["discriminator"].zero_grad()
    bce(plain.discriminator(images), one).backward()
    bce(plain.discriminator(fake.detach()), 0 * one).backward()
    plain.optimizers["discriminator"].step()
    plain.optimizers["generator"].zero_grad()
    bce(plain.discriminator(fake), one).backward()
    plain.optimizers["generator"].step()
    for ours, theirs in ((step.generator, plain.generator), (step.discriminator, plain.discriminator)):
        for key, value in theirs.state_dict().items():
            assert torch.allclose(ours.state_dict()[key].float(), value.float(), atol=1e-4), key


@pytest.mark.parametrize("loss", LOSSES)
def test_real_and_fake_images_are_judged_as_in_two_separate_passes(loss):
    """With BatchNorm, each side must keep its own statistics."""
    step = make_step(loss, "cdcgan")
    real, fake, labels = torch.rand(8, 1, 28, 28), -torch.rand(8, 1, 28, 28), torch.arange(8)
    step.discriminator(real, labels)
    step.discriminator.eval()  # fixes the power iteration of spectral norm
    if loss == "bce":
        step.discriminator.train()
    both = step._judge(real, fake, labels[None])
    for together, images in zip(both, (real, fake)):
        assert torch.allclose(together[0], step.discriminator(images, labels), atol=1e-5)
