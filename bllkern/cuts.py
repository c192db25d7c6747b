"""Where a network can be cut, and how to cut it into blocks of similar cost."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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


def _costs(net: nn.Module, units: list[list[str]], inputs: tuple) -> list[float]:
    """Floating-point operations of each group on ``inputs``, or 1 each without any."""
    if not inputs:
        return [1.0] * len(units)
    counter = FlopCounterMode(display=False)
    modes = {module: module.training for module in net.modules()}
    net.eval()
    with torch.no_grad(), counter:
        net(*inputs)
    for module, mode in modes.items():
        module.training = mode
    counts = counter.get_flop_counts()
    root = type(net).__name__
    return [float(sum(sum(counts.get(f"{root}.{name}", {}).values()) for name in unit)) for unit in units]


def even(net: nn.Module, blocks: int, inputs: tuple = ()) -> list[str]:
    """Cuts after which ``net`` falls into ``blocks`` blocks of similar cost.

    Raises ``ValueError`` for fewer than 1 block or more than there are layers.
    """
    units = groups(net)
    if isinstance(blocks, bool) or not 1 <= blocks <= len(units):
        raise ValueError(
            f"cuts: the number of blocks must be from 1 to {len(units)}, the layers in a row, got {blocks}"
        )
    costs = _costs(net, units, inputs)
    return [units[end - 1][-1] for end in balanced(costs, blocks)]


def balanced(costs: list[float], blocks: int) -> list[int]:
    """Ends of all blocks but the last that make the most expensive block cheapest (dynamic programming)."""
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    best = {(0, 0): (0.0, [])}
    for count in range(1, blocks + 1):
        for end in range(count, len(costs) - (blocks - count) + 1):
            options = (
                (max(best[start, count - 1][0], total[end] - total[start]), best[start, count - 1][1] + [end])
                for start in range(count - 1, end)
                if (start, count - 1) in best
            )
            best[end, count] = min(options, key=lambda option: option[0])
    return best[len(costs), blocks][1][:-1]
