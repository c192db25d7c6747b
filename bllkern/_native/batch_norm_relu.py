"""Batch normalisation, a shortcut, ReLU, max pooling and pooled features."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import layout, pooled_shape
from .module import _C, DTYPES, empty


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
    form, dtype = layout(x), x.dtype
    x, shortcut = _laid_out(x, form), _laid_out(shortcut, form)
    weight, bias = _plain(weight), _plain(bias)
    shape, bins = pooled_shape(x, max_pool, ceil_mode, pool)
    z = empty(shape, x, dtype, form)
    features = empty(bins, x, torch.float32)
    active, along = empty(bins, x, torch.float32, form), empty(bins, x, torch.float32, form)
    mean, variance = _zeros(shape[1], x), _zeros(shape[1], x)
    if x.numel():
        tensors = (x, weight, bias, shortcut, mean, variance, z, features, active, along)
        sizes = (*x.shape, *shape[2:], *bins[2:])
        last = form is torch.channels_last
        _C.batch_norm_relu(*tensors, *_NO_GRADIENTS, *sizes, max_pool, eps, DTYPES[dtype], last)
    return z, features, mean, variance, active, along


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
    over_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``batch_norm_relu_gradient`` of ``bllkern/_ops.py`` on the CPU."""
    form, shape, dtype, given = layout(x), x.shape, x.dtype, x
    x, z, by_z = _laid_out(x, form), _laid_out(z, form), _laid_out(by_z, form)
    active, along = _laid_out(active.float(), form), _laid_out(along.float(), form)
    weight, bias, mean, variance = _plain(weight), _plain(bias), _plain(mean), _plain(variance)
    by_features = None if by_features is None else _plain(by_features)
    by_x = x if over_x else empty(shape, x, dtype, form) if grad_x else None
    by_shortcut = empty(shape, x, dtype, form) if grad_shortcut else None
    by_weight, by_bias = _zeros(shape[1], x), _zeros(shape[1], x)
    if x.numel():
        tensors = (x, weight, bias, None, mean, variance, z, None, active, along)
        gradients = (by_z, by_features, by_weight, by_bias, by_x, by_shortcut)
        sizes = (*shape, *pooled_shape(x, max_pool, ceil_mode, 1)[0][2:], *active.shape[2:])
        last = form is torch.channels_last
        _C.batch_norm_relu_gradient(*tensors, *gradients, *sizes, max_pool, eps, DTYPES[dtype], last)
    if over_x and x is not given:
        given.copy_(x)
    if over_x or not grad_x:
        by_x = x.new_empty(0)
    return by_x, by_shortcut if grad_shortcut else x.new_empty(0), by_weight, by_bias


_NO_GRADIENTS = (None,) * 6


def _laid_out(x: Tensor | None, form: torch.memory_format) -> Tensor | None:
    return x if x is None else x.contiguous(memory_format=form)


def _zeros(count: int, like: Tensor) -> Tensor:
    return like.new_zeros(count, dtype=torch.float32)


def _plain(x: Tensor) -> Tensor:
    return x.float().contiguous()
