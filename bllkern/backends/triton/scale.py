"""A gradient times that of its loss, in place: nothing is read or written where the factor is 1."""

import triton
import triton.language as tl

from ._launch import cdiv, launch, on_device_of

COUNT = 8192  # elements of a program, 32 for each thread


@triton.jit
def _scale(x_ptr, factor_ptr, count, COUNT: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1:
        place = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
        x = tl.load(x_ptr + place, mask=place < count).to(tl.float32)
        tl.store(x_ptr + place, x * factor, mask=place < count)


def scale_(x, factor):
    """``x.mul_(factor)``, ``x`` contiguous, ``factor`` a scalar on its device."""
    with on_device_of(x):
        launch(_scale, (cdiv(x.numel(), COUNT),), x, factor, x.numel(), COUNT)
    return x
