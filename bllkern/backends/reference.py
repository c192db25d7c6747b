"""Every operation in plain torch, as the formulas read: the oracle of the tests and the fallback on any device.

Arguments and results are those of the schemas in ``bllkern/_ops.py``.  Arithmetic is in float32, or in float64 for
float64 inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import families
from .._ops import layout, pooled_shape


def _family(name: str, group_size: int) -> families.Family:
    return families.Categorical(group_size or None) if name == "categorical" else families.get(name)


def _full(x: Tensor) -> Tensor:
    """``x`` in the precision that the arithmetic uses."""
    return x if x.dtype == torch.float64 else x.float()


def _gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """``gradient`` as the op returns it: in the dtype of ``x`` and contiguous, whatever the strides of ``x``."""
    return gradient.to(x.dtype).contiguous()


def _mean_or_sum(rows: int, reduction: str) -> float:
    return 1 / max(rows, 1) if reduction == "mean" else 1.0


def agreement(a, b, family, group_size, reduction, grad_a, grad_b):
    """``A(a) + A(b) - A2(a + b)``; gradients ``mean(a) - mean2(a + b)`` and ``mean(b) - mean2(a + b)``."""
    f, x, y = _family(family, group_size), _full(a), _full(b)
    loss = f.agreement(x, y)
    scale = _mean_or_sum(loss.numel(), reduction)
    posterior = f.mean2(x + y) if grad_a or grad_b else None
    return (
        loss.contiguous() if reduction == "none" else loss.sum() * scale,
        _gradient((f.mean(x) - posterior) * scale, a) if grad_a else None,
        _gradient((f.mean(y) - posterior) * scale, b) if grad_b else None,
    )


def check_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise ``ValueError`` for a class index out of range, on the CPU, where looking at it needs no synchronisation."""
    if target.device.type != "cpu":
        return
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if len(wrong):
        allowed = f"class indices from 0 to {classes - 1} (or ignore_index {ignore_index})"
        raise ValueError(f"target must hold {allowed}, got {int(wrong[0])}")


def _softmax_error(logits, target, label_smoothing, reduction, ignore_index):
    """Cross-entropy of ``logits`` [N, C] and its gradient by them, both reduced over the rows that count."""
    if not target.is_floating_point():
        check_labels(target, logits.shape[1], ignore_index)
    if target.is_floating_point():
        probabilities, counted = target.to(logits), logits.new_ones(len(logits), 1)
    else:
        counted = (target != ignore_index).to(logits)[:, None]
        probabilities = F.one_hot(target.where(target != ignore_index, 0), logits.shape[1]).to(logits)
    total = probabilities.sum(-1, keepdim=True) * (1 - label_smoothing) + label_smoothing
    probabilities = probabilities * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    # -inf logits of classes that have no probability cost nothing
    cost = torch.where(probabilities > 0, -probabilities * torch.log_softmax(logits, -1), 0)
    scale = counted / counted.sum().clamp(min=1) if reduction == "mean" else counted
    error = torch.softmax(logits, -1) * total - probabilities
    return (cost * scale).sum(), error * scale


def evidence_cross_entropy(
    a, messages, log_prior, target, family, group_size, label_smoothing, reduction, ignore_index,
    grad_a, grad_messages, grad_log_prior,
):  # fmt: skip
    """Cross-entropy over classes of the log evidences ``A(a + b_c) - A(a)`` plus the log prior of each class.

    With the softmax error ``e`` [N, C]: gradient by ``a`` is ``sum_c e_c (mean(a + b_c) - mean(a))``, by ``b_c``
    ``sum_n e_c mean(a + b_c)``, by the log prior ``sum_n e_c``.
    """
    f, x, b = _family(family, group_size), _full(a), _full(messages)
    # [N, C, D] below: the reference holds what the kernels must not
    logits = f.evidence(x[:, None], b) + (0 if log_prior is None else _full(log_prior))
    loss, error = _softmax_error(logits, target, label_smoothing, reduction, ignore_index)
    if grad_a or grad_messages:
        mean = f.mean(x[:, None] + b)
        by_a = torch.einsum("nc,ncd->nd", error, mean) - error.sum(1, keepdim=True) * f.mean(x)
        by_messages = torch.einsum("nc,ncd->cd", error, mean)
    return (
        loss,
        _gradient(by_a, a) if grad_a else None,
        _gradient(by_messages, messages) if grad_messages else None,
        _gradient(error.sum(0), log_prior) if grad_log_prior and log_prior is not None else None,
    )


def linear_cross_entropy(
    x, weight, bias, target, label_smoothing, reduction, ignore_index, grad_x, grad_weight, grad_bias
):
    """Cross-entropy of ``mean_over_space(x) @ weight.T + bias``."""
    pooled, w = _full(x).flatten(2).mean(2) if x.dim() > 2 else _full(x), _full(weight)
    logits = pooled @ w.T if bias is None else pooled @ w.T + _full(bias)
    loss, error = _softmax_error(logits, target, label_smoothing, reduction, ignore_index)
    by_x = None
    if grad_x:
        by_x = error @ w
        if x.dim() > 2:
            positions = x[0, 0].numel() if len(x) else 1
            by_x = (by_x / positions).reshape(*by_x.shape, *[1] * (x.dim() - 2)).expand(x.shape)
        by_x = _gradient(by_x, x)
    return (
        loss,
        by_x,
        _gradient(error.T @ pooled, weight) if grad_weight else None,
        _gradient(error.sum(0), bias) if grad_bias and bias is not None else None,
    )


def weighted_agreement(agreement, a, b, weights, family, group_size, reduction, grad_a, grad_b):
    """``agreement`` of a and b [N, D], of whichever dtypes, where the loss of row n counts ``weights[n]`` times."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    x, y = a.to(dtype), b.to(dtype)
    if weights is None:
        loss, by_a, by_b = agreement(x, y, family, group_size, reduction, grad_a, grad_b)
    else:
        losses, by_a, by_b = agreement(x, y, family, group_size, "none", grad_a, grad_b)
        weights = weights * _mean_or_sum(len(a), reduction)
        loss = (losses * weights).sum()
        by_a, by_b = (None if g is None else g.mul_(weights[:, None]) for g in (by_a, by_b))
    return loss, None if by_a is None else by_a.to(a.dtype), None if by_b is None else by_b.to(b.dtype)


def linear_then_agreement(agreement, x, weight, bias, b, row_weights, *settings):
    """``linear_agreement`` by torch's matrix product and one pass of ``agreement`` over z, in the cache if it fits."""
    z = F.linear(x, weight, bias)
    return z, *weighted_agreement(agreement, z, b, row_weights, *settings)


def linear_agreement(x, weight, bias, b, row_weights, family, group_size, reduction, grad_z, grad_b):
    """``agreement`` of ``z = x @ weight.T + bias`` and ``b``, and z itself."""
    inputs = (None if t is None else _full(t) for t in (x, weight, bias, b))
    settings = (family, group_size, reduction, grad_z, grad_b)
    z, loss, by_z, by_b = linear_then_agreement(agreement, *inputs, row_weights, *settings)
    return (
        z.to(x.dtype),
        loss,
        _gradient(by_z, x) if grad_z else None,
        _gradient(by_b, b) if grad_b else None,
    )


def _like(activation, x):
    """``activation`` in the dtype and memory layout of ``x`` [N, C, H, W]."""
    return activation.to(x.dtype).contiguous(memory_format=layout(x))


def batch_norm_relu_formula(x, weight, bias, shortcut, eps, max_pool, ceil_mode, pool):
    """Activation and features of ``batch_norm_relu`` in the precision of the arithmetic, differentiable."""
    t = F.batch_norm(_full(x), None, None, weight.to(_full(x)), bias.to(_full(x)), True, 0.0, eps)
    if shortcut is not None:
        t = t + shortcut
    z = F.max_pool2d(t.relu(), max_pool, ceil_mode=ceil_mode)
    return z, _averaged(z, pool)


def _averaged(z, pool):
    sides = [min(side, pool) for side in z.shape[2:]]
    return F.adaptive_avg_pool2d(z, sides).contiguous() if pool else z.new_empty(*z.shape[:2], 0, 0)


def _chosen(x, weight, bias, shortcut, mean, variance, eps, max_pool, ceil_mode):
    """Normalised x, z, and where in x [H * W] each place of z has its value from."""
    normalized = (_full(x) - mean[:, None, None]) * torch.rsqrt(variance + eps)[:, None, None]
    t = normalized * weight.to(normalized)[:, None, None] + bias.to(normalized)[:, None, None]
    if shortcut is not None:
        t = t + shortcut
    z, index = F.max_pool2d(t.relu(), max_pool, ceil_mode=ceil_mode, return_indices=True)
    return normalized, z, index


def batch_norm_relu(x, weight, bias, shortcut, eps, max_pool, ceil_mode, pool):
    """``adaptive_avg_pool(max_pool(relu(batch_norm(x) + shortcut)))`` and what its gradient needs to know of each bin."""
    if x.numel() == 0:
        z, features = (_full(x).new_zeros(shape) for shape in pooled_shape(x, max_pool, ceil_mode, pool))
        zero = z.new_zeros(x.shape[1])
        kept = (features.clone(memory_format=layout(x)) for _ in range(2))
        return _like(z, x), features, zero, zero.clone(), *kept
    variance, mean = torch.var_mean(_full(x), (0, 2, 3), correction=0)
    normalized, z, index = _chosen(x, weight, bias, shortcut, mean, variance, eps, max_pool, ceil_mode)
    along = normalized.flatten(2).gather(2, index.flatten(2)).view_as(z).where(z > 0, 0)
    features, *kept = (_averaged(y, pool) for y in (z, (z > 0).to(z), along))
    return _like(z, x), features, mean, variance, *(y.contiguous(memory_format=layout(x)) for y in kept)


def batch_norm_relu_gradient(
    x,
    weight,
    bias,
    mean,
    variance,
    active,
    along,
    z,
    by_z,
    by_features,
    eps,
    max_pool,
    ceil_mode,
    grad_x,
    grad_shortcut,
    over_x,
):
    """By x ``weight r (g - by_bias / M - normalized by_weight / M)``, r the reciprocal deviation, g the gradient before
    ReLU, which is that by the shortcut; by bias ``sum(g)``, by weight ``sum(g normalized)``."""
    full, wanted = _full(x), (grad_x and not over_x, grad_shortcut)

    def returned(*gradients):
        return (_like(g, x) if one else x.new_empty(0) for g, one in zip(gradients, wanted, strict=True))

    if x.numel() == 0:
        return *returned(full, full), *(full.new_zeros(weight.shape) for _ in range(2))
    normalized, own, index = _chosen(x, weight, bias, None, mean, variance, eps, max_pool, ceil_mode)
    upstream = torch.zeros_like(own) if by_z is None else by_z.to(own)
    if by_features is not None:
        upstream = upstream + torch.ops.aten._adaptive_avg_pool2d_backward(by_features.to(own), own)
    upstream = upstream.where((own if z is None else z) > 0, 0).flatten(2)
    g = torch.zeros_like(normalized).flatten(2).scatter_add_(2, index.flatten(2), upstream).view_as(normalized)
    by_weight, by_bias = (g * normalized).sum((0, 2, 3)), g.sum((0, 2, 3))
    values, scale = x.numel() // x.shape[1], (weight.to(own) * torch.rsqrt(variance + eps))[:, None, None]
    by_x = scale * (g - (by_bias[:, None, None] + normalized * by_weight[:, None, None]) / values)
    if over_x:
        x.copy_(by_x)
    return *returned(by_x, g), by_weight, by_bias


def normalized_rows(x: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows centred and scaled to length 1, and the lengths' reciprocals [N, 1].

    Constant rows, and those not ``counted`` [N], have no direction: both results are 0 there.
    """
    centred = x - x.mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    valid = length > 1e-6 * x.norm(dim=1, keepdim=True)
    if counted is not None:
        valid = valid & counted[:, None]
    reciprocal = torch.where(valid, 1 / length, 0)
    return torch.where(valid, centred, 0) * reciprocal, reciprocal


def _through_normalization(by_xn: Tensor, xn: Tensor, reciprocal: Tensor) -> Tensor:
    """The gradient by rows whose normalised rows ``xn`` have the gradient ``by_xn``."""
    by_centred = (by_xn - xn * (xn * by_xn).sum(1, keepdim=True)) * reciprocal
    return by_centred - by_centred.mean(1, keepdim=True)


def _gram_error(x, target_gram, counted, grad_x):
    """Mean squared ``xn @ xn.T - target_gram`` over counted pairs and its gradient through the normalisation."""
    xn, reciprocal = normalized_rows(_full(x), counted)
    pairs = counted.sum().clamp(min=1).to(xn) ** 2
    error = torch.where(counted[:, None] & counted, xn @ xn.T - target_gram, 0)
    loss = (error**2).sum() / pairs
    if not grad_x:
        return loss, None
    return loss, _gradient(_through_normalization(4 / pairs * (error @ xn), xn, reciprocal), x)


def similarity_matching(x, target, ignore_index, grad_x):
    """Mean of ``(xn @ xn.T - T)**2``; ``T`` is label equality [N] or the same Gram matrix of target rows [N, E]."""
    if target.is_floating_point():
        counted = torch.ones(len(x), dtype=torch.bool, device=x.device)
        yn, _ = normalized_rows(target.to(_full(x)))
        return _gram_error(x, yn @ yn.T, counted, grad_x)
    counted = target != ignore_index
    return _gram_error(x, (target[:, None] == target).to(_full(x)), counted, grad_x)


def decorrelation(x, grad_x):
    """Mean of the squared off-diagonal entries of ``xn @ xn.T`` (over all N x N places)."""
    xn, reciprocal = normalized_rows(_full(x))
    counted = torch.ones(len(x), dtype=torch.bool, device=x.device)
    return _gram_error(x, torch.diag((xn * xn).sum(1)), counted, grad_x)


def prototypes(x, target, num_classes, ignore_index):
    """Means of the normalised rows of each class, and how many rows each has; 0 for classes without rows."""
    check_labels(target, num_classes, ignore_index)
    xn, _ = normalized_rows(_full(x), target != ignore_index)
    members = (target == torch.arange(num_classes, device=x.device)[:, None]) & (target != ignore_index)
    counts = members.sum(1)
    return members.to(xn) @ xn / counts.clamp(min=1)[:, None], counts


def prototypes_gradient(x, target, counts, grad, ignore_index):
    """The gradient by ``x`` of prototypes whose gradient is ``grad``: each row gets its share of its class's."""
    check_labels(target, len(grad), ignore_index)
    counted = target != ignore_index
    xn, reciprocal = normalized_rows(_full(x), counted)
    by_xn = (grad.to(xn) / counts.clamp(min=1)[:, None])[target.where(counted, 0)]
    return _gradient(_through_normalization(by_xn, xn, reciprocal), x)


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(x: Tensor, word_bytes: int, out: Tensor) -> int:
    """The words of contiguous ``x`` that are not zero, behind a bit for each word that says whether it is.

    Words are whole numbers of 1, 2, 4 or 8 bytes, whatever they mean in ``x``: every bit comes through.  Returns how
    many bytes of ``out``, uint8 [room], were written (csrc/pack.h says how), or -1 where there is no room for them.
    """
    words = x.reshape(-1).view(torch.uint8).view(_WORDS[word_bytes])
    kept = F.pad(words != 0, (0, -len(words) % 64))
    masks = (kept.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    packed = torch.cat([masks, words[kept[: len(words)]].view(torch.uint8)])
    if len(packed) > len(out):
        return -1
    out[: len(packed)] = packed
    return len(packed)


def unpack(packed: Tensor, word_bytes: int, out: Tensor) -> bool:
    """Write into contiguous ``out`` what :func:`pack` was given; whether ``packed``, uint8 [bytes], can have come of it."""
    words = out.reshape(-1).view(torch.uint8).view(_WORDS[word_bytes])
    masks, rest = packed.split([size := min(-(-len(words) // 64) * 8, len(packed)), len(packed) - size])
    kept = (masks[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).view(-1).bool()
    if size * 8 < len(words) or kept[len(words) :].any() or int(kept.sum()) * word_bytes != len(rest):
        return False
    words.zero_()[kept[: len(words)]] = rest.clone().view(_WORDS[word_bytes])
    return True
