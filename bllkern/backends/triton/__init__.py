"""The Triton kernels, one module per op, on CUDA devices and, under ``TRITON_INTERPRET=1``, on the CPU."""

from __future__ import annotations

import os

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

try:
    import triton as _triton  # noqa: F401
except ImportError as exception:
    error = f"triton cannot be imported ({exception})"
else:
    error = None
    from .agreement import agreement, linear_agreement  # noqa: F401
    from .batch_norm_relu import batch_norm_relu, batch_norm_relu_gradient, normalized_relu  # noqa: F401
    from .evidence_cross_entropy import evidence_cross_entropy  # noqa: F401
    from .gram import decorrelation, similarity_matching  # noqa: F401
    from .linear_cross_entropy import linear_cross_entropy  # noqa: F401
    from .prototypes import prototypes, prototypes_gradient  # noqa: F401
    from .scale import scale_  # noqa: F401


def unavailable(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    if error:
        return error
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not (interpreted and device_type == "cpu"):
        return "it runs on CUDA devices, or on the CPU under TRITON_INTERPRET=1"
    if op not in globals():
        return "it has no kernel for this op"
    return None if dtype in DTYPES else f"its kernels take {', '.join(map(str, DTYPES))}"
