"""From an activation to the rows that the losses compare: pooled, flattened, matched with their targets."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

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
    return z if list(z.shape[2:]) == size else _POOLS[z.dim() - 2](z, size)


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
