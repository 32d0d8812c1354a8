"""The two-sample test: can a small network, trained for this alone, tell samples from real digits?

Lopez-Paz & Oquab 2017, "Revisiting Classifier Two-Sample Tests", arXiv 1610.06545. The network sees pixels. So it finds
what the features of a digit classifier leave out, such as a haze of one grey level. Its accuracy on images that it has not
seen is the figure: 0.5 for samples that cannot be told from real digits, 1 for samples that always can.

Network, budget and seed are fixed, so that figures can be compared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import to_model_range
from utils import keyed_generator

TRAIN = 12_000  # images of each side that the network learns from
JUDGED = 4_000  # others of each side, on which it is judged
NEEDED = TRAIN + JUDGED
EPOCHS = 6
BATCH = 100
LEARNING_RATE = 2e-3
NOISE = 8  # grey levels: the deviation of the noise that hides single levels, but no stroke
CHUNK = 500


class TwoSample(NamedTuple):
    """Accuracies in 0..1: of the images as they are, and with noise. Their standard error is 0.0056 at 0.5."""

    plain: float
    noisy: float

    @property
    def accuracy(self) -> float:
        """The larger one: what either way of looking can tell."""
        return max(self)


def two_sample_test(samples: Tensor, real: Tensor, seed: int = 0) -> TwoSample:
    """Train a network on 12,000 of either side, and judge it on 4,000 others.

    Args:
        samples, real: uint8 [N, 1, 28, 28] on one device, at least 16,000 each. Only the first 16,000 count. Their order
            must be random.

    Raises:
        ValueError: too few images.
    """
    if min(len(samples), len(real)) < NEEDED:
        raise ValueError(f"the two-sample test needs {NEEDED} images of each side, not {len(samples)} and {len(real)}")
    return TwoSample(*(_accuracy(samples[:NEEDED], real[:NEEDED], noise, seed) for noise in (0, NOISE)))


def _network() -> nn.Module:
    """[B, 1, 28, 28] -> logit [B, 1], positive for real digits."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 4, stride=2, padding=1),  # [B, 32, 14, 14]
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),  # [B, 64, 7, 7]
        nn.BatchNorm2d(64),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 128),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.3),
        nn.Linear(128, 1),
    )


def _accuracy(samples: Tensor, real: Tensor, noise: float, seed: int) -> float:
    """The accuracy on the judged images of a network trained on the others."""
    images = torch.cat([samples[:TRAIN], real[:TRAIN]])
    judged = torch.cat([samples[TRAIN:], real[TRAIN:]])
    device = images.device
    is_real = (torch.arange(len(images), device=device) >= TRAIN).float()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        network: nn.Module = _network().to(device)
        optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
        steps = EPOCHS * (len(images) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
        for epoch in range(EPOCHS):
            order = torch.randperm(len(images), generator=keyed_generator("cpu", seed, "two-sample", epoch)).to(device)
            for rows in order.split(BATCH):
                logits = network(_seen(images[rows], noise)).squeeze(1)
                loss = F.binary_cross_entropy_with_logits(logits, is_real[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        network.eval()
        with torch.no_grad():
            logits = torch.cat([network(_seen(chunk, noise)).squeeze(1) for chunk in judged.split(CHUNK)])
    truth = torch.arange(len(judged), device=device) >= JUDGED
    return float(((logits > 0) == truth).float().mean())


def _seen(images: Tensor, noise: float) -> Tensor:
    """uint8 [B, 1, 28, 28] -> float [B, 1, 28, 28] in about [-1, 1], with Gaussian noise of so many grey levels."""
    seen = to_model_range(images).contiguous(memory_format=torch.channels_last)
    return seen + noise / 127.5 * torch.randn_like(seen) if noise else seen
