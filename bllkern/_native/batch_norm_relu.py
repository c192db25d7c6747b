"""Batch normalisation, ReLU, max pooling and pooled features."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import pooled_shape
from .module import _C, DTYPES, empty


def batch_norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, max_pool: int, ceil_mode: bool, pool: int
) -> tuple[Tensor, ...]:
    """The op ``batch_norm_relu`` of ``bllkern/_ops.py`` on the CPU."""
    x, weight, bias = x.contiguous(), weight.float().contiguous(), bias.float().contiguous()
    shape, bins = pooled_shape(x, max_pool, ceil_mode, pool)
    z = empty(shape, x, x.dtype)
    features, active, along = (empty(bins, x, torch.float32) for _ in range(3))
    mean, variance = (x.new_zeros(shape[1], dtype=torch.float32) for _ in range(2))
    if x.numel():
        tensors = (x, weight, bias, mean, variance, z, features, active, along)
        pointers = (*(t.data_ptr() for t in tensors), 0, 0, 0, 0)
        _C.batch_norm_relu(*pointers, *x.shape, *shape[2:], *bins[2:], max_pool, eps, DTYPES[x.dtype])
    return z, features, mean, variance, active, along


def batch_norm_relu_gradient(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    by_features: Tensor,
    by_weight: Tensor,
    by_bias: Tensor,
    eps: float,
    max_pool: int,
    ceil_mode: bool,
) -> Tensor:
    """The op ``batch_norm_relu_gradient`` of ``bllkern/_ops.py`` on the CPU."""
    given = (weight, bias, mean, variance, by_features, by_weight, by_bias)
    x, given = x.contiguous(), [t.float().contiguous() for t in given]
    grad = empty(x.shape, x, x.dtype)
    if x.numel():
        weight, bias, mean, variance, by_features, by_weight, by_bias = (t.data_ptr() for t in given)
        outputs = 0, 0, 0, 0
        gradients = by_features, by_weight, by_bias, grad.data_ptr()
        pointers = (x.data_ptr(), weight, bias, mean, variance, *outputs, *gradients)
        shape, bins = pooled_shape(x, max_pool, ceil_mode, 1)[0], given[4].shape
        _C.batch_norm_relu_gradient(*pointers, *x.shape, *shape[2:], *bins[2:], max_pool, eps, DTYPES[x.dtype])
    return grad
