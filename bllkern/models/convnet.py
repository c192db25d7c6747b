"""A small convolutional network: ``layer1`` .. ``layer4`` (3x3 convolution, batch norm, ReLU, pooling), then ``fc``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn


def convnet(num_classes: int, in_shape: Sequence[int], channels: Sequence[int] = (32, 64, 128, 128)) -> nn.Sequential:
    """Images [B, *in_shape] of shape [C, H, W]; logits [B, num_classes]."""
    width, height, breadth = in_shape
    layers = OrderedDict()
    for i, filters in enumerate(channels, 1):
        layers[f"layer{i}"] = nn.Sequential(
            nn.Conv2d(width, filters, 3, padding=1, bias=False),
            nn.BatchNorm2d(filters),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2, ceil_mode=True),  # ceil: an image already down to one pixel stays one pixel
        )
        width, height, breadth = filters, (height + 1) // 2, (breadth + 1) // 2
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(width * height * breadth, num_classes)
    return nn.Sequential(layers)
