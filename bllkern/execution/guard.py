"""What only the whole network can notice: an output that reaches into a block, batch norm without a batch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import targets
from .schedules import leaves

if TYPE_CHECKING:
    from ..blocks import Boundary

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


def check_output(net: nn.Module, output, owners: dict[int, Boundary]) -> None:
    """Raise ``RuntimeError`` if ``output`` depends on a parameter that a block has: two losses would move it.

    ``owners`` has the boundary of every parameter that this step has met.
    """
    sinks = [x.grad_fn for x in tree_leaves(output) if isinstance(x, Tensor)]
    for identity in leaves(sinks):
        if identity in owners:
            names = [name for name, p in net.named_parameters(remove_duplicate=False) if id(p) == identity]
            how = f"the parameter is tied to {names[1]!r}" if len(names) > 1 else "a tensor skips the boundaries"
            raise RuntimeError(
                f"the output of the network also reaches {names[0]!r} of {owners[identity].label}: {how}, or both use "
                "one module. Untie it, or cut where all paths meet"
            )


class Guard:
    """Forward hook of a converted network: the check of its first output, and the name of a batch norm that fails."""

    def __init__(self, checked: bool):
        self.checked = checked

    def register(self, net: nn.Module) -> None:
        net.register_forward_hook(self, always_call=True)

    def __call__(self, net: nn.Module, args: tuple, output) -> None:
        if torch.compiler.is_compiling():
            return
        if output is None:  # the network raised; what a hook raises now would be lost
            _name_batch_norm(net, sys.exc_info()[1])
        elif not self.checked and net.training and torch.is_grad_enabled() and targets.given():
            self.checked = True
            check_output(net, output, targets.given().owners)


def remove(net: nn.Module) -> None:
    """Take the guard off ``net``."""
    for key, hook in list(net._forward_hooks.items()):
        if isinstance(hook, Guard):
            del net._forward_hooks[key]
            net._forward_hooks_always_called.pop(key, None)


def _name_batch_norm(net: nn.Module, error: BaseException | None) -> None:
    if not isinstance(error, ValueError) or "more than 1 value per channel" not in str(error):
        return
    names = {id(module): name for name, module in net.named_modules()}
    frame = error.__traceback__
    while frame is not None:
        module = frame.tb_frame.f_locals.get("self")
        if isinstance(module, _BATCH_NORM) and id(module) in names:
            error.args = (
                f"batch norm {names[id(module)]!r} needs more than one value per channel in training: give it a batch "
                f"of at least 2 samples (a last, smaller batch can be dropped), or call its eval(). {error}",
            )
            return
        frame = frame.tb_next
