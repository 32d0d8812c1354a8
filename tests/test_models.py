"""models.py: shapes, sampling and labels of every network, and the DCGAN layers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import utils
from data import to_model_range, to_uint8
from models import MODELS, ClassBatchNorm2d, build
from utils import SamplingNoise, keyed_generator, sampling_key

SMALL = {"dcgan": {"width": 8}, "cdcgan": {"width": 8, "num_classes": 10}, "classifier": {"width": 4}}
SMALL["ddpm"] = {"width": 8, "timesteps": 50}
SMALL |= {f"{name}_discriminator": SMALL[name] for name in ("dcgan", "cdcgan")}
GENERATORS = ("dcgan", "cdcgan", "ddpm")


def small(name: str, **config):
    """A small network. Layers of the diffusion model that begin at zero get weights, so that every layer has an effect."""
    network = build(name, **{**SMALL[name], **config})
    for parameter in network.parameters():
        if name == "ddpm" and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return network


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_its_shapes_and_ranges(name):
    network = small(name)
    images, labels = torch.rand(6, 1, 28, 28) * 2 - 1, torch.arange(6)
    classes = getattr(network.config, "num_classes", 0)
    if hasattr(network, "sample"):
        samples = network.sample(6)
        assert samples.shape == (6, 1, 28, 28)
        assert samples.dtype == torch.float32
        assert samples.abs().max() <= 1
        assert samples.std() > 0
    elif name == "classifier":
        assert network(images).shape == (6, 10)
        assert network.features(images).shape == (6, network.config.features)
        assert network.features(images).min() >= 0
    else:
        assert network(images, labels if classes else None).shape == (6,)


@pytest.mark.parametrize("name", MODELS)
def test_configs_refuse_bad_widths_and_unknown_options(name):
    config_class, _ = MODELS[name]
    assert dataclasses.is_dataclass(config_class)
    for bad in (0, -1, 10**9, 3.0, "8", True, None):
        with pytest.raises(ValueError, match="width"):
            config_class(width=bad)
    with pytest.raises(ValueError, match="no option depth"):
        build(name, depth=3)


def test_unknown_models_and_norms_are_refused():
    with pytest.raises(ValueError, match="unknown model 'vae'"):
        build("vae")
    with pytest.raises(ValueError, match="norm"):
        build("dcgan_discriminator", norm="layer")


@pytest.mark.parametrize("name", ["dcgan", "cdcgan", "ddpm"])
class TestSampling:
    def test_the_seed_decides(self, name):
        network = small(name)
        a, b, c = (network.sample(5, rng=keyed_generator("cpu", seed)) for seed in (0, 0, 1))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)

    def test_the_chunk_size_changes_no_pixel_by_a_grey_level(self, name):
        network = small(name)
        whole, parts = (network.sample(7, rng=keyed_generator("cpu", 0), chunk_size=size) for size in (7, 3))
        assert (whole - parts).abs().max() < 1 / 127.5

    @pytest.mark.parametrize("n", [1, 3, 33])
    def test_an_image_is_the_same_whatever_the_number_of_images(self, name, n):
        network = small(name)
        few, many = (network.sample(count, rng=keyed_generator("cpu", 0)) for count in (n, 70))
        assert (few - many[:n]).abs().max() < 1 / 127.5
        assert (few[0] - many[n]).abs().max() > 1 / 127.5  # another image

    @pytest.mark.parametrize("rows", [slice(0, 5), slice(30, 35), slice(64, 70)])
    def test_rows_are_those_of_all_images(self, name, rows):
        network = small(name)
        whole, part = (network.sample(70, rng=keyed_generator("cpu", 0), rows=chosen) for chosen in (slice(None), rows))
        assert part.shape == whole[rows].shape
        assert (part - whole[rows]).abs().max() < 1 / 127.5

    def test_a_sampling_takes_one_key_from_its_generator(self, name):
        network = small(name)
        rng, other = keyed_generator("cpu", 0), keyed_generator("cpu", 0)
        network.sample(3, rng=rng)
        sampling_key(other)
        assert torch.equal(rng.get_state(), other.get_state())

    def test_sampling_changes_no_weight_no_buffer_and_no_mode(self, name):
        network = small(name).train()
        before = {key: value.clone() for key, value in network.state_dict().items()}
        assert not network.sample(4).requires_grad
        assert network.training
        assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())

    def test_unknown_options_are_refused_by_name(self, name):
        with pytest.raises(TypeError, match="temperature"):
            small(name).sample(4, temperature=0.5)

    def test_zero_samples_are_refused(self, name):
        with pytest.raises(ValueError, match="n and chunk_size must be at least 1, not 0"):
            small(name).sample(0)


def noise(images: range, purpose: str = "steps", key: int = 5) -> SamplingNoise:
    return SamplingNoise(key, purpose, images, "cpu")


def test_sampling_noise_is_that_of_the_images_in_every_draw():
    whole, part = noise(range(100)), noise(range(40, 70))
    for _ in range(3):
        assert torch.equal(whole.normal(2, 3)[40:70], part.normal(2, 3))
        assert torch.equal(whole.integers(10)[40:70], part.integers(10))


def test_sampling_noise_is_standard_normal_and_repeats_nothing():
    parts = [noise(range(1000)), noise(range(1000), "start"), noise(range(1000), key=6)]
    draws = torch.cat([part.normal(50) for part in parts for _ in range(2)])
    assert draws.dtype == torch.float32
    assert float(draws.mean()) == pytest.approx(0, abs=0.01)
    assert float(draws.std()) == pytest.approx(1, abs=0.01)
    assert len(draws.unique(dim=0)) == 6000
    assert noise(range(1000)).integers(10).bincount(minlength=10).min() > 60


@pytest.mark.parametrize(("name", "config"), [("dcgan", {}), ("ddpm", {"num_classes": 0})])
def test_an_unconditional_model_refuses_labels(name, config):
    with pytest.raises(ValueError, match="unconditional"):
        small(name, **config).sample(2, labels=torch.tensor([1, 2]))


@pytest.mark.parametrize("labels", [[1], [1.0, 2.0], [1, 10], [-1, 0]])
@pytest.mark.parametrize("name", ["cdcgan", "ddpm"])
def test_labels_of_a_wrong_number_type_or_class_are_refused(name, labels):
    with pytest.raises(ValueError, match="labels must"):
        small(name).sample(2, labels=torch.tensor(labels))


def test_labels_change_the_image_of_a_conditional_generator():
    network = small("cdcgan")
    torch.nn.init.normal_(network.norm7a.bias.weight)
    zeros, ones = (network.sample(2, labels=torch.full((2,), digit), rng=keyed_generator("cpu", 0)) for digit in (0, 1))
    assert not torch.equal(zeros, ones)


def test_class_batch_norm_is_a_gain_and_bias_for_each_class():
    norm = ClassBatchNorm2d(3, 2)
    torch.nn.init.normal_(norm.gain.weight)
    torch.nn.init.normal_(norm.bias.weight)
    x, labels = torch.randn(8, 3, 5, 5) * 4 + 2, torch.tensor([0, 1] * 4)
    plain = torch.nn.functional.batch_norm(x, None, None, training=True)
    expected = plain * norm.gain.weight[labels, :, None, None] + norm.bias.weight[labels, :, None, None]
    assert torch.allclose(norm(x, labels), expected, atol=1e-5)
    assert norm(x.bfloat16(), labels).dtype == torch.bfloat16


def test_logits_of_two_classes_differ_by_the_projection_of_their_embeddings():
    network = small("cdcgan_discriminator", norm="none")
    images = torch.randn(4, 1, 28, 28)
    seen = {}
    network.norm7b.register_forward_hook(lambda module, inputs, output: seen.update(x=output))
    a, b = (network(images, torch.full((4,), digit)) for digit in (2, 7))
    features = torch.nn.functional.leaky_relu(seen["x"], 0.2).permute(0, 2, 3, 1).flatten(1)
    difference = network.embed.weight[2] - network.embed.weight[7]
    assert torch.allclose(a - b, features @ difference, atol=1e-4)


def test_spectral_norm_bounds_every_layer():
    network = small("cdcgan_discriminator", norm="spectral")
    for _ in range(30):  # power iterations run in training mode
        network(torch.randn(2, 1, 28, 28), torch.tensor([0, 1]))
    for layer in (network.conv28, network.down14, network.conv14, network.down7, network.conv7, network.head, network.embed):
        assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=0.05)


def test_the_linear_stem_is_a_transposed_convolution_of_a_1x1_input():
    """That is the first layer in the DCGAN paper."""
    network = small("dcgan")
    z = torch.randn(3, 100)
    weight = network.stem.weight.view(7, 7, 32, 100).permute(3, 2, 0, 1)  # [in, out, 7, 7]
    expected = torch.nn.functional.conv_transpose2d(z[:, :, None, None], weight)
    ours = (network.stem(z) - network.stem.bias).unflatten(1, (7, 7, -1)).permute(0, 3, 1, 2)
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("has_bf16, notes", [(True, 0), (False, 1)])
def test_bf16_without_its_instructions_is_noted_once(monkeypatch, capsys, has_bf16, notes):
    def forget():
        utils.has_bf16.cache_clear()
        utils._note_emulation.cache_clear()

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": has_bf16}, raising=False)
    forget()
    for precision in ("fp32", "bf16", "bf16"):
        utils.autocast(torch.device("cpu"), precision)
    forget()
    assert capsys.readouterr().err.count("no bf16 instructions") == notes


# --------------------------------------------------------------------------------------------------------------------
# The gap below black

EVERY_LEVEL = torch.arange(256, dtype=torch.uint8).repeat(4)[:784].view(1, 1, 28, 28)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("black", [-1.0, -1.08, -2.0])
def test_every_grey_level_survives_the_gap(name, black):
    network = small(name, black=black)
    learned = network.encode(to_model_range(EVERY_LEVEL))
    assert float(learned.min()) == pytest.approx(black)
    assert torch.equal(learned[EVERY_LEVEL > 0], to_model_range(EVERY_LEVEL)[EVERY_LEVEL > 0])
    assert torch.equal(to_uint8(network.decode(learned)), EVERY_LEVEL)


@pytest.mark.parametrize("name", GENERATORS)
def test_black_with_an_error_smaller_than_the_gap_is_still_black(name):
    network = small(name, black=-1.08)
    errors = torch.linspace(-0.08, 0.08, 784).view(1, 1, 28, 28)
    black = network.encode(torch.full((1, 1, 28, 28), -1.0))
    assert not to_uint8(network.decode(black + errors)).any()


@pytest.mark.parametrize("name", GENERATORS)
def test_an_older_config_has_no_gap(name):
    assert build(name).config.black == -1
    images = to_model_range(EVERY_LEVEL)
    assert torch.equal(small(name).encode(images), images)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("black", [-0.9, -2.1, math.nan, "-1", None, True])
def test_a_black_out_of_its_bounds_is_refused(name, black):
    with pytest.raises(ValueError, match="black must be a number"):
        build(name, black=black)


@pytest.mark.parametrize("name", ["dcgan", "cdcgan"])
@pytest.mark.parametrize("black", [-1.0, -1.5])
def test_a_gan_reaches_black_and_white_and_its_samples_leave_the_gap(name, black):
    network = small(name, black=black).eval()
    labels = torch.zeros(2, dtype=torch.int64)
    for bias, drawn, sampled in ((-50.0, black, -1), (50.0, 1, 1)):
        torch.nn.init.constant_(network.conv28.bias, bias)
        assert torch.equal(network(torch.zeros(2, network.config.latent_dim), labels), torch.full((2, 1, 28, 28), drawn))
        assert torch.equal(network.sample(2), torch.full((2, 1, 28, 28), float(sampled)))
