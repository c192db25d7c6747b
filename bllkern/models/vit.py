"""A small vision transformer (Dosovitskiy et al., arXiv 2010.11929), its modules named as torchvision names them.

``conv_proj``, ``class_token``, ``encoder.layers.encoder_layer_0`` .., ``encoder.ln``, ``heads.head``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class EncoderBlock(nn.Module):
    """Self-attention, then a two-layer perceptron, each on the normalised input and added to it; [B, T, D]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        layers = {"0": nn.Linear(width, 4 * width), "1": nn.GELU(), "3": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))  # torchvision's 2 and 4 are dropout, which holds no parameter

    def forward(self, x: Tensor) -> Tensor:
        z = self.ln_1(x)
        x = x + self.self_attention(z, z, z, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    """Learned positions, a row of blocks, a last normalisation; [B, T, D]."""

    def __init__(self, tokens: int, width: int, depth: int, heads: int):
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.layers = nn.Sequential(
            OrderedDict((f"encoder_layer_{i}", EncoderBlock(width, heads)) for i in range(depth))
        )
        self.ln = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.layers(x + self.pos_embedding))


class VisionTransformer(nn.Module):
    """Images [B, C, H, W], cut into patches of ``patch`` pixels a side, to logits [B, num_classes].

    Raises ``ValueError`` for sides that are no multiple of ``patch``, or a width that is none of ``heads``.
    """

    def __init__(
        self,
        num_classes: int,
        in_shape: Sequence[int],
        patch: int = 4,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
    ):
        super().__init__()
        channels, *sides = in_shape
        if any(side % patch for side in sides):
            raise ValueError(f"in_shape must have sides that are multiples of patch={patch}, got {list(in_shape)}")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width {width} and heads {heads}")
        self.conv_proj = nn.Conv2d(channels, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder = Encoder(1 + (sides[0] // patch) * (sides[1] // patch), width, depth, heads)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(width, num_classes)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        return self.heads(self.encoder(x)[:, 0])
