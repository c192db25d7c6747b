"""A message as the bytes that a socket carries: its header, its tensors, and what marks their end.

A tensor goes without the words that are 0 where that is shorter (:func:`bllkern.backends.reference.pack`): behind a
ReLU about half of an activation.  Numbers with a fraction are words as they are; integers are taken byte by byte, so that
class indices need few bytes.  Either way every bit comes through.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import _native
from ..backends import reference
from .messages import CHECKSUM_BYTES, HEADER_BYTES, Header, MessageError, checksum, empty

_kernels = reference if _native.error else _native


def join(header: Header, tensors: list[Tensor]) -> Tensor:
    """The message as uint8 [bytes]; tensors are contiguous and on the CPU."""
    out = torch.empty(HEADER_BYTES + sum(tensor.nbytes for tensor in tensors) + CHECKSUM_BYTES, dtype=torch.uint8)
    place, packed = HEADER_BYTES, []
    for tensor in tensors:
        room = out[place : place + tensor.nbytes]
        used = _kernels.pack(tensor, _word_bytes(tensor.dtype), room[:-1])
        if used < 0:
            room.copy_(flat(tensor))
        packed.append(max(used, 0))
        place += packed[-1] or tensor.nbytes
    out[:HEADER_BYTES] = replace(header, packed=packed if any(packed) else []).encode()
    out[place : place + CHECKSUM_BYTES] = checksum(out)
    return out[: place + CHECKSUM_BYTES]


def carried(tensor: Tensor) -> int:
    """Bytes of a contiguous tensor on its way."""
    used = _kernels.pack(tensor, _word_bytes(tensor.dtype), torch.empty(tensor.nbytes, dtype=torch.uint8)[:-1])
    return tensor.nbytes if used < 0 else used


def length(header: Header) -> int:
    """Bytes of the whole message."""
    return HEADER_BYTES + sum(_sizes(header)) + CHECKSUM_BYTES


def split(header: Header, data: Tensor) -> list[Tensor]:
    """The tensors of the message, uint8 [length(header)].  Raises ``MessageError`` if they cannot be what was sent."""
    if not torch.equal(data[-CHECKSUM_BYTES:], checksum(data)):
        raise MessageError(f"tensors {header.tensors} were due, a message that is shorter, longer or of others came")
    tensors = [empty(description) for description in header.tensors]
    pieces = data[HEADER_BYTES:-CHECKSUM_BYTES].split(_sizes(header))
    for tensor, piece, packed in zip(tensors, pieces, header.packed or [0] * len(tensors)):
        if not packed:
            flat(tensor).copy_(piece)
        elif not _kernels.unpack(piece, _word_bytes(tensor.dtype), tensor):
            raise MessageError(f"a tensor of {list(tensor.shape)} was due, the masks of its {packed} bytes do not fit")
    return tensors


def flat(tensor: Tensor) -> Tensor:
    """The storage of a contiguous tensor as uint8 [nbytes]."""
    return tensor.reshape(-1).view(torch.uint8)


def _sizes(header: Header) -> list[int]:
    """Bytes of each tensor on its way."""
    sizes = [empty(description, "meta").nbytes for description in header.tensors]
    return [packed or size for packed, size in zip(header.packed or sizes, sizes)]


def _word_bytes(dtype: torch.dtype) -> int:
    return dtype.itemsize if dtype.is_floating_point else 1
