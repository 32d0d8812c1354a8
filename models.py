"""The generators and discriminators, their configs, and the registry that checkpoints and scripts build networks from.

Images are float [B, 1, 28, 28] in [-1, 1]. Labels are int64 [B] in 0..num_classes-1. Every checkpoint holds its config, so
sampling needs no architecture flags. Every generator has `config.num_classes` and one sampling method:

    generator.sample(n, labels=None, rng=None, *, chunk_size=..., rows=slice(None), **options) -> float32 [n, 1, 28, 28]

It samples in eval mode. Each network evaluation is a call of the generator itself, so that hooks can count them.

    labels: integers [n], the classes to draw, in anything that `torch.as_tensor` takes; or one integer for all images.
        None: an unconditional model has none, the conditional DCGAN draws them uniformly, the DDPM samples its null class.
    rng: CPU generator, of which one key is drawn. None: torch's global one.
    chunk_size: images in a forward pass. It bounds the memory.
    rows: which of the n images to compute and return, a slice of step 1.
    options: those named in the class's `SAMPLE_OPTIONS`. A class that has any also has `sample_options(with_labels,
        **options)`, which fills in the defaults, and `evaluations(**options)`, the network evaluations of one image with
        options that were filled in.

All noise is keyed by that key and the image's position. So image i is the same picture whatever n, `chunk_size`, `rows` and
the other labels are. Its pixels differ by rounding: by a grey level at most in fp32.

The network computes in its own dtype. `sample` raises `ValueError` for n below 1, labels of a wrong shape, type or class,
and options out of their bounds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from diffusion import process, samplers
from diffusion.options import OPTION_NAMES, SamplingOptions
from networks.checks import check_choice, check_int, check_number, checked_labels, evaluating
from networks.classifier import ClassifierConfig, DigitClassifier
from networks.unet import UNet
from utils import SamplingNoise, autocast, sampling_key

NORMS = ("batch", "spectral", "none")
CHUNK_SIZE = {"cpu": 250, "mps": 250, "cuda": 2000}  # images of one evaluation in diffusion sampling, see docs/speed.md


class BlackGap:
    """The map between images in [-1, 1] and images as a network with `config.black` learns them."""

    config: Any

    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] as the network learns them: their black pixels, exactly -1, become `config.black`.

        The gap below -1 keeps black black. Where the network errs by a grey level or two, `decode` still gives -1.
        """
        return images.masked_fill(images == -1, self.config.black)

    def decode(self, images: Tensor) -> Tensor:
        """The inverse of `encode`: what lies in the gap is black."""
        return images.clamp(-1, 1)


# --------------------------------------------------------------------------------------------------------------------
# DCGAN (Radford et al. 2016), unconditional (num_classes = 0) or class-conditional


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """`width`: channels are 4, 2 and 1 times the width at 7x7, 14x14 and 28x28. `num_classes=0`: unconditional.

    `black`: see `BlackGap`.
    """

    latent_dim: int = 100
    width: int = 64
    num_classes: int = 0
    black: float = -1.0

    def __post_init__(self) -> None:
        check_int(self, "latent_dim", 1, 4096)
        check_int(self, "width", 1, 512)
        check_int(self, "num_classes", 0, 1000)
        check_number(self, "black", -2, -1)


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """The mirror image of the generator. `norm`: `batch` (DCGAN), `spectral` (Miyato et al. 2018) or `none`."""

    width: int = 64
    num_classes: int = 0
    norm: str = "batch"

    def __post_init__(self) -> None:
        check_int(self, "width", 1, 512)
        check_int(self, "num_classes", 0, 1000)
        check_choice(self, "norm", NORMS)


class ClassBatchNorm2d(nn.Module):
    """Batch normalisation with a gain and bias for each class (Dumoulin et al. 2017). Plain BatchNorm2d for 0 classes."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=num_classes == 0)
        if num_classes:
            self.gain = nn.Embedding(num_classes, channels)
            self.bias = nn.Embedding(num_classes, channels)
            nn.init.ones_(self.gain.weight)
            nn.init.zeros_(self.bias.weight)
        self.num_classes = num_classes

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        x = self.norm(x)  # [B, C, H, W]
        if self.num_classes:
            # In the type of x: a gain of float32 would turn bf16 into float32
            gain = self.gain(labels)[:, :, None, None].to(x.dtype)
            bias = self.bias(labels)[:, :, None, None].to(x.dtype)
            x = torch.addcmul(bias, x, gain)
        return x


class Generator(BlackGap, nn.Module):
    """DCGAN generator: latent [B, latent_dim] ~ N(0, I) -> image [B, 1, 28, 28] in [black, 1], at 7 -> 14 -> 28 pixels.

    The paper's transposed convolutions, with a residual 3x3 convolution at 7x7 and at 14x14. At equal cost, another layer
    helps more than more channels: strokes have to agree over the whole digit. The class acts on every normalisation. It also
    acts on the first layer, as if its one-hot vector were part of the latent (Mirza & Osindero 2014).
    """

    SAMPLE_OPTIONS: tuple[str, ...] = ()

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        w = config.width
        k = config.num_classes
        # A linear layer is the transposed convolution of a 1x1 input, without the convolution's overhead.
        self.stem = nn.Linear(config.latent_dim, 4 * w * 7 * 7)
        self.stem_class = nn.Embedding(k, 4 * w * 7 * 7) if k else None
        self.norm7a = ClassBatchNorm2d(4 * w, k)
        self.conv7 = nn.Conv2d(4 * w, 4 * w, 3, padding=1)
        self.norm7b = ClassBatchNorm2d(4 * w, k)
        self.up14 = nn.ConvTranspose2d(4 * w, 2 * w, 4, stride=2, padding=1)
        self.norm14a = ClassBatchNorm2d(2 * w, k)
        self.conv14 = nn.Conv2d(2 * w, 2 * w, 3, padding=1)
        self.norm14b = ClassBatchNorm2d(2 * w, k)
        self.up28 = nn.ConvTranspose2d(2 * w, w, 4, stride=2, padding=1)
        self.norm28 = ClassBatchNorm2d(w, k)
        self.conv28 = nn.Conv2d(w, 1, 3, padding=1)
        self.apply(_init_weights)
        if self.stem_class is not None:
            nn.init.zeros_(self.stem_class.weight)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.stem(z)  # [B, 7 * 7 * 4w]
        if self.stem_class is not None:
            x = x + self.stem_class(labels)
        x = x.unflatten(1, (7, 7, -1)).permute(0, 3, 1, 2)  # [B, 4w, 7, 7], channels last in memory
        x = x + self.conv7(F.relu(self.norm7a(x, labels)))  # [B, 4w, 7, 7]
        x = self.up14(F.relu(self.norm7b(x, labels)))  # [B, 2w, 14, 14]
        x = x + self.conv14(F.relu(self.norm14a(x, labels)))  # [B, 2w, 14, 14]
        x = self.up28(F.relu(self.norm14b(x, labels)))  # [B, w, 28, 28]
        x = self.conv28(F.relu(self.norm28(x, labels)))  # [B, 1, 28, 28]
        middle = (1 + self.config.black) / 2
        return middle + (1 - middle) * torch.tanh(x.float())

    @torch.no_grad()
    def sample(
        self,
        n: int,
        labels: Any = None,
        rng: torch.Generator | None = None,
        *,
        chunk_size: int = 500,
        rows: slice = slice(None),
    ) -> Tensor:
        """Draw `n` images, as described at the head of this file."""
        labels = checked_labels(n, labels, self.config.num_classes, chunk_size)
        noise = SamplingNoise(sampling_key(rng), "start", range(n)[rows], "cpu")
        inputs = [noise.normal(self.config.latent_dim).to(self.stem.weight.dtype)]
        if self.config.num_classes:
            inputs.append(noise.integers(self.config.num_classes) if labels is None else labels[rows])
        with evaluating(self) as device:
            chunks = zip(*(tensor.to(device).split(chunk_size) for tensor in inputs))
            return torch.cat([self.decode(self(*chunk)) for chunk in chunks])


class Discriminator(nn.Module):
    """DCGAN discriminator: image [B, 1, 28, 28] -> logit [B], large for real images. Labels [K, B] give logits [K, B].

    With classes it is a projection discriminator (Miyato & Koyama 2018, eq. 3): the logit gains the inner product of the
    class embedding and the features of the last layer. Unlike in the paper, the features are not summed over positions: the
    position of a stroke tells digits apart.
    """

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.config = config
        w = config.width
        self.conv28 = nn.Conv2d(1, w, 3, padding=1)
        self.down14 = nn.Conv2d(w, 2 * w, 4, stride=2, padding=1)
        self.norm14a = self._norm(2 * w)
        self.conv14 = nn.Conv2d(2 * w, 2 * w, 3, padding=1)
        self.norm14b = self._norm(2 * w)
        self.down7 = nn.Conv2d(2 * w, 4 * w, 4, stride=2, padding=1)
        self.norm7a = self._norm(4 * w)
        self.conv7 = nn.Conv2d(4 * w, 4 * w, 3, padding=1)
        self.norm7b = self._norm(4 * w)
        self.head = nn.Linear(4 * w * 7 * 7, 1)
        self.embed = nn.Embedding(config.num_classes, 4 * w * 7 * 7) if config.num_classes else None
        self.apply(_init_weights)
        if self.embed is not None:
            nn.init.kaiming_normal_(self.embed.weight, a=0.2)  # like the head, which is its unconditional part
        if config.norm == "spectral":
            for layer in [m for m in self.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))]:
                spectral_norm(layer)

    def _norm(self, channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels) if self.config.norm == "batch" else nn.Identity()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.down14(F.leaky_relu(self.conv28(x), 0.2))  # [B, 2w, 14, 14]
        x = x + self.conv14(F.leaky_relu(self.norm14a(x), 0.2))  # [B, 2w, 14, 14]
        x = self.down7(F.leaky_relu(self.norm14b(x), 0.2))  # [B, 4w, 7, 7]
        x = x + self.conv7(F.leaky_relu(self.norm7a(x), 0.2))  # [B, 4w, 7, 7]
        x = F.leaky_relu(self.norm7b(x), 0.2)
        x = x.permute(0, 2, 3, 1).flatten(1)  # [B, 7 * 7 * 4w]; channels last, so no copy
        logit = self.head(x).squeeze(1)  # [B]
        if self.embed is not None:
            logit = logit + (self.embed(labels) * x).sum(-1)  # [B] or [K, B]
        return logit.float()


def _init_weights(module: nn.Module) -> None:
    """Normal weights of He et al. 2015, eq. 15, with the slope of the leaky ReLUs. Biases are zero."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, a=0.2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# --------------------------------------------------------------------------------------------------------------------
# DDPM (Ho et al. 2020), unconditional and class-conditional in one network


@dataclasses.dataclass(frozen=True)
class DDPMConfig:
    """`width`: channels of the U-Net at 28x28. `num_classes=0`: unconditional. `black`: see `BlackGap`.

    The others: see diffusion/process.py.
    """

    width: int = 16
    num_classes: int = 10
    timesteps: int = 1000
    schedule: str = "cosine"
    prediction: str = "v"
    black: float = -1.0

    def __post_init__(self) -> None:
        check_int(self, "width", 8, 128, step=8)
        check_int(self, "num_classes", 0, 1000)
        check_int(self, "timesteps", 2, 100_000)
        check_choice(self, "schedule", process.SCHEDULES)
        check_choice(self, "prediction", process.PREDICTIONS)
        check_number(self, "black", -2, -1)


class DDPM(BlackGap, nn.Module):
    """A U-Net with its noise schedule. The null class, number `num_classes`, stands for unconditional predictions."""

    SAMPLE_OPTIONS = (*OPTION_NAMES, "watch")

    alpha: Tensor
    sigma: Tensor

    def __init__(self, config: DDPMConfig):
        super().__init__()
        self.config = config
        self.unet = UNet(config.width, config.num_classes)
        self.levels = process.noise_levels(config.schedule, config.timesteps)
        for name in ("alpha", "sigma"):  # not saved: they follow from the config
            self.register_buffer(name, torch.tensor([getattr(level, name) for level in self.levels]), persistent=False)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """The prediction [B, 1, 28, 28] for noisy x at times int64 [B], with labels int64 [B] in 0..num_classes."""
        return self.unet(x, time * (1000 / self.config.timesteps), labels)

    def denoise(self, x: Tensor, level: process.Level, labels: Tensor, guidance: float = 1.0) -> Tensor:
        """The network's estimate of x0, in [black, 1], for x [B, 1, 28, 28] at a noise level. The samplers call it.

        Guidance scale w gives u + w (c - u), where c is the prediction for the labels and u that for the null class (Ho &
        Salimans 2022, eq. 6, whose w is ours minus 1). So 0 is u, and 1 is c. Another scale takes two evaluations within
        `samplers.GUIDANCE_RANGE`, and is c outside.
        """
        time = torch.full((len(x),), level.time, device=x.device)
        null = torch.full_like(labels, self.config.num_classes)
        if samplers.evaluations(level, guidance) == 1:
            output = self(x, time, null if guidance == 0 else labels)
        else:
            both = self(x.repeat(2, 1, 1, 1), time.repeat(2), torch.cat([null, labels]))
            unconditional, conditional = both.chunk(2)
            output = torch.lerp(unconditional, conditional, guidance)
        x0 = process.clean_estimate(self.config.prediction, output, x, level.alpha, level.sigma)
        return x0.clamp(self.config.black, 1)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        labels: Any = None,
        rng: torch.Generator | None = None,
        *,
        chunk_size: int | None = None,
        watch: Callable[[Tensor, process.Level], None] | None = None,
        rows: slice = slice(None),
        **options: Any,
    ) -> Tensor:
        """Draw `n` images, as described at the head of this file.

        Args:
            chunk_size: by default as many images as are fast on the device.
            watch: called with x [chunk, 1, 28, 28] and its level before every evaluation.
            options: fields of `SamplingOptions`.
        """
        chunk_size = CHUNK_SIZE[self.alpha.device.type] if chunk_size is None else chunk_size
        labels = checked_labels(n, labels, self.config.num_classes, chunk_size)
        chosen = self._resolved(labels is not None, **options)
        guidance = chosen.guidance if labels is not None else 1.0
        grid = samplers.GRIDS[chosen.sampler](self.levels, chosen.steps)
        stochasticity = {"eta": chosen.eta} if chosen.eta else {}
        if labels is None:
            labels = torch.full((n,), self.config.num_classes)
        elif guidance and chosen.sampler == "dpm-solver++":
            stochasticity["renewed_below"] = float("inf")  # a given digit cannot be drawn too often, see dpm_solver
        key = sampling_key(rng)
        with evaluating(self) as device, autocast(device, chosen.precision):
            labels = labels[rows].to(device)
            start = SamplingNoise(key, "start", range(n)[rows], "cpu").normal(1, 28, 28).to(device)
            steps = SamplingNoise(key, "steps", range(n)[rows], device)

            def denoise(x: Tensor, level: process.Level) -> Tensor:
                clean = torch.empty_like(x)
                for images, classes, estimate in zip(*(tensor.split(chunk_size) for tensor in (x, labels, clean))):
                    if watch:
                        watch(images, level)
                    estimate.copy_(self.denoise(images, level, classes, guidance))
                return clean

            normal = functools.partial(steps.normal, 1, 28, 28)
            return self.decode(samplers.SAMPLERS[chosen.sampler](denoise, start, grid, normal, **stochasticity))

    def _resolved(self, with_labels: bool, **options: Any) -> SamplingOptions:
        return SamplingOptions(**options).resolved(self.config.timesteps, self.config.num_classes, with_labels)

    def sample_options(self, with_labels: bool = False, **options: Any) -> dict[str, Any]:
        """The fields of `SamplingOptions` with the defaults filled in. Errors as for `sample`."""
        return dataclasses.asdict(self._resolved(with_labels, **options))

    def evaluations(self, **options: Any) -> int:
        """Network evaluations of one image, sampled with these options. Those left out have their unconditional defaults."""
        chosen = self._resolved(False, **options)
        grid = samplers.GRIDS[chosen.sampler](self.levels, chosen.steps)
        return sum(samplers.evaluations(level, chosen.guidance) for level in grid[:-1])


# --------------------------------------------------------------------------------------------------------------------
# Registry: the name in a checkpoint -> (config class, network class). Only networks with `sample` are generators.

MODELS: dict[str, tuple[Any, Any]] = {
    "dcgan": (GeneratorConfig, Generator),
    "cdcgan": (GeneratorConfig, Generator),
    "ddpm": (DDPMConfig, DDPM),
    "dcgan_discriminator": (DiscriminatorConfig, Discriminator),
    "cdcgan_discriminator": (DiscriminatorConfig, Discriminator),
    "classifier": (ClassifierConfig, DigitClassifier),
}


def build(name: str, **config: Any) -> Any:
    """A freshly initialised network of the registry.

    Raises:
        ValueError: an unknown name, or an option that the config lacks or that is out of bounds.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(MODELS)}")
    config_class, network = MODELS[name]
    known = config_class.__dataclass_fields__.keys()
    if unknown := config.keys() - known:
        raise ValueError(f"{name} has no option {', '.join(sorted(map(str, unknown)))}; it has {', '.join(sorted(known))}")
    return network(config_class(**config))
