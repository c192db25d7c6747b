"""Mean features of each class in a batch, as a differentiable function."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import run
from ._checks import check_rows, checked_target, needs_grad, once_differentiable


class _Prototypes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, num_classes, ignore_index):
        means, counts = run("prototypes", x, target, num_classes, ignore_index)
        ctx.save_for_backward(x, target, counts)
        ctx.ignore_index = ignore_index
        ctx.mark_non_differentiable(counts)
        return means, counts

    @staticmethod
    @once_differentiable
    def backward(ctx, by_means, _):
        x, target, counts = ctx.saved_tensors
        return run("prototypes_gradient", x, target, counts, by_means, ctx.ignore_index), None, None, None


def prototypes(x: Tensor, target: Tensor, num_classes: int, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Mean direction of the features of each class in the batch; BLL's released recipe trains its feedback on them.

    ``prototypes[c] = mean(xn[target == c])``, with ``xn`` as in :func:`.similarity_matching`.  A class without rows has
    count 0 and a prototype of zeros: mask by ``counts > 0`` what is learnt from prototypes.

    Args:
        x: features [N, D].
        target: class indices [N] (int64).
        num_classes: C.
        ignore_index: rows with this class index do not count.

    Returns: prototypes [C, D] (float32; float64 for float64 features), lengths from 0 to 1, and counts [C] (int64).
    Raises: ``ValueError`` for shapes, devices or values; ``TypeError`` for dtypes.
    """
    check_rows(x)
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if target.is_floating_point():
        raise TypeError(f"target must be int64 class indices, got {target.dtype}")
    target = checked_target(target, "x", x, num_classes)
    if needs_grad(x):
        return _Prototypes.apply(x, target, num_classes, ignore_index)
    return run("prototypes", x, target, num_classes, ignore_index)
