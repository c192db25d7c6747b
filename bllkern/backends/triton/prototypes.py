"""``prototypes``: means by class of normalised rows, by a segmented reduction without atomic additions.

The rows are ordered by class (a stable sort); each program sums its part of one class's rows in that order, and the
parts of a class are then added.  So results repeat bit for bit, and nothing waits for the device.
"""

import torch

import triton
import triton.language as tl

from ._launch import cdiv, launch, on_device_of, splits, tile_shape
from ._rows import direction

ROWS, COLS = 16, 128


@triton.jit
def _directions(
    x_ptr,  # [rows, width]
    mean_ptr,  # [rows]
    reciprocal_ptr,  # [rows]
    width,
    COLS: tl.constexpr,
):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    mean, reciprocal = direction(x_ptr + row * width, width, COLS)
    tl.store(mean_ptr + row, mean)
    tl.store(reciprocal_ptr + row, reciprocal)


@triton.jit
def _sum_by_class(
    x_ptr,  # [rows, width]
    mean_ptr,  # [rows]
    reciprocal_ptr,  # [rows]
    order_ptr,  # [rows], by class
    begin_ptr,  # [classes + 1], where each class begins in the order
    sum_ptr,  # [parts, classes, width]
    width,
    classes,
    parts,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program for each COLS columns of each part of a class's rows."""
    label, part = tl.program_id(0), tl.program_id(2)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    first, last = tl.load(begin_ptr + label), tl.load(begin_ptr + label + 1)
    length = tl.cdiv(last - first, parts)
    begin = first + part * length
    end = tl.minimum(begin + length, last)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(begin, end, ROWS):
        place = start + tl.arange(0, ROWS)
        inside = place < end
        row = tl.load(order_ptr + place, mask=inside, other=0)
        mean = tl.load(mean_ptr + row, mask=inside, other=0.0)
        reciprocal = tl.load(reciprocal_ptr + row, mask=inside, other=0.0)
        mask = inside[:, None] & (column < width)[None, :]
        x = tl.load(x_ptr + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
        # a constant row of large numbers times 0 is 0, one of infinities is none
        total += tl.where(reciprocal[:, None] > 0, (x - mean[:, None]) * reciprocal[:, None], 0.0)
    out = (part.to(tl.int64) * classes + label) * width + column
    tl.store(sum_ptr + out, tl.sum(total, 0), mask=column < width)


@triton.jit
def _gradient(
    x_ptr,  # [rows, width]
    target_ptr,  # [rows]
    counts_ptr,  # [classes]
    by_means_ptr,  # [classes, width] float32
    by_x_ptr,  # [rows, width]
    width,
    classes,
    ignore_index,
    COLS: tl.constexpr,
):
    """One row a program: with its direction u and g by its class's mean, it is ``(g - mean(g) - u (u . g)) / length``
    over the class's count."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLS)
    label = tl.load(target_ptr + row)
    counted = (label != ignore_index) & (label >= 0) & (label < classes)
    label = tl.where(counted, label, 0)
    x_ptr += row * width
    by_means_ptr += label * width
    mean, reciprocal = direction(x_ptr, width, COLS)
    counted = counted & (reciprocal > 0)
    sums = tl.zeros([COLS], tl.float32)
    dots = tl.zeros([COLS], tl.float32)
    for start in range(0, width, COLS):
        mask = start + column < width
        x = tl.load(x_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(by_means_ptr + start + column, mask=mask, other=0.0)
        sums += g
        dots += g * (x - mean) * reciprocal
    mean_g, dot = tl.sum(sums, 0) / width, tl.sum(dots, 0)
    factor = reciprocal / tl.maximum(tl.load(counts_ptr + label), 1).to(tl.float32)
    for start in range(0, width, COLS):
        mask = start + column < width
        x = tl.load(x_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(by_means_ptr + start + column, mask=mask, other=0.0)
        by_x = tl.where(counted, (g - mean_g - (x - mean) * reciprocal * dot) * factor, 0.0)
        tl.store(by_x_ptr + row * width + start + column, by_x, mask=mask)


def prototypes(x, target, num_classes, ignore_index):
    """See ``bllkern/_ops.py``."""
    (rows, width), classes = x.shape, num_classes
    with on_device_of(x):
        x = x.contiguous()
        labels, order = torch.sort(target.where(target != ignore_index, classes), stable=True)
        begin = torch.searchsorted(labels, torch.arange(classes + 1, device=x.device))
        counts = begin[1:] - begin[:-1]
        if x.numel() == 0:
            return x.new_zeros(classes, width, dtype=torch.float32), counts
        mean, reciprocal = x.new_empty(2, rows, dtype=torch.float32)
        launch(_directions, (rows,), x, mean, reciprocal, width, tile_shape(1, width)[1], num_warps=4)
        tiles = cdiv(width, COLS)
        parts = splits(classes * tiles, rows // classes, 4 * ROWS)
        sums = x.new_empty(parts, classes, width, dtype=torch.float32)
        launch(
            _sum_by_class, (classes, tiles, parts),
            x, mean, reciprocal, order, begin, sums, width, classes, parts, ROWS, COLS, num_warps=4,
        )  # fmt: skip
        return sums.sum(0).div_(counts.clamp(min=1)[:, None]), counts


def prototypes_gradient(x, target, counts, grad, ignore_index):
    """See ``bllkern/_ops.py``."""
    (rows, width), x = x.shape, x.contiguous()
    by_x = torch.empty_like(x)
    if x.numel():
        with on_device_of(x):
            tensors = target.contiguous(), counts.contiguous(), grad.float().contiguous()
            cols = tile_shape(1, width)[1]
            launch(_gradient, (rows,), x, *tensors, by_x, width, len(grad), ignore_index, cols, num_warps=4)
    return by_x
