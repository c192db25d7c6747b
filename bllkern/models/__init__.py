"""Ordinary networks to train block-locally, and where each is cut: plain ``torch.nn`` modules that know no boundary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from .convnet import convnet
from .gpt import GPT as gpt
from .mlp import mlp
from .resnet import cifar_resnet, resnet18, resnet34, resnet50, resnet101, resnet152
from .transformer import transformer
from .vgg import stage_ends, vgg11, vgg13, vgg16, vgg19
from .vit import VisionTransformer as vit


@dataclass(frozen=True)
class Model:
    """How to build a network, and the modules after which it is cut; what follows the last cut is the output block.

    ``rank`` is the number of dimensions of one input: 3 for images, 1 for tokens, ``None`` for any.  ``stages`` holds
    the number of residual units of each stage ``layer1`` .., where there are any.
    """

    build: Callable[..., nn.Module]
    cuts: tuple[str, ...]
    rank: int | None = 3
    stages: tuple[int, ...] = ()


_RESNETS = {18: resnet18, 34: resnet34, 50: resnet50, 101: resnet101, 152: resnet152}
_VGGS = {11: vgg11, 13: vgg13, 16: vgg16, 19: vgg19}
MODELS = {
    "mlp": Model(mlp, ("layer1", "layer2", "layer3"), rank=None),
    "convnet": Model(convnet, ("layer1", "layer2", "layer3")),
    **{f"vgg{d}": Model(build, stage_ends(d, 4)) for d, build in _VGGS.items()},
    **{
        f"resnet{d}": Model(build, ("layer1", "layer2", "layer3"), stages=build.args[1])
        for d, build in _RESNETS.items()
    },
    **{
        f"resnet{d}": Model(partial(cifar_resnet, d), ("layer1", "layer2"), stages=(d // 6,) * 3)
        for d in (20, 32, 56, 110)
    },
    "vit": Model(vit, tuple(f"encoder.layers.encoder_layer_{i}" for i in (1, 3))),
    "transformer": Model(transformer, ("layers.0", "layers.1", "layers.2"), rank=1),
    "gpt": Model(gpt, ("transformer.h.0", "transformer.h.1", "transformer.h.2"), rank=1),
}


def _model(name: str) -> Model:
    if name not in MODELS:
        raise ValueError(f"model must be one of {sorted(MODELS)}, got {name!r}")
    return MODELS[name]


def build(name: str, num_classes: int, in_shape: Sequence[int]) -> nn.Module:
    """The network ``name`` with freshly drawn weights.

    Args:
        name: ``mlp`` (inputs of any shape); ``convnet``, ``vgg11`` to ``vgg19``, ``resnet18`` to ``resnet152``, CIFAR's
            ``resnet20`` to ``resnet110``, ``vit`` (images [C, H, W]); ``transformer``, ``gpt`` (token sequences [T]).
        num_classes: number of logits; for ``transformer`` and ``gpt`` also the number of different tokens.
        in_shape: shape of one input.

    Raises: ``ValueError`` for another name or a shape that the network cannot take.
    """
    model = _model(name)
    if model.rank not in (None, len(in_shape)):
        raise ValueError(f"in_shape must have {model.rank} dimensions for {name!r}, got {list(in_shape)}")
    return model.build(num_classes, tuple(in_shape))


def default_cuts(name: str, blocks: int | None = None) -> list[str]:
    """The modules of network ``name`` after which block-local training puts a boundary.

    With ``blocks``, the cuts into so many blocks, each with an output of its own: the ends of the stages, and the
    stages of residual networks in parts of similar length, more of them where a stage is longer.  So 4, 8, 12 and 16
    outputs are those of BWBPF (arXiv 2312.13311), where the network has as many residual units (ResNet-18 has 8).

    Raises: ``ValueError`` for another name, or a number of blocks that the network cannot be cut into so.
    """
    model = _model(name)
    if blocks is None or blocks == len(model.cuts) + 1:
        return list(model.cuts)
    if not len(model.stages) <= blocks <= sum(model.stages):
        allowed = f"from {len(model.stages)} to {sum(model.stages)}" if model.stages else str(len(model.cuts) + 1)
        raise ValueError(f"blocks must be {allowed} for {name!r}, got {blocks}")
    parts = [1] * len(model.stages)
    while sum(parts) < blocks:
        lengths = [depth / count for depth, count in zip(model.stages, parts)]
        parts[lengths.index(max(lengths))] += 1
    cuts = []
    for i, (depth, count) in enumerate(zip(model.stages, parts), 1):
        cuts += [f"layer{i}.{depth * part // count - 1}" for part in range(1, count)] + [f"layer{i}"]
    return cuts[:-1]
