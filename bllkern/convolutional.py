"""What convolutional blocks are made of, as differentiable functions: convolution, and all that follows it in one pass."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_device, needs_grad, once_differentiable, unified
from .backends import run
from .backends.reference import batch_norm_relu_formula


LARGE_BYTES = 4 << 20  # of the larger of input and output of a convolution, from which on it is taken in pieces
PIECES = 4  # each at least so many times as large as the weight, which is laid out anew for each
PRODUCTS = 512  # for each value read, from which on making the value again costs little beside the convolution


class _Convolution(torch.autograd.Function):
    """A convolution on the CPU that takes some images at a time, perhaps of ``relu(batch_norm(x))``.

    The library lays out input, output and their gradients anew for itself.  Of a few images these copies stay in the
    caches and in memory that the allocator has at hand; of all images they are as large as the activations, and each is
    mapped by the system page by page, which may cost more than the arithmetic.

    What is normalised first is not kept: the backward pass makes it again, of the images at hand.
    """

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight, bias, images, *settings):
        z, mean, variance = x, None, None
        if norm_weight is not None:
            z, _, mean, variance, *_ = run("batch_norm_relu", x, norm_weight, norm_bias, None, eps, 1, False, 0)
            ctx.mark_non_differentiable(mean, variance)
        ctx.save_for_backward(x, weight, norm_weight, norm_bias, mean, variance)
        ctx.eps, ctx.images, ctx.settings, ctx.biases = eps, images, settings, None if bias is None else bias.shape
        out = None
        for places in _pieces(len(x), images):
            result = torch.conv2d(z[places], weight, bias, *settings)
            if len(result) == len(x):
                return result, mean, variance
            out = result.new_empty(len(x), *result.shape[1:]) if out is None else out
            out[places].copy_(result)
        return out, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, by_out, *_):
        x, weight, norm_weight, norm_bias, mean, variance = ctx.saved_tensors
        through_norm = any(ctx.needs_input_grad[:3])
        wanted = ctx.needs_input_grad[4:6]
        stride, padding, dilation, groups = ctx.settings
        settings = (ctx.biases, stride, padding, dilation, False, (0, 0), groups)
        by_z, sums = torch.empty_like(x) if through_norm else None, [None, None]
        for places in _pieces(len(x), ctx.images):
            part = x[places]
            if mean is not None:
                part = F.batch_norm(part, mean, variance, norm_weight, norm_bias, False, 0.0, ctx.eps).relu_()
            given = (by_out[places], part, weight, *settings)
            if by_z is not None:  # one gradient after the other: each needs copies
                by_z[places].copy_(torch.ops.aten.convolution_backward(*given, (True, False, False))[0])
            if any(wanted):
                found = torch.ops.aten.convolution_backward(*given, (False, *wanted))[1:]
                sums = [new if old is None else old.add_(new) for old, new in zip(sums, found, strict=True)]
        if mean is None or not through_norm:
            return by_z, None, None, None, *sums, *[None] * 5
        none = x.new_empty(*x.shape[:2], 0, 0)
        given = (x, norm_weight, norm_bias, mean, variance, none, none, None, by_z, None)
        by_x, _, *by_norm = run("batch_norm_relu_gradient", *given, ctx.eps, 1, False, ctx.needs_input_grad[0], False)
        return by_x, *by_norm, None, *sums, *[None] * 5


def _pieces(count: int, images: int) -> list[slice]:
    return [slice(start, start + images) for start in range(0, count, images)]


def images_at_a_time(conv: nn.Conv2d, x: Tensor) -> int | None:
    """How many images [N, C, H, W] :func:`convolution` takes at a time; ``None`` where ``conv`` itself is to be called.

    That is everywhere but for float32 on a CPU, and there for channels-last and for padding by other values than 0.
    """
    plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and conv.weight.is_contiguous()
    if not plain or x.dim() != 4 or x.numel() == 0 or x.device.type != "cpu" or not x.is_contiguous():
        return None
    if not x.dtype == conv.weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
        return None
    size = x[:, 0].numel() * max(conv.in_channels, conv.out_channels // math.prod(conv.stride)) * x.itemsize
    whole = size < max(LARGE_BYTES, PIECES**2 * conv.weight.nbytes)
    return len(x) if whole else -(-len(x) // PIECES)


def cheap_to_repeat(conv: nn.Conv2d) -> bool:
    """Whether what ``conv`` reads is rather made again for the backward pass than kept."""
    return conv.weight[:, 0].numel() >= PRODUCTS


def convolution(
    conv: nn.Conv2d, x: Tensor, images: int, norm: nn.BatchNorm2d | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``conv(x)``, or ``conv(F.relu(norm(x)))`` for a ``norm`` in training, ``images`` at a time.

    Returns: the output, and with ``norm`` mean and variance (not corrected) of the batch for its running statistics.
    """
    normalized = (None, None, None) if norm is None else (norm.weight, norm.bias, norm.eps)
    settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return _Convolution.apply(x, *normalized, conv.weight, conv.bias, images, *settings)


class _BatchNormRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, shortcut, *settings):
        z, features, mean, variance, *kept = run("batch_norm_relu", x, weight, bias, shortcut, *settings)
        ctx.save_for_backward(x, weight, bias, mean, variance, *kept, None if shortcut is None else z)
        ctx.settings = settings
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)  # most callers detach z, whose gradient would be zeros then
        return z, features, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, by_z, by_features, *_):
        if by_features is not None and by_features.shape[2] == 0:  # of pool=0, in a sum with others
            by_features = None
        if by_z is None and by_features is None:
            return (None,) * 8
        x, weight, bias, *_ = saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        gradients = run("batch_norm_relu_gradient", *saved, by_z, by_features, *ctx.settings[:3], *wanted)
        by_x, by_shortcut, by_weight, by_bias = gradients
        return by_x, by_weight.to(weight.dtype), by_bias.to(bias.dtype), by_shortcut, *[None] * 4


def batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    max_pool: int = 1,
    ceil_mode: bool = False,
    pool: int = 4,
    shortcut: Tensor | None = None,
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

    Returns: z in the dtype of x; features [N, C, P, Q] ([N, C, 0, 0] for ``pool=0``); and mean and variance [C] of the batch (not corrected) for the
    running statistics, which have no gradient.  All but z are float32 (float64 for float64 x).
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
        return _BatchNormRelu.apply(x, weight, bias, *settings)
    return run("batch_norm_relu", x, weight, bias, *settings)[:4]


def _check_shortcut(shortcut: Tensor, x: Tensor, max_pool: int) -> None:
    check_device("x", x.device, "shortcut", shortcut)
    if shortcut.shape != x.shape or shortcut.dtype != x.dtype:
        given = f"{shortcut.dtype} {list(shortcut.shape)}"
        raise ValueError(f"shortcut must have dtype and shape of x, {x.dtype} {list(x.shape)}, got {given}")
    if max_pool != 1:
        raise ValueError(f"max_pool must be 1 with a shortcut, got {max_pool!r}")
