"""What stands between an activation and the terms that score it: nothing, a hidden layer, a small convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional
from ..feedback import CONVOLUTIONS, LazyWeight
from ..functional.hidden_layer import activated, hidden_layer
from .features import averaged, channels_last, check_floating, in_full_precision, rows

HEADS = ("auto", "linear", "mlp", "conv")
MAP_HEAD = "mlp"  # what "auto" is for maps, see bench/results/ablation-cifar10-convnet.md
WIDTH = 128  # hidden units of mlp; more where there are more classes
CHANNELS = 64  # of conv; 32 cost 1.7 points of CIFAR-10 accuracy, see bench/results/ablation-cifar10-convnet.md


class Head(nn.Module):
    """Reads an activation as hidden features [N, H], which the terms see instead of its pooled rows [N, D]; similarity
    sees both.

    ``mlp``: a linear layer of ``WIDTH`` units on these rows.  ``conv``: the activation [B, C, *spatial], averaged to at
    most twice ``pool`` places a side, goes through a convolution of three places a side to ``CHANNELS`` channels, and
    is averaged to ``pool``; the averaging first keeps its cost independent of the image's size.  Both with batch
    normalisation (without parameters or running statistics) and ReLU after the layer.  Used in training only.
    """

    def __init__(self, kind: str, target_features: int, pool: int):
        super().__init__()
        self.kind, self.pool = kind, pool
        self.side = 2 * pool if kind == "conv" else pool  # to which a map is averaged first
        self.hidden = LazyWeight(CHANNELS if kind == "conv" else max(WIDTH, target_features), bias=False)

    def extra_repr(self):
        return self.kind

    def forward(self, z: Tensor, tokens: bool, channel_dim: int | None) -> Tensor:
        """Hidden features of ``z``, for ``tokens`` see :func:`.features.rows`.  ``ValueError`` if conv gets no map."""
        if self.kind == "mlp":
            features = rows(z, tokens, self.pool, channel_dim)
            weight, _ = self.hidden(features)
            return hidden_layer(features, weight)
        if not is_map(z, channel_dim):
            raise ValueError(f"head='conv' needs an activation [B, C, *spatial], got {list(z.shape)}")
        check_floating(z)
        maps = in_full_precision(averaged(z, self.side))
        weight, _ = self.hidden(maps)
        hidden = CONVOLUTIONS[z.dim() - 2](maps, weight, padding=1)
        if hidden.dim() != 4:
            return averaged(activated(hidden), self.pool).flatten(1)
        channels = hidden.shape[1]
        return functional.batch_norm_relu(
            hidden, hidden.new_ones(channels), hidden.new_zeros(channels), pool=self.pool
        )[1].flatten(1)


def is_map(z: Tensor, channel_dim: int | None) -> bool:
    """Whether ``z`` is [B, C, *spatial], which a convolution can read."""
    return z.dim() > 2 and not channels_last(z, channel_dim)
