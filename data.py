"""MNIST, or scikit-learn's embedded digits, as one uint8 tensor on the training device.

The data set is uint8 [N, 1, 28, 28] in 0..255; the models see float in [-1, 1]. Image size and scaling are defined here
alone. There are no loader workers. A batch is an index into a permutation seeded by (seed, epoch). So the order is
reproducible, and a run can resume in the middle of an epoch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from files import ExpectedError, UsageError, cannot_read, expanded, network_timeout
from utils import keyed_generator

IMAGE_SIZE = 28
NUM_CLASSES = 10
DATASETS = ("mnist", "digits")

# (images, labels) of each split, with the published SHA-256 of the decompressed IDX files
MNIST_FILES = {
    "train": (
        ("train-images-idx3-ubyte", "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
        ("train-labels-idx1-ubyte", "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    ),
    "test": (
        ("t10k-images-idx3-ubyte", "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
        ("t10k-labels-idx1-ubyte", "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
    ),
}
IMAGE_HEADER_BYTES, LABEL_HEADER_BYTES = 16, 8  # IDX: a magic number, then one big-endian uint32 per dimension


@dataclasses.dataclass(frozen=True)
class Digits:
    """A split of a data set, on one device. `images`: uint8 [N, 1, 28, 28], 0..255; `labels`: int64 [N], 0..9."""

    images: torch.Tensor
    labels: torch.Tensor
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, n: int, *key: int | str) -> Digits:
        """`n` random items, drawn without replacement by a generator seeded with `key`. `ValueError`: too many, or none."""
        if not 0 < n <= len(self):
            raise ValueError(f"a subset of {n} cannot be drawn from {len(self)} items")
        return self.select(torch.randperm(len(self), generator=keyed_generator("cpu", *key))[:n])

    def select(self, index: torch.Tensor) -> Digits:
        """The items at `index`, int64 [n]."""
        index = index.to(self.images.device)
        return dataclasses.replace(self, images=self.images[index], labels=self.labels[index])


def default_data_dir() -> str:
    """`$MNIST_DIR`, else `data`."""
    return str(expanded(os.environ.get("MNIST_DIR") or "data"))


def load_digits(
    name: str,
    split: str,
    data_dir: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    limit: int = 0,
    seed: int = 0,
) -> Digits:
    """A split of `mnist` (60,000 / 10,000) or of the embedded `digits` (1,437 / 360) as one tensor on `device`.

    Args:
        split: `train` or `test`.
        data_dir: torchvision's root. The files are read from, and downloaded to, `data_dir/MNIST/raw`.
        limit: keep this many random items, fixed by `seed`. 0 keeps all.

    Raises:
        ExpectedError: a file is missing and cannot be downloaded, or is not the published one.
        UsageError: `limit` is too large.
        ValueError: another name or split.
    """
    if split not in MNIST_FILES:
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, not {name!r}")
    images, labels = _read_mnist(expanded(data_dir), split) if name == "mnist" else _read_embedded_digits(split)
    digits = Digits(images.to(device), labels.to(device), name)
    if limit > len(digits):
        raise UsageError(f"--limit {limit} is more than the {len(digits)} digits of {name}; leave it out to use all")
    return digits.subset(limit, "limit", seed) if limit else digits


def has_mnist(data_dir: str | os.PathLike[str]) -> bool:
    """Whether all four files are in `data_dir/MNIST/raw`, plain or gzipped. Loading checks their content."""
    raw = expanded(data_dir) / "MNIST" / "raw"
    names = [name for files in MNIST_FILES.values() for name, _ in files]
    return all((raw / name).is_file() or (raw / f"{name}.gz").is_file() for name in names)


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1] -> uint8 0..255, rounded; values outside are clipped. Inverse of `to_model_range`.

    Raises:
        ExpectedError: a pixel is not finite, so the model that drew it is broken.
    """
    if not torch.isfinite(images).all():
        raise ExpectedError("the generator's samples are not finite; train it again, with a lower --lr")
    return images.float().add(1.0).mul_(127.5).round_().clamp_(0.0, 255.0).to(torch.uint8)


def epoch_batches(
    digits: Digits, batch_size: int, seed: int, epoch: int, start: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of one epoch from number `start` on: (float [B, 1, 28, 28] in [-1, 1], int64 [B]).

    An incomplete last batch is left out, so every step has the same number of images.

    Raises:
        UsageError: the data set is smaller than one batch.
    """
    count = batches_per_epoch(digits, batch_size)
    order = torch.randperm(len(digits), generator=keyed_generator("cpu", seed, "order", epoch)).to(digits.images.device)
    for index in order.split(batch_size)[start:count]:
        yield to_model_range(digits.images[index]), digits.labels[index]


def batches_per_epoch(digits: Digits, batch_size: int) -> int:
    """The number of full batches in the data set. `UsageError` if there is none."""
    if batch_size > len(digits):
        raise UsageError(f"--batch-size {batch_size} is more than the {len(digits)} training digits; choose a smaller one")
    return len(digits) // batch_size


def _read_mnist(data_dir: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    raw = data_dir / "MNIST" / "raw"
    if not has_mnist(data_dir):
        _download_mnist(data_dir)
    (image_name, image_hash), (label_name, label_hash) = MNIST_FILES[split]
    images = _read_checked(raw / image_name, image_hash)[IMAGE_HEADER_BYTES:]
    labels = _read_checked(raw / label_name, label_hash)[LABEL_HEADER_BYTES:]
    return torch.from_numpy(images).view(-1, 1, IMAGE_SIZE, IMAGE_SIZE), torch.from_numpy(labels).long()


def _read_checked(path: Path, sha256: str) -> np.ndarray:
    """The decompressed bytes of `path` or `path`.gz, as a writable array. `ExpectedError` unless their hash is right."""
    source = path if path.is_file() else path.with_name(f"{path.name}.gz")
    try:
        content = bytearray(source.read_bytes() if source == path else gzip.decompress(source.read_bytes()))
    except (OSError, EOFError, MemoryError, zlib.error) as error:
        raise cannot_read(source, error, "is damaged ({reason}); delete it and run again to download it") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ExpectedError(f"{source} is not the published MNIST file (its SHA-256 differs); delete it and run again")
    return np.frombuffer(content, dtype=np.uint8)


def _download_mnist(data_dir: Path) -> None:
    """Let torchvision download the four files, from two mirrors and with progress, into `data_dir/MNIST/raw`."""
    from torchvision.datasets import MNIST  # a slow import, needed only here

    made = [folder for folder in (data_dir, data_dir / "MNIST", data_dir / "MNIST" / "raw") if not folder.exists()]
    try:
        with network_timeout():
            MNIST(str(data_dir), download=True)
    except (OSError, RuntimeError) as error:
        for folder in reversed(made):  # a failed download leaves nothing behind
            with contextlib.suppress(OSError):  # it holds a file that did arrive
                folder.rmdir()
        names = ", ".join(f"{name}.gz" for files in MNIST_FILES.values() for name, _ in files)
        raise ExpectedError(
            f"MNIST is not in {data_dir} and could not be downloaded ({error}); put {names} into "
            f"{data_dir / 'MNIST' / 'raw'}, or use --dataset digits, which needs no download"
        ) from error


def _read_embedded_digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's 1,797 handwritten 8x8 digits, enlarged to 20x20 and centred in 28x28 as MNIST's are.

    They come without a split: a fixed permutation splits them 80/20.
    """
    from sklearn.datasets import load_digits as load_sklearn_digits

    source = load_sklearn_digits()
    small = torch.from_numpy(source.images).float().unsqueeze(1)  # [1797, 1, 8, 8]
    large = torch.nn.functional.interpolate(small, size=20, mode="bicubic", align_corners=False)
    images = torch.nn.functional.pad(large.mul(255 / 16).round().clamp(0, 255), (4, 4, 4, 4)).to(torch.uint8)
    labels = torch.from_numpy(source.target).long()
    order = torch.randperm(len(labels), generator=keyed_generator("cpu", "embedded digits split"))
    boundary = len(labels) * 4 // 5
    index = order[:boundary] if split == "train" else order[boundary:]
    return images[index], labels[index]
