"""The free energy of a boundary, the overlap of forward and backward message, as a differentiable function."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import families
from ..backends import run
from ._checks import check_reduction, needs_grad, once_differentiable, unified, upstream_times


class _Agreement(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, family, group_size, reduction):
        loss, *grads = run("agreement", a, b, family, group_size, reduction, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return *upstream_times(ctx.saved_tensors, upstream), None, None, None


def agreement(a: Tensor, b: Tensor, family: str | families.Family = "bernoulli", reduction: str = "mean") -> Tensor:
    """Free energy of a block: ``-log`` of the overlap of forward message ``a`` and backward message ``b``.

    ``A(a) + A(b) - A2(a + b)`` summed over the units of the last dimension (BLL, local loss of a block; the messages
    read as densities).  Gradients: ``mean(a) - mean2(a + b)`` and ``mean(b) - mean2(a + b)``.

    Args:
        a, b: natural parameters, both [..., D]; for ``gaussian_learned`` the first D/2 are ``m / var`` and the others
            ``-1 / (2 var) < 0``.  Any floating dtype.
        family: a name or a :class:`bllkern.families.Family`; see :func:`bllkern.families.get`.
        reduction: ``"mean"`` over the rows [...], ``"sum"``, or ``"none"`` for the loss of each row.

    Returns: a scalar, or [...] for ``"none"``, in nats.
    Raises: ``ValueError`` for shapes, devices, family or reduction; ``TypeError`` for dtypes.
    """
    f = families.get(family)
    a, b = unified(a=a, b=b)
    shape = a.shape
    if not shape:
        raise ValueError("a must have shape [..., D], got []")
    if b.shape != shape:
        raise ValueError(f"b must have the shape of a, {list(shape)}, got {list(b.shape)}")
    check_reduction(reduction)
    f.check_width(shape[-1], "a")
    if needs_grad(a, b):
        return _Agreement.apply(a, b, f.name, f.group_size or 0, reduction)
    return run("agreement", a, b, f.name, f.group_size or 0, reduction, False, False)[0]
