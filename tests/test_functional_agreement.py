"""agreement against sums and integrals of products of torch.distributions, per backend."""

import math

import pytest
import torch
from torch.distributions import kl_divergence

from bllkern import families
from bllkern.functional import agreement

from checks import (
    LOW_PRECISION,
    NAMES,
    assert_matches_float64,
    assert_no_worse_than_eager,
    distribution,
    log_densities,
    log_sum,
    parameters,
    relative_l2,
    value_and_gradients,
)

pytestmark = pytest.mark.op("agreement")


def overlap(name, a, b):
    """``-log`` of the sum (integral) over z of ``alpha(z) beta(z)``, summed over units: [...]."""
    return -log_sum(name, log_densities(name, a) + log_densities(name, b))


def from_log_partitions(name, a, b):
    f = families.get(name)
    return f.A(a) + f.A(b) - f.A2(a + b)


@pytest.mark.parametrize("name", NAMES)
def test_is_minus_log_of_the_overlap(backend, name):
    a, b = (parameters(name, 5, 6, dtype=torch.float32) for _ in range(2))
    assert_matches_float64(lambda a, b: agreement(a, b, name, "none"), lambda a, b: overlap(name, a, b), a, b)


@pytest.mark.parametrize("name", NAMES)
def test_float64_is_exact(name):
    a, b = parameters(name, 5, 6), parameters(name, 5, 6)
    assert_matches_float64(
        lambda a, b: agreement(a, b, name), lambda a, b: overlap(name, a, b).mean(), a, b, tolerance=1e-12
    )


@pytest.mark.parametrize("name", ["bernoulli", "categorical:3", "categorical", "gaussian_learned"])
def test_gradient_by_a_is_that_of_the_divergence_from_the_posterior(backend, name):
    """KL(rho || alpha), rho held fixed: the same gradient where the base measure is constant."""
    a, b = (parameters(name, 5, 6, dtype=torch.float32) for _ in range(2))
    wide = a.double().requires_grad_()
    posterior = distribution(name, a.double() + b.double())
    (expected,) = torch.autograd.grad(kl_divergence(posterior, distribution(name, wide)).sum(), wide)
    _, gradient, _ = value_and_gradients(lambda a, b: agreement(a, b, name, "sum"), a, b)
    assert relative_l2(gradient, expected) <= 1e-6


@pytest.mark.parametrize("shape", [(1, 6), (3, 6), (1, 30), (2, 3, 66), (17, 258), (5, 1026), (3, 4098)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_reductions(backend, name, reduction, shape):
    a, b = (parameters(name, *shape, dtype=torch.float32) for _ in range(2))
    reduce = {"mean": torch.mean, "sum": torch.sum, "none": lambda rows: rows}[reduction]
    assert_matches_float64(
        lambda a, b: agreement(a, b, name, reduction), lambda a, b: reduce(from_log_partitions(name, a, b)), a, b
    )


@pytest.mark.parametrize("width", [1, 2, 3, 5, 7, 15, 17, 31, 33, 63, 65, 127, 129, 1023])
@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "poisson"])
def test_odd_widths(backend, name, width):
    a, b = (parameters(name, 3, width, dtype=torch.float32) for _ in range(2))
    assert_matches_float64(
        lambda a, b: agreement(a, b, name, "none"), lambda a, b: from_log_partitions(name, a, b), a, b
    )


@pytest.mark.parametrize("size", [2, 3, 5, 8, 9, 16, 33, 100])
def test_group_sizes(backend, size):
    a, b = torch.randn(3, 7 * size), torch.randn(3, 7 * size)
    name = f"categorical:{size}"
    assert_matches_float64(
        lambda a, b: agreement(a, b, families.Categorical(size)), lambda a, b: overlap(name, a, b).mean(), a, b
    )


def test_one_dimension_is_one_row(backend):
    a, b = torch.randn(7), torch.randn(7)
    assert agreement(a, b, reduction="none").shape == ()
    assert torch.equal(agreement(a, b), agreement(a[None], b[None]))


def test_one_class_has_nothing_to_disagree_on(backend):
    a, b = 3 * torch.randn(4, 5), 3 * torch.randn(4, 5)
    loss, by_a, by_b = value_and_gradients(lambda a, b: agreement(a, b, "categorical:1", "none"), a, b)
    assert loss.abs().max() <= 2e-6 and not by_a.any() and not by_b.any()


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_low_precision(backend, name, dtype):
    a, b = (parameters(name, 33, 66, dtype=dtype) for _ in range(2))
    assert_no_worse_than_eager(
        lambda a, b: agreement(a, b, name), lambda a, b: from_log_partitions(name, a, b).mean(), a, b
    )


@pytest.mark.parametrize("name", ["bernoulli", "categorical:3", "categorical", "gaussian", "gaussian_learned"])
def test_extreme_parameters(backend, name):
    a, b = 1e4 * (2 * torch.rand(16, 30) - 1), 1e4 * (2 * torch.rand(16, 30) - 1)
    a[:, :3], b[:, :6] = 1e4, -1e4
    if name == "gaussian_learned":
        a[:, 15:], b[:, 15:] = -a[:, 15:].abs(), -b[:, 15:].abs()
    actual = value_and_gradients(lambda a, b: agreement(a, b, name, "none"), a, b)
    truth = value_and_gradients(lambda a, b: from_log_partitions(name, a, b), a.double(), b.double())
    for x, t in zip(actual, truth, strict=True):
        assert x.isfinite().all() and relative_l2(x, t) <= 1e-6


def test_gaussians_that_are_far_out_and_close(backend):
    """The squares of the log-partitions are 5e7 here and cancel; what is left is 1/4 + log(4 pi) / 2."""
    a = torch.tensor([[1e4], [-1e4]])
    expected = torch.full((2,), 0.25 + math.log(4 * math.pi) / 2)
    torch.testing.assert_close(agreement(a, a + 1, "gaussian", "none"), expected)


@pytest.mark.parametrize("name", ["bernoulli", "categorical:3"])
def test_impossible_values(backend, name):
    """A parameter of -inf: what it stands for never happens."""
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    a[:, 1], b[:, 4] = -torch.inf, -torch.inf
    loss, by_a, by_b = value_and_gradients(lambda a, b: agreement(a, b, name, "none"), a, b)
    finite_a, finite_b = a.double().clamp(min=-1e3), b.double().clamp(min=-1e3)
    expected = value_and_gradients(lambda a, b: overlap(name, a, b), finite_a, finite_b)
    for x, t in zip((loss, by_a, by_b), expected, strict=True):
        assert relative_l2(x, t) <= 1e-6


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(a=torch.zeros(2, 3, dtype=torch.int64)), TypeError, "a must be a floating-point tensor.*int64"),
        (dict(b=torch.zeros(2, 3, dtype=torch.bool)), TypeError, "b must be a floating-point tensor.*bool"),
        (dict(b=torch.zeros(2, 4)), ValueError, r"b must have the shape of a, \[2, 3\], got \[2, 4\]"),
        (dict(b=torch.zeros(3)), ValueError, r"b must have the shape of a, \[2, 3\], got \[3\]"),
        (dict(a=torch.zeros(()), b=torch.zeros(())), ValueError, r"a must have shape \[\.\.\., D\], got \[\]"),
        (dict(b=torch.zeros(2, 3, device="meta")), ValueError, "b must be on the device of a, cpu, got meta"),
        (dict(reduction="max"), ValueError, r"reduction must be one of .*'none'.*got 'max'"),
        (dict(family="normal"), ValueError, "family must be one of"),
        (dict(family=7), TypeError, "family must be a name"),
        (dict(family="categorical:2"), ValueError, "a must have .*group_size 2, got 3"),
        (dict(family="gaussian_learned"), ValueError, "a must have an even last dimension"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        agreement(**dict(a=torch.zeros(2, 3), b=torch.zeros(2, 3)) | change)
