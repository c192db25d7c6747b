"""What the losses check of their arguments before anything runs, and what their autograd functions share."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable as _once_differentiable

from ..backends import scale_

_REDUCTIONS = ("mean", "sum", "none")


def unified(**tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in their common dtype: floats on the device of the first one, or ``None``.

    The usual case, nothing to convert, costs a comparison each: these checks run at every call of every loss.
    """
    given = tuple(tensors.values())
    first = given[0]
    dtype, device = first.dtype, first.device
    if dtype.is_floating_point:
        for x in given[1:]:
            if x is not None and (x.dtype is not dtype or x.device != device):
                break
        else:
            return given
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
    for name, x in tensors.items():
        if x is not None:
            check_device(next(iter(tensors)), device, name, x)
            dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x if x is None or x.dtype == dtype else x.to(dtype) for x in tensors.values())


def check_device(of: str, device: torch.device, name: str, x: Tensor) -> None:
    if x.device != device:
        raise ValueError(f"{name} must be on the device of {of}, {device}, got {x.device}")


def check_reduction(reduction: str, allowed=_REDUCTIONS) -> None:
    if reduction not in allowed:
        raise ValueError(f"reduction must be one of {allowed}, got {reduction!r}")


def checked_target(target: Tensor, of: str, x: Tensor, classes: int | None) -> Tensor:
    """``target``, class indices [N] or floats [N, classes] for the N rows of ``x`` (``of`` in messages), without graph.

    That indices are below ``classes`` is for the op to check, where that needs no synchronisation.
    """
    device, rows = x.device, x.shape[0]
    if target.device != device:
        check_device(of, device, "target", target)
    if target.dtype is torch.int64:
        if target.shape != (rows,):
            raise ValueError(f"target must have shape [{rows}] as class indices, got {list(target.shape)}")
    elif not target.is_floating_point():
        raise TypeError(f"target must be int64 class indices or floats, got {target.dtype}")
    elif target.dim() != 2 or len(target) != rows or classes not in (None, target.shape[1]):
        raise ValueError(f"target must have shape [{rows}, {classes or 'E'}] as floats, got {list(target.shape)}")
    return target.detach() if target.requires_grad else target


def check_cross_entropy(label_smoothing: float, reduction: str) -> None:
    check_reduction(reduction, ("mean", "sum"))
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")


def check_rows(x: Tensor) -> None:
    unified(x=x)
    if x.dim() != 2:
        raise ValueError(f"x must have shape [N, D], got {list(x.shape)}")


def needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for x in tensors:  # a generator would cost as much as all the rest
            if x is not None and x.requires_grad:
                return True
    return False


def once_differentiable(backward):
    """torch's decorator of the same name; what it costs is spent only where a second derivative could be asked for."""
    guarded = _once_differentiable(backward)

    @functools.wraps(backward)
    def once(ctx, *upstream):
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *upstream)

    return once


def upstream_times(grads: tuple[Tensor | None, ...], upstream: Tensor | None) -> list[Tensor | None]:
    """``grads`` times the gradient of the loss, in place where no other backward pass will ask for them.

    Nothing is computed where that is known to be 1: on a CPU by looking, on a GPU by the kernel.
    """
    if upstream is None:
        return [None] * len(grads)
    compiling = torch.compiler.is_compiling()
    if upstream.dim():
        upstream = upstream.unsqueeze(-1)
    elif upstream.device.type == "cpu" and not compiling and upstream.item() == 1:
        return list(grads)
    if compiling or graph_is_kept():
        return [None if grad is None else (grad * upstream).to(grad.dtype) for grad in grads]
    return [None if grad is None else scale_(grad, upstream) for grad in grads]


# whether the backward pass that runs was asked to retain the graph
graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
