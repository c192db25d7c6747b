"""``linear_cross_entropy``: matrix products over chunks of rows, and one kernel that turns logits into loss and error.

Of [N, C] a chunk of errors is held, in the dtype of x, and a piece of the logits, in float32, however many rows and
classes there are.  The larger a chunk, the less often the gradient by the weight is read and written to add to it.
"""

import torch

import triton
import triton.language as tl

from .families import exp
from ._launch import TILE, WARPS, cdiv, launch, matmul, on_device_of, tile_shape

LOGITS, CHUNK = 2**25, 2**26  # entries of a piece and of a chunk, unless 64 rows are more
MANY = 2**13  # rows that one program does not count


@triton.jit
def _logits(logits_ptr, bias_ptr, offset, column, mask, classes):
    """Logits with their bias at rows that begin at ``offset`` and columns ``column``; -inf outside ``mask``."""
    x = tl.load(logits_ptr + offset + column[None, :], mask=mask, other=float("-inf"))
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, mask=column < classes, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _softmax_error(
    logits_ptr,  # [rows, classes] float32
    bias_ptr,  # [classes], or None
    target_ptr,  # [rows] if INDEX else [rows, classes]
    loss_ptr,  # [rows]
    error_ptr,  # [rows, classes], which may be logits, or None
    share_ptr,  # a factor of what is stored beside ``factor``, or None
    rows,
    classes,
    ignore_index,
    smoothing,
    factor,
    INDEX: tl.constexpr,
    LATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Cross-entropy of each row and, times the same factors unless LATE, its gradient by the logits; one program for
    ROWS rows.

    With ``m`` the maximum and ``s = sum exp(x - m)``, kept up to date in the first sweep, the loss is
    ``sum_c p_c (log s - (x_c - m))`` and the error ``sum(p) exp(x_c - m) / s - p_c``, p the smoothed target.
    """
    if share_ptr is not None:
        factor = factor * tl.load(share_ptr)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    offset = row[:, None] * classes
    if INDEX:
        label = tl.load(target_ptr + row, mask=inside, other=0)
        counted = tl.where(label != ignore_index, 1.0, 0.0)
    else:
        label = row
        counted = tl.full([ROWS], 1.0, tl.float32)
    highest = tl.full([ROWS], -3e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    for start in range(0, classes, COLS):
        column = start + tl.arange(0, COLS)
        mask = inside[:, None] & (column < classes)[None, :]
        x = _logits(logits_ptr, bias_ptr, offset, column, mask, classes)
        higher = tl.maximum(highest, tl.max(x, 1))
        total = total * exp(highest - higher) + tl.sum(exp(x - higher[:, None]), 1)
        highest = higher
        if not INDEX:
            weight += tl.sum(tl.load(target_ptr + offset + column[None, :], mask=mask, other=0.0).to(tl.float32), 1)
    if INDEX:
        weight = counted
    weight = weight * (1 - smoothing) + counted * smoothing
    log_total = tl.log(total)
    loss = tl.zeros([ROWS], tl.float32)
    for start in range(0, classes, COLS):
        column = start + tl.arange(0, COLS)
        mask = inside[:, None] & (column < classes)[None, :]
        x = _logits(logits_ptr, bias_ptr, offset, column, mask, classes) - highest[:, None]
        if INDEX:
            p = tl.where(column[None, :] == label[:, None], counted[:, None], 0.0)
        else:
            p = tl.load(target_ptr + offset + column[None, :], mask=mask, other=0.0).to(tl.float32)
        p = p * (1 - smoothing) + (counted * smoothing / classes)[:, None]
        # a logit of -inf costs nothing where the target has no probability
        loss += tl.sum(tl.where(mask & (p > 0), p * (log_total[:, None] - x), 0.0), 1)
        if error_ptr is not None:
            error = exp(x) * (weight / total)[:, None] - p
            if not LATE:
                error = error * factor
            tl.store(error_ptr + offset + column[None, :], error, mask=mask)
    tl.store(loss_ptr + row, loss * factor, mask=inside)


@triton.jit
def _share(target_ptr, share_ptr, rows, ignore_index, ROWS: tl.constexpr):
    """What a row has of a mean over those that count, at least one; a single program."""
    counted = tl.zeros([ROWS], tl.int32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        label = tl.load(target_ptr + row, mask=row < rows, other=ignore_index)
        counted += tl.where(label != ignore_index, 1, 0)
    tl.store(share_ptr, 1.0 / tl.maximum(tl.sum(counted, 0), 1).to(tl.float32))


def softmax_error(logits, bias, target, smoothing, ignore_index, loss, error, factor, share, late=False):
    """Fill ``loss`` [N] and, unless ``None``, ``error`` [N, C], which may be ``logits`` itself.

    Both times what :func:`mean_or_sum` gave as ``factor`` and ``share``; if ``late``, the error is yet to be.
    """
    rows, classes = logits.shape
    # of many classes a chunk has few rows, and each program must move more bytes at a time
    elements, warps = (TILE // 2, WARPS) if classes <= TILE // 2 else (2 * TILE, 2 * WARPS)
    shape = tile_shape(rows, classes, elements)
    index = not target.is_floating_point()
    numbers = (rows, classes, ignore_index, smoothing, float(factor))
    programs = (cdiv(rows, shape[0]),)
    tensors = (logits, bias, target, loss, error, share)
    launch(_softmax_error, programs, *tensors, *numbers, index, late, *shape, num_warps=warps)


def mean_or_sum(target, reduction, ignore_index):
    """The factor of every row's loss: a number, and a float32 scalar on the target's device, since counting may not
    wait, or ``None``."""
    if reduction == "sum":
        return 1.0, None
    if target.is_floating_point():
        return 1 / max(len(target), 1), None
    if len(target) > MANY:
        return 1.0, 1 / (target != ignore_index).sum().clamp(min=1).float()
    share = torch.empty((), device=target.device)
    launch(_share, (1,), target, share, len(target), ignore_index, 1024, num_warps=4)
    return 1.0, share


def head(x, weight, bias, target, smoothing, reduction, ignore_index, grad_x, grad_weight, grad_bias, exact=False):
    """Loss and gradients for x [N, D], all contiguous and of one device, x and weight of one dtype.

    A gradient that takes several chunks, or is to be ``exact``, is float32, as is that by the bias.
    """
    rows, classes = len(x), len(weight)
    if rows == 0:
        wanted = ((x, grad_x), (weight, grad_weight), (bias, grad_bias))
        return x.new_zeros((), dtype=torch.float32), *(torch.zeros_like(t) if w else None for t, w in wanted)
    factor, share = mean_or_sum(target, reduction, ignore_index)
    losses = x.new_empty(rows, dtype=torch.float32)
    piece, step = (max(64, entries // classes // 64 * 64) for entries in (LOGITS, CHUNK))
    late = x.dtype == torch.float16  # a mean over many rows would leave nothing of the error
    dtype = torch.float32 if exact or late or rows > step else x.dtype
    wanted, by_rows, by_weight, by_bias = grad_x or grad_weight or grad_bias, [], None, None
    for start in range(0, rows, step):
        chunk = x[start : start + step]
        error = x.new_empty(len(chunk), classes) if wanted else None
        for first in range(0, len(chunk), piece):
            here, there = slice(first, first + piece), slice(start + first, start + min(first + piece, step))
            given = target[there], smoothing, ignore_index, losses[there], error[here] if wanted else None
            softmax_error(matmul(chunk[here], weight.t()), bias, *given, factor, share, late)
        if grad_x:
            by_rows.append(matmul(error, weight, dtype))
        if grad_weight:
            by_weight = matmul(error.t(), chunk, dtype, by_weight)
        if grad_bias:
            part = error.sum(0, dtype=torch.float32)
            by_bias = part if by_bias is None else by_bias.add_(part)
    by_x = by_rows[0] if len(by_rows) == 1 else torch.cat(by_rows) if by_rows else None
    gradients = by_x, by_weight, by_bias
    if late:
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(factor if share is None else share)
    return losses.sum(), *gradients


def _cast(gradient, like):
    return None if gradient is None else gradient.to(like.dtype)


def linear_cross_entropy(
    x, weight, bias, target, label_smoothing, reduction, ignore_index, grad_x, grad_weight, grad_bias
):
    """See ``bllkern/_ops.py``."""
    with on_device_of(x):
        pooled = x.flatten(2).mean(2) if x.dim() > 2 else x.contiguous()
        grad_bias = grad_bias and bias is not None
        bias = None if bias is None else bias.contiguous()
        loss, by_x, by_weight, by_bias = head(
            pooled, weight.contiguous(), bias, target.contiguous(), label_smoothing, reduction, ignore_index,
            grad_x, grad_weight, grad_bias,
        )  # fmt: skip
        if grad_x and x.dim() > 2:
            positions = x[0, 0].numel() if len(x) else 1
            by_x = (by_x / positions).to(x.dtype).view(*by_x.shape, *[1] * (x.dim() - 2)).expand(x.shape).contiguous()
        return loss, _cast(by_x, x), _cast(by_weight, weight), _cast(by_bias, bias)
