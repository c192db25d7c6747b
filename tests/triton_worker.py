"""Runs ops on the Triton interpreter in a process of its own: TRITON_INTERPRET must be set before triton is imported.

The parent sends ``(op, args)`` and receives ``(results, error)``, pickled by torch, each behind its length in 8 bytes.
"""

from __future__ import annotations

import atexit
import functools
import io
import os
import pathlib
import subprocess
import sys

import torch


def _send(stream, message) -> None:
    buffer = io.BytesIO()
    torch.save(message, buffer)
    stream.write(buffer.tell().to_bytes(8, "little") + buffer.getvalue())
    stream.flush()


def _receive(stream):
    length = int.from_bytes(stream.read(8), "little")
    return torch.load(io.BytesIO(stream.read(length)), weights_only=True) if length else None


@functools.lru_cache(maxsize=None)
def _worker() -> subprocess.Popen:
    root = str(pathlib.Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    settings = {"TRITON_INTERPRET": "1", "BLLKERN_BACKEND": "triton", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, __file__], env={**os.environ, **settings}, **pipes)
    atexit.register(process.stdin.close)
    return process


def run(op: str, *args):
    """``torch.ops.bllkern.<op>(*args)`` on the Triton backend, interpreted on the CPU.

    Or the backend's function of that name, which is no op.  From the gradient of ``batch_norm_relu`` with ``over_x`` the
    tensor that it has changed, in place of that by x.
    """
    process = _worker()
    _send(process.stdin, (op, args))
    reply = _receive(process.stdout)
    assert reply is not None, f"the worker died in {op}{args[1:]}"
    results, error = reply
    assert not error, error
    return results


def _repair_interpreter() -> None:
    """Two defects: before triton 3.7 loop bounds are made by ``int`` from arrays [1], which numpy 2.4 refuses; and all
    versions cut float32 off to bfloat16, where GPUs round to nearest even."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    patch, cast = interpreter._patch_lang_tensor, builder.cast_impl

    def patch_lang_tensor(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def cast_impl(self, source, dtype):
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            bits = source.data.view("uint32")
            rounded = (bits + 0x7FFF + (bits >> 16 & 1)).astype("uint32").view("float32")
            source = interpreter.TensorHandle(rounded, source.dtype)
        return cast(self, source, dtype)

    interpreter._patch_lang_tensor = patch_lang_tensor
    builder.cast_impl = cast_impl


def _serve() -> None:
    import importlib
    import traceback

    import bllkern
    from bllkern import _ops

    _repair_interpreter()
    # chunks of the least number of rows, 64, so that small inputs take several, and of heads up to 128 in pieces of 64
    importlib.import_module("bllkern.backends.triton.gram").CHUNK = 1
    head = importlib.import_module("bllkern.backends.triton.linear_cross_entropy")
    head.LOGITS, head.CHUNK = 1, 400
    replies, sys.stdout = sys.stdout.buffer, sys.stderr
    while (request := _receive(sys.stdin.buffer)) is not None:
        op, args = request
        try:
            results = getattr(torch.ops.bllkern if op in _ops.SCHEMAS else bllkern.backends.triton, op)(*args)
            if op == "batch_norm_relu_gradient" and args[-1]:
                results = args[0].contiguous(memory_format=_ops.layout(args[0])), *results[1:]
            reply = (results,) if isinstance(results, torch.Tensor) else tuple(results), ""
        except Exception:
            reply = (), traceback.format_exc()
        _send(replies, reply)


if __name__ == "__main__":
    _serve()
