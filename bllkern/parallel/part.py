"""A rank's part of a network: the whole network's code, of which only the rank's own blocks hold numbers and run.

Parameters and buffers of other blocks are on the meta device, which has shapes only.  The forward pass runs as the
network wrote it: modules before the rank's first block return meta tensors of the right shape, the boundary where its
blocks begin returns the activation received, and the boundary where they end hands its activation over and leaves the
forward pass.  So any forward code works in which nothing but the activation passes a boundary between ranks.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from ..blocks import Boundary, first_tensor
from ..execution import layout as memory_layout
from ..execution import noise, sizing
from ..feedback import Feedback
from ..network import boundaries
from .messages import MessageError


class Left(Exception):
    """The forward pass has reached the end of the rank's blocks."""


class _Uses(TorchFunctionMode):
    """Notes in which block each tensor and each module is used during one forward pass; ``block`` counts boundaries."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.shapes: list[torch.Size] = []  # of the activation at each boundary
        self.block, self.tensors, self.entered, self.left = 0, defaultdict(set), defaultdict(set), defaultdict(set)
        self._handles = []
        for module in net.modules():
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave))

    def _enter(self, module, args):
        self.entered[id(module)].add(self.block)

    def _leave(self, module, args, output):
        self.left[id(module)].add(self.block)
        if isinstance(getattr(module, "local", None), Boundary):
            self.shapes.append(first_tensor(output).shape)
            self.block += 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        for leaf in tree_flatten((args, kwargs or {}))[0]:
            if isinstance(leaf, Tensor):
                self.tensors[id(leaf)].add(self.block)
        return func(*args, **(kwargs or {}))

    def remove(self):
        for handle in self._handles:
            handle.remove()


class Layout:
    """The blocks of a network: which tensors and modules belong to each, found by running it once on ``inputs``.

    ``names``: the boundary at the end of each block, then ``"output"``.  ``owners``: the blocks of every entry of
    ``named_parameters`` and ``named_buffers``.  ``called``: the paths of modules that were called.  Raises
    ``ValueError`` for a network without boundaries, or one whose losses are not isolated.
    """

    def __init__(self, net: nn.Module, inputs: tuple):
        self.paths = {name: _path(net, boundary) for name, boundary in boundaries(net).items()}
        if not self.paths:
            raise ValueError("net has no block-local boundary: use bllkern.convert first")
        for name, boundary in boundaries(net).items():
            if boundary.objective is None or not boundary.options.isolate:
                raise ValueError(f"blocks in parallel need isolated losses; {name!r} has {boundary.options}")
            if (kind := getattr(boundary.options, "feedback", None)) in ("attention", "inverse"):
                raise ValueError(
                    f"blocks in parallel carry messages that are one per class and learn alone; {name!r} has "
                    f"feedback={kind!r}"
                )
        self.names = [*self.paths, "output"]
        if any(boundary.block_parameters is None for boundary in boundaries(net).values()):
            sizing.size(net, *inputs)
        self.uses = _Uses(net)
        with sizing.as_in_eval(net), torch.no_grad(), self.uses:
            net(*inputs)
        self.uses.remove()
        if self.uses.block != len(self.paths):
            raise ValueError(
                f"blocks in parallel need every boundary to be passed once, in the order of registration; "
                f"{self.uses.block} were passed, of {len(self.paths)}"
            )
        self._places = {name: i for i, name in enumerate(self.paths)}
        self.chained = any(getattr(b.options, "feedback", None) == "chained" for b in boundaries(net).values())
        self.target_features = next(iter(boundaries(net).values())).objective.target_features
        self.called = {path for path, module in net.named_modules() if id(module) in self.uses.entered}
        self.owners = {name: self._owner(net, name, tensor) for name, tensor in _tensors(net)}

    def _owner(self, net: nn.Module, name: str, tensor: Tensor) -> set[int]:
        for boundary, path in self.paths.items():
            if name.startswith(f"{path}.local." if path else "local."):
                return {self._places[boundary]}
        module = net.get_submodule(name.rpartition(".")[0])
        return self.uses.tensors.get(id(tensor)) or self.uses.entered.get(id(module)) or {len(self.paths)}


def _path(net: nn.Module, boundary: Boundary) -> str:
    """The name of the module whose ``local`` is ``boundary``."""
    found = [path for path, module in net.named_modules() if getattr(module, "local", None) is boundary]
    if not found:
        raise ValueError(
            f"{boundary.label} stands by itself; blocks in parallel need BlockLocal, its layers or convert"
        )
    return found[0]


def _tensors(net: nn.Module):
    yield from net.named_parameters(remove_duplicate=False)
    yield from net.named_buffers(remove_duplicate=False)


class Part:
    """Blocks ``first`` up to, not including, ``last`` of a network.

    ``net`` is a copy that shares the parameters and buffers of these blocks with the original.  ``hand_on(z)`` is called
    with the activation [B, ...] that leaves, detached, as soon as it is there; the local loss of the last block follows it.
    """

    def __init__(self, net: nn.Module, layout: Layout, first: int, last: int, hand_on: Callable[[Tensor], None]):
        self.layout, self.first, self.last = layout, first, last
        self.received: Tensor | None = None
        memo, self.own = {}, []
        for name, tensor in _tensors(net):
            blocks = layout.owners[name]
            own = [first <= block < last for block in blocks]
            if any(own) and not all(own):
                raise ValueError(f"{name!r} is used in blocks {sorted(blocks)}, which are on different ranks")
            if any(own):
                self.own.append(name)
            memo[id(tensor)] = tensor if any(own) else _shape_only(tensor)
        self.net = copy.deepcopy(net, memo)
        self.noise = self.boundary(first - 1).noise if first else 0.0
        if first:
            noise.detach(self.net)  # it is added to what is received
        self._divert(self.net, net)
        self._drop_boundaries()
        self.entry_shape = layout.uses.shapes[first - 1] if first else None
        if last <= len(layout.paths):
            self._end_at(self.boundary(last - 1), hand_on)

    @property
    def names(self) -> list[str]:
        return self.layout.names[self.first : self.last]

    @property
    def chained(self) -> bool:
        """Whether any block of the whole network learns from chained feedback."""
        return self.layout.chained

    @property
    def target_features(self) -> int:
        """Number of classes, the same at every boundary."""
        return self.layout.target_features

    def feedback(self, block: int) -> Feedback | None:
        """The chained feedback at the end of a block of this rank, if there is one."""
        if block >= len(self.layout.paths) or not self.chained:
            return None
        return self.boundary(block).objective.feedback

    @property
    def is_output(self) -> bool:
        return self.last > len(self.layout.paths)

    def boundary(self, block: int) -> Boundary:
        return self.net.get_submodule(self.layout.paths[self.layout.names[block]]).local

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers of the rank's blocks, under their names in the whole network."""
        own = set(self.own)
        return {name: tensor for name, tensor in self.net.state_dict().items() if name in own}

    def __call__(self, inputs: tuple, received: Tensor | None) -> object:
        """Run the blocks; the network's output, or ``None`` where another rank computes it.

        Args: inputs: of the network [B, ...], on the meta device but for the first rank.  received: activation
        [B, *entry_shape[1:]] from the rank before.  Raises ``MessageError`` if its shape is not what the blocks before
        would have given.
        """
        self.received = received
        try:
            return self.net(*inputs)
        except Left:
            return None
        except RuntimeError as error:
            if "meta" not in str(error):
                raise
            raise RuntimeError(
                f"blocks {self.names} read something from before block {self.names[0]!r} other than its activation, "
                f"or compute with numbers where only shapes are known; cut the ranks elsewhere: {error}"
            ) from error
        finally:
            self.received = None

    def _divert(self, module: nn.Module, original: nn.Module, path: str = "") -> None:
        """Replace what runs before the rank's blocks: the largest modules that lie there altogether, and the entry."""
        uses = self.layout.uses
        entry = self.first and path == self.layout.paths[self.layout.names[self.first - 1]]
        if entry:
            skipped = _Skipped(_plain(module))
            module.forward = lambda *args, **kwargs: self._enter(skipped(*args, **kwargs))
        elif uses.left.get(id(original)) and max(uses.left[id(original)]) < self.first:
            module.forward = _Skipped(_plain(module))
        else:
            for name, child in original.named_children():
                self._divert(getattr(module, name), child, f"{path}.{name}" if path else name)

    def _enter(self, output) -> object:
        """What the entry module returns: the activation received in the place of the one of which the shape is known."""
        expected = first_tensor(output)
        if self.received.shape != expected.shape:
            raise MessageError(
                f"the activation for block {self.names[0]!r} must have shape {list(expected.shape)}, "
                f"got {list(self.received.shape)}"
            )
        received = memory_layout.as_trained(self.net, self.received)
        received = noise.paired(received, self.noise) if self.net.training and self.noise else received
        return type(output)((received, *output[1:])) if isinstance(output, (tuple, list)) else received

    def _drop_boundaries(self) -> None:
        for block, path in enumerate(self.layout.paths.values()):
            if not self.first <= block < self.last:
                self.net.get_submodule(path).local = _NoBoundary()

    def _end_at(self, boundary: Boundary, hand_on: Callable[[Tensor], None]) -> None:
        learn = boundary.forward

        def forward(z, *rest, **more):
            if getattr(boundary.options, "bootstrapping", False) and boundary.training:
                hand_on(learn(z, *rest, **more))  # the posterior, which is known only now
            else:
                hand_on(z.detach())
                learn(z, *rest, **more)
            raise Left

        boundary.forward, boundary.noise = forward, 0.0  # noise is added where it is read


class _NoBoundary(nn.Module):
    """Stands where a block of another rank ends."""

    objective = options = None

    def inputs(self, args: tuple, kwargs: dict) -> tuple[tuple, None]:
        return (args, kwargs), None

    def forward(self, z: Tensor, *rest, **more) -> Tensor:
        return z


class _Skipped:
    """Computes shapes with a module on the meta device, once for each kind of input."""

    def __init__(self, module: nn.Module):
        self._run, self._known = module.forward, {}

    def __call__(self, *args, **kwargs):
        leaves, structure = tree_flatten((args, kwargs))
        key = (structure, *((x.shape, x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves))
        if key not in self._known:
            with torch.no_grad():
                self._known[key] = self._run(*args, **kwargs)
        return tree_map(lambda x: torch.empty_like(x) if isinstance(x, Tensor) else x, self._known[key])


def _plain(module: nn.Module) -> nn.Module:
    return module.plain() if isinstance(getattr(module, "local", None), Boundary) else module


def _shape_only(tensor: Tensor) -> Tensor:
    meta = torch.empty_like(tensor, device="meta")
    return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta
