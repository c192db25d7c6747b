"""``similarity_matching`` and ``decorrelation``: the Gram matrix of the normalised rows, a chunk of rows at a time.

With ``xn`` the normalised rows, ``E = xn @ xn.T - T`` and M counted rows, the loss is ``sum(E^2) / M^2`` and its
gradient by xn ``4 E @ xn / M^2``.  At most ``CHUNK`` entries of the N x N matrix are held; both products are the
library's, and E is made in place between them.
"""

import torch

import triton
import triton.language as tl

from ._launch import cdiv, launch, matmul, on_device_of, tile_shape
from ._rows import direction
from .linear_cross_entropy import mean_or_sum

CHUNK = 2**22


@triton.jit
def _normalize(
    x_ptr,  # [rows, width]
    counted_ptr,  # [rows], or None
    xn_ptr,  # [rows, width]
    reciprocal_ptr,  # [rows]
    width,
    COLS: tl.constexpr,
):
    """One row a program: centred, scaled to length 1; 0 if it is constant (up to rounding) or does not count."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLS)
    mean, reciprocal = direction(x_ptr + row * width, width, COLS)
    if counted_ptr is not None:
        reciprocal = tl.where(tl.load(counted_ptr + row) != 0, reciprocal, 0.0)
    tl.store(reciprocal_ptr + row, reciprocal)
    for start in range(0, width, COLS):
        mask = start + column < width
        x = tl.load(x_ptr + row * width + start + column, mask=mask, other=0.0).to(tl.float32)
        xn = tl.where(reciprocal > 0, (x - mean) * reciprocal, 0.0)
        tl.store(xn_ptr + row * width + start + column, xn, mask=mask)


@triton.jit
def _gram_error(
    gram_ptr,  # [rows, columns] float32
    target_ptr,  # labels [columns]; or target Gram matrix [rows, columns]; or None for zero, the diagonal left out
    counted_ptr,  # [columns], or None
    error_ptr,  # [rows, columns], which may be gram, or None
    squares_ptr,  # [programs]
    first,  # which of the columns is row 0
    rows,
    columns,
    tiles,
    LABELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``gram - target`` and the sum of its squares; one program for each tile [ROWS, COLS]."""
    program = tl.program_id(0)
    row = program // tiles * ROWS + tl.arange(0, ROWS)
    column = program % tiles * COLS + tl.arange(0, COLS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    error = tl.load(gram_ptr + offset, mask=mask, other=0.0)
    if target_ptr is None:
        error = tl.where((first + row)[:, None] == column[None, :], 0.0, error)
    elif LABELS:
        label = tl.load(target_ptr + first + row, mask=row < rows, other=0)
        other = tl.load(target_ptr + column, mask=column < columns, other=0)
        error -= tl.where(label[:, None] == other[None, :], 1.0, 0.0)
    else:
        error -= tl.load(target_ptr + offset, mask=mask, other=0.0)
    if counted_ptr is not None:
        row_counts = tl.load(counted_ptr + first + row, mask=row < rows, other=0) != 0
        column_counts = tl.load(counted_ptr + column, mask=column < columns, other=0) != 0
        error = tl.where(row_counts[:, None] & column_counts[None, :], error, 0.0)
    error = tl.where(mask, error, 0.0)
    tl.store(squares_ptr + program, tl.sum(tl.sum(error * error, 1), 0))
    if error_ptr is not None:
        tl.store(error_ptr + offset, error, mask=mask)


@triton.jit
def _normalize_backward(
    xn_ptr,  # [rows, width]
    by_xn_ptr,  # [rows, width] float32, to be multiplied by both scales
    reciprocal_ptr,  # [rows]
    scale_ptr,  # [], or None
    by_x_ptr,  # [rows, width]
    scale,
    width,
    COLS: tl.constexpr,
):
    """One row a program: by the centred row the gradient is ``c = (g - xn xn . g) / length``, by x ``c - mean(c)``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLS)
    dots = tl.zeros([COLS], tl.float32)
    sums_g = tl.zeros([COLS], tl.float32)
    sums_xn = tl.zeros([COLS], tl.float32)
    for start in range(0, width, COLS):
        mask = start + column < width
        xn = tl.load(xn_ptr + row * width + start + column, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(by_xn_ptr + row * width + start + column, mask=mask, other=0.0)
        dots += xn * g
        sums_g += g
        sums_xn += xn
    dot = tl.sum(dots, 0)
    mean = (tl.sum(sums_g, 0) - dot * tl.sum(sums_xn, 0)) / width
    factor = tl.load(reciprocal_ptr + row) * scale
    if scale_ptr is not None:
        factor = factor * tl.load(scale_ptr)
    for start in range(0, width, COLS):
        mask = start + column < width
        xn = tl.load(xn_ptr + row * width + start + column, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(by_xn_ptr + row * width + start + column, mask=mask, other=0.0)
        tl.store(by_x_ptr + row * width + start + column, (g - xn * dot - mean) * factor, mask=mask)


def _normalized(x, counted, dtype):
    rows, width = x.shape
    xn, reciprocal = torch.empty_like(x, dtype=dtype), x.new_empty(rows, dtype=torch.float32)
    cols = tile_shape(1, width)[1]
    launch(_normalize, (rows,), x, counted, xn, reciprocal, width, cols, num_warps=4)
    return xn, reciprocal


def _chunk(rows, xn, target, counted, squares, by_xn):
    """Errors of the Gram matrix in ``rows``: partial sums of their squares and, unless ``None``, their ``by_xn``."""
    gram = matmul(xn[rows], xn.t())
    labels = target is not None and not target.is_floating_point()
    goal = matmul(target[rows], target.t()) if target is not None and not labels else target
    error = gram if xn.dtype == torch.float32 else torch.empty_like(gram, dtype=xn.dtype)
    shape = tile_shape(*gram.shape)
    tiles = cdiv(gram.shape[1], shape[1])
    programs = cdiv(gram.shape[0], shape[0]) * tiles
    partial = gram.new_empty(programs)
    launch(
        _gram_error, (programs,),
        gram, goal, counted, None if by_xn is None else error, partial, rows.start, *gram.shape, tiles, labels, *shape,
    )  # fmt: skip
    squares.append(partial)
    if by_xn is not None:
        by_xn.append(matmul(error, xn))


def _gram_loss(x, target, counted, ignore_index, grad_x):
    rows, width = x.shape
    if rows == 0:
        return x.new_zeros((), dtype=torch.float32), torch.empty_like(x) if grad_x else None
    # of each pair: 1 / M^2 as a number, or as a scalar on the device
    factor, share = (1 / rows, None) if counted is None else mean_or_sum(target, "mean", ignore_index)
    factor, share = factor**2, None if share is None else share * share
    xn, reciprocal = _normalized(x, counted, x.dtype)
    if target is not None and target.is_floating_point():
        target, _ = _normalized(target, None, x.dtype)
    by_xn, squares, step = [] if grad_x else None, [], max(64, CHUNK // rows)
    for start in range(0, rows, step):
        _chunk(slice(start, min(start + step, rows)), xn, target, counted, squares, by_xn)
    loss = _joined(squares).sum() * (factor if share is None else share)
    if not grad_x:
        return loss, None
    by_x, cols = torch.empty_like(x), tile_shape(1, width)[1]
    tensors = (xn, _joined(by_xn), reciprocal, share, by_x)
    launch(_normalize_backward, (rows,), *tensors, 4 * factor, width, cols, num_warps=4)
    return loss, by_x


def _joined(parts):
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def similarity_matching(x, target, ignore_index, grad_x):
    """See ``bllkern/_ops.py``."""
    with on_device_of(x):
        counted = None if target.is_floating_point() else (target != ignore_index).view(torch.uint8)
        return _gram_loss(x.contiguous(), target.contiguous(), counted, ignore_index, grad_x)


def decorrelation(x, grad_x):
    """See ``bllkern/_ops.py``."""
    with on_device_of(x):
        return _gram_loss(x.contiguous(), None, None, 0, grad_x)
