"""Settings and fixtures of all tests."""

import os

# before torch loads OpenMP: threads that spin at barriers cost minutes where other processes share the cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402
import torch  # noqa: E402

from bllkern import _native, backends  # noqa: E402

from checks import available  # noqa: E402

torch.set_num_threads(2)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "op(name): the operation whose backends the `backend` fixture goes through")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


def pytest_generate_tests(metafunc):
    op = metafunc.definition.get_closest_marker("op")
    if op and "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", available(op.args[0]), indirect=True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For networks that are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=_native._C.isas if _native.error is None else [])
def isa(request):
    """Each instruction set of the compiled kernels that this CPU has."""
    chosen = _native._C.isa()
    _native._C.set_isa(request.param)
    yield request.param
    _native._C.set_isa(chosen)


@pytest.fixture
def backend(request):
    """Each backend that can run the op of the test (``pytest.mark.op``) on this CPU; ops run on it inside the test."""
    with backends.backend(request.param):
        yield request.param
