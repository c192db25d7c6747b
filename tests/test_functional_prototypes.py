"""prototypes against means taken class by class, per backend."""

import pytest
import torch

from bllkern.functional import prototypes

from checks import LOW_PRECISION, assert_matches_float64, assert_no_worse_than_eager, relative_l2, value_and_gradients

pytestmark = pytest.mark.op("prototypes")
GOOD = dict(x=torch.zeros(2, 6), target=torch.tensor([0, 3]), num_classes=4)


def means(x, target, num_classes):
    """Mean directions, one class at a time."""
    centred = x - x.mean(1, keepdim=True)
    directions = centred / centred.norm(dim=1, keepdim=True)
    rows = [directions[target == c] for c in range(num_classes)]
    return torch.stack([r.mean(0) if len(r) else x.new_zeros(x.shape[1]) for r in rows])


def assert_is_means(x, target, num_classes, **options):
    weights = torch.randn(num_classes, x.shape[1], dtype=torch.float64).float()
    of = lambda result: (result * weights.to(result)).sum()  # noqa: E731
    assert_matches_float64(
        lambda x: of(prototypes(x, target, num_classes, **options)[0]), lambda x: of(means(x, target, num_classes)), x
    )
    actual, counts = prototypes(x, target, num_classes, **options)
    assert actual.dtype == torch.float32 and counts.dtype == torch.int64
    assert relative_l2(actual, means(x.double(), target, num_classes)) <= 1e-6
    assert counts.tolist() == [int((target == c).sum()) for c in range(num_classes)]


@pytest.mark.parametrize(
    "rows, width, num_classes",
    [(1, 3, 1), (2, 3, 7), (33, 31, 5), (65, 129, 1), (130, 64, 3), (257, 17, 40), (31, 65, 300)],
)
def test_is_the_mean_direction_of_each_class(backend, rows, width, num_classes):
    assert_is_means(torch.randn(rows, width) + 3, torch.randint(num_classes, (rows,)), num_classes)


def test_most_rows_in_one_class(backend):
    target = torch.zeros(500, dtype=torch.int64)
    target[::50] = 2
    assert_is_means(torch.randn(500, 19), target, 4)


def test_absent_classes_are_zero(backend):
    actual, counts = prototypes(torch.randn(6, 5), torch.tensor([0, 0, 4, 4, 4, 0]), 6)
    assert counts.tolist() == [3, 0, 0, 0, 3, 0]
    assert not actual[counts == 0].any() and actual[counts > 0].any(1).all()


@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_ignored_rows_do_not_count(backend, ignore_index):
    x, target = torch.randn(9, 7), torch.tensor([0, 1, ignore_index, 1, 0, ignore_index, 3, 1, ignore_index])
    without = torch.where(target == ignore_index, -1, target)
    leaf = x.clone().requires_grad_()
    actual, counts = prototypes(leaf, target, 4, ignore_index)
    assert relative_l2(actual, means(x.double(), without, 4)) <= 1e-6 and counts.tolist() == [2, 3, 0, 1]
    (actual * torch.arange(28.0).view(4, 7).sqrt()).sum().backward()
    assert leaf.grad[without >= 0].any(1).all() and not leaf.grad[without < 0].any()


def test_all_rows_ignored(backend):
    value, gradient = value_and_gradients(
        lambda x: prototypes(x, torch.full((5,), -100), 3)[0].sum(), torch.randn(5, 7)
    )
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e4])
def test_constant_rows_count_and_have_no_direction(backend, constant):
    x, target = torch.randn(4, 7), torch.tensor([0, 0, 1, 1])
    x[1] = constant
    leaf = x.clone().requires_grad_()
    actual, counts = prototypes(leaf, target, 2)
    expected = means(x[[0]].double(), torch.tensor([0]), 1)[0] / 2
    assert counts.tolist() == [2, 2] and relative_l2(actual[0], expected) <= 1e-6
    actual.square().sum().backward()
    assert leaf.grad.isfinite().all() and not leaf.grad[1].any()


def test_rows_of_one_feature_have_no_direction(backend):
    value, gradient = value_and_gradients(lambda x: prototypes(x, torch.arange(4), 4)[0].sum(), torch.randn(4, 1))
    assert value == 0 and not gradient.any()


def test_features_without_elements(backend):
    actual, counts = prototypes(torch.randn(3, 0), torch.tensor([0, 1, 1]), 3)
    assert actual.shape == (3, 0) and counts.tolist() == [1, 2, 0]


def test_lengths_are_from_0_to_1(backend):
    x, target = torch.randn(40, 9), torch.arange(40) % 3
    x[target == 0] = x[0] * torch.rand(14, 1) + torch.randn(14, 1)  # one direction, at any scale and offset
    lengths = prototypes(x, target, 3)[0].norm(dim=1)
    torch.testing.assert_close(lengths[0], torch.tensor(1.0))
    assert (lengths[1:] < 0.9).all()


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_does_not_depend_on_scale(backend, scale):
    assert_is_means(scale * torch.randn(9, 7), torch.arange(9) % 3, 3)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_low_precision(backend, dtype):
    x, target, weights = torch.randn(33, 31).to(dtype), torch.arange(33) % 4, torch.randn(4, 31)
    assert_no_worse_than_eager(
        lambda x: (prototypes(x, target, 4)[0] * weights).sum(), lambda x: (means(x, target, 4) * weights).sum(), x
    )


def test_float64_is_exact():
    x, target = torch.randn(9, 7, dtype=torch.float64), torch.arange(9) % 3
    torch.testing.assert_close(prototypes(x, target, 3)[0], means(x, target, 3), rtol=1e-13, atol=1e-13)


def test_counts_carry_no_gradient(backend):
    actual, counts = prototypes(torch.randn(4, 3, requires_grad=True), torch.arange(4), 4)
    assert actual.requires_grad and not counts.requires_grad


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(2, 6, dtype=torch.int64)), TypeError, "x must be a floating-point tensor"),
        (dict(x=torch.zeros(6)), ValueError, r"x must have shape \[N, D\], got \[6\]"),
        (dict(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
        (dict(target=torch.zeros(2, 4)), TypeError, "target must be int64 class indices, got torch.float32"),
        (dict(target=torch.zeros(2, dtype=torch.int32)), TypeError, "target must be int64.*got torch.int32"),
        (dict(target=torch.zeros(3, dtype=torch.int64)), ValueError, r"target must have shape \[2\].*got \[3\]"),
        (dict(target=torch.tensor([0, 4])), ValueError, "target must hold class indices from 0 to 3 .*got 4"),
        (dict(target=torch.tensor([0, -1])), ValueError, "target must hold class indices from 0 to 3 .*got -1"),
        (dict(target=torch.zeros(2, dtype=torch.int64, device="meta")), ValueError, "target must be on the device"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        prototypes(**GOOD | change)
