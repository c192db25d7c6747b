"""Blocks of one network on several processes, which learn at the same time: activations travel forward, nothing back.

Since a block's gradient does not leave it, a rank that has handed an activation on has nothing to wait for: it starts
the next micro-batch, and the next step, at once.  There is no pipeline to fill or to flush, and the result is that of
one process: an activation is always computed with the parameters of its own step.  Only chained feedback (BLL) carries
anything the other way, once per step; ``staleness`` says how old it may be.  Neighbours on one machine hand activations
over through memory (:mod:`.shared`), others through sockets (:mod:`.channel`), without the zeros (:mod:`.stream`).
"""

from __future__ import annotations

import atexit
import uuid
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..execution.targets import targets
from ..network import BlockOptimizers, Factory, boundaries, local_loss, local_losses
from . import balance
from . import shard as sharding
from .exchange import Exchange, MicroBatch
from .messages import COMPRESSIONS, MessageError
from .part import Layout, Part
from .reduce import Reducer, broadcast
from .watch import ParallelError, Watch, agreed


class BlockParallel:
    """This rank's blocks of a network, and the exchange with the ranks before and after it.

    Every rank of the mesh makes it from the same network (same seed) and calls the same methods in the same order; what
    a method needs of data is read on the first rank of each row only.

    Args:
        net: a network with boundaries (:func:`bllkern.convert`); nothing but the activation may pass a boundary between
            two ranks.  This rank trains its own blocks in place, those of other ranks stay as they are.
        mesh: one dimension, the ranks that share the blocks, or two, (data, blocks): rows then train copies on
            different data, gradients are averaged over rows, each block's while the next computes.
        optimizer, feedback: make the optimizer of each block, and that of each boundary's feedback where it is to have
            one of its own, as for :func:`bllkern.optimizers`.
        example: one micro-batch ``(x, y)``; ``x`` is a tensor or a tuple of positional inputs.  Gives shapes and costs.
        loss: ``loss(output, y)``, the scalar from which the output block learns.
        after: the blocks with which each rank but the last ends; by default runs of similar seconds, measured.
        staleness: steps by which a chained feedback message may be behind; 0 makes every rank wait for the one after it
            once per step.  Without chained feedback every value gives the same, which is the result of one process.
        compress: ``None``, ``"bf16"`` or ``"fp8"`` (e4m3 with one scale a message) for activations on their way.
        shard: divide parameters, gradients and optimizer states among the rows of a mesh (data, blocks) by FSDP2,
            instead of a copy in each (see :mod:`bllkern.parallel.shard`).  ``part.tensors()`` then has the trained
            numbers, as ``DTensor``; ``net`` keeps the old ones.
        timeout: seconds that another rank may let this one wait, in any call.

    Raises: ``ValueError`` for arguments that do not fit each other or the network.  All methods raise ``ParallelError``
    that names rank and blocks within about ``timeout`` seconds when another rank dies, stalls or sends what it should
    not.  Afterwards the process should end; :func:`bllkern.parallel.load` continues from the last checkpoint.
    """

    def __init__(
        self,
        net: nn.Module,
        mesh: DeviceMesh,
        *,
        optimizer: Factory,
        example: tuple[Tensor | tuple, Tensor],
        feedback: Factory | None = None,
        loss: Callable[[object, Tensor], Tensor] = F.cross_entropy,
        after: Sequence[str] | None = None,
        staleness: int = 0,
        compress: str | None = None,
        shard: bool = False,
        timeout: float = 60.0,
    ):
        _check(mesh, staleness, compress, shard, timeout)
        self.rows = mesh.mesh.view(-1, mesh.mesh.shape[-1]).tolist()
        self.row = next(i for i, row in enumerate(self.rows) if dist.get_rank() in row)
        self.place = self.rows[self.row].index(dist.get_rank())
        self.loss, self.steps = loss, 0
        self._batch: MicroBatch | None = None
        inputs = _inputs(example[0])
        layout = Layout(net, inputs)
        if after is not None:
            self.starts = balance.named(after, layout.names, len(self.rows[0]))
        else:
            costs = balance.block_seconds(net, inputs, example[1], loss)
            self.starts = agreed(balance.assign(costs, len(self.rows[0])))
        self.part = Part(net, layout, *self.starts[self.place : self.place + 2], self._hand_on)
        schedules = {boundary.schedule for boundary in boundaries(net).values()}
        if len(schedules) > 1:
            raise ValueError(f"schedule must be the same for all blocks, got {sorted(schedules)}")
        self.schedule = schedules.pop()
        self._defers = self.schedule == "deferred" and bool(boundaries(self.part.net))
        self.watch = Watch(self._labels(layout.names), timeout, agreed(uuid.uuid4().hex))
        column = self._column("gloo") if len(self.rows) > 1 else None
        if column is not None:  # rows begin with the same numbers
            broadcast(self.part.tensors().values(), column)
        self._sharded = sharding.shard(self.part, self._column(None), mesh.device_type) if shard else []
        self.optimizers = BlockOptimizers(self.part.net, optimizer, feedback)
        self._reducers = [] if column is None else [Reducer(o, column, self.watch) for o in self.optimizers]
        device = example[1].device
        atexit.register(self._abandon)
        self._exchange = Exchange(self.rows, self.part, self.watch, inputs, device, staleness, compress)

    def _labels(self, names: list[str]) -> dict[int, str]:
        blocks = [", ".join(map(repr, names[start:end])) for start, end in pairwise(self.starts)]
        return {rank: f"rank {rank} (blocks {blocks[i]})" for row in self.rows for i, rank in enumerate(row)}

    def _column(self, backend: str | None) -> dist.ProcessGroup:
        """A process group of the ranks that hold the same blocks as this one."""
        limit = timedelta(seconds=self.watch.timeout)
        return [dist.new_group(list(column), limit, backend) for column in zip(*self.rows)][self.place]

    @cached_property
    def group(self) -> dist.ProcessGroup:
        """All ranks, for checkpoints; made at its first use, by all, since every group keeps a thread awake."""
        return dist.new_group(timeout=timedelta(seconds=self.watch.timeout), backend="gloo")

    @property
    def is_first(self) -> bool:
        """Whether this rank reads the data."""
        return self.place == 0

    @property
    def is_output(self) -> bool:
        """Whether this rank computes the output and its loss."""
        return self.part.is_output

    @property
    def bytes_sent(self) -> int:
        """Bytes that its neighbours have had of this rank so far, headers and targets included."""
        return self._exchange.bytes_sent()

    @property
    def bytes_shared(self) -> int:
        """Those of them that lay in memory which both ranks see, so that no network carried them."""
        return self._exchange.bytes_sent(shared_only=True)

    def step(
        self,
        x: Tensor | tuple | None = None,
        y: Tensor | None = None,
        micro_batches: int = 1,
        *,
        kind: str | None = None,
        ignore_index: int = -100,
    ) -> Tensor | None:
        """One step of every optimizer of this rank, on the mean over ``micro_batches`` equal parts of the batch.

        With schedule ``"immediate"`` blocks step after every micro-batch, as they do in one process.

        Args: x, y: batch [B, ...] and targets as for :func:`bllkern.targets`, on the first rank of a row.  kind,
            ignore_index: of :func:`bllkern.targets`.
        Returns: the detached mean loss of the output on the rank that computes it, elsewhere ``None``.
        """
        batches = self._split(x, y, micro_batches)
        options = {"kind": kind, "ignore_index": ignore_index}
        self.part.net.train()
        with self._reporting():
            if self.schedule == "immediate":
                losses = [loss for batch in batches for loss in self._update([batch], options)]
            else:
                losses = self._update(batches, options)
        return torch.stack(losses).mean() if self.is_output else None

    def predict(self, x: Tensor | tuple | None = None) -> object:
        """The network's output in eval mode on the rank that computes it, elsewhere ``None``; ``x`` as in ``step``."""
        self.part.net.eval()
        with torch.no_grad(), self._reporting():
            batch = self._take("eval", 0, self._split(x, None, 1)[0], {})
            output = self.part(batch.inputs, batch.z)
        for module in self._sharded:  # which a backward pass does otherwise
            module.reshard()
        return output

    def block_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers of this rank by the name of the block that they train.

        That of the feedback of block "b" is "b.feedback" where it has one of its own; what follows the last boundary is
        "output".
        """
        found: dict[str, torch.optim.Optimizer] = {}
        for block in boundaries(self.part.net).values():
            own = {block.name: block.optimizer, f"{block.name}.feedback": block.feedback_optimizer}
            found.update({name: optimizer for name, optimizer in own.items() if optimizer is not None})
        rest = [optimizer for optimizer in self.optimizers if optimizer not in found.values()]
        return {**found, **{"output": optimizer for optimizer in rest}}

    def local_losses(self) -> dict[str, Tensor]:
        """The local losses of this rank's blocks in its last micro-batch, as :func:`bllkern.local_losses`."""
        return local_losses(self.part.net)

    def close(self) -> None:
        """Wait until what this rank has sent is taken, and end the exchange."""
        with self._reporting():
            self._exchange.close()
        self.watch.stop()
        atexit.unregister(self._abandon)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.close()
        else:
            self._abandon(error)

    def _abandon(self, error: Exception | None = None) -> None:
        """Where there is no closing any more: tell the others, and end the threads."""
        self.watch.report(error or RuntimeError("ended without BlockParallel.close()"))
        self._exchange.abandon(5 * self.watch.interval)  # the others look for failures once per interval
        self.watch.stop()
        atexit.unregister(self._abandon)

    def _split(self, x: Tensor | tuple | None, y: Tensor | None, parts: int) -> list[tuple]:
        """Inputs and targets of each micro-batch on the first rank, ``((), None)`` elsewhere."""
        if not isinstance(parts, int) or parts < 1:
            raise ValueError(f"micro_batches must be a positive int, got {parts!r}")
        if not self.is_first:
            return [((), None)] * parts
        inputs = _inputs(x)
        if any(not isinstance(value, Tensor) or len(value) % parts for value in inputs):
            raise ValueError(f"x must be tensors of which micro_batches={parts} equal parts can be made")
        if y is not None and len(y) != len(inputs[0]):
            raise ValueError(f"y must have a row per sample, {len(inputs[0])}, got {len(y)}")
        pieces = zip(*(value.chunk(parts) for value in inputs))
        return list(zip(pieces, [None] * parts if y is None else y.chunk(parts)))

    def _update(self, batches: list[tuple], options: dict) -> list[Tensor]:
        """Learn from micro-batches and step; the losses of the output."""
        self._exchange.feedback(self.steps)
        losses = []
        for micro, given in enumerate(batches):
            self._average(micro == len(batches) - 1)
            batch = self._take("train", micro, given, options)
            losses += self._learn(batch, 1 / len(batches))
        self.optimizers.step()
        self.optimizers.zero_grad()
        self.steps += 1
        return losses

    def _average(self, enabled: bool) -> None:
        """Whether the next gradients complete those of the step, which are then averaged over the rows."""
        for reducer in self._reducers:
            reducer.enabled = enabled
        for module in self._sharded:
            module.set_requires_gradient_sync(enabled)

    def _take(self, kind: str, micro: int, given: tuple, options: dict) -> MicroBatch:
        if self.is_first:
            self._batch = MicroBatch(kind, self.steps, micro, *given, options)
        else:
            self._batch = self._exchange.receive(kind, self.steps, micro)
        return self._batch

    def _learn(self, batch: MicroBatch, scale: float) -> list[Tensor]:
        with targets(batch.y, scale=scale, **batch.options):
            output = self.part(batch.inputs, batch.z)
        losses = [self.loss(output, batch.y)] if self.is_output else []
        waiting = [loss * scale for loss in losses]
        if self._defers:
            waiting.append(local_loss(self.part.net))
        if waiting:
            sum(waiting).backward()
        return [loss.detach() for loss in losses]

    def _hand_on(self, z: Tensor) -> None:
        self._exchange.send(z, self._batch)

    @contextmanager
    def _reporting(self):
        """Tell the other ranks why this one ends."""
        try:
            yield
        except ParallelError:
            raise
        except MessageError as error:
            raise self.watch.blame(self.rows[self.row][self.place - 1], error) from error
        except RuntimeError as error:
            if self._sharded and "gloo" in str(error):  # FSDP2's own collectives
                raise self.watch.lost([row[self.place] for row in self.rows], error) from error
            self.watch.report(error)
            raise
        except Exception as error:
            self.watch.report(error)
            raise


def _check(mesh: DeviceMesh, staleness: int, compress: str | None, shard: bool, timeout: float) -> None:
    if not isinstance(mesh, DeviceMesh) or mesh.ndim > 2:
        dims = mesh.ndim if isinstance(mesh, DeviceMesh) else type(mesh).__name__
        raise ValueError(f"mesh must be a DeviceMesh of dimensions (blocks) or (data, blocks), got {dims}")
    if not isinstance(staleness, int) or staleness < 0:
        raise ValueError(f"staleness must be a count of steps, got {staleness!r}")
    if compress not in COMPRESSIONS:
        raise ValueError(f"compress must be one of {list(COMPRESSIONS)}, got {compress!r}")
    if shard and (mesh.ndim == 1 or mesh.mesh.shape[0] == 1):
        raise ValueError(f"shard=True needs a mesh (data, blocks) of two rows or more, got {list(mesh.mesh.shape)}")
    if not 0 < timeout < float("inf"):
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")


def _inputs(x: Tensor | tuple | None) -> tuple:
    return x if isinstance(x, tuple) else (x,)
