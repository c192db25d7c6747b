"""The Triton backend's batch_norm_relu, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
triton_worker = pytest.importorskip("triton_worker")

from bllkern._ops import layout as of_activations  # noqa: E402
from bllkern.backends import reference  # noqa: E402

# images, channels, height, width: one place, bins that overlap, windows cut off; channels of several tiles, whose
# statistics take several pieces, and planes of several tiles
SHAPES = ((2, 1, 1, 1), (2, 2, 5, 7), (1, 3, 4, 4), (2, 1, 9, 6), (2, 66, 9, 8), (1, 2, 40, 60))
POOLS = ((1, False, 4), (2, True, 3), (2, False, 2), (3, True, 4))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
OTHER = {torch.contiguous_format: torch.channels_last, torch.channels_last: torch.contiguous_format}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def arguments(shape, layout=torch.contiguous_format, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    x = 2 * torch.randn(shape, generator=generator) + (torch.arange(shape[1]) % 4)[:, None, None]
    return [x.to(dtype, memory_format=layout), *torch.randn(2, shape[1], generator=generator)]


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
        assert one.shape == e.shape and one.dtype == (torch.float32 if i else x.dtype)
        assert one.is_contiguous(memory_format=of_activations(x) if i in (0, 4, 5) else torch.contiguous_format)
        assert relative_error(one, e) <= (2e-6 if i else tolerance)
    generator = torch.Generator().manual_seed(1)
    other = OTHER[of_activations(x)]  # in which by_z and the shortcut come
    by_z = torch.randn(expected[0].shape, generator=generator) if by_z else None
    upstream = [None if by_z is None else by_z.to(x.dtype, memory_format=other)]
    upstream += [2 + torch.randn(expected[1].shape, generator=generator) if pool else None]
    z = got[0].masked_fill(got[0] < 2e-38, 0)  # the interpreter makes the least normal bfloat16 of 0
    given = [x, weight, bias, *got[2:6], None if shortcut is None else z, *upstream]
    wanted = True, shortcut is not None
    got = triton_worker.run("batch_norm_relu_gradient", *given, *settings[:3], *wanted, False)
    exact = [t if t is None else t.double() for t in given]
    expected = reference.batch_norm_relu_gradient(*exact, *settings[:3], *wanted, False)
    if 0 not in x.stride():  # where it can take the place of x
        over = triton_worker.run("batch_norm_relu_gradient", *given, *settings[:3], *wanted, True)
        assert all(map(torch.equal, got, over))
    steepness = float((exact[1] * torch.rsqrt(exact[4] + settings[0])).abs().max())  # factor of what cancels in by x
    for i, (one, e) in enumerate(zip(got, expected, strict=True)):
        assert one.shape == e.shape and one.dtype == (torch.float32 if i > 1 else x.dtype)
        if one.numel():
            assert i > 1 or one.is_contiguous(memory_format=of_activations(x))
            assert relative_error(one, e, 1.0 if i else max(steepness, 1.0)) <= (2e-6 if i > 1 else tolerance)


@pytest.mark.parametrize("pools", POOLS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(shape, pools, layout):
    if pools[1] or min(shape[2:]) >= pools[0]:
        compare(*arguments(shape, layout), *pools)


@pytest.mark.parametrize("pool", (0, 4))
def test_gradient_by_the_activation(pool, layout):
    for shape in SHAPES[1:4]:
        for max_pool, ceil_mode, _ in POOLS:
            compare(*arguments(shape, layout), max_pool, ceil_mode, pool, by_z=True)
    compare(*arguments(SHAPES[4], layout), 2, True, pool, by_z=True)


@pytest.mark.parametrize("by_z", (False, True))
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_shortcut(shape, by_z, layout):
    shortcut = torch.randn(shape, generator=torch.Generator().manual_seed(2)).contiguous(memory_format=OTHER[layout])
    compare(*arguments(shape, layout), 1, False, 4, shortcut, by_z)
    if by_z:
        compare(*arguments(shape, layout), 1, False, 0, shortcut, True)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_low_precision(dtype, layout):
    shape = (2, 6, 5, 7)
    compare(*arguments(shape, layout, dtype), 2, True, 2, tolerance=1e-2)
    shortcut = torch.ones(shape, dtype=dtype)
    for by_z in (False, True):
        compare(*arguments(shape, layout, dtype), 1, False, 2, shortcut, by_z, tolerance=1e-2)


def test_equal_values(layout):
    x, weight, bias = arguments((2, 3, 6, 4), layout)
    compare(x.round(), weight, bias, 2, False, 2)


def test_other_strides(layout):
    x, weight, bias = arguments((2, 3, 6, 8), layout)
    compare(x[:, :, 1:, ::2], weight, bias, 2, True, 2, by_z=True)
    compare(x.expand(2, 2, 3, 6, 8)[:, 0], weight, bias, 1, False, 0, by_z=True)


def test_every_place_has_bins_of_its_own(layout):
    compare(*arguments((2, 5, 7, 6), layout), 1, False, 9)


def test_statistics_far_from_zero(layout):
    x, weight, bias = arguments(SHAPES[4], layout)
    got = triton_worker.run("batch_norm_relu", x + 500, weight, bias, None, 1e-5, 1, False, 0)
    variance, mean = torch.var_mean((x + 500).double(), (0, 2, 3), correction=0)
    assert relative_error(got[2], mean) <= 2e-7 and relative_error(got[3], variance) <= 2e-6


def test_statistics_of_images_that_differ():
    """More images than one sweep combines, of which the first are nothing like the others."""
    x, weight, bias = arguments((1030, 2, 1, 3))
    x[:20] += 100
    got = triton_worker.run("batch_norm_relu", x, weight, bias, None, 1e-5, 1, False, 0)
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert relative_error(got[2], mean) <= 1e-6 and relative_error(got[3], variance) <= 1e-6


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_made_again(shape, dtype, layout):
    x, weight, bias = arguments(shape, layout, dtype)
    z, _, mean, variance, *_ = triton_worker.run("batch_norm_relu", x, weight, bias, None, 1e-5, 1, False, 0)
    (again,) = triton_worker.run("normalized_relu", x, mean, variance, weight, bias, 1e-5)
    assert torch.equal(again, z) and again.is_contiguous(memory_format=of_activations(x))


def test_no_gradient_arrives(layout):
    x, weight, bias = arguments((2, 3, 4, 4), layout)
    kept = *torch.ones(2, 3), *torch.ones(2, 2, 3, 4, 4)
    given = (x, weight, bias, *kept, None, None, None, 1e-5, 1, False, True, True, False)
    assert not any(t.any() for t in triton_worker.run("batch_norm_relu_gradient", *given))


def test_empty_batch(layout):
    x, weight, bias = arguments((0, 3, 4, 4), layout)
    got = triton_worker.run("batch_norm_relu", x, weight, bias, None, 1e-5, 1, False, 4)
    assert [list(t.shape) for t in got] == [[0, 3, 4, 4], [0, 3, 4, 4], [3], [3], [0, 3, 4, 4], [0, 3, 4, 4]]
    kept = (None, None, torch.ones(0, 3, 4, 4), 1e-5, 1, False, True, True, False)
    got = triton_worker.run("batch_norm_relu_gradient", x, weight, bias, *got[2:], *kept)
    assert [list(t.shape) for t in got] == [[0, 3, 4, 4], [0, 3, 4, 4], [3], [3]] and not got[2].any()
