"""networks/unet.py: shapes, the field of view, and the effect of time and class."""

from __future__ import annotations

import pytest
import torch
from test_models import small
from torch._subclasses.fake_tensor import FakeTensorMode

from models import build
from networks.unet import Attention, UNet, sinusoids


@pytest.mark.parametrize("width", [8, 16, 24])
def test_the_unet_goes_down_to_7x7_and_back(width):
    network, shapes = small("ddpm", width=width).unet, []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    x = torch.randn(3, 1, 28, 28)
    output = network(x, torch.tensor([0.0, 500.0, 999.0]), torch.tensor([0, 5, 10]))
    assert output.shape == x.shape
    assert output.dtype == torch.float32
    assert {(width, 28, 28), (4 * width, 14, 14), (10 * width, 7, 7)} == set(shapes) - {(1, 28, 28)}


def seen_by_a_corner(network) -> torch.Tensor:
    """Which pixels [28, 28] of the input the first pixel of the output depends on."""
    x = torch.randn(1, 1, 28, 28, requires_grad=True)
    output = network(x, torch.tensor([300.0]), torch.tensor([3]))
    return torch.autograd.grad(output[0, 0, 0, 0], x)[0][0, 0] != 0


class Untouched(torch.nn.Module):
    """In place of a normalisation: it returns its input, and ignores scale and shift."""

    def forward(self, x, *_condition):
        return x


def test_every_output_pixel_depends_on_every_input_pixel():
    """Through convolutions and attention. GroupNorm is replaced, because it mixes all pixels anyway."""
    network = small("ddpm").unet
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, Untouched())
    assert seen_by_a_corner(network).all()
    attention_alone = torch.nn.ModuleList([block for block in network.middle if isinstance(block, Attention)])
    network.middle = attention_alone
    assert seen_by_a_corner(network).all()
    network.middle = torch.nn.ModuleList()
    assert not seen_by_a_corner(network).all()


def test_attention_is_at_7x7():
    network, shapes = small("ddpm").unet, []
    for module in network.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape[1:])))
    network(torch.randn(2, 1, 28, 28), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert set(shapes) == {(80, 7, 7)}


@pytest.mark.parametrize(("time", "label"), [(301.0, 3), (300.0, 4)])
def test_another_time_or_class_changes_nearly_every_pixel(time, label):
    network, x = small("ddpm").unet, torch.randn(1, 1, 28, 28)
    output, other = (network(x, torch.tensor([t]), torch.tensor([y])) for t, y in ((300.0, 3), (time, label)))
    assert (other != output).float().mean() > 0.95


def test_a_new_unet_predicts_zero_and_its_blocks_are_identities():
    network = build("ddpm", width=8).unet
    assert not network(torch.randn(2, 1, 28, 28), torch.zeros(2), torch.zeros(2, dtype=torch.int64)).any()
    for block in network.middle:
        x = torch.randn(2, 80, 7, 7)
        assert torch.equal(block(x, torch.randn(2, 80)), x)


def test_images_do_not_mix_within_a_batch():
    network, x = small("ddpm").unet, torch.randn(4, 1, 28, 28)
    time, labels = torch.tensor([5.0, 100.0, 500.0, 900.0]), torch.tensor([1, 2, 3, 10])
    whole = network(x, time, labels)
    alone = torch.cat([network(x[i : i + 1], time[i : i + 1], labels[i : i + 1]) for i in range(4)])
    assert torch.allclose(whole, alone, atol=1e-5)


def test_neighbouring_times_stay_distinct_in_bf16():
    """In bf16, 900 and 901 are the same number."""
    network, x, labels = small("ddpm").unet, torch.randn(1, 1, 28, 28), torch.tensor([3])
    with torch.autocast("cpu", torch.bfloat16):
        conditions = []
        network.middle[0].register_forward_pre_hook(lambda _, inputs: conditions.append(inputs[1]))
        for time in (900.0, 901.0):
            network(x, torch.tensor([time]), labels)
    assert conditions[0].dtype == torch.float32
    assert not torch.equal(*conditions)


def test_times_have_distinct_embeddings():
    embedded = sinusoids(torch.arange(1000), 32)
    assert embedded.shape == (1000, 32)
    assert embedded.abs().max() <= 1
    assert torch.cdist(embedded, embedded).add(torch.eye(1000) * 9).min() > 0.05


@pytest.mark.parametrize("width", range(8, 129, 8))
def test_every_width_that_the_config_allows_can_be_built(width):
    with FakeTensorMode():  # shapes without numbers
        network = UNet(width, 10)
        indices = torch.zeros(2, dtype=torch.int64)
        assert network(torch.zeros(2, 1, 28, 28), indices, indices).shape == (2, 1, 28, 28)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"width": 12}, "multiple of 8"),
        ({"schedule": "sigmoid"}, "schedule must be one of"),
        ({"prediction": ["v"]}, "prediction must be one of"),
    ],
)
def test_a_config_out_of_bounds_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        build("ddpm", **config)


@pytest.mark.parametrize(("classes", "rows"), [(10, 11), (0, 1)])
def test_the_null_class_is_the_last_one(classes, rows):
    assert UNet(8, classes).label.num_embeddings == rows
