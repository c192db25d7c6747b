"""A convolution whose backward pass takes some images at a time, perhaps of what it normalises first."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import run
from ._checks import once_differentiable

LARGE_BYTES = (
    4 << 20
)  # of the larger of input and output of a convolution, from which on its gradients are taken in pieces
PIECES = 4  # each at least so many times as large as the weight, which is laid out anew for each
PRODUCTS = 512  # for each value read, from which on making the value again costs little beside the convolution


class _Convolution(torch.autograd.Function):
    """A convolution on the CPU, perhaps of ``relu(batch_norm(x))``, whose gradients are taken of some images at a time.

    The library lays out input, output and their gradients anew for itself.  Beside the input, the gradients and the
    other activations of a block, these copies make the peak of its memory; of a few images they are small.

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
        return torch.conv2d(z, weight, bias, *settings), mean, variance

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
    """Of how many images [N, C, H, W] at a time :func:`convolution` takes gradients; ``None`` where ``conv`` does that.

    That is everywhere but for float32 on a CPU, and there for channels-last and for padding by other values than 0.
    """
    plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and conv.weight.is_contiguous()
    if not plain or x.dim() != 4 or x.numel() == 0 or x.device.type != "cpu" or not x.is_contiguous():
        return None
    if not x.dtype == conv.weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
        return None
    size = x.numel() // x.shape[1] * max(conv.in_channels, conv.out_channels // math.prod(conv.stride)) * x.itemsize
    whole = size < max(LARGE_BYTES, PIECES**2 * conv.weight.nbytes)
    return len(x) if whole else -(-len(x) // PIECES)


def cheap_to_repeat(conv: nn.Conv2d) -> bool:
    """Whether what ``conv`` reads is rather made again for the backward pass than kept."""
    return conv.weight[:, 0].numel() >= PRODUCTS


def convolution(
    conv: nn.Conv2d, x: Tensor, images: int, norm: nn.BatchNorm2d | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``conv(x)``, or ``conv(F.relu(norm(x)))`` for a ``norm`` in training; gradients of ``images`` at a time.

    Returns: the output, and with ``norm`` mean and variance (not corrected) of the batch for its running statistics.
    """
    normalized = (None, None, None) if norm is None else (norm.weight, norm.bias, norm.eps)
    settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return _Convolution.apply(x, *normalized, conv.weight, conv.bias, images, *settings)
