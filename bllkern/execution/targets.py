"""What the local objectives learn from, for the duration of a ``with`` block."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import NoneType

import torch
from torch import Tensor

from . import batch_norm

KINDS = ("classes", "probabilities", "real")


@dataclass(frozen=True, eq=False)
class Targets:
    """The targets of one step.  ``kind`` is ``None`` for floats whose kind is to be read from their values."""

    y: Tensor
    kind: str | None = None
    ignore_index: int = -100
    scale: float = 1.0
    scaler: torch.amp.GradScaler | None = None
    accumulate: bool = False
    owners: dict[int, object] = field(default_factory=dict)  # the boundary of every parameter met, by identity
    errors: list[Tensor] = field(default_factory=list)  # gradients of the loss by the output, once they are known

    @staticmethod
    def running() -> Targets | None:
        """The targets of the step that runs, if one does."""
        return _current.get()


_current: ContextVar[Targets | None] = ContextVar("bllkern_targets", default=None)


@contextmanager
def targets(
    y: Tensor,
    *,
    kind: str | None = None,
    ignore_index: int = -100,
    scale: float = 1.0,
    scaler: torch.amp.GradScaler | None = None,
    accumulate: bool = False,
):
    """Give the local objectives of every block-local network called in this ``with`` block its targets.

    Args:
        y: class indices [B] or [B, T] (int64), class probabilities [B, C], or real vectors [B, D] (floats).
        kind: ``"probabilities"`` or ``"real"`` for floats; by default rows that are non-negative and sum to 1 in the
            first batch are probabilities.
        ignore_index: samples (or tokens) with this class index teach nothing, as in ``F.cross_entropy``.
        scale: factor on every local loss; ``1 / n`` when gradients are accumulated over n micro-batches.
        scaler: of fp16 training, where blocks learn inside the forward pass (schedules ``"eager"``, ``"immediate"``):
            their losses are scaled by it before their backward pass, and what ``immediate`` steps, it steps.  The rest
            is as ever: ``scaler.scale(loss).backward()``, ``scaler.step(optimizer)``, ``scaler.update()``.
        accumulate: ``True`` for all micro-batches but the last: blocks with schedule ``"immediate"`` keep their
            gradients instead of stepping.

    Raises: ``TypeError`` for a ``y`` that is no tensor of int64 or floats or another ``scaler``, ``ValueError`` for the
    shape of ``y`` or ``kind``.
    """
    if not isinstance(y, Tensor) or not (y.dtype == torch.int64 or y.is_floating_point()):
        raise TypeError(f"y must be a tensor of int64 or floats, got {y.dtype if isinstance(y, Tensor) else type(y)}")
    if y.dim() not in (1, 2) or y.is_floating_point() and y.dim() != 2:
        raise ValueError(f"y must have shape [B] or [B, T] as int64, [B, C] as floats, got {y.dtype} {list(y.shape)}")
    if kind not in (None, *KINDS) or kind is not None and (kind == "classes") == y.is_floating_point():
        raise ValueError(f"kind must be 'classes' for int64 y, 'probabilities' or 'real' for floats, got {kind!r}")
    if not isinstance(scaler, (torch.amp.GradScaler, NoneType)):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
    if scaler is not None:
        scaler.scale(torch.ones((), device=y.device))  # makes its tensors, before the streams of blocks read them
    kind = kind if y.is_floating_point() else "classes"
    token = _current.set(Targets(y, kind, ignore_index, scale, scaler, accumulate))
    try:
        yield
    except ValueError as error:
        batch_norm.name_it(error)
        raise
    finally:
        _current.reset(token)


def given() -> Targets | None:
    """The targets of the step that runs, if any."""
    return _current.get()


def current() -> Targets:
    """The targets of the step that runs; ``RuntimeError`` outside of :func:`targets`."""
    found = given()
    if found is None:
        raise RuntimeError(
            "a block-local network in training needs targets: write `with bllkern.targets(y): output = net(x)`, "
            "or call net.eval() or torch.no_grad() to compute the plain output"
        )
    return found


def kind_of(y: Tensor) -> str:
    """Whether float targets [B, C] are class probabilities or real vectors, by their values."""
    sums = y.detach().float().sum(1)
    return "probabilities" if bool((y >= 0).all() and ((sums - 1).abs() < 1e-3).all()) else "real"
