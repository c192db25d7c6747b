"""When a block learns: the schedules of a boundary.

- eager: the local gradient is taken inside the forward pass, which frees the block's activations at once; activation
  memory is that of the largest block, whatever the depth.
- deferred: local losses wait for :func:`local_loss`, their differentiable sum, to be added to the global loss.
- immediate: as eager, and the block's own optimizer steps as soon as its gradient is there, and frees it.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .ownership import discover

if TYPE_CHECKING:
    from ..blocks import Boundary


def eager(boundary: Boundary, z: Tensor, loss: Tensor) -> None:
    """Backpropagate through the block that ends here, now."""
    _refuse_data_parallel(boundary)
    if not loss.requires_grad:
        return
    discover(boundary, z, boundary.step.owners)
    scaler = boundary.step.scaler
    try:
        (loss if scaler is None else scaler.scale(loss)).backward()
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            raise RuntimeError(
                f"the backward pass of {boundary.label} needs a tensor that has changed: {error}"
            ) from error
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            f"{boundary.label} reads a tensor computed before the previous boundary, which skips that boundary: "
            "its graph is freed already. Cut where all paths meet"
        ) from error


def deferred(boundary: Boundary, z: Tensor, loss: Tensor) -> None:
    """Keep the loss for :func:`local_loss`."""
    if boundary.pending and boundary.pending_step is not boundary.step:
        boundary.pending = []
        raise RuntimeError(
            f"the local loss of {boundary.label} from the step before was never used: with schedule='deferred' "
            "write `(loss + bllkern.local_loss(net)).backward()`"
        )
    discover(boundary, z, boundary.step.owners)
    boundary.pending.append(loss)
    boundary.handed_on.append((z, z._version))
    boundary.pending_step = boundary.step


def check_unchanged(boundary: Boundary) -> None:
    """Raise ``RuntimeError`` if an activation, whose backward pass waits, was changed in place after its boundary."""
    if any(z._version != version for z, version in boundary.handed_on):
        boundary.pending, boundary.handed_on = [], []
        raise RuntimeError(
            f"the activation of {boundary.label} was changed in place (by ReLU(inplace=True), say) after its boundary, "
            "before its backward pass: use inplace=False there, cut after that operation, or use schedule='eager'"
        )


def immediate(boundary: Boundary, z: Tensor, loss: Tensor) -> None:
    """Backpropagate, step the block's own optimizer and free its gradients; while accumulating, only the first."""
    if boundary.optimizer is None and boundary.optimizer_factory is None:
        raise RuntimeError(
            f"{boundary.label} has schedule='immediate' but no optimizer: call "
            "`bllkern.optimizers(net, lambda params: torch.optim.SGD(params, lr=0.1))` before training"
        )
    eager(boundary, z, loss)
    boundary.make_optimizers()
    step = boundary.step
    for optimizer in boundary.optimizers() if not step.accumulate else ():
        optimizer.step() if step.scaler is None else step.scaler.step(optimizer)
        for group in optimizer.param_groups:  # `optimizer.zero_grad()` takes several times as long
            for parameter in group["params"]:
                parameter.grad = None


_NOTHING = nullcontext()


def without_autocast(device_type: str):
    """A context in which local losses keep full precision: entering that of torch takes long where nothing is cast."""
    off = device_type in ("cpu", "cuda") and not torch.is_autocast_enabled(device_type)
    return _NOTHING if off else torch.autocast(device_type, enabled=False)


SCHEDULES = {"eager": eager, "deferred": deferred, "immediate": immediate}


def check(schedule: str | None, isolate: bool) -> str:
    """The schedule of that name; by default eager, or deferred where losses are not isolated.

    Raises ``ValueError`` for another name, and for a schedule that frees graphs which other losses still need.
    """
    schedule = schedule or ("eager" if isolate else "deferred")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {sorted(SCHEDULES)}, got {schedule!r}")
    if not isolate and schedule != "deferred":
        raise ValueError(f"schedule must be 'deferred' for an objective that does not isolate, got {schedule!r}")
    return schedule


def check_finite(boundary: Boundary, loss: Tensor, terms: dict[str, Tensor]) -> None:
    """Raise ``FloatingPointError`` naming block and term, on the CPU, where looking costs no synchronisation."""
    if loss.device.type != "cpu" or math.isfinite(loss.item()):
        return
    values = ", ".join(f"{name} = {float(term.detach()):g}" for name, term in terms.items())
    raise FloatingPointError(f"the local loss of {boundary.label} is not finite: {values}")


def _refuse_data_parallel(boundary: Boundary) -> None:
    """Stock DDP ignores gradients that arrive inside its forward, so it would silently not reduce them."""
    wrapper = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    if wrapper is not None and any(module is boundary for module in wrapper.modules()):
        raise RuntimeError(
            f"{boundary.label} takes its gradient inside the forward pass, which DistributedDataParallel around "
            "the whole network does not reduce: use schedule='deferred', or wrap each block in DDP instead"
        )
