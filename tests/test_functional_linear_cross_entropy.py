"""linear_cross_entropy against torch.nn.functional.cross_entropy of a linear head, per backend."""

import pytest
import torch
import torch.nn.functional as F

from bllkern import _native, backends
from bllkern.functional import linear_cross_entropy

from checks import (
    LOW_PRECISION,
    assert_matches_float64,
    assert_no_worse_than_eager,
    relative_l2,
    value_and_gradients,
)

pytestmark = pytest.mark.op("linear_cross_entropy")


def head(x, weight, bias, target, **options):
    """The same loss with the logits held."""
    pooled = x.flatten(2).mean(2) if x.dim() > 2 else x
    target = target.to(x) if target.is_floating_point() else target
    return F.cross_entropy(F.linear(pooled, weight, bias), target, **options)


def inputs(rows=7, classes=5, width=13, space=(), dtype=torch.float32):
    x = torch.randn(rows, width, *space)
    return [t.to(dtype) for t in (x, torch.randn(classes, width) / (2 * width**0.5), torch.randn(classes) / 2)]


def assert_is_head(tensors, target, tolerance=1e-6, **options):
    assert_matches_float64(
        lambda *t: linear_cross_entropy(*t, target, **options),
        lambda *t: head(*t, target, **options),
        *tensors,
        tolerance=tolerance,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_is_cross_entropy_of_a_linear_head(backend, reduction, label_smoothing, soft):
    target = torch.rand(7, 5).softmax(1) if soft else torch.randint(5, (7,))
    assert_is_head(inputs(), target, reduction=reduction, label_smoothing=label_smoothing)


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_float64_is_exact(soft):
    target = torch.rand(7, 5).softmax(1).double() if soft else torch.randint(5, (7,))
    assert_is_head(inputs(dtype=torch.float64), target, tolerance=1e-12, label_smoothing=0.1)


def test_without_bias(backend):
    x, weight, _ = inputs()
    target = torch.randint(5, (7,))
    assert_matches_float64(
        lambda x, w: linear_cross_entropy(x, w, None, target), lambda x, w: head(x, w, None, target), x, weight
    )


@pytest.mark.parametrize(
    "rows, classes, width", [(1, 2, 1), (2, 3, 7), (33, 17, 31), (65, 10, 129), (5, 1001, 33), (130, 257, 65)]
)
def test_sizes(backend, rows, classes, width):
    assert_is_head(inputs(rows, classes, width), torch.randint(classes, (rows,)))


def test_many_classes(backend):
    """Sums over 20,011 classes: torch's own matrix product is off by 2e-6 in the gradient by x."""
    target = torch.randint(20011, (6,))
    assert_no_worse_than_eager(
        lambda *t: linear_cross_entropy(*t, target, label_smoothing=0.1),
        lambda *t: head(*t, target, label_smoothing=0.1),
        *inputs(6, 20011, 9),
        tolerance=1e-6,
    )


@pytest.mark.parametrize("space", [(1,), (9,), (4, 4), (3, 5), (2, 3, 4)], ids=str)
def test_spatial_features_are_averaged(backend, space):
    assert_is_head(inputs(space=space), torch.randint(5, (7,)), label_smoothing=0.1)


def test_channels_last_features(backend):
    x, weight, bias = inputs(space=(4, 6))
    target = torch.randint(5, (7,))
    plain = value_and_gradients(lambda x, w: linear_cross_entropy(x, w, bias, target), x, weight)
    last = value_and_gradients(
        lambda x, w: linear_cross_entropy(x.contiguous(memory_format=torch.channels_last), w, bias, target), x, weight
    )
    torch.testing.assert_close(plain, last, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_ignored_rows_do_not_count(backend, reduction, ignore_index, label_smoothing):
    target = torch.tensor([0, ignore_index, 3, ignore_index, 1, 4, ignore_index])
    assert_is_head(inputs(), target, reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("space", [(), (2, 2)], ids=["rows", "space"])
def test_all_rows_ignored(backend, reduction, space):
    target = torch.full((7,), -100)
    results = value_and_gradients(
        lambda *t: linear_cross_entropy(*t, target, reduction=reduction), *inputs(space=space)
    )
    assert all(torch.equal(x, torch.zeros_like(x)) for x in results)


def test_one_class_costs_nothing(backend):
    target = torch.zeros(7, dtype=torch.int64)
    results = value_and_gradients(lambda *t: linear_cross_entropy(*t, target), *inputs(classes=1))
    assert all(torch.equal(x, torch.zeros_like(x)) for x in results)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("space", [(), (4, 4)], ids=["rows", "space"])
def test_low_precision(backend, dtype, space):
    target = torch.randint(11, (33,))
    assert_no_worse_than_eager(
        lambda *t: linear_cross_entropy(*t, target, label_smoothing=0.1),
        lambda *t: head(*t, target, label_smoothing=0.1),
        *inputs(33, 11, 29, space, dtype),
    )


def test_extreme_logits(backend):
    x, weight, bias = inputs(width=3)
    weight[:, 0] = torch.tensor([1e4, -1e4, 0.0, 7e3, 3e3])
    target = torch.randint(5, (7,))
    actual = value_and_gradients(lambda *t: linear_cross_entropy(*t, target), x, weight, bias)
    truth = value_and_gradients(lambda *t: head(*t, target), *(t.double() for t in (x, weight, bias)))
    for value, expected in zip(actual, truth, strict=True):
        assert value.isfinite().all() and relative_l2(value, expected) <= 1e-6


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_logits_of_minus_infinity(backend, soft):
    """An impossible class that no target asks for costs nothing and gets no gradient."""
    x, weight, bias = inputs()
    bias[2] = -torch.inf
    target = torch.tensor([0, 1, 3, 4, 0, 1, 3])
    soft_target = F.one_hot(target, 5).float() * 0.75 + F.one_hot((target + 3) % 5 // 3 * 3, 5).float() * 0.25
    target = soft_target if soft else target
    actual = value_and_gradients(lambda *t: linear_cross_entropy(*t, target), x, weight, bias)
    finite = [t.double() for t in (x, weight, bias.clamp(min=-1e3))]
    truth = value_and_gradients(lambda *t: head(*t, target), *finite)
    for value, expected in zip(actual, truth, strict=True):
        assert relative_l2(value, expected) <= 1e-6


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(2, 6, dtype=torch.int64)), TypeError, "x must be a floating-point tensor"),
        (dict(weight=torch.zeros(4, 6, dtype=torch.int64)), TypeError, "weight must be a floating-point tensor"),
        (dict(bias=torch.zeros(4, dtype=torch.int64)), TypeError, "bias must be a floating-point tensor"),
        (dict(x=torch.zeros(6)), ValueError, r"x must have shape \[N, D\] or \[N, D, \*spatial\], got \[6\]"),
        (dict(weight=torch.zeros(4, 5)), ValueError, r"weight must have shape \[C, 6\].*got \[4, 5\]"),
        (dict(weight=torch.zeros(0, 6), bias=None), ValueError, r"weight must have .*C >= 1, got \[0, 6\]"),
        (dict(bias=torch.zeros(5)), ValueError, r"bias must be None or have shape \[4\], got \[5\]"),
        (dict(weight=torch.zeros(4, 6, device="meta")), ValueError, "weight must be on the device of x, cpu, got meta"),
        (dict(bias=torch.zeros(4, device="meta")), ValueError, "bias must be on the device of x, cpu, got meta"),
        (dict(target=torch.zeros(2, dtype=torch.int64, device="meta")), ValueError, "target must be on the device"),
        (dict(target=torch.zeros(2, 1, dtype=torch.int64)), ValueError, r"target must have shape \[2\].*got \[2, 1\]"),
        (dict(target=torch.zeros(2, dtype=torch.bool)), TypeError, "target must be int64.*got torch.bool"),
        (dict(target=torch.zeros(3, 4)), ValueError, r"target must have shape \[2, 4\] as floats, got \[3, 4\]"),
        (dict(target=torch.tensor([0, 9])), ValueError, "target must hold class indices from 0 to 3 .*got 9"),
        (dict(label_smoothing=1.5), ValueError, "label_smoothing must be from 0 to 1, got 1.5"),
        (dict(label_smoothing=float("nan")), ValueError, "label_smoothing must be from 0 to 1, got nan"),
        (dict(reduction="none"), ValueError, r"reduction must be one of \('mean', 'sum'\), got 'none'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    good = dict(x=torch.zeros(2, 6), weight=torch.zeros(4, 6), bias=torch.zeros(4), target=torch.tensor([0, 3]))
    with pytest.raises(error, match=message):
        linear_cross_entropy(**good | change)


needs_compiled = pytest.mark.skipif(_native.error is not None, reason=str(_native.error))


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "reduction": "sum"}, {"ignore_index": 3}], ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_one_look_gives_the_same_loss(dtype, options, with_bias):
    """Small heads without gradients leave out the checks; with gradients every argument is checked."""
    x, weight, bias = inputs(dtype=dtype)
    target, bias = torch.randint(5, (7,)), bias if with_bias else None
    settings = {"label_smoothing": 0.0, "reduction": "mean", "ignore_index": -100} | options
    quick = backends.small_linear_cross_entropy(x, weight, bias, target, *settings.values())
    checked = linear_cross_entropy(x.requires_grad_(), weight, bias, target, **options)
    assert quick.dtype == torch.float32 and quick.equal(checked)


UNUSUAL = {
    "probabilities": {"target": torch.rand(7, 5).softmax(1)},
    "int32": {"target": torch.zeros(7, dtype=torch.int32)},
    "space": {"x": torch.randn(7, 13, 2)},
    "strides": {"x": torch.randn(13, 7).T},
    "dtypes": {"weight": torch.randn(5, 13, dtype=torch.bfloat16)},
    "float64": {name: torch.randn(shape, dtype=torch.float64) for name, shape in [("x", (7, 13)), ("weight", (5, 13))]},
    "width": {"weight": torch.randn(5, 12)},
    "rows": {"target": torch.zeros(6, dtype=torch.int64)},
    "bias": {"bias": torch.randn(4)},
    "empty": {"x": torch.randn(0, 13), "target": torch.zeros(0, dtype=torch.int64)},
    "smoothing": {"label_smoothing": 1.5},
    "reduction": {"reduction": "none"},
    "subclass": {"x": torch.randn(7, 13).as_subclass(type("Sub", (torch.Tensor,), {}))},
    "device": {"x": torch.randn(7, 13, device="meta")},
    "large": {"x": torch.randn(7, 30000), "weight": torch.randn(5, 30000)},
    "none": {"x": None},
}


@needs_compiled
@pytest.mark.parametrize("change", UNUSUAL)
def test_anything_unusual_is_checked(change):
    x, weight, bias = inputs()
    usual = {"x": x, "weight": weight, "bias": bias, "target": torch.randint(5, (7,))}
    settings = {"label_smoothing": 0.0, "reduction": "mean", "ignore_index": -100}
    arguments = usual | settings
    assert backends.small_linear_cross_entropy(*arguments.values()) is not None
    assert backends.small_linear_cross_entropy(*(arguments | UNUSUAL[change]).values()) is None
    with backends.backend("reference"):
        assert backends.small_linear_cross_entropy(*arguments.values()) is None


@needs_compiled
def test_one_look_checks_labels():
    x, weight, bias = inputs()
    with pytest.raises(ValueError, match="from 0 to 4"):
        linear_cross_entropy(x, weight, bias, torch.full((7,), 5))
