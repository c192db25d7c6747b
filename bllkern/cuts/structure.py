"""Where a network can be cut: its pieces in the order of computation, and what each computes and keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..blocks import first_tensor
from ..execution.ownership import leaves
from ..execution.sizing import as_in_eval

_CONTAINERS = (nn.Sequential, nn.ModuleList)
_NORM = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)


def channel_dim(module: nn.Module) -> int | None:
    """1 for a module that ends in a one-dimensional convolution, whose output [B, C, L] would pass for tokens."""
    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv1d))]
    return 1 if layers and isinstance(layers[-1], nn.Conv1d) else None


def trunk(net: nn.Module) -> list[str]:
    """Names of the modules that the data passes one after the other, as far as the structure shows it.

    Containers are opened, and so is a module that keeps most of its parameters in a container of layers (a model, or a
    model inside another).  Anything else is one unit, whose inner paths may skip each other.
    """
    names: list[str] = []
    for name, child in net.named_children():
        if isinstance(child, _CONTAINERS) or _dominates(child, net) and _is_model(child):
            inner = trunk(child)
            names += [f"{name}.{deeper}" for deeper in inner] or [name]
        else:
            names.append(name)
    return names


def _dominates(child: nn.Module, parent: nn.Module) -> bool:
    """Whether ``child`` is more than one of the layers that ``parent`` strings together."""
    return not isinstance(parent, _CONTAINERS) or 2 * _size(child) > _size(parent)


def _is_model(module: nn.Module) -> bool:
    """Whether most of the parameters lie in one container of layers, which have layers of their own, or in a model."""
    return any(
        2 * _size(child) > _size(module)
        and (_has_layers(child) if isinstance(child, _CONTAINERS) else _is_model(child))
        for child in module.children()
    )


def _has_layers(container: nn.Module) -> bool:
    return sum(next(layer.children(), None) is not None for layer in container) > 1


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if not nn.parameter.is_lazy(p))


def groups(net: nn.Module) -> list[list[str]]:
    """The trunk in groups that no cut should split: a layer with the normalisation, activation, pooling that follow."""
    found: list[list[str]] = []
    for name in trunk(net):
        module = net.get_submodule(name)
        starts = next(module.parameters(), None) is not None and not isinstance(module, _NORM)
        if starts and not (len(found) == 1 and not _has_parameters(net, found[0])) or not found:
            found.append([])
        found[-1].append(name)
    return found


def _has_parameters(net: nn.Module, names: list[str]) -> bool:
    return any(next(net.get_submodule(name).parameters(), None) is not None for name in names)


@dataclass
class Unit:
    """What runs between one place where the network can be cut and the next, as a run on an example found it."""

    names: list[str]
    flops: int = 0
    saved: dict[int, int] = field(default_factory=dict)  # bytes of each storage kept for the backward pass
    gradients: int = 0  # bytes of the gradients of its parameters
    output: int = 0  # bytes of its activation

    def join(self, after: Unit) -> Unit:
        return Unit(
            self.names + after.names,
            self.flops + after.flops,
            self.saved | after.saved,
            self.gradients + after.gradients,
            max(self.output, after.output),
        )


class _Trace:
    """One forward pass of ``net``: what each unit computes and keeps, and where the network can be cut."""

    def __init__(self, net: nn.Module, units: list[list[str]], inputs: tuple):
        self.units = [Unit(names) for names in units]
        outside = (*net.parameters(), *net.buffers(), *_tensors(inputs))
        self._outside = {_storage(tensor) for tensor in outside if not nn.parameter.is_lazy(tensor)}
        self._kept: list[Tensor] = []  # alive until the end, so that no two storages have one identity
        self._ends: list[Node | None] = [None] * len(units)
        self._now, self._flops = 0, 0
        self._counter = FlopCounterMode(display=False)
        hooks = [
            net.get_submodule(names[-1]).register_forward_hook(partial(self._end, i)) for i, names in enumerate(units)
        ]
        try:
            with as_in_eval(net), torch.enable_grad(), saved_tensors_hooks(self._keep, _as_it_is), self._counter:
                output = net(*inputs)
        finally:
            for hook in hooks:
                hook.remove()
        self._sinks = [t.grad_fn for t in _tensors(output) if t.grad_fn is not None]
        for unit in self.units:
            parameters = {p for name in unit.names for p in net.get_submodule(name).parameters()}
            unit.gradients = sum(p.nbytes for p in parameters if p.requires_grad)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in self._outside:
            self._kept.append(tensor)
            self.units[self._now].saved[storage] = tensor.untyped_storage().nbytes()
        return tensor

    def _end(self, i: int, module, args, output) -> None:
        flops = self._counter.get_total_flops()
        self.units[i].flops, self._flops = flops - self._flops, flops
        z = first_tensor(output)
        self._ends[i], self.units[i].output = getattr(z, "grad_fn", None), getattr(z, "nbytes", 0)
        self._now = min(i + 1, len(self.units) - 1)

    def whole(self) -> list[Unit]:
        """The units, joined where a cut between them would lie inside a path that skips it."""
        joined: list[Unit] = []
        ended = True  # where the last of ``joined`` can be cut off
        for unit, end in zip(self.units, self._ends, strict=True):
            joined[-1:] = [*joined[-1:], unit] if ended else [joined[-1].join(unit)]
            ended = end is not None and not leaves([end]).keys() & leaves(self._sinks, without=end).keys()
        return joined


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(output) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def units(net: nn.Module, inputs: tuple = ()) -> list[Unit]:
    """The network in the order of computation, in pieces between which it can be cut: measured, where there are inputs.

    Without inputs every piece counts as one operation, and paths that skip a cut are not seen.
    """
    found = [Unit(names, flops=1) for names in groups(net)]
    return _Trace(net, [unit.names for unit in found], inputs).whole() if inputs else found
