"""data.py: the data sets, their scaling and order, and MNIST's download."""

from __future__ import annotations

import functools
import gzip
import http.server
import shutil
import threading
from pathlib import Path

import pytest
import torch

import data
from files import ExpectedError


@pytest.fixture(scope="module")
def digits():
    return data.load_digits("digits", "train", "unused")


def test_to_uint8_inverts_to_model_range_exactly():
    levels = torch.arange(256, dtype=torch.uint8)
    floats = data.to_model_range(levels)
    assert floats.min() == -1
    assert floats.max() == 1
    assert torch.equal(data.to_uint8(floats), levels)


def test_to_uint8_clips_values_out_of_range():
    assert data.to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_to_uint8_refuses_a_pixel_that_is_not_finite(bad):
    with pytest.raises(ExpectedError, match="not finite"):
        data.to_uint8(torch.tensor([0.0, bad]))


def test_embedded_digits_are_split_without_overlap(digits):
    test = data.load_digits("digits", "test", "unused")
    assert digits.images.shape == (1437, 1, 28, 28)
    assert digits.images.dtype == torch.uint8
    assert test.images.shape == (360, 1, 28, 28)
    assert set(digits.labels.tolist()) == set(test.labels.tolist()) == set(range(10))
    assert digits.images.max() == 255
    assert digits.images[:, :, :4].max() == 0, "an empty border, as MNIST has"
    seen = {image.numpy().tobytes() for image in digits.images}
    assert sum(image.numpy().tobytes() in seen for image in test.images) <= 2


def test_the_order_of_batches_follows_from_seed_and_epoch(digits):
    def labels(seed, epoch, start=0):
        return [batch.tolist() for _, batch in data.epoch_batches(digits, 128, seed, epoch, start)]

    assert labels(0, 0) == labels(0, 0)
    assert labels(0, 0) != labels(0, 1)
    assert labels(0, 0) != labels(1, 0)
    assert labels(0, 0, start=5) == labels(0, 0)[5:]
    assert len(labels(0, 0)) == 1437 // 128


def test_an_epoch_visits_each_digit_once(digits):
    few = digits.subset(256, "test")
    images = torch.cat([images for images, _ in data.epoch_batches(few, 64, 0, 0)])
    assert images.dtype == torch.float32
    assert images.min() == -1
    assert images.max() == 1
    seen = sorted(image.numpy().tobytes() for image in data.to_uint8(images))
    assert seen == sorted(image.numpy().tobytes() for image in few.images)


def test_a_limit_keeps_random_digits_that_follow_from_the_seed(digits):
    a, b, c = (data.load_digits("digits", "train", "unused", limit=100, seed=seed) for seed in (0, 0, 1))
    assert len(a) == 100
    assert torch.equal(a.images, b.images)
    assert not torch.equal(a.images, c.images)
    assert not torch.equal(a.images, digits.images[:100])


def test_a_limit_above_the_number_of_digits_is_refused():
    with pytest.raises(ExpectedError, match="--limit 5000"):
        data.load_digits("digits", "train", "unused", limit=5000)


def test_a_batch_size_above_the_number_of_digits_is_refused(digits):
    with pytest.raises(ExpectedError, match="--batch-size 2000"):
        list(data.epoch_batches(digits, 2000, 0, 0))


def test_unknown_splits_and_data_sets_are_refused():
    with pytest.raises(ValueError, match="split"):
        data.load_digits("digits", "validation", "unused")
    with pytest.raises(ValueError, match="dataset"):
        data.load_digits("cifar", "train", "unused")


def test_mnist_has_its_published_size_and_labels(mnist_dir):
    for split, count in (("train", 60_000), ("test", 10_000)):
        digits = data.load_digits("mnist", split, mnist_dir)
        assert digits.images.shape == (count, 1, 28, 28)
        assert digits.images.dtype == torch.uint8
        assert digits.labels.shape == (count,)
        assert digits.labels.dtype == torch.int64
    assert digits.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def copy_mnist(mnist_dir: str, target: Path, gzipped: bool) -> Path:
    raw = target / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for files in data.MNIST_FILES.values():
        for name, _ in files:
            source = Path(mnist_dir) / "MNIST" / "raw" / name
            if gzipped:
                content = (
                    source.read_bytes() if source.exists() else gzip.decompress(source.with_name(f"{name}.gz").read_bytes())
                )
                (raw / f"{name}.gz").write_bytes(gzip.compress(content, 1))
            else:
                shutil.copy(source, raw / name)
    return raw


def test_gzipped_files_that_a_user_has_put_there_are_read(mnist_dir, tmp_path):
    copy_mnist(mnist_dir, tmp_path, gzipped=True)
    digits = data.load_digits("mnist", "test", tmp_path)
    assert torch.equal(digits.images, data.load_digits("mnist", "test", mnist_dir).images)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_file_is_refused(mnist_dir, tmp_path, damage):
    raw = copy_mnist(mnist_dir, tmp_path, gzipped=damage == "empty")
    path = raw / ("t10k-images-idx3-ubyte" + (".gz" if damage == "empty" else ""))
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes({"flipped": content, "truncated": content[:5000], "empty": b""}[damage])
    with pytest.raises(ExpectedError, match="t10k-images"):
        data.load_digits("mnist", "test", tmp_path)


def test_the_second_mirror_serves_what_the_first_one_lacks(mnist_dir, tmp_path, monkeypatch, capsys):
    from torchvision.datasets import MNIST, utils

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    mirror = copy_mnist(mnist_dir, tmp_path / "mirror", gzipped=True)
    names = [f"{name}.gz" for files in data.MNIST_FILES.values() for name, _ in files]
    monkeypatch.setattr(MNIST, "resources", [(name, utils.calculate_md5(mirror / name)) for name in names])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=mirror)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(MNIST, "mirrors", [f"{url}nothing/", url])
        digits = data.load_digits("mnist", "test", tmp_path / "data")
        server.shutdown()
    assert len(digits) == 10_000
    assert "code 404" in capsys.readouterr().err  # the server's log: the first mirror was asked


def test_without_a_mirror_the_error_names_files_folder_and_alternative(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", [(tmp_path / "nothing").as_uri() + "/"])
    with pytest.raises(ExpectedError) as error:
        data.load_digits("mnist", "train", tmp_path / "data")
    for words in ("train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz", str(tmp_path), "--dataset digits"):
        assert words in str(error.value)


def test_a_failed_download_leaves_no_folder_behind(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", [(tmp_path / "nothing").as_uri() + "/"])
    with pytest.raises(ExpectedError, match="could not be downloaded"):
        data.load_digits("mnist", "train", tmp_path / "new" / "data")
    assert not (tmp_path / "new" / "data").exists()


def test_mnist_without_the_permission_to_read_it_is_not_called_damaged(tmp_path, monkeypatch, mnist_dir):
    monkeypatch.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(ExpectedError, match="ask for the permission"):
        data.load_digits("mnist", "train", mnist_dir)
