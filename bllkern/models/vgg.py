"""VGG with batch norm (Simonyan & Zisserman, arXiv 1409.1556), its modules named and numbered as torchvision does.

Images of at least 112 pixels a side get the three-layer classifier of the ImageNet networks, and a checkpoint of
torchvision's ``vgg*_bn`` loads; smaller ones, as usual for CIFAR, one linear layer after global average pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Stages of convolutions, a pooling after each (:func:`stage_ends`), and a classifier."""

    def __init__(self, depth: int, num_classes: int, in_shape: Sequence[int], channels: Sequence[int] = CHANNELS):
        super().__init__()
        layers, width = [], in_shape[0]
        for convolutions, filters in zip(DEPTHS[depth], channels, strict=True):
            for _ in range(convolutions):
                layers += [nn.Conv2d(width, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU(inplace=True)]
                width = filters
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        large = min(in_shape[1:]) >= 112
        self.avgpool = nn.AdaptiveAvgPool2d(7 if large else 1)
        self.classifier = _classifier(49 * width, num_classes) if large else nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W]; logits [B, num_classes]."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def _classifier(width: int, num_classes: int) -> nn.Sequential:
    hidden = [nn.Linear(width, 4096), nn.ReLU(inplace=True), nn.Dropout()]
    hidden += [nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout()]
    return nn.Sequential(*hidden, nn.Linear(4096, num_classes))


vgg11, vgg13, vgg16, vgg19 = (partial(VGG, depth) for depth in DEPTHS)


def stage_ends(depth: int, stages: int = 5) -> tuple[str, ...]:
    """Names of the pooling layers at which the first ``stages`` stages end."""
    last = [3 * sum(DEPTHS[depth][:stage]) + stage - 1 for stage in range(1, stages + 1)]
    return tuple(f"features.{i}" for i in last)
