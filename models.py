"""The networks, their configuration dataclasses and the registry that checkpoints and scripts build them from.

Images are float [B, 1, 28, 28] in [-1, 1]; labels are int64 [B] in 0..num_classes-1. A config is carried in every
checkpoint, so sampling needs no architecture flags. Every generator here is sampled in one way:

    generator.sample(n, labels=None, rng=None) -> float [n, 1, 28, 28] in [-1, 1]
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

NORMS = ("batch", "spectral", "none")


def _check_int(config: object, name: str, low: int, high: int) -> None:
    """`ValueError` unless the field is an int in low..high: configs also come from files, which may ask for anything."""
    value = getattr(config, name)
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{type(config).__name__}.{name} must be an integer in {low}..{high}, not {value!r}")


# --------------------------------------------------------------------------------------------------------------------
# DCGAN (Radford et al. 2016), unconditional (num_classes = 0) or conditional


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """`width` is the number of channels per unit: 4, 2 units at 7x7, 14x14. `num_classes=0` is unconditional."""

    latent_dim: int = 100
    width: int = 64
    num_classes: int = 0

    def __post_init__(self):
        _check_int(self, "latent_dim", 1, 4096)
        _check_int(self, "width", 1, 512)
        _check_int(self, "num_classes", 0, 1000)


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Mirror of the generator. `norm`: `batch` (DCGAN), `spectral` (Miyato et al. 2018) or `none`."""

    width: int = 64
    num_classes: int = 0
    norm: str = "batch"

    def __post_init__(self):
        _check_int(self, "width", 1, 512)
        _check_int(self, "num_classes", 0, 1000)
        if self.norm not in NORMS:
            raise ValueError(f"DiscriminatorConfig.norm must be one of {', '.join(NORMS)}, not {self.norm!r}")


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
            x = x * self.gain(labels)[:, :, None, None] + self.bias(labels)[:, :, None, None]
        return x


class Generator(nn.Module):
    """DCGAN generator: latent [B, latent_dim] ~ N(0, I) -> image [B, 1, 28, 28] in [-1, 1], at 7 -> 14 -> 28 pixels.

    The paper's transposed convolutions, with a residual 3x3 convolution at 7x7 and at 14x14: at equal cost, depth
    pays more than width, because strokes have to agree over the whole digit. A class acts on every normalisation, and
    on the first layer as if its one-hot vector were part of the latent (Mirza & Osindero 2014).
    """

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
        self, n: int, labels: Tensor | None = None, rng: torch.Generator | None = None, *, chunk_size: int = 500
    ) -> Tensor:
        """Draw `n` images, float32 [n, 1, 28, 28] in [-1, 1], in eval mode.

        Args:
            labels: int64 [n], the classes to draw; None draws them uniformly from `rng` where the model has classes.
            rng: CPU generator of all randomness; None uses torch's global one.
            chunk_size: images per forward pass; it bounds the memory and does not change the noise.

        Raises:
            ValueError: `n` < 1, labels for an unconditional model, of a wrong shape, or outside its classes.
        """
        z = torch.randn(_checked_count(n), self.config.latent_dim, generator=rng)
        labels = draw_labels(n, self.config.num_classes, labels, rng)
        device = next(self.parameters()).device
        was_training = self.training
        self.eval()
        try:
            if labels is None:
                return torch.cat([self(chunk.to(device)) for chunk in z.split(chunk_size)])
            chunks = zip(z.split(chunk_size), labels.split(chunk_size))
            return torch.cat([self(chunk.to(device), classes.to(device)) for chunk, classes in chunks])
        finally:
            self.train(was_training)


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
# The digit classifier behind the metrics


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """`width`: channels at 28x28, doubled at 14x14 and again at 7x7. `features`: units of the last hidden layer."""

    width: int = 16
    features: int = 128
    num_classes: int = 10

    def __post_init__(self):
        _check_int(self, "width", 1, 256)
        _check_int(self, "features", 2, 1024)
        _check_int(self, "num_classes", 2, 1000)


class DigitClassifier(nn.Module):
    """A small VGG-style network: image [B, 1, 28, 28] in [-1, 1] -> class logits [B, num_classes]."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        w = config.width
        self.stages = nn.Sequential(
            _conv_norm_relu(1, w), _conv_norm_relu(w, w), nn.MaxPool2d(2),  # [B, w, 14, 14]
            _conv_norm_relu(w, 2 * w), _conv_norm_relu(2 * w, 2 * w), nn.MaxPool2d(2),  # [B, 2w, 7, 7]
            _conv_norm_relu(2 * w, 4 * w), _conv_norm_relu(4 * w, 4 * w), nn.MaxPool2d(2),  # [B, 4w, 3, 3]
        )  # fmt: skip
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(4 * w * 3 * 3, config.features), nn.ReLU())
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(config.features, config.num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Activations of the last hidden layer, [B, features], at least 0: what the metrics compare."""
        return self.hidden(self.stages(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(x)))


def _conv_norm_relu(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


# --------------------------------------------------------------------------------------------------------------------
# Sampling helpers that every generator shares


def draw_labels(n: int, num_classes: int, labels: Tensor | None, rng: torch.Generator | None) -> Tensor | None:
    """The labels to sample: those given, checked; else uniform draws from `rng`; None for an unconditional model."""
    if labels is None:
        return torch.randint(num_classes, (n,), generator=rng) if num_classes else None
    if not num_classes:
        raise ValueError("labels were given to an unconditional model; leave them out, or load a conditional checkpoint")
    if labels.shape != (n,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 of shape [{n}], not {labels.dtype} of {list(labels.shape)}")
    if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise ValueError(f"labels must lie in 0..{num_classes - 1}")
    return labels


def _checked_count(n: int) -> int:
    if n < 1:
        raise ValueError(f"at least one image must be asked for, not {n}")
    return n


# --------------------------------------------------------------------------------------------------------------------
# Registry: the name in a checkpoint -> (config class, network class). Only networks with `sample` are generators.

MODELS = {
    "dcgan": (GeneratorConfig, Generator),
    "cdcgan": (GeneratorConfig, Generator),
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
    known = {field.name for field in dataclasses.fields(config_class)}
    if unknown := set(config) - known:
        raise ValueError(f"{name} has no option {', '.join(sorted(map(str, unknown)))}; it has {', '.join(sorted(known))}")
    return network(config_class(**config))
