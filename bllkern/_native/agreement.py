"""Agreement of two messages."""

from __future__ import annotations

import torch
from torch import Tensor

from .module import _C, DTYPES, FAMILIES, check_like, empty, empty_like, on_stream


def agreement(
    a: Tensor, b: Tensor, family: str, group_size: int, reduction: str, grad_a: bool, grad_b: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The op ``agreement`` of ``bllkern/_ops.py`` on the device of a."""
    check_like("b", b, "a", a)
    a, b = a.contiguous(), b.contiguous()
    shape, dtype = a.shape, a.dtype
    width, per_row = shape[-1], reduction == "none"
    rows = a.numel() // width if width else shape[:-1].numel()
    loss = empty(shape[:-1] if per_row else (), a, torch.float32)
    by_a = empty_like(a) if grad_a else None
    by_b = empty_like(b) if grad_b else None
    job = (
        a,
        b,
        by_a,
        by_b,
        loss,
        rows,
        width,
        group_size or width,
        FAMILIES[family],
        DTYPES[dtype],
        per_row,
        1 / rows if rows and reduction == "mean" else 1.0,
    )
    if a.is_cuda:
        on_stream(_C.agreement_cuda, _C.agreement_cuda_partials, a.device, job)
    else:
        _C.agreement(*job)
    return loss, by_a, by_b
