"""Compiles Triton kernels ahead of time, which needs no GPU, and reads what they use from the cubin."""

from __future__ import annotations

import inspect
import os
import pathlib
import re
import subprocess
import tempfile

import triton
from triton.backends import compiler
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# arithmetic is in float32 whatever the dtype; only the conversions of bfloat16 differ between architectures
VARIANTS = (("fp32", 90), ("fp16", 90), ("bf16", 80), ("bf16", 90), ("bf16", 100))
# triton 3.3 changed the form of sources, and brought sm_100
_SINCE_3_3 = "constexprs" in inspect.signature(ASTSource).parameters
if not _SINCE_3_3:
    VARIANTS = VARIANTS[:-1]
_CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_kernel(kernel, types: dict, constants: dict, architecture: int, num_warps: int):
    """What the compiler made of ``kernel``, by stage (``"ptx"``, ``"cubin"``).

    Pointers are aligned to 16 bytes, as torch allocates them.

    Args:
        types: of the arguments that are no constants, such as ``"*bf16"`` or ``"i32"``.
        constants: ``tl.constexpr`` arguments, ``None`` for pointers that are not given, and sizes to specialise for.
        architecture: 80, 90 or, from triton 3.3, 100.
    """
    names = kernel.arg_names
    pointers = [i for i, name in enumerate(names) if types.get(name, "").startswith("*")]
    if _SINCE_3_3:
        signature = {name: types.get(name, "constexpr") for name in names}
        source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointers})
    else:
        aligned = compiler.AttrsDescriptor.from_hints(dict.fromkeys(pointers, 16))
        source = ASTSource(kernel, {name: types[name] for name in names if name in types}, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": num_warps})
    return compiled.asm


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread (REG), and bytes of stack, which is where spilled registers go (STACK), and shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        pathlib.Path(path).write_bytes(cubin)
        command = [str(_CUOBJDUMP), "--dump-resource-usage", path]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def assert_compiles_without_spills(kernel, types, constants, architecture: int, num_warps: int) -> str:
    """Returns the PTX."""
    asm = compile_kernel(kernel, types, constants, architecture, num_warps)
    usage = resource_usage(asm["cubin"])
    assert usage["STACK"] == usage["LOCAL"] == 0, f"{kernel} spills registers on sm_{architecture}: {usage}"
    return asm["ptx"]
