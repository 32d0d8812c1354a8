"""Muon: the orthogonal update against its definition and against torch's, and what it refuses or holds back."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from recipes.ddpm import make_optimizers
from models import build
from engine.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(3, 20, 50), (2, 50, 20), (1, 30, 30)])
def test_the_singular_vectors_stay_and_the_values_come_near_to_1(shape):
    """For singular values over a factor of 50."""
    n, rows, columns = shape
    rank = min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(n, size, rank))[0] for size in (rows, columns))
    values = torch.logspace(0, math.log10(0.02), rank)
    result = orthogonal(7.0 * (u * values) @ v.mT)
    inside = u.mT @ result @ v
    assert torch.allclose(u @ inside @ v.mT, result, atol=1e-5)
    diagonal = inside.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.65 and diagonal.max() < 1.25
    assert (inside - torch.diag_embed(diagonal)).abs().max() < 1e-4


def test_zero_stays_zero():
    assert not orthogonal(torch.zeros(1, 4, 6)).any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_torchs_muon(precision):
    """torch's works in bfloat16, which its iteration of steep polynomials makes visible: 3 %."""
    shapes = [(24, 60), (60, 24), (24, 60)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = copy.deepcopy(ours)
    start = copy.deepcopy(ours)
    optimizers = (
        Muon(ours, lr=0.01, momentum=0.9, precision=precision),
        torch.optim.Muon(theirs, lr=0.01, momentum=0.9, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, first in zip(ours, theirs, start):
        assert (a - b).norm() < 0.03 * (b - first).norm()


def test_a_convolution_is_the_matrix_of_its_output_channels():
    weight = torch.randn(6, 4, 3, 3)
    convolution = nn.Parameter(weight.clone().to(memory_format=torch.channels_last))
    matrix = nn.Parameter(weight.flatten(1).clone())
    for _ in range(3):
        convolution.grad = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
        matrix.grad = convolution.grad.flatten(1).clone()
        for parameter in (convolution, matrix):
            Muon([parameter], lr=0.1).step()
    assert torch.allclose(convolution.flatten(1), matrix, atol=1e-6)
    assert not torch.allclose(matrix, weight.flatten(1), atol=0.1)


def test_the_size_of_an_update_does_not_depend_on_the_gradients():
    for scale in (1e-6, 1.0, 1e6):
        parameter = nn.Parameter(torch.zeros(40, 90))
        parameter.grad = scale * torch.randn(40, 90)
        Muon([parameter], lr=0.5).step()
        assert parameter.detach().square().mean().sqrt() == pytest.approx(0.2 * 0.5, rel=0.2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_held_back_leaves_no_trace(bad):
    parameter, fresh = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(8, 5))
    optimizer = Muon([parameter, fresh], lr=0.1)
    parameter.grad = torch.randn(5, 8)
    optimizer.step()
    before = copy.deepcopy((parameter.data, fresh.data, optimizer.state[parameter]))
    parameter.grad, fresh.grad = torch.full((5, 8), bad), torch.ones(8, 5)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(parameter, before[0]) and torch.equal(fresh, before[1])
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"], before[2]["momentum_buffer"])
    assert not optimizer.state[fresh]["momentum_buffer"].any()
    parameter.grad, optimizer.found_inf = torch.randn(5, 8), torch.tensor(0.0)
    optimizer.step()
    assert not torch.equal(parameter, before[0]) and parameter.isfinite().all()


def test_a_restored_optimizer_goes_on():
    parameters = [nn.Parameter(torch.ones(4, 6)) for _ in range(2)]
    first, second = (Muon([parameter], lr=0.1) for parameter in parameters)
    gradients = torch.randn(3, 4, 6)
    for optimizer, parameter in ((first, parameters[0]), (second, parameters[1])):
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
            if optimizer is second:
                saved = copy.deepcopy(second.state_dict())
                optimizer = second = Muon([parameter], lr=0.3)
                second.load_state_dict(saved)
    assert torch.equal(*parameters)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match="Adam"):
        Muon([nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))], lr=0.1)


@pytest.mark.parametrize("muon_lr", [0, 3e-3])
def test_every_weight_of_the_unet_has_one_optimizer(muon_lr):
    """And the first and last layer, the classes, and everything with fewer than two dimensions have Adam."""
    model = build("ddpm", width=8)
    optimizers = make_optimizers(model, 2e-3, muon_lr)
    names = {parameter: name for name, parameter in model.named_parameters()}
    by = {key: [names[p] for group in o.param_groups for p in group["params"]] for key, o in optimizers.items()}
    assert sorted(itertools.chain(*by.values())) == sorted(names.values())
    if not muon_lr:
        assert list(optimizers) == ["lr"]
        return
    assert list(optimizers) == ["lr", "muon_lr"] and optimizers["muon_lr"].param_groups[0]["lr"] == 3e-3
    outside = {name for parameter, name in names.items() if parameter.ndim < 2}
    assert set(by["lr"]) == outside | {"unet.stem.weight", "unet.head.weight", "unet.label.weight"}
