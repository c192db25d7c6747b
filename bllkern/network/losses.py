"""The boundaries of a network, and their losses in the last step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..blocks import Boundary
from ..execution import schedules


def boundaries(net: nn.Module) -> dict[str, Boundary]:
    """The boundaries of ``net`` by the name of the module at whose end they stand, in the order of registration."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    for path, module in net.named_modules():
        if isinstance(module, Boundary) and not module.name:
            module.name = path.removesuffix("local").removesuffix(".") or path
    return {module.name: module for module in net.modules() if isinstance(module, Boundary)}


def local_loss(net: nn.Module) -> Tensor:
    """The differentiable sum of the local losses that wait since the last forward pass (schedule ``"deferred"``).

    Returns: a scalar.  Raises ``RuntimeError`` if none waits, or if an activation was changed in place after its
    boundary, whose backward pass needs it.
    """
    found = boundaries(net).values()
    waiting = [loss for boundary in found for loss in boundary.pending]
    if not waiting:
        raise RuntimeError(
            "no local loss waits: convert with schedule='deferred' and call net(x) in training under bllkern.targets(y)"
        )
    for boundary in found:
        schedules.check_unchanged(boundary)
    for boundary in found:
        boundary.pending, boundary.handed_on = [], []
    return torch.stack([loss.to(waiting[0].device) for loss in waiting]).sum()


def local_losses(net: nn.Module) -> dict[str, Tensor]:
    """The local loss of each block in the last training step, by block: detached scalars.

    Raises ``FloatingPointError`` for a loss that is not finite (which waits for the device that computes it).
    """
    losses = {name: boundary.loss for name, boundary in boundaries(net).items() if boundary.loss is not None}
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise FloatingPointError(f"the local loss of block {name!r} is not finite: {float(loss):g}")
    return losses
