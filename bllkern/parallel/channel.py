"""One direction between two ranks: a thread that receives ahead, or sends behind, through a bounded queue.

The training thread never waits on the network itself, only on these queues, so it can always look whether another rank
has failed.  A full queue at the receiver leaves messages with the sender, whose queue fills up and holds it back.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .messages import CHECKSUM_BYTES, HEADER_BYTES, Header, MessageError, decode
from .stream import join, length, split
from .watch import Watch

DEPTH = 2  # messages that wait on either side: one to work on, one on its way
CHUNK_BYTES = 4 << 20  # which gloo moves at once; see Inbox
_FOREVER = timedelta(days=365)  # the limit is that of Watch.until, which knows when a rank really waits


class Inbox:
    """Messages from ``source`` (a rank of the job), received ahead of their use.

    ``accept(header)`` raises ``MessageError`` for one that does not fit, before memory is taken for its tensors.  gloo
    ends the process that receives more than it asked for, and says nothing where less comes.  So every chunk of a
    message is received into memory for the largest, and what has come is judged by what it is.
    """

    def __init__(
        self,
        source: int,
        group: dist.ProcessGroup,
        watch: Watch,
        accept: Callable[[Header], None],
        depth: int = DEPTH,
    ):
        self.source, self._group, self._watch, self._accept = source, group, watch, accept
        self._queue: queue.Queue = queue.Queue(depth)
        self._chunk = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
        self._thread = threading.Thread(target=self._receive, name=f"bllkern from rank {source}", daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        try:
            header = None
            while header is None or header.kind != "bye":
                header, tensors = self._next()
                self._queue.put((header, tensors))
        except MessageError as error:
            self._watch.fail(self.source, RuntimeError(f"sent a wrong message: {error}"))
        except RuntimeError as error:
            self._watch.fail(self.source, RuntimeError(f"ended the connection: {error}"))

    def _next(self) -> tuple[Header, list[Tensor]]:
        self._fetch()
        header = decode(self._chunk[:HEADER_BYTES])
        if header.kind != "bye":
            self._accept(header)
        size = length(header)
        data = self._chunk[:size] if size <= CHUNK_BYTES else self._assemble(size)
        tensors = split(header, data)
        data[-CHECKSUM_BYTES:] = 0  # so that it cannot end the next message, which may come short
        return header, tensors

    def _assemble(self, size: int) -> Tensor:
        """The first ``size`` bytes of the chunk that has come and of those that follow."""
        data = torch.empty(size, dtype=torch.uint8)
        first, *others = data.split(CHUNK_BYTES)
        first.copy_(self._chunk)
        for piece in others:
            self._fetch()
            piece.copy_(self._chunk[: len(piece)])
        self._chunk.zero_()
        return data

    def _fetch(self) -> None:
        self._chunk[:HEADER_BYTES] = 0
        dist.irecv(self._chunk, self.source, self._group).wait(_FOREVER)

    def get(self) -> tuple[Header, list[Tensor]]:
        """The next message.  Raises ``ParallelError`` if none comes in time."""
        return self._watch.until(self._attempt, self.source, "a message")

    def _attempt(self, seconds: float):
        try:
            return self._queue.get(timeout=seconds)
        except queue.Empty:
            return None

    def close(self) -> None:
        """Take in what still comes, up to the sender's last message, with which the thread ends."""
        while self.get()[0].kind != "bye":
            pass
        self._thread.join(self._watch.timeout)

    def abandon(self) -> bool:
        """Drop what has come; whether the thread has ended."""
        with suppress(queue.Empty):
            self._queue.get_nowait()
        return not self._thread.is_alive()


class Outbox:
    """Messages to ``target`` (a rank of the job), sent while this rank goes on."""

    def __init__(self, target: int, group: dist.ProcessGroup, watch: Watch, depth: int = DEPTH):
        self.target, self._group, self._watch = target, group, watch
        self.bytes = 0
        self._sent = self._put = 0
        self._queue: queue.Queue = queue.Queue(depth)
        self._thread = threading.Thread(target=self._send, name=f"bllkern to rank {target}", daemon=True)
        self._thread.start()

    def _send(self) -> None:
        try:
            header = None
            while header is None or header.kind != "bye":
                header, tensors = self._queue.get()
                data = join(header, tensors)
                for work in [dist.isend(chunk, self.target, self._group) for chunk in data.split(CHUNK_BYTES)]:
                    work.wait(_FOREVER)
                self.bytes += len(data)
                self._sent += 1
        except (RuntimeError, ValueError) as error:
            self._watch.fail(self.target, RuntimeError(f"ended the connection: {error}"))

    def put(self, header: Header, tensors: list[Tensor]) -> None:
        """Send, once there is room; nobody may write to the tensors.  Raises ``ParallelError`` if there is none."""

        def attempt(seconds):
            try:
                self._queue.put((header, tensors), timeout=seconds)
                return True
            except queue.Full:
                return None

        self._watch.until(attempt, self.target, "room for a message")
        self._put += 1

    def close(self) -> None:
        """Say that nothing more comes, and wait until everything is sent and the thread has ended."""
        self.put(Header("bye"), [])
        self._watch.until(self._all_sent, self.target, "messages to be taken")
        self._thread.join(self._watch.timeout)

    def abandon(self) -> bool:
        """Say that nothing more comes, if that can be said; whether the thread has ended."""
        with suppress(queue.Full):
            self._queue.put_nowait((Header("bye"), []))
        return not self._thread.is_alive()

    def _all_sent(self, seconds: float):
        if self._sent == self._put:
            return True
        threading.Event().wait(seconds / 50)
        return None
