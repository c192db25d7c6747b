"""A GPT-2 style decoder (Radford et al. 2019), named as Hugging Face transformers names ``GPT2LMHeadModel``.

``transformer.wte``, ``transformer.wpe``, ``transformer.h.0`` .., ``transformer.ln_f``, ``lm_head``; its checkpoints
load.  The head has a weight of its own: one shared with the embedding would tie the first block to the output block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv1D(nn.Module):
    """A linear layer whose weight is [in, out], as GPT-2's checkpoints have it; any [..., in] to [..., out]."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, out) * 0.02)
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)


class Attention(nn.Module):
    """Causal multi-head attention, [B, T, D] to [B, T, D]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = Conv1D(width, 3 * width), Conv1D(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.c_attn(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # each [B, heads, T, D / heads]
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(width, 4 * width), Conv1D(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each on the normalised input and added to it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.ln_2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Decoder(nn.Module):
    """Tokens [B, T] to features [B, T, D]."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class GPT(nn.Module):
    """Tokens [B, T] (int64, below ``num_classes``) to logits [B, T, num_classes] of the token that follows each.

    ``in_shape`` is ``(T,)`` with the longest T.  Raises ``ValueError`` for longer sequences, or for a width that is no
    multiple of ``heads``.
    """

    def __init__(self, num_classes: int, in_shape: Sequence[int], width: int = 128, depth: int = 4, heads: int = 4):
        super().__init__()
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width {width} and heads {heads}")
        self.transformer = Decoder(num_classes, in_shape[0], width, depth, heads)
        self.lm_head = nn.Linear(width, num_classes, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        length = self.transformer.wpe.num_embeddings
        if tokens.shape[1] > length:
            raise ValueError(f"tokens must have shape [B, T] with T <= {length}, got {list(tokens.shape)}")
        return self.lm_head(self.transformer(tokens))
