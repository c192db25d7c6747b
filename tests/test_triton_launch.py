"""Launches that are repeated: what Triton is asked again for, and what it is not."""

import pytest
import torch

pytest.importorskip("triton")

from bllkern.backends.triton import _launch  # noqa: E402


class Kernel:
    """Counts what it is compiled for, and what is launched; as Triton's it is called as ``kernel[grid](...)``."""

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, num_warps):
            self.compiled.append((grid, arguments, num_warps))
            return Compiled(self)

        return compile_and_launch


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append((grid, arguments))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(_launch, "_compiled", {})
    monkeypatch.setattr(_launch, "_REPEATS", True)
    return Kernel()


def test_calls_alike_are_launched_without_a_look(kernel):
    x = torch.zeros(8)
    _launch.launch(kernel, (3,), x, None, 4, 0.5, True, "bernoulli", num_warps=2)
    assert kernel.compiled == [((3,), (x, None, 4, 0.5, True, "bernoulli"), 2)] and not kernel.launched
    other = torch.ones(8)
    _launch.launch(kernel, (5, 2), other, None, 4, 0.25, True, "bernoulli", num_warps=2)
    assert len(kernel.compiled) == 1 and kernel.launched[0] == ((5, 2, 1, 1), (other, None, 4, 0.25, True, "bernoulli"))


@pytest.mark.parametrize(
    "change",
    [
        lambda x, n: (x.double(), n, 8),
        lambda x, n: (torch.zeros(9)[1:], n, 8),  # no longer aligned to 16 bytes
        lambda x, n: (x, n + 1, 8),
        lambda x, n: (x, None, 8),
        lambda x, n: (x, n, 4),
    ],
    ids=["dtype", "alignment", "number", "none", "warps"],
)
def test_others_are_compiled_anew(kernel, change):
    x = torch.zeros(8)
    _launch.launch(kernel, (1,), x, 16)
    *arguments, warps = change(x, 16)
    _launch.launch(kernel, (1,), *arguments, num_warps=warps)
    assert len(kernel.compiled) == 2 and not kernel.launched


def test_so_many_are_known(kernel, monkeypatch):
    monkeypatch.setattr(_launch, "MOST_COMPILED", 4)
    for n in range(10):
        _launch.launch(kernel, (1,), torch.zeros(8), n)
        assert len(_launch._compiled) <= 4
    assert len(kernel.compiled) == 10


def test_sizes():
    assert [_launch.cdiv(n, 4) for n in (1, 4, 5)] == [1, 1, 2]
    assert [_launch.power_of_2(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
