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

from .messages import CHECKSUM_BYTES, DTYPES, HEADER_BYTES, Header, MessageError, checksum, decode, empty
from .watch import Watch


DEPTH = 2  # messages that wait on either side: one to work on, one on its way
_FOREVER = timedelta(days=365)  # the limit is that of Watch.until, which knows when a rank really waits


class Inbox:
    """Messages from ``source`` (a rank of the job), received ahead of their use.

    ``accept(header)`` raises ``MessageError`` for one that does not fit, before memory is taken for its tensors.
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
        self._thread = threading.Thread(target=self._receive, name=f"bllkern from rank {source}", daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        try:
            header = None
            while header is None or header.kind != "bye":
                data = self._fetch(HEADER_BYTES)
                header = decode(data)
                if header.kind != "bye":
                    self._accept(header)
                self._queue.put((header, [self._fetch_tensor(known, checksum(data)) for known in header.tensors]))
        except MessageError as error:
            self._watch.fail(self.source, RuntimeError(f"sent a wrong message: {error}"))
        except RuntimeError as error:
            self._watch.fail(self.source, RuntimeError(f"ended the connection: {error}"))

    def _fetch(self, size: int) -> Tensor:
        """uint8 [size]; what does not come, since gloo takes messages that are too short, is 0."""
        content = torch.zeros(size, dtype=torch.uint8)
        dist.irecv(content, self.source, self._group).wait(_FOREVER)
        return content

    def _fetch_tensor(self, description: list, end: Tensor) -> Tensor:
        size = empty(description, "meta").nbytes
        content = self._fetch(size + len(end))
        if not torch.equal(content[size:], end):
            raise MessageError(f"a tensor {description} was due, a message that is shorter or of other content came")
        return content[:size].view(DTYPES[description[0]]).view(description[1])

    def get(self) -> tuple[Header, list[Tensor]]:
        """The next message.  Raises ``ParallelError`` if none comes in time."""
        return self._watch.until(self._attempt, self.source, "a message")

    def _attempt(self, seconds: float):
        try:
            return self._queue.get(timeout=seconds)
        except queue.Empty:
            return None

    def close(self) -> None:
        """Take in what still comes, up to the sender's last message."""
        while self.get()[0].kind != "bye":
            pass

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
                data = header.encode()
                pieces = [data, *(torch.cat([_bytes(tensor), checksum(data)]) for tensor in tensors)]
                for work in [dist.isend(piece, self.target, self._group) for piece in pieces]:
                    work.wait(_FOREVER)
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
        self.bytes += HEADER_BYTES + sum(tensor.nbytes + CHECKSUM_BYTES for tensor in tensors)

    def close(self) -> None:
        """Say that nothing more comes, and wait until everything is sent."""
        self.put(Header("bye"), [])
        self._watch.until(self._all_sent, self.target, "messages to be taken")

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


def _bytes(tensor: Tensor) -> Tensor:
    """The storage of a contiguous tensor as uint8 [nbytes]: gloo does not know every dtype."""
    return tensor.reshape(-1).view(torch.uint8)
