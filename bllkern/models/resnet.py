"""Residual networks (He et al., arXiv 1512.03385).

Modules are named as torchvision names them (``conv1``, ``bn1``, ``layer1`` .., ``fc``).  Images of 112 pixels a side
or more get the stem of the ImageNet networks, and a checkpoint of torchvision's network loads; smaller ones that of the
CIFAR networks, a 3x3 convolution without pooling.  The original CIFAR networks have three stages of 16, 32 and 64
channels; where a stage strides, its shortcut is a convolution (option B there).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, width: int, planes: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1 = nn.Conv2d(width, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        z = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(z)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the stride is in the 3x3 one."""

    expansion = 4

    def __init__(self, width: int, planes: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1 = nn.Conv2d(width, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        z = self.relu(self.bn1(self.conv1(x)))
        z = self.relu(self.bn2(self.conv2(z)))
        return self.relu(self.bn3(self.conv3(z)) + shortcut)


class ResNet(nn.Module):
    """Stages ``layer1`` .. of ``depths`` blocks; each but the first halves the image and doubles the channels."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        num_classes: int,
        in_shape: Sequence[int],
        planes: int = 64,
    ):
        super().__init__()
        large = min(in_shape[1:]) >= 112
        kernel, stride = (7, 2) if large else (3, 1)
        self.conv1 = nn.Conv2d(in_shape[0], planes, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if large else nn.Identity()
        width, self.stages = planes, []
        for i, depth in enumerate(depths):
            stage, width = _stage(block, width, planes * 2**i, depth, stride=1 if i == 0 else 2)
            self.stages.append(f"layer{i + 1}")
            self.add_module(self.stages[-1], stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W]; logits [B, num_classes]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.fc(self.avgpool(x).flatten(1))


def _stage(block, width: int, planes: int, depth: int, stride: int) -> tuple[nn.Sequential, int]:
    """``depth`` blocks, the first with the stride; and the number of channels they end with."""
    out, downsample = planes * block.expansion, None
    if stride != 1 or width != out:
        downsample = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    blocks = [block(width, planes, stride, downsample)]
    blocks += [block(out, planes, 1, None) for _ in range(depth - 1)]
    return nn.Sequential(*blocks), out


def _resnet(block: type[BasicBlock] | type[Bottleneck], *depths: int) -> partial[ResNet]:
    """The network of these stages as ``build(num_classes, in_shape)``."""
    return partial(ResNet, block, depths)


resnet18, resnet34 = _resnet(BasicBlock, 2, 2, 2, 2), _resnet(BasicBlock, 3, 4, 6, 3)
resnet50, resnet101 = _resnet(Bottleneck, 3, 4, 6, 3), _resnet(Bottleneck, 3, 4, 23, 3)
resnet152 = _resnet(Bottleneck, 3, 8, 36, 3)


def cifar_resnet(depth: int, num_classes: int, in_shape: Sequence[int]) -> ResNet:
    """The CIFAR networks of the paper's section 4.2: ``depth`` = 6 n + 2 layers, n blocks in each of three stages."""
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth must be 6 n + 2 with n >= 1, got {depth}")
    return ResNet(BasicBlock, (depth // 6,) * 3, num_classes, in_shape, planes=16)
