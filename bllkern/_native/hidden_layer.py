"""A linear layer, batch normalisation and ReLU on float32, for products too small for a library's."""

from __future__ import annotations

import torch
from torch import Tensor

from .module import _C, empty

_SMALL = 1 << 23  # multiplications of a product up to which one call takes less than the library's and torch's


def small_hidden_layer(x: Tensor, weight: Tensor) -> bool:
    """Whether the functions below have kernels for x [N, D] and weight [H, D], and these pay."""
    alike = x.is_cpu and weight.is_cpu and x.dtype is weight.dtype is torch.float32
    fits = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[1]
    return alike and fits and 0 < x.shape[0] * weight.numel() <= _SMALL


def hidden_layer(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The output [N, H], and for the gradient the normalised values [N, H] and what they were scaled by [H]."""
    rows, width, units = *x.shape, len(weight)
    out, normal = (empty((rows, units), x, torch.float32) for _ in range(2))
    scale = empty(units, x, torch.float32)
    _C.hidden_layer(x.contiguous(), weight.contiguous(), normal, out, scale, rows, width, units, eps)
    return out, normal, scale


def hidden_layer_gradient(
    x: Tensor, weight: Tensor, normal: Tensor, scale: Tensor, by_out: Tensor, grad_x: bool, grad_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients by x and weight, as far as they are wanted."""
    by_x = empty(x.shape, x, torch.float32) if grad_x else None
    by_weight = empty(weight.shape, x, torch.float32) if grad_weight else None
    given = (x.contiguous(), weight.contiguous(), normal, scale, by_out.contiguous(), by_x, by_weight)
    _C.hidden_layer_gradient(*given, *x.shape, len(weight))
    return by_x, by_weight
