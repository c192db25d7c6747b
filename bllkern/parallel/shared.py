"""One direction between two ranks of one machine: messages lie in memory that both see, a local socket announces each.

Sending tensors through a socket copies them twice and wakes threads on both sides, a twentieth of a step of small
convolutions.  The memory has no name (``memfd_create``) and the socket none in the file system: a rank that is killed
leaves nothing behind, and its neighbour learns it at once.  Where ranks are on different machines, or the system has no
such calls, :mod:`.channel` sends as over any network.  The classes are those of :mod:`.channel`, without threads.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from .messages import HEADER_BYTES, LIMIT_BYTES, Header, MessageError, decode, empty
from .stream import flat
from .watch import Watch

SLOT_BYTES = HEADER_BYTES + LIMIT_BYTES  # of address space: pages are taken when they are first written
_BYTE = b"m"  # in one direction: a message is written; in the other: its slot is free


class Offer:
    """Memory of this process for ``count`` messages, and ``address``, where other processes of this machine find it.

    The address is ``None`` where there can be no such memory.
    """

    def __init__(self, count: int):
        self.address, self._slots, self._memory, self._listener = None, None, -1, socket.socket(socket.AF_UNIX)
        with suppress(AttributeError, OSError, ValueError):  # no such call on this system, or too little address space
            self._memory = os.memfd_create("bllkern")
            os.truncate(self._memory, count * SLOT_BYTES)
            self._slots = _Slots(self._memory, count)
            self._listener.bind(f"\0bllkern-{os.urandom(16).hex()}")
            self._listener.listen(1)
            self.address = self._listener.getsockname()

    def taken(self, target: int, watch: Watch) -> SharedOutbox:
        """The outbox to the rank that has found it."""
        self._listener.settimeout(watch.timeout)
        connection, _ = self._listener.accept()
        socket.send_fds(connection, [_BYTE], [self._memory])
        return SharedOutbox(target, connection, self._slots, watch)

    def end(self) -> None:
        """Nobody else may find it any more."""
        self._listener.close()
        if self._memory >= 0:
            os.close(self._memory)


def find(address: bytes | None) -> socket.socket | None:
    """A connection to the offer at the address, if this process can have one."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except (OSError, TypeError):  # another machine, another container, no offer
        connection.close()
        return None
    return connection


class _Slots:
    """Memory for ``count`` messages, which one side writes in turn and the other reads in that order."""

    def __init__(self, descriptor: int, count: int):
        memory = mmap.mmap(descriptor, count * SLOT_BYTES)
        self._slots = torch.frombuffer(memory, dtype=torch.uint8).split(SLOT_BYTES)
        self._due, self.count = 0, count

    def header(self) -> Tensor:
        """uint8 [HEADER_BYTES] of the slot that is due."""
        return self._slots[self._due][:HEADER_BYTES]

    def places(self, tensors: list[Tensor]) -> list[Tensor]:
        """Where the bytes of each tensor are in the slot that is due.  Raises ``MessageError`` if they are too many."""
        sizes = [tensor.nbytes for tensor in tensors]
        if sum(sizes) > LIMIT_BYTES:
            raise MessageError(f"a message may have {LIMIT_BYTES} bytes, got {sum(sizes)}")
        return self._slots[self._due][HEADER_BYTES : HEADER_BYTES + sum(sizes)].split(sizes)

    def turn(self) -> None:
        """The next slot is due."""
        self._due = (self._due + 1) % self.count


class _End:
    """One end of a connection to a rank."""

    def __init__(self, rank: int, connection: socket.socket, watch: Watch):
        self._rank, self._connection, self._watch = rank, connection, watch
        connection.settimeout(watch.timeout)
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def _signal(self) -> None:
        with suppress(OSError):  # the other side has ended; the next wait for it says so
            self._connection.send(_BYTE)

    def _signals(self, seconds: float, most: int) -> int | None:
        """How many signals have come, up to ``most``, or ``None``."""
        if not self._poll.poll(1e3 * seconds):
            return None
        with suppress(OSError):
            found = self._connection.recv(most)
            if found:
                return len(found)
        self._watch.fail(self._rank, RuntimeError("ended the connection"))
        return None

    def abandon(self) -> bool:
        """End the connection; true, since there is no thread that could go on."""
        self._connection.close()
        return True


class SharedInbox(_End):
    """Messages from ``source`` (a rank of the job); ``accept(header)`` raises ``MessageError`` for a wrong one."""

    def __init__(
        self, source: int, connection: socket.socket, count: int, watch: Watch, accept: Callable[[Header], None]
    ):
        super().__init__(source, connection, watch)
        _, (memory,), *_ = socket.recv_fds(connection, len(_BYTE), 1)
        self._slots, self._accept = _Slots(memory, count), accept
        os.close(memory)

    def get(self) -> tuple[Header, list[Tensor]]:
        """The next message.  Raises ``ParallelError`` if none comes in time, or a wrong one."""
        self._watch.until(lambda seconds: self._signals(seconds, 1), self._rank, "a message")
        try:
            header = decode(self._slots.header())
            if header.kind != "bye":
                self._accept(header)
            if header.packed:
                raise MessageError(f"tensors must lie in memory as they are, got packed {header.packed}")
            tensors = [empty(description) for description in header.tensors]
            places = self._slots.places(tensors)
        except MessageError as error:
            raise self._watch.blame(self._rank, error) from error
        for tensor, place in zip(tensors, places):
            flat(tensor).copy_(place)
        self._slots.turn()
        self._signal()
        return header, tensors

    def close(self) -> None:
        """Take in what still comes, up to the sender's last message."""
        while self.get()[0].kind != "bye":
            pass
        self.abandon()


class SharedOutbox(_End):
    """Messages to ``target`` (a rank of the job), which has them as soon as ``put`` returns."""

    def __init__(self, target: int, connection: socket.socket, slots: _Slots, watch: Watch):
        super().__init__(target, connection, watch)
        self._slots, self._free, self.bytes = slots, slots.count, 0

    def put(self, header: Header, tensors: list[Tensor]) -> None:
        """Write, once there is room.  Raises ``ParallelError`` if there is none in time."""
        places = self._slots.places(tensors)
        if not self._free:
            self._free = self._watch.until(
                lambda seconds: self._signals(seconds, self._slots.count), self._rank, "room for a message"
            )
        self._free -= 1
        self._slots.header().copy_(header.encode())
        for tensor, place in zip(tensors, places):
            place.copy_(flat(tensor))
        self._slots.turn()
        self.bytes += HEADER_BYTES + sum(place.nbytes for place in places)
        self._signal()

    def close(self) -> None:
        """Say that nothing more comes; what is written can be read after this process has ended."""
        self.put(Header("bye"), [])
        self.abandon()
