"""No number that is not finite gets into weights, optimizers or buffers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_models import small
from torch import nn

from recipes.gan import LOSSES, GANStep
from recipes.ddpm import DiffusionStep, make_optimizers
from engine.guard import Guard
from loop import TrainState


def gan_step(name: str, loss: str) -> GANStep:
    generator = small(name)
    discriminator = small(f"{name}_discriminator", norm=LOSSES[loss].norm)
    networks = {"lr": generator, "d_lr": discriminator}
    optimizers = {key: torch.optim.Adam(network.parameters(), lr=1e-3, fused=True) for key, network in networks.items()}
    return GANStep(generator, discriminator, optimizers, LOSSES[loss], TrainState(), 0, "fp32")


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
            tensors |= {f"{name}.{key}": value.clone() for key, value in part.state_dict().items()}
        for key, optimizer in part.items() if isinstance(part, dict) else ():
            for i, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{key}.{i}.{field}": value.clone() for field, value in state.items()}
    return tensors


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_batch_leaves_no_trace(kind, poison):
    make, *args = STEPS[kind]
    step = make(*args)
    images, labels = torch.rand(16, 1, 28, 28) * 2 - 1, torch.arange(16) % 10
    bad = images.clone()
    bad[3, 0, 5, 5] = poison
    step(images, labels)
    before = everything(step)
    losses = step(bad, labels)
    judge = "loss" if kind == "ddpm" else "loss_d"
    assert not losses[judge].isfinite()
    after = everything(step)
    assert all(value.isfinite().all() for value in after.values())
    free = () if kind == "ddpm" else ("generator", "lr.")  # the generator and its optimizer have seen none of these images
    unchanged = [key for key in before if not key.startswith(free)]
    assert len(unchanged) > 10 and all(torch.equal(before[key], after[key]) for key in unchanged)
    assert all(torch.equal(before[key], after[key]) for key in before if "running" in key or "num_batches" in key)
    again = step(images, labels)
    assert all(loss.isfinite() for loss in again.values())
    assert any(not torch.equal(value, after[key]) for key, value in everything(step).items() if key in unchanged)


class Root(nn.Module):
    """Its value at zero is finite, its gradient is not."""

    def __init__(self):
        super().__init__()
        self.x, self.norm = nn.Parameter(torch.zeros(2)), nn.BatchNorm1d(2)

    def forward(self):
        self.norm(torch.randn(4, 2))
        return self.x.abs().sqrt().sum()


def test_a_bad_gradient_of_a_good_loss_is_seen():
    network = Root()
    before, guard = copy.deepcopy(network.state_dict()), Guard(network)
    guard.keep()
    loss = guard.update(network(), torch.optim.SGD(network.parameters(), lr=1.0, fused=True))
    assert not torch.equal(network.norm.running_mean, before["norm.running_mean"])
    guard.restore()
    assert loss.isnan() and all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_one_bad_update_of_two_is_enough():
    """Whichever comes first: the buffers of the whole step are put back."""
    for bad in (0, 1):
        network = Root()
        guard, optimizer = Guard(network), torch.optim.SGD(network.parameters(), lr=1.0, fused=True)
        guard.keep()
        before = network.norm.running_mean.clone()
        for i in range(2):
            network()  # moves the statistics
            loss = (network.x - 1).square().sum() * (math.nan if i == bad else 1)
            assert guard.update(loss, optimizer).isnan() == (i == bad)
        guard.restore()
        assert torch.equal(network.norm.running_mean, before) and network.x.isfinite().all() and network.x.any()


def test_an_update_is_the_plain_one():
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
        assert torch.equal(guard.update(guarded(x).square().mean(), optimizers[1], clip=0.5), loss)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), guarded.parameters()))


def test_only_a_fused_optimizer_can_be_held_back():
    network = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="fused"):
        Guard().update(network(torch.ones(1, 1)).sum(), torch.optim.Adam(network.parameters(), fused=False))
