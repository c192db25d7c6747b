"""Statistics of one row, which a program reads COLS elements at a time."""

import triton
import triton.language as tl


@triton.jit
def mean_of(
    x_ptr,  # [width]
    width,
    COLS: tl.constexpr,
):
    """Mean of a row."""
    column = tl.arange(0, COLS)
    sums = tl.zeros([COLS], tl.float32)
    for start in range(0, width, COLS):
        sums += tl.load(x_ptr + start + column, mask=start + column < width, other=0.0).to(tl.float32)
    return tl.sum(sums, 0) / width


@triton.jit
def direction(
    x_ptr,  # [width]
    width,
    COLS: tl.constexpr,
):
    """Mean of a row and the reciprocal of its length once centred; 0 for one that is constant, up to rounding."""
    column = tl.arange(0, COLS)
    mean = mean_of(x_ptr, width, COLS)
    squares = tl.zeros([COLS], tl.float32)
    variations = tl.zeros([COLS], tl.float32)
    for start in range(0, width, COLS):
        mask = start + column < width
        x = tl.load(x_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - mean, 0.0)
        squares += x * x
        variations += centred * centred
    length = tl.sqrt(tl.sum(variations, 0))
    return mean, tl.where(length > 1e-6 * tl.sqrt(tl.sum(squares, 0)), 1 / length, 0.0)
