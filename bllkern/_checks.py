"""What the losses check of their arguments before anything runs, and what their autograd functions share."""

from __future__ import annotations

import torch
from torch import Tensor

_REDUCTIONS = ("mean", "sum", "none")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_float(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")


def _check_device(of: str, device: torch.device, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.device != device:
            raise ValueError(f"{name} must be on the device of {of}, {device}, got {x.device}")


def _check_reduction(reduction: str, allowed=_REDUCTIONS) -> None:
    if reduction not in allowed:
        raise ValueError(f"reduction must be one of {allowed}, got {reduction!r}")


def _check_target(target: Tensor, rows: int, classes: int | None, ignore_index: int) -> None:
    """``target`` is [rows] class indices below ``classes``, or [rows, classes] floats.  Values are checked on the CPU."""
    if target.is_floating_point():
        _check(
            target.dim() == 2 and len(target) == rows and classes in (None, target.shape[1]),
            f"target must have shape [{rows}, {classes or 'E'}] as floats, got {list(target.shape)}",
        )
        return
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64 class indices or floats, got {target.dtype}")
    if target.shape != (rows,):
        raise ValueError(f"target must have shape [{rows}] as class indices, got {list(target.shape)}")
    if classes is not None and target.device.type == "cpu" and rows and not torch.compiler.is_compiling():
        lowest, highest = target.aminmax()
        if lowest.item() >= 0 and highest.item() < classes:
            return
        wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
        if wrong.any():
            raise ValueError(
                f"target must hold class indices from 0 to {classes - 1} (or ignore_index {ignore_index}), "
                f"got {int(target[wrong][0])}"
            )


def _promoted(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    dtype = tensors[0].dtype
    if all(x is None or x.dtype == dtype for x in tensors):
        return tensors
    for x in tensors[1:]:
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    return tuple(x if x is None or x.dtype == dtype else x.to(dtype) for x in tensors)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _upstream(grads: tuple[Tensor | None, ...], upstream: Tensor | None) -> list[Tensor | None]:
    """``grads`` times the gradient of the loss; where that is known to be 1 without waiting for a device, ``grads``."""
    if upstream is None:
        return [None] * len(grads)
    if upstream.dim():
        upstream = upstream.unsqueeze(-1)
    elif upstream.device.type == "cpu" and not torch.compiler.is_compiling() and upstream.item() == 1:
        return list(grads)
    return [None if grad is None else (grad * upstream).to(grad.dtype) for grad in grads]
