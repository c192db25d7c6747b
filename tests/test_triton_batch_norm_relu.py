"""The Triton backend's batch_norm_relu, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
triton_worker = pytest.importorskip("triton_worker")

from bllkern.backends import reference  # noqa: E402

# images, channels, height, width: one place, bins that overlap, windows cut off, planes of more than a block (1024)
SHAPES = ((2, 1, 1, 1), (2, 2, 5, 7), (1, 3, 4, 4), (2, 1, 9, 6), (1, 1, 33, 70))
POOLS = ((1, False, 4), (2, True, 3), (2, False, 2), (3, True, 4))


def arguments(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    x = 2 * torch.randn(shape, generator=generator) + torch.arange(shape[1])[:, None, None]
    return [x.to(dtype), *torch.randn(2, shape[1], generator=generator)]


def relative_error(got, expected):
    """Relative to at least 1: of two values the gradient all but cancels."""
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1))


def compare(x, weight, bias, max_pool, ceil_mode, pool, tolerance=2e-6):
    settings = (1e-5, max_pool, ceil_mode, pool)
    exact = [t.double() for t in (x, weight, bias)]
    got = triton_worker.run("batch_norm_relu", x, weight, bias, *settings)
    expected = reference.batch_norm_relu(*exact, *settings)
    for i, (one, e) in enumerate(zip(got, expected, strict=True)):
        assert one.shape == e.shape and one.is_contiguous() and one.dtype == (torch.float32 if i else x.dtype)
        assert relative_error(one, e) <= (2e-6 if i else tolerance)
    by_features = 2 + torch.randn(expected[1].shape, generator=torch.Generator().manual_seed(1))
    sums = [(by_features * kept).sum((0, 2, 3)).float() for kept in (expected[5], expected[4])]
    statistics = [t.float() for t in expected[2:4]]
    given = [x, weight, bias, *statistics, by_features, *sums]
    (grad,) = triton_worker.run("batch_norm_relu_gradient", *given, *settings[:3])
    expected = reference.batch_norm_relu_gradient(*(t.double() for t in given), *settings[:3])
    assert grad.dtype == x.dtype and relative_error(grad, expected) <= tolerance


@pytest.mark.parametrize("pools", POOLS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(shape, pools):
    if pools[1] or min(shape[2:]) >= pools[0]:
        compare(*arguments(shape), *pools)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_low_precision(dtype):
    compare(*arguments((2, 2, 5, 7), dtype), 2, True, 2, tolerance=1e-2)


def test_channels_last_and_equal_values():
    x, weight, bias = arguments((2, 3, 6, 4))
    compare(x.round().contiguous(memory_format=torch.channels_last), weight, bias, 2, False, 2)


def test_empty_batch():
    x, weight, bias = arguments((0, 3, 4, 4))
    got = triton_worker.run("batch_norm_relu", x, weight, bias, 1e-5, 1, False, 4)
    assert [list(t.shape) for t in got] == [[0, 3, 4, 4], [0, 3, 4, 4], [3], [3], [0, 3, 4, 4], [0, 3, 4, 4]]
