"""Ordinary networks to train block-locally, and where each is cut: plain ``torch.nn`` modules that know no boundary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from .convnet import convnet
from .mlp import mlp
from .resnet import cifar_resnet, resnet18, resnet50
from .transformer import transformer
from .vgg import vgg11


@dataclass(frozen=True)
class Model:
    """How to build a network, and the modules after which it is cut; what follows the last cut is the output block.

    ``rank`` is the number of dimensions of one input: 3 for images, 1 for tokens, ``None`` for any.
    """

    build: Callable[..., nn.Module]
    cuts: tuple[str, ...]
    rank: int | None = 3


MODELS = {
    "mlp": Model(mlp, ("layer1", "layer2", "layer3"), rank=None),
    "convnet": Model(convnet, ("layer1", "layer2", "layer3")),
    "vgg11": Model(vgg11, ("features.3", "features.7", "features.14", "features.21")),
    "resnet18": Model(resnet18, ("layer1", "layer2", "layer3")),
    "resnet50": Model(resnet50, ("layer1", "layer2", "layer3")),
    **{f"resnet{d}": Model(partial(cifar_resnet, d), ("layer1", "layer2")) for d in (20, 32, 56, 110)},
    "transformer": Model(transformer, ("layers.0", "layers.1", "layers.2"), rank=1),
}


def _model(name: str) -> Model:
    if name not in MODELS:
        raise ValueError(f"model must be one of {sorted(MODELS)}, got {name!r}")
    return MODELS[name]


def build(name: str, num_classes: int, in_shape: Sequence[int]) -> nn.Module:
    """The network ``name`` with freshly drawn weights.

    Args:
        name: ``mlp`` (inputs of any shape); ``convnet``, ``vgg11``, ``resnet18``, ``resnet50``, ``resnet20``,
            ``resnet32``, ``resnet56``, ``resnet110`` (images [C, H, W]); ``transformer`` (token sequences [T]).
        num_classes: number of logits; for ``transformer`` also the number of different tokens.
        in_shape: shape of one input.

    Raises: ``ValueError`` for another name or a shape that the network cannot take.
    """
    model = _model(name)
    if model.rank not in (None, len(in_shape)):
        raise ValueError(f"in_shape must have {model.rank} dimensions for {name!r}, got {list(in_shape)}")
    return model.build(num_classes, tuple(in_shape))


def default_cuts(name: str) -> list[str]:
    """The modules of network ``name`` after which block-local training puts a boundary.  Raises ``ValueError``."""
    return list(_model(name).cuts)
