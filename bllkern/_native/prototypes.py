"""Normalised rows: their means by class, and the gradient back through the normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from .module import _C, DTYPES, empty


def prototypes(x: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The op ``prototypes`` of ``bllkern/_ops.py`` on the CPU."""
    x, labels = x.contiguous(), target.contiguous()
    _C.count_labels(labels, len(x), num_classes, ignore_index)
    means = empty((num_classes, x.shape[1]), x, torch.float32)
    counts = torch.empty(num_classes, dtype=torch.int64)
    _C.prototypes(x, labels, means, counts, *x.shape, num_classes, ignore_index, DTYPES[x.dtype])
    return means, counts


def prototypes_gradient(x: Tensor, target: Tensor, counts: Tensor, grad: Tensor, ignore_index: int) -> Tensor:
    """The op ``prototypes_gradient`` of ``bllkern/_ops.py`` on the CPU."""
    labels = target.contiguous()
    _C.count_labels(labels, len(x), len(grad), ignore_index)
    by_classes = grad.float().contiguous()
    return normalization_gradient(x.contiguous(), None, by_classes, labels, counts.contiguous(), ignore_index, 1.0)


def normalized(x: Tensor, labels: Tensor | None = None, ignore_index: int = 0) -> tuple[Tensor, int]:
    """Rows of contiguous x centred and scaled to length 1 in float32, and how many of them count."""
    xn = empty(x.shape, x, torch.float32)
    counted = _C.normalize_rows(x, labels, xn, *x.shape, ignore_index, DTYPES[x.dtype])
    return xn, counted


def normalization_gradient(
    x: Tensor,
    by_rows: Tensor | None,
    by_classes: Tensor | None,
    labels: Tensor | None,
    counts: Tensor | None,
    ignore_index: int,
    scale: float,
) -> Tensor:
    """The gradient by contiguous x where row n, normalised, has the gradient ``scale`` times ``by_rows[n]`` plus its
    class's row of ``by_classes`` (divided by the class's count)."""
    grad_x = empty(x.shape, x, x.dtype)
    _C.normalize_gradient(x, by_rows, by_classes, labels, counts, grad_x, *x.shape, ignore_index, scale, DTYPES[x.dtype])
    return grad_x
