"""``linear_agreement``: a matrix product whose epilogue yields activation, loss and gradients.

Each program keeps its tile of z in registers, reads the same tile of b once and writes what is wanted, so that z is not
read again.  On Hopper ``tl.dot`` of half precision is wgmma.
"""

import torch
import torch.nn.functional as F

import triton
import triton.language as tl

from . import families
from ..reference import weighted_agreement
from ._launch import launch, on_device_of
from .agreement import agreement

# Rows of tiles that neighbouring programs go down together, so that they find each other's operands in the L2 cache.
BAND = 8
# Tiles from which on large ones fill a GPU; below, a quarter of the size gives each multiprocessor something to do.
FILLED = 128


@triton.jit
def _agreement(z, b, FAMILY: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Losses and gradients by z and b, all [ROWS, COLS]; a group's units carry equal parts of its loss."""
    if FAMILY == "bernoulli":
        losses, w, by_z, by_b = families.agreement_bernoulli(z, b)
        losses += tl.log(w)
    elif FAMILY == "poisson":
        losses, by_z, by_b = families.agreement_poisson(z, b)
    elif FAMILY == "gaussian":
        losses, by_z, by_b = families.agreement_gaussian(z, b)
    else:
        GROUPS: tl.constexpr = ROWS * COLS // SIZE
        z, b = tl.reshape(z, [GROUPS, SIZE]), tl.reshape(b, [GROUPS, SIZE])
        losses, by_z, by_b = families.agreement_categorical(z, b)
        losses = tl.broadcast_to((losses / SIZE)[:, None], [GROUPS, SIZE])
        losses, by_z = tl.reshape(losses, [ROWS, COLS]), tl.reshape(by_z, [ROWS, COLS])
        by_b = tl.reshape(by_b, [ROWS, COLS])
    return losses, by_z, by_b


@triton.jit
def _halves(z, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Left and right half of a tile; on tensor cores each thread holds parts of both, so that little moves."""
    return tl.split(tl.permute(tl.reshape(z, [ROWS, 2, COLS // 2]), [0, 2, 1]))


@triton.jit
def _finish(
    z,  # [ROWS, COLS]
    down,
    across,
    bias_ptr,
    b_ptr,
    row_weights_ptr,
    z_ptr,
    grad_z_ptr,
    grad_b_ptr,
    rows,
    width,
    scale,
    FAMILY: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Write the part of z that begins at row ``down`` and column ``across``, and its gradients; returns its loss."""
    row, column = tl.arange(0, ROWS), across + tl.arange(0, COLS)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    start, offset = down.to(tl.int64) * width, row[:, None] * width + column[None, :]
    mask = (row < rows - down)[:, None] & (column < width)[None, :]
    b = tl.load(b_ptr + start + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(z_ptr + start + offset, z, mask=mask)
    losses, by_z, by_b = _agreement(z, b, FAMILY, SIZE, ROWS, COLS)
    factor = tl.zeros([ROWS], tl.float32) + scale
    if row_weights_ptr is not None:
        factor *= tl.load(row_weights_ptr + down + row, mask=row < rows - down, other=0.0)
    if grad_z_ptr is not None:
        tl.store(grad_z_ptr + start + offset, by_z * factor[:, None], mask=mask)
    if grad_b_ptr is not None:
        tl.store(grad_b_ptr + start + offset, by_b * factor[:, None], mask=mask)
    return tl.sum(tl.sum(tl.where(mask, losses, 0.0), 1) * factor, 0)


@triton.jit
def _linear_agreement(
    x_ptr,  # [rows, inner]
    weight_ptr,  # [width, inner]
    bias_ptr,  # [width], or None
    b_ptr,  # [rows, width]
    row_weights_ptr,  # [rows] float32, or None
    z_ptr,  # [rows, width]
    loss_ptr,  # [programs]
    grad_z_ptr,  # [rows, width], or None
    grad_b_ptr,  # [rows, width], or None
    rows,
    width,
    inner,
    scale,
    FAMILY: tl.constexpr,
    SIZE: tl.constexpr,
    BAND: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """One program for each tile [ROWS, COLS] of z, which begins at row ``down`` and column ``across``."""
    program = tl.program_id(0)
    tiles_down, tiles_across = tl.cdiv(rows, ROWS), tl.cdiv(width, COLS)
    top = program // (BAND * tiles_across) * BAND
    height = tl.minimum(tiles_down - top, BAND)
    within = program % (BAND * tiles_across)
    down, across = (top + within % height) * ROWS, within // height * COLS
    row, column, k = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, INNER)
    # 64 bits where a tile begins and 32 within it take fewer registers than 64 everywhere
    x_ptr += down.to(tl.int64) * inner
    weight_ptr += across.to(tl.int64) * inner
    x_offset, weight_offset = row[:, None] * inner + k[None, :], column[None, :] * inner + k[:, None]
    x_mask, weight_mask = (row < rows - down)[:, None], (column < width - across)[None, :]
    z = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, inner, INNER):
        inside = k < inner - start
        x = tl.load(x_ptr + start + x_offset, mask=x_mask & inside[None, :], other=0.0)
        weight = tl.load(weight_ptr + start + weight_offset, mask=weight_mask & inside[:, None], other=0.0)
        z = tl.dot(x, weight, z, input_precision="ieee")
    # one quarter of the columns after the other: the whole tile's intermediate results would not fit the registers
    PART: tl.constexpr = COLS // 4
    left, right = _halves(z, ROWS, COLS)
    z_0, z_1 = _halves(left, ROWS, COLS // 2)
    z_2, z_3 = _halves(right, ROWS, COLS // 2)
    loss = _finish(
        z_0, down, across, bias_ptr, b_ptr, row_weights_ptr, z_ptr, grad_z_ptr, grad_b_ptr, rows, width, scale,
        FAMILY, SIZE, ROWS, PART,
    )  # fmt: skip
    across += PART
    loss += _finish(
        z_1, down, across, bias_ptr, b_ptr, row_weights_ptr, z_ptr, grad_z_ptr, grad_b_ptr, rows, width, scale,
        FAMILY, SIZE, ROWS, PART,
    )  # fmt: skip
    across += PART
    loss += _finish(
        z_2, down, across, bias_ptr, b_ptr, row_weights_ptr, z_ptr, grad_z_ptr, grad_b_ptr, rows, width, scale,
        FAMILY, SIZE, ROWS, PART,
    )  # fmt: skip
    across += PART
    loss += _finish(
        z_3, down, across, bias_ptr, b_ptr, row_weights_ptr, z_ptr, grad_z_ptr, grad_b_ptr, rows, width, scale,
        FAMILY, SIZE, ROWS, PART,
    )  # fmt: skip
    tl.store(loss_ptr + program, loss)


def tile(rows: int, width: int, inner: int, dtype: torch.dtype) -> tuple[tuple[int, int, int], int]:
    """``(ROWS, COLS, INNER)`` and warps.

    The large tile keeps tensor cores busy where operands arrive 16 bytes at a time; float32 and odd sizes need more
    registers for arithmetic and addresses.
    """
    if dtype == torch.float32:
        return (64, 64, 32), 4
    tiles = triton.cdiv(rows, 128) * triton.cdiv(width, 128)
    return ((128, 128, 64), 8) if tiles >= FILLED and width % 16 == inner % 16 == 0 else ((64, 64, 64), 4)


def linear_agreement(x, weight, bias, b, row_weights, family, group_size, reduction, grad_z, grad_b):
    """See ``bllkern/_ops.py``; the loss is a sum over one float32 partial of each program.

    A matrix product and ``agreement`` one after the other where units do not lie within a part of a tile: categorical
    groups that do not divide it, and ``gaussian_learned``, whose units have parameters in both halves of a row.
    """
    (rows, inner), width, size = x.shape, len(weight), group_size or len(weight)
    shape, warps = tile(rows, width, inner, x.dtype)
    if b.numel() == 0 or family == "gaussian_learned" or (family == "categorical" and shape[1] // 4 % size):
        z = F.linear(x, weight, bias)
        settings = (family, group_size, reduction, grad_z, grad_b)
        return z, *weighted_agreement(agreement, z, b, row_weights, *settings)
    x, weight, b = x.contiguous(), weight.contiguous(), b.contiguous()
    bias, row_weights = (None if t is None else t.contiguous() for t in (bias, row_weights))
    programs = triton.cdiv(rows, shape[0]) * triton.cdiv(width, shape[1])
    z, loss = x.new_empty(b.shape), x.new_empty(programs, dtype=torch.float32)
    by_z, by_b = torch.empty_like(z) if grad_z else None, torch.empty_like(b) if grad_b else None
    scale = 1 / rows if reduction == "mean" else 1.0
    with on_device_of(x):
        launch(
            _linear_agreement, (programs,),
            x, weight, bias, b, row_weights, z, loss, by_z, by_b, rows, width, inner, scale, family, size, BAND,
            *shape, num_warps=warps,
        )  # fmt: skip
    return z, loss.sum(), by_z, by_b
