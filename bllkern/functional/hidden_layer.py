"""The hidden layer of a local head, as a differentiable function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import cpu, small_hidden_layer
from ._checks import once_differentiable

_EPS = 1e-5  # added to the variance


class _HiddenLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        out, *kept = cpu.hidden_layer(x, weight, _EPS)
        ctx.save_for_backward(x, weight, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, by_out):
        return cpu.hidden_layer_gradient(*ctx.saved_tensors, by_out, *ctx.needs_input_grad)


def hidden_layer(x: Tensor, weight: Tensor) -> Tensor:
    """``relu(batch_norm(x @ weight.T))`` [N, H] of x [N, D] and weight [H, D], normalised by the batch's own statistics
    and without parameters."""
    return _HiddenLayer.apply(x, weight) if small_hidden_layer(x, weight) else activated(F.linear(x, weight))


def activated(hidden: Tensor) -> Tensor:
    """Batch normalisation of [N, H, *spatial] by the batch's own statistics, then ReLU."""
    return torch.relu(torch.batch_norm(hidden, None, None, None, None, True, 0.0, _EPS, False))
