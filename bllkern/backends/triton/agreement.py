"""``agreement``: loss and both gradients from one read of ``a`` and ``b``."""

import torch
import torch.nn.functional as F

import triton
import triton.language as tl

from ..reference import weighted_agreement
from . import families
from ._launch import TILE, cdiv, launch, on_device_of, power_of_2, tile_shape

# Largest categorical group that one program holds at once.
WHOLE_GROUP = 4096


@triton.jit
def _store_loss(loss_ptr, loss, row, rows, tile, tiles, program, PER_ROW: tl.constexpr):
    """A partial sum [ROWS] of each row at [row, tile], or one of the whole program."""
    if PER_ROW:
        tl.store(loss_ptr + row * tiles + tile, loss, mask=row < rows)
    else:
        tl.store(loss_ptr + program, tl.sum(loss, 0))


@triton.jit
def _units(
    a_ptr,  # [rows, parameters * units]
    b_ptr,  # [rows, parameters * units]
    loss_ptr,  # [rows, tiles] if PER_ROW else [programs]
    grad_a_ptr,  # like a, or None
    grad_b_ptr,  # like b, or None
    rows,
    units,
    tiles,
    scale,
    FAMILY: tl.constexpr,
    PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Families whose units are independent; one program for each tile [ROWS, COLS] of units."""
    program = tl.program_id(0)
    tile = program % tiles
    row = (program // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    unit = tile.to(tl.int64) * COLS + tl.arange(0, COLS)
    mask = (row < rows)[:, None] & (unit < units)[None, :]
    if FAMILY == "gaussian_learned":
        first = row[:, None] * units * 2 + unit[None, :]
        second = first + units
        a1 = tl.load(a_ptr + first, mask=mask, other=0.0).to(tl.float32)
        a2 = tl.load(a_ptr + second, mask=mask, other=-0.5).to(tl.float32)
        b1 = tl.load(b_ptr + first, mask=mask, other=0.0).to(tl.float32)
        b2 = tl.load(b_ptr + second, mask=mask, other=-0.5).to(tl.float32)
        losses, by_a, by_a2, by_b, by_b2 = families.agreement_gaussian_learned(a1, a2, b1, b2)
        loss = tl.sum(tl.where(mask, losses, 0.0), 1)
        if grad_a_ptr is not None:
            tl.store(grad_a_ptr + second, by_a2 * scale, mask=mask)
        if grad_b_ptr is not None:
            tl.store(grad_b_ptr + second, by_b2 * scale, mask=mask)
    else:
        first = row[:, None] * units + unit[None, :]
        a = tl.load(a_ptr + first, mask=mask, other=float("-inf")).to(tl.float32)
        b = tl.load(b_ptr + first, mask=mask, other=float("-inf")).to(tl.float32)
        if FAMILY == "bernoulli":
            losses, w, by_a, by_b = families.agreement_bernoulli(a, b)
            loss = tl.sum(losses, 1) + families.sum_of_logs(w, ROWS, COLS)
        elif FAMILY == "poisson":
            losses, by_a, by_b = families.agreement_poisson(a, b)
            loss = tl.sum(losses, 1)
        else:
            losses, by_a, by_b = families.agreement_gaussian(a, b)
            loss = tl.sum(tl.where(mask, losses, 0.0), 1)
    if grad_a_ptr is not None:
        tl.store(grad_a_ptr + first, by_a * scale, mask=mask)
    if grad_b_ptr is not None:
        tl.store(grad_b_ptr + first, by_b * scale, mask=mask)
    _store_loss(loss_ptr, loss * scale, row, rows, tile, tiles, program, PER_ROW)


@triton.jit
def _groups(
    a_ptr,  # [groups, size]
    b_ptr,  # [groups, size]
    loss_ptr,  # [groups] if PER_ROW else [programs]
    grad_a_ptr,  # like a, or None
    grad_b_ptr,  # like b, or None
    groups,
    size,
    scale,
    PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Categorical groups of at most COLS units; one program for ROWS groups."""
    program = tl.program_id(0).to(tl.int64)
    group = program * ROWS + tl.arange(0, ROWS)
    unit = tl.arange(0, COLS)
    # groups past the end repeat the last one, so that their arithmetic stays finite; they are not stored
    offset = tl.minimum(group, groups - 1)[:, None] * size + unit[None, :]
    inside = (unit < size)[None, :]
    mask = inside & (group < groups)[:, None]
    a = tl.load(a_ptr + offset, mask=inside, other=float("-inf")).to(tl.float32)
    b = tl.load(b_ptr + offset, mask=inside, other=float("-inf")).to(tl.float32)
    losses, by_a, by_b = families.agreement_categorical(a, b)
    if grad_a_ptr is not None:
        tl.store(grad_a_ptr + offset, by_a * scale, mask=mask)
    if grad_b_ptr is not None:
        tl.store(grad_b_ptr + offset, by_b * scale, mask=mask)
    loss = tl.where(group < groups, losses * scale, 0.0)
    _store_loss(loss_ptr, loss, group, groups, 0, 1, program, PER_ROW)


@triton.jit
def _long_groups(
    a_ptr,  # [groups, size]
    b_ptr,  # [groups, size]
    loss_ptr,  # [groups]
    grad_a_ptr,  # like a, or None
    grad_b_ptr,  # like b, or None
    size,
    scale,
    COLS: tl.constexpr,
):
    """Categorical groups of any size, one program each: maxima, sums with a running maximum of a' + b', gradients.

    As ``families.agreement_categorical``, in three sweeps.
    """
    group = tl.program_id(0).to(tl.int64)
    a_ptr += group * size
    b_ptr += group * size
    column = tl.arange(0, COLS)
    top_a = tl.full([COLS], float("-inf"), tl.float32)
    top_b = tl.full([COLS], float("-inf"), tl.float32)
    for start in range(0, size, COLS):
        mask = start + column < size
        top_a = tl.maximum(top_a, tl.load(a_ptr + start + column, mask=mask, other=float("-inf")).to(tl.float32))
        top_b = tl.maximum(top_b, tl.load(b_ptr + start + column, mask=mask, other=float("-inf")).to(tl.float32))
    max_a, max_b = tl.max(top_a, 0), tl.max(top_b, 0)
    sum_a = tl.zeros([COLS], tl.float32)
    sum_b = tl.zeros([COLS], tl.float32)
    sum_ab = tl.zeros([COLS], tl.float32)
    top = tl.full([COLS], -3e38, tl.float32)
    for start in range(0, size, COLS):
        mask = start + column < size
        a = tl.load(a_ptr + start + column, mask=mask, other=float("-inf")).to(tl.float32) - max_a
        b = tl.load(b_ptr + start + column, mask=mask, other=float("-inf")).to(tl.float32) - max_b
        higher = tl.maximum(top, a + b)
        sum_a += families.exp(a)
        sum_b += families.exp(b)
        sum_ab = sum_ab * families.exp(top - higher) + families.exp(a + b - higher)
        top = higher
    highest = tl.max(top, 0)
    total_a, total_b = tl.sum(sum_a, 0), tl.sum(sum_b, 0)
    total_ab = tl.sum(sum_ab * families.exp(top - highest), 0)
    tl.store(loss_ptr + group, (tl.log(total_a) + tl.log(total_b) - tl.log(total_ab) - highest) * scale)
    for start in range(0, size, COLS):
        mask = start + column < size
        a = tl.load(a_ptr + start + column, mask=mask, other=0.0).to(tl.float32) - max_a
        b = tl.load(b_ptr + start + column, mask=mask, other=0.0).to(tl.float32) - max_b
        posterior = families.exp(a + b - highest) / total_ab
        if grad_a_ptr is not None:
            by_a = (families.exp(a) / total_a - posterior) * scale
            tl.store(grad_a_ptr + group * size + start + column, by_a, mask=mask)
        if grad_b_ptr is not None:
            by_b = (families.exp(b) / total_b - posterior) * scale
            tl.store(grad_b_ptr + group * size + start + column, by_b, mask=mask)


def _launch_units(a, b, by_a, by_b, family, reduction, scale):
    width = a.shape[-1] // 2 if family == "gaussian_learned" else a.shape[-1]
    per_row = reduction == "none"
    if per_row or family == "gaussian_learned":
        rows, units = a[..., 0].numel(), width
    else:
        rows, units = 1, a.numel()
    elements = 2 * TILE if a.numel() <= 2 * TILE else TILE  # then one program does it all
    shape = tile_shape(rows, units, elements)
    tiles = cdiv(units, shape[1])
    programs = cdiv(rows, shape[0]) * tiles
    loss = a.new_empty((rows, tiles) if per_row else programs, dtype=torch.float32)
    sizes = (rows, units, tiles, scale)
    launch(_units, (programs,), a, b, loss, by_a, by_b, *sizes, family, per_row, *shape)
    return loss.sum(1) if per_row else _total(loss)


def _launch_groups(a, b, by_a, by_b, size, reduction, scale):
    groups, per_row = a.numel() // size, reduction == "none"
    if size > WHOLE_GROUP:
        loss = a.new_empty(groups, dtype=torch.float32)
        launch(_long_groups, (groups,), a, b, loss, by_a, by_b, size, scale, TILE)
    else:
        shape = tile_shape(groups, size, max(TILE, power_of_2(size)))
        programs = cdiv(groups, shape[0])
        loss = a.new_empty(groups if per_row else programs, dtype=torch.float32)
        launch(_groups, (programs,), a, b, loss, by_a, by_b, groups, size, scale, per_row, *shape)
    return loss.view(-1, a.shape[-1] // size).sum(1) if per_row else _total(loss)


def _total(partials):
    return partials.sum() if partials.numel() > 1 else partials.view(())


def agreement(a, b, family, group_size, reduction, grad_a, grad_b):
    """See ``bllkern/_ops.py``; the sum of a reduced loss is over one float32 partial of each program."""
    shape, a, b = a.shape[:-1], a.contiguous(), b.contiguous()
    by_a, by_b = torch.empty_like(a) if grad_a else None, torch.empty_like(b) if grad_b else None
    if a.numel() == 0:
        return a.new_zeros(shape if reduction == "none" else (), dtype=torch.float32), by_a, by_b
    scale = a.shape[-1] / a.numel() if reduction == "mean" else 1.0
    with on_device_of(a):
        if family == "categorical":
            loss = _launch_groups(a, b, by_a, by_b, group_size or a.shape[-1], reduction, scale)
        else:
            loss = _launch_units(a, b, by_a, by_b, family, reduction, scale)
    return loss.view(shape) if reduction == "none" else loss, by_a, by_b


def linear_agreement(x, weight, bias, b, row_weights, *settings):
    """See ``bllkern/_ops.py``: the library's product, than which none in a kernel was as fast, and one pass over z.

    Without weights messages of another dtype are read as they are.
    """
    z = F.linear(x, weight, bias)
    if row_weights is None:
        return z, *agreement(z, b, *settings)
    return z, *weighted_agreement(agreement, z, b, row_weights, *settings)
