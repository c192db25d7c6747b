"""Blocks side by side: the local backward pass of one beside the forward pass of the next.

Autograd runs the backward pass of an operation on the CUDA stream of its forward pass.  So while data passes through a
converted network in training, every block has a stream of its own, in rotation, for its forward pass, local loss,
backward pass and (``"immediate"``) optimizer step.  The stream of the next block waits until the activation is ready,
and for nothing else.  The chain of feedback messages, which needs no activation, has a stream too.  When the network
returns, the caller's stream waits for all of them: outside of it nobody meets another stream.

Memory: torch's allocator gives what was freed to its stream again, in the order of that stream.  What another stream
reads too is named to it (``record_stream``): the activation and the arguments of the module at a boundary, which may
come from any block before.  A tensor that one block makes and a later one reads in other ways must live until the
network returns.  Nothing is allocated on the caller's stream until then.

On a CPU the same code runs with :class:`NoStreams`, and what blocks free stays with the process, as it stays with torch's
allocator on a GPU: blocks free their activations one after the other, and glibc would give them back to the system and
have them filled with zeros again (15,000 to 25,000 page faults in a step of ResNet-32).
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import _native
from . import targets

if TYPE_CHECKING:
    from ..blocks import Boundary
    from ..feedback import Feedback

BLOCK_STREAMS = 3  # a backward pass costs two forward passes, so one block learns beside the forward passes of two


def tensors(tree) -> list[Tensor]:
    """All tensors in ``tree``."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class NoStreams:
    """A device where everything runs in the order in which it is launched."""

    blocks: list = [None]
    feedback = copies = None

    def current(self):
        return None

    def use(self, stream) -> None:
        """Make ``stream`` the current one."""

    def record(self, stream):
        """An event that has happened when all that ``stream`` was given so far is done."""

    def wait(self, stream, event) -> None:
        """Let what ``stream`` is given from now on wait for ``event``; the host waits for nothing."""

    def keep(self, tree, stream) -> None:
        """``stream`` reads the tensors in ``tree``: their memory must not be given away before that is done."""

    def synchronize(self, stream) -> None:
        """Let the host wait until all that ``stream`` was given is done."""


class CudaStreams(NoStreams):
    """The streams of one CUDA device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.blocks = [torch.cuda.Stream(device) for _ in range(BLOCK_STREAMS)]
        self.feedback, self.copies = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def current(self):
        return torch.cuda.current_stream(self.device)

    def use(self, stream) -> None:
        torch.cuda.set_stream(stream)

    def record(self, stream):
        return stream.record_event()

    def wait(self, stream, event) -> None:
        stream.wait_event(event)

    def keep(self, tree, stream) -> None:
        for tensor in tensors(tree):
            tensor.record_stream(stream)

    def synchronize(self, stream) -> None:
        stream.synchronize()


@functools.lru_cache(maxsize=None)
def of(device: torch.device) -> NoStreams:
    """The streams of ``device``, the same ones at every call: a stream's memory pool and libraries' handles last."""
    if device.type == "cuda":
        return CudaStreams(device)
    _native.keep_freed_memory()
    return NoStreams()


class Pass:
    """Data on its way through a network in training: which stream the block has that runs."""

    def __init__(self, net: nn.Module, device: torch.device):
        self.net, self.device, self.streams = net, device, of(device)
        self.origin = self.streams.current()
        self.start = self.streams.record(self.origin)
        self.used: list = []
        self.met: set[Boundary] = set()
        self.messages: dict[Feedback, Tensor] = {}
        self.messages_ready: object = None
        self.informed: set | None = None  # the streams that have waited for the messages, once these are launched
        self._next_block(self.start)

    def _next_block(self, ready) -> None:
        """Go on with the next stream, which waits for the event ``ready``."""
        stream = self.streams.blocks[len(self.used) % len(self.streams.blocks)]
        self.used.append(stream)
        self.streams.wait(stream, ready)
        self.streams.use(stream)

    def _wait_for_all(self, stream) -> None:
        """Let ``stream`` wait for every other that was used."""
        for other in dict.fromkeys(self.used):
            if other is not stream:
                self.streams.wait(stream, self.streams.record(other))

    def arrive(self, boundary: Boundary, inputs):
        """The activation at ``boundary`` was launched; its event, or ``None`` where the next block must wait for all.

        ``inputs`` are what the module at the boundary read: a mask, say, that an earlier block computed.
        """
        stream = self.streams.current()
        self.streams.keep(inputs, stream)
        if boundary in self.met:  # used twice: its parameters have a gradient on the way already
            boundary.repeated = True
            self._wait_for_all(stream)
        self.met.add(boundary)
        return None if self._stays(boundary) else self.streams.record(stream)

    @staticmethod
    def _stays(boundary: Boundary) -> bool:
        """Whether the next block goes on with the same stream."""
        if boundary.schedule == "deferred" or getattr(boundary.options, "bootstrapping", False):
            return True  # nothing is learned here, or what is handed on is ready last of all
        return boundary.step is None or boundary.repeated  # the first step shows whether a block is used twice

    def leave(self, z: Tensor, ready) -> None:
        """The block has learned: go on with the next one, which reads ``z``, as soon as the event ``ready``."""
        if ready is not None and z.device == self.device:
            self._next_block(ready)
            self.streams.keep(z, self.streams.current())

    def message(self, feedback: Feedback) -> Tensor | None:
        """The message of ``feedback``, detached, or ``None`` when asked again: the weights may have moved since.

        With the first one asked for, those of all boundaries above are launched.
        """
        if self.informed is None:
            self._launch_messages(feedback)
        if feedback not in self.messages:
            return None
        message, stream = self.messages.pop(feedback), self.streams.current()
        if stream not in self.informed:
            self.streams.wait(stream, self.messages_ready)
            self.informed.add(stream)
        return message  # its memory is given away in the next pass at the earliest, which waits for this one

    @torch.no_grad()
    def _launch_messages(self, feedback: Feedback) -> None:
        stream = self.streams.current()
        self.streams.wait(self.streams.feedback, self.start)
        self.streams.use(self.streams.feedback)
        last, *others = reversed(feedback.chain_above())
        message = self.messages[last] = last.messages().clone()  # else it may be the weight, which its block moves
        for one in others:
            message = self.messages[one] = one.messages(message)
        self.messages_ready, self.informed = self.streams.record(self.streams.feedback), set()
        self.streams.use(stream)

    def end(self) -> None:
        """Back to the caller's stream, which waits for all others."""
        self.streams.use(self.origin)
        self._wait_for_all(self.origin)


_running: ContextVar[Pass | None] = ContextVar("bllkern_pass", default=None)
_serial: ContextVar[bool] = ContextVar("bllkern_serial", default=False)


@contextmanager
def serial():
    """Inside the ``with`` block, blocks run and learn one after the other, on the caller's CUDA stream.

    Side by side costs memory: up to three blocks hold their activations at a time.
    """
    token = _serial.set(True)
    try:
        yield
    finally:
        _serial.reset(token)


def running() -> Pass | None:
    """The pass through a network that is under way, or ``None``: then everything is on one stream."""
    return _running.get()


def _begin(net: nn.Module, args: tuple) -> None:
    if torch.compiler.is_compiling():  # all in one: its blocks run in turn
        return
    _end(net, args, None)  # a pass that was interrupted from the keyboard
    step = targets.given()
    if step is not None and net.training and torch.is_grad_enabled() and not _serial.get() and running() is None:
        _running.set(Pass(net, step.y.device))


def _end(net: nn.Module, args: tuple, output: object) -> None:
    if torch.compiler.is_compiling():
        return
    found = running()
    if found is not None and found.net is net:
        _running.set(None)
        found.end()


def attach(net: nn.Module) -> None:
    """Let the blocks of ``net`` run side by side, from when it is called until it returns."""
    net.register_forward_pre_hook(_begin)
    net.register_forward_hook(_end, always_call=True)


def detach(net: nn.Module) -> None:
    """Undo :func:`attach` for ``net`` and every module in it."""
    for module in net.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_begin, _end)]:
                del hooks[key]


def arrive(boundary: Boundary, args: tuple, kwargs: dict):
    """See :meth:`Pass.arrive`."""
    found = running()
    if found is not None:
        return found.arrive(boundary, (args, kwargs))


def leave(z: Tensor, ready) -> None:
    """See :meth:`Pass.leave`."""
    found = running()
    if found is not None:
        found.leave(z, ready)
