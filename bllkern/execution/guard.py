"""What a network is looked at for before a training step changes anything."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import batch_norm, sizing, targets
from .ownership import check_output


class Guard:
    """Forward pre-hook of a block-local network.

    Before the first training step, a pass that learns nothing gives heads and feedback their size, unless an example
    has, and shows which block has which parameter: a parameter or tensor of two blocks, or an optimizer that misses one
    (``optimizers`` makes them), is an error then.  Before a step on a single sample, batch norms are looked at.
    """

    def __init__(self):
        self.sized = False
        self.refuses = True
        self.optimizers: Callable[[], object] | None = None
        self.seen: set[tuple] = set()  # shapes of single samples that every batch norm could normalise

    def __call__(self, net: nn.Module, args: tuple, kwargs: dict) -> None:
        single = any(isinstance(x, Tensor) and x.dim() > 0 and len(x) == 1 for x in (*args, *kwargs.values()))
        if single or not self.sized:
            self._look(net, args, kwargs, single)

    @torch.compiler.disable
    def _look(self, net: nn.Module, args: tuple, kwargs: dict, single: bool) -> None:
        if not (net.training and torch.is_grad_enabled()) or targets.given() is None or sizing.active():
            return
        shapes = tuple(x.shape for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if single and shapes not in self.seen:
            batch_norm.check(net, args, kwargs)
            self.seen.add(shapes)
        if not self.sized:
            output, owners = sizing.run(net, net.forward, args, kwargs)  # its hooks have seen these
            if self.refuses:
                check_output(net, output, owners)
            if self.optimizers is not None:
                self.optimizers()
            self.sized = True


def attach(net: nn.Module) -> Guard:
    """The guard of ``net``, which gets one where it has none: after the user's hooks, before those of streams."""
    found = _guards(net)
    if not found:
        found = [Guard()]
        net.register_forward_pre_hook(found[0], with_kwargs=True)
    return found[0]


def _guards(net: nn.Module) -> list[Guard]:
    return [hook for hook in net._forward_pre_hooks.values() if isinstance(hook, Guard)]


def observe(net: nn.Module) -> None:
    """Let the guard of ``net`` refuse nothing that is to be observed."""
    for found in _guards(net):
        found.refuses = False


def remove(net: nn.Module) -> None:
    """Take the guard off ``net``."""
    for key, hook in list(net._forward_pre_hooks.items()):
        if isinstance(hook, Guard):
            del net._forward_pre_hooks[key]
            net._forward_pre_hooks_with_kwargs.pop(key, None)
