"""A convolution of what it normalises first, which is made again for its backward pass instead of kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._ops import layout
from ..backends import normalized_relu, run
from ._checks import once_differentiable
from .batch_norm_relu import gradients

# Of what is normalised, the bytes from which on it counts in the peak of memory, and the products for each value from
# which on making the value again costs little beside the convolution.
LARGE_BYTES = {"cpu": 2 << 20, "cuda": 32 << 20}
PRODUCTS = {"cpu": 512, "cuda": 128}
PIECE_BYTES = 2 << 20  # that a CPU makes again at a time, or as much as the weight, whose gradient is added up


class _NormalizedConvolution(torch.autograd.Function):
    """A convolution of ``relu(batch_norm(x))``, of which nothing but x is kept."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, spend_x, weight, bias, *settings):
        z, _, mean, variance, *_ = run("batch_norm_relu", x, norm_weight, norm_bias, None, eps, 1, False, 0)
        ctx.mark_non_differentiable(mean, variance)
        ctx.save_for_backward(x, weight, norm_weight, norm_bias, mean, variance)
        ctx.eps, ctx.spend_x, ctx.settings = eps, spend_x, settings
        ctx.biases = None if bias is None else bias.shape
        return torch.conv2d(z, weight, bias, *settings), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, by_out, *_):
        x, weight, norm_weight, norm_bias, mean, variance = ctx.saved_tensors
        through_norm = any(ctx.needs_input_grad[:3])
        stride, padding, dilation, groups = ctx.settings
        settings = (ctx.biases, stride, padding, dilation, False, (0, 0), groups)
        wanted = ctx.needs_input_grad[5:7]
        by_z, sums = None, [None, None]
        images = max(max(PIECE_BYTES, weight.nbytes) * len(x) // x.nbytes, 1) if x.is_cpu else len(x)
        weight = weight.contiguous(memory_format=layout(x))  # once, not for each piece
        for places in (slice(start, start + images) for start in range(0, len(x), images)):
            z = normalized_relu(x[places], mean, variance, norm_weight, norm_bias, ctx.eps)
            part, *found = _gradients(through_norm, wanted, by_out[places], z, weight, *settings)
            sums = [new if old is None else old.add_(new) for old, new in zip(sums, found, strict=True)]
            if through_norm and len(part) < len(x):
                by_z = torch.empty_like(x) if by_z is None else by_z
                by_z[places] = part
            elif through_norm:
                by_z = part
        if not through_norm:
            return *[None] * 5, *sums, *[None] * 4
        none = x.new_empty(*x.shape[:2], 0, 0)
        saved, settings = (x, norm_weight, norm_bias, mean, variance, none, none, None), (ctx.eps, 1, False)
        by_x, _, *by_norm = gradients(saved, (by_z, None), settings, ctx.needs_input_grad[0], False, ctx.spend_x)
        return by_x, *by_norm, None, None, *sums, *[None] * 4


def _gradients(by_input: bool, by_parameters: tuple[bool, bool], *given) -> tuple[Tensor | None, ...]:
    """Of a convolution; on a CPU one after the other, as each needs a copy of a weight."""
    backward = torch.ops.aten.convolution_backward
    if given[0].is_cuda:
        return backward(*given, (by_input, *by_parameters))
    first = backward(*given, (True, False, False))[0] if by_input else None
    return first, *(backward(*given, (False, *by_parameters))[1:] if any(by_parameters) else (None, None))


def cheap_to_repeat(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether what ``conv`` reads is rather made from ``x`` again for the backward pass than kept.

    On a CPU only in float32, and not for padding by other values than 0.
    """
    weight, kind = conv.weight, x.device.type
    if kind not in PRODUCTS or x.nbytes < LARGE_BYTES[kind] or weight.numel() < PRODUCTS[kind] * weight.shape[1]:
        return False
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    if torch.is_autocast_enabled(kind):
        return kind == "cuda" and x.dtype == torch.get_autocast_dtype(kind)
    return x.dtype == weight.dtype and (kind == "cuda" or x.dtype == torch.float32)


def normalized_convolution(
    conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor, spend_x: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """``conv(F.relu(norm(x)))`` for a ``norm`` in training, in the dtype of ``x``; ``spend_x`` as in
    :func:`.batch_norm_relu`.

    Returns: the output, and mean and variance (not corrected) of the batch for the running statistics of ``norm``.
    """
    settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
    weight, bias = (p if p is None else p.to(x.dtype) for p in (conv.weight, conv.bias))
    return _NormalizedConvolution.apply(x, norm.weight, norm.bias, norm.eps, spend_x, weight, bias, *settings)
