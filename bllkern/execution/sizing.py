"""Giving heads and feedback their size before training, from one input that teaches nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .ownership import check_output, discover

if TYPE_CHECKING:
    from ..blocks import Boundary


@dataclass
class _Pass:
    """What one run through the network finds: activations at boundaries, and the block of each parameter."""

    visits: list[tuple[Boundary, Tensor]] = field(default_factory=list)
    owners: dict[int, Boundary] = field(default_factory=dict)


_running: ContextVar[_Pass | None] = ContextVar("bllkern_sizing", default=None)


def active() -> bool:
    return _running.get() is not None


def visit(boundary: Boundary, z: Tensor) -> Tensor:
    """What a boundary does while sizes are found: remember the activation, learn which parameters its block has."""
    run = _running.get()
    if all(boundary is not one for one, _ in run.visits):
        boundary.block_parameters = None  # what it knows, it may have found without the network around it
    run.visits.append((boundary, z.detach().new_zeros(()).expand(z.shape)))  # all that is needed, without the memory
    discover(boundary, z, run.owners)
    return z.detach() if boundary.options.isolate else z


@contextmanager
def as_in_eval(net: nn.Module):
    """Eval mode, so that no running statistic and no random state moves; then every module's own mode again."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def size(net: nn.Module, *args, **kwargs) -> None:
    """:func:`run` for these arguments.  Raises ``RuntimeError`` if the output reaches into a block."""
    check_output(net, *run(net, net, args, kwargs))


def run(net: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> tuple[object, dict[int, Boundary]]:
    """Run ``forward`` of ``net`` once without learning and size every boundary that the data meets, last one first.

    Last first, because a chained feedback network reads the messages of the boundary above.  Returns the output, and
    the boundary of every parameter, by identity.
    """
    found = _Pass()
    token = _running.set(found)
    try:
        with as_in_eval(net), torch.enable_grad():
            output = forward(*args, **kwargs)
        for boundary, z in reversed(found.visits):
            boundary.objective.initialize(z)
    finally:
        _running.reset(token)
    return output, found.owners
