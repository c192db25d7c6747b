"""The local prediction loss of a linear auxiliary head, as a differentiable function."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import run, small_linear_cross_entropy
from ._checks import check_cross_entropy, checked_target, needs_grad, once_differentiable, unified, upstream_times


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, *settings):
        loss, *grads = run("linear_cross_entropy", x, weight, bias, *settings, *ctx.needs_input_grad[:3])
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return *upstream_times(ctx.saved_tensors, upstream), *[None] * 4


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Local prediction loss: cross-entropy of a linear auxiliary head (BWBPF, the loss of every block but the last).

    ``F.cross_entropy(x.flatten(2).mean(2) @ weight.T + bias, target)``, or without the mean for x [N, D].

    Args:
        x: features [N, D], or [N, D, *spatial], which are averaged over space.
        weight: [C, D].  bias: [C] or ``None``.
        target: class indices [N] (int64) or class probabilities [N, C].
        label_smoothing, ignore_index: as in ``torch.nn.functional.cross_entropy``.
        reduction: ``"mean"`` or ``"sum"``.

    Returns: a scalar in nats.
    Raises: ``ValueError`` for shapes, values or reduction; ``TypeError`` for dtypes.
    """
    with_gradients = needs_grad(x, weight, bias)
    if not with_gradients:
        loss = small_linear_cross_entropy(x, weight, bias, target, label_smoothing, reduction, ignore_index)
        if loss is not None:
            return loss
    x, weight, bias = unified(x=x, weight=weight, bias=bias)
    if x.dim() < 2:
        raise ValueError(f"x must have shape [N, D] or [N, D, *spatial], got {list(x.shape)}")
    width, classes = x.shape[1], weight.shape[0] if weight.dim() else 0
    if weight.shape != (classes, width) or not classes:
        raise ValueError(f"weight must have shape [C, {width}] with C >= 1, got {list(weight.shape)}")
    if bias is not None and bias.shape != (classes,):
        raise ValueError(f"bias must be None or have shape [{classes}], got {list(bias.shape)}")
    target = checked_target(target, "x", x, classes)
    check_cross_entropy(label_smoothing, reduction)
    args = (target, label_smoothing, reduction, ignore_index)
    if with_gradients:
        return _LinearCrossEntropy.apply(x, weight, bias, *args)
    return run("linear_cross_entropy", x, weight, bias, *args, False, False, False)[0]
