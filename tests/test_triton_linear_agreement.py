"""A matrix product and the Triton agreement after it, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
triton_worker = pytest.importorskip("triton_worker")

from bllkern import families  # noqa: E402
from bllkern.backends import reference  # noqa: E402

FAMILIES = ("bernoulli", "categorical", "gaussian", "gaussian_learned", "poisson")
# rows, width, inner
SIZES = ((1, 2, 1), (3, 6, 7), (130, 128, 16), (8, 16, 0))


def random(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def arguments(sizes, family, group_size=0, reduction="mean", bias=True, wanted=(True, True), row_weights=None):
    rows, width, inner = sizes
    weight = random(width, inner, seed=1) / max(inner, 1) ** 0.5
    b = families.get(family).natural(random(rows, width, seed=3))
    bias = random(width, seed=2) if bias else None
    if family == "gaussian_learned":  # as a layer must be for its second half to be negative
        weight[width // 2 :] = 0
        bias[width // 2 :] = -bias[width // 2 :].abs() - 0.1
    return [random(rows, inner), weight, bias, b, row_weights, family, group_size, reduction, *wanted]


def double(args):
    return [x.double() if isinstance(x, torch.Tensor) else x for x in args]


def relative_error(got, expected):
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def compare(args, tolerance=1e-6):
    got, expected = triton_worker.run("linear_agreement", *args), reference.linear_agreement(*double(args))
    for x, y in zip(got, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.shape == y.shape and x.is_contiguous()
            assert relative_error(x, y) <= tolerance
    return got


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family, sizes):
    for reduction in ("mean", "sum"):
        compare(arguments(sizes, family, reduction=reduction))


@pytest.mark.parametrize("size", (2, 3, 16))
def test_groups(size):
    compare(arguments((66, 96, 9), "categorical", size))


def test_groups_of_one_unit_have_nothing_to_disagree_on():
    z, loss, by_z, by_b = triton_worker.run("linear_agreement", *arguments((3, 5, 4), "categorical", 1))
    assert loss.abs() <= 1e-5 and not by_z.any() and not by_b.any() and z.any()


def test_without_bias():
    compare(arguments((9, 7, 5), "bernoulli", bias=False))


@pytest.mark.parametrize("family, size", (*((family, 0) for family in FAMILIES), ("categorical", 4)))
def test_row_weights(family, size):
    weights = random(70, seed=4)
    weights[::5] = 0
    for reduction in ("mean", "sum"):
        compare(arguments((70, 24, 5), family, size, reduction, row_weights=weights))


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
def test_messages_keep_their_dtype(family, weighted):
    args = arguments((9, 24, 5), family, row_weights=random(9, seed=4) if weighted else None)
    args[:3] = (x.bfloat16() for x in args[:3])
    got, expected = triton_worker.run("linear_agreement", *args), reference.linear_agreement(*double(args))
    assert [x.dtype for x in got] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    assert all(relative_error(x, y) <= 1e-2 for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("wanted", ((False, False), (True, False), (False, True)))
def test_unwanted_gradients_are_none(wanted):
    compare(arguments((5, 8, 6), "bernoulli", wanted=wanted))
    compare(arguments((5, 8, 6), "bernoulli", wanted=wanted, row_weights=random(5, seed=4)))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("family, size", (("bernoulli", 0), ("gaussian", 0), ("poisson", 0), ("categorical", 8)))
def test_low_precision_is_no_worse_than_eager(family, size, dtype):
    args = arguments((70, 48, 40), family, size)
    args[:4] = (x.to(dtype) for x in args[:4])
    got, expected = triton_worker.run("linear_agreement", *args), reference.linear_agreement(*double(args))
    f = families.Categorical(size) if size else families.get(family)
    z, b = F.linear(*args[:3]), args[3]
    posterior = f.mean2(z + b)
    native = z, (f.A(z) + f.A(b) - f.A2(z + b)).mean(), (f.mean(z) - posterior) / 70, (f.mean(b) - posterior) / 70
    assert [x.dtype for x in got] == [dtype, torch.float32, dtype, dtype]
    for x, eager, y in zip(got, native, expected, strict=True):
        assert relative_error(x, y) <= relative_error(eager, y) + 1e-2


@pytest.mark.parametrize("family", ("bernoulli", "gaussian", "categorical"))
def test_extreme_activations(family):
    args = arguments((10, 16, 4), family, 8 if family == "categorical" else 0)
    # whole numbers, so that float32 holds the activations exactly
    args[0], args[1], args[2] = (args[0] * 100).round(), (args[1] * 100).round(), args[2].round()
    args[3] = args[3].sign() * torch.tensor([1e4, 30.0, 1e-3, 0.0]).repeat(4)
    assert all(x.isfinite().all() for x in compare(args))


@pytest.mark.parametrize("row_weights", (None, torch.empty(0)), ids=("plain", "row_weights"))
@pytest.mark.parametrize("family", FAMILIES)
def test_empty_batch(family, row_weights):
    args = arguments((0, 4, 3), family, row_weights=row_weights)
    args[:3] = (x.bfloat16() for x in args[:3])
    z, loss, by_z, by_b = triton_worker.run("linear_agreement", *args)
    assert loss.item() == 0 and z.shape == by_z.shape == by_b.shape == (0, 4)
    assert [x.dtype for x in (z, loss, by_z, by_b)] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]


def test_non_contiguous():
    args = arguments((33, 12, 10), "bernoulli")
    args[:4] = (x.t().contiguous().t() if x.dim() == 2 else x.repeat_interleave(2)[::2] for x in args[:4])
    assert not any(x.is_contiguous() for x in args[:4])
    compare(args)
