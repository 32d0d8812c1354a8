"""The Inception network of published FIDs as an extractor. Its figures can be compared with the literature.

It is torch-fidelity's port of the 2015 TensorFlow weights, with their resizing (Obukhov et al. 2020). It was trained on
photographs, so its features say little about digits.
"""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock
from urllib.error import URLError

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import file_sha256
from files import ExpectedError, cannot_read, expanded, network_timeout

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SHA256_START = "6726825d"
CHUNK = 50  # images in a forward pass, of 299x299 pixels


class InceptionExtractor:
    """uint8 digits -> features and class probabilities of the Inception network, in fp32.

    Args:
        weights: file of the network's weights. None: the canonical ones, downloaded once.

    Raises:
        ExpectedError: the weights cannot be downloaded, are damaged, or belong to another network.
    """

    knows_digits = False

    def __init__(self, device: torch.device | str = "cpu", weights: str | os.PathLike[str] | None = None):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = expanded(weights) if weights else canonical_weights()
        try:
            # Without this variable, torch-fidelity would run code from the file
            with mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
                network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
        except Exception as error:  # a damaged or hostile file can make the reader raise anything
            otherwise = "does not hold the Inception weights ({reason}); see --inception-weights"
            raise cannot_read(path, error, otherwise) from error
        self.network, self.device, self.sha256 = network.to(device), torch.device(device), file_sha256(path)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [N, 1, H, W] -> features [N, 2048] and class probabilities [N, 1008], float32.

        Grey becomes three equal channels. The network resizes to 299x299 without antialiasing, as TensorFlow 1 did.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"images are scored as uint8, not {images.dtype}; see data.to_uint8")
        chunks = tqdm(images.split(CHUNK), desc="inception", unit_scale=CHUNK, unit="img", leave=False, disable=None)
        parts = [self.network(chunk.to(self.device).expand(-1, 3, -1, -1)) for chunk in chunks]
        features, logits = (torch.cat(part) for part in zip(*parts))
        return features, logits.softmax(1)


def canonical_weights() -> Path:
    """The file of the canonical weights in torch's cache. A missing file is downloaded, and its hash is checked.

    Raises:
        ExpectedError: the download fails, or the file is not the canonical one.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]
    wanted = f"put {URL} (its SHA-256 begins with {SHA256_START}) at {path}, or give --inception-weights"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with network_timeout():
                torch.hub.download_url_to_file(URL, str(path), SHA256_START)
        except (URLError, OSError, RuntimeError) as error:
            raise ExpectedError(f"the Inception weights cannot be downloaded ({error}); {wanted}") from error
    if not file_sha256(path).startswith(SHA256_START):
        raise ExpectedError(f"{path} is not the canonical file; {wanted}")
    return path
