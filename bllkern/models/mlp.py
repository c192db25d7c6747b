"""A multilayer perceptron: hidden layers ``layer1`` .. ``layerN`` (Linear, ReLU), then ``fc``."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn


def mlp(num_classes: int, in_shape: Sequence[int], hidden: Sequence[int] = (256, 256, 256)) -> nn.Sequential:
    """Inputs [B, *in_shape] are flattened; logits [B, num_classes]."""
    layers, width = OrderedDict(flatten=nn.Flatten()), math.prod(in_shape)
    for i, units in enumerate(hidden, 1):
        layers[f"layer{i}"] = nn.Sequential(nn.Linear(width, units), nn.ReLU())
        width = units
    layers["fc"] = nn.Linear(width, num_classes)
    return nn.Sequential(layers)
