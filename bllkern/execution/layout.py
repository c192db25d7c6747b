"""Activations channels-last while a network of convolutions trains on a CPU.

The library that computes convolutions there (oneDNN) lays contiguous activations out anew for each of them and uses
channels-last ones as they are: a step takes a fifth to a third less time, and less memory.  What is computed from a
channels-last activation is channels-last too, so it is enough that the input of the network is.  The results are the
same up to rounding; but ``view`` may refuse such an activation, so whether a network runs on them is tried first, on
the example that :func:`bllkern.convert` got.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from . import sizing


def size(net: nn.Module, inputs: tuple) -> None:
    """:func:`.sizing.size`; from then on ``net`` trains channels-last if it has convolutions and can."""
    convolves = any(isinstance(module, nn.Conv2d) for module in net.modules())
    if convolves and any(map(_is_image, tree_leaves(inputs))):
        try:
            sizing.size(net, *tree_map(channels_last, inputs))
        except RuntimeError as error:
            if "view" not in str(error):
                raise
        else:
            net.register_forward_pre_hook(_enter, with_kwargs=True)
            net.register_forward_hook(_leave)
            return
    sizing.size(net, *inputs)


def attached(net: nn.Module) -> bool:
    """Whether ``net`` trains channels-last."""
    return _enter in net._forward_pre_hooks.values()


def as_trained(net: nn.Module, x: Tensor) -> Tensor:
    """``x``, which comes into the midst of ``net``, as it would be there in one pass."""
    return channels_last(x) if attached(net) and net.training and torch.is_grad_enabled() else x


def detach(net: nn.Module) -> None:
    """Let ``net`` and every module in it run on tensors as they come."""
    for module in net.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_enter, _leave)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def channels_last(x):
    """Images [N, C, H, W] on a CPU, in a precision that its convolutions are made for, channels-last; others as is."""
    if not _is_image(x):
        return x
    x = x.contiguous(memory_format=torch.channels_last)
    if x.shape[1] == 1:  # contiguous both ways: the strides say which is meant
        x = x.as_strided(x.shape, (x.stride(0), 1, x.stride(2), x.stride(3)))
    return x


def _is_image(x) -> bool:
    plain = isinstance(x, Tensor) and x.device.type == "cpu" and x.dim() == 4
    return plain and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _enter(net: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if net.training and torch.is_grad_enabled():
        return tree_map(channels_last, (args, kwargs))


def _leave(net: nn.Module, args: tuple, output):
    if net.training and torch.is_grad_enabled():
        return tree_map(lambda x: x.contiguous() if _is_image(x) else x, output)
