"""engine/muon.py: the orthogonal update, against its definition and against torch.optim.Muon."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from engine import muon
from engine.muon import Muon, orthogonal
from models import build
from recipes.ddpm import make_optimizers


@pytest.mark.parametrize("shape", [(3, 20, 50), (2, 50, 20), (1, 30, 30)])
def test_orthogonal_keeps_singular_vectors_and_brings_singular_values_near_1(shape):
    """For singular values whose ratio is up to 50."""
    n, rows, columns = shape
    rank = min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(n, size, rank))[0] for size in (rows, columns))
    values = torch.logspace(0, math.log10(0.02), rank)
    result = orthogonal(7.0 * (u * values) @ v.mT)
    inside = u.mT @ result @ v
    assert torch.allclose(u @ inside @ v.mT, result, atol=1e-5)
    diagonal = inside.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.65
    assert diagonal.max() < 1.25
    assert (inside - torch.diag_embed(diagonal)).abs().max() < 1e-4


def test_orthogonal_maps_zero_to_zero():
    assert not orthogonal(torch.zeros(1, 4, 6)).any()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_updates_are_those_of_torch_within_3_percent(precision):
    """torch iterates in bfloat16."""
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


def test_a_convolution_is_updated_as_the_matrix_of_its_output_channels():
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_matrices_of_many_shapes_in_one_batch_are_updated_as_those_in_a_batch_for_each_shape(precision, monkeypatch):
    """A GPU takes the one, a CPU the other."""
    gradients = [torch.randn(shape) for shape in ((24, 60), (60, 24), (8, 4, 3, 3), (5, 7))]
    gradients.append(torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last))

    def weights_after_a_step(together):
        monkeypatch.setattr(muon, "_batches", lambda matrices, **_: batches(matrices, together=together))
        weights = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
        for weight, gradient in zip(weights, gradients):
            weight.grad = gradient
        muon.Muon(weights, lr=1.0, precision=precision).step()
        return torch.cat([weight.flatten() for weight in weights])

    batches = muon._batches
    together, apart = weights_after_a_step(True), weights_after_a_step(False)
    assert (together - apart).norm() < (1e-5 if precision == "fp32" else 0.02) * apart.norm()
    assert 0.16 < apart.square().mean().sqrt() < 0.24


def test_a_momentum_in_another_memory_format_than_its_weight_serves_it():
    """As in a run that goes on on another device."""
    start = torch.randn(6, 4, 3, 3)
    weights = [nn.Parameter(start.to(memory_format=order)) for order in (torch.channels_last, torch.contiguous_format)]
    optimizers = [muon.Muon([weight], lr=0.1) for weight in weights]
    gradients = torch.randn(2, 6, 4, 3, 3)
    for gradient in gradients:
        for weight, optimizer in zip(weights, optimizers):
            weight.grad = torch.empty_like(weight).copy_(gradient)
            optimizer.step()
        optimizers[0].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    assert torch.allclose(*weights, atol=1e-6)


def test_the_size_of_an_update_does_not_depend_on_the_size_of_the_gradient():
    for scale in (1e-6, 1.0, 1e6):
        parameter = nn.Parameter(torch.zeros(40, 90))
        parameter.grad = scale * torch.randn(40, 90)
        Muon([parameter], lr=0.5).step()
        assert parameter.detach().square().mean().sqrt() == pytest.approx(0.2 * 0.5, rel=0.2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_the_guard_skips_changes_nothing(bad):
    parameter, fresh = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(8, 5))
    optimizer = Muon([parameter, fresh], lr=0.1)
    parameter.grad = torch.randn(5, 8)
    optimizer.step()
    before = copy.deepcopy((parameter.data, fresh.data, optimizer.state[parameter]))
    parameter.grad, fresh.grad = torch.full((5, 8), bad), torch.ones(8, 5)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(parameter, before[0])
    assert torch.equal(fresh, before[1])
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"], before[2]["momentum_buffer"])
    assert not optimizer.state[fresh]["momentum_buffer"].any()
    parameter.grad, optimizer.found_inf = torch.randn(5, 8), torch.tensor(0.0)
    optimizer.step()
    assert not torch.equal(parameter, before[0])
    assert parameter.isfinite().all()


def test_a_restored_optimizer_continues_like_an_uninterrupted_one():
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


def test_a_parameter_with_one_dimension_is_refused():
    with pytest.raises(ValueError, match="Adam"):
        Muon([nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))], lr=0.1)


def trained_by(model, optimizers) -> dict[str, list[str]]:
    """The names of the parameters of each optimizer."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {key: [names[p] for group in o.param_groups for p in group["params"]] for key, o in optimizers.items()}


@pytest.mark.parametrize("muon_lr", [0, 3e-3])
def test_every_weight_of_the_unet_has_exactly_one_optimizer(muon_lr):
    model = build("ddpm", width=8)
    trained = trained_by(model, make_optimizers(model, 2e-3, muon_lr))
    assert sorted(itertools.chain(*trained.values())) == sorted(name for name, _ in model.named_parameters())


def test_adam_trains_vectors_the_first_and_last_layer_and_the_classes():
    model = build("ddpm", width=8)
    optimizers = make_optimizers(model, 2e-3, 3e-3)
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
    others = trained_by(model, optimizers)["others"]
    assert set(others) == vectors | {"unet.stem.weight", "unet.head.weight", "unet.label.weight"}
    assert optimizers["others"].param_groups[0]["lr"] == 2e-3
    assert optimizers["matrices"].param_groups[0]["lr"] == 3e-3


def test_a_muon_rate_of_0_leaves_everything_to_adam():
    assert list(make_optimizers(build("ddpm", width=8), 2e-3, 0)) == ["others"]
