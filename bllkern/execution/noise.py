"""Two inputs of a block side by side, the second with noise: what denoising compares the outputs of (BLL).

A block is whatever lies between two boundaries, in code that nobody but the network knows.  So the boundary hands on a
:class:`Pair`, and every torch function that meets one is called twice, on what is clean and then on what is noisy.  The
module at whose end the next boundary stands runs twice as a whole, on plain tensors.  The output block gets no pair.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from . import sizing, targets

EMBEDDINGS = (F.embedding, F.embedding_bag, torch.embedding)  # where integers become numbers that noise can be added to

OPAQUE = (
    "an autograd.Function or an extension reads the activation there; cut after the module that calls it, which then "
    "runs on plain tensors"
)


class Pair(Tensor):
    """Stands for the tensor ``clean``; torch functions of it are computed of ``noisy``, of the same shape, too.

    ``std``: of integers, the standard deviation of the noise that their embeddings get.
    """

    @staticmethod
    def __new__(cls, clean: Tensor, noisy: Tensor, std: float = 0.0):
        learns = clean.requires_grad or noisy.requires_grad
        return Tensor._make_wrapper_subclass(
            cls, clean.shape, dtype=clean.dtype, device=clean.device, requires_grad=learns
        )

    def __init__(self, clean: Tensor, noisy: Tensor, std: float = 0.0):
        vars(self).update(clean=clean, noisy=noisy, std=std)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return both(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"denoising cannot follow {func} between two boundaries: {OPAQUE}")


def both(func: Callable, args: tuple, kwargs: dict):
    """What ``func`` makes of what is clean and then of what is noisy in its arguments, as pairs."""
    given = (args, kwargs)
    clean, noisy = (func(*args, **kwargs) for args, kwargs in (half(given, "clean"), half(given, "noisy")))
    std = max(vars(x)["std"] for x in pairs(given))
    return tree_map(partial(_pair, std=std, embedded=func in EMBEDDINGS), clean, noisy)


def _pair(clean, noisy, std: float, embedded: bool):
    """A result, of which ``noisy`` is what came of the noisy arguments."""
    if not isinstance(clean, Tensor):
        return clean
    if not clean.is_floating_point():
        return Pair(clean, noisy, std)
    return Pair(clean, noisy + std * torch.randn_like(noisy) if embedded and std else noisy)


def wanted() -> bool:
    """Whether blocks may learn from what is computed now."""
    return torch.is_grad_enabled() and targets.given() is not None and not sizing.active()


def paired(x, std: float):
    """``x`` with itself and Gaussian noise of standard deviation ``std``; integers get it where they are embedded."""
    if not isinstance(x, Tensor) or isinstance(x, Pair):
        return x
    if not x.is_floating_point():
        return Pair(x, x, std)
    return Pair(x, x + std * torch.randn_like(x))


def pairs(tree) -> list[Pair]:
    return [x for x in tree_leaves(tree) if isinstance(x, Pair)]


def half(tree, name: str):
    """``tree`` with what is ``"clean"`` or what is ``"noisy"`` in the place of pairs."""
    return tree_map(lambda x: _half(x, name) if isinstance(x, Pair) else x, tree)


def _half(pair: Pair, name: str) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        if pair.grad_fn is not None:  # autograd has seen it, and not what it stands for
            raise RuntimeError(f"denoising cannot follow {pair.grad_fn.name()} between two boundaries: {OPAQUE}")
    return vars(pair)[name]


def apart(tree) -> tuple[object, object]:
    """``tree`` with what is clean in the place of pairs, and with what is noisy: pairs, where all are of integers."""
    floating = any(x.is_floating_point() for x in pairs(tree))
    return half(tree, "clean"), half(tree, "noisy") if floating else tree


class Noise:
    """Forward hooks of a converted network: in a training step, its inputs become pairs, and its outputs plain."""

    def __init__(self, std: float):
        self.std = std

    @torch.compiler.disable
    def begin(self, net: nn.Module, args: tuple, kwargs: dict):
        return tree_map(partial(paired, std=self.std), (args, kwargs)) if wanted() else None

    @torch.compiler.disable
    def end(self, net: nn.Module, args: tuple, output):
        return half(output, "clean")


def attach(net: nn.Module, std: float) -> None:
    """Let the first block of ``net`` get its inputs with noise too."""
    noise = Noise(std)
    net.register_forward_pre_hook(noise.begin, with_kwargs=True)
    net.register_forward_hook(noise.end)


def detach(net: nn.Module) -> None:
    """Undo :func:`attach`."""
    for hooks in (net._forward_pre_hooks, net._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Noise)]:
            del hooks[key]
            net._forward_pre_hooks_with_kwargs.pop(key, None)
