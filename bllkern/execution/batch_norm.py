"""Batch norms that get one value per channel, of which torch's error does not say which one it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .sizing import as_in_eval

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_ADVICE = (
    "needs more than one value per channel in training: give it a batch of at least 2 samples (a last, smaller batch "
    "can be dropped), or call its eval()"
)


def name_it(error: ValueError) -> None:
    """Let ``error``, if a batch norm has raised it for one value per channel, say which one."""
    if "more than 1 value per channel" not in str(error):
        return
    modules, frame = [], error.__traceback__
    while frame is not None:
        modules.append(frame.tb_frame.f_locals.get("self"))
        frame = frame.tb_next
    found = next((module for module in modules if isinstance(module, _BATCH_NORM)), None)
    for net in modules:
        names = {module: name for name, module in net.named_modules()} if isinstance(net, nn.Module) else {}
        if found in names:
            error.args = (f"batch norm {names[found]!r} {_ADVICE}. {error}",)
            return


@torch.no_grad()
def check(net: nn.Module, args: tuple, kwargs: dict) -> None:
    """Raise ``ValueError`` for a batch norm that gets one value per channel in ``net(*args, **kwargs)``."""
    training = {
        module: name for name, module in net.named_modules() if isinstance(module, _BATCH_NORM) and module.training
    }

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel() == inputs[0].shape[1]:
            raise ValueError(f"batch norm {training[module]!r} {_ADVICE}. It gets {list(inputs[0].shape)}")

    handles = [module.register_forward_pre_hook(look) for module in training]
    try:
        if training:
            with as_in_eval(net):
                net(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
