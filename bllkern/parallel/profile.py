"""Seconds and bytes of each block of a network on this machine: what :mod:`bllkern.parallel.plan` predicts from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..convert import convert
from ..network import boundaries
from .balance import block_seconds
from .part import Layout
from .plan import Block


def profile(
    net: nn.Module,
    cuts: Sequence[str] | int,
    target_features: int,
    objective,
    x: Tensor,
    y: Tensor,
    loss: Callable[[object, Tensor], Tensor],
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Block]:
    """The blocks of ``net``, cut as by :func:`bllkern.convert`, on the micro-batch ``x`` [B, ...], ``y`` [B] or [B, T].

    Seconds are the least of ``repeats`` runs in this process, on its own: a machine whose cores all work may be slower.
    So processes that will share the cores had better measure at the same time, by ``clock=time.thread_time``.
    """
    local = convert(net, cuts, target_features, objective, example=x)
    joint = convert(net, list(boundaries(local)), target_features, "backprop")
    layout = Layout(local, (x,))
    seconds = block_seconds(local, (x,), y, loss, repeats, clock)
    forward, backward, activations, messages = _backprop(joint, x, y, loss, repeats, clock)
    parameters = [0] * len(layout.names)
    for name, tensor in local.named_parameters():
        if ".local." not in f".{name}":
            parameters[min(layout.owners[name])] += tensor.nbytes
    columns = (layout.names, forward, backward, seconds, messages, activations, parameters)
    return [Block(*row) for row in zip(*columns, strict=True)]


def _backprop(
    net: nn.Module, x: Tensor, y: Tensor, loss: Callable, repeats: int, clock: Callable
) -> tuple[list, list, list, list]:
    """Seconds forward and backward, bytes kept and bytes handed on of each block under end-to-end backprop."""
    marks, back, kept, messages, seen = [], [], [0], [], set()
    net.train()

    def passed(module, args, z):
        marks.append(clock())
        messages.append(z.nbytes)
        kept.append(0)
        z.register_hook(lambda gradient: back.append(clock()))

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept[-1] += storage.nbytes()
        return tensor

    handles = [boundary.register_forward_hook(passed) for boundary in boundaries(net).values()]
    known = {p.untyped_storage().data_ptr() for p in net.parameters()}
    forward, backward = [], []
    for _ in range(repeats + 1):
        marks[:], back[:], kept[:], messages[:], seen = [clock()], [], [0], [], set(known)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss(net(x), y)
        marks.append(clock())
        begun = clock()
        value.backward()
        net.zero_grad()
        forward.append([end - start for start, end in pairwise(marks)])
        backward.append([end - start for start, end in pairwise([begun, *back, clock()])][::-1])
    for handle in handles:
        handle.remove()
    least = [[min(times) for times in zip(*runs[1:])] for runs in (forward, backward)]
    return *least, list(kept), [*messages, 0]
