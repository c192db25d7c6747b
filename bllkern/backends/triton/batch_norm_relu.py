"""``batch_norm_relu``: batch normalisation, shortcut, ReLU, max pooling and pooled features from one read of x, after
that of the statistics; the gradients from one more, or two where z has a gradient itself.

csrc/batch_norm_relu.cpp derives what is computed.  A program takes a tile [places, channels] of images that are
contiguous or channels-last.
"""

import torch

import triton
import triton.language as tl

from ..._ops import layout, pooled_shape
from ._images import added, at, constants, each, launch_tiles, pieces, share, statistics, tile
from ._launch import cdiv, on_device_of, power_of_2


@triton.jit
def _largest(
    x_ptr, place, h, w, mask, column, channels, height, width, mean, scale, bias, K: tl.constexpr, LAST: tl.constexpr
):
    """Of each window (h, w), the ``place``-th, the largest ``t = (x - mean) scale + bias``, ``x - mean`` there, and
    where: the first of equal ones.  Places past the edges repeat those at the edge, which are no new maximum."""
    first = at(x_ptr, place if K == 1 else h * K * width + w * K, column, height * width, channels, LAST)
    d = tl.load(first, mask=mask, other=0.0).to(tl.float32) - mean
    t = d * scale + bias
    chosen = tl.zeros(d.shape, tl.int32)
    for k in tl.static_range(1, K * K):
        down, across = tl.minimum(height - 1 - h * K, k // K), tl.minimum(width - 1 - w * K, k % K)
        beside = (down * width + across).to(tl.int64) * (channels if LAST else 1)
        other = tl.load(first + beside[:, None], mask=mask, other=0.0).to(tl.float32) - mean
        u = other * scale + bias
        more = u > t
        d, t, chosen = tl.where(more, other, d), tl.where(more, u, t), tl.where(more, k, chosen)
    return t, d, chosen


@triton.jit
def _activated(
    x_ptr, shortcut_ptr, z_ptr, place, h, w, mask, own, column, channels, height, width, places, mean, scale, bias,
    K: tl.constexpr, SHORTCUT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """``t`` and ``x - mean`` of :func:`_largest`, and z, which is stored for those that are ``own``."""
    t, d, chosen = _largest(x_ptr, place, h, w, mask, column, channels, height, width, mean, scale, bias, K, LAST)
    if SHORTCUT:
        shortcut = tl.load(at(shortcut_ptr, place, column, places, channels, LAST), mask=mask, other=0.0)
        t += shortcut.to(tl.float32)
    z = tl.where(t < 0, 0.0, t)
    tl.store(at(z_ptr, place, column, places, channels, LAST), z, mask=own)
    return t, d, z


@triton.jit
def _forward(
    x_ptr,  # [images, channels, height, width]
    weight_ptr,  # [channels] float32, as are the next three
    bias_ptr,
    mean_ptr,
    variance_ptr,
    eps,
    shortcut_ptr,  # like x, if SHORTCUT
    z_ptr,  # [images, channels, out_height, out_width]
    channels,
    height,
    width,
    out_height,
    out_width,
    K: tl.constexpr,
    SHORTCUT: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Without features: one program for ROWS places of z."""
    places = out_height * out_width
    image, part, column = share(tl.cdiv(places, ROWS), channels, COLS)
    mean, reciprocal, scale, bias = constants(weight_ptr, bias_ptr, mean_ptr, variance_ptr, eps, column, channels)
    x_ptr += image * height * width * channels
    shortcut_ptr += image * height * width * channels
    z_ptr += image * places * channels
    place = part * ROWS + tl.arange(0, ROWS)
    mask = (place < places)[:, None] & (column < channels)[None, :]
    h, w = place // out_width, place % out_width
    _activated(
        x_ptr, shortcut_ptr, z_ptr, place, h, w, mask, mask, column, channels, height, width, places, mean, scale, bias,
        K, SHORTCUT, LAST,
    )  # fmt: skip


@triton.jit
def _forward_bins(
    x_ptr,  # [images, channels, height, width]
    weight_ptr,  # [channels] float32, as are the next three
    bias_ptr,
    mean_ptr,
    variance_ptr,
    eps,
    shortcut_ptr,  # like x, if SHORTCUT
    z_ptr,  # [images, channels, out_height, out_width]
    features_ptr,  # [images, channels, P, Q] float32 and contiguous
    active_ptr,  # the same in the layout of x, as is the next
    along_ptr,
    channels,
    height,
    width,
    out_height,
    out_width,
    most,  # places of a bin
    P: tl.constexpr,
    Q: tl.constexpr,
    BINS: tl.constexpr,
    K: tl.constexpr,
    SHORTCUT: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program for a row of bins of an image, which takes ROWS places at a time, as many of each bin.

    Where bins overlap, the first that has a place stores its z.
    """
    EACH: tl.constexpr = ROWS // BINS
    places = out_height * out_width
    image, p, column = share(P, channels, COLS)
    mean, reciprocal, scale, bias = constants(weight_ptr, bias_ptr, mean_ptr, variance_ptr, eps, column, channels)
    x_ptr += image * height * width * channels
    shortcut_ptr += image * height * width * channels
    z_ptr += image * places * channels
    q, i = tl.arange(0, ROWS) // EACH, tl.arange(0, ROWS) % EACH
    top, bottom = p * out_height // P, ((p + 1) * out_height + P - 1) // P
    left, breadth = q * out_width // Q, ((q + 1) * out_width + Q - 1) // Q - q * out_width // Q
    own_top, own_left = (p * out_height + P - 1) // P, (q * out_width + Q - 1) // Q
    sums = tl.zeros([ROWS, COLS], tl.float32)
    counts = tl.zeros([ROWS, COLS], tl.float32)
    totals = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, most, EACH):
        h, w = top + (start + i) // breadth, left + (start + i) % breadth
        inside = (q < Q) & (h < bottom)
        mask = inside[:, None] & (column < channels)[None, :]
        own = mask & ((h >= own_top) & (w >= own_left))[:, None]
        t, d, z = _activated(
            x_ptr, shortcut_ptr, z_ptr, h * out_width + w, h, w, mask, own, column, channels, height, width, places,
            mean, scale, bias, K, SHORTCUT, LAST,
        )  # fmt: skip
        on = mask & (t > 0)
        sums += tl.where(mask, z, 0.0)
        counts += tl.where(on, 1.0, 0.0)
        totals += tl.where(on, d, 0.0)
    bins = tl.arange(0, BINS)
    size = (bottom - top) * (((bins + 1) * out_width + Q - 1) // Q - bins * out_width // Q)
    part = (1 / size.to(tl.float32))[:, None]
    mask = (bins < Q)[:, None] & (column < channels)[None, :]
    features_ptr += image * channels * (P * Q)
    active_ptr += image * channels * (P * Q)
    along_ptr += image * channels * (P * Q)
    features = tl.sum(tl.reshape(sums, (BINS, EACH, COLS)), 1) * part
    active = tl.sum(tl.reshape(counts, (BINS, EACH, COLS)), 1) * part
    along = tl.sum(tl.reshape(totals, (BINS, EACH, COLS)), 1) * part * reciprocal
    tl.store(at(features_ptr, p * Q + bins, column, P * Q, channels, False), features, mask=mask)
    tl.store(at(active_ptr, p * Q + bins, column, P * Q, channels, LAST), active, mask=mask)
    tl.store(at(along_ptr, p * Q + bins, column, P * Q, channels, LAST), along, mask=mask)


@triton.jit
def _opened(
    x_ptr, z_ptr, place, h, w, mask, column, channels, height, width, mean, scale, bias, K: tl.constexpr,
    SHORTCUT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """:func:`_largest`, its value before ReLU that of z where there was a shortcut (and windows of 1 place)."""
    t, d, chosen = _largest(x_ptr, place, h, w, mask, column, channels, height, width, mean, scale, bias, K, LAST)
    if SHORTCUT:
        z = tl.load(at(z_ptr, place, column, height * width, channels, LAST), mask=mask, other=0.0)
        t = z.to(tl.float32)
    return t, d, chosen


@triton.jit
def _sums(
    x_ptr,  # [images, channels, height, width]
    weight_ptr,  # [channels] float32, as are the next three
    bias_ptr,
    mean_ptr,
    variance_ptr,
    eps,
    z_ptr,  # like by_z, if SHORTCUT
    by_z_ptr,  # [images, channels, out_height, out_width]
    by_bias_ptr,  # [images * parts, channels] float32, as is the next
    by_weight_ptr,
    channels,
    height,
    width,
    out_height,
    out_width,
    length,
    K: tl.constexpr,
    SHORTCUT: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """What ``length`` places of an image add to the gradients by bias and weight through z; one program for them."""
    places = out_height * out_width
    parts = tl.cdiv(places, length)
    image, part, column = share(parts, channels, COLS)
    mean, reciprocal, scale, bias = constants(weight_ptr, bias_ptr, mean_ptr, variance_ptr, eps, column, channels)
    x_ptr += image * height * width * channels
    z_ptr += image * places * channels
    by_z_ptr += image * places * channels
    sums = tl.zeros([ROWS, COLS], tl.float32)
    alongs = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(part * length, tl.minimum((part + 1) * length, places), ROWS):
        place = start + tl.arange(0, ROWS)
        mask = (place < places)[:, None] & (column < channels)[None, :]
        h, w = place // out_width, place % out_width
        t, d, chosen = _opened(
            x_ptr, z_ptr, place, h, w, mask, column, channels, height, width, mean, scale, bias, K, SHORTCUT, LAST
        )
        by_z = tl.load(at(by_z_ptr, place, column, places, channels, LAST), mask=mask, other=0.0).to(tl.float32)
        g = tl.where(t > 0, by_z, 0.0)
        sums += g
        alongs += g * d
    out = ((image * parts + part) * channels + column)[None, :]
    mask = (column < channels)[None, :]
    tl.store(by_bias_ptr + out, tl.sum(sums, 0)[None, :], mask=mask)
    tl.store(by_weight_ptr + out, tl.sum(alongs, 0)[None, :] * reciprocal, mask=mask)


@triton.jit
def _backward(
    x_ptr,  # [images, channels, height, width]
    weight_ptr,  # [channels] float32, as are the next three
    bias_ptr,
    mean_ptr,
    variance_ptr,
    eps,
    z_ptr,  # [images, channels, out_height, out_width], if SHORTCUT
    by_z_ptr,  # the same, if BY_Z
    by_features_ptr,  # [images, channels, P, Q] float32 and contiguous, if FEATURES
    grad_ptr,  # like x, if GRAD_X
    grad_shortcut_ptr,  # like x, if GRAD_SHORTCUT
    by_weight_ptr,  # [channels] float32
    by_bias_ptr,  # [channels] float32
    channels,
    height,
    width,
    out_height,
    out_width,
    values,
    P: tl.constexpr,
    Q: tl.constexpr,
    OVERLAP: tl.constexpr,
    K: tl.constexpr,
    SHORTCUT: tl.constexpr,
    BY_Z: tl.constexpr,
    FEATURES: tl.constexpr,
    GRAD_X: tl.constexpr,
    GRAD_SHORTCUT: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program for ROWS windows of an image, those that are cut off at the edges among them."""
    down, across = tl.cdiv(height, K), tl.cdiv(width, K)
    image, part, column = share(tl.cdiv(down * across, ROWS), channels, COLS)
    mean, reciprocal, scale, bias = constants(weight_ptr, bias_ptr, mean_ptr, variance_ptr, eps, column, channels)
    known = column < channels
    constant = -scale * tl.load(by_bias_ptr + column, mask=known, other=0.0)[None, :] / values
    slope = -scale * reciprocal * tl.load(by_weight_ptr + column, mask=known, other=0.0)[None, :] / values
    places, out_places = height * width, out_height * out_width
    x_ptr += image * places * channels
    z_ptr += image * out_places * channels
    by_z_ptr += image * out_places * channels
    grad_ptr += image * places * channels
    grad_shortcut_ptr += image * places * channels
    by_features_ptr += image * channels * (P * Q)
    window = part * ROWS + tl.arange(0, ROWS)
    mask = (window < down * across)[:, None] & known[None, :]
    h, w = window // across, window % across
    t, d, chosen = _opened(
        x_ptr, z_ptr, window, h, w, mask, column, channels, height, width, mean, scale, bias, K, SHORTCUT, LAST
    )
    g = tl.zeros([ROWS, COLS], tl.float32)
    place = window if K == 1 else h * out_width + w
    has_z = mask if K == 1 else mask & ((h < out_height) & (w < out_width))[:, None]
    if BY_Z:  # of places that ReLU closed too: so many at once are read together
        by_z = tl.load(at(by_z_ptr, place, column, out_places, channels, LAST), mask=has_z, other=0.0).to(tl.float32)
        g += tl.where(t > 0, by_z, 0.0)
    if FEATURES:
        # a place lies in the bin of its share of the side, and in the next one where that begins before the bin ends
        for i in tl.static_range(4 if OVERLAP else 1):
            p, q = h * P // out_height + i // 2, w * Q // out_width + i % 2
            top, left = p * out_height // P, q * out_width // Q
            inside = (p < P) & (q < Q) & (top <= h) & (left <= w)
            size = (((p + 1) * out_height + P - 1) // P - top) * (((q + 1) * out_width + Q - 1) // Q - left)
            bins = at(by_features_ptr, p * Q + q, column, P * Q, channels, False)
            on = has_z & (t > 0) & inside[:, None]
            g += tl.load(bins, mask=on, other=0.0) * (1 / size.to(tl.float32))[:, None]
    if GRAD_SHORTCUT:
        tl.store(at(grad_shortcut_ptr, window, column, places, channels, LAST), g, mask=mask)
    if GRAD_X:
        for k in tl.static_range(K * K):
            row, edge = h * K + k // K, w * K + k % K
            here = window if K == 1 else row * width + edge
            mask_k = mask if K == 1 else mask & ((row < height) & (edge < width))[:, None]
            x = tl.load(at(x_ptr, here, column, places, channels, LAST), mask=mask_k, other=0.0).to(tl.float32)
            by_x = (x - mean) * slope + constant + tl.where(chosen == k, g * scale, 0.0)
            tl.store(at(grad_ptr, here, column, places, channels, LAST), by_x, mask=mask_k)


def _float(*tensors):
    return [t.float().contiguous() for t in tensors]


def _in(form, *tensors):
    return [t if t is None else t.contiguous(memory_format=form) for t in tensors]


def _filled(x, *tensors):
    """The tensors, ``x`` in place of those not given, which no kernel reads, and which are given."""
    return [x if t is None else t for t in tensors], [t is not None for t in tensors]


def batch_norm_relu(x, weight, bias, shortcut, eps, max_pool, ceil_mode, pool):
    """See ``bllkern/_ops.py``."""
    form, (images, channels, height, width) = layout(x), x.shape
    shape, bins = pooled_shape(x, max_pool, ceil_mode, pool)
    z, active, along = (
        torch.empty(sides, dtype=dtype, device=x.device, memory_format=form)
        for sides, dtype in ((shape, x.dtype), (bins, torch.float32), (bins, torch.float32))
    )
    features = x.new_empty(bins, dtype=torch.float32)
    if x.numel() == 0:
        mean, variance = (features.new_zeros(channels) for _ in range(2))
        return z, features.zero_(), mean, variance, active.zero_(), along.zero_()
    x, shortcut = _in(form, x, shortcut)
    last = form == torch.channels_last
    with on_device_of(x):
        mean, variance = statistics(x, last)
        (shortcut, *_), given = _filled(x, shortcut)
        arguments = (x, *_float(weight, bias), mean, variance, eps, shortcut, z)
        sizes, settings = (channels, height, width, *shape[2:]), (max_pool, *given, last)
        if pool:
            (down, across), across_2 = bins[2:], power_of_2(bins[3])
            most = _most(shape[2], down) * _most(shape[3], across)
            rows, cols = tile(across_2 * power_of_2(most), channels, last, summed=True)
            tiles = max(rows, across_2), cols
            settings = (most, down, across, across_2, *settings)
            launch_tiles(
                _forward_bins, images * down, channels, tiles, *arguments, features, active, along, *sizes, *settings
            )
        else:
            tiles = tile(shape[2] * shape[3], channels, last)
            parts = cdiv(shape[2] * shape[3], tiles[0])
            launch_tiles(_forward, images * parts, channels, tiles, *arguments, *sizes, *settings, each=each(last))
    return z, features, mean, variance, active, along


def normalized_relu(x, mean, variance, weight, bias, eps):
    """``relu(batch_norm(x))`` by these mean and variance, of x [N, C, H, W] with elements: the very bits that
    :func:`batch_norm_relu` found."""
    (x,), channels, height, width = _in(layout(x), x), *x.shape[1:]
    z, last = torch.empty_like(x), layout(x) == torch.channels_last
    tiles = tile(height * width, channels, last)
    sizes = channels, height, width, height, width
    arguments = (x, *_float(weight, bias, mean, variance), eps, x, z, *sizes, 1, False, last)
    with on_device_of(x):
        launch_tiles(_forward, len(x) * cdiv(height * width, tiles[0]), channels, tiles, *arguments, each=each(last))
    return z


def _most(side: int, bins: int) -> int:
    """Places of the longest of so many bins along a side."""
    return max(-(-(i + 1) * side // bins) - i * side // bins for i in range(bins))


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
    """See ``bllkern/_ops.py``."""
    form, (images, channels, height, width), own = layout(x), x.shape, x
    x, z, by_z = _in(form, x, z, by_z)
    wanted = grad_x and not over_x, grad_shortcut
    returned = [torch.empty_like(x) if one else x.new_empty(0) for one in wanted]
    if x.numel() == 0 or by_z is None and by_features is None:
        for tensor in (*returned, own) if over_x else returned:
            tensor.zero_()
        return *returned, *(x.new_zeros(channels, dtype=torch.float32) for _ in range(2))
    by_x = x if over_x else returned[0] if grad_x else None
    by_shortcut = returned[1] if grad_shortcut else None
    last, sides = form == torch.channels_last, pooled_shape(x, max_pool, ceil_mode, 1)[0][2:]
    sizes = (channels, height, width, *sides)
    arguments = (x, *_float(weight, bias, mean, variance), eps)
    found = []  # by bias and by weight
    if by_features is not None:
        (by_features,) = _float(by_features)
        found.append([(by_features * kept).sum((0, 2, 3)) for kept in (active, along)])
    (z, by_z, by_features, *gradients), given = _filled(x, z, by_z, by_features, by_x, by_shortcut)
    with on_device_of(x):
        if given[1]:
            # rows of channels-last images follow each other from one to the next, unless windows are cut off between
            high = images if last and max_pool == 1 else 1
            several, places = images // high, high * sides[0] * sides[1]
            tiles = tile(places, channels, last, summed=True)
            parts, length = pieces(places, tiles[0], several * cdiv(channels, tiles[1]))
            sums = x.new_empty(2, several * parts, channels, dtype=torch.float32)
            settings = (channels, high * height, width, high * sides[0], sides[1], length, max_pool, given[0], last)
            launch_tiles(_sums, several * parts, channels, tiles, *arguments, z, by_z, *sums, *settings)
            found.append(added(sums))
        by_bias, by_weight = found[0] if len(found) == 1 else map(torch.add, *found)
        if grad_x or grad_shortcut:
            windows = cdiv(height, max_pool) * cdiv(width, max_pool)
            tiles = tile(windows, channels, last)
            bins = by_features.shape[2:] if given[2] else (1, 1)
            overlap = any(side % count for side, count in zip(sides, bins, strict=True))
            settings = (images * height * width, *bins, overlap, max_pool, *given, last)
            tensors = (z, by_z, by_features, *gradients, by_weight, by_bias)
            arguments = (*arguments, *tensors, *sizes, *settings)
            launch_tiles(_backward, images * cdiv(windows, tiles[0]), channels, tiles, *arguments, each=each(last))
        if over_x and x is not own:
            own.copy_(x)
    return *returned, by_weight, by_bias
