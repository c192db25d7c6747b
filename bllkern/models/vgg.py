"""VGG with batch norm (Simonyan & Zisserman, arXiv 1409.1556), the classifier sized for CIFAR: one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Stages of convolutions, a pooling after each; the modules of ``features`` are numbered as torchvision does.

    ``stage_ends`` holds the names of the five pooling layers, where the stages end.
    """

    def __init__(self, depth: int, num_classes: int, in_shape: Sequence[int]):
        super().__init__()
        layers, self.stage_ends, width = [], [], in_shape[0]
        for convolutions, filters in zip(DEPTHS[depth], CHANNELS):
            for _ in range(convolutions):
                layers += [nn.Conv2d(width, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU(inplace=True)]
                width = filters
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            self.stage_ends.append(f"features.{len(layers) - 1}")
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W]; logits [B, num_classes]."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def vgg11(num_classes: int, in_shape: Sequence[int]) -> VGG:
    return VGG(11, num_classes, in_shape)
