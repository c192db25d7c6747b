"""Words that are not zero, behind a mask: messages of activations without their zeros."""

from __future__ import annotations

from torch import Tensor

from .module import _C


def pack(x: Tensor, word_bytes: int, out: Tensor) -> int:
    """``pack`` of ``backends/reference.py``."""
    return _C.pack(x, out, x.nbytes // word_bytes, word_bytes, out.nbytes)


def unpack(packed: Tensor, word_bytes: int, out: Tensor) -> bool:
    """``unpack`` of ``backends/reference.py``."""
    return _C.unpack(out, packed, out.nbytes // word_bytes, word_bytes, packed.nbytes)
