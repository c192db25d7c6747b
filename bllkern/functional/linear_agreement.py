"""A linear block with its free energy as a differentiable function."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import families
from ..backends import run
from ._checks import check_device, check_reduction, needs_grad, once_differentiable, unified, upstream_times


class _LinearAgreement(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, b, row_weights, *settings):
        by_x, by_weight, by_bias, by_b = ctx.needs_input_grad[:4]
        by_z = by_x or by_weight or by_bias
        args = (x, weight, bias, b, row_weights, *settings, by_z, by_b)
        z, loss, grad_z, grad_b = run("linear_agreement", *args)
        if not by_z:
            ctx.mark_non_differentiable(z)
        ctx.save_for_backward(x if by_weight else None, weight if by_x else None, grad_z, grad_b)
        if not torch.compiler.is_compiling():  # dynamo does not know the method in every version
            ctx.set_materialize_grads(False)  # most callers detach z, whose gradient would be zeros then
        return z, loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_z, upstream):
        x, weight, grad_z, grad_b = ctx.saved_tensors
        error, by_b = upstream_times((grad_z, grad_b), upstream)
        if upstream_z is not None:
            error = upstream_z if error is None else error + upstream_z
        if error is None:
            return None, None, None, by_b, *[None] * 4
        by_x, by_weight, by_bias = ctx.needs_input_grad[:3]
        return (
            torch.mm(error, weight) if by_x else None,
            torch.mm(error.t(), x) if by_weight else None,
            error.sum(0) if by_bias else None,
            by_b,
            *[None] * 4,
        )


def linear_agreement(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    b: Tensor,
    family: str | families.Family = "bernoulli",
    reduction: str = "mean",
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A linear block and its free energy: forward message ``z`` and its :func:`.agreement` with ``b``.

    ``z = F.linear(x, weight, bias); loss = agreement(z, b, family, reduction)``, where one pass over z yields the loss
    and its gradient by z.  The gradients by x and weight are then one matrix product each.

    Args:
        x: inputs of the block [N, K].
        weight: [D, K].  bias: [D] or ``None``.
        b: natural parameters of the backward message of every row [N, D]; it keeps its dtype, so that a message in
            float32 can meet activations in half precision.
        family: as in :func:`.agreement`; for ``gaussian_learned`` the second half of z must come out negative.
        reduction: ``"mean"`` over the N rows or ``"sum"``.
        row_weights: factors of the rows' losses [N], floats, by which nothing is differentiated; the mean is still one
            over N rows.

    Returns: z [N, D], in the dtype of the inputs, and the loss, a scalar in nats.  Both are differentiable, once; a
    block-local network hands on ``z.detach()``, which leaves the backward pass nothing to do for z.
    Raises: ``ValueError`` for shapes, devices, family or reduction; ``TypeError`` for dtypes.
    """
    f = families.get(family)
    x, weight, bias = unified(x=x, weight=weight, bias=bias)
    if not b.is_floating_point():
        raise TypeError(f"b must be a floating-point tensor, got {b.dtype}")
    check_device("x", x.device, "b", b)
    if b.dtype is not x.dtype and torch.float64 in (x.dtype, b.dtype):
        x, weight, bias, b = unified(x=x, weight=weight, bias=bias, b=b)
    if x.dim() != 2:
        raise ValueError(f"x must have shape [N, K], got {list(x.shape)}")
    rows, inner = x.shape
    if weight.dim() != 2 or weight.shape[1] != inner:
        raise ValueError(f"weight must have shape [D, {inner}], got {list(weight.shape)}")
    width = weight.shape[0]
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"bias must be None or have shape [{width}], got {list(bias.shape)}")
    if b.shape != (rows, width):
        raise ValueError(f"b must have shape [{rows}, {width}], got {list(b.shape)}")
    if row_weights is not None:
        if row_weights.shape != (rows,) or not row_weights.is_floating_point():
            given = f"{row_weights.dtype} {list(row_weights.shape)}"
            raise ValueError(f"row_weights must be None or floats of shape [{rows}], got {given}")
        check_device("x", x.device, "row_weights", row_weights)
        row_weights = row_weights.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    check_reduction(reduction, ("mean", "sum"))
    f.check_width(width, "b")
    settings = (row_weights, f.name, f.group_size or 0, reduction)
    if needs_grad(x, weight, bias, b):
        return _LinearAgreement.apply(x, weight, bias, b, *settings)
    return run("linear_agreement", x, weight, bias, b, *settings, False, False)[:2]
