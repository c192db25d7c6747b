"""Networks larger than the device: a block is there for its one visit per step, and on the host the rest of the time.

A visit is forward pass, local loss, backward pass and optimizer step (schedule ``"immediate"``).  Weights, buffers and
optimizer state live on the host, pinned where the device is a GPU.  While a block is visited, a copy stream brings the
next one; it takes a block back when the block is done, and only then brings the next but one.  So two blocks are on the
device at a time.  All of their memory is the copy stream's, so it is never given away before the way back is done.

Backpropagation would have to bring every block twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import sizing, streams, targets

if TYPE_CHECKING:
    from ..blocks import Boundary


@dataclass(frozen=True)
class Place:
    """Where a tensor is held: ``data`` of a parameter or buffer, or an entry of an optimizer's state."""

    holder: Tensor | dict
    key: str = "data"
    trained: bool = True

    def get(self) -> Tensor:
        return self.holder[self.key] if isinstance(self.holder, dict) else self.holder.data

    def set(self, tensor: Tensor) -> None:
        if isinstance(self.holder, dict):
            self.holder[self.key] = tensor
        else:
            self.holder.data = tensor


@dataclass
class Block:
    """What is brought in together: the tensors of one block, and of its optimizer."""

    boundary: Boundary | None  # None for the last one
    tensors: list[Tensor] = field(default_factory=list)
    hosts: dict[tuple[int, str], Tensor] | None = None  # while it is on the device: what is on the host
    ready: object = None  # the event of its arrival
    moved: bool = False  # came to learn: what is on the device may differ from what is on the host

    def places(self, optimizer: torch.optim.Optimizer | None) -> Iterator[Place]:
        """What goes and comes: without training, no state of the ``optimizer``."""
        known = self.moved and optimizer is not None
        states, groups = (optimizer.state, optimizer.param_groups) if known else ({}, [])
        on_host = {id(p) for group in groups if not _counts_on_device(group) for p in group["params"]}
        for tensor in self.tensors:
            yield Place(tensor, trained=tensor.requires_grad or not isinstance(tensor, nn.Parameter))
            state = states.get(tensor, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and (value.dim() > 0 or id(tensor) not in on_host):
                    yield Place(state, key)


def _counts_on_device(group: dict) -> bool:
    """Whether the optimizer keeps numbers, as that of its steps, beside the parameters."""
    return bool(group.get("capturable") or group.get("fused"))


class Offload:
    """The blocks of a network in the order of their visits, and where they are.

    ``output_optimizer`` is that of the last block, which learns from the global loss: it stays on the device until
    :meth:`finish`.
    """

    def __init__(self, net: nn.Module, inputs: tuple):
        self.blocks = _plan(net, inputs)
        self.output_optimizer: torch.optim.Optimizer | None = None
        self.device = torch.device("cpu")
        self.visited = 0
        self.training = False
        self.learning = False  # the last block waits for its gradient, or for its optimizer
        for block in self.blocks[:-1]:
            block.boundary.offload = self
        net.register_forward_pre_hook(self.begin, with_kwargs=True)
        net.register_forward_hook(self.end, always_call=True)
        net.register_state_dict_pre_hook(self.synchronize)
        net.register_load_state_dict_pre_hook(self.synchronize)

    @torch.compiler.disable
    def begin(self, net: nn.Module, args: tuple, kwargs: dict) -> None:
        """Bring the first two blocks to the device of the inputs."""
        if sizing.active():
            return
        step = targets.given()
        if step is not None and step.accumulate:
            raise ValueError("accumulate must be False with offload='cpu', which keeps no gradients of a block")
        self._take_back_all()
        self.device = next((x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), self.device)
        self.training = net.training and torch.is_grad_enabled()
        self.visited = 0
        self._bring(0)
        self._bring(1)
        self.enter()

    def leave(self, boundary: Boundary) -> None:
        """The block that ends at ``boundary`` is done: it goes back, and the next but one comes."""
        if boundary is not self.blocks[self.visited].boundary:
            expected = self.blocks[self.visited].boundary
            raise RuntimeError(
                f"offload: {boundary.label} came where the example had "
                f"{'the output' if expected is None else expected.label}: blocks must be visited in the same order"
            )
        torch.clear_autocast_cache()  # holds a copy of every weight that was cast, until autocast ends
        self._take_back(self.blocks[self.visited])
        self.visited += 1
        self._bring(self.visited + 1)

    def enter(self) -> None:
        """What follows on the current stream waits until the block that is visited now has come."""
        block, device = self.blocks[self.visited], self._streams
        if block.ready is not None:
            device.wait(device.current(), block.ready)
            block.ready = None

    @torch.compiler.disable
    def end(self, net: nn.Module, args: tuple, output: object) -> None:
        """After a pass that learns nothing, all blocks go back; in training the last one waits for its gradient."""
        if not sizing.active():
            self.learning |= self.training
            self._take_back_all()

    def finish(self) -> None:
        """The optimizer of the last block has stepped: it goes back, and its gradients are dropped."""
        self.learning = False
        self._take_back_all()
        for tensor in self.blocks[-1].tensors:
            tensor.grad = None

    def _take_back_all(self) -> None:
        for block in self.blocks[:-1] if self.learning else self.blocks:
            if block.hosts is not None:
                self._take_back(block)

    def synchronize(self, *_) -> None:
        """Let the host wait until what goes back has come."""
        self._streams.synchronize(self._streams.copies)

    def places(self, block: Block) -> Iterator[Place]:
        """What goes and comes with ``block``."""
        return block.places(self.output_optimizer if block.boundary is None else block.boundary.optimizer)

    @property
    def _streams(self) -> streams.NoStreams:
        return streams.of(self.device)

    def _bring(self, index: int) -> None:
        if index >= len(self.blocks):
            return
        block, device = self.blocks[index], self._streams
        if block.hosts is not None:
            return
        block.moved = self.training
        stream = device.current()
        device.use(device.copies)
        block.hosts = {}
        for place in self.places(block):
            host = self._host_of(place.get())
            block.hosts[id(place.holder), place.key] = host
            place.set(host.to(self.device, non_blocking=True, copy=True))
        block.ready = device.record(device.copies)
        device.use(stream)

    def _host_of(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu":
            raise RuntimeError(
                f"offload: weights live on the CPU and were moved to {tensor.device}: leave the network where it is, "
                "the device of the inputs decides where it computes"
            )
        return tensor.pin_memory() if self.device.type == "cuda" and not tensor.is_pinned() else tensor

    def _take_back(self, block: Block) -> None:
        device = self._streams
        stream = device.current()
        device.wait(device.copies, device.record(stream))
        device.use(device.copies)
        for place in self.places(block):
            tensor = place.get()
            host = block.hosts.get((id(place.holder), place.key))
            new = host is None  # a state that the optimizer has made in this visit
            if new:
                host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            if new or block.moved and place.trained:
                host.copy_(tensor, non_blocking=True)
            device.keep(tensor, device.copies)
            place.set(host)
        block.hosts, block.moved = None, False
        device.use(stream)


def detach(net: nn.Module) -> None:
    """A network without boundaries stays on the host: it visits nothing."""
    for hooks in (net._forward_pre_hooks, net._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Offload)]:
            del hooks[key]


def check(offload: str | None, schedule: str | None, example: object) -> str | None:
    """The schedule that goes with ``offload``.  Raises ``ValueError`` for what does not go together."""
    if offload is None:
        return schedule
    if offload != "cpu":
        raise ValueError(f"offload must be None or 'cpu', got {offload!r}")
    if schedule not in (None, "immediate"):
        raise ValueError(f"offload='cpu' needs schedule='immediate', one visit of a block per step, got {schedule!r}")
    if example is None:
        raise ValueError("offload='cpu' needs example=, an input on the CPU that shows which block has what")
    return "immediate"


def _plan(net: nn.Module, inputs: tuple) -> list[Block]:
    """The blocks of ``net`` with all its parameters and buffers, in the order in which ``net(*inputs)`` visits them."""
    order, first = _visits(net, inputs)
    _check_visits(net, order)
    blocks = [Block(boundary) for boundary in [*order, None]]
    owner: dict[int, Block] = {}
    for block in blocks[:-1]:
        local = [*block.boundary.parameters(), *block.boundary.buffers()]
        owner.update((id(tensor), block) for tensor in [*block.boundary.block_parameters, *local])
    for module, index in first.items():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            owner.setdefault(id(tensor), blocks[index])
    for tensor in [*net.parameters(), *net.buffers()]:
        owner.get(id(tensor), blocks[-1]).tensors.append(tensor)
    return blocks


def _visits(net: nn.Module, inputs: tuple) -> tuple[list[Boundary], dict[nn.Module, int]]:
    """The boundaries in the order in which they are passed, and for every module how many it was first called after."""
    order: list[Boundary] = []
    first: dict[nn.Module, int] = {}

    def note(module, args):
        if hasattr(module, "block_parameters"):
            order.append(module)
        else:
            first.setdefault(module, len(order))

    handles = [module.register_forward_pre_hook(note) for module in net.modules()]
    try:
        with sizing.as_in_eval(net), torch.no_grad():
            net(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return order, first


def _check_visits(net: nn.Module, order: list[Boundary]) -> None:
    for boundary in order:
        if order.count(boundary) > 1:
            raise ValueError(
                f"offload: {boundary.label} is passed {order.count(boundary)} times; it may be visited once"
            )
        if boundary.objective is None or not boundary.options.isolate:
            raise ValueError(f"offload: {boundary.label} has an objective that does not isolate: {boundary.options}")
        feedback = getattr(boundary.objective, "feedback", None)
        if feedback is not None and feedback.reads_above:
            raise ValueError(
                f"offload: feedback={feedback.kind!r} reads weights of all blocks above; use 'direct' or 'fixed'"
            )
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if tensor.device.type != "cpu":
            raise ValueError(f"offload: the network must be on the CPU, but {name!r} is on {tensor.device}")
