"""batch_norm_relu against F.batch_norm, F.relu, F.max_pool2d and F.adaptive_avg_pool2d, per backend."""

import pytest
import torch
import torch.nn.functional as F

from bllkern import _native, _ops, backends
from bllkern.functional import batch_norm_relu

from checks import (
    LOW_PRECISION,
    Results,
    assert_matches_float64,
    assert_no_worse_than_eager,
    relative_l2,
    value_and_gradients,
)

pytestmark = pytest.mark.op("batch_norm_relu")

# images, channels, height, width; one place, bins that overlap, windows cut off, planes and channels of more than a vector
SHAPES = [(2, 1, 1, 1), (3, 2, 5, 7), (1, 3, 4, 4), (2, 3, 9, 6), (2, 2, 16, 16), (2, 1, 33, 35), (4, 5, 3, 130)]
SHAPES += [(3, 19, 5, 4), (2, 70, 6, 3)]
POOLS = [(1, False), (2, True), (2, False), (3, True)]


@pytest.fixture(
    autouse=True, params=[torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
def layout(request, monkeypatch):
    """In which layout :func:`images` are."""
    monkeypatch.setitem(globals(), "images", lambda x: x.contiguous(memory_format=request.param))


def images(x):
    """``x`` [N, C, H, W] in the layout of the test."""


def block(shape, dtype=torch.float32):
    x = 2 * torch.randn(shape) + torch.arange(shape[1])[:, None, None]
    return [images(x.to(dtype)), torch.randn(shape[1]), torch.randn(shape[1])]


def formula(x, weight, bias, max_pool=1, ceil_mode=False, pool=4):
    t = F.batch_norm(x, None, None, weight.to(x.dtype), bias.to(x.dtype), True, 0.0, 1e-5)
    z = F.max_pool2d(F.relu(t), max_pool, ceil_mode=ceil_mode)
    return z, F.adaptive_avg_pool2d(z, [min(side, pool) for side in z.shape[2:]])


def weighted(function, *settings):
    """A scalar of the features whose gradient differs from place to place."""

    def loss(x, weight, bias):
        features = function(x, weight, bias, *settings)[1]
        factors = 2 + torch.arange(features.numel(), dtype=torch.float64).sin().view(features.shape)
        return (features * factors.to(features.dtype)).sum().to(torch.promote_types(features.dtype, torch.float32))

    return loss


def unit(x, weight, bias, shortcut):
    """The end of a residual unit: z."""
    return F.relu(F.batch_norm(x, None, None, weight.to(x.dtype), bias.to(x.dtype), True, 0.0, 1e-5) + shortcut)


def weighted_z(function):
    """A scalar of the activation whose gradient differs from place to place, and of the features if there are any."""

    def loss(*tensors):
        z, features = function(*tensors)
        factors = 2 + torch.arange(z.numel(), dtype=torch.float64).sin().view(z.shape)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return (z * factors.to(z.dtype)).sum() + features.square().sum().to(z.dtype)

    return loss


def ours(x, weight, bias, *settings):
    return batch_norm_relu(x, weight, bias, 1e-5, *settings)


def pools_of(shape):
    return [(k, ceil) for k, ceil in POOLS if ceil or min(shape[2:]) >= k]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_chain_of_torch_functions(backend, shape):
    for settings in pools_of(shape):
        x, weight, bias = block(shape)
        z, features, mean, variance = ours(x, weight, bias, *settings)
        expected_z, expected_features = formula(x.double(), weight, bias, *settings)
        assert z.shape == expected_z.shape and features.shape == expected_features.shape
        assert z.is_contiguous(memory_format=_ops.layout(x)) and features.is_contiguous()
        assert (z - expected_z).norm() <= 1e-6 * expected_z.norm().clamp(min=1)
        assert (features - expected_features).norm() <= 1e-6 * expected_features.norm().clamp(min=1)
        expected_variance, expected_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        assert relative_l2(mean, expected_mean) <= 1e-6 and relative_l2(variance, expected_variance) <= 1e-6


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] > 1], ids=str)
@pytest.mark.parametrize("pool", [1, 3, 4])
def test_gradients(backend, shape, pool):
    for settings in pools_of(shape):
        arguments = (*settings, pool)
        functions = weighted(ours, *arguments), weighted(formula, *arguments)
        assert_no_worse_than_eager(*functions, *block(shape), tolerance=3e-6)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] > 1], ids=str)
@pytest.mark.parametrize("pool", [0, 3])
def test_gradients_through_the_activation(backend, shape, pool):
    def own(x, weight, bias):
        return batch_norm_relu(x, weight, bias, 1e-5, *settings, pool)[:2]

    def torchs(x, weight, bias):
        z, features = formula(x, weight, bias, *settings, max(pool, 1))
        return z, features if pool else features.new_zeros(())

    for settings in pools_of(shape):
        assert_no_worse_than_eager(weighted_z(own), weighted_z(torchs), *block(shape), tolerance=3e-6)


def shortcuts(pool):
    """The end of a residual unit by the op and by torch: z and features."""

    def own(x, weight, bias, shortcut):
        return batch_norm_relu(x, weight, bias, 1e-5, 1, False, pool, shortcut)[:2]

    def torchs(*tensors):
        z = unit(*tensors)
        return z, F.adaptive_avg_pool2d(z, [min(side, pool) for side in z.shape[2:]]) if pool else z.new_zeros(())

    return own, torchs


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] > 1], ids=str)
@pytest.mark.parametrize("pool", [0, 1, 4])
def test_shortcut(backend, shape, pool):
    own, torchs = shortcuts(pool)
    tensors = *block(shape), images(torch.randn(shape))
    z, features = own(*tensors)
    expected, expected_features = torchs(*(t.double() for t in tensors))
    assert (z - expected).norm() <= 1e-6 * expected.norm()
    assert not pool or (features - expected_features).norm() <= 1e-6 * expected_features.norm()
    assert_no_worse_than_eager(weighted_z(own), weighted_z(torchs), *tensors, tolerance=3e-6)
    if pool:
        by_features = (lambda *t, f=f: f(*t)[1].square().sum() for f in (own, torchs))
        assert_no_worse_than_eager(*by_features, *tensors, tolerance=3e-6)


@pytest.mark.parametrize("isa", _native._C.isas if _native._C is not None else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_instruction_set_adds_a_shortcut(isa, dtype):
    chosen = _native._C.isa()
    tensors = *block((2, 3, 9, 21), dtype), torch.randn(2, 3, 9, 21).to(dtype)
    own, torchs = shortcuts(3)
    try:
        _native._C.set_isa(isa)
        with backends.backend("cpu"):
            assert_no_worse_than_eager(weighted_z(own), weighted_z(torchs), *tensors)
    finally:
        _native._C.set_isa(chosen)


@pytest.mark.parametrize("isa", _native._C.isas if _native._C is not None else [])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_instruction_set(isa, dtype):
    chosen = _native._C.isa()
    x, weight, bias = block((2, 3, 9, 21), dtype)
    loss = weighted(ours, 2, True)
    try:
        _native._C.set_isa(isa)
        with backends.backend("cpu"):
            assert_no_worse_than_eager(loss, weighted(formula, 2, True), x, weight, bias)
    finally:
        _native._C.set_isa(chosen)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("settings", POOLS, ids=str)
def test_low_precision(backend, dtype, settings):
    x, weight, bias = block((3, 4, 10, 11), dtype)
    z, features, *_ = ours(x, weight, bias, *settings)
    assert z.dtype == dtype and features.dtype == torch.float32
    assert relative_l2(z, formula(x.double(), weight, bias, *settings)[0]) <= 1e-2
    assert_no_worse_than_eager(weighted(ours, *settings), weighted(formula, *settings), x, weight, bias)


@pytest.mark.parametrize("settings", POOLS, ids=str)
def test_gradcheck_of_both_outputs(settings):
    tensors = [t.double().requires_grad_() for t in block((2, 2, 5, 6))]
    assert torch.autograd.gradcheck(lambda *t: ours(*t, *settings)[:2], tensors)
    assert torch.autograd.gradcheck(lambda *t: ours(*t, *settings)[1], tensors)


def test_gradcheck_of_a_shortcut():
    x, weight, bias = (t.double() for t in block((2, 2, 5, 6)))
    tensors = [t.requires_grad_() for t in (x, weight, bias, torch.randn_like(x))]
    for pool in (0, 2):
        assert torch.autograd.gradcheck(lambda *t: shortcuts(pool)[0](*t), tensors)


def test_a_shortcut_compiles_into_one_graph():
    torch.compiler.reset()
    own = weighted_z(shortcuts(2)[0])
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    tensors = *block((2, 3, 5, 6)), torch.randn(2, 3, 5, 6)
    for one, e in zip(value_and_gradients(compiled, *tensors), value_and_gradients(own, *tensors), strict=True):
        torch.testing.assert_close(one, e, rtol=1e-4, atol=1e-5)


def test_only_the_gradients_that_are_needed(backend):
    tensors = *block((2, 3, 5, 6)), torch.randn(2, 3, 5, 6)
    for wanted in range(4):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
        shortcuts(2)[0](*leaves)[0].square().sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(4)]


@pytest.mark.parametrize("settings", POOLS, ids=str)
def test_activation_has_a_gradient_of_its_own(backend, settings):
    leaves = [t.requires_grad_() for t in block((2, 3, 7, 6))]
    z, features, *_ = ours(*leaves, *settings)
    both = torch.autograd.grad(z.sin().sum() + features.cos().sum(), leaves)
    z, features = formula(*leaves, *settings)
    expected = torch.autograd.grad(z.sin().sum() + features.cos().sum(), leaves)
    for gradient, e in zip(both, expected, strict=True):
        torch.testing.assert_close(gradient, e, rtol=1e-4, atol=1e-5)


def test_the_first_of_equal_values_gets_the_gradient(backend):
    x = torch.tensor([1.0, 3.0, 3.0, 3.0, -2.0, 0.0, 3.0, 1.0]).view(2, 1, 2, 2)
    leaves = [x, torch.ones(1), torch.zeros(1)]
    assert_matches_float64(weighted(ours, 2), weighted(formula, 2), *leaves)


def test_constant_channels(backend):
    x = torch.full((3, 2, 4, 4), 7.0)
    leaves = [x.requires_grad_(), torch.ones(2, requires_grad=True), torch.tensor([1.0, -1.0], requires_grad=True)]
    z, features, mean, variance = ours(*leaves)
    assert torch.equal(z, torch.tensor([1.0, 0.0])[:, None, None].expand_as(z)) and not variance.any()
    features.sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves) and torch.equal(mean, torch.full((2,), 7.0))


def test_a_large_mean_cancels(backend):
    x, weight, bias = block((3, 2, 6, 6))
    x += 1000
    assert_no_worse_than_eager(weighted(ours), weighted(formula), x, weight, bias, tolerance=1e-5)


def test_a_shortcut_and_gradients_in_another_layout(backend):
    x, weight, bias = block((3, 4, 6, 7))
    other = torch.randn(3, 7, 4, 6).permute(0, 2, 3, 1)  # neither contiguous nor channels-last
    own, torchs = (lambda *t, f=f: (f(*t)[0] * other.to(t[0])).sum() for f in shortcuts(2))
    assert_matches_float64(own, torchs, x, weight, bias, other)


def test_empty_batch(backend):
    leaves = [t.requires_grad_() for t in block((0, 3, 4, 4))]
    z, features, mean, variance = ours(*leaves)
    features.sum().backward()
    assert z.shape == (0, 3, 4, 4) and not mean.any() and not variance.any()
    assert not any(t.grad.any() for t in leaves)


def test_results_repeat_bit_for_bit_whatever_the_threads(backend):
    x, weight, bias = block((8, 16, 40, 40))
    leaves, results = [t.requires_grad_() for t in (x, weight, bias)], []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        z, features, *_ = ours(*leaves, 2)
        results.append([z, features, *torch.autograd.grad(features.square().sum(), leaves)])
    torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_gradient_without_grad_mode(backend):
    leaves = [t.requires_grad_() for t in block((2, 3, 4, 4))]
    with torch.no_grad(), Results() as results:
        assert not any(t.requires_grad for t in ours(*leaves))
    assert len(results.kept) == 1


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(2, 3, 4, 4, dtype=torch.int64)), TypeError, "x must be a floating-point tensor.*int64"),
        (dict(x=torch.zeros(2, 3, 4)), ValueError, r"x must have shape \[N, C, H, W\], got \[2, 3, 4\]"),
        (dict(weight=torch.zeros(2)), ValueError, r"weight must have shape \[3\], got \[2\]"),
        (dict(bias=torch.zeros(3, 1)), ValueError, r"bias must have shape \[3\], got \[3, 1\]"),
        (dict(bias=torch.zeros(3, device="meta")), ValueError, "bias must be on the device of x, cpu, got meta"),
        (dict(max_pool=4), ValueError, "max_pool must be 1, 2 or 3, got 4"),
        (dict(pool=-1), ValueError, "pool must be at least 0, got -1"),
        (
            dict(shortcut=torch.zeros(2, 3, 4, 1)),
            ValueError,
            r"shortcut must have dtype and shape of x, torch.float32 \[2, 3, 4, 4\], got torch.float32 \[2, 3, 4, 1\]",
        ),
        (dict(shortcut=torch.zeros(2, 3, 4, 4).half()), ValueError, "shortcut must have dtype .* got torch.float16"),
        (
            dict(shortcut=torch.zeros(2, 3, 4, 4, device="meta")),
            ValueError,
            "shortcut must be on the device of x, cpu, got meta",
        ),
        (dict(shortcut=torch.zeros(2, 3, 4, 4), max_pool=2), ValueError, "max_pool must be 1 with a shortcut, got 2"),
        (
            dict(x=torch.zeros(2, 3, 4, 1), max_pool=2),
            ValueError,
            r"x must have at least 2 places a side.*\[2, 3, 4, 1\]",
        ),
    ],
)
def test_errors_name_the_argument(change, error, message):
    given = dict(x=torch.zeros(2, 3, 4, 4), weight=torch.zeros(3), bias=torch.zeros(3)) | change
    with pytest.raises(error, match=message):
        batch_norm_relu(**given)


@pytest.mark.parametrize("max_pool", [1, 2, 3])
def test_a_spent_input_makes_place_for_its_gradient(backend, max_pool):
    leaves = block((3, 5, 7, 6))
    results = {}
    for spend in (False, True):
        x, weight, bias = (t.clone(memory_format=torch.preserve_format).requires_grad_() for t in leaves)
        own = x * 1  # which nobody else reads
        before = own.detach().clone()
        z, features, *_ = batch_norm_relu(own, weight, bias, max_pool=max_pool, spend_x=spend)
        loss = z.sin().sum() + features.square().sum()
        kept = torch.autograd.grad(loss, (x, weight, bias), retain_graph=True)
        assert torch.equal(own, before)
        results[spend] = torch.autograd.grad(loss, (x, weight, bias))
        assert all(map(torch.equal, kept, results[spend]))
        assert torch.equal(own, results[True][0] if spend else before)
    assert all(map(torch.equal, *results.values()))


def test_whoever_needs_a_spent_input_after_all_gets_an_error(backend):
    x, weight, bias = (t.requires_grad_() for t in block((3, 5, 7, 6)))
    own = x * 1
    square = own * own
    batch_norm_relu(own, weight, bias, spend_x=True)[1].sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()
