"""The promise of the library, checked on a live network: a local loss moves its own block only."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..execution import guard
from ..execution.streams import serial
from ..execution.targets import targets
from .losses import boundaries


def assert_isolated(net: nn.Module, x: Tensor | tuple, y: Tensor) -> None:
    """Run one training step on a copy of ``net`` and raise unless every local loss moves its own block only.

    What moved is observed, not derived: gradients and values of all parameters are compared before and after each
    boundary (or, for schedule ``"deferred"``, before and after each local loss's backward pass), and after the backward
    pass of the output.  ``net``, its gradients and its optimizers stay as they are.

    Args: x: an input, or a tuple of positional inputs.  y: targets as in :func:`bllkern.targets`.
    Raises: ``AssertionError`` naming the parameter and the losses that move it, or the block that no local loss moves;
    ``ValueError`` if ``net`` has no boundary.
    """
    if not boundaries(net):
        raise ValueError("net has no block-local boundary: use bllkern.convert or block-local layers first")
    net = copy.deepcopy(net).train()
    guard.observe(net)  # what it would refuse is to be observed
    moved = _moves(net, x if isinstance(x, tuple) else (x,), y)
    names = {id(p): name for name, p in net.named_parameters()}
    owners: dict[int, str] = {}
    for loss, parameters in moved.items():
        if not parameters and loss != _OUTPUT:
            raise AssertionError(f"not isolated: the block that ends at {loss!r} has no local loss that moves it")
        for parameter in parameters:
            if parameter in owners:
                raise AssertionError(
                    f"not isolated: {names[parameter]!r} is moved by the losses of both {owners[parameter]!r} "
                    f"and {loss!r}"
                )
            owners[parameter] = loss


_OUTPUT = "the output"


def _moves(net: nn.Module, inputs: tuple, y: Tensor) -> dict[str, set[int]]:
    """Which parameters the loss of each block moves, by identity."""
    watch = _Watch(net)
    moved: dict[str, set[int]] = {}

    def note(name):
        moved[name] = moved.get(name, set()) | watch.changed()

    for name, boundary in boundaries(net).items():
        boundary.register_forward_hook(lambda *_, name=name: note(name))
    with targets(y), torch.enable_grad(), serial():
        output = _scalar(net(*inputs))
    for name, boundary in boundaries(net).items():
        for loss in boundary.pending:
            loss.backward(retain_graph=True)
            moved[name] |= watch.changed()
    if output.requires_grad:
        output.backward()
    moved[_OUTPUT] = watch.changed()
    return moved


class _Watch:
    """Notices which parameters got another value or another gradient since it last looked."""

    def __init__(self, net: nn.Module):
        self._net = net
        self._seen: dict[int, tuple[Tensor | None, Tensor | None]] = {}
        self.changed()

    def changed(self) -> set[int]:
        found = set()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # with offload, weights are on their way
        for p in self._net.parameters():
            now = (
                (None, None)
                if nn.parameter.is_lazy(p)
                else (_on_host(p.detach()), None if p.grad is None else _on_host(p.grad))
            )
            before = self._seen.get(id(p), (None, None))
            # a parameter that only now gets its size has not moved
            if before[0] is not None and not all(map(_same, before, now)) or before[0] is None and now[1] is not None:
                found.add(id(p))
            self._seen[id(p)] = now
        return found


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or a is not None and b is not None and torch.equal(a, b)


def _scalar(output) -> Tensor:
    """A differentiable number that depends on every tensor in ``output``."""
    if isinstance(output, Tensor):
        return output.float().square().sum() if output.is_floating_point() else torch.zeros(())
    entries = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return sum((_scalar(entry) for entry in entries), torch.zeros(()))
