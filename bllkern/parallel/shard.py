"""FSDP2 inside the blocks: what the rows of a mesh would copy is divided among them, and gathered while it is used.

torch's ``fully_shard`` divides the parameters of a module, their gradients and with them the optimizer states; it works
by hooks on the module's forward pass.  So it takes the largest modules of a rank that lie between two boundaries: their
forward pass has ended when the local loss is backpropagated.  What is left is averaged over the rows as without it:
heads and feedback, which boundaries read, layers that are blocks by themselves (``BlockLocalLinear``), and weights that
several modules share.
"""

from __future__ import annotations

from collections import defaultdict

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..blocks import Boundary
from ..network import boundaries
from .part import Part


def shard(part: Part, group: dist.ProcessGroup, device_type: str) -> list[nn.Module]:
    """Divide the parameters of ``part`` among the ranks of ``group``; the modules that are divided.

    These parameters become ``DTensor`` [the same shape], divided along the first dimension.  They are not those of the
    original network any more, which keeps its numbers.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, device_type)
    before = dict(part.net.named_parameters())
    found = _units(part)
    for module in found:
        fully_shard(module, mesh=mesh)
    after = dict(part.net.named_parameters())
    replaced = {id(parameter): after[name] for name, parameter in before.items()}
    for boundary in boundaries(part.net).values():
        boundary.block_parameters = [replaced[id(p)] for p in boundary.block_parameters]
    return found


def _units(part: Part) -> list[nn.Module]:
    """The largest modules that are called, have parameters of this rank only, share none, and contain no boundary."""
    own, holders = set(part.own), defaultdict(set)
    for name, parameter in part.net.named_parameters(remove_duplicate=False):
        holders[id(parameter)].add(name)
    called = part.layout.called

    def units(module: nn.Module, path: str):
        names = [f"{path}.{name}" if path else name for name, _ in module.named_parameters(remove_duplicate=False)]
        shared = any(not holders[id(p)] <= set(names) for p in module.parameters())
        bounded = any(isinstance(m, Boundary) or getattr(m, "local", None) is not None for m in module.modules())
        if names and path in called and own.issuperset(names) and not shared and not bounded:
            yield module
        else:
            for name, child in module.named_children():
                yield from units(child, f"{path}.{name}" if path else name)

    return list(units(part.net, ""))
