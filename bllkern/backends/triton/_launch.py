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
MOST_COMPILED = 4096  # launches that are known again: of a network a few hundred for each size of a batch


# From 3.3 on, a compiled kernel takes the arguments as they are; before, those that are not constants.
_REPEATS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
_compiled: dict[tuple, object] = {}


def launch(kernel, grid: tuple[int, ...], *arguments, num_warps: int = WARPS) -> None:
    """``kernel[grid](*arguments, num_warps=num_warps)``, the first of which is a tensor.

    At each launch Triton looks at all arguments for what it compiles a kernel for, and at its settings: 30 to 60 us.
    Here that is done for the first of calls alike in dtypes, alignment and all numbers but floats.
    """
    key = (id(kernel), num_warps, arguments[0].get_device(), *map(_kind, arguments))
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)](*arguments)
        return
    compiled = kernel[grid](*arguments, num_warps=num_warps)
    if _REPEATS and compiled is not None:  # an interpreted one is not compiled
        if len(_compiled) >= MOST_COMPILED:
            _compiled.clear()
        _compiled[key] = compiled


def _kind(argument):
    """What a kernel is compiled for; of a number more than that."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return float if isinstance(argument, float) else argument


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up.  This and the next one take Triton 7 us on the host."""
    return -(-a // b)


def power_of_2(x: int) -> int:
    """The least one that is not below ``x``, a positive number."""
    return 1 << (x - 1).bit_length()


def on_device_of(x: Tensor):
    """A context in which kernels are launched on the device of ``x``."""
    other = x.is_cuda and x.get_device() != torch.cuda.current_device()
    return torch.cuda.device(x.device) if other else nullcontext()


def tile_shape(rows: int, columns: int, elements: int = TILE) -> tuple[int, int]:
    """Powers of two ``(ROWS, COLS)`` with ``ROWS * COLS == elements``, at least 4 columns, as many as a row needs."""
    cols = min(power_of_2(max(columns, 4)), elements)
    return elements // cols, cols


def splits(tiles: int, length: int, shortest: int) -> int:
    """In how many parts to cut a sum of ``length`` terms, so that ``tiles`` times as many programs fill a GPU."""
    return max(1, min(1024 // max(tiles, 1), length // shortest))


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32, total: Tensor | None = None) -> Tensor:
    """``a @ b`` in its dtype or float32, added to ``total`` of that dtype where that is given; operands in half
    precision go to tensor cores, which add up in float32."""
    if a.dtype == dtype:
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    if a.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(a, b, out_dtype=dtype) if total is None else torch.addmm(total, a, b, dtype, out=total)
    return matmul(a.float(), b.float(), dtype, total)
