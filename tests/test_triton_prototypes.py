"""The Triton backend's prototypes, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
triton_worker = pytest.importorskip("triton_worker")

from bllkern.backends import reference  # noqa: E402

# rows, width, classes: one row, odd sizes, both sides of a tile's edges (16 rows, 128 columns), rows longer than 2048,
# classes whose rows are summed in several parts, many classes
SIZES = ((1, 2, 1), (5, 7, 3), (17, 127, 2), (16, 128, 1), (33, 129, 4), (3, 2050, 2), (130, 6, 1), (20, 5, 41))


def arguments(rows, width, classes, ignored=True):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=generator) + 1
    target = torch.randint(classes, (rows,), generator=generator)
    if ignored and rows > 1:
        target[:: max(3, rows // 4)] = -100
    return x, target, torch.randn(classes, width, generator=generator)


def relative_error(got, expected):
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def compare(x, target, by_means, tolerance=1e-6, gradient_tolerance=2e-6):
    classes = len(by_means)
    means, counts = triton_worker.run("prototypes", x, target, classes, -100)
    expected, expected_counts = reference.prototypes(x.double(), target, classes, -100)
    assert torch.equal(counts, expected_counts) and means.dtype == torch.float32
    assert relative_error(means, expected) <= tolerance
    (grad,) = triton_worker.run("prototypes_gradient", x, target, counts, by_means, -100)
    expected = reference.prototypes_gradient(x.double(), target, counts, by_means.double(), -100)
    assert grad.dtype == x.dtype and grad.is_contiguous()
    # the gradient of two units that point one way or the other is as good as 0
    assert float((grad.double() - expected).norm()) <= gradient_tolerance * max(float(expected.norm()), 1)
    return means, grad


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_float32(sizes):
    compare(*arguments(*sizes))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_low_precision(dtype):
    x, target, by_means = arguments(33, 129, 4)
    compare(x.to(dtype), target, by_means, gradient_tolerance=1e-2)


def test_non_contiguous():
    x, target, by_means = arguments(33, 20, 4)
    compare(x.t().contiguous().t(), target.repeat_interleave(2)[::2], by_means.t().contiguous().t())


def test_absent_and_ignored_classes_are_zero():
    x, _, by_means = arguments(6, 5, 4)
    means, grad = compare(x, torch.tensor([2, -100, 2, 2, -100, 2]), by_means)
    assert not means[[0, 1, 3]].any() and not grad[[1, 4]].any() and means[2].any()
    means, grad = compare(x, torch.full((6,), -100), by_means)
    assert not means.any() and not grad.any()


def test_constant_rows_have_no_direction():
    x, target, by_means = arguments(9, 5, 2, ignored=False)
    x[::2] = torch.tensor([0.0, 7.0, 1e4, -3.0, 1e-3])[:, None]
    _, grad = compare(x, target, by_means)
    assert not grad[::2].any()


def test_empty_batch():
    x, target, by_means = arguments(0, 5, 3)
    means, counts = triton_worker.run("prototypes", x, target, 3, -100)
    assert means.shape == (3, 5) and not means.any() and not counts.any()
    (grad,) = triton_worker.run("prototypes_gradient", x, target, counts, by_means, -100)
    assert grad.shape == (0, 5)


def test_results_repeat_bit_for_bit():
    x, target, _ = arguments(40, 20, 2)
    first, second = (triton_worker.run("prototypes", x, target, 2, -100)[0] for _ in range(2))
    assert torch.equal(first, second)
