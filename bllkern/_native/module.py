"""The compiled module, and what all calls of it share."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from .. import _C
except ImportError as exception:
    _C, error = None, f"the compiled module bllkern._C is not there ({exception})"
else:
    error = None

cuda_built = _C is not None and _C.cuda_built
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum DType of csrc/dtype.h
FAMILIES = {name: i for i, name in enumerate(_C.families)} if _C is not None else {}


def check_like(name: str, x: Tensor, first: str, like: Tensor) -> None:
    if x.dtype != like.dtype or x.device != like.device or x.shape != like.shape:
        raise ValueError(
            f"{name} must have the dtype, device and shape of {first}, {like.dtype} on {like.device} {list(like.shape)}"
            f", got {x.dtype} on {x.device} {list(x.shape)}"
        )


_LARGE = 32 << 20  # bytes from which on glibc maps every allocation anew, so that all its pages are faulted in


def empty(shape, like: Tensor, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """A result on the device of ``like``."""
    return _in_huge_pages(torch.empty(shape, dtype=dtype, device=like.device, memory_format=layout))


def empty_like(x: Tensor) -> Tensor:
    """A result like contiguous ``x``."""
    return _in_huge_pages(torch.empty_like(x))


def _in_huge_pages(result: Tensor) -> Tensor:
    if result.nbytes >= _LARGE and not result.is_cuda:
        _C.prefer_huge_pages(result, result.nbytes)
    return result


def keep_freed_memory() -> None:
    """Let the process keep freed memory for its next allocations; see csrc/memory.h."""
    if _C is not None:
        _C.keep_freed_memory()


def on_stream(kernel, partials_of, device: torch.device, job: tuple) -> None:
    """Call a CUDA ``kernel`` on torch's current stream, with scratch memory of the size it asks for."""
    with torch.cuda.device(device):
        partials = torch.empty(partials_of(*job), dtype=torch.float32, device=device)
        kernel(*job, partials, torch.cuda.current_stream(device).cuda_stream)
