"""Which block has which parameter: the leaves of an activation's graph, since the boundary before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from ..blocks import Boundary


class CrossedBoundary(RuntimeError):
    """A parameter or a tensor belongs to two blocks: the cuts are elsewhere than where all paths meet."""


def discover(boundary: Boundary, z: Tensor, owners: dict[int, Boundary]) -> None:
    """Note, once, which parameters were used since the previous boundary: the leaves of the activation's graph.

    ``owners`` has the boundary of every parameter that this step has met.  Raises :class:`CrossedBoundary` for one that an
    earlier block has: a local loss would move that block too.
    """
    if boundary.block_parameters is not None:
        return
    own = {id(p) for p in boundary.parameters()}  # the message that was there before the activation may be in its graph
    found = [p for p in leaves([z.grad_fn]).values() if id(p) not in own]
    for parameter in found if boundary.options.isolate else ():
        owner = owners.setdefault(id(parameter), boundary)
        if owner is not boundary:
            _forget(owners)
            raise CrossedBoundary(
                f"{boundary.label} also reaches a parameter {list(parameter.shape)} of {owner.label}: a tensor from "
                "before the previous boundary skips it, or both use one module. Cut where all paths meet"
            )
    boundary.block_parameters = found


def check_output(net: nn.Module, output, owners: dict[int, Boundary]) -> None:
    """Raise :class:`CrossedBoundary` if ``output`` depends on a parameter that a block has: two losses would move it.

    ``owners`` has the boundary of every parameter that this step has met.
    """
    sinks = [x.grad_fn for x in tree_leaves(output) if isinstance(x, Tensor)]
    for identity in leaves(sinks):
        if identity in owners:
            names = [name for name, p in net.named_parameters(remove_duplicate=False) if id(p) == identity]
            how = f"the parameter is tied to {names[1]!r}" if len(names) > 1 else "a tensor skips the boundaries"
            label = owners[identity].label
            _forget(owners)
            raise CrossedBoundary(
                f"the output of the network also reaches {names[0]!r} of {label}: {how}, or both use one module. "
                "Untie it, or cut where all paths meet"
            )


def _forget(owners: dict[int, Boundary]) -> None:
    """What was found is wrong: the next step, too, is to find it."""
    for boundary in owners.values():
        boundary.block_parameters = None


def leaves(nodes: Iterable[Node | None], without: Node | None = None) -> dict[int, nn.Parameter]:
    """The leaf tensors that the graph of ``nodes`` ends in, by identity, in a reproducible order.

    ``without``: a node beyond which not to look.
    """
    found, seen, stack = {}, {without}, list(nodes)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        stack.extend(function for function, _ in reversed(node.next_functions))
    return found
