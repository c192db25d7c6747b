"""Which backend runs an op: named, from the environment, or chosen; and what is said where one cannot run."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bllkern
from bllkern import _native, _ops, backends
from bllkern.functional import agreement

from checks import Results, available

OPS = list(_ops.SCHEMAS)
COMPILED = importlib.util.find_spec("bllkern._C") is not None


@pytest.fixture
def spy(monkeypatch):
    """Counts the calls of each backend's ``agreement``; the choices that were cached are forgotten around the test."""
    calls = dict.fromkeys(backends.BACKENDS, 0)

    def count(name, function):
        def counted(*args):
            calls[name] += 1
            return function(*args)

        return counted

    backends._function.cache_clear()
    for name, module in backends.BACKENDS.items():
        if hasattr(module, "agreement"):
            monkeypatch.setattr(module, "agreement", count(name, module.agreement))
    yield calls
    backends._function.cache_clear()


def run_python(code, **environment):
    """A fresh interpreter that imports the same package."""
    path = os.pathsep.join([str(Path(bllkern.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    clean = {name: value for name, value in os.environ.items() if name != "BLLKERN_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | {"PYTHONPATH": path} | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device_type", ["cpu", "cuda", "meta"])
def test_the_reference_runs_everything(op, dtype, device_type):
    assert backends.why_not("reference", op, device_type, dtype) is None
    assert backends.choose(op, device_type, dtype, "reference") == "reference"
    assert callable(getattr(backends.reference, op))


@pytest.mark.parametrize("op", OPS)
def test_a_compiled_module_that_is_there_is_used(op):
    """A module that is there but does not load, or a kernel that is there but never chosen, would go unnoticed."""
    reason = backends.why_not("cpu", op, "cpu", torch.float32)
    if not COMPILED:
        assert "bllkern._C" in reason and backends.choose(op, "cpu", torch.float32) == "reference"
        return
    assert _native.error is None
    if hasattr(backends.cpu, op):
        assert reason is None
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert backends.choose(op, "cpu", dtype) == "cpu"
    else:
        assert "no kernel" in reason and backends.choose(op, "cpu", torch.float32) == "reference"


@pytest.mark.parametrize("op", OPS)
def test_automatic_choice_is_the_first_that_can(op):
    runnable = available(op)
    order = [name for name in backends.AUTOMATIC["cpu"] if name in runnable]
    assert backends.choose(op, "cpu", torch.float32) == order[0]
    assert set(runnable) <= {"cpu", "triton", "reference"} and "reference" in runnable


def test_float64_falls_back_to_the_reference(spy):
    assert backends.why_not("cpu", "agreement", "cpu", torch.float64) is not None
    assert backends.choose("agreement", "cpu", torch.float64) == "reference"
    agreement(torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64))
    assert spy == dict.fromkeys(spy, 0) | {"reference": 1}


@pytest.mark.parametrize("name", available("agreement"))
def test_the_named_backend_runs(spy, name):
    with backends.backend(name):
        agreement(torch.randn(2, 3), torch.randn(2, 3))
    assert spy == dict.fromkeys(spy, 0) | {name: 1}


@pytest.mark.parametrize(
    "name, device_type, dtype, reason",
    [
        ("cpu", "cuda", torch.float32, "CPU only"),
        ("cuda", "cpu", torch.float32, "CUDA devices only"),
        ("cpu", "cpu", torch.float64, "kernels take torch.float32" if COMPILED else "bllkern._C is not there"),
        ("cpu", "meta", torch.float32, "CPU only"),
        ("triton", "meta", torch.float32, "CUDA devices|cannot be imported"),
    ],
)
def test_a_named_backend_that_cannot_run_raises_with_the_reason(name, device_type, dtype, reason):
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run agreement on {device_type} in .*{reason}"):
        backends.choose("agreement", device_type, dtype, name)


def test_no_op_falls_back_from_a_named_backend(spy):
    x = torch.randn(2, 3)
    with backends.backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' cannot run agreement on cpu"):
        agreement(x, x)
    with backends.backend("cuda"), pytest.raises(RuntimeError, match="CUDA devices only"):
        agreement(x.requires_grad_(), x)
    assert not any(spy.values())


def test_names_nest_and_end_with_the_block():
    before = backends._named
    with backends.backend("reference"):
        with backends.backend("cuda"):
            assert backends._named == "cuda"
        assert backends._named == "reference"
    with pytest.raises(KeyError), backends.backend("reference"):
        raise KeyError
    assert backends._named == before


@pytest.mark.parametrize("name", ["", "numpy", "CPU", "Reference"])
def test_unknown_names_raise(name):
    with pytest.raises(ValueError, match=r"backend must be one of \['cpu', 'cuda', 'reference', 'triton'\], got '"):
        with backends.backend(name):
            pass


@pytest.mark.parametrize("ask", [backends.why_not, lambda name, op, *rest: backends.choose(op, *rest, named=name)])
def test_unknown_names_and_ops_are_refused_with_the_allowed_ones(ask):
    with pytest.raises(ValueError, match=r"backend must be one of \['cpu', 'cuda', 'reference', 'triton'\], got 'tpu'"):
        ask("tpu", "agreement", "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"op must be one of \['agreement', .*\], got 'agree'"):
        ask("cpu", "agree", "cpu", torch.float32)


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


def test_the_dispatcher_is_left_out_only_where_nothing_listens(spy, monkeypatch):
    """Modes, subclasses and the profiler see the op as such; a plain call reaches the same kernel without it."""
    dispatched = []
    monkeypatch.setitem(backends._overloads, "agreement", lambda *args: dispatched.append(1) or _ops_agreement(*args))
    a, b = torch.randn(2, 2, 3)
    plain = agreement(a, b)
    assert not dispatched and sum(spy.values()) == 1
    results = Results()
    with results:
        seen = [agreement(a, b)]
    assert len(dispatched) == 1 and len(results.kept) == 1
    seen.append(agreement(a, b.as_subclass(Plain)))
    assert len(dispatched) == 2
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        seen.append(agreement(a, b))
    assert "bllkern::agreement" in {event.key for event in profile.key_averages()}
    assert all(torch.equal(x.as_subclass(torch.Tensor), plain) for x in seen)


_ops_agreement = torch.ops.bllkern.agreement.default


def test_the_environment_names_a_backend():
    code = "from bllkern import backends; print(backends._named)"
    result = run_python(code, BLLKERN_BACKEND="reference")
    assert result.stdout.strip() == "reference", result.stderr


def test_a_backend_from_the_environment_must_run():
    code = "import torch; from bllkern.functional import agreement; agreement(torch.ones(1, 2), torch.ones(1, 2))"
    result = run_python(code, BLLKERN_BACKEND="cuda")
    assert result.returncode == 1 and "backend 'cuda' cannot run agreement on cpu" in result.stderr


def test_an_unknown_backend_in_the_environment_raises():
    result = run_python("import bllkern", BLLKERN_BACKEND="fast")
    assert result.returncode == 1
    assert "environment variable BLLKERN_BACKEND must be one of" in result.stderr and "got 'fast'" in result.stderr


def test_the_package_works_without_the_compiled_module():
    code = """
import sys
sys.modules["bllkern._C"] = None
import torch
from bllkern import backends, functional
print(backends.choose("agreement", "cpu", torch.float32))
functional.agreement(torch.ones(1, 2), torch.ones(1, 2))
print(backends.why_not("cpu", "agreement", "cpu", torch.float32))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    chosen, reason = result.stdout.splitlines()
    assert chosen == "reference" and "bllkern._C is not there" in reason


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_on_a_gpu_the_first_that_can_is_chosen(op):
    runnable = available(op, "cuda")
    order = [name for name in backends.AUTOMATIC["cuda"] if name in runnable]
    assert backends.choose(op, "cuda", torch.float32) == order[0]
