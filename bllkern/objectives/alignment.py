"""The output's error, carried backwards through other weights than the forward ones: baselines to be compared with.

BLL (arXiv 2305.14974) carries the *target* backwards.  These carry the gradient of the global loss by the output, the
error, so they wait for the whole forward pass and keep its activations: no local loss, no isolation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import UninitializedParameter, is_lazy

from ..execution.targets import Targets
from ..feedback import LazyWeight
from .base import EndToEnd, check_options
from .features import raised, rows

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, repr=False)
class FeedbackAlignment(EndToEnd):
    """Every linear layer sends the error back through ``B`` in the place of its own transposed weight.

    With ``weights="random"``, ``B`` is fixed and random, drawn as ``torch.nn`` draws weights: feedback alignment
    (Lillicrap et al., arXiv 1411.0247).  With ``"sign"``, ``B = sign(W) * mean |W|`` of the current weight:
    sign-symmetric feedback (Liao et al., arXiv 1510.05067, up to that scale).  A boundary stands after every
    ``nn.Linear`` and ``nn.Conv1d/2d/3d`` of the network, wherever the cuts are; all else is differentiated as it is.
    """

    weights: str = "random"

    def __post_init__(self):
        check_options(self, weights=("random", "sign"))

    def places(self, net, cuts):
        return [name for name, module in net.named_modules() if isinstance(module, LINEAR)]

    def build(self, target_features):
        return Transport(self.weights)


@dataclass(frozen=True, repr=False)
class DirectFeedbackAlignment(EndToEnd):
    """Every boundary gets the error through a fixed random matrix of its own (Nokland, arXiv 1609.01596).

    ``pool``: one number for each of at most so many places a side of a convolutional activation; from the sides of the
    activation up, that is the full matrix of the paper.  Needs :func:`bllkern.convert`, which knows the output.
    """

    pool: int = 4

    def __post_init__(self):
        check_options(self)

    def build(self, target_features):
        return Broadcast(target_features, self.pool)


class Transport(nn.Module):
    """At the end of one linear layer: what leaves it through its input goes through ``weight`` instead of its own."""

    def __init__(self, weights: str):
        super().__init__()
        self.channel_dim: int | None = None
        self.weight = UninitializedParameter(requires_grad=False) if weights == "random" else None

    def match(self, layer: nn.Module) -> None:
        """Draw the weight for ``layer``, shaped as its own."""
        if self.weight is not None:
            self.weight.materialize(layer.weight.shape, layer.weight.device, layer.weight.dtype)
            bound = layer.weight[0].numel() ** -0.5
            nn.init.uniform_(self.weight, -bound, bound)

    def initialize(self, z: Tensor) -> None:
        """Nothing to size: :meth:`match` does it."""

    def forward(self, z: Tensor, layer: nn.Module, args: tuple, step: Targets) -> Tensor:
        if not isinstance(layer, LINEAR) or self.weight is not None and is_lazy(self.weight):
            raise RuntimeError("feedback alignment needs bllkern.convert, which puts it after every linear layer")
        return _Exchange.apply(z, args[0], layer, self.weight)


class Broadcast(nn.Module):
    """At one boundary: the error [N, C] times a fixed random matrix [C, D], in the place of the gradient from above."""

    def __init__(self, target_features: int, pool: int):
        super().__init__()
        self.pool, self.channel_dim = pool, None
        self.link = LazyWeight(target_features, bias=False, trained=False)

    def initialize(self, z: Tensor) -> None:
        self.link(rows(z, False, self.pool, self.channel_dim))

    def forward(self, z: Tensor, layer: nn.Module | None, args: tuple, step: Targets) -> Tensor:
        weight, _ = self.link(rows(z.detach(), False, self.pool, self.channel_dim))

        def message(error: Tensor) -> Tensor:
            return raised(error.flatten(0, -2).to(weight) @ weight, z, self.channel_dim, self.pool)

        return _Replace.apply(z, step, message)


def watch_output(net: nn.Module) -> None:
    """Let every step's targets keep the gradient of the loss by what ``net`` returns."""

    def watch(module, args, output):
        step = Targets.running()
        if step is not None and isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(step.errors.append)

    net.register_forward_hook(watch)


class _Exchange(torch.autograd.Function):
    """The identity on ``z = layer(x)``; backwards, x gets ``B^T grad`` where the layer alone would send ``W^T grad``.

    A linear layer's gradient by its input is linear in the weight, so what is added here is that for ``B - W``.
    """

    @staticmethod
    def forward(ctx, z, x, layer, weight):
        ctx.layer, ctx.weight = layer, weight
        ctx.x = (x.shape, x.dtype, x.requires_grad)
        return z.view_as(z)

    @staticmethod
    def backward(ctx, grad):
        shape, dtype, needed = ctx.x
        if not needed:
            return grad, None, None, None
        own = ctx.layer.weight.detach()
        other = own.sign() * own.abs().mean() if ctx.weight is None else ctx.weight
        with torch.enable_grad():
            x = torch.zeros(shape, dtype=own.dtype, device=own.device, requires_grad=True)
            z = functional_call(ctx.layer, {"weight": other - own}, (x,))
        return grad, torch.autograd.grad(z, x, grad.to(z))[0].to(dtype), None, None


class _Replace(torch.autograd.Function):
    """The identity; backwards, ``message(error of the step's output)`` whatever comes from above."""

    @staticmethod
    def forward(ctx, z, step, message):
        ctx.step, ctx.message = step, message
        return z.view_as(z)

    @staticmethod
    def backward(ctx, grad):
        if not ctx.step.errors:
            raise RuntimeError("direct feedback alignment needs bllkern.convert, which knows the network's output")
        return ctx.message(ctx.step.errors[-1]).to(grad), None, None
