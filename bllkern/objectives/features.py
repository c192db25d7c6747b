"""From an activation to the rows that the losses compare: pooled, flattened, matched with their targets."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def channels_last(z: Tensor, channel_dim: int | None) -> bool:
    """Whether the channels of ``z`` are its last dimension: by default those of up to three dimensions [B, T, D]."""
    return z.dim() <= 3 if channel_dim is None else channel_dim in (-1, z.dim() - 1)


def rows(z: Tensor, tokens: bool, pool: int, channel_dim: int | None) -> Tensor:
    """Features [N, D] in float32 (float64 for float64) of the activation ``z``.

    [B, D] stays; [B, T, D] gives a row per token if ``tokens``, else the mean over T; [B, C, *spatial] is averaged to
    at most ``pool`` places a side and flattened.
    """
    check_floating(z)
    if z.dim() < 2:
        shapes = "[B, D], [B, T, D] or [B, C, *spatial]"
        raise ValueError(f"an activation at a boundary must have shape {shapes}, got {list(z.shape)}")
    if z.dim() > 2 and channels_last(z, channel_dim):
        z = z.flatten(0, -2) if tokens else z.flatten(1, -2).mean(1)
    elif z.dim() > 2:
        z = averaged(z, pool).flatten(1)
    return in_full_precision(z)


def check_floating(z: Tensor) -> None:
    if not z.is_floating_point():
        raise TypeError(f"an activation at a boundary must be a floating-point tensor, got {z.dtype}")


def in_full_precision(z: Tensor) -> Tensor:
    """``z`` in float32, or in float64 where it is that."""
    return z if z.dtype == torch.float64 else z.float()


def averaged(z: Tensor, pool: int) -> Tensor:
    """The activation [B, C, *spatial] averaged to at most ``pool`` places a side."""
    if z.dim() > 5:
        raise ValueError(f"an activation [B, C, *spatial] may have up to 3 spatial dimensions, got {list(z.shape)}")
    size = [min(side, pool) for side in z.shape[2:]]
    return z if list(z.shape[2:]) == size else _average(z, size)


class _Average(torch.autograd.Function):
    """Mean over equal cells of [B, C, *spatial] on a CPU: sums along whole rows, and rows copied back to every place.

    Half to two thirds of the time of torch's adaptive pooling, which goes from place to place; and nothing of the
    activation is kept.
    """

    @staticmethod
    def forward(ctx, z: Tensor, size: list[int]) -> Tensor:
        ctx.shape, ctx.places = z.shape, math.prod(z.shape[2:]) // math.prod(size)
        ctx.channels_last = z.dim() == 4 and not z.is_contiguous()
        if ctx.channels_last:
            return F.adaptive_avg_pool2d(z, size)
        for i, side in enumerate(size, 2):
            z = z.unflatten(i, (side, -1)).sum(i + 1)
        return z.mul_(1 / ctx.places)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        layout = torch.channels_last if ctx.channels_last else torch.contiguous_format
        size, last = grad.shape[2:], ctx.shape[-1]
        rows = (grad / ctx.places).repeat_interleave(last // size[-1], -1)
        whole = torch.empty(ctx.shape, dtype=grad.dtype, memory_format=layout)
        cells = whole
        for i, side in enumerate(size[:-1]):
            cells, rows = cells.unflatten(2 + 2 * i, (side, -1)), rows.unsqueeze(3 + 2 * i)
        cells.copy_(rows.expand_as(cells))
        return whole, None


def _average(z: Tensor, size: list[int]) -> Tensor:
    """``z`` [B, C, *spatial] averaged to ``size`` places."""
    if z.device.type == "cpu" and not any(side % places for side, places in zip(z.shape[2:], size, strict=True)):
        return _Average.apply(z, size)
    return _POOLS[z.dim() - 2](z, size)


def raised(message: Tensor, z: Tensor, channel_dim: int | None, pool: int) -> Tensor:
    """Rows [N, D] of :func:`rows`, spread back to the shape of ``z``: each place gets the message of its pool."""
    if z.dim() == 2:
        return message
    if channels_last(z, channel_dim):
        if len(message) == math.prod(z.shape[:-1]):
            return message.reshape(z.shape)
        return message.reshape(len(z), *[1] * (z.dim() - 2), -1).expand(z.shape)
    size = [min(side, pool) for side in z.shape[2:]]
    return F.interpolate(message.reshape(*z.shape[:2], *size), z.shape[2:])
