"""``evidence_cross_entropy``: sums over units and over classes in registers, so that nothing of N x C x D is stored.

Gaussian and Poisson evidences are linear in a statistic of a, ``a . b + |b|^2/2`` and ``exp(a) . (exp(b) - 1)``: they
are :func:`linear_cross_entropy.head`.  For the other families one kernel makes the logits, one the softmax error of
each row, and one, run twice with its operands exchanged, the gradients.
"""

import torch

import triton
import triton.language as tl

from .families import exp
from .linear_cross_entropy import head, mean_or_sum, softmax_error
from ._launch import cdiv, launch, on_device_of, power_of_2, splits

# Largest group whose normaliser is computed again for the gradients; those of larger groups are kept from the logits,
# where such a group is cut into pieces of at least PIECE units.
WHOLE_GROUP, PIECE = 32, 32
ROWS, COLS, WARPS = 32, 64, 4
# A program of the gradients has fewer rows, as many as these at least, where there would be fewer programs than that, and
# sums at least TERMS terms.
LEAST_ROWS, PROGRAMS, TERMS = 4, 256, 8
FACTORS = tl.constexpr(16)


@triton.jit
def _bernoulli(a_ptr, b_ptr, row_mask, column_mask, rows, classes, units, ROWS: tl.constexpr, COLS: tl.constexpr):
    """``A(x) - A(a)``, x = a + b, is ``max(x, 0) - max(a, 0) + log((1 + exp(-|x|)) / (1 + exp(-|a|)))``.

    Of ``FACTORS`` units only one logarithm is taken, of the product.  The first difference is taken as that of
    smaller numbers, ``max(b + min(a, 0), -max(a, 0))``.
    """
    evidence = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, units, FACTORS):
        numerator = tl.full([ROWS, COLS], 1.0, tl.float32)
        denominator = tl.full([ROWS, 1], 1.0, tl.float32)
        for _unit in range(start, tl.minimum(start + FACTORS, units)):
            a = tl.load(a_ptr, mask=row_mask, other=0.0).to(tl.float32)
            b = tl.load(b_ptr, mask=column_mask, other=0.0).to(tl.float32)
            numerator += numerator * exp(-tl.abs(a + b))
            denominator += denominator * exp(-tl.abs(a))
            evidence += tl.maximum(b + tl.minimum(a, 0.0), -tl.maximum(a, 0.0))
            a_ptr += rows
            b_ptr += classes
        evidence += tl.log(numerator / denominator)
    return evidence


@triton.jit
def _categorical(
    a_ptr, b_ptr, row_mask, column_mask, rows, classes, first, count, size, pieces, piece,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``log sum exp(x)``, x = a + b and a a log-probability, of each of ``count`` pieces of groups, with a running
    maximum.

    One exponential a unit: of the smaller of x and the maximum so far, relative to the larger.
    """
    evidence = tl.zeros([ROWS, COLS], tl.float32)
    for part in range(first, first + count):
        highest = tl.full([ROWS, COLS], -3e38, tl.float32)
        total = tl.zeros([ROWS, COLS], tl.float32)
        for _unit in range(tl.minimum(piece, size - part % pieces * piece)):
            a = tl.load(a_ptr, mask=row_mask, other=0.0).to(tl.float32)
            x = a + tl.load(b_ptr, mask=column_mask, other=0.0).to(tl.float32)
            ratio = exp(-tl.abs(x - highest))
            total = tl.where(x > highest, total * ratio + 1, total + ratio)
            highest = tl.maximum(highest, x)
            a_ptr += rows
            b_ptr += classes
        evidence += highest + tl.log(total)
    return evidence


@triton.jit
def _gaussian_learned(
    a_ptr, b_ptr, row_mask, column_mask, rows, classes, units, all_units, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """With precisions ``p = -2 a2``, ``q = -2 b2`` and mean ``m = a1 / p``:

    ``(a1 + b1)^2 / (2 (p + q)) - a1^2 / (2p) - log((p + q) / p) / 2 = (b1 (2 a1 + b1) - m a1 q) / (2 (p + q)) - ...``
    """
    evidence = tl.zeros([ROWS, COLS], tl.float32)
    a2_ptr = a_ptr + all_units * rows
    b2_ptr = b_ptr + all_units * classes
    for _unit in range(units):
        a1 = tl.load(a_ptr, mask=row_mask, other=0.0).to(tl.float32)
        b1 = tl.load(b_ptr, mask=column_mask, other=0.0).to(tl.float32)
        p = -2 * tl.load(a2_ptr, mask=row_mask, other=-0.5).to(tl.float32)
        q = -2 * tl.load(b2_ptr, mask=column_mask, other=0.0).to(tl.float32)
        evidence += ((b1 * (2 * a1 + b1) - a1 / p * a1 * q) / (p + q) - tl.log((p + q) / p)) / 2
        a_ptr += rows
        b_ptr += classes
        a2_ptr += rows
        b2_ptr += classes
    return evidence


@triton.jit
def _log_evidence(
    a_ptr,  # [D, rows]; categorical: log-probabilities
    b_ptr,  # [D, classes]
    logits_ptr,  # [splits, rows, classes] float32
    rows,
    classes,
    units,
    split_units,
    size,
    pieces,
    piece,
    FAMILY: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Evidences of a tile [ROWS, COLS], summed over the ``split_units`` units from ``program_id(2) * split_units``.

    A categorical unit is one of the ``pieces`` of a group of ``size``, of at most ``piece`` each.
    """
    split = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)[None, :]
    row_mask, column_mask = row < rows, column < classes
    first = split * split_units
    parameter = first // pieces * size + first % pieces * piece
    a_ptr += parameter * rows + row
    b_ptr += parameter * classes + column
    count = tl.minimum(split_units, (units - first).to(tl.int32))
    if FAMILY == "bernoulli":
        evidence = _bernoulli(a_ptr, b_ptr, row_mask, column_mask, rows, classes, count, ROWS, COLS)
    elif FAMILY == "categorical":
        evidence = _categorical(
            a_ptr, b_ptr, row_mask, column_mask, rows, classes, first.to(tl.int32), count, size, pieces, piece,
            ROWS, COLS,
        )  # fmt: skip
    else:
        evidence = _gaussian_learned(a_ptr, b_ptr, row_mask, column_mask, rows, classes, count, units, ROWS, COLS)
    offset = (split * rows + row) * classes + column
    tl.store(logits_ptr + offset, evidence, mask=row_mask & column_mask)


@triton.jit
def _gaussian_mean(x, parameter):
    """Of learned Gaussians with natural parameters x [..., 2], the means of their two statistics."""
    second = (parameter == 1)[None, None, :]
    variance = -0.5 / tl.sum(tl.where(second, x, 0.0), 2)[:, :, None]
    m = tl.sum(tl.where(second, 0.0, x), 2)[:, :, None] * variance
    return tl.where(second, m * m + variance, m)


@triton.jit
def _posterior_sum(
    p_ptr,  # [rows, D]
    q_ptr,  # [terms, D]
    error_ptr,  # [terms, rows] float32 in strides error_term, error_row
    lse_ptr,  # [groups, rows, terms] float32 in strides lse_group, lse_row, lse_term; or None
    out_ptr,  # [splits, rows, D] float32
    rows,
    terms,
    width,
    units,
    split_terms,
    size,
    unit_stride,
    parameter_stride,
    error_term,
    error_row,
    group_size,
    lse_group,
    lse_row,
    lse_term,
    FAMILY: tl.constexpr,
    CENTRED: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """``sum_s error[s, r] mean(p_r + q_s)`` for a tile of ROWS rows and UNITS units of ``size`` parameters each.

    If CENTRED, ``sum_s error[s, r] (mean(p_r + q_s) - mean(p_r))``: these errors add up to 0 but for rounding, which
    this keeps from being multiplied by the mean.  A categorical p is a log-probability then.
    """
    split = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    parameter = tl.arange(0, SIZE)
    place = unit[:, None] * unit_stride + parameter[None, :] * parameter_stride
    inside = ((unit < units)[:, None] & (parameter < size)[None, :])[None, :, :]
    mask = inside & (row < rows)[:, None, None]
    offset = row[:, None, None] * width + place[None, :, :]
    p = tl.load(p_ptr + offset, mask=mask, other=float("-inf")).to(tl.float32)
    total = tl.zeros([ROWS, UNITS, SIZE], tl.float32)
    first = split * split_terms
    q_ptr += first * width + place[None, :, :]
    error_ptr += first * error_term + row[:, None, None] * error_row
    errors = tl.zeros([ROWS, 1, 1], tl.float32)
    if lse_ptr is not None:
        lse_ptr += (place // group_size)[None, :, :] * lse_group + row[:, None, None] * lse_row + first * lse_term
    for _term in range(tl.minimum(split_terms, (terms - first).to(tl.int32))):
        x = p + tl.load(q_ptr, mask=inside, other=0.0).to(tl.float32)
        error = tl.load(error_ptr, mask=(row < rows)[:, None, None], other=0.0)
        errors += error
        if FAMILY == "bernoulli":
            total += error / (1 + exp(-x))
        elif FAMILY == "gaussian_learned":
            total += error * _gaussian_mean(x, parameter)
        elif lse_ptr is not None:
            total += error * exp(x - tl.load(lse_ptr, mask=mask, other=0.0))
            lse_ptr += lse_term
        else:
            e = exp(x - tl.max(x, 2)[:, :, None])
            total += e * (error / tl.sum(e, 2)[:, :, None])
        q_ptr += width
        error_ptr += error_term
    if CENTRED:
        if FAMILY == "bernoulli":
            total -= errors / (1 + exp(-p))
        elif FAMILY == "gaussian_learned":
            total -= errors * _gaussian_mean(p, parameter)
        else:
            total -= errors * exp(p)
    tl.store(out_ptr + split * rows * width + offset, total, mask=mask)


def _logits(a, messages, family, size):
    """Log evidences [N, C], and the normalisers of large groups [groups, N, C], else ``None``."""
    (rows, width), classes = a.shape, len(messages)
    units = width // (2 if family == "gaussian_learned" else size)
    # a unit of a learned Gaussian takes twice the registers
    cols = COLS // 2 if family == "gaussian_learned" else min(COLS, max(16, power_of_2(classes)))
    tiles = cdiv(rows, ROWS), cdiv(classes, cols)
    kept, pieces, piece = size > WHOLE_GROUP, 1, size
    if kept:
        piece = cdiv(size, splits(tiles[0] * tiles[1] * units, size, PIECE))
        pieces, split_units = cdiv(size, piece), 1
    else:
        step = FACTORS.value if family == "bernoulli" else 1
        split_units = cdiv(cdiv(units, splits(tiles[0] * tiles[1], units, step)), step) * step
    parts = cdiv(units * pieces, split_units)
    found = a.new_empty(parts, rows, classes, dtype=torch.float32)
    launch(
        _log_evidence, (*tiles, parts),
        a.t().contiguous(), messages.t().contiguous(), found, rows, classes, units * pieces, split_units,
        size, pieces, piece, family, ROWS, cols, num_warps=WARPS,
    )  # fmt: skip
    lse = None
    if kept:
        found = lse = found.unflatten(0, (units, pieces)).logsumexp(1) if pieces > 1 else found
    return found.sum(0) if len(found) > 1 or kept else found[0], lse  # the logits will be overwritten


def _sum_of_means(p, q, error, lse, lse_strides, family, size, centred):
    """``sum_s error[r, s] mean(p_r + q_s)`` [R, D] for p [R, D], q [S, D] and error [R, S]; less ``mean(p_r)`` each if
    ``centred``."""
    (rows, width), terms = p.shape, len(q)
    learned = family == "gaussian_learned"
    parameters = 2 if learned else 1 if lse is not None else size
    units = width // parameters
    wide = power_of_2(parameters)
    tall = min(power_of_2(units), max(1, COLS // wide))
    high = max(1, ROWS * COLS // (wide * tall) // (2 if learned else 1))
    while high > LEAST_ROWS and cdiv(rows, high) * cdiv(units, tall) < PROGRAMS:
        high //= 2
    tiles = cdiv(rows, high), cdiv(units, tall)
    parts = splits(tiles[0] * tiles[1], terms, TERMS)
    split_terms = cdiv(terms, parts)
    parts = cdiv(terms, split_terms)
    out = p.new_empty(parts, rows, width, dtype=torch.float32)
    strides = (1, units) if learned else (parameters, 1)
    launch(
        _posterior_sum, (*tiles, parts),
        p, q, error, lse, out, rows, terms, width, units, split_terms, parameters, *strides,
        error.stride(1), error.stride(0), size, *lse_strides, family, centred, high, tall, wide, num_warps=WARPS,
    )  # fmt: skip
    return out.sum(0) if parts > 1 else out[0]


def _evidence(
    a, messages, log_prior, target, family, group_size, label_smoothing, reduction, ignore_index, grad_a, grad_messages
):
    """Loss, gradients by a and messages (or ``None``), and the softmax error [N, C] times the mean's factor."""
    size = (group_size or a.shape[1]) if family == "categorical" else 1
    if family == "categorical":
        a = a.float().unflatten(1, (-1, size)).log_softmax(2).flatten(1)
    logits, lse = _logits(a, messages, family, size)
    losses = a.new_empty(len(a), dtype=torch.float32)
    error, (rows, classes) = logits, logits.shape
    factors = mean_or_sum(target, reduction, ignore_index)
    softmax_error(logits, log_prior, target, label_smoothing, ignore_index, losses, error, *factors)
    by_a = by_messages = None
    if grad_a:
        strides = (rows * classes, classes, 1)
        by_a = _sum_of_means(a, messages, error, lse, strides, family, size, True)
    if grad_messages:
        by_messages = _sum_of_means(messages, a, error.t(), lse, (rows * classes, 1, classes), family, size, False)
    return losses.sum(), by_a, by_messages, error


def _linear(a, messages, log_prior, target, family, label_smoothing, reduction, ignore_index, *wanted):
    """Gaussian and Poisson: a linear head, whose gradients then go through its statistics of a and of the messages."""
    grad_a, grad_messages, grad_log_prior = wanted
    if family == "gaussian":
        x, weight = a, messages
        bias = (messages.float() ** 2).sum(1) / 2
        bias = bias if log_prior is None else bias + log_prior
        grad_bias = grad_messages or grad_log_prior
    else:
        x, weight, bias, grad_bias = a.float().exp(), messages.float().expm1(), log_prior, grad_log_prior
    loss, by_a, by_messages, by_bias = head(
        x, weight, bias, target, label_smoothing, reduction, ignore_index, grad_a, grad_messages, grad_bias, exact=True
    )
    if family == "gaussian":
        by_messages = by_messages.addcmul_(by_bias[:, None], messages.float()) if grad_messages else None
    else:
        by_a = by_a.mul_(x) if grad_a else None
        by_messages = by_messages.mul_(messages.float().exp()) if grad_messages else None
    return loss, by_a, by_messages, by_bias


def evidence_cross_entropy(
    a, messages, log_prior, target, family, group_size, label_smoothing, reduction, ignore_index,
    grad_a, grad_messages, grad_log_prior,
):  # fmt: skip
    """See ``bllkern/_ops.py``."""
    inputs = a, messages, log_prior
    grad_log_prior = grad_log_prior and log_prior is not None
    a, messages, target = a.contiguous(), messages.contiguous(), target.contiguous()
    log_prior = None if log_prior is None else log_prior.contiguous()
    wanted = grad_a, grad_messages, grad_log_prior
    with on_device_of(a):
        if len(a) == 0:
            loss = a.new_zeros((), dtype=torch.float32)
            grads = [None if x is None else torch.zeros_like(x) for x in inputs]
        elif family in ("gaussian", "poisson"):
            settings = target, family, label_smoothing, reduction, ignore_index
            loss, *grads = _linear(a, messages, log_prior, *settings, *wanted)
        else:
            settings = target, family, group_size, label_smoothing, reduction, ignore_index
            loss, *grads, error = _evidence(a, messages, log_prior, *settings, *wanted[:2])
            grads.append(error.sum(0) if grad_log_prior else None)
        return loss, *(g.to(x.dtype) if w else None for g, x, w in zip(grads, inputs, wanted, strict=True))
