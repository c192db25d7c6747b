"""Boundaries into an existing network, and out of it again.

Neither direction changes the network that it is given: the modules on the way from the root to a cut are copied, all
others, and every parameter and buffer, are shared.
"""

from __future__ import annotations

import difflib
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from types import MethodType

from torch import Tensor, nn

from . import objectives
from .blocks import BlockLocal, Boundary
from .cuts import channel_dim, even
from .cuts import file as cuts_file
from .execution import epilogue, guard, layout, noise, sizing, streams
from .execution import offload as offloading
from .network import boundaries
from .objectives.alignment import watch_output


def convert(
    net: nn.Module,
    cuts: Sequence[str] | int | str | os.PathLike,
    target_features: int,
    objective=None,
    schedule: str | None = None,
    example: Tensor | tuple | None = None,
    balance: str | None = None,
    offload: str | None = None,
) -> nn.Module:
    """A block-local network with the parameters of ``net``, cut after the named modules.

    Args:
        net: any network; it stays as it is, and shares parameters and buffers with what is returned.
        cuts: names of modules (as in ``net.named_modules()``) after which a block ends, or the number of blocks, which
            then have similar cost: that of ``balance``, measured on ``example`` if given, else the number of layers.
            With an example no cut is put where a path skips it.  Or a ``.json`` file that ``bllkern split`` wrote.
            What follows the last cut is the output block; it learns from the global loss.
        target_features: number of classes, or of dimensions of real targets.
        objective: a name or a :class:`bllkern.objectives.Objective`; by default that of the file of cuts, or ``"bll"``.
            Where it is a name, the file says its head and pool, and its other options too if it is the file's own.
        schedule: ``"eager"`` (default), ``"deferred"`` or ``"immediate"``.
        example: an input, or a tuple of positional inputs, that gives heads and feedback their size now.  Where it
            shows that activations may be channels-last, they are while the network trains on a CPU, which is faster
            (:mod:`bllkern.execution.layout`).
        balance: with a number of blocks, what to divide evenly: ``"flops"`` (default), floating-point operations, or
            ``"memory"``, the most bytes of activations and gradients that training holds at a time under schedule
            ``"immediate"``; needs an ``example`` of the batch size to train with.
        offload: ``"cpu"`` for a network that is larger than the device: weights and optimizer states stay on the CPU,
            where ``net`` and ``example`` are, and come to the device of the input for one visit per step; see
            :mod:`bllkern.execution.offload`.  Goes with schedule ``"immediate"``.

    Raises: ``ValueError`` for a cut that does not exist (with the nearest names), stands twice, or lies in a module
    that the network uses in several places; for too many blocks; for another ``balance``; for a malformed file, naming
    file and field.  ``FileNotFoundError`` for a file that is not there.  ``RuntimeError`` (with an example, else in the
    first step) where a parameter or a tensor belongs to two blocks: a skip connection across a cut, tied parameters.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    if isinstance(cuts, (str, os.PathLike)):
        cuts, objective = _from_file(cuts, objective)
    objective = "bll" if objective is None else objective
    schedule = offloading.check(offload, schedule, example)
    inputs = example if isinstance(example, tuple) else () if example is None else (example,)
    options = objectives.get(objective)
    if balance is not None and not isinstance(cuts, int):
        raise ValueError(f"balance is for a number of blocks, got balance={balance!r} with the names of cuts")
    names = even(net, cuts, inputs, balance or "flops") if isinstance(cuts, int) else list(cuts)
    _check_names(net, names)
    names = options.places(net, names)
    _check_names(net, names)

    def end_block(name: str, module: nn.Module) -> nn.Module:
        block = BlockLocal(module, target_features, options, schedule, channel_dim=channel_dim(module))
        block.local.name = name
        if isinstance(options, objectives.FeedbackAlignment):
            block.local.objective.match(module)
        return block

    fused = _residual_units(net, names) if options.isolate and options.local else []
    converted = _replace(net, dict.fromkeys(fused, _attach) | dict.fromkeys(names, end_block))
    _chain(converted)
    streams.attach(converted)
    if isinstance(options, objectives.DirectFeedbackAlignment):
        watch_output(converted)
    _denoise(converted)
    if example is not None:
        layout.size(converted, inputs)
    if offload is not None:
        offloading.Offload(converted, inputs)
    if names:
        guard.Guard(checked=example is not None).register(converted)
    return converted


def _from_file(path: str | os.PathLike, objective) -> tuple[list[str], object]:
    """The cuts in the file, and the objective that is asked for, or else the file's."""
    if not os.fspath(path).endswith(".json"):
        raise ValueError(f"cuts must be module names, a number of blocks, or a .json file, got {path!r}")
    file = cuts_file.read(path)
    if objective is None or isinstance(objective, str):
        name = file.objective if objective is None else objective
        objective = objectives.get(name, **file.options_of(name))
    return file.cuts, objective


def unwrap(net: nn.Module) -> nn.Module:
    """The plain network, with the original keys, sharing the parameters of ``net``."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
    local = {
        path: _plain for path, module in net.named_modules() if isinstance(getattr(module, "local", None), Boundary)
    }
    fused = {path: _detach for path, module in net.named_modules() if epilogue.attached(module)}
    plain = _replace(net, local | fused)
    streams.detach(plain)
    layout.detach(plain)
    noise.detach(plain)
    offloading.detach(plain)
    guard.remove(plain)
    return plain


def _plain(path: str, module: nn.Module) -> nn.Module:
    return module.plain()


def _residual_units(net: nn.Module, names: list[str]) -> list[str]:
    """The residual units in which no block ends: their forward pass need not be that of their class."""
    units = [path for path, module in net.named_modules() if path and epilogue.is_residual(module)]
    return [path for path in units if not any(name == path or name.startswith(path + ".") for name in names)]


def _attach(path: str, module: nn.Module) -> nn.Module:
    epilogue.attach(module)
    return module


def _detach(path: str, module: nn.Module) -> nn.Module:
    epilogue.detach(module)
    return module


def _chain(net: nn.Module) -> None:
    """Let every chained feedback read the one of the next boundary, and size them all at the first call if need be."""
    learning = [b.objective for b in boundaries(net).values() if getattr(b.objective, "feedback", None) is not None]
    chained = [objective for objective in learning if objective.feedback.reads_above]
    for objective, above in zip_longest(chained, chained[1:]):
        objective.feedback.chain(above and above.feedback)
    if chained:

        def size_first(module, args, kwargs):
            handle.remove()
            if not sizing.active() and not all(o.sized for o in chained):
                sizing.size(module, *args, **kwargs)

        handle = net.register_forward_pre_hook(size_first, with_kwargs=True)


def _denoise(net: nn.Module) -> None:
    """Let every block of ``net`` that denoises get its input with noise too."""
    hand_on = partial(noise.attach, net)
    for boundary in boundaries(net).values():
        if getattr(boundary.options, "denoising", 0):
            hand_on(boundary.options.noise)
            boundary.expects_noise = True
        hand_on = partial(setattr, boundary, "noise")


def _check_names(net: nn.Module, names: list[str]) -> None:
    paths = _paths(net)
    known = {name for names_of_module in paths.values() for name in names_of_module} - {""}
    for name in names:
        if not isinstance(name, str) or name not in known:
            near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.3)
            raise ValueError(f"cuts: the network has no module {name!r}; the nearest names are {near}")
        if names.count(name) > 1:
            raise ValueError(f"cuts: {name!r} stands more than once")
    for places in paths.values():
        inside = [name for name in names for place in places if name == place or name.startswith(place + ".")]
        if len(places) > 1 and inside and "" not in places:
            raise ValueError(f"cuts: {inside[0]!r} lies in a module that the network uses in several places: {places}")


def _paths(net: nn.Module) -> dict[int, list[str]]:
    """All names of every module, by the module's identity."""
    places: dict[int, list[str]] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    return places


def _replace(net: nn.Module, at: dict[str, Callable[[str, nn.Module], nn.Module]], path: str = "") -> nn.Module:
    """``net`` with the module at each path replaced by ``at[path](path, module)``."""
    if not any(place == path or place.startswith(path + "." if path else "") for place in at):
        return net
    copy = _shallow(net)
    for name, child in net._modules.items():
        if child is not None:
            copy._modules[name] = _replace(child, at, f"{path}.{name}" if path else name)
    return at[path](path, copy) if path in at else copy


def _shallow(module: nn.Module) -> nn.Module:
    """A copy of one module that shares parameters, buffers and children, but not the tables of children and hooks."""
    copy = module.__class__.__new__(module.__class__)
    for name, value in module.__dict__.items():
        if isinstance(value, MethodType) and value.__self__ is module:
            value = MethodType(value.__func__, copy)
        elif isinstance(value, (dict, OrderedDict)) and (name == "_modules" or "_hooks" in name):
            value = value.copy()
        copy.__dict__[name] = value
    return copy
