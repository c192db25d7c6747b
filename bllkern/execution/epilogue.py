"""Blocks that end with batch normalisation, ReLU and max pooling: activation and pooled features from one pass.

A local loss reads the activation of a convolutional block averaged to a few places a side, and what the block hands on
is detached.  So the gradient that comes back to the convolution is known from those few places
(:func:`bllkern.functional.batch_norm_relu`), and no gradient of the whole activation is made.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .. import backends
from ..functional import batch_norm_relu


class Epilogue(NamedTuple):
    """What a ``Sequential`` ends with, and what comes before that."""

    before: list[nn.Module]
    norm: nn.BatchNorm2d
    max_pool: int
    ceil_mode: bool

    def __call__(self, x: Tensor, side: int) -> tuple[Tensor, Tensor] | None:
        """Activation [N, C, H, W] and its average over at most ``side`` places a side, the running statistics updated.

        ``None`` where the op does not apply to the input of the normalisation.
        """
        norm = self.norm
        values = x.numel() // max(norm.num_features, 1)
        smallest = 1 if self.ceil_mode else self.max_pool
        if x.dim() != 4 or x.shape[1] != norm.num_features or min(x.shape[2:]) < smallest or values < 2:
            return None
        if not x.is_contiguous() or backends.choose("batch_norm_relu", x.device.type, x.dtype) == "reference":
            return None
        settings = (norm.eps, self.max_pool, self.ceil_mode, side)
        z, pooled, mean, variance = batch_norm_relu(x, norm.weight, norm.bias, *settings)
        if norm.track_running_stats:
            norm.num_batches_tracked.add_(1)
            norm.running_mean.lerp_(mean.to(norm.running_mean), norm.momentum)
            norm.running_var.lerp_((variance * (values / (values - 1))).to(norm.running_var), norm.momentum)
        return z, pooled


def of(module: nn.Module) -> Epilogue | None:
    """The epilogue of ``module``, or ``None``.

    A ``Sequential`` has one that ends in ``BatchNorm2d`` in training, ``ReLU`` and perhaps ``MaxPool2d`` of windows side
    by side, without hooks that would have to see what lies between.
    """
    if type(module) is not nn.Sequential:
        return None
    children = list(module)
    window, ceil_mode, begin = 1, False, len(children) - 2
    if children and type(children[-1]) is nn.MaxPool2d:
        window, ceil_mode, begin = _window(children[-1]), children[-1].ceil_mode, len(children) - 3
    replaced = children[max(begin, 0) :]
    if window is None or [type(child) for child in replaced[:2]] != [nn.BatchNorm2d, nn.ReLU]:
        return None
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in (module, *replaced)):
        return None
    norm = replaced[0]
    usable = norm.training and norm.affine and (norm.momentum is not None or not norm.track_running_stats)
    return Epilogue(children[:begin], norm, window, ceil_mode) if usable else None


def _window(pool: nn.MaxPool2d) -> int | None:
    """The side of windows that lie side by side; ``None`` for others."""
    sides = {*_pair(pool.kernel_size), *_pair(pool.stride)}
    plain = not pool.return_indices and {*_pair(pool.padding)} == {0} and {*_pair(pool.dilation)} == {1}
    return sides.pop() if plain and len(sides) == 1 and sides <= {1, 2, 3} else None


def _pair(value) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def run(module: nn.Module, x: Tensor, side: int) -> tuple[Tensor, Tensor | None]:
    """``module(x)``, and its average over at most ``side`` places a side where that comes with it."""
    found = of(module)
    if found is None:
        return module(x), None
    for child in found.before:
        x = child(x)
    result = found(x, side)
    if result is not None:
        return result
    for child in list(module)[len(found.before) :]:
        x = child(x)
    return x, None
