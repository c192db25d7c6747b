"""Cross-entropy over the log evidence of each class."""

from __future__ import annotations

import torch
from torch import Tensor

from .module import _C, DTYPES, FAMILIES, empty, empty_like

_SMALL = 1 << 15  # rows * classes * width


def evidence_cross_entropy(
    a: Tensor,
    messages: Tensor,
    log_prior: Tensor | None,
    target: Tensor,
    family: str,
    group_size: int,
    label_smoothing: float,
    reduction: str,
    ignore_index: int,
    grad_a: bool,
    grad_messages: bool,
    grad_log_prior: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The op ``evidence_cross_entropy`` of ``bllkern/_ops.py`` on the CPU."""
    (rows, width), classes = a.shape, messages.shape[0]
    _check("messages", messages, a, (classes, width))
    if log_prior is not None:
        _check("log_prior", log_prior, a, (classes,))
        log_prior = log_prior.contiguous()
    a, messages = a.contiguous(), messages.contiguous()
    if target.is_floating_point():
        labels, probabilities = None, target.float().contiguous()
    else:
        labels, probabilities = target.contiguous(), None
    dtype, family_index, group = a.dtype, FAMILIES[family], group_size or max(width, 1)
    by_a = empty_like(a) if grad_a else None
    by_messages = empty_like(messages) if grad_messages else None
    by_log_prior = empty_like(log_prior) if grad_log_prior and log_prior is not None else None
    loss = a.new_empty((), dtype=torch.float32)
    workspace = None  # small jobs bring their own
    if rows * classes * width > _SMALL:
        workspace = empty(_C.evidence_workspace(rows, classes, width, group, family_index), a, torch.float32)
    _C.evidence_cross_entropy(
        a,
        messages,
        log_prior,
        labels,
        probabilities,
        by_a,
        by_messages,
        by_log_prior,
        loss,
        workspace,
        rows,
        classes,
        width,
        group,
        ignore_index,
        label_smoothing,
        family_index,
        DTYPES[dtype],
        reduction == "mean",
    )
    return loss, by_a, by_messages, by_log_prior


def _check(name: str, x: Tensor, a: Tensor, shape: tuple[int, ...]) -> None:
    if x.dtype != a.dtype or x.device != a.device or x.shape != shape:
        raise ValueError(
            f"{name} must have dtype and device of a, {a.dtype} on {a.device}, and shape {list(shape)}, "
            f"got {x.dtype} on {x.device} {list(x.shape)}"
        )
