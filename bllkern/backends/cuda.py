"""The compiled CUDA kernels (csrc/*.cu), for float32, bfloat16 and float16."""

from __future__ import annotations

import torch

from .. import _native

agreement = _native.agreement


def unavailable(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cuda":
        return "it runs on CUDA devices only"
    if _native.error:
        return _native.error
    if not _native.cuda_built:
        return "the extension was built without CUDA (BLLKERN_CUDA)"
    if op not in globals():
        return "it has no kernel for this op"
    return None if dtype in _native.DTYPES else f"its kernels take {', '.join(map(str, _native.DTYPES))}"
