"""engine/safe_archive.py: damaged and hostile files are refused, and no code from a file is run."""

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

from checkpoint import load_generator, read_tensors
from files import ExpectedError


@pytest.mark.parametrize("sixteenths", range(16))
def test_a_truncated_file_is_refused(sixteenths, saved):
    _, path = saved
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * sixteenths // 16])
    with pytest.raises(ExpectedError, match="damaged"):
        load_generator(path)


def test_a_flipped_byte_is_refused_or_changes_nothing(saved):
    """The checksums find it, unless it lies in the padding."""
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
    """When it is unpickled, it calls the given function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture
def limited_memory():
    """This process may allocate 2 GiB more than it has now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
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
def test_a_pickle_runs_no_code_and_is_refused(content, tmp_path, capfd, limited_memory):
    torch.save({"format": 1, "model": content}, tmp_path / "gadget.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(content))
    torch.save({"weights": content}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("gadget.pt", "plain.pt", "legacy.pt"):
        with pytest.raises(ExpectedError, match="damaged"):
            load_generator(tmp_path / name)
    assert "was run" not in capfd.readouterr().out


def test_tuples_that_repeat_each_other_are_refused(tmp_path):
    """Each holds the previous one twice, so the hash of the last one takes 2^60 steps."""
    maze = ()
    for _ in range(60):
        maze = (maze, maze)
    torch.save({"format": 1, "meta": maze}, tmp_path / "maze.pt")
    with pytest.raises(ExpectedError, match="repeats a tuple"):
        load_generator(tmp_path / "maze.pt")


def test_the_error_for_lists_that_repeat_each_other_is_short(saved):
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


def test_two_archives_in_one_file_are_refused(saved, tmp_path):
    """Python reads the archive at the end of a file, and torch might read another one at its beginning."""
    _, path = saved
    (tmp_path / "two.pt").write_bytes(path.read_bytes() * 2)
    with pytest.raises(ExpectedError, match="before the archive"):
        load_generator(tmp_path / "two.pt")


def test_members_that_claim_more_bytes_than_the_file_has_are_refused(saved):
    """Several entries for the same bytes are small on disk, but large when they are read."""
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
    """torch does not compress, and a compressed member can be far larger than its file."""
    _, path = saved
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.namelist():
            target.writestr(member, bytes(10_000_000) if member.endswith("data/0") else source.read(member))
    with pytest.raises(ExpectedError, match="compressed"):
        load_generator(bomb)


@pytest.mark.parametrize("content", [b"}" * 20_000_000, b"(" * 20_000_000, b"N" * 3_000_000], ids=["dicts", "marks", "none"])
def test_a_description_of_too_many_parts_is_refused_within_seconds(content, tmp_path, limited_memory):
    with zipfile.ZipFile(tmp_path / "long.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02](" + content + b"e.")
    start = time.process_time()
    with pytest.raises(ExpectedError, match="too many parts"):
        load_generator(tmp_path / "long.pt")
    assert time.process_time() - start < 20


def test_a_description_of_too_many_bytes_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "long.pt", "w") as archive:
        archive.writestr("archive/data.pkl", bytes(2**25 + 1))
    with pytest.raises(ExpectedError, match="description is too long"):
        load_generator(tmp_path / "long.pt")


def test_too_many_members_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "many.pt", "w") as archive:
        for i in range(20_000):
            archive.writestr(f"archive/data/{i}", b"")
    with pytest.raises(ExpectedError, match="too many members"):
        load_generator(tmp_path / "many.pt")
