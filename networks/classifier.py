"""The digit classifier behind the metrics."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from networks.checks import check_int


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """`width`: channels at 28x28, doubled at 14x14 and again at 7x7. `features`: units of the last hidden layer."""

    width: int = 16
    features: int = 128
    num_classes: int = 10

    def __post_init__(self) -> None:
        check_int(self, "width", 1, 256)
        check_int(self, "features", 2, 1024)
        check_int(self, "num_classes", 2, 1000)


class DigitClassifier(nn.Module):
    """A small VGG-style network: image [B, 1, 28, 28] in [-1, 1] -> class logits [B, num_classes]."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        w = config.width
        self.stages = nn.Sequential(
            _conv_norm_relu(1, w),
            _conv_norm_relu(w, w),
            nn.MaxPool2d(2),  # [B, w, 14, 14]
            _conv_norm_relu(w, 2 * w),
            _conv_norm_relu(2 * w, 2 * w),
            nn.MaxPool2d(2),  # [B, 2w, 7, 7]
            _conv_norm_relu(2 * w, 4 * w),
            _conv_norm_relu(4 * w, 4 * w),
            nn.MaxPool2d(2),  # [B, 4w, 3, 3]
        )
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(4 * w * 3 * 3, config.features), nn.ReLU())
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(config.features, config.num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Activations of the last hidden layer, [B, features], at least 0. The metrics compare them."""
        return self.hidden(self.stages(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(x)))


def _conv_norm_relu(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
