"""The U-Net of the diffusion model: a noisy image, its time and class in; an image-shaped prediction out."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils import autocast

GROUPS = 8  # of every GroupNorm, so widths are multiples of it
HEAD_CHANNELS = 64  # of an attention head, or the largest divisor of it that divides the channels


class UNet(nn.Module):
    """A U-Net over 28x28, 14x14 and 7x7 pixels with `width`, 4 `width` and 10 `width` channels (Ho et al. 2020).

    Time and class are embedded, added, and act on every residual block. Most channels and the self-attention are at 7x7,
    where channels are cheapest: there the strokes come to agree over the whole digit. At 28x28 a channel costs sixteen times
    as much. So there is one block on either side, and the skip connection is added: concatenation would double the channels.

    Args:
        width: a multiple of 8.
        num_classes: labels run over 0..num_classes. The last one is the null class of unconditional predictions.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        fine = width
        medium = 4 * width
        coarse = 10 * width
        condition = coarse
        self.time = nn.Sequential(nn.Linear(condition, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.label = nn.Embedding(num_classes + 1, condition)
        # Down: 28 -> 14 -> 7 pixels
        self.stem = nn.Conv2d(1, fine, 3, padding=1)
        self.enter28 = ResBlock(fine, fine, condition)
        self.down14 = nn.Conv2d(fine, medium, 3, stride=2, padding=1)
        self.enter14 = nn.ModuleList([ResBlock(medium, medium, condition) for _ in range(2)])
        self.down7 = nn.Conv2d(medium, coarse, 3, stride=2, padding=1)
        # Middle, at 7 pixels
        self.middle = nn.ModuleList(
            [
                ResBlock(coarse, coarse, condition),
                Attention(coarse),
                ResBlock(coarse, coarse, condition),
                Attention(coarse),
                ResBlock(coarse, coarse, condition),
            ]
        )
        # Up: 7 -> 14 -> 28 pixels
        self.up14 = nn.ConvTranspose2d(coarse, medium, 4, stride=2, padding=1)
        self.leave14 = nn.ModuleList([ResBlock(2 * medium, medium, condition) for _ in range(2)])
        self.up28 = nn.ConvTranspose2d(medium, fine, 4, stride=2, padding=1)
        self.leave28 = ResBlock(fine, fine, condition)
        self.norm = nn.GroupNorm(GROUPS, fine)
        self.head = nn.Conv2d(fine, 1, 3, padding=1)
        nn.init.normal_(self.label.weight, std=0.02)
        _start_at_zero(self.head)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """Images [B, 1, 28, 28], times [B] in 0..1000 and labels int64 [B] -> float32 [B, 1, 28, 28]."""
        with autocast(x.device, "fp32"):  # bf16 would blur neighbouring times into one
            times = sinusoids(time, self.label.embedding_dim).to(self.label.weight.dtype)
            condition = self.time(times) + self.label(labels)
            condition = F.silu(condition)  # [B, 10w]
        x = x.to(self.stem.weight.dtype)
        fine = self.enter28(self.stem(x), condition)  # [B, w, 28, 28]
        x = self.down14(fine)  # [B, 4w, 14, 14]
        medium = []
        for block in self.enter14:
            x = block(x, condition)  # [B, 4w, 14, 14]
            medium.append(x)
        x = self.down7(x)  # [B, 10w, 7, 7]
        for block in self.middle:
            x = block(x, condition)  # [B, 10w, 7, 7]
        x = self.up14(x)  # [B, 4w, 14, 14]
        for block in self.leave14:
            x = block(torch.cat([x, medium.pop()], 1), condition)  # [B, 8w, 14, 14] -> [B, 4w, 14, 14]
        x = self.leave28(self.up28(x) + fine, condition)  # [B, w, 28, 28]
        return self.head(F.silu(self.norm(x))).float()  # [B, 1, 28, 28]


class ResBlock(nn.Module):
    """Two convolutions beside a skip: x [B, inputs, H, W] and a condition [B, condition] -> [B, outputs, H, W].

    The condition scales and shifts the second normalisation (Dhariwal & Nichol 2021, section 3). The second convolution
    starts at zero, so the block starts as its skip.
    """

    def __init__(self, inputs: int, outputs: int, condition: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.condition = nn.Linear(condition, 2 * outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        _start_at_zero(self.conv2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.condition(condition)[:, :, None, None].chunk(2, 1)  # [B, outputs, 1, 1] each
        h = self.conv1(F.silu(self.norm1(x)))  # [B, outputs, H, W]
        h = self.norm2(h) * (1 + scale) + shift  # [B, outputs, H, W]
        return self.skip(x) + self.conv2(F.silu(h))


class Attention(nn.Module):
    """Multi-head self-attention over pixels beside a skip: x [B, C, H, W] -> the same shape. It starts as its skip."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = channels // math.gcd(channels, HEAD_CHANNELS)
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        _start_at_zero(self.out)

    def forward(self, x: Tensor, _condition: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, HW, C / heads]
        # Written out: for so few tokens the fused kernel gains nothing, and on a CPU its bf16 backward is 5 times slower.
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)  # [B, heads, HW, HW]
        mixed = (weights @ v).transpose(1, 2).flatten(2)  # [B, HW, C]
        return x + self.out(mixed).transpose(1, 2).unflatten(2, x.shape[2:])


def _start_at_zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def sinusoids(time: Tensor, channels: int) -> Tensor:
    """Times [B] in 0..1000 -> [B, channels] of cosines and sines (Vaswani et al. 2017, section 3.5)."""
    frequencies = torch.exp(-math.log(10_000) / (channels // 2) * torch.arange(channels // 2, device=time.device))
    angles = time[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)
