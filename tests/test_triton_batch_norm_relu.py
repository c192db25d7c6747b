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


def relative_error(got, expected, least=1.0):
    """Relative to at least ``least``: of two values the gradient all but cancels."""
    return float((got.double() - expected).norm() / expected.norm().clamp(min=least))


def compare(x, weight, bias, max_pool, ceil_mode, pool, shortcut=None, by_z=False, tolerance=2e-6):
    settings = (1e-5, max_pool, ceil_mode, pool)
    given = [x, weight, bias, shortcut]
    exact = [t if t is None else t.double() for t in given]
    got = triton_worker.run("batch_norm_relu", *given, *settings)
    expected = reference.batch_norm_relu(*exact, *settings)
    for i, (one, e) in enumerate(zip(got, expected, strict=True)):
        assert one.shape == e.shape and one.is_contiguous() and one.dtype == (torch.float32 if i else x.dtype)
        assert relative_error(one, e) <= (2e-6 if i else tolerance)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(expected[0].shape, generator=generator).to(x.dtype) if by_z else None]
    upstream += [2 + torch.randn(expected[1].shape, generator=generator) if pool else None]
    z = got[0].masked_fill(got[0] < 2e-38, 0)  # the interpreter makes the least normal bfloat16 of 0
    given = [x, weight, bias, *got[2:6], None if shortcut is None else z, *upstream]
    wanted = True, shortcut is not None
    got = triton_worker.run("batch_norm_relu_gradient", *given, *settings[:3], *wanted)
    exact = [t if t is None else t.double() for t in given]
    expected = reference.batch_norm_relu_gradient(*exact, *settings[:3], *wanted)
    steepness = float((exact[1] * torch.rsqrt(exact[4] + settings[0])).abs().max())  # factor of what cancels in by x
    for i, (one, e) in enumerate(zip(got, expected, strict=True)):
        assert (one is None) == (e is None)
        if one is not None:
            assert one.dtype == (torch.float32 if i > 1 else x.dtype)
            assert relative_error(one, e, 1.0 if i else max(steepness, 1.0)) <= (2e-6 if i > 1 else tolerance)


@pytest.mark.parametrize("pools", POOLS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(shape, pools):
    if pools[1] or min(shape[2:]) >= pools[0]:
        compare(*arguments(shape), *pools)


@pytest.mark.parametrize("pool", (0, 4))
def test_gradient_by_the_activation(pool):
    for shape in SHAPES[1:4]:
        for max_pool, ceil_mode, _ in POOLS:
            compare(*arguments(shape), max_pool, ceil_mode, pool, by_z=True)


@pytest.mark.parametrize("by_z", (False, True))
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_shortcut(shape, by_z):
    shortcut = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    compare(*arguments(shape), 1, False, 4, shortcut, by_z)
    compare(*arguments(shape), 1, False, 0, shortcut, True)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_low_precision(dtype):
    compare(*arguments((2, 2, 5, 7), dtype), 2, True, 2, tolerance=1e-2)
    shortcut = torch.ones(2, 2, 5, 7, dtype=dtype)
    compare(*arguments((2, 2, 5, 7), dtype), 1, False, 2, shortcut, True, tolerance=1e-2)
    compare(*arguments((2, 2, 5, 7), dtype), 1, False, 2, shortcut, False, tolerance=1e-2)


def test_channels_last_and_equal_values():
    x, weight, bias = arguments((2, 3, 6, 4))
    compare(x.round().contiguous(memory_format=torch.channels_last), weight, bias, 2, False, 2)


def test_empty_batch():
    x, weight, bias = arguments((0, 3, 4, 4))
    got = triton_worker.run("batch_norm_relu", x, weight, bias, None, 1e-5, 1, False, 4)
    assert [list(t.shape) for t in got] == [[0, 3, 4, 4], [0, 3, 4, 4], [3], [3], [0, 3, 4, 4], [0, 3, 4, 4]]
