"""What a rank exchanges with the ranks before and after it: micro-batches forwards, chained feedback backwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..families import Family
from . import shared
from .channel import DEPTH, Inbox, Outbox
from .messages import COMPRESSIONS, Header, MessageError, compress, describe, empty, expand
from .part import Part
from .watch import SLICE, Watch


@dataclass(frozen=True)
class MicroBatch:
    """What a rank works on: ``inputs`` of the network (on the meta device but for the first rank) and targets.

    ``z`` is the activation received.  ``step`` and ``micro`` say when it is due; ``options`` are those of targets.
    """

    kind: str
    step: int
    micro: int
    inputs: tuple
    y: Tensor | None
    options: dict
    z: Tensor | None = None


class Exchange:
    """The channels of one rank.

    Args: rows: ranks of the job, a row for each copy of the network.  example: inputs of the network, whose shape past
    the first dimension fixes that of the activations.  The others are those of ``BlockParallel``.
    """

    def __init__(
        self,
        rows: list[list[int]],
        part: Part,
        watch: Watch,
        example: tuple,
        device: torch.device,
        staleness: int,
        compression: str | None,
    ):
        self._watch, self._device, self._staleness, self._compression = watch, device, staleness, compression
        self._example = [describe(x) for x in example]
        self._expected = None if part.entry_shape is None else list(part.entry_shape)
        row = next(row for row in rows if watch.rank in row)
        place = row.index(watch.rank)
        self._before = row[place - 1] if place else None
        self._after = row[place + 1] if place + 1 < len(row) else None
        self._inbox, self._outbox = _connect(rows, self._before, self._after, watch, self._accept, DEPTH)
        self._feedback_in = self._feedback_out = self._above = None
        self._rounds = 0
        self._chain(rows, part)

    def _chain(self, rows: list[list[int]], part: Part) -> None:
        """Channels for chained feedback, in a group of their own."""
        if not part.chained:
            return
        above = None if self._after is None else part.feedback(part.last - 1)
        if above is not None and above._above:
            self._above = _Remote(above._above[0].family)
            weight = above._above[0].link.weight  # on the meta device
            self._message = [describe(weight)[0], [part.target_features, above._above[0].width]]
            above._above = [self._above]
        self._own = part.feedback(part.first)
        source = None if self._above is None else self._after
        target = None if self._own is None else self._before
        accept, depth = self._accept_feedback, self._staleness + DEPTH
        self._feedback_in, self._feedback_out = _connect(rows, source, target, self._watch, accept, depth)

    def bytes_sent(self, shared_only: bool = False) -> int:
        """Bytes handed to the neighbours, all or those through shared memory."""
        kinds = shared.SharedOutbox if shared_only else (Outbox, shared.SharedOutbox)
        return sum(box.bytes for box in (self._outbox, self._feedback_out) if isinstance(box, kinds))

    def send(self, z: Tensor, batch: MicroBatch) -> None:
        """Hand the activation on, with the targets and what else the next rank needs to know of the micro-batch."""
        wire, scale = compress(z, self._compression)
        tensors = [wire] if batch.y is None else [wire, batch.y.to("cpu").contiguous()]
        header = Header(
            batch.kind,
            batch.step,
            batch.micro,
            dtype=describe(z)[0],
            scale=scale,
            tensors=[describe(tensor) for tensor in tensors],
            inputs=[describe(x) for x in batch.inputs],
            targets=batch.options,
        )
        self._outbox.put(header, tensors)

    def receive(self, kind: str, step: int, micro: int) -> MicroBatch:
        """The micro-batch that is due.  Raises ``MessageError`` if another came, ``ParallelError`` if none in time."""
        header, tensors = self._due(self._inbox, self._before)
        if (header.kind, header.step, header.micro) != (kind, step, micro):
            raise MessageError(
                f"{kind} of step {step}, micro-batch {micro}, was due, "
                f"got {header.kind} of step {header.step}, micro-batch {header.micro}"
            )
        z, y = expand(tensors[0], header).to(self._device), tensors[1].to(self._device) if tensors[1:] else None
        inputs = tuple(empty(description, "meta") for description in header.inputs)
        return MicroBatch(kind, step, micro, inputs, y, header.targets, z)

    def _due(self, inbox, source: int) -> tuple[Header, list[Tensor]]:
        """The next message, which is not the last: that comes too early where ``source`` has failed."""
        header, tensors = inbox.get()
        if header.kind == "bye":
            raise self._watch.ended(source)
        return header, tensors

    def _accept(self, header: Header) -> None:
        if len(header.tensors) != {"train": 2, "eval": 1}.get(header.kind):
            raise MessageError(f"an activation with its targets was due, got {header.kind} of {header.tensors}")
        wire, shape = header.tensors[0]
        due = header.dtype if self._compression is None else str(COMPRESSIONS[self._compression]).removeprefix("torch.")
        if wire != due:
            raise MessageError(f"an activation must be sent as {due}, got {wire}")
        if len(header.inputs) != len(self._example) or not all(known[1] for known in header.inputs + header.tensors):
            raise MessageError(f"inputs as {self._example} were due, got {header.inputs} with {header.tensors}")
        rows, usual = header.inputs[0][1][0], self._example[0][1][0]
        if shape[0] * usual != self._expected[0] * rows or any(y[1][0] != rows for y in header.tensors[1:]):
            raise MessageError(f"an activation and targets of {rows} samples were due, got {header.tensors}")
        same_input = [(d, s[1:]) for d, s in header.inputs] == [(d, s[1:]) for d, s in self._example]
        if len(shape) != len(self._expected) or same_input and shape[1:] != self._expected[1:]:
            raise MessageError(f"an activation must have shape {['B', *self._expected[1:]]}, got {shape}")

    def _accept_feedback(self, header: Header) -> None:
        if header.kind != "feedback" or header.tensors != [self._message]:
            raise MessageError(f"feedback as {self._message} was due, got {header.kind} of {header.tensors}")

    def feedback(self, step: int) -> None:
        """Before step ``step``: take the message of the rank after, ``staleness`` steps old, and send one's own."""
        if self._feedback_in is not None and (self._rounds == 0 or self._rounds > self._staleness):
            self._above.message = self._due(self._feedback_in, self._after)[1][0].to(self._device)
        self._rounds += 1
        if self._feedback_out is not None:
            with torch.no_grad():
                message = self._own.messages().to("cpu").contiguous()
            self._feedback_out.put(Header("feedback", step, tensors=[describe(message)]), [message])

    def close(self) -> None:
        """Say that nothing more comes, and take in what does."""
        for channel in self._channels():
            channel.close()

    def abandon(self, seconds: float) -> None:
        """End the threads for which the other side still lives; one that waits in C++ while Python ends would abort."""
        deadline = time.monotonic() + seconds
        for channel in self._channels():
            while not channel.abandon() and time.monotonic() < deadline:
                time.sleep(SLICE)

    def _channels(self) -> list[Inbox | Outbox]:
        """Those that exist, the outgoing ones first."""
        channels = (self._feedback_out, self._outbox, self._inbox, self._feedback_in)
        return [channel for channel in channels if channel is not None]


class _Remote:
    """Stands for the feedback of the next boundary, which is on another rank: its messages [C, D] as last received."""

    def __init__(self, family: Family):
        self.family, self.message = family, None

    def messages(self, above: Tensor | None = None) -> Tensor:
        return self.message

    def chain_above(self) -> list[_Remote]:
        """Itself: what it reads is on other ranks."""
        return [self]


def _connect(
    rows: list[list[int]], source: int | None, target: int | None, watch: Watch, accept: Callable, depth: int
) -> tuple:
    """Channels from ``source`` and to ``target``, as far as there are such: through memory where it can be shared.

    To be called by all ranks of the job.  ``depth``: messages that wait on either side.
    """
    offer = shared.Offer(depth)
    addresses = _gathered(None if target is None else offer.address)
    connection = None if source is None else shared.find(addresses[source])
    shares = _gathered(source is None or connection is not None)
    group = None if all(shares) else _group(rows, watch)  # one that nobody uses would keep a thread awake
    inbox = outbox = None
    if target is not None:
        outbox = offer.taken(target, watch) if shares[target] else Outbox(target, group, watch, depth)
    offer.end()
    if connection is not None:
        inbox = shared.SharedInbox(source, connection, depth, watch, accept)
    elif source is not None:
        inbox = Inbox(source, group, watch, accept, depth)
    return inbox, outbox


def _group(rows: list[list[int]], watch: Watch) -> dist.ProcessGroup:
    """A process group for each row, of which the rank's own is returned; gloo carries tensors on the CPU."""
    groups = [dist.new_group(row, timedelta(seconds=watch.timeout), "gloo") for row in rows]
    return groups[next(i for i, row in enumerate(rows) if watch.rank in row)]


def _gathered(value) -> list:
    """What every rank of the job has."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
