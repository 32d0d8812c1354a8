"""The networks, their configuration dataclasses and the registry that checkpoints and scripts build them from.

Images are float [B, 1, 28, 28] in [-1, 1]; labels are int64 [B] in 0..num_classes-1. A config is carried in every
checkpoint, so sampling needs no architecture flags. Every generator has `config.num_classes`, and is sampled in one way:

    generator.sample(n, labels=None, rng=None, *, chunk_size=..., rows=slice(None), **options) -> float32 [n, 1, 28, 28]

in [-1, 1], in eval mode; each network evaluation is a call of the generator itself.

    labels: int64 [n], the classes to draw; None where the model has none, or is free to choose.
    rng: CPU generator of all randomness; None uses torch's global one.
    chunk_size: images per forward pass; it bounds the memory and does not change the noise.
    rows: which of the n images are computed and returned; they do not depend on it.
    options: those that its class names in `SAMPLE_OPTIONS`. Where there are any, `sample_options(asked=False, **options)`
        fills in the defaults (`asked`: with labels), and `evaluations(**options)` says how many an image takes.

It raises `ValueError` for an `n` below 1, labels of a wrong shape or outside its classes, and options out of their bounds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import diffusion
from classifier import ClassifierConfig, DigitClassifier
from interface import check_bounds, check_choice, check_int, check_option, check_request, evaluating
from unet import UNet
from utils import autocast

NORMS, PRECISIONS = ("batch", "spectral", "none"), ("fp32", "bf16")
DEFAULT_STEPS, DEFAULT_ETA, DIGIT_ETA = 15, 2.5, 0.8  # by benchmarks/samplers.py; eta for any digit, for one on demand
MAX_ETA = {"dpm-solver++": 10.0, "ddim": 1.0, "ddpm": 0.0}
MAX_GUIDANCE = 100  # far beyond where samples are still digits
CHUNK_SIZE = {"cpu": 250, "cuda": 2000}  # images in an evaluation, see benchmarks/README.md


# --------------------------------------------------------------------------------------------------------------------
# DCGAN (Radford et al. 2016), unconditional (num_classes = 0) or conditional


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """`width` is the number of channels per unit: 4, 2 units at 7x7, 14x14. `num_classes=0` is unconditional."""

    latent_dim: int = 100
    width: int = 64
    num_classes: int = 0

    def __post_init__(self):
        check_int(self, "latent_dim", 1, 4096)
        check_int(self, "width", 1, 512)
        check_int(self, "num_classes", 0, 1000)


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Mirror of the generator. `norm`: `batch` (DCGAN), `spectral` (Miyato et al. 2018) or `none`."""

    width: int = 64
    num_classes: int = 0
    norm: str = "batch"

    def __post_init__(self):
        check_int(self, "width", 1, 512)
        check_int(self, "num_classes", 0, 1000)
        check_choice(self, "norm", NORMS)


class ClassBatchNorm2d(nn.Module):
    """Batch normalisation with a gain and bias per class (Dumoulin et al. 2017); plain BatchNorm2d for 0 classes."""

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
            gain, bias = (table(labels)[:, :, None, None].to(x.dtype) for table in (self.gain, self.bias))
            x = torch.addcmul(bias, x, gain)
        return x


class Generator(nn.Module):
    """DCGAN generator: latent [B, latent_dim] ~ N(0, I) -> image [B, 1, 28, 28] in [-1, 1], at 7 -> 14 -> 28 pixels.

    The paper's transposed convolutions, with a residual 3x3 convolution at 7x7 and at 14x14: at equal cost, depth
    pays more than width, because strokes have to agree over the whole digit. A class acts on every normalisation, and
    on the first layer as if its one-hot vector were part of the latent (Mirza & Osindero 2014).
    """

    SAMPLE_OPTIONS = ()

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        w, k = config.width, config.num_classes
        # A linear layer is the transposed convolution of a 1x1 input, without the convolution's overhead.
        self.stem = nn.Linear(config.latent_dim, 4 * w * 7 * 7)
        self.stem_class = nn.Embedding(k, 4 * w * 7 * 7) if k else None
        self.norm7a, self.conv7 = ClassBatchNorm2d(4 * w, k), nn.Conv2d(4 * w, 4 * w, 3, padding=1)
        self.norm7b, self.up14 = ClassBatchNorm2d(4 * w, k), nn.ConvTranspose2d(4 * w, 2 * w, 4, stride=2, padding=1)
        self.norm14a, self.conv14 = ClassBatchNorm2d(2 * w, k), nn.Conv2d(2 * w, 2 * w, 3, padding=1)
        self.norm14b, self.up28 = ClassBatchNorm2d(2 * w, k), nn.ConvTranspose2d(2 * w, w, 4, stride=2, padding=1)
        self.norm28, self.conv28 = ClassBatchNorm2d(w, k), nn.Conv2d(w, 1, 3, padding=1)
        self.apply(_init_weights)
        if k:
            nn.init.zeros_(self.stem_class.weight)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.stem(z)
        if self.stem_class is not None:
            x = x + self.stem_class(labels)
        x = x.unflatten(1, (7, 7, -1)).permute(0, 3, 1, 2)  # [B, 4w, 7, 7], channels last in memory
        x = x + self.conv7(F.relu(self.norm7a(x, labels)))
        x = self.up14(F.relu(self.norm7b(x, labels)))  # [B, 2w, 14, 14]
        x = x + self.conv14(F.relu(self.norm14a(x, labels)))
        x = self.up28(F.relu(self.norm14b(x, labels)))  # [B, w, 28, 28]
        x = self.conv28(F.relu(self.norm28(x, labels)))  # [B, 1, 28, 28]
        return torch.tanh(x.float())

    @torch.no_grad()
    def sample(
        self,
        n: int,
        labels: Tensor | None = None,
        rng: torch.Generator | None = None,
        *,
        chunk_size: int = 500,
        rows: slice = slice(None),
    ) -> Tensor:
        """Draw `n` images, as described above; without `labels`, a model with classes draws those from `rng`, uniformly."""
        check_request(n, labels, self.config.num_classes, chunk_size)
        z = torch.randn(n, self.config.latent_dim, generator=rng)
        if labels is None and self.config.num_classes:
            labels = torch.randint(self.config.num_classes, (n,), generator=rng)
        with evaluating(self) as device:
            inputs = (tensor[rows].to(device).split(chunk_size) for tensor in (z, labels) if tensor is not None)
            return torch.cat([self(*chunk) for chunk in zip(*inputs)])


class Discriminator(nn.Module):
    """DCGAN discriminator: image [B, 1, 28, 28] -> logit [B] (large: real); with labels [K, B], K logits for each image.

    With classes, a projection discriminator (Miyato & Koyama 2018, eq. 3): the logit gains the inner product of the class
    embedding with the features that the last layer sees. They are not sum-pooled as in the paper: where a stroke lies
    is what tells digits apart.
    """

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        self.config = config
        w = config.width
        self.conv28 = nn.Conv2d(1, w, 3, padding=1)
        self.down14, self.norm14a = nn.Conv2d(w, 2 * w, 4, stride=2, padding=1), self._norm(2 * w)
        self.conv14, self.norm14b = nn.Conv2d(2 * w, 2 * w, 3, padding=1), self._norm(2 * w)
        self.down7, self.norm7a = nn.Conv2d(2 * w, 4 * w, 4, stride=2, padding=1), self._norm(4 * w)
        self.conv7, self.norm7b = nn.Conv2d(4 * w, 4 * w, 3, padding=1), self._norm(4 * w)
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
        x = x + self.conv14(F.leaky_relu(self.norm14a(x), 0.2))
        x = self.down7(F.leaky_relu(self.norm14b(x), 0.2))  # [B, 4w, 7, 7]
        x = x + self.conv7(F.leaky_relu(self.norm7a(x), 0.2))
        x = F.leaky_relu(self.norm7b(x), 0.2)
        x = x.permute(0, 2, 3, 1).flatten(1)  # [B, 7 * 7 * 4w]; channels last, so no copy
        logit = self.head(x).squeeze(1)
        if self.embed is not None:
            logit = logit + (self.embed(labels) * x).sum(-1)
        return logit.float()


def _init_weights(module: nn.Module) -> None:
    """Normal weights of He et al. 2015, eq. 15, with the slope of the leaky ReLUs; the biases are zero."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, a=0.2)
        nn.init.zeros_(module.bias)


# --------------------------------------------------------------------------------------------------------------------
# DDPM (Ho et al. 2020): unconditional and class-conditional in one network


@dataclasses.dataclass(frozen=True)
class DDPMConfig:
    """`width`: channels of the U-Net at 28x28; the others: see diffusion.py. `num_classes=0` is unconditional."""

    width: int = 16
    num_classes: int = 10
    timesteps: int = 1000
    schedule: str = "cosine"
    prediction: str = "v"

    def __post_init__(self):
        check_int(self, "width", 8, 128, step=8)
        check_int(self, "num_classes", 0, 1000)
        check_int(self, "timesteps", 2, 100_000)
        check_choice(self, "schedule", diffusion.SCHEDULES)
        check_choice(self, "prediction", diffusion.PREDICTIONS)


class DDPM(nn.Module):
    """A U-Net and its noise schedule. The null class, `num_classes`, stands for "any digit"."""

    SAMPLE_OPTIONS = ("sampler", "steps", "guidance", "eta", "precision", "watch")

    def __init__(self, config: DDPMConfig):
        super().__init__()
        self.config = config
        self.unet = UNet(config.width, config.num_classes)
        self.levels = diffusion.noise_levels(config.schedule, config.timesteps)
        for name in ("alpha", "sigma"):  # they follow from the config
            self.register_buffer(name, torch.tensor([getattr(level, name) for level in self.levels]), persistent=False)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """The network's prediction, [B, 1, 28, 28], for noisy x at times int64 [B] and labels [B] in 0..num_classes."""
        return self.unet(x, time * (1000 / self.config.timesteps), labels)

    def examples(
        self,
        images: Tensor,
        labels: Tensor,
        rng: torch.Generator,
        label_dropout: float = 0.0,
        time_power: float = 1.0,
        expected: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """What `loss` takes, (x_t, times [B], labels or null [B], targets), of images [B, 1, 28, 28] in [-1, 1], labels [B].

        Args:
            rng: generator on the images' device, of times, noise and dropped labels.
            label_dropout: the share of labels replaced by the null class (Ho & Salimans 2022, algorithm 1).
            time_power: how the times are distributed, see `diffusion.stratified_times`.
            expected: (x_t, x0, labels or null, alpha, sigma) -> the x0 to aim at instead, see denoising.StableTargets.
        """
        time = diffusion.stratified_times(len(images), self.config.timesteps, rng, time_power)  # [B]
        alpha, sigma = (levels[time][:, None, None, None] for levels in (self.alpha, self.sigma))  # [B, 1, 1, 1]
        eps = torch.randn(images.shape, generator=rng, device=images.device)
        share = label_dropout if self.config.num_classes else 1.0
        dropped = torch.rand(len(labels), generator=rng, device=images.device) < share  # rand is below 1
        labels = labels.masked_fill(dropped, self.config.num_classes)
        x = diffusion.diffuse(images, eps, alpha, sigma)
        if expected:
            mean = expected(x, images, labels, alpha, sigma)
            images, eps = mean, eps + alpha / sigma * (images - mean)  # that mix to the same x
        return x, time, labels, diffusion.target(self.config.prediction, images, eps, alpha, sigma)

    def loss(self, x: Tensor, time: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of the prediction for such examples, scalar (Ho et al. 2020, eq. 14)."""
        return F.mse_loss(self(x, time, labels), target)

    def denoise(self, x: Tensor, level: diffusion.Level, labels: Tensor, guidance: float = 1.0) -> Tensor:
        """The network's estimate of x0, in [-1, 1], for x at a noise level: what the samplers call.

        Guidance w gives u + w (c - u), from the predictions c for the labels and u for the null class (Ho & Salimans 2022,
        eq. 6, whose w is ours minus 1): 0 is u, 1 is c. Any other costs both in diffusion.GUIDANCE_RANGE, and is c outside.
        """
        time = torch.full((len(x),), level.time, device=x.device)
        null = torch.full_like(labels, self.config.num_classes)
        if diffusion.evaluations(level, guidance) == 1:
            output = self(x, time, null if guidance == 0 else labels)
        else:
            both = self(x.repeat(2, 1, 1, 1), time.repeat(2), torch.cat([null, labels]))
            output = torch.lerp(*both.chunk(2), guidance)
        return diffusion.clean_estimate(self.config.prediction, output, x, level.alpha, level.sigma).clamp(-1, 1)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        labels: Tensor | None = None,
        rng: torch.Generator | None = None,
        *,
        sampler: str = "dpm-solver++",
        steps: int | None = None,
        guidance: float = 1.0,
        eta: float | None = None,
        precision: str = "fp32",
        chunk_size: int | None = None,
        watch: Callable[[Tensor, diffusion.Level], None] | None = None,
        rows: slice = slice(None),
    ) -> Tensor:
        """Draw `n` images, as described above; without `labels`, of the null class.

        Args:
            sampler: `dpm-solver++`, `ddim` or `ddpm` (ancestral).
            steps: network evaluations (pairs of them where guidance acts); by default 15, and every timestep for `ddpm`.
            guidance: strength w of classifier-free guidance, see `denoise`; at most 100.
            eta: how much noise a step renews: 0 is deterministic, 1 is as in `ddpm`. At most 10; by default DIGIT_ETA with
                labels, DEFAULT_ETA without, and then below diffusion.RENEWED_BELOW; of `ddim` at most 1, by default 0.
            precision: of the network's evaluations: `fp32`, or `bf16`, which is faster where the device has it.
            chunk_size: by default as many images as are fast on the device.
            watch: called with x [chunk, 1, 28, 28] and its level before every evaluation, level after level, to show them.
        """
        chunk_size = CHUNK_SIZE[self.alpha.device.type] if chunk_size is None else chunk_size
        check_request(n, labels, self.config.num_classes, chunk_size)
        how = {"sampler": sampler, "steps": steps, "guidance": guidance, "asked": labels is not None}
        options = self.sample_options(**how, eta=eta, precision=precision)
        grid = diffusion.GRIDS[sampler](self.levels, options["steps"])
        draw, renewed = diffusion.SAMPLERS[sampler], {"eta": options["eta"]} if options["eta"] else {}
        if labels is None:
            labels, guidance = torch.full((n,), self.config.num_classes), 1.0
        elif guidance and sampler == "dpm-solver++":
            renewed["renewed_below"] = float("inf")  # no digit can be favoured
        noise = torch.randn(n, 1, 28, 28, generator=rng)
        step_seed = int(torch.randint(2**62, (), generator=rng))
        with evaluating(self) as device, autocast(device, precision):
            labels = labels.to(device)

            def denoise(x: Tensor, level: diffusion.Level) -> Tensor:
                clean = torch.zeros_like(x)  # the samplers treat each image alone, so the other rows may be anything
                chunks = (tensor[rows].split(chunk_size) for tensor in (x, labels, clean))
                for images, classes, estimate in zip(*chunks):
                    if watch:
                        watch(images, level)
                    estimate.copy_(self.denoise(images, level, classes, guidance))
                return clean

            return draw(denoise, noise.to(device), grid, torch.Generator(device).manual_seed(step_seed), **renewed)[rows]

    def sample_options(
        self,
        *,
        sampler: str = "dpm-solver++",
        steps: int | None = None,
        guidance: float = 1.0,
        eta: float | None = None,
        precision: str = "fp32",
        asked: bool = False,
    ) -> dict[str, str | int | float]:
        """The options of `sample` with the defaults filled in, of digits that are `asked` for by labels; errors as there."""
        check_option("sampler", sampler, diffusion.SAMPLERS)
        check_option("precision", precision, PRECISIONS)
        if steps is None:
            steps = self.config.timesteps if sampler == "ddpm" else min(DEFAULT_STEPS, self.config.timesteps)
        if type(steps) is not int or not 1 <= steps <= self.config.timesteps:
            raise ValueError(f"steps must be an integer in 1..{self.config.timesteps}, the timesteps, not {steps!r}")
        check_bounds("guidance", guidance, MAX_GUIDANCE)
        if guidance != 1 and not self.config.num_classes:
            raise ValueError("guidance has no classes to go by in an unconditional model")
        if eta is None:
            eta = (DIGIT_ETA if asked and guidance else DEFAULT_ETA) if sampler == "dpm-solver++" else 0.0
        check_bounds(f"eta of {sampler}", eta, MAX_ETA[sampler])
        return {"sampler": sampler, "steps": steps, "guidance": guidance, "eta": eta, "precision": precision}

    def evaluations(self, sampler: str, steps: int, guidance: float = 1.0, **_others: str | float) -> int:
        """Network evaluations that an image takes, with such options of `sample`."""
        return diffusion.evaluations_per_image(self.levels, sampler, steps, guidance)


# --------------------------------------------------------------------------------------------------------------------
# Registry: the name in a checkpoint -> (config class, network class). Only networks with `sample` are generators.

MODELS = {
    "dcgan": (GeneratorConfig, Generator),
    "cdcgan": (GeneratorConfig, Generator),
    "ddpm": (DDPMConfig, DDPM),
    "dcgan_discriminator": (DiscriminatorConfig, Discriminator),
    "cdcgan_discriminator": (DiscriminatorConfig, Discriminator),
    "classifier": (ClassifierConfig, DigitClassifier),
}


def build(name: str, **config) -> nn.Module:
    """A freshly initialised network of the registry.

    Raises:
        ValueError: unknown name, or an option that its config lacks or that is out of bounds.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(MODELS)}")
    config_class, network = MODELS[name]
    known = config_class.__dataclass_fields__.keys()
    if unknown := config.keys() - known:
        raise ValueError(f"{name} has no option {', '.join(sorted(map(str, unknown)))}; it has {', '.join(sorted(known))}")
    return network(config_class(**config))
