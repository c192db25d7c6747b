"""Seconds and bytes of each block of a network on this machine: what :mod:`bllkern.parallel.plan` predicts from."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor, nn

from ..convert import convert
from ..network import boundaries
from .balance import block_seconds
from .messages import compress
from .part import Layout
from .plan import Block
from .stream import carried

MEETING = 300.0  # seconds in which processes that measure at once must have started


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

    Seconds are medians of ``repeats`` runs in this process: a step is made of usual runs, not of the fastest.  A machine
    whose cores all work may be slower, so measure with as many processes at once as there will be (:func:`at_once`),
    and by ``clock=time.thread_time``.
    """
    local = convert(net, cuts, target_features, objective, example=x)
    joint = convert(net, list(boundaries(local)), target_features, "backprop")
    layout = Layout(local, (x,))
    seconds = block_seconds(local, (x,), y, loss, repeats, clock)
    forward, backward, activations, messages, packed = _backprop(joint, x, y, loss, repeats, clock)
    parameters = [0] * len(layout.names)
    for name, tensor in local.named_parameters():
        if ".local." not in f".{name}":
            parameters[min(layout.owners[name])] += tensor.nbytes
    columns = (layout.names, forward, backward, seconds, messages, packed, activations, parameters)
    return [Block(*row) for row in zip(*columns, strict=True)]


def typical(profiles: Sequence[list[Block]]) -> list[Block]:
    """Of each block the median seconds of several profiles of one network."""
    times = ("forward", "backward", "local")
    return [replace(same[0], **{t: median(getattr(b, t) for b in same) for t in times}) for same in zip(*profiles)]


def at_once(processes: int, measure: Callable[[], list[Block]]) -> list[Block]:
    """What is typical of ``measure()``, which can be pickled, in so many processes that call it at the same time."""
    if processes == 1:
        return measure()
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(processes)
    with ProcessPoolExecutor(processes, context, initializer=_know, initargs=(start,)) as pool:
        return typical([job.result() for job in [pool.submit(_meet, measure) for _ in range(processes)]])


def _know(start) -> None:
    global _start
    _start = start


def _meet(measure: Callable[[], list[Block]]) -> list[Block]:
    _start.wait(MEETING)
    return measure()


def _backprop(
    net: nn.Module, x: Tensor, y: Tensor, loss: Callable, repeats: int, clock: Callable
) -> tuple[list, list, list, list, list]:
    """Seconds forward and backward, bytes kept and handed on, and on sockets, of each block with end-to-end backprop."""
    marks, back, kept, messages, seen = [], [], [0], [], set()
    net.train()

    def passed(module, args, z):
        marks.append(clock())
        messages.append(z.detach())
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
    usual = [[median(times) for times in zip(*runs[1:])] for runs in (forward, backward)]
    packed = [carried(compress(z, None)[0]) for z in messages]
    return *usual, list(kept), [*(z.nbytes for z in messages), 0], [*packed, 0]
