"""Losses on the Gram matrix of a batch's features, as differentiable functions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import run
from ._checks import check_rows, checked_target, needs_grad, once_differentiable, upstream_times


class _SimilarityMatching(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, ignore_index):
        loss, grad = run("similarity_matching", x, target, ignore_index, True)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return *upstream_times(ctx.saved_tensors, upstream), None, None


def similarity_matching(x: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean squared difference between the Gram matrix of the batch's features and that of its targets.

    The similarity matching loss of PredSim (Nokland and Eidnes, arXiv 1901.06656), as a mean over pairs.
    ``mean((xn @ xn.T - T)**2)``, with ``xn`` the rows of x centred and scaled to length 1 (constant rows are 0), and
    ``T`` label equality for class indices, or ``yn @ yn.T`` for target rows.  No gradient reaches the target.

    Args:
        x: features [N, D].
        target: class indices [N] (int64), or rows [N, E] (for instance the feedback message of each sample).
        ignore_index: rows with this class index do not count.

    Returns: a scalar without unit, from 0 to 4.
    Raises: ``ValueError`` for shapes or devices; ``TypeError`` for dtypes.
    """
    check_rows(x)
    target = checked_target(target, "x", x, None)
    if needs_grad(x):
        return _SimilarityMatching.apply(x, target, ignore_index)
    return run("similarity_matching", x, target, ignore_index, False)[0]


class _Decorrelation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        loss, grad = run("decorrelation", x, True)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return upstream_times(ctx.saved_tensors, upstream)[0]


def decorrelation(x: Tensor) -> Tensor:
    """Mean squared off-diagonal entry of the batch's normalised Gram matrix (BLL, released recipe: weight 0.7).

    ``((xn @ xn.T)**2).sum_{i != j} / N**2``, with ``xn`` as in :func:`similarity_matching`: pushes samples apart.

    Args: x: features [N, D].
    Returns: a scalar without unit, from 0 to 1.
    Raises: ``ValueError`` for the shape; ``TypeError`` for the dtype.
    """
    check_rows(x)
    return _Decorrelation.apply(x) if needs_grad(x) else run("decorrelation", x, False)[0]
