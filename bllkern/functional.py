"""The local losses as differentiable functions.

Each loss is computed with the gradients by its inputs in one pass, on the backend that :mod:`bllkern.backends` chooses.
``BLL`` is arXiv 2305.14974, ``BWBPF`` arXiv 2312.13311.  Losses are float32 (float64 for float64 inputs).  Inputs may be
non-contiguous; where dtypes differ they are promoted as torch does.  None of the losses is twice differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import families
from ._checks import (
    _check,
    _check_device,
    _check_float,
    _check_reduction,
    _check_target,
    _needs_grad,
    _promoted,
    _upstream,
)
from .convolutional import batch_norm_relu as batch_norm_relu

_ops = torch.ops.bllkern


class _Agreement(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, family, group_size, reduction):
        loss, *grads = _ops.agreement.default(a, b, family, group_size, reduction, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return *_upstream(ctx.saved_tensors, upstream), None, None, None


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
    _check_float("a", a)
    _check_float("b", b)
    _check(a.dim() >= 1, "a must have shape [..., D], got []")
    if a.shape != b.shape:  # the message of a check that holds would cost a microsecond
        raise ValueError(f"b must have the shape of a, {list(a.shape)}, got {list(b.shape)}")
    _check_device("a", a.device, b=b)
    _check_reduction(reduction)
    f.check_width(a.shape[-1], "a")
    if a.dtype != b.dtype:
        a, b = _promoted(a, b)
    if _needs_grad(a, b):
        return _Agreement.apply(a, b, f.name, f.group_size or 0, reduction)
    return _ops.agreement.default(a, b, f.name, f.group_size or 0, reduction, False, False)[0]


class _EvidenceCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, messages, log_prior, *settings):
        needed = ctx.needs_input_grad[:3]
        loss, *grads = _ops.evidence_cross_entropy.default(a, messages, log_prior, *settings, *needed)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return *_upstream(ctx.saved_tensors, upstream), *[None] * 5


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
    _check_float("a", a)
    _check_float("messages", messages)
    # no message is made for a check that holds: each would cost a microsecond
    shape, classes = a.shape, len(messages)
    if len(shape) != 2:
        raise ValueError(f"a must have shape [N, D], got {list(shape)}")
    if messages.shape != (classes, shape[1]) or not classes:
        raise ValueError(f"messages must have shape [C, {shape[1]}] with C >= 1, got {list(messages.shape)}")
    if log_prior is not None and log_prior.shape != (classes,):
        raise ValueError(f"log_prior must be None or have shape [{classes}], got {list(log_prior.shape)}")
    _check_device("a", a.device, messages=messages, target=target, log_prior=log_prior)
    _check_target(target, shape[0], classes, ignore_index)
    _check_reduction(reduction, ("mean", "sum"))
    f.check_width(shape[1], "a")
    if not a.dtype == messages.dtype == (a if log_prior is None else log_prior).dtype:
        a, messages, log_prior = _promoted(a, messages, log_prior)
    args = (target, f.name, f.group_size or 0, reduction, ignore_index)
    if _needs_grad(a, messages, log_prior):
        return _EvidenceCrossEntropy.apply(a, messages, log_prior, *args)
    return _ops.evidence_cross_entropy.default(a, messages, log_prior, *args, False, False, False)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, *settings):
        loss, *grads = _ops.linear_cross_entropy.default(x, weight, bias, *settings, *ctx.needs_input_grad[:3])
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return *_upstream(ctx.saved_tensors, upstream), *[None] * 4


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
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            _check_float(name, tensor)
    if x.dim() < 2:
        raise ValueError(f"x must have shape [N, D] or [N, D, *spatial], got {list(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or not len(weight):
        raise ValueError(f"weight must have shape [C, {x.shape[1]}] with C >= 1, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be None or have shape [{len(weight)}], got {list(bias.shape)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    _check_device("x", x.device, weight=weight, bias=bias, target=target)
    _check_target(target, len(x), len(weight), ignore_index)
    _check_reduction(reduction, ("mean", "sum"))
    x, weight, bias = _promoted(x, weight, bias)
    args = (target, label_smoothing, reduction, ignore_index)
    if _needs_grad(x, weight, bias):
        return _LinearCrossEntropy.apply(x, weight, bias, *args)
    return _ops.linear_cross_entropy.default(x, weight, bias, *args, False, False, False)[0]


class _LinearAgreement(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, b, row_weights, *settings):
        by_x, by_weight, by_bias, by_b = ctx.needs_input_grad[:4]
        by_z = by_x or by_weight or by_bias
        z, loss, grad_z, grad_b = _ops.linear_agreement.default(x, weight, bias, b, row_weights, *settings, by_z, by_b)
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
        error, by_b = _upstream((grad_z, grad_b), upstream)
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
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias), ("b", b)):
        if tensor is not None:
            _check_float(name, tensor)
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
    if row_weights is not None and (row_weights.shape != (rows,) or not row_weights.is_floating_point()):
        given = f"{row_weights.dtype} {list(row_weights.shape)}"
        raise ValueError(f"row_weights must be None or floats of shape [{rows}], got {given}")
    _check_device("x", x.device, weight=weight, bias=bias, b=b, row_weights=row_weights)
    _check_reduction(reduction, ("mean", "sum"))
    f.check_width(width, "b")
    x, weight, bias = _promoted(x, weight, bias)
    if torch.float64 in (x.dtype, b.dtype):
        x, weight, bias, b = _promoted(x, weight, bias, b)
    if row_weights is not None:
        row_weights = row_weights.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    settings = (row_weights, f.name, f.group_size or 0, reduction)
    if _needs_grad(x, weight, bias, b):
        return _LinearAgreement.apply(x, weight, bias, b, *settings)
    return _ops.linear_agreement.default(x, weight, bias, b, *settings, False, False)[:2]


class _SimilarityMatching(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, ignore_index):
        loss, grad = _ops.similarity_matching.default(x, target, ignore_index, True)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return *_upstream(ctx.saved_tensors, upstream), None, None


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
    _check_float("x", x)
    _check(x.dim() == 2, f"x must have shape [N, D], got {list(x.shape)}")
    _check_device("x", x.device, target=target)
    _check_target(target, len(x), None, ignore_index)
    if _needs_grad(x):
        return _SimilarityMatching.apply(x, target.detach(), ignore_index)
    return _ops.similarity_matching.default(x, target.detach(), ignore_index, False)[0]


class _Decorrelation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        loss, grad = _ops.decorrelation.default(x, True)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return _upstream(ctx.saved_tensors, upstream)[0]


def decorrelation(x: Tensor) -> Tensor:
    """Mean squared off-diagonal entry of the batch's normalised Gram matrix (BLL, released recipe: weight 0.7).

    ``((xn @ xn.T)**2).sum_{i != j} / N**2``, with ``xn`` as in :func:`similarity_matching`: pushes samples apart.

    Args: x: features [N, D].
    Returns: a scalar without unit, from 0 to 1.
    Raises: ``ValueError`` for the shape; ``TypeError`` for the dtype.
    """
    _check_float("x", x)
    _check(x.dim() == 2, f"x must have shape [N, D], got {list(x.shape)}")
    return _Decorrelation.apply(x) if _needs_grad(x) else _ops.decorrelation.default(x, False)[0]


class _Prototypes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, num_classes, ignore_index):
        means, counts = _ops.prototypes.default(x, target, num_classes, ignore_index)
        ctx.save_for_backward(x, target, counts)
        ctx.ignore_index = ignore_index
        ctx.mark_non_differentiable(counts)
        return means, counts

    @staticmethod
    @once_differentiable
    def backward(ctx, by_means, _):
        x, target, counts = ctx.saved_tensors
        return _ops.prototypes_gradient.default(x, target, counts, by_means, ctx.ignore_index), None, None, None


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
    _check_float("x", x)
    _check(x.dim() == 2, f"x must have shape [N, D], got {list(x.shape)}")
    _check(num_classes >= 1, f"num_classes must be at least 1, got {num_classes}")
    _check_device("x", x.device, target=target)
    if target.is_floating_point():
        raise TypeError(f"target must be int64 class indices, got {target.dtype}")
    _check_target(target, len(x), num_classes, ignore_index)
    if _needs_grad(x):
        return _Prototypes.apply(x, target, num_classes, ignore_index)
    return _ops.prototypes.default(x, target, num_classes, ignore_index)
