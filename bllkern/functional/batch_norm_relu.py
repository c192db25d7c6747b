"""The end of a convolutional block, all that follows the convolution in one pass, as a differentiable function."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import run
from ..backends.reference import batch_norm_relu_formula
from ._checks import check_device, graph_is_kept, needs_grad, once_differentiable, unified


class _BatchNormRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, shortcut, spend_x, *settings):
        z, features, mean, variance, *kept = run("batch_norm_relu", x, weight, bias, shortcut, *settings)
        ctx.save_for_backward(x, weight, bias, mean, variance, *kept, None if shortcut is None else z)
        ctx.spend_x, ctx.settings = spend_x, settings
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)  # most callers detach z, whose gradient would be zeros then
        return z, features, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, by_z, by_features, *_):
        if by_features is not None and by_features.shape[2] == 0:  # of pool=0, in a sum with others
            by_features = None
        if by_z is None and by_features is None:
            return (None,) * 9
        _, weight, bias, *_ = saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        found = gradients(saved, (by_z, by_features), ctx.settings[:3], *wanted, ctx.spend_x)
        by_x, by_shortcut, by_weight, by_bias = found
        return by_x, by_weight.to(weight.dtype), by_bias.to(bias.dtype), by_shortcut, *[None] * 5


def gradients(
    saved: tuple[Tensor | None, ...],
    upstream: tuple[Tensor | None, Tensor | None],
    settings: tuple[float, int, bool],
    grad_x: bool,
    grad_shortcut: bool,
    spend_x: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """By x, shortcut, weight and bias, with the arguments of the op; that by x takes its place if x may be spent and no
    other backward pass will need it."""
    over_x = grad_x and spend_x and not graph_is_kept()
    args = (*saved, *upstream, *settings, grad_x, grad_shortcut, over_x)
    by_x, by_shortcut, *rest = run("batch_norm_relu_gradient", *args)
    if over_x:
        torch.autograd.graph.increment_version(saved[0])  # whoever needs its values after all gets an error
        by_x = saved[0].detach()
    return by_x if grad_x else None, by_shortcut if grad_shortcut else None, *rest


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    max_pool: int = 1,
    ceil_mode: bool = False,
    pool: int = 4,
    shortcut: Tensor | None = None,
    spend_x: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The end of a convolutional block: batch normalisation, ReLU, max pooling, and what a local loss reads of it.

    ``z = F.max_pool2d(F.relu(F.batch_norm(x, ..., training=True) + shortcut), max_pool, ceil_mode=ceil_mode)`` and its
    average over at most ``pool`` places a side, in one pass over x after that of the statistics.  A block-local network
    hands on ``z.detach()``: then the gradient arrives by the features alone and takes one more pass, in which nothing as
    large as z is made but the gradients by x and shortcut.  A gradient that arrives by z itself takes two.

    Args:
        x: the convolution's output [N, C, H, W].
        weight, bias: [C], of the normalisation.
        eps: added to the variance.
        max_pool: side of the windows of max pooling, 1 (none), 2 or 3, which lie side by side.
        ceil_mode: whether windows that are cut off at the edge count.
        pool: features are averaged to at most so many places a side, as by ``F.adaptive_avg_pool2d``; 0 makes none.
        shortcut: what is added before ReLU, in shape and dtype as x, or ``None``; only with ``max_pool=1``.
        spend_x: unless the graph is retained, let the gradient by x take the place of x, which nobody else may read.

    Returns: z in the dtype of x; features [N, C, P, Q] ([N, C, 0, 0] for ``pool=0``); and mean and variance [C] of the
    batch (not corrected) for the running statistics, which have no gradient.  All but z are float32 (float64 for
    float64 x).
    Raises: ``ValueError`` for shapes, devices or sizes; ``TypeError`` for dtypes.
    """
    unified(x=x)  # checks alone: all keep their own dtypes
    for name, tensor in (("weight", weight), ("bias", bias)):
        unified(**{name: tensor})
        check_device("x", x.device, name, tensor)
    if x.dim() != 4:
        raise ValueError(f"x must have shape [N, C, H, W], got {list(x.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != x.shape[1:2]:
            raise ValueError(f"{name} must have shape [{x.shape[1]}], got {list(tensor.shape)}")
    if max_pool not in (1, 2, 3):
        raise ValueError(f"max_pool must be 1, 2 or 3, got {max_pool!r}")
    if pool < 0:
        raise ValueError(f"pool must be at least 0, got {pool!r}")
    if shortcut is not None:
        _check_shortcut(shortcut, x, max_pool)
    smallest = 1 if ceil_mode else max_pool
    if min(x.shape[2:]) < smallest:
        raise ValueError(f"x must have at least {smallest} places a side, got {list(x.shape)}")
    settings = (shortcut, eps, max_pool, ceil_mode, pool)
    if torch.compiler.is_compiling():  # which fuses the formula, and its gradient by z too
        full = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(full, (0, 2, 3), correction=0)
        z, features = batch_norm_relu_formula(x, weight, bias, *settings)
        return z.to(x.dtype), features, mean, variance
    if needs_grad(x, weight, bias, shortcut):
        return _BatchNormRelu.apply(x, weight, bias, shortcut, spend_x, *settings[1:])
    return run("batch_norm_relu", x, weight, bias, *settings)[:4]


def _check_shortcut(shortcut: Tensor, x: Tensor, max_pool: int) -> None:
    check_device("x", x.device, "shortcut", shortcut)
    if shortcut.shape != x.shape or shortcut.dtype != x.dtype:
        given = f"{shortcut.dtype} {list(shortcut.shape)}"
        raise ValueError(f"shortcut must have dtype and shape of x, {x.dtype} {list(x.shape)}, got {given}")
    if max_pool != 1:
        raise ValueError(f"max_pool must be 1 with a shortcut, got {max_pool!r}")
