"""The digit classifier as a feature extractor. It is pinned by its hash, because every figure depends on it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from checkpoint import file_sha256, load_model
from data import to_model_range
from files import ExpectedError

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
CLASSIFIER_SHA256 = "0721f5905ba150b02c92f010b7f543d1a8d15754b544f67b358196077fdc6b08"
CHUNK = 250  # images in a forward pass: the fastest on a CPU, as larger ones leave its caches


class Extractor:
    """The digit classifier: uint8 images -> features and class probabilities, always in fp32.

    Args:
        sha256: the hash that the file must have. An empty string accepts any file.

    Raises:
        ExpectedError: the file is missing, or is not the pinned one.
    """

    knows_digits = True

    def __init__(
        self, device: torch.device | str = "cpu", path: Path = CHECKPOINTS / "classifier.pt", sha256: str = CLASSIFIER_SHA256
    ):
        self.network = load_model(path, device).to(memory_format=torch.channels_last)
        if self.network.model_name != "classifier":
            raise ExpectedError(f"{path} holds a {self.network.model_name}, not the classifier; restore the shipped file")
        self.device, self.sha256 = torch.device(device), file_sha256(path)
        if sha256 and self.sha256 != sha256:
            raise ExpectedError(f"{path} is not the pinned classifier, so its figures could not be compared; restore it")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [N, 1, 28, 28] -> features [N, D] and class probabilities [N, K], float32."""
        if images.dtype != torch.uint8:
            raise ValueError(f"images are scored as uint8, not {images.dtype}; see data.to_uint8")
        parts = []
        for chunk in images.split(CHUNK):
            chunk = to_model_range(chunk.to(self.device)).contiguous(memory_format=torch.channels_last)
            features = self.network.features(chunk)
            parts.append((features, self.network.head(features).softmax(1)))
        features, probabilities = zip(*parts)
        return torch.cat(features), torch.cat(probabilities)
