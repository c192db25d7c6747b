"""Which backend runs an operation: chosen per device and dtype, or named by the user.

A backend is a module with one function per op it has, named and called as its schema in ``bllkern/_ops.py`` says, and
``unavailable(op, device_type, dtype)``: the reason why it cannot run an op there, or ``None``.
"""

from __future__ import annotations

import functools
import os
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _is_tracing
from torch.autograd import _profiler_enabled
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .. import _native, _ops
from . import cpu, cuda, reference, triton

BACKENDS = {"reference": reference, "cpu": cpu, "cuda": cuda, "triton": triton}
AUTOMATIC = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

LARGE_BYTES = 1 << 20  # from which on reading and writing a tensor takes a GPU longer than a launch

_named: str | None = None


def why_not(name: str, op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why backend ``name`` cannot run ``op`` on that device and dtype; ``None`` if it can.

    Raises ``ValueError`` where there is no backend of that name, or no such op.
    """
    _check_name(name, "backend")
    if op not in _ops.SCHEMAS:
        raise ValueError(f"op must be one of {sorted(_ops.SCHEMAS)}, got {op!r}")
    if name == "reference":
        return None
    return BACKENDS[name].unavailable(op, device_type, dtype)


@functools.lru_cache(maxsize=None)
def choose(op: str, device_type: str, dtype: torch.dtype, named: str | None = None) -> str:
    """The backend that runs ``op``: the one ``named``, which must be able to, or the first of the automatic order.

    Raises ``RuntimeError`` with the reason where the named one cannot run it, ``ValueError`` for an unknown name or op.
    """
    if named is not None:
        reason = why_not(named, op, device_type, dtype)
        if reason:
            raise RuntimeError(f"backend {named!r} cannot run {op} on {device_type} in {dtype}: {reason}")
        return named
    order = AUTOMATIC.get(device_type, ("reference",))
    return next(name for name in order if why_not(name, op, device_type, dtype) is None)


@functools.lru_cache(maxsize=None)
def _function(op, device_type, dtype, named):
    return getattr(BACKENDS[choose(op, device_type, dtype, named)], op)


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {sorted(BACKENDS)}, got {name!r}")
    return name


@contextmanager
def backend(name: str):
    """Run every op inside the ``with`` block on backend ``name``: ``reference``, ``cpu``, ``cuda`` or ``triton``.

    Raises ``ValueError`` for another name; an op that the backend cannot run raises ``RuntimeError`` with the reason.
    """
    global _named
    previous, _named = _named, _check_name(name, "backend")
    try:
        yield
    finally:
        _named = previous


_WITHOUT_PRODUCTS = ("batch_norm_relu", "batch_norm_relu_gradient")  # in which autocast would change nothing


def _kernel(op: str, device_type: str, args: tuple):
    function = _function(op, device_type, args[0].dtype, _named)
    if op in _WITHOUT_PRODUCTS or not torch.is_autocast_enabled(device_type):
        return function(*args)
    with torch.autocast(device_type, enabled=False):  # matrix products keep the precision that the op promises
        return function(*args)


_overloads = {}
for _op in _ops.SCHEMAS:
    _overloads[_op] = getattr(torch.ops.bllkern, _op).default
    for _device_type in ("cpu", "cuda"):
        _ops.impl(_op, lambda *args, call=(_op, _device_type): _kernel(*call, args), _device_type.upper())


def run(op: str, *args):
    """Op ``op`` of ``bllkern/_ops.py`` on its backend; at least one gradient is recorded by the caller, or none is due.

    Torch's dispatcher, which takes longer than a small loss itself, has a part in this only where it may have something
    to do: for a compiler, a tracer, a dispatch mode, a profiler, a subclass of Tensor, another device.
    """
    if not _observed() and _PLAIN.issuperset(map(type, args)):
        if args[0].is_cpu:
            return _kernel(op, "cpu", args)
        if args[0].is_cuda:
            return _kernel(op, "cuda", args)
    return _overloads[op](*args)


def small_linear_cross_entropy(*args) -> Tensor | None:
    """``linear_cross_entropy`` without gradients, of arguments as its caller gave them, where two calls of eager torch
    take no longer than our checks of them: ``None`` where they have to be made, or where another backend is named."""
    if _native.error or _named not in (None, "cpu") or _observed():
        return None
    return cpu.small_linear_cross_entropy(*args)


def small_hidden_layer(x: Tensor, weight: Tensor) -> bool:
    """Whether the compiled module has a kernel for the hidden layer of a head, which is no op: nobody may be there to
    replace it, nor another backend be named."""
    if _native.error or _named not in (None, "cpu") or _redirected() or torch.is_autocast_enabled("cpu"):
        return False
    return _PLAIN.issuperset((type(x), type(weight))) and cpu.small_hidden_layer(x, weight)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """``x.mul_(factor)``; a large ``x`` on a GPU is left alone where ``factor``, a scalar there, is 1."""
    large = x.is_cuda and x.nbytes >= LARGE_BYTES and factor.dim() == 0 and x.is_contiguous()
    if not large or triton.error or x.dtype not in triton.DTYPES:
        return x.mul_(factor)
    return triton.scale_(x, factor)


def normalized_relu(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``relu(batch_norm(x))`` by given mean and variance: what op ``batch_norm_relu`` made of them."""
    if choose("batch_norm_relu", x.device.type, x.dtype, _named) == "triton":
        return triton.normalized_relu(x, mean, variance, weight, bias, eps)
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps).relu_()


def _redirected() -> bool:
    return torch.compiler.is_compiling() or _is_tracing() or is_in_torch_dispatch_mode()


def _observed() -> bool:
    return _redirected() or _profiler_enabled()


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, bool, int, float, str, type(None)))


if "BLLKERN_BACKEND" in os.environ:
    _named = _check_name(os.environ["BLLKERN_BACKEND"], "environment variable BLLKERN_BACKEND")
