"""checkpoint.py: model files are read as written, equal content gives equal files, and what does not fit is refused."""

from __future__ import annotations

import pytest
import torch
from conftest import META
from test_models import SMALL, small

from checkpoint import file_sha256, load_generator, load_model, read_tensors, save_model, write_tensors
from files import ExpectedError
from models import MODELS


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_read_as_it_was_written(tmp_path, name, half):
    network = small(name)
    save_model(tmp_path / "model.pt", name, network, META, half=half)
    loaded = load_model(tmp_path / "model.pt")
    assert loaded.model_name == name
    assert loaded.meta == META
    assert loaded.config == network.config
    assert not loaded.training
    for key, value in network.state_dict().items():
        stored = value.half().float() if half and value.is_floating_point() else value
        assert torch.equal(loaded.state_dict()[key], stored), key


def test_sampling_needs_no_architecture_flags(saved):
    network, path = saved
    before, loaded = (model.sample(3, rng=torch.Generator().manual_seed(1)) for model in (network, load_generator(path)))
    assert torch.allclose(before, loaded, atol=1e-2)


def test_equal_strings_give_equal_bytes(tmp_path):
    """A resumed run has read its strings from a file, so equal strings may be different objects."""
    word, flags = "cosine", ["cos", "ine"]
    write_tensors(tmp_path / "one.pt", {"a": word, "b": [word]})
    write_tensors(tmp_path / "two.pt", {"a": "".join(flags), "b": ["".join(flags)]})
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()


def test_the_name_of_a_file_does_not_change_its_bytes(tmp_path, saved):
    network, path = saved
    save_model(tmp_path / "other_name.pt", "dcgan", network, META)
    assert file_sha256(tmp_path / "other_name.pt") == file_sha256(path)


@pytest.mark.parametrize("name", ["dcgan_discriminator", "classifier"])
def test_a_model_without_sample_is_not_loaded_as_a_generator(tmp_path, name):
    save_model(tmp_path / "model.pt", name, small(name), META)
    with pytest.raises(ExpectedError, match="cannot be sampled"):
        load_generator(tmp_path / "model.pt")


def test_weights_that_are_not_finite_are_not_written(saved):
    network, path = saved
    before = path.read_bytes()
    with torch.no_grad():
        network.conv28.bias[0] = torch.nan
    with pytest.raises(ExpectedError, match="not finite"):
        save_model(path, "dcgan", network, META)
    assert path.read_bytes() == before


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(saved, monkeypatch):
    network, path = saved
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(ExpectedError, match="No space left"):
        save_model(path, "dcgan", network, META)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def changed(path, **changes):
    content = read_tensors(path)
    for key, value in changes.items():
        content[key] = value(content[key]) if callable(value) else value
    write_tensors(path, content)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2}, "format 1"),
        ({"format": torch.ones(2)}, "format 1"),
        ({"model": "vae"}, "unknown model"),
        ({"model": "dcgan_discriminator"}, "no option black, latent_dim"),
        ({"model": 5}, "wrong types"),
        ({"meta": None}, "wrong types"),
        ({"config": lambda c: c | {"width": 10**9}}, "width must be"),
        ({"config": lambda c: c | {"width": 9}}, "shape"),
        ({"config": lambda c: c | {"width": "8"}}, "width must be"),
        ({"config": lambda c: c | {"depth": 1}}, "no option depth"),
        ({"weights": lambda w: w | {"extra": torch.ones(1)}}, "unknown weights: extra"),
        ({"weights": lambda w: {k: v for k, v in w.items() if k != "conv28.bias"}}, "missing: conv28.bias"),
        ({"weights": lambda w: w | {"conv28.bias": torch.ones(2)}}, "shape"),
        ({"weights": lambda w: w | {"conv28.bias": torch.tensor([torch.nan])}}, "not finite"),
        ({"weights": lambda w: w | {"conv28.bias": torch.ones(1, dtype=torch.int64)}}, "type"),
        ({"weights": lambda w: w | {"conv28.bias": [1.0]}}, "tensor"),
        ({"weights": lambda w: w | {"conv28.bias": torch.full((1,), 1e300, dtype=torch.float64)}}, "not finite"),
        (
            {"weights": lambda w: {k: v.flatten()[:1].clone().expand(v.numel()).view(v.shape) for k, v in w.items()}},
            "repeats",
        ),
    ],
)
def test_content_that_does_not_fit_its_model_is_refused(saved, changes, reason):
    _, path = saved
    changed(path, **changes)
    with pytest.raises(ExpectedError, match=reason):
        load_generator(path)


@pytest.mark.parametrize(
    ("path", "reason"),
    [("none.pt", "does not exist"), (".", "no file"), ("list.pt", "a list"), ("foreign.pt", "not a model")],
)
def test_missing_files_folders_and_foreign_content_are_refused(path, reason, tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    with pytest.raises(ExpectedError, match=reason):
        load_generator(tmp_path / path)


def test_the_tests_have_a_small_config_of_every_model():
    assert SMALL.keys() == MODELS.keys()
