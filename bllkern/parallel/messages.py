"""What travels between ranks: a header of fixed size, checked before anything in it is used, then the tensors."""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

HEADER_BYTES = 512
CHECKSUM_BYTES = 8
LIMIT_BYTES = 1 << 31  # of one tensor
KINDS = ("train", "eval", "feedback", "bye")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
}
COMPRESSIONS = {None: None, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
_MAGIC = b"bllkern1"
_PREFIX = struct.Struct("<8sII")  # magic, CRC-32 of what follows it, bytes of JSON
_MAX_DIMS = 8


class MessageError(RuntimeError):
    """A message that is damaged, foreign, or not the one that is due."""


@dataclass(frozen=True)
class Header:
    """What a message holds: ``tensors`` and ``inputs`` (of the whole network) as pairs of dtype name and shape.

    ``step`` counts optimizer steps (of feedback: those its sender had done), ``micro`` the micro-batches in one.
    ``dtype`` is that of the activation before compression, ``scale`` what it was divided by.  ``targets`` are the
    options of :func:`bllkern.targets`.  ``packed``: bytes of each tensor on its way where zeros are left out of it,
    else 0; empty where they are left out of none.
    """

    kind: str
    step: int = 0
    micro: int = 0
    dtype: str = "float32"
    scale: float = 1.0
    tensors: list = field(default_factory=list)
    inputs: list = field(default_factory=list)
    targets: dict = field(default_factory=dict)
    packed: list = field(default_factory=list)

    def encode(self) -> Tensor:
        """The header as uint8 [HEADER_BYTES].  Raises ``ValueError`` if it does not fit."""
        content = json.dumps(vars(self), separators=(",", ":")).encode()
        if len(content) > HEADER_BYTES - _PREFIX.size:
            raise ValueError(f"a header must fit {HEADER_BYTES} bytes, got {len(content) + _PREFIX.size}")
        prefix = _PREFIX.pack(_MAGIC, zlib.crc32(content), len(content))
        return torch.frombuffer(bytearray((prefix + content).ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)


def decode(data: Tensor) -> Header:
    """The header in uint8 [HEADER_BYTES].  Raises ``MessageError`` that says what is wrong with it."""
    raw = data.numpy().tobytes()
    magic, checksum, length = _PREFIX.unpack_from(raw)
    if magic != _MAGIC:
        raise MessageError(f"a message must start with {_MAGIC!r}, got {magic!r}")
    if length > len(raw) - _PREFIX.size:
        raise MessageError(f"a header must be at most {len(raw) - _PREFIX.size} bytes long, got {length}")
    content = raw[_PREFIX.size : _PREFIX.size + length]
    if zlib.crc32(content) != checksum:
        raise MessageError(f"the header's checksum is {checksum:08x}, its content has {zlib.crc32(content):08x}")
    try:
        header = Header(**json.loads(content))
    except (TypeError, ValueError, RecursionError) as error:
        raise MessageError(f"the header is not readable: {error}") from error
    _check(header)
    return header


def checksum(data: Tensor) -> Tensor:
    """Checksum and length of the encoded header that ``data`` begins with, uint8 [8].

    No two messages of a training have the same, so they mark its end.
    """
    return data[_PREFIX.size - CHECKSUM_BYTES : _PREFIX.size]


def _check(header: Header) -> None:
    if header.kind not in KINDS:
        raise MessageError(f"a message must be one of {KINDS}, got {header.kind!r}")
    for name in ("step", "micro"):
        value = getattr(header, name)
        if type(value) is not int or value < 0:
            raise MessageError(f"{name} must be a count, got {value!r}")
    if not isinstance(header.dtype, str) or header.dtype not in DTYPES:
        raise MessageError(f"the dtype of an activation must be one of {sorted(DTYPES)}, got {header.dtype!r}")
    if type(header.scale) is not float or not 0 < header.scale < math.inf:
        raise MessageError(f"the scale of an activation must be a positive number, got {header.scale!r}")
    if not isinstance(header.targets, dict) or header.targets.keys() > {"kind", "ignore_index"}:
        raise MessageError(f"the options of targets must be kind and ignore_index, got {header.targets!r}")
    for described in (header.tensors, header.inputs):
        if not isinstance(described, list) or len(described) > _MAX_DIMS:
            raise MessageError(f"tensors must be described in a list of up to {_MAX_DIMS}, got {described!r}")
        for description in described:
            _check_description(description)
    sizes = [empty(description, "meta").nbytes for description in header.tensors]
    if not isinstance(header.packed, list) or header.packed and len(header.packed) != len(sizes):
        raise MessageError(f"packed must say the bytes of each tensor or of none, got {header.packed!r}")
    if any(type(packed) is not int or not 0 <= packed < max(size, 1) for packed, size in zip(header.packed, sizes)):
        raise MessageError(f"a packed tensor must be shorter than its {sizes} bytes, got {header.packed}")


def _check_description(description) -> None:
    named = isinstance(description, list) and len(description) == 2 and isinstance(description[0], str)
    if not named or description[0] not in DTYPES:
        raise MessageError(f"a tensor is described by a dtype, one of {sorted(DTYPES)}, and a shape: {description!r}")
    dtype, shape = description
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS or any(type(n) is not int or n < 0 for n in shape):
        raise MessageError(f"a shape must be up to {_MAX_DIMS} sizes, got {shape!r}")
    if math.prod(shape) * DTYPES[dtype].itemsize > LIMIT_BYTES:
        raise MessageError(f"a tensor may have {LIMIT_BYTES} bytes, got {dtype} {shape}")


def describe(tensor: Tensor) -> list:
    """Dtype name and shape, as a header has them."""
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def empty(description: list, device: str = "cpu") -> Tensor:
    """An uninitialised tensor as described."""
    return torch.empty(description[1], dtype=DTYPES[description[0]], device=device)


def compress(z: Tensor, compression: str | None) -> tuple[Tensor, float]:
    """The activation as it is sent, on the CPU and contiguous, and the scale that it was divided by.

    bf16 rounds; fp8 (e4m3) divides by ``max |z| / 448`` first, so that the largest entry is the largest number.
    """
    dtype, scale = COMPRESSIONS[compression], 1.0
    if dtype is torch.float8_e4m3fn:
        scale = float(z.abs().amax()) / torch.finfo(dtype).max or 1.0
        z = z / scale
    return z.to("cpu", dtype or z.dtype).contiguous(), scale


def expand(z: Tensor, header: Header) -> Tensor:
    """The activation in its own dtype again."""
    z = z.to(DTYPES[header.dtype])
    return z if header.scale == 1 else z * header.scale
