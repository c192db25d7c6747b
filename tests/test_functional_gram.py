"""similarity_matching and decorrelation against cosines taken pair by pair, per backend."""

import pytest
import torch
import torch.nn.functional as F

from bllkern import backends
from bllkern.functional import decorrelation, similarity_matching

from checks import LOW_PRECISION, assert_matches_float64, assert_no_worse_than_eager, relative_l2, value_and_gradients

matching = pytest.mark.op("similarity_matching")
decorrelating = pytest.mark.op("decorrelation")
sizes = pytest.mark.parametrize("rows, width", [(2, 3), (3, 7), (17, 5), (33, 31), (65, 130), (130, 33)])


def cosines(x):
    """Correlation coefficients of all pairs of rows [N, N]."""
    centred = x - x.mean(1, keepdim=True)
    return F.cosine_similarity(centred[:, None], centred[None], dim=-1)


def matched(x, target):
    same = cosines(target.to(x)) if target.is_floating_point() else (target[:, None] == target).to(x)
    return (cosines(x) - same).square().mean()


def off_diagonal(x):
    return (cosines(x) * (1 - torch.eye(len(x), dtype=x.dtype))).square().mean()


def targets(kind, rows):
    return torch.arange(rows) % 3 if kind == "indices" else torch.randn(rows, 6)


@matching
@sizes
@pytest.mark.parametrize("kind", ["indices", "rows"])
def test_similarity_is_mean_squared_difference_of_cosines(backend, rows, width, kind):
    x, target = torch.randn(rows, width), targets(kind, rows)
    assert_matches_float64(lambda x: similarity_matching(x, target), lambda x: matched(x, target), x)


@decorrelating
@sizes
def test_decorrelation_is_mean_squared_cosine_of_different_rows(backend, rows, width):
    assert_matches_float64(decorrelation, off_diagonal, torch.randn(rows, width))


@pytest.mark.parametrize("kind", ["indices", "rows"])
def test_float64_is_exact(kind):
    x, target = torch.randn(9, 7, dtype=torch.float64), targets(kind, 9)
    assert_matches_float64(lambda x: similarity_matching(x, target), lambda x: matched(x, target), x, tolerance=1e-12)
    assert_matches_float64(decorrelation, off_diagonal, x, tolerance=1e-12)


@matching
def test_without_repeated_labels_similarity_is_decorrelation(backend):
    x = torch.randn(17, 9)
    loss, gradient = value_and_gradients(lambda x: similarity_matching(x, torch.arange(17)), x)
    with backends.backend("reference"):
        expected, expected_gradient = value_and_gradients(decorrelation, x.double())
    assert relative_l2(loss, expected) <= 1e-6 and relative_l2(gradient, expected_gradient) <= 1e-6


@matching
def test_similarity_to_itself_is_zero(backend):
    x = torch.randn(17, 9)
    loss, gradient = value_and_gradients(lambda x_: similarity_matching(x_, x), x)
    assert loss <= 1e-12 and gradient.abs().max() <= 1e-6


@matching
def test_a_gradient_step_brings_same_classes_closer_and_others_apart(backend):
    x, target = torch.randn(24, 12), torch.arange(24) % 4
    loss, gradient = value_and_gradients(lambda x: similarity_matching(x, target), x)
    same = (target[:, None] == target) & ~torch.eye(24, dtype=torch.bool)
    different = target[:, None] != target
    before, after = cosines(x), cosines(x - 5 * gradient)
    assert after[same].mean() > before[same].mean() + 1e-3
    assert after[different].square().mean() < before[different].square().mean() - 1e-3
    assert similarity_matching(x - 5 * gradient, target) < loss


@decorrelating
def test_a_gradient_step_lowers_cosines(backend):
    x = torch.randn(24, 12)
    loss, gradient = value_and_gradients(decorrelation, x)
    assert decorrelation(x - 5 * gradient) < loss - 1e-3


@matching
@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_ignored_rows_do_not_count(backend, ignore_index):
    x, target = torch.randn(9, 7), torch.tensor([0, 1, ignore_index, 1, 0, ignore_index, 3, 1, ignore_index])
    counted = target != ignore_index
    assert_matches_float64(
        lambda x: similarity_matching(x, target, ignore_index), lambda x: matched(x[counted], target[counted]), x
    )
    _, gradient = value_and_gradients(lambda x: similarity_matching(x, target, ignore_index), x)
    assert not gradient[~counted].any()


@matching
def test_all_rows_ignored(backend):
    loss, gradient = value_and_gradients(lambda x: similarity_matching(x, torch.full((5,), -100)), torch.randn(5, 7))
    assert loss == 0 and not gradient.any()


@matching
def test_similarity_takes_negative_labels_as_classes(backend):
    x, target = torch.randn(5, 7), torch.tensor([-1, 4, -1, 70000, 4])
    assert_matches_float64(lambda x: similarity_matching(x, target), lambda x: matched(x, target), x)


@matching
def test_no_gradient_reaches_the_target(backend):
    x, target = torch.randn(5, 7, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    similarity_matching(x, target).backward()
    assert x.grad.any() and target.grad is None
    assert not similarity_matching(x.detach(), target).requires_grad


@matching
@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -1e4])
def test_constant_rows_have_no_direction(backend, constant):
    x, target = torch.randn(6, 7), torch.tensor([0, 0, 1, 1, 2, 2])
    x[1] = constant
    loss, gradient = value_and_gradients(lambda x: similarity_matching(x, target), x)
    expected = cosines(x.double())
    expected[1], expected[:, 1] = 0, 0
    torch.testing.assert_close(loss.double(), (expected - (target[:, None] == target).double()).square().mean())
    assert gradient.isfinite().all() and not gradient[1].any()


@decorrelating
@pytest.mark.parametrize("constant", [0.0, 1.0, 0.1, -1e4])
def test_constant_rows_have_nothing_to_decorrelate(backend, constant):
    x = torch.randn(6, 7)
    x[1] = constant
    loss, gradient = value_and_gradients(decorrelation, x)
    expected = off_diagonal(torch.cat([x[:1], x[2:]]).double()) * (5 / 6) ** 2
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert gradient.isfinite().all() and not gradient[1].any()


@matching
def test_rows_of_one_feature_are_constant(backend):
    loss, gradient = value_and_gradients(lambda x: similarity_matching(x, torch.arange(4)), torch.randn(4, 1))
    assert loss == 0.25 and not gradient.any()


@matching
def test_one_row_is_like_itself(backend):
    loss, gradient = value_and_gradients(lambda x: similarity_matching(x, torch.tensor([3])), torch.randn(1, 7))
    assert loss <= 1e-12 and gradient.abs().max() <= 1e-6


@decorrelating
def test_one_row_has_no_pair(backend):
    loss, gradient = value_and_gradients(decorrelation, torch.randn(1, 7))
    assert loss <= 1e-12 and gradient.abs().max() <= 1e-6


@matching
def test_similarity_bounds(backend):
    x = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert similarity_matching(x, torch.zeros(2, dtype=torch.int64)).item() == pytest.approx(2)  # cosine -1 for 1
    assert similarity_matching(x, torch.tensor([[1.0, -1.0], [1.0, -1.0]])).item() == pytest.approx(2)
    assert similarity_matching(x, x).item() == pytest.approx(0)


@decorrelating
def test_decorrelation_bounds(backend):
    x = torch.randn(1, 9)
    assert decorrelation(x.repeat(10, 1)).item() == pytest.approx(0.9)  # all but the diagonal
    orthogonal = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]])
    assert decorrelation(orthogonal).item() == 0


@matching
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_similarity_does_not_depend_on_scale(backend, scale):
    x, target = scale * torch.randn(9, 7), targets("indices", 9)
    assert_matches_float64(lambda x: similarity_matching(x, target), lambda x: matched(x, target), x)


@decorrelating
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_decorrelation_does_not_depend_on_scale(backend, scale):
    assert_matches_float64(decorrelation, off_diagonal, scale * torch.randn(9, 7))


@matching
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("kind", ["indices", "rows"])
def test_similarity_low_precision(backend, dtype, kind):
    target = targets(kind, 33)
    assert_no_worse_than_eager(
        lambda x: similarity_matching(x, target), lambda x: matched(x, target), torch.randn(33, 31).to(dtype)
    )


@decorrelating
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_decorrelation_low_precision(backend, dtype):
    assert_no_worse_than_eager(decorrelation, off_diagonal, torch.randn(33, 31).to(dtype))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(2, 6, dtype=torch.int64)), TypeError, "x must be a floating-point tensor"),
        (dict(x=torch.zeros(6)), ValueError, r"x must have shape \[N, D\], got \[6\]"),
        (dict(x=torch.zeros(2, 6, 1)), ValueError, r"x must have shape \[N, D\], got \[2, 6, 1\]"),
        (dict(target=torch.zeros(2, 1, dtype=torch.int64)), ValueError, r"target must have shape \[2\].*got \[2, 1\]"),
        (dict(target=torch.zeros(2, dtype=torch.int32)), TypeError, "target must be int64.*got torch.int32"),
        (dict(target=torch.zeros(3, 4)), ValueError, r"target must have shape \[2, E\] as floats, got \[3, 4\]"),
        (dict(target=torch.zeros(2)), ValueError, r"target must have shape \[2, E\] as floats, got \[2\]"),
        (dict(target=torch.zeros(2, 4, device="meta")), ValueError, "target must be on the device of x, cpu, got meta"),
    ],
)
def test_errors_of_similarity_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        similarity_matching(**dict(x=torch.zeros(2, 6), target=torch.tensor([0, 1])) | change)


def test_errors_of_decorrelation_name_the_argument():
    with pytest.raises(TypeError, match="x must be a floating-point tensor, got torch.int64"):
        decorrelation(torch.zeros(2, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x must have shape \[N, D\], got \[6\]"):
        decorrelation(torch.zeros(6))
