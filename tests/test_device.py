"""On a GPU: values, no waiting for the device, the current stream, CUDA graphs, bits that repeat; for every op.

Without a GPU the kernels' launchers run on tensors without values, so that whatever would wait for values raises.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bllkern import _ops, backends

from checks import available
from test_ops import raw_calls

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # which a build of torch without CUDA needs even for fakes
OPS = list(_ops.SCHEMAS)
CASES = [(op, name) for op in OPS for name in available(op, "cuda")]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def move(arguments, to):
    return [to(x) if isinstance(x, torch.Tensor) else x for x in arguments]


def results_of(op, arguments):
    """What the op returned, as a list of tensors."""
    results = getattr(torch.ops.bllkern, op).default(*arguments)
    results = [results] if isinstance(results, torch.Tensor) else results
    return [x for x in results if x is not None]


def on_gpu(op, dtype=torch.float32):
    """The arguments of each call of :func:`raw_calls` on the GPU, activations and messages in ``dtype``.

    The bias of ``linear_agreement`` too, which a matrix product takes in the dtype of the rest.
    """
    for arguments in raw_calls(op, True):
        low = move(arguments, lambda x: x.to(dtype) if x.dtype == torch.float32 and x.dim() > 1 else x)
        if op == "linear_agreement" and low[2] is not None:
            low[2] = low[2].to(dtype)
        yield move(low, lambda x: x.cuda())


@pytest.fixture
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("op, backend", CASES, indirect=["backend"])
def test_values(op, backend, dtype):
    for arguments in on_gpu(op, dtype):
        exact = move(arguments, lambda x: x.cpu().double() if x.is_floating_point() else x.cpu())
        with backends.backend("reference"):
            expected = results_of(op, exact)
        for x, e in zip(results_of(op, arguments), expected, strict=True):
            error = (x.cpu().double() - e.double()).norm()
            assert error <= (1e-5 if dtype == torch.float32 else 2e-2) * e.double().norm().clamp(min=1e-3)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("op, backend", CASES, indirect=["backend"])
def test_bits_repeat(op, backend, dtype):
    for arguments in on_gpu(op, dtype):
        first = results_of(op, arguments)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, results_of(op, arguments), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("op, backend", CASES, indirect=["backend"])
def test_does_not_wait_for_the_device(op, backend, no_waiting):
    torch.cuda.set_sync_debug_mode("default")
    calls = list(on_gpu(op))
    torch.cuda.set_sync_debug_mode("error")
    for arguments in calls:
        results_of(op, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("op, backend", CASES, indirect=["backend"])
def test_runs_on_the_current_stream(op, backend):
    """The inputs are there only once the side stream has slept; a kernel on another stream would read zeros."""
    for arguments in on_gpu(op):
        expected = results_of(op, arguments)
        late = move(arguments, torch.zeros_like)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for x, y in zip(late, arguments, strict=True):
                if isinstance(x, torch.Tensor):
                    x.copy_(y)
            results = results_of(op, late)
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("op, backend", CASES, indirect=["backend"])
def test_replays_from_a_cuda_graph(op, backend):
    for arguments in on_gpu(op):
        other = move(arguments, lambda x: 1.5 * x if x.is_floating_point() else x.roll(1, 0))
        expected = results_of(op, other)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results_of(op, arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = results_of(op, arguments)
        for x, y in zip(arguments, other, strict=True):
            if isinstance(x, torch.Tensor):
                x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.gpu
@DTYPES
def test_linear_cross_entropy_adds_up_chunks(dtype, monkeypatch):
    chunked = pytest.importorskip("bllkern.backends.triton.linear_cross_entropy")
    monkeypatch.setattr(chunked, "LOGITS", 64 * 12)
    monkeypatch.setattr(chunked, "CHUNK", 128 * 12)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((200, 24), (12, 24), (12,)))
    arguments = x, weight, bias, torch.randint(12, (200,)), 0.1, "mean", -100, True, True, True
    exact = move(arguments, lambda t: t.double() if t.is_floating_point() else t)
    expected = backends.reference.linear_cross_entropy(*exact)
    for got, e in zip(results_of("linear_cross_entropy", move(arguments, lambda t: t.cuda())), expected, strict=True):
        assert (got.cpu().double() - e).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * e.norm()


@pytest.fixture
def without_launches(monkeypatch):
    """Triton kernels are called, with their grid, and do nothing."""
    launches = []

    def launch(kernel, grid):
        return lambda *args, **kwargs: launches.append((kernel, grid))

    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.runtime.JITFunction, "__getitem__", launch)
    monkeypatch.setattr(backends.triton._launch, "_kind", lambda argument: None)  # which reads where values lie
    return launches


@DTYPES
@pytest.mark.parametrize("wanted", [False, True], ids=["loss", "gradients"])
@pytest.mark.parametrize("op, name", [case for case in CASES if case[1] in ("triton", "reference")])
def test_reads_no_values_on_the_host(op, name, wanted, dtype, without_launches, monkeypatch):
    """``.item()``, branches on values and shapes that depend on them raise for tensors without values."""
    monkeypatch.setattr(backends.reference, "check_labels", lambda *args: None)  # which looks at values on the CPU only
    for arguments in raw_calls(op, wanted):
        with FakeTensorMode():
            fake = move(arguments, lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE))
            fake = move(fake, lambda x: x.to(dtype) if x.dtype == torch.float32 and x.dim() > 1 else x)
            results = getattr(backends.BACKENDS[name], op)(*fake)
        results = [results] if isinstance(results, torch.Tensor) else results
        assert all(x is None or isinstance(x, FakeTensor) for x in results)
    assert without_launches or name == "reference"
