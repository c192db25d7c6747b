"""Normalisation, shortcut, ReLU and max pooling behind convolutions as one pass, in blocks that learn locally.

A local loss reads the activation of a convolutional block averaged to a few places a side, and what the block hands on
is detached.  So the gradient that comes back to the last convolution is known from those few places
(:func:`bllkern.functional.batch_norm_relu`), and no gradient of the whole activation is made.  Inside a block the same
function spares what torch's modules make between a convolution and the next.

This is done in an ``nn.Sequential``, and in the residual units of torchvision and :mod:`bllkern.models`; on a GPU where
tensors are large, or the step is recorded (:mod:`.capture`), since each launch of a kernel of ours takes the host longer
than one of torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn

from .. import backends
from ..functional import batch_norm_relu
from ..functional.convolution import cheap_to_repeat, normalized_convolution
from . import noise
from .capture import recording

_RESIDUAL = {
    (where, name)
    for where in ("bllkern.models.resnet", "torchvision.models.resnet")
    for name in ("BasicBlock", "Bottleneck")
}


LARGE_BYTES = 8 << 20  # that a unit inside a block reads, from which on the memory that one pass spares counts
LARGE_ON_GPU = 64 << 20  # of what is normalised, from which on one pass saves a GPU more than it costs the host


def run(module: nn.Module, x: Tensor, side: int = 0) -> tuple[Tensor, Tensor | None]:
    """``module(x)`` in training, and its average over at most ``side`` places a side where that comes with it."""
    if not _hooked(module):
        if type(module) is nn.Sequential:
            return _sequential(list(module), x, side)
        if is_residual(module):
            return _residual(module, x, side)
    return module(x), None


def is_residual(module: nn.Module) -> bool:
    """Whether ``module`` is a residual unit whose forward pass is known."""
    return (type(module).__module__, type(module).__qualname__) in _RESIDUAL


def attach(unit: nn.Module) -> None:
    """Let a residual unit that no boundary runs take its forward pass from here."""
    unit.forward = MethodType(_forward, unit)


def detach(unit: nn.Module) -> None:
    """Undo :func:`attach`."""
    del unit.forward


def attached(unit: nn.Module) -> bool:
    return getattr(vars(unit).get("forward"), "__func__", None) is _forward


def _forward(unit: nn.Module, x: Tensor) -> Tensor:
    if isinstance(x, noise.Pair):
        return noise.both(partial(_forward, unit), (x,), {})
    learns = unit.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if learns and x.nbytes >= LARGE_BYTES:
        return _residual(unit, x, 0)[0]
    return type(unit).forward(unit, x)


def _sequential(children: list[nn.Module], x: Tensor, side: int) -> tuple[Tensor, Tensor | None]:
    pooled, own = None, False
    while children:
        count = _fused(children)
        at_end = side if len(children) == max(count, 1) else 0
        batches: list[Batch] = []
        pool = children[2] if count == 3 else None
        found = _ended(children[0], x, own, at_end, batches, pool=pool) if count else None
        _update(batches)
        if found is None:
            found, count = run(children[0], x, at_end), 1
        (x, pooled), own, children = found, _is_plain(children[0]), children[count:]
    return x, pooled


def _fused(children: Sequence[nn.Module]) -> int:
    """How many of the first ``children`` are one pass: ``BatchNorm2d, ReLU[, MaxPool2d]``, or none."""
    if [type(child) for child in children[:2]] != [nn.BatchNorm2d, nn.ReLU]:
        return 0
    if not _usable(children[0]) or _hooked(children[1]):
        return 0
    pools = len(children) > 2 and type(children[2]) is nn.MaxPool2d and not _hooked(children[2])
    return 3 if pools and _window(children[2]) else 2


def _residual(unit: nn.Module, x: Tensor, side: int) -> tuple[Tensor, Tensor | None]:
    layers = [(unit.conv1, unit.bn1), (unit.conv2, unit.bn2)]
    if hasattr(unit, "conv3"):
        layers.append((unit.conv3, unit.bn3))
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    norms = [norm for _, norm in layers]
    known = all(map(_usable, norms)) and len({*norms}) == len(norms) and not _hooked(unit.relu) and x.dtype == dtype
    if not known or backends.choose("batch_norm_relu", kind, dtype) == "reference":
        return type(unit).forward(unit, x), None
    shortcut = x if unit.downsample is None else run(unit.downsample, x)[0]
    norm, batches, own = None, [], False
    for conv, after in layers:
        x = run(conv, x)[0] if norm is None else _next(norm, unit.relu, conv, x, own, batches)
        norm, own = after, _is_plain(conv)
    found = _ended(norm, x, own, side, batches, shortcut)
    _update(batches)
    return (unit.relu(norm(x) + shortcut), None) if found is None else found


def _next(
    norm: nn.BatchNorm2d, relu: nn.ReLU, conv: nn.Module, x: Tensor, own: bool, batches: list[Batch]
) -> Tensor:
    """``conv(relu(norm(x)))``, of which nothing but ``x`` is kept where that is cheap; if it is our ``own``, nobody else
    reads it."""
    if _is_plain(conv) and cheap_to_repeat(conv, x) and _applies(norm, x):
        out, mean, variance = normalized_convolution(conv, norm, x, own)
        batches.append((norm, _values(norm, x), mean, variance))
        return out
    found = _ended(norm, x, own, 0, batches)
    return run(conv, relu(norm(x)) if found is None else found[0])[0]


def _ended(
    norm: nn.BatchNorm2d,
    x: Tensor,
    own: bool,
    side: int,
    batches: list[Batch],
    shortcut: Tensor | None = None,
    pool: nn.MaxPool2d | None = None,
) -> tuple[Tensor, Tensor | None] | None:
    """Activation [N, C, H, W] and its average over at most ``side`` places a side; the statistics go to ``batches``.

    ``None`` where the op does not apply to the input of the normalisation.
    """
    window, ceil_mode = (1, False) if pool is None else (_window(pool), pool.ceil_mode)
    if not _applies(norm, x, 1 if ceil_mode else window):
        return None
    if shortcut is not None and (shortcut.shape != x.shape or shortcut.dtype != x.dtype):
        return None
    settings = (norm.eps, window, ceil_mode, side, shortcut, own)
    z, pooled, mean, variance = batch_norm_relu(x, norm.weight, norm.bias, *settings)
    batches.append((norm, _values(norm, x), mean, variance))
    return z, pooled if side else None


def _applies(norm: nn.BatchNorm2d, x: Tensor, smallest: int = 1) -> bool:
    """Whether there is a kernel for ``x`` [N, C, H, W] of at least ``smallest`` places a side that pays."""
    if x.is_cuda and x.nbytes < LARGE_ON_GPU and not recording():
        return False
    if x.dim() != 4 or x.shape[1] != norm.num_features or min(x.shape[2:]) < smallest or _values(norm, x) < 2:
        return False
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return dense and backends.choose("batch_norm_relu", x.device.type, x.dtype) != "reference"


def _values(norm: nn.BatchNorm2d, x: Tensor) -> int:
    return x.numel() // max(norm.num_features, 1)


Batch = tuple[nn.BatchNorm2d, int, Tensor, Tensor]  # a normalisation, values of each channel, their mean and variance


def _update(batches: list[Batch]) -> None:
    """The running statistics after ``batches``, each of another normalisation."""
    tracked = [batch for batch in batches if batch[0].track_running_stats]
    for momentum in dict.fromkeys(norm.momentum for norm, *_ in tracked):
        alike = (batch for batch in tracked if batch[0].momentum == momentum)
        norms, values, means, variances = zip(*alike, strict=True)
        running = [norm.running_mean for norm in norms], [norm.running_var for norm in norms]
        corrected = torch._foreach_mul(variances, [n / (n - 1) for n in values])
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
        for olds, news in zip(running, (means, corrected), strict=True):
            torch._foreach_lerp_(olds, [new.to(old.dtype) for old, new in zip(olds, news, strict=True)], momentum)


def _usable(norm: nn.Module) -> bool:
    """Whether ``norm`` is a ``BatchNorm2d`` that normalises by the batch and has weight and bias."""
    if type(norm) is not nn.BatchNorm2d or _hooked(norm):
        return False
    return norm.training and norm.affine and (norm.momentum is not None or not norm.track_running_stats)


def _is_plain(conv: nn.Module) -> bool:
    """Whether nobody but us has what ``conv`` returns."""
    return type(conv) is nn.Conv2d and "forward" not in vars(conv) and not _hooked(conv)


def _hooked(module: nn.Module) -> bool:
    """Whether hooks of ``module`` would have to see what goes in and comes out, or a compiler has it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or module._compiled_call_impl is not None


def _window(pool: nn.MaxPool2d) -> int | None:
    """The side of windows that lie side by side; ``None`` for others."""
    sides = {*_pair(pool.kernel_size), *_pair(pool.stride)}
    plain = not pool.return_indices and {*_pair(pool.padding)} == {0} and {*_pair(pool.dilation)} == {1}
    return sides.pop() if plain and len(sides) == 1 and sides <= {1, 2, 3} else None


def _pair(value) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)
