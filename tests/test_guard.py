"""engine/guard.py: no number that is not finite gets into weights, optimizers or buffers."""

from __future__ import annotations

import math

import pytest
import torch
from test_models import small
from torch import nn

from engine.guard import Guard, average_over_processes, clip_gradients, gradient_norm
from loop import TrainState
from recipes.ddpm import DiffusionStep, make_optimizers
from recipes.gan import LOSSES, GANStep


def gan_step(name: str, loss: str) -> GANStep:
    networks = {"generator": small(name), "discriminator": small(f"{name}_discriminator", norm=LOSSES[loss].norm)}
    optimizers = {key: torch.optim.Adam(network.parameters(), lr=1e-3, fused=True) for key, network in networks.items()}
    return GANStep(*networks.values(), optimizers, LOSSES[loss], TrainState(), 0, "fp32")


def diffusion_step() -> DiffusionStep:
    network = small("ddpm")
    return DiffusionStep(network, make_optimizers(network, 1e-3, 1e-3), TrainState(), 0, "fp32", 1.0, 0.1, 1.0)


STEPS = {f"{name} {loss}": (gan_step, name, loss) for name in ("dcgan", "cdcgan") for loss in LOSSES}
STEPS["ddpm"] = (diffusion_step,)


def everything(step) -> dict[str, torch.Tensor]:
    """Copies of all weights, buffers and optimizer states of a step."""
    tensors = {}
    for name, part in vars(step).items():
        if isinstance(part, nn.Module):
            tensors |= {f"{name} {key}": value.clone() for key, value in part.state_dict().items()}
    for name, optimizer in step.optimizers.items():
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{name} optimizer {i} {field}": value.clone() for field, value in state.items()}
    return tensors


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {key for key, value in before.items() if not torch.equal(value, after[key])}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_batch_changes_nothing_that_has_seen_it(kind, poison):
    make, *args = STEPS[kind]
    step = make(*args)
    images, labels = torch.rand(16, 1, 28, 28) * 2 - 1, torch.arange(16) % 10
    bad = images.clone()
    bad[3, 0, 5, 5] = poison
    step(images, labels)
    before = everything(step)
    losses = step(bad, labels)
    after = everything(step)
    assert not losses["loss" if kind == "ddpm" else "loss_d"].isfinite()
    assert all(value.isfinite().all() for value in after.values())
    unseen = () if kind == "ddpm" else ("generator",)  # the generator and its optimizer have seen none of these images
    guarded = {key for key in before if not key.startswith(unseen)}
    assert len(guarded) > 10
    assert changed(before, after) & guarded == set()
    buffers = {key for key in before if "running" in key or "num_batches" in key}
    assert changed(before, after) & buffers == set()
    again = step(images, labels)
    assert all(loss.isfinite() for loss in again.values())
    assert changed(after, everything(step)) & guarded, "a good batch after the bad one trains again"


class Root(nn.Module):
    """Its value at zero is finite, but its gradient is not. Its forward pass also moves statistics."""

    def __init__(self):
        super().__init__()
        self.x, self.norm = nn.Parameter(torch.zeros(2)), nn.BatchNorm1d(2)

    def forward(self):
        self.norm(torch.randn(4, 2))
        return self.x.abs().sqrt().sum()


def update(guard: Guard, loss: torch.Tensor, optimizer: torch.optim.Optimizer, max_norm: float = 0.0) -> torch.Tensor:
    """One update, as the recipes write it."""
    optimizer.zero_grad()
    loss.backward()
    loss = average_over_processes(loss, optimizer)
    norm = clip_gradients(max_norm, optimizer) if max_norm else gradient_norm(optimizer)
    return guard.step(loss, norm, optimizer)


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=1.0, fused=True)


def test_a_finite_loss_with_a_bad_gradient_is_skipped():
    network = Root()
    guard = Guard(network)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    guard.keep()
    loss = update(guard, network(), sgd(network))
    assert changed(before, network.state_dict()), "the forward pass has moved the statistics"
    guard.restore()
    assert loss.isnan()
    assert changed(before, network.state_dict()) == set()


@pytest.mark.parametrize("bad", [0, 1])
def test_one_bad_update_of_two_restores_the_buffers_and_keeps_the_good_update(bad):
    network = Root()
    guard, optimizer = Guard(network), sgd(network)
    guard.keep()
    before = network.norm.running_mean.clone()
    for i in range(2):
        network()  # moves the statistics
        loss = (network.x - 1).square().sum() * (math.nan if i == bad else 1)
        assert update(guard, loss, optimizer).isnan() == (i == bad)
    guard.restore()
    assert torch.equal(network.norm.running_mean, before)
    assert network.x.isfinite().all()
    assert network.x.any()


def test_a_guarded_update_is_the_ordinary_one():
    plain, guarded = nn.Linear(3, 1), nn.Linear(3, 1)
    guarded.load_state_dict(plain.state_dict())
    optimizers = [torch.optim.Adam(network.parameters(), lr=0.1, fused=True) for network in (plain, guarded)]
    guard, x = Guard(guarded), torch.randn(8, 3)
    for _ in range(3):
        loss = plain(x).square().mean()
        optimizers[0].zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizers[0].step()
        assert torch.equal(update(guard, guarded(x).square().mean(), optimizers[1], max_norm=0.5), loss)
    for ours, theirs in zip(guarded.parameters(), plain.parameters()):
        assert torch.equal(ours, theirs)


def test_an_optimizer_that_does_not_heed_the_guard_is_refused():
    network = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(network.parameters(), fused=False)
    with pytest.raises(ValueError, match="fused"):
        update(Guard(), network(torch.ones(1, 1)).sum(), optimizer)
