"""The local losses as differentiable functions.

Each loss is computed with the gradients by its inputs in one pass, on the backend that :mod:`bllkern.backends` chooses.
``BLL`` is arXiv 2305.14974, ``BWBPF`` arXiv 2312.13311.  Losses are float32 (float64 for float64 inputs).  Inputs may be
non-contiguous; where dtypes differ they are promoted as torch does.  None of the losses is twice differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import families
from ._checks import (
    check_device,
    check_reduction,
    check_rows,
    checked_target,
    needs_grad,
    once_differentiable,
    unified,
    upstream_times,
)
from .backends import run, small_linear_cross_entropy
from .convolutional import batch_norm_relu as batch_norm_relu


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

    ``A(a) + A(b) - A2(a + b)`` summed over the units of the last dimension (BLL, local loss of a block; the messages read
    as densities).  Gradients: ``mean(a) - mean2(a + b)`` and ``mean(b) - mean2(a + b)``.

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


class _EvidenceCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, messages, log_prior, *settings):
        needed = ctx.needs_input_grad[:3]
        loss, *grads = run("evidence_cross_entropy", a, messages, log_prior, *settings, *needed)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return *upstream_times(ctx.saved_tensors, upstream), *[None] * 5


def evidence_cross_entropy(
    a: Tensor,
    messages: Tensor,
    target: Tensor,
    family: str | families.Family = "bernoulli",
    reduction: str = "mean",
    ignore_index: int = -100,
    log_prior: Tensor | None = None,
) -> Tensor:
    """Class-normalised prediction: cross-entropy over the log evidence of each class under the forward message.

    The log evidence of class c is ``A(a + b_c) - A(a)``, ``b_c`` read as a likelihood of c (BLL); for ``"gaussian"`` it is
    ``a . b_c + |b_c|^2 / 2``, a linear head whose bias is tied to its weight.

    Args:
        a: natural parameters of the forward message [N, D].
        messages: natural parameters of the backward message of every class [C, D].
        target: class indices [N] (int64) or class probabilities [N, C].
        family, reduction: as in :func:`agreement`, without ``"none"``.
        ignore_index: rows with this class index do not count.
        log_prior: what is added to the log evidence of each class [C], for instance its log prior probability, or
            ``-A(b_c)``, which makes the classes equally likely at ``a = 0`` (and an untied linear head of ``"gaussian"``).

    Returns: a scalar in nats.
    Raises: ``ValueError`` for shapes, devices, values, family or reduction; ``TypeError`` for dtypes.
    """
    f = families.get(family)
    a, messages, log_prior = unified(a=a, messages=messages, log_prior=log_prior)
    if a.dim() != 2:
        raise ValueError(f"a must have shape [N, D], got {list(a.shape)}")
    width, classes = a.shape[1], messages.shape[0] if messages.dim() else 0
    if messages.shape != (classes, width) or not classes:
        raise ValueError(f"messages must have shape [C, {width}] with C >= 1, got {list(messages.shape)}")
    if log_prior is not None and log_prior.shape != (classes,):
        raise ValueError(f"log_prior must be None or have shape [{classes}], got {list(log_prior.shape)}")
    target = checked_target(target, "a", a, classes)
    check_reduction(reduction, ("mean", "sum"))
    f.check_width(width, "a")
    args = (target, f.name, f.group_size or 0, reduction, ignore_index)
    if needs_grad(a, messages, log_prior):
        return _EvidenceCrossEntropy.apply(a, messages, log_prior, *args)
    return run("evidence_cross_entropy", a, messages, log_prior, *args, False, False, False)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, *settings):
        loss, *grads = run("linear_cross_entropy", x, weight, bias, *settings, *ctx.needs_input_grad[:3])
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return *upstream_times(ctx.saved_tensors, upstream), *[None] * 4


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Local prediction loss: cross-entropy of a linear auxiliary head (BWBPF, the loss of every block but the last).

    ``F.cross_entropy(x.flatten(2).mean(2) @ weight.T + bias, target)``, or without the mean for x [N, D].

    Args:
        x: features [N, D], or [N, D, *spatial], which are averaged over space.
        weight: [C, D].  bias: [C] or ``None``.
        target: class indices [N] (int64) or class probabilities [N, C].
        label_smoothing, ignore_index: as in ``torch.nn.functional.cross_entropy``.
        reduction: ``"mean"`` or ``"sum"``.

    Returns: a scalar in nats.
    Raises: ``ValueError`` for shapes, values or reduction; ``TypeError`` for dtypes.
    """
    with_gradients = needs_grad(x, weight, bias)
    if not with_gradients:
        loss = small_linear_cross_entropy(x, weight, bias, target, label_smoothing, reduction, ignore_index)
        if loss is not None:
            return loss
    x, weight, bias = unified(x=x, weight=weight, bias=bias)
    if x.dim() < 2:
        raise ValueError(f"x must have shape [N, D] or [N, D, *spatial], got {list(x.shape)}")
    width, classes = x.shape[1], weight.shape[0] if weight.dim() else 0
    if weight.shape != (classes, width) or not classes:
        raise ValueError(f"weight must have shape [C, {width}] with C >= 1, got {list(weight.shape)}")
    if bias is not None and bias.shape != (classes,):
        raise ValueError(f"bias must be None or have shape [{classes}], got {list(bias.shape)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    target = checked_target(target, "x", x, classes)
    check_reduction(reduction, ("mean", "sum"))
    args = (target, label_smoothing, reduction, ignore_index)
    if with_gradients:
        return _LinearCrossEntropy.apply(x, weight, bias, *args)
    return run("linear_cross_entropy", x, weight, bias, *args, False, False, False)[0]


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
    """A linear block and its free energy in one pass: forward message ``z`` and its :func:`agreement` with ``b``.

    ``z = F.linear(x, weight, bias); loss = agreement(z, b, family, reduction)``, where the end of the matrix product also
    yields the loss and its gradient by z.  The gradients by x and weight are then one matrix product each.

    Args:
        x: inputs of the block [N, K].
        weight: [D, K].  bias: [D] or ``None``.
        b: natural parameters of the backward message of every row [N, D]; it keeps its dtype, so that a message in
            float32 can meet activations in half precision.
        family: as in :func:`agreement`; for ``gaussian_learned`` the second half of z must come out negative.
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


class _SimilarityMatching(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, ignore_index):
        loss, grad = run("similarity_matching", x, target, ignore_index, True)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return *upstream_times(ctx.saved_tensors, upstream), None, None


def similarity_matching(x: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean squared difference between the Gram matrix of the batch's features and that of its targets.

    ``mean((xn @ xn.T - T)**2)``, with ``xn`` the rows of x centred and scaled to length 1 (constant rows are 0), and ``T``
    label equality for class indices, or ``yn @ yn.T`` for target rows.  No gradient reaches the target.

    Args:
        x: features [N, D].
        target: class indices [N] (int64), or rows [N, E] (for instance the feedback message of each sample).
        ignore_index: rows with this class index do not count.

    Returns: a scalar without unit, from 0 to 4.
    Raises: ``ValueError`` for shapes or devices; ``TypeError`` for dtypes.
    """
    check_rows(x)
    target = checked_target(target, "x", x, None)
    if needs_grad(x):
        return _SimilarityMatching.apply(x, target, ignore_index)
    return run("similarity_matching", x, target, ignore_index, False)[0]


class _Decorrelation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        loss, grad = run("decorrelation", x, True)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return upstream_times(ctx.saved_tensors, upstream)[0]


def decorrelation(x: Tensor) -> Tensor:
    """Mean squared off-diagonal entry of the batch's normalised Gram matrix (BLL, released recipe: weight 0.7).

    ``((xn @ xn.T)**2).sum_{i != j} / N**2``, with ``xn`` as in :func:`similarity_matching`: pushes samples apart.

    Args: x: features [N, D].
    Returns: a scalar without unit, from 0 to 1.
    Raises: ``ValueError`` for the shape; ``TypeError`` for the dtype.
    """
    check_rows(x)
    return _Decorrelation.apply(x) if needs_grad(x) else run("decorrelation", x, False)[0]


class _Prototypes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, num_classes, ignore_index):
        means, counts = run("prototypes", x, target, num_classes, ignore_index)
        ctx.save_for_backward(x, target, counts)
        ctx.ignore_index = ignore_index
        ctx.mark_non_differentiable(counts)
        return means, counts

    @staticmethod
    @once_differentiable
    def backward(ctx, by_means, _):
        x, target, counts = ctx.saved_tensors
        return run("prototypes_gradient", x, target, counts, by_means, ctx.ignore_index), None, None, None


def prototypes(x: Tensor, target: Tensor, num_classes: int, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Mean direction of the features of each class in the batch.

    ``prototypes[c] = mean(xn[target == c])``, with ``xn`` as in :func:`similarity_matching`.  A class without rows has
    count 0 and a prototype of zeros: mask by ``counts > 0`` what is learnt from prototypes.

    Args:
        x: features [N, D].
        target: class indices [N] (int64).
        num_classes: C.
        ignore_index: rows with this class index do not count.

    Returns: prototypes [C, D] (float32; float64 for float64 features), lengths from 0 to 1, and counts [C] (int64).
    Raises: ``ValueError`` for shapes, devices or values; ``TypeError`` for dtypes.
    """
    check_rows(x)
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if target.is_floating_point():
        raise TypeError(f"target must be int64 class indices, got {target.dtype}")
    target = checked_target(target, "x", x, num_classes)
    if needs_grad(x):
        return _Prototypes.apply(x, target, num_classes, ignore_index)
    return run("prototypes", x, target, num_classes, ignore_index)
