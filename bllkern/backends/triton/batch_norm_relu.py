"""``batch_norm_relu``: batch normalisation, shortcut, ReLU, max pooling and pooled features from one read of x, after that
of the statistics; the gradients from one more, or two where z has a gradient itself.

csrc/batch_norm_relu.cpp derives what is computed.
"""

import torch

import triton
import triton.language as tl

from ..._ops import pooled_shape
from ._launch import on_device_of
from ._rows import mean_of

BLOCK = 1024


@triton.jit
def _statistics(
    x_ptr,  # [planes, places]
    mean_ptr,  # [planes]
    square_ptr,  # [planes]
    places,
    BLOCK: tl.constexpr,
):
    """Mean of a plane, and the sum of squared differences from it; one program for each plane."""
    plane = tl.program_id(0).to(tl.int64)
    x_ptr += plane * places
    place = tl.arange(0, BLOCK)
    mean = mean_of(x_ptr, places, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, places, BLOCK):
        mask = start + place < places
        d = tl.where(mask, tl.load(x_ptr + start + place, mask=mask, other=0.0).to(tl.float32) - mean, 0.0)
        squares += d * d
    tl.store(mean_ptr + plane, mean)
    tl.store(square_ptr + plane, tl.sum(squares, 0))


@triton.jit
def _largest(x_ptr, h, w, mask, height, width, mean, scale, bias, K: tl.constexpr):
    """Of each window (h, w) the largest ``t = (x - mean) scale + bias``, ``x - mean`` there, and where: the first of
    equal ones.  Places past the edges repeat those at the edge, which are no new maximum."""
    d = tl.load(x_ptr + h * K * width + w * K, mask=mask, other=0.0).to(tl.float32) - mean
    t = d * scale + bias
    chosen = tl.zeros_like(h)
    for k in tl.static_range(1, K * K):
        down, across = tl.minimum(h * K + k // K, height - 1), tl.minimum(w * K + k % K, width - 1)
        other = tl.load(x_ptr + down * width + across, mask=mask, other=0.0).to(tl.float32) - mean
        u = other * scale + bias
        more = u > t
        d, t, chosen = tl.where(more, other, d), tl.where(more, u, t), tl.where(more, k, chosen)
    return t, d, chosen


@triton.jit
def _forward(
    x_ptr,  # [images, channels, height, width]
    weight_ptr,  # [channels] float32, as are the next three
    bias_ptr,
    mean_ptr,
    reciprocal_ptr,
    shortcut_ptr,  # like x, if SHORTCUT
    z_ptr,  # [images, channels, out_height, out_width]
    features_ptr,  # [images, channels, P, Q], as the next two, if FEATURES
    active_ptr,
    along_ptr,
    channels,
    height,
    width,
    out_height,
    out_width,
    P: tl.constexpr,
    Q: tl.constexpr,
    BINS: tl.constexpr,
    K: tl.constexpr,
    SHORTCUT: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each row of bins of each plane; where bins overlap, two write the same z."""
    plane, p = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = plane % channels
    mean, reciprocal = tl.load(mean_ptr + channel), tl.load(reciprocal_ptr + channel)
    scale, bias = tl.load(weight_ptr + channel) * reciprocal, tl.load(bias_ptr + channel)
    x_ptr += plane * height * width
    shortcut_ptr += plane * height * width
    z_ptr += plane * out_height * out_width
    top, bottom = p * out_height // P, ((p + 1) * out_height + P - 1) // P
    bins = tl.arange(0, BINS)
    sums = tl.zeros([BINS], tl.float32)
    counts = tl.zeros([BINS], tl.float32)
    totals = tl.zeros([BINS], tl.float32)
    for start in range(top * out_width, bottom * out_width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        mask = place < bottom * out_width
        h, w = place // out_width, place % out_width
        t, d, chosen = _largest(x_ptr, h, w, mask, height, width, mean, scale, bias, K)
        if SHORTCUT:
            t += tl.load(shortcut_ptr + place, mask=mask, other=0.0).to(tl.float32)
        z = tl.where(t < 0, 0.0, t)
        tl.store(z_ptr + place, z, mask=mask)
        on = mask & (t > 0)
        if FEATURES:
            for q in tl.static_range(Q):
                inside = (w >= q * out_width // Q) & (w < ((q + 1) * out_width + Q - 1) // Q)
                this = bins == q
                sums += tl.where(this, tl.sum(tl.where(mask & inside, z, 0.0), 0), 0.0)
                counts += tl.where(this, tl.sum(tl.where(on & inside, 1.0, 0.0), 0), 0.0)
                totals += tl.where(this, tl.sum(tl.where(on & inside, d, 0.0), 0), 0.0)
    if FEATURES:
        breadth = ((bins + 1) * out_width + Q - 1) // Q - bins * out_width // Q
        share = 1 / ((bottom - top) * breadth).to(tl.float32)
        out = (plane * P + p) * Q + bins
        tl.store(features_ptr + out, sums * share, mask=bins < Q)
        tl.store(active_ptr + out, counts * share, mask=bins < Q)
        tl.store(along_ptr + out, totals * share * reciprocal, mask=bins < Q)


@triton.jit
def _opened(x_ptr, z_ptr, h, w, mask, height, width, mean, scale, bias, K: tl.constexpr, SHORTCUT: tl.constexpr):
    """:func:`_largest`, its value before ReLU that of z where there was a shortcut (and windows of 1 place)."""
    t, d, chosen = _largest(x_ptr, h, w, mask, height, width, mean, scale, bias, K)
    if SHORTCUT:
        t = tl.load(z_ptr + h * width + w, mask=mask, other=0.0).to(tl.float32)
    return t, d, chosen


@triton.jit
def _sums(
    x_ptr,  # [images, channels, height, width]
    weight_ptr,  # [channels] float32, as are the next three
    bias_ptr,
    mean_ptr,
    reciprocal_ptr,
    z_ptr,  # like by_z, if SHORTCUT
    by_z_ptr,  # [images, channels, out_height, out_width]
    by_bias_ptr,  # [planes] float32, as is the next
    by_weight_ptr,
    channels,
    height,
    width,
    out_height,
    out_width,
    K: tl.constexpr,
    SHORTCUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What each plane adds to the gradients by bias and weight through z; one program for each plane."""
    plane = tl.program_id(0).to(tl.int64)
    channel = plane % channels
    mean, reciprocal = tl.load(mean_ptr + channel), tl.load(reciprocal_ptr + channel)
    scale, bias = tl.load(weight_ptr + channel) * reciprocal, tl.load(bias_ptr + channel)
    x_ptr += plane * height * width
    z_ptr += plane * out_height * out_width
    by_z_ptr += plane * out_height * out_width
    sums = tl.zeros([BLOCK], tl.float32)
    alongs = tl.zeros([BLOCK], tl.float32)
    for start in range(0, out_height * out_width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        mask = place < out_height * out_width
        h, w = place // out_width, place % out_width
        t, d, chosen = _opened(x_ptr, z_ptr, h, w, mask, height, width, mean, scale, bias, K, SHORTCUT)
        g = tl.where(t > 0, tl.load(by_z_ptr + place, mask=mask, other=0.0).to(tl.float32), 0.0)
        sums += g
        alongs += g * d
    tl.store(by_bias_ptr + plane, tl.sum(sums, 0))
    tl.store(by_weight_ptr + plane, tl.sum(alongs, 0) * reciprocal)


@triton.jit
def _backward(
    x_ptr,  # [images, channels, height, width]
    weight_ptr,  # [channels] float32, as are the next three
    bias_ptr,
    mean_ptr,
    reciprocal_ptr,
    z_ptr,  # [images, channels, out_height, out_width], if SHORTCUT
    by_z_ptr,  # the same, if BY_Z
    by_features_ptr,  # [images, channels, P, Q] float32, if FEATURES
    by_weight_ptr,  # [channels] float32
    by_bias_ptr,  # [channels] float32
    grad_ptr,  # like x, if GRAD_X
    grad_shortcut_ptr,  # like x, if GRAD_SHORTCUT
    channels,
    height,
    width,
    out_height,
    out_width,
    values,
    P: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
    SHORTCUT: tl.constexpr,
    BY_Z: tl.constexpr,
    FEATURES: tl.constexpr,
    GRAD_X: tl.constexpr,
    GRAD_SHORTCUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for BLOCK windows of a plane, those that are cut off at the edges among them."""
    plane = tl.program_id(0).to(tl.int64)
    channel = plane % channels
    mean, reciprocal = tl.load(mean_ptr + channel), tl.load(reciprocal_ptr + channel)
    scale, bias = tl.load(weight_ptr + channel) * reciprocal, tl.load(bias_ptr + channel)
    constant = -scale * tl.load(by_bias_ptr + channel) / values
    slope = -scale * reciprocal * tl.load(by_weight_ptr + channel) / values
    x_ptr += plane * height * width
    z_ptr += plane * out_height * out_width
    by_z_ptr += plane * out_height * out_width
    grad_ptr += plane * height * width
    grad_shortcut_ptr += plane * height * width
    by_features_ptr += plane * P * Q
    down, across = tl.cdiv(height, K), tl.cdiv(width, K)
    window = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = window < down * across
    h, w = window // across, window % across
    t, d, chosen = _opened(x_ptr, z_ptr, h, w, mask, height, width, mean, scale, bias, K, SHORTCUT)
    g = tl.zeros([BLOCK], tl.float32)
    on = mask & (h < out_height) & (w < out_width) & (t > 0)
    if BY_Z:
        g += tl.load(by_z_ptr + h * out_width + w, mask=on, other=0.0).to(tl.float32)
    if FEATURES:
        # a place lies in the bin of its share of the side, and in the next one where that begins before the bin ends
        for i in tl.static_range(4):
            p, q = h * P // out_height + i // 2, w * Q // out_width + i % 2
            top, left = p * out_height // P, q * out_width // Q
            inside = on & (p < P) & (q < Q) & (top <= h) & (left <= w)
            size = (((p + 1) * out_height + P - 1) // P - top) * (((q + 1) * out_width + Q - 1) // Q - left)
            g += tl.load(by_features_ptr + p * Q + q, mask=inside, other=0.0) / size.to(tl.float32)
    if GRAD_SHORTCUT:
        tl.store(grad_shortcut_ptr + h * width + w, g, mask=mask)
    if GRAD_X:
        for k in tl.static_range(K * K):
            row, column = h * K + k // K, w * K + k % K
            mask_k = mask & (row < height) & (column < width)
            x = tl.load(x_ptr + row * width + column, mask=mask_k, other=0.0).to(tl.float32)
            by_x = (x - mean) * slope + constant + tl.where(chosen == k, g * scale, 0.0)
            tl.store(grad_ptr + row * width + column, by_x, mask=mask_k)


def _float(*tensors):
    return [t.float().contiguous() for t in tensors]


def batch_norm_relu(x, weight, bias, shortcut, eps, max_pool, ceil_mode, pool):
    """See ``bllkern/_ops.py``."""
    (images, channels, height, width), x = x.shape, x.contiguous()
    shape, bins = pooled_shape(x, max_pool, ceil_mode, pool)
    z = x.new_empty(shape)
    features, active, along = (x.new_zeros(bins, dtype=torch.float32) for _ in range(3))
    if x.numel() == 0:
        mean = features.new_zeros(channels)
        return z, features, mean, mean.clone(), active, along
    with on_device_of(x):
        planes, places = images * channels, height * width
        means, squares = features.new_empty(2, images, channels)
        _statistics[(planes,)](x, means, squares, places, _block(places), num_warps=4)
        mean = means.mean(0)
        variance = (squares.sum(0) + places * (means - mean).square().sum(0)) / (images * places)
        weight, bias = _float(weight, bias)
        down, across = (max(count, 1) for count in bins[2:])
        block = _block(shape[3] * triton.cdiv(shape[2], down))
        _forward[(planes, down)](
            x, weight, bias, mean, torch.rsqrt(variance + eps), _or(shortcut, x), z, features, active, along,
            channels, height, width, *shape[2:], down, across, triton.next_power_of_2(across), max_pool,
            shortcut is not None, pool > 0, block, num_warps=4,
        )  # fmt: skip
    return z, features, mean, variance, active, along


def _or(x, other):
    """``x`` contiguous, or in its place ``other``, which the kernel does not read."""
    return other if x is None else x.contiguous()


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
):
    """See ``bllkern/_ops.py``."""
    (images, channels, height, width), x = x.shape, x.contiguous()
    by_x, by_shortcut = (torch.empty_like(x) if wanted else None for wanted in (grad_x, grad_shortcut))
    by_weight, by_bias = (x.new_zeros(channels, dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return by_x, by_shortcut, by_weight, by_bias
    sides, planes = pooled_shape(x, max_pool, ceil_mode, 1)[0][2:], images * channels
    reciprocal = torch.rsqrt(variance + eps)
    weight, bias, mean, reciprocal = _float(weight, bias, mean, reciprocal)
    channelwise = (x, weight, bias, mean, reciprocal, _or(z, x))
    sizes = (channels, height, width, *sides)
    if by_features is not None:
        by_features, active, along = _float(by_features, active, along)
        by_weight, by_bias = ((by_features * kept).sum((0, 2, 3)) for kept in (along, active))
    with on_device_of(x):
        if by_z is not None:
            by_z, sums = by_z.contiguous(), x.new_empty(2, images, channels, dtype=torch.float32)
            block = _block(sides[0] * sides[1])
            _sums[(planes,)](*channelwise, by_z, *sums, *sizes, max_pool, z is not None, block, num_warps=4)
            by_bias, by_weight = by_bias + sums[0].sum(0), by_weight + sums[1].sum(0)
        if grad_x or grad_shortcut:
            windows = triton.cdiv(height, max_pool) * triton.cdiv(width, max_pool)
            block = _block(windows)
            bins = (1, 1) if by_features is None else by_features.shape[2:]
            _backward[(planes, triton.cdiv(windows, block))](
                *channelwise, _or(by_z, x), _or(by_features, x), by_weight, by_bias, _or(by_x, x), _or(by_shortcut, x),
                *sizes, images * height * width, *bins, max_pool, z is not None, by_z is not None,
                by_features is not None, grad_x, grad_shortcut, block, num_warps=4,
            )  # fmt: skip
    return by_x, by_shortcut, by_weight, by_bias


def _block(places: int) -> int:
    return min(triton.next_power_of_2(places), BLOCK)
