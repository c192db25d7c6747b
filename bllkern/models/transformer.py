"""A small pre-norm transformer over tokens: ``embedding``, ``layers.0`` .., ``norm``, ``head``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention, [B, T, D] to [B, T, D]."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, T, D / heads]
        z = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(z.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention, then a two-layer perceptron, each on the normalised input and added to it."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Tokens [B, T] (int64, below ``num_classes``) to logits [B, T, num_classes]; T is at most ``length``.

    ``causal``: position t sees positions up to t only, as a language model must; otherwise all of them.
    """

    def __init__(
        self, num_classes: int, length: int, width: int = 64, depth: int = 4, heads: int = 4, causal: bool = True
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width {width} and heads {heads}")
        self.embedding = nn.Embedding(num_classes, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        self.layers = nn.ModuleList(Layer(width, heads, causal) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > len(self.position):
            raise ValueError(f"tokens must have shape [B, T] with T <= {len(self.position)}, got {list(tokens.shape)}")
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def transformer(num_classes: int, in_shape: tuple[int], **options) -> Transformer:
    """A :class:`Transformer` for sequences of up to ``in_shape[0]`` tokens."""
    return Transformer(num_classes, in_shape[0], **options)
