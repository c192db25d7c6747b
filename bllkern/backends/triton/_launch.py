"""What every launch needs: the right device, tile sizes, and matrix products in float32."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

import triton

# Elements that one program holds, and its warps: 8 elements a thread are 16 bytes of half precision and two times 16 of
# float32, and leave registers for several programs on each multiprocessor.
TILE = 2048
WARPS = 8


def on_device_of(x: Tensor):
    """A context in which kernels are launched on the device of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def tile_shape(rows: int, columns: int, elements: int = TILE) -> tuple[int, int]:
    """Powers of two ``(ROWS, COLS)`` with ``ROWS * COLS == elements``, at least 4 columns, as many as a row needs."""
    cols = min(triton.next_power_of_2(max(columns, 4)), elements)
    return elements // cols, cols


def splits(tiles: int, length: int, shortest: int) -> int:
    """In how many parts to cut a sum of ``length`` terms, so that ``tiles`` times as many programs fill a GPU."""
    return max(1, min(1024 // max(tiles, 1), length // shortest))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32; half-precision operands go to the tensor cores, which accumulate in float32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
