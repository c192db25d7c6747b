"""The compiled CPU kernels (csrc/*.cpp), chosen for float32, bfloat16 and float16."""

from __future__ import annotations

from functools import partial

import torch

from .. import _native
from .reference import linear_then_agreement

agreement = _native.agreement
batch_norm_relu = _native.batch_norm_relu
batch_norm_relu_gradient = _native.batch_norm_relu_gradient
evidence_cross_entropy = _native.evidence_cross_entropy
linear_cross_entropy = _native.linear_cross_entropy
small_linear_cross_entropy = _native.small_linear_cross_entropy
small_hidden_layer = _native.small_hidden_layer
hidden_layer = _native.hidden_layer
hidden_layer_gradient = _native.hidden_layer_gradient
similarity_matching = _native.similarity_matching
decorrelation = _native.decorrelation
prototypes = _native.prototypes
prototypes_gradient = _native.prototypes_gradient
linear_agreement = partial(linear_then_agreement, agreement)


def unavailable(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cpu":
        return "it runs on the CPU only"
    if _native.error:
        return _native.error
    if op not in globals():
        return "it has no kernel for this op"
    return None if dtype in _native.DTYPES else f"its kernels take {', '.join(map(str, _native.DTYPES))}"
