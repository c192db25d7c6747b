"""Losses on the Gram matrix of the normalised rows: by tiles of it, or by the much smaller matrix of their features."""

from __future__ import annotations

import torch
from torch import Tensor

from .module import _C, DTYPES, empty, empty_like
from .prototypes import normalization_gradient, normalized, prototypes

_SMALL = 1 << 23  # products up to which one call does all of them faster than the library does its part
_TILE_ROWS = 256  # enough for products at full speed; a tile takes 1 MiB for each 1024 rows of x
_CANCELLED = 0.05  # of the terms whose difference is the loss: below it, float32 keeps too few digits of the difference


def similarity_matching(x: Tensor, target: Tensor, ignore_index: int, grad_x: bool) -> tuple[Tensor, Tensor | None]:
    """The op ``similarity_matching`` of ``bllkern/_ops.py`` on the CPU."""
    if target.is_floating_point():
        yn, _ = normalized(target.to(x.dtype).contiguous())
        return _gram(x.contiguous(), yn, None, ignore_index, grad_x)
    return _gram(x.contiguous(), None, target.contiguous(), ignore_index, grad_x)


def decorrelation(x: Tensor, grad_x: bool) -> tuple[Tensor, Tensor | None]:
    """The op ``decorrelation`` of ``bllkern/_ops.py`` on the CPU."""
    return _gram(x.contiguous(), None, None, 0, grad_x)


def _gram(x: Tensor, yn: Tensor | None, labels: Tensor | None, ignore_index: int, grad_x: bool):
    """Mean squared error of the Gram matrix of the normalised rows of x, and its gradient.

    The target is the Gram matrix of ``yn``, or equality of ``labels``, or (without either) its own diagonal.
    """
    rows, width = x.shape
    if yn is None and rows * rows * width <= _SMALL:
        gradient = empty_like(x) if grad_x else None
        given = (x, labels, gradient, rows, width, ignore_index, labels is None, DTYPES[x.dtype])
        return torch.scalar_tensor(_C.gram_loss(*given), dtype=torch.float32), gradient
    xn, counted = normalized(x, labels, ignore_index)
    pairs = max(counted, 1) ** 2
    result = None
    if yn is None and rows >= max(2 * width, _TILE_ROWS) and width:
        result = _by_features(x, xn, labels, ignore_index, 4 / pairs, grad_x)
    total, gradient = result or _by_tiles(x, xn, yn, labels, ignore_index, 4 / pairs, grad_x)
    return torch.tensor(total / pairs, dtype=torch.float32), gradient


def _by_tiles(x, xn, yn, labels, ignore_index, scale, grad_x):
    """Sum of squared errors, and ``scale`` times the gradient of half of its half.

    Tiles of rows from the diagonal on: the error being symmetric, each serves for the columns below it too.
    """
    rows = len(xn)
    by_xn = empty(xn.shape, x, torch.float32) if grad_x else None
    buffer, total = empty(min(_TILE_ROWS, rows) * rows, x, torch.float32), 0.0
    for i in range(0, rows, _TILE_ROWS):
        upper, rest, below = xn[i : i + _TILE_ROWS], xn[i:], xn[i + _TILE_ROWS :]
        tile = buffer[: len(upper) * len(rest)].view(len(upper), len(rest))
        torch.mm(upper, rest.T, out=tile)
        if yn is not None:
            tile.addmm_(yn[i : i + _TILE_ROWS], yn[i:].T, alpha=-1)
        without_diagonal = yn is None and labels is None
        total += _C.gram_error(tile, labels, i, *tile.shape, ignore_index, without_diagonal)
        if grad_x:
            keep = 1 if i else 0  # of what the tiles above have left
            torch.addmm(by_xn[i : i + _TILE_ROWS], tile, rest, beta=keep, out=by_xn[i : i + _TILE_ROWS])
            if len(below):
                by_below = by_xn[i + _TILE_ROWS :]
                torch.addmm(by_below, tile[:, _TILE_ROWS:].T, upper, beta=keep, out=by_below)
    return total, normalization_gradient(x, by_xn, None, labels, None, ignore_index, scale) if grad_x else None


def _by_features(x, xn, labels, ignore_index, scale, grad_x):
    """The same by ``S = xn.T @ xn``; ``None`` where that would cancel.

    ``|xn @ xn.T|**2 = |S|**2`` and ``(xn @ xn.T) @ xn = xn @ S``.  With sums s_c of the n_c rows of class c, equality T
    has ``<xn @ xn.T, T> = sum(|s_c|**2)``, ``|T|**2 = sum(n_c**2)`` and ``(T @ xn)[i] = s_label[i]``.  The diagonal of
    ``xn @ xn.T`` is 1 or (rows without direction) 0, and what it adds to the gradient is lost in the normalisation.
    """
    moments = xn.T @ xn
    squares = _sum_of_squares(moments)
    if labels is None:
        terms, total = squares, squares - moments.diagonal().sum(dtype=torch.float64).item()
        ids = class_sums = None
    else:
        classes, ids = labels.unique(return_inverse=True)
        ignored = classes == ignore_index
        ignore_index = int(ignored.int().argmax()) if ignored.any() else -1
        class_sums, counts = prototypes(x, ids, len(classes), ignore_index)
        class_sums *= -counts[:, None]
        terms = squares + counts.double().square().sum().item()
        total = terms - 2 * _sum_of_squares(class_sums)
    if not total >= _CANCELLED * terms:
        return None
    gradient = normalization_gradient(x, xn @ moments, class_sums, ids, None, ignore_index, scale) if grad_x else None
    return total, gradient


def _sum_of_squares(x: Tensor) -> float:
    return _C.sum_of_squares(x, x.numel())
