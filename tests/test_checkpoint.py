"""Model files: what is written comes back, equal runs give equal files, and nothing foreign is believed."""

from __future__ import annotations

import copy
import os
import pickle
import resource
import time
import zipfile
from pathlib import Path

import pytest
import torch
from test_models import SMALL, small

from checkpoint import file_sha256, load_generator, load_model, read_tensors, save_model, write_tensors
from models import MODELS
from utils import ExpectedError

META = {"epoch": 3, "metrics": {"fid": 1.5}, "flags": {}, "versions": {}}


@pytest.fixture
def saved(tmp_path):
    """A small generator and its file."""
    network = small("dcgan")
    path = tmp_path / "best_GAN_G.pt"
    save_model(path, "dcgan", network, META)
    return network, path


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path, name, half):
    network = small(name)
    save_model(tmp_path / "model.pt", name, network, META, half=half)
    loaded = load_model(tmp_path / "model.pt")
    assert loaded.model_name == name and loaded.meta == META and loaded.config == network.config and not loaded.training
    for key, value in network.state_dict().items():
        stored = value.half().float() if half and value.is_floating_point() else value
        assert torch.equal(loaded.state_dict()[key], stored), key


def test_sampling_needs_no_architecture_flags(saved):
    network, path = saved
    ours, theirs = (model.sample(3, rng=torch.Generator().manual_seed(1)) for model in (network, load_generator(path)))
    assert torch.allclose(ours, theirs, atol=1e-2)


def test_equal_strings_give_equal_bytes(tmp_path):
    """Whether they are one object or two, as they are after a resumed run has read them from its file."""
    word, flags = "cosine", ["cos", "ine"]
    write_tensors(tmp_path / "one.pt", {"a": word, "b": [word]})
    write_tensors(tmp_path / "two.pt", {"a": "".join(flags), "b": ["".join(flags)]})
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()


def test_equal_content_gives_equal_bytes(tmp_path, saved):
    network, path = saved
    save_model(tmp_path / "other_name.pt", "dcgan", network, META)
    assert file_sha256(tmp_path / "other_name.pt") == file_sha256(path)


@pytest.mark.parametrize("name", ["dcgan_discriminator", "classifier"])
def test_what_cannot_be_sampled_is_no_generator(tmp_path, name):
    save_model(tmp_path / "model.pt", name, small(name), META)
    with pytest.raises(ExpectedError, match="cannot be sampled"):
        load_generator(tmp_path / "model.pt")


def test_weights_that_are_not_finite_are_never_written(saved):
    network, path = saved
    before = path.read_bytes()
    with torch.no_grad():
        network.conv28.bias[0] = torch.nan
    with pytest.raises(ExpectedError, match="not finite"):
        save_model(path, "dcgan", network, META)
    assert path.read_bytes() == before
    with torch.no_grad():
        network.conv28.bias[0] = 1e6  # finite, but not in half precision
    with pytest.raises(ExpectedError, match="not finite"):
        save_model(path, "dcgan", network, META)


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(saved, monkeypatch):
    network, path = saved
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(ExpectedError, match="No space left"):
        save_model(path, "dcgan", network, META)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_truncated_files_are_refused(saved):
    _, path = saved
    content = path.read_bytes()
    for sixteenth in range(16):
        path.write_bytes(content[: len(content) * sixteenth // 16])
        with pytest.raises(ExpectedError, match="damaged"):
            load_generator(path)


def test_flipped_bytes_are_refused(saved):
    """Each is found by the container's checksums, wherever it lies; or it hits padding and changes nothing."""
    network, path = saved
    content = path.read_bytes()
    for position in range(7, len(content), len(content) // 50):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            loaded = load_generator(path).state_dict()
        except ExpectedError:
            continue
        assert all(torch.equal(loaded[key], value.half().to(value.dtype)) for key, value in network.state_dict().items())


class Gadget:
    """Unpickles as a call of the given function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture
def limited_memory():
    """What hostile files may not exceed: 2 GiB more than this process has now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


GADGETS = {
    "prints": Gadget(print, "code from a checkpoint was run"),
    "runs a command": Gadget(os.system, "echo code from a checkpoint was run"),
    "runs a string": Gadget(exec, "print('code from a checkpoint was run')"),
    "loads another pickle": Gadget(pickle.loads, pickle.dumps(1)),
    "takes an attribute": Gadget(getattr, "text", "upper"),
    "sixteen gigabytes": Gadget(bytearray, 2**34),
    "builds a network": torch.nn.Linear(2, 2),
    "carries a function": torch.nn.functional.relu,
}


@pytest.mark.parametrize("content", GADGETS.values(), ids=GADGETS)
def test_pickles_are_never_run(content, tmp_path, capfd, limited_memory):
    torch.save({"format": 1, "model": content}, tmp_path / "gadget.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(content))
    torch.save({"weights": content}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("gadget.pt", "plain.pt", "legacy.pt"):
        with pytest.raises(ExpectedError, match="damaged"):
            load_generator(tmp_path / name)
    assert "was run" not in capfd.readouterr().out


def test_a_maze_of_tuples_is_refused(tmp_path):
    """Each holds the one before twice: to hash the last takes 2^60 steps."""
    maze = ()
    for _ in range(60):
        maze = (maze, maze)
    torch.save({"format": 1, "meta": maze}, tmp_path / "maze.pt")
    with pytest.raises(ExpectedError, match="repeats a tuple"):
        load_generator(tmp_path / "maze.pt")


def test_a_maze_of_lists_is_named_in_short(saved):
    _, path = saved
    maze = []
    for _ in range(40):
        maze = [maze, maze]
    content = read_tensors(path)
    content["config"]["width"] = maze
    torch.save(content, path)
    with pytest.raises(ExpectedError, match="width must be") as caught:
        load_generator(path)
    assert len(str(caught.value)) < 10_000


def test_an_archive_behind_another_is_refused(saved, tmp_path):
    """Python reads an archive from its end, torch may read one at its beginning."""
    _, path = saved
    (tmp_path / "two.pt").write_bytes(path.read_bytes() * 2)
    with pytest.raises(ExpectedError, match="before the archive"):
        load_generator(tmp_path / "two.pt")


def test_members_that_claim_too_much_are_refused(saved):
    """A second entry of the directory for the same bytes: small on disk, large when read."""
    _, path = saved
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.filelist, key=lambda member: member.file_size)
        for i in range(8):
            twin = copy.copy(largest)
            twin.filename = f"{largest.filename}{i}"
            archive.filelist.append(twin)
        archive._didModify = True
    with pytest.raises(ExpectedError, match="damaged"):
        load_generator(path)


def test_compressed_members_are_refused(saved, tmp_path):
    """torch stores its members as they are; a compressed one could explode."""
    _, path = saved
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.namelist():
            target.writestr(member, bytes(10_000_000) if member.endswith("data/0") else source.read(member))
    with pytest.raises(ExpectedError, match="compressed"):
        load_generator(bomb)


@pytest.mark.parametrize("content", [b"}" * 20_000_000, b"(" * 20_000_000, b"N" * 3_000_000], ids=["dicts", "marks", "none"])
def test_a_long_description_is_not_read_to_its_end(content, tmp_path, limited_memory):
    with zipfile.ZipFile(tmp_path / "long.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02](" + content + b"e.")
    start = time.process_time()
    with pytest.raises(ExpectedError, match="too many parts"):
        load_generator(tmp_path / "long.pt")
    assert time.process_time() - start < 20


def test_a_description_of_gigabytes_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "long.pt", "w") as archive:
        archive.writestr("archive/data.pkl", bytes(2**25 + 1))
    with pytest.raises(ExpectedError, match="description is too long"):
        load_generator(tmp_path / "long.pt")


def test_a_crowd_of_members_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "many.pt", "w") as archive:
        for i in range(20_000):
            archive.writestr(f"archive/data/{i}", b"")
    with pytest.raises(ExpectedError, match="too many members"):
        load_generator(tmp_path / "many.pt")


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
        ({"model": "dcgan_discriminator"}, "no option latent_dim"),
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
def test_what_does_not_fit_is_refused(saved, changes, reason):
    _, path = saved
    changed(path, **changes)
    with pytest.raises(ExpectedError, match=reason):
        load_generator(path)


def test_missing_files_folders_and_foreign_content(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    for path, reason in (
        ("none.pt", "does not exist"),
        (".", "no file"),
        ("list.pt", "a list"),
        ("foreign.pt", "not a model"),
    ):
        with pytest.raises(ExpectedError, match=reason):
            load_generator(tmp_path / path)


def test_small_names_every_model():
    assert SMALL.keys() == MODELS.keys()
