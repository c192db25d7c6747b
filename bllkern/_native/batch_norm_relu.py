"""Batch normalisation, a shortcut, ReLU, max pooling and pooled features."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import layout, pooled_shape
from .module import _C, DTYPES, address, empty


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shortcut: Tensor | None,
    eps: float,
    max_pool: int,
    ceil_mode: bool,
    pool: int,
) -> tuple[Tensor, ...]:
    """The op ``batch_norm_relu`` of ``bllkern/_ops.py`` on the CPU."""
    form = layout(x)
    x, shortcut = (t if t is None else t.contiguous(memory_format=form) for t in (x, shortcut))
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    shape, bins = pooled_shape(x, max_pool, ceil_mode, pool)
    z = empty(shape, x, x.dtype, form)
    features, *kept = (empty(bins, x, torch.float32, f) for f in (torch.contiguous_format, form, form))
    mean, variance = (x.new_zeros(shape[1], dtype=torch.float32) for _ in range(2))
    if x.numel():
        tensors = (x, weight, bias, shortcut, mean, variance, z, features, *kept)
        pointers = (*map(address, tensors), *[0] * 6)
        sizes = (*x.shape, *shape[2:], *bins[2:])
        _C.batch_norm_relu(*pointers, *sizes, max_pool, eps, DTYPES[x.dtype], form == torch.channels_last)
    return z, features, mean, variance, *kept


def batch_norm_relu_gradient(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    active: Tensor,
    along: Tensor,
    z: Tensor | None,
    by_z: Tensor | None,
    by_features: Tensor | None,
    eps: float,
    max_pool: int,
    ceil_mode: bool,
    grad_x: bool,
    grad_shortcut: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """The op ``batch_norm_relu_gradient`` of ``bllkern/_ops.py`` on the CPU."""
    form = layout(x)
    x, z, by_z = (t if t is None else t.contiguous(memory_format=form) for t in (x, z, by_z))
    active, along = (t.float().contiguous(memory_format=form) for t in (active, along))
    given = (weight, bias, mean, variance, by_features)
    weight, bias, mean, variance, by_features = (t if t is None else t.float().contiguous() for t in given)
    by_x, by_shortcut = (empty(x.shape, x, x.dtype, form) if wanted else None for wanted in (grad_x, grad_shortcut))
    by_weight, by_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    if x.numel():
        tensors = (x, weight, bias, None, mean, variance, z, None, active, along)
        gradients = (by_z, by_features, by_weight, by_bias, by_x, by_shortcut)
        shape = pooled_shape(x, max_pool, ceil_mode, 1)[0]
        sizes = (*x.shape, *shape[2:], *active.shape[2:])
        pointers = map(address, (*tensors, *gradients))
        last = form == torch.channels_last
        _C.batch_norm_relu_gradient(*pointers, *sizes, max_pool, eps, DTYPES[x.dtype], last)
    return by_x, by_shortcut, by_weight, by_bias
