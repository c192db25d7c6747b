"""``bllkern info``: versions, what was built, and which backend runs each operation."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

import bllkern

from .. import _native, _ops, backends

PACKAGES = ("torch", "triton", "numpy")
DTYPE = torch.float32
LINE = "  {:26}"


def run(args: argparse.Namespace) -> int:
    print(f"bllkern   {bllkern.__version__}")
    print(f"python    {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        print(f"{package:9} {_version(package)}")
    print(f"CUDA      {_cuda()}")
    print(f"threads   {torch.get_num_threads()}")
    print("\ncompiled module")
    for name, value in _built().items():
        print(LINE.format(name) + value)
    _print_choices()
    print("\nbllkern --help lists the commands")
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    if torch.version.cuda is None:
        return "torch is built without it"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, no GPU found"
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"{torch.version.cuda} on {names}"


def _built() -> dict[str, str]:
    if _native.error:
        return {"not built": _native.error}
    built = _native._C
    cuda = f"toolkit {built.cuda_version}, {built.cuda_architectures}" if built.cuda_built else "none (BLLKERN_CUDA)"
    return {
        "compiler": built.compiler,
        "CPU instructions": f"{built.isa()}, of {', '.join(built.isas)} that this machine has",
        "CUDA kernels": cuda,
    }


def _print_choices() -> None:
    """Which backend runs each operation on each device, and why the others do not."""
    devices = list(backends.AUTOMATIC)
    print(f"\nbackend of each operation in {str(DTYPE).removeprefix('torch.')}" + _named())
    print(LINE.format("") + "".join(f"on {device:12}" for device in devices).rstrip())
    for op in _ops.SCHEMAS:
        chosen = [_chosen(op, device) for device in devices]
        print(LINE.format(op) + "".join(f"{name:15}" for name in chosen).rstrip())
    print("\nwhy not another")
    for device in devices:
        for name in backends.BACKENDS:
            _print_reasons(name, device)


def _named() -> str:
    return f" (BLLKERN_BACKEND={backends._named})" if backends._named else ""


def _chosen(op: str, device: str) -> str:
    try:
        return backends.choose(op, device, DTYPE, backends._named)
    except RuntimeError:  # the backend that the environment names cannot run it; the reason is printed below
        return "none"


def _print_reasons(name: str, device: str) -> None:
    """The reasons against one backend on one device, each once, with the operations that it holds for."""
    reasons: dict[str, list[str]] = {}
    for op in _ops.SCHEMAS:
        reason = backends.why_not(name, op, device, DTYPE)
        if reason:
            reasons.setdefault(reason, []).append(op)
    for reason, ops in reasons.items():
        which = "" if len(ops) == len(_ops.SCHEMAS) else f" ({', '.join(ops)})"
        print(LINE.format(f"{name} on {device}") + reason + which)
