"""Cross-entropy of a linear head: one call where the head is small, else torch's matrix products over tiles of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .module import _C, DTYPES, empty, empty_like

_SMALL_CLASSES = {torch.float32: 128}  # matrix products with so few columns (else 32), or
_SMALL_PRODUCTS = 1 << 23  # with so few multiplications, are faster without the library
_TILE_ROWS = 1024  # each tile reads the weight and updates its gradient: so many rows hide that behind the arithmetic
_TILE_BYTES = 32 << 20  # of logits in a tile that are worth having where there are few classes


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    label_smoothing: float,
    reduction: str,
    ignore_index: int,
    grad_x: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The op ``linear_cross_entropy`` of ``bllkern/_ops.py`` on the CPU."""
    classes, width = weight.shape
    pooled = x.dim() > 2
    features = _spatial_mean(x) if pooled else x
    small = classes <= _SMALL_CLASSES.get(x.dtype, 32) or x.shape[0] * width * classes <= _SMALL_PRODUCTS
    loss, by_x, by_weight, by_bias = (_whole if small else _by_tiles)(
        features,
        weight,
        bias,
        target.float().contiguous() if target.is_floating_point() else target.contiguous(),
        (ignore_index, label_smoothing, reduction == "mean"),
        (grad_x, grad_weight, grad_bias and bias is not None),
    )
    return loss, _spread(by_x, x) if pooled and grad_x else by_x, by_weight, by_bias


def small_linear_cross_entropy(*args) -> Tensor | None:
    """The loss of a small head without gradients, of arguments that nobody has checked; ``None`` where one of them asks
    for more than a look at it."""
    loss = _C.small_head_loss(*args)
    return None if loss is None else torch.scalar_tensor(loss, dtype=torch.float32)


def _whole(features, weight, bias, target, settings, wanted):
    """Loss and gradients of a head on features [N, D]; target is contiguous, int64 or float32."""
    features, weight = features.contiguous(), weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    grad_x, grad_weight, grad_bias = wanted
    by_x = empty_like(features) if grad_x else None
    by_weight = empty_like(weight) if grad_weight else None
    by_bias = empty_like(bias) if grad_bias else None
    soft = target.dtype is torch.float32
    loss = _C.linear_head(
        features,
        weight,
        bias,
        None if soft else target,
        target if soft else None,
        by_x,
        by_weight,
        by_bias,
        *features.shape,
        len(weight),
        *settings,
        DTYPES[features.dtype],
    )
    return torch.scalar_tensor(loss, dtype=torch.float32), by_x, by_weight, by_bias


def _by_tiles(features, weight, bias, target, settings, wanted):
    """The same by matrix products of bfloat16 where the features are, else of float32."""
    ignore_index, label_smoothing, mean = settings
    soft, given = target.dtype is torch.float32, features.dtype
    counted = len(target) if soft else _C.count_labels(target, len(target), len(weight), ignore_index)
    scale = 1 / counted if counted and mean else 1.0
    dtype = torch.bfloat16 if given == torch.bfloat16 else torch.float32
    features, w, (rows, width), classes = features.to(dtype), weight.to(dtype), features.shape, len(weight)
    offsets = None if bias is None else bias.float().contiguous()
    grad_x, grad_weight, grad_bias = wanted
    by_x = empty((rows, width), features, dtype) if grad_x else None
    by_weight = empty((classes, width), features, dtype) if grad_weight else None
    by_bias = features.new_zeros(classes, dtype=torch.float32) if grad_bias else None
    step = min(max(_TILE_ROWS, _TILE_BYTES // (classes * dtype.itemsize)), max(rows, 1))
    logits, loss = empty((step, classes), features, dtype), 0.0
    for i in range(0, max(rows, 1), step):
        part = features[i : i + step]
        tile = logits[: len(part)]
        goal = target[i : i + step]
        torch.mm(part, w.T, out=tile)
        loss += _C.softmax_errors(
            tile,
            offsets,
            None if soft else goal,
            goal if soft else None,
            len(part),
            classes,
            ignore_index,
            label_smoothing,
            scale,
            DTYPES[dtype],
            any(wanted),
        )
        if grad_x:
            torch.mm(tile, w, out=by_x[i : i + step])
        if grad_weight:
            torch.addmm(by_weight, tile.T, part, beta=1 if i else 0, out=by_weight)
        if grad_bias:
            by_bias += tile.sum(0, dtype=torch.float32)
    gradients = [None if t is None else t.to(given) for t in (by_x, by_weight, by_bias)]
    return torch.scalar_tensor(loss, dtype=torch.float32), *gradients


def _spatial_mean(x: Tensor) -> Tensor:
    """The mean over space [N, D] of x [N, D, *spatial]."""
    maps, places = x.shape[:2], x.shape[2:].numel()
    if not x.is_contiguous() or not places:
        return x.flatten(2).mean(2)
    mean = x.new_empty(maps)
    _C.spatial_mean(x, mean, maps.numel(), places, DTYPES[x.dtype])
    return mean


def _spread(by_mean: Tensor, x: Tensor) -> Tensor:
    """The gradient by x [N, D, *spatial] of a mean over space whose gradient is ``by_mean`` [N, D]."""
    by_x = empty(x.shape, x, x.dtype)
    _C.spread_mean(by_x, by_mean, by_mean.numel(), x.shape[2:].numel(), DTYPES[x.dtype])
    return by_x
