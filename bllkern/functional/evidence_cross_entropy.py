"""Class-normalised prediction from the evidence of each class, as a differentiable function."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import families
from ..backends import run
from ._checks import check_cross_entropy, checked_target, needs_grad, once_differentiable, unified, upstream_times


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
        return *upstream_times(ctx.saved_tensors, upstream), *[None] * 6


def evidence_cross_entropy(
    a: Tensor,
    messages: Tensor,
    target: Tensor,
    family: str | families.Family = "bernoulli",
    reduction: str = "mean",
    ignore_index: int = -100,
    log_prior: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Class-normalised prediction: cross-entropy over the log evidence of each class under the forward message.

    The log evidence of class c is ``A(a + b_c) - A(a)``, ``b_c`` read as a likelihood of c (BLL); for ``"gaussian"`` it
    is ``a . b_c + |b_c|^2 / 2``, a linear head whose bias is tied to its weight.

    Args:
        a: natural parameters of the forward message [N, D].
        messages: natural parameters of the backward message of every class [C, D].
        target: class indices [N] (int64) or class probabilities [N, C].
        family, reduction: as in :func:`.agreement`, without ``"none"``.
        ignore_index: rows with this class index do not count.
        log_prior: what is added to the log evidence of each class [C], for instance its log prior probability, or
            ``-A(b_c)``, which makes the classes equally likely at ``a = 0`` (and makes ``"gaussian"`` an untied linear
            head).
        label_smoothing: the share of every target that is spread over all classes, as in
            ``torch.nn.functional.cross_entropy`` (arXiv 1512.00567, section 7).

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
    check_cross_entropy(label_smoothing, reduction)
    f.check_width(width, "a")
    args = (target, f.name, f.group_size or 0, label_smoothing, reduction, ignore_index)
    if needs_grad(a, messages, log_prior):
        return _EvidenceCrossEntropy.apply(a, messages, log_prior, *args)
    return run("evidence_cross_entropy", a, messages, log_prior, *args, False, False, False)[0]
