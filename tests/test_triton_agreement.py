"""The Triton agreement kernels, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
triton_worker = pytest.importorskip("triton_worker")

from bllkern import families  # noqa: E402
from bllkern.backends import reference  # noqa: E402

FAMILIES = ("bernoulli", "categorical", "gaussian", "gaussian_learned", "poisson")
# where results are as small as exp(-60): the kernels' exp has a relative error of |x| 2^-24
EXP_ERROR = 60 * 2**-24
# odd sizes, both sides of a tile edge (2048 elements), several tiles
SHAPES = ((4, 4), (3, 6), (5, 38), (2, 3, 14), (1, 2046), (1, 2048), (1, 2050), (3, 2052), (130, 16), (2, 4100))


def parameters(shape, family, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return families.get(family).natural(torch.randn(shape, generator=generator) * scale)


def relative_error(got, expected):
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def compare(args, tolerance):
    got = triton_worker.run("agreement", *args)
    a, b, *settings = args
    expected = reference.agreement(a.double(), b.double(), *settings)
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        assert relative_error(x, y) <= tolerance
    return got


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family, shape):
    a, b = parameters(shape, family), parameters(shape, family, 1)
    for reduction in ("mean", "sum", "none"):
        compare((a, b, family, 0, reduction, True, True), 1e-6)


@pytest.mark.parametrize("size", (1, 2, 3, 7, 64))
def test_groups(size):
    a, b = parameters((7, 3 * size), "categorical"), parameters((7, 3 * size), "categorical", 1)
    for reduction in ("mean", "none"):
        compare((a, b, "categorical", size, reduction, True, True), 1e-6)


@pytest.mark.parametrize("size", (2049, 4096, 4097, 9000))
def test_long_groups(size):
    a, b = parameters((2, size), "categorical", scale=5), parameters((2, size), "categorical", 1, scale=5)
    for reduction in ("mean", "none"):
        compare((a, b, "categorical", 0, reduction, True, True), 1e-6)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_is_no_worse_than_eager(family, dtype):
    a, b = (parameters((9, 30), family, seed).to(dtype) for seed in (0, 1))
    got = triton_worker.run("agreement", a, b, family, 0, "mean", True, True)
    expected = reference.agreement(a.double(), b.double(), family, 0, "mean", True, True)
    f = families.get(family)
    posterior = f.mean2(a + b)
    native = (f.A(a) + f.A(b) - f.A2(a + b)).mean(), (f.mean(a) - posterior) / 9, (f.mean(b) - posterior) / 9
    assert got[0].dtype == torch.float32 and got[1].dtype == got[2].dtype == dtype
    for x, eager, y in zip(got, native, expected, strict=True):
        assert relative_error(x, y) <= relative_error(eager, y) + 1e-2


@pytest.mark.parametrize("family", ("bernoulli", "categorical", "gaussian"))
def test_extreme_parameters(family):
    values = torch.tensor([-1e4, -1e4, -90.0, -20.0, -1e-3, 0.0, 1e-3, 3.0, 50.0, 1e4])
    a, b = values.repeat(10)[None], values.repeat_interleave(10)[None]
    compare((a, b, family, 10 if family == "categorical" else 0, "sum", True, True), 1e-6)


def test_extreme_poisson():
    """Where float64 cancels too: ``(p - q)^2 - log i0e(x)``, x = 2pq, and x (1 - I1/I0) = 1/2 for x large."""
    a = torch.tensor([[-1e4], [-60.0], [-30.0], [-1.0], [0.0], [5.0], [20.0], [40.0]])
    b = torch.tensor([[-30.0], [-1.0], [2.0], [-1e4], [4.0], [5.1], [3.0], [40.0]])
    p, q = torch.exp(a.double() / 2), torch.exp(b.double() / 2)
    x = 2 * p * q
    ratio = torch.special.i1e(x) / torch.special.i0e(x)
    by_a = torch.where(x > 1e6, p * (p - q) + 0.25, p * (p - q * ratio))
    by_b = torch.where(x > 1e6, q * (q - p) + 0.25, q * (q - p * ratio))
    expected = ((p - q) ** 2 - torch.log(torch.special.i0e(x)))[:, 0], by_a, by_b
    got = triton_worker.run("agreement", a, b, "poisson", 0, "none", True, True)
    for x, y in zip(got, expected, strict=True):
        for row in range(len(a)):
            assert relative_error(x[row], y[row]) <= EXP_ERROR


def test_tiny_disagreement_keeps_relative_precision():
    a = torch.full((1, 5), -30.0)
    compare((a, a - 1, "bernoulli", 0, "sum", True, True), EXP_ERROR)


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_batch(family):
    empty = torch.empty(0, 4)
    loss, *grads = triton_worker.run("agreement", empty, empty, family, 0, "mean", True, True)
    assert loss.item() == 0 and [g.shape for g in grads] == [(0, 4), (0, 4)]
    assert triton_worker.run("agreement", empty, empty, family, 0, "none", True, True)[0].shape == (0,)


@pytest.mark.parametrize("family", FAMILIES)
def test_non_contiguous(family):
    a, b = parameters((5, 12), family).t().contiguous().t(), parameters((10, 12), family, 1)[::2]
    assert not a.is_contiguous() and not b.is_contiguous()
    compare((a, b, family, 0, "mean", True, True), 1e-6)


@pytest.mark.parametrize("wanted", ((False, False), (True, False), (False, True)))
def test_unwanted_gradients_are_none(wanted):
    for family, size in (("bernoulli", 0), ("gaussian_learned", 0), ("categorical", 3), ("categorical", 4098)):
        width = max(size, 6)
        a, b = parameters((2, width), family), parameters((2, width), family, 1)
        got = triton_worker.run("agreement", a, b, family, size, "mean", *wanted)
        assert tuple(g is not None for g in got[1:]) == wanted
        full = reference.agreement(a.double(), b.double(), family, size, "mean", True, True)
        assert all(g is None or relative_error(g, f) <= 1e-6 for g, f in zip(got, full, strict=True))
