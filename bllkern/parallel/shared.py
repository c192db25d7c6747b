"""One direction between two ranks of one machine: messages lie in memory that both see, a byte in a pipe announces each.

A socket copies a tensor twice, wakes threads for it, and takes a twentieth of a step.  Memory and pipe have no name
(``memfd_create``, ``pipe``), so that a rank that is killed leaves nothing behind; the other end of its pipe reads that at
once.  Where ranks cannot see each other's memory, or the system has no such call, :mod:`.channel` sends as over any
network.  The classes are those of :mod:`.channel`, without threads.
"""

from __future__ import annotations

import mmap
import os
import select
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from .messages import HEADER_BYTES, LIMIT_BYTES, Header, MessageError, decode, empty
from .watch import Watch

SLOT_BYTES = HEADER_BYTES + LIMIT_BYTES  # of address space: pages are taken when they are first written
_STATE_BYTES = 64
_TOKEN_BYTES = 16
_PAUSE = 1.0  # milliseconds between two looks at whether a slot is free


class _Slots:
    """Memory for ``count`` messages, which one side writes in turn and the other reads in that order.

    Raises ``OSError`` or ``ValueError`` where the descriptor has not that size.
    """

    def __init__(self, descriptor: int, count: int):
        memory = mmap.mmap(descriptor, count * SLOT_BYTES + _STATE_BYTES)
        *self._slots, state = torch.frombuffer(memory, dtype=torch.uint8).split(SLOT_BYTES)
        self.token, self.read = state[:_TOKEN_BYTES], state[_TOKEN_BYTES:][:8].view(torch.int64)
        self.count = 0  # messages that this side has written or read

    def is_free(self) -> bool:
        """Whether the slot that is due can be written."""
        return self.count - int(self.read) < len(self._slots)

    def places(self, tensors: list[Tensor]) -> list[Tensor]:
        """Where the bytes of the tensors are, behind those of the header, in the slot that is due."""
        sizes = [tensor.nbytes for tensor in tensors]
        if sum(sizes) > LIMIT_BYTES:
            raise MessageError(f"a message may have {LIMIT_BYTES} bytes, got {sum(sizes)}")
        return self.due()[HEADER_BYTES : HEADER_BYTES + sum(sizes)].split(sizes)

    def due(self) -> Tensor:
        return self._slots[self.count % len(self._slots)]


class Offer:
    """Slots and a pipe of this process; at ``address`` another process of this machine finds them."""

    def __init__(self, depth: int):
        self.address, self.slots, self.pipe, self._inner = None, None, -1, []
        with suppress(AttributeError, OSError, ValueError):  # no such call on this system, or too little address space
            memory = os.memfd_create("bllkern")
            self._inner.append(memory)
            os.truncate(memory, depth * SLOT_BYTES + _STATE_BYTES)
            self.slots = _Slots(memory, depth)
            pipe, self.pipe = os.pipe()
            self._inner.append(pipe)
            token = os.urandom(_TOKEN_BYTES)
            self.slots.token.copy_(_bytes(token))
            self.address = os.getpid(), memory, pipe, token

    def end(self, taken: bool) -> None:
        """Nobody else may find them any more; if they are not taken, this process needs nothing of them either."""
        for descriptor in self._inner:
            os.close(descriptor)
        if not taken:
            _closed(self.pipe)


def find(address: tuple | None, depth: int) -> tuple[_Slots, int] | None:
    """Slots and the pipe at the address, if this process sees them."""
    if address is None:
        return None
    process, memory, pipe, token = address
    try:
        memory = os.open(f"/proc/{process}/fd/{memory}", os.O_RDWR)
        try:
            slots = _Slots(memory, depth)
        finally:
            os.close(memory)
        if not torch.equal(slots.token, _bytes(token)):
            return None
        return slots, os.open(f"/proc/{process}/fd/{pipe}", os.O_RDONLY)
    except (OSError, ValueError):  # another machine, another container, another user
        return None


class SharedInbox:
    """Messages from ``source`` (a rank of the job); ``accept(header)`` raises ``MessageError`` for one that does not fit."""

    def __init__(self, source: int, slots: _Slots, pipe: int, watch: Watch, accept: Callable[[Header], None]):
        self.source, self._slots, self._pipe = source, slots, pipe
        self._watch, self._accept = watch, accept
        self._poll = select.poll()
        self._poll.register(pipe, select.POLLIN)

    def get(self) -> tuple[Header, list[Tensor]]:
        """The next message.  Raises ``ParallelError`` if none comes in time, or a wrong one."""
        self._watch.until(self._announced, self.source, "a message")
        try:
            header = decode(self._slots.due()[:HEADER_BYTES])
            if header.kind != "bye":
                self._accept(header)
            tensors = [empty(description) for description in header.tensors]
            places = self._slots.places(tensors)
        except MessageError as error:
            raise self._watch.blame(self.source, error) from error
        for tensor, place in zip(tensors, places):
            _flat(tensor).copy_(place)
        self._slots.count += 1
        self._slots.read.fill_(self._slots.count)
        return header, tensors

    def _announced(self, seconds: float) -> bool | None:
        if not self._poll.poll(1e3 * seconds):
            return None
        if os.read(self._pipe, 1):
            return True
        self._watch.fail(self.source, RuntimeError("ended the connection"))
        return None

    def close(self) -> None:
        """Take in what still comes, up to the sender's last message."""
        while self.get()[0].kind != "bye":
            pass
        self.abandon()

    def abandon(self) -> bool:
        """Drop what has come; true, since there is no thread that could go on."""
        self._pipe = _closed(self._pipe)
        return True


class SharedOutbox:
    """Messages to ``target`` (a rank of the job), which has them as soon as ``put`` returns."""

    def __init__(self, target: int, slots: _Slots, pipe: int, watch: Watch):
        self.target, self._slots, self._pipe, self._watch = target, slots, pipe, watch
        self.bytes = 0
        self._poll = select.poll()
        self._poll.register(pipe, 0)  # for an error only: nobody reads it any more

    def put(self, header: Header, tensors: list[Tensor]) -> None:
        """Write, once there is room.  Raises ``ParallelError`` if there is none in time."""
        self._watch.until(self._has_room, self.target, "room for a message")
        places = self._slots.places(tensors)
        self._slots.due()[:HEADER_BYTES].copy_(header.encode())
        for tensor, place in zip(tensors, places):
            place.copy_(_flat(tensor))
        self._slots.count += 1
        self.bytes += HEADER_BYTES + sum(place.nbytes for place in places)
        with suppress(BrokenPipeError):  # the next message finds no room
            os.write(self._pipe, b"m")

    def _has_room(self, _: float) -> bool | None:
        if self._slots.is_free():
            return True
        if self._poll.poll(_PAUSE):
            self._watch.fail(self.target, RuntimeError("ended the connection"))
        return None

    def close(self) -> None:
        """Say that nothing more comes; what is written can be read after this process has ended."""
        self.put(Header("bye"), [])
        self.abandon()

    def abandon(self) -> bool:
        """End it without a last message; true, since there is no thread that could go on."""
        self._pipe = _closed(self._pipe)
        return True


def _closed(descriptor: int) -> int:
    if descriptor >= 0:
        os.close(descriptor)
    return -1


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
