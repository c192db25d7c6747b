"""Schemas and fakes of the operations: what goes in, what comes out, no kernel.

Every loss is returned together with its gradients, so that one pass over the data yields both; a gradient that is not
asked for is ``None``.  Losses are float32 (float64 for float64 inputs), gradients have the dtype of
what they belong to.  ``reduction`` is ``"mean"`` over rows, ``"sum"``, or (``agreement`` only) ``"none"``; an empty batch
has loss 0.  Targets are class indices [N] (int64; rows equal to ``ignore_index`` do not count) or float rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMAS = {
    # a, b: [..., D]; loss: [] or [...]; gradients like a and b
    "agreement": "(Tensor a, Tensor b, str family, int group_size, str reduction, bool grad_a, bool grad_b)"
    " -> (Tensor, Tensor?, Tensor?)",
    # a: [N, D], messages: [C, D], log_prior: [C], target: [N] or [N, C]
    "evidence_cross_entropy": "(Tensor a, Tensor messages, Tensor? log_prior, Tensor target, str family, int group_size,"
    " float label_smoothing, str reduction, int ignore_index, bool grad_a, bool grad_messages, bool grad_log_prior)"
    " -> (Tensor, Tensor?, Tensor?, Tensor?)",
    # x: [N, D, *spatial], weight: [C, D], bias: [C], target: [N] or [N, C]
    "linear_cross_entropy": "(Tensor x, Tensor weight, Tensor? bias, Tensor target, float label_smoothing,"
    " str reduction, int ignore_index, bool grad_x, bool grad_weight, bool grad_bias)"
    " -> (Tensor, Tensor?, Tensor?, Tensor?)",
    # x: [N, K], weight: [D, K], bias: [D], b: [N, D], in a dtype of its own; row_weights: [N] factors of the rows'
    # losses, float32 (or float64); z = x @ weight.T + bias, loss, gradients by z and b
    "linear_agreement": "(Tensor x, Tensor weight, Tensor? bias, Tensor b, Tensor? row_weights, str family,"
    " int group_size, str reduction, bool grad_z, bool grad_b) -> (Tensor, Tensor, Tensor?, Tensor?)",
    # x: [N, C, H, W], weight, bias: [C], shortcut: like x, where max_pool is 1; z = max_pool(relu(batch_norm(x) +
    # shortcut)) in the memory layout of x, features = adaptive_avg_pool(z) to at most `pool` places a side (0: none), mean and variance [C] of the
    # batch; and like features, for the gradient, the share of places where z > 0 and the mean of normalised x there.  All
    # but z are in the dtype of a loss.
    "batch_norm_relu": "(Tensor x, Tensor weight, Tensor bias, Tensor? shortcut, float eps, int max_pool, bool ceil_mode,"
    " int pool) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    # z: of the op above where it had a shortcut; by_z, by_features: gradients.  What is returned are the gradients by x,
    # shortcut, weight and bias, the last two in the dtype of a loss.  One that is not wanted has no elements, nor has that
    # by x with over_x: it takes the place of x.
    "batch_norm_relu_gradient": "(Tensor(a!) x, Tensor weight, Tensor bias, Tensor mean, Tensor variance, Tensor active,"
    " Tensor along, Tensor? z, Tensor? by_z, Tensor? by_features, float eps, int max_pool, bool ceil_mode, bool grad_x,"
    " bool grad_shortcut, bool over_x) -> (Tensor, Tensor, Tensor, Tensor)",
    # x: [N, D], target: [N] or [N, E]
    "similarity_matching": "(Tensor x, Tensor target, int ignore_index, bool grad_x) -> (Tensor, Tensor?)",
    # x: [N, D]
    "decorrelation": "(Tensor x, bool grad_x) -> (Tensor, Tensor?)",
    # x: [N, D], target: [N]; prototypes: [num_classes, D] in the dtype of a loss, counts: [num_classes]
    "prototypes": "(Tensor x, Tensor target, int num_classes, int ignore_index) -> (Tensor, Tensor)",
    # grad: [num_classes, D], by the prototypes; what is returned is the gradient by x
    "prototypes_gradient": "(Tensor x, Tensor target, Tensor counts, Tensor grad, int ignore_index) -> Tensor",
}

_library = torch.library.Library("bllkern", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)


def impl(name: str, kernel, dispatch_key: str) -> None:
    """Register ``kernel`` for op ``name`` under a dispatch key (``"CPU"``, ``"CUDA"``)."""
    _library.impl(name, kernel, dispatch_key)


def _loss(x: Tensor, shape=()) -> Tensor:
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _like(x: Tensor | None, wanted: bool) -> Tensor | None:
    return x.new_empty(x.shape) if wanted and x is not None else None


def _agreement(a, b, family, group_size, reduction, grad_a, grad_b):
    return _loss(a, a.shape[:-1] if reduction == "none" else ()), _like(a, grad_a), _like(b, grad_b)


def _evidence_cross_entropy(
    a, messages, log_prior, target, family, group_size, label_smoothing, reduction, ignore_index,
    grad_a, grad_messages, grad_log_prior,
):  # fmt: skip
    return _loss(a), _like(a, grad_a), _like(messages, grad_messages), _like(log_prior, grad_log_prior)


def _linear_cross_entropy(
    x, weight, bias, target, label_smoothing, reduction, ignore_index, grad_x, grad_weight, grad_bias
):
    return _loss(x), _like(x, grad_x), _like(weight, grad_weight), _like(bias, grad_bias)


def _linear_agreement(x, weight, bias, b, row_weights, family, group_size, reduction, grad_z, grad_b):
    z = x.new_empty(b.shape)
    return z, _loss(x), _like(z, grad_z), _like(b, grad_b)


def pooled_shape(x: Tensor, max_pool: int, ceil_mode: bool, pool: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of activation and features of ``batch_norm_relu``."""
    images, channels, height, width = x.shape
    cut_off = max_pool - 1 if ceil_mode else 0
    height, width = (height + cut_off) // max_pool, (width + cut_off) // max_pool
    return (images, channels, height, width), (images, channels, min(height, pool), min(width, pool))


def layout(x: Tensor) -> torch.memory_format:
    """Of activations of ``batch_norm_relu`` and their gradients: channels-last where ``x`` [N, C, H, W] is."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _activation(x: Tensor, shape) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))


def _batch_norm_relu(x, weight, bias, shortcut, eps, max_pool, ceil_mode, pool):
    z, features = pooled_shape(x, max_pool, ceil_mode, pool)
    found = (_loss(x, shape) for shape in (features, x.shape[1:2], x.shape[1:2]))
    kept = (torch.empty_like(_loss(x, features), memory_format=layout(x)) for _ in range(2))
    return _activation(x, z), *found, *kept


def _batch_norm_relu_gradient(x, weight, bias, *rest):
    *_, grad_x, grad_shortcut, over_x = rest
    returned = grad_x and not over_x, grad_shortcut
    by_x, by_shortcut = (_activation(x, x.shape) if one else x.new_empty(0) for one in returned)
    return by_x, by_shortcut, _loss(x, weight.shape), _loss(x, bias.shape)


def _similarity_matching(x, target, ignore_index, grad_x):
    return _loss(x), _like(x, grad_x)


def _decorrelation(x, grad_x):
    return _loss(x), _like(x, grad_x)


def _prototypes(x, target, num_classes, ignore_index):
    return _loss(x, (num_classes, x.shape[1])), target.new_empty(num_classes)


def _prototypes_gradient(x, target, counts, grad, ignore_index):
    return _like(x, True)


for _name in SCHEMAS:
    torch.library.register_fake(f"bllkern::{_name}", globals()[f"_{_name}"], lib=_library)
