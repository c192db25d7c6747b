"""evidence_cross_entropy against expectations under torch.distributions, per backend."""

import pytest
import torch
import torch.nn.functional as F

from bllkern import families
from bllkern.functional import evidence_cross_entropy, linear_cross_entropy

from checks import (
    LOW_PRECISION,
    NAMES,
    assert_matches_float64,
    assert_no_worse_than_eager,
    exponents,
    log_densities,
    log_sum,
    parameters,
    relative_l2,
    value_and_gradients,
)

pytestmark = pytest.mark.op("evidence_cross_entropy")
EVIDENCE_TOLERANCE = 1e-5  # log evidences are differences of sums over D units


def message_parameters(name, classes, width):
    """Messages whose log evidences differ by about 1, as logits do."""
    return parameters(name, classes, width, dtype=torch.float32) / (2 * width**0.5)


def expected_evidence(name, a, messages):
    """``log E_alpha[exp(T(z) . b_c)]`` for every row and class [N, C], by summing (integrating) over z."""
    return log_sum(name, log_densities(name, a)[:, None] + exponents(name, messages))


def from_log_partitions(name, a, messages):
    f = families.get(name)
    return f.A(a[:, None] + messages) - f.A(a)[:, None]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", NAMES)
def test_is_cross_entropy_over_expected_likelihoods(backend, name, reduction):
    a, messages = parameters(name, 5, 6, dtype=torch.float32), message_parameters(name, 4, 6)
    target = torch.tensor([0, 3, 3, 1, 2])
    assert_matches_float64(
        lambda a, m: evidence_cross_entropy(a, m, target, name, reduction),
        lambda a, m: F.cross_entropy(expected_evidence(name, a, m), target, reduction=reduction),
        *(a, messages),
        tolerance=EVIDENCE_TOLERANCE,
    )


@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("name", NAMES)
def test_log_prior(backend, name, ignore_index):
    a, messages = parameters(name, 5, 6, dtype=torch.float32), message_parameters(name, 4, 6)
    target = torch.tensor([0, 3, 3, 1, 2])
    assert_matches_float64(
        lambda a, m, p: evidence_cross_entropy(a, m, target, name, ignore_index=ignore_index, log_prior=p),
        lambda a, m, p: F.cross_entropy(expected_evidence(name, a, m) + p, target, ignore_index=ignore_index),
        *(a, messages, torch.randn(4)),
        tolerance=EVIDENCE_TOLERANCE,
    )


@pytest.mark.parametrize("name", NAMES)
def test_float64_is_exact(name):
    a, messages, target = parameters(name, 5, 6), message_parameters(name, 4, 6).double(), torch.tensor([0, 3, 3, 1, 2])
    assert_matches_float64(
        lambda a, m: evidence_cross_entropy(a, m, target, name),
        lambda a, m: F.cross_entropy(expected_evidence(name, a, m), target),
        *(a, messages),
        tolerance=1e-12,
    )


@pytest.mark.parametrize("rows, classes, width", [(1, 2, 6), (3, 17, 30), (33, 5, 66), (7, 130, 18), (2, 3, 1026)])
@pytest.mark.parametrize("name", NAMES)
def test_sizes(backend, name, rows, classes, width):
    a = parameters(name, rows, width, dtype=torch.float32)
    messages = message_parameters(name, classes, width)
    target = torch.randint(classes, (rows,))
    assert_matches_float64(
        lambda a, m: evidence_cross_entropy(a, m, target, name),
        lambda a, m: F.cross_entropy(from_log_partitions(name, a, m), target),
        *(a, messages),
        tolerance=EVIDENCE_TOLERANCE,
    )


@pytest.mark.parametrize("width", [1, 3, 7, 15, 17, 31, 33, 129])
@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "poisson"])
def test_odd_widths(backend, name, width):
    a = parameters(name, 5, width, dtype=torch.float32)
    messages = message_parameters(name, 3, width)
    target = torch.tensor([0, 1, 2, 1, 0])
    assert_matches_float64(
        lambda a, m: evidence_cross_entropy(a, m, target, name),
        lambda a, m: F.cross_entropy(from_log_partitions(name, a, m), target),
        *(a, messages),
        tolerance=EVIDENCE_TOLERANCE,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", NAMES)
def test_class_probabilities(backend, name, reduction):
    a, messages = parameters(name, 5, 6, dtype=torch.float32), message_parameters(name, 4, 6)
    target = torch.rand(5, 4).softmax(1)
    assert_matches_float64(
        lambda a, m: evidence_cross_entropy(a, m, target, name, reduction),
        lambda a, m: F.cross_entropy(from_log_partitions(name, a, m), target.double(), reduction=reduction),
        *(a, messages),
        tolerance=EVIDENCE_TOLERANCE,
    )


@pytest.mark.parametrize("label_smoothing", [0.1, 1.0])
@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("name", NAMES)
def test_label_smoothing(backend, name, soft, label_smoothing):
    a, messages = parameters(name, 5, 6, dtype=torch.float32), message_parameters(name, 4, 6)
    target = torch.rand(5, 4).softmax(1) if soft else torch.tensor([0, 3, 3, 1, 2])
    expected = target.double() if soft else target
    assert_matches_float64(
        lambda a, m, p: evidence_cross_entropy(a, m, target, name, log_prior=p, label_smoothing=label_smoothing),
        lambda a, m, p: F.cross_entropy(from_log_partitions(name, a, m) + p, expected, label_smoothing=label_smoothing),
        *(a, messages, torch.randn(4)),
        tolerance=EVIDENCE_TOLERANCE,
    )


def test_label_smoothing_of_many_classes(backend):
    """What thousands of equal shares add up to."""
    a, messages, target = torch.randn(6, 9), message_parameters("bernoulli", 5003, 9), torch.randint(5003, (6,))
    assert_matches_float64(
        lambda a, m: evidence_cross_entropy(a, m, target, label_smoothing=0.5),
        lambda a, m: F.cross_entropy(from_log_partitions("bernoulli", a, m), target, label_smoothing=0.5),
        *(a, messages),
        tolerance=EVIDENCE_TOLERANCE,
    )


def test_one_hot_probabilities_are_class_indices(backend):
    a, messages, target = torch.randn(5, 6), torch.randn(4, 6), torch.tensor([0, 3, 3, 1, 2])
    by_index = value_and_gradients(lambda a, m: evidence_cross_entropy(a, m, target), a, messages)
    one_hot = F.one_hot(target, 4).float()
    by_row = value_and_gradients(lambda a, m: evidence_cross_entropy(a, m, one_hot), a, messages)
    torch.testing.assert_close(by_index, by_row)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_ignored_rows_do_not_count(backend, reduction, ignore_index, label_smoothing):
    a, messages = torch.randn(5, 6), torch.randn(4, 6)
    target = torch.tensor([0, ignore_index, 3, ignore_index, 1])
    settings = dict(reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing)
    assert_matches_float64(
        lambda a, m: evidence_cross_entropy(a, m, target, "bernoulli", **settings),
        lambda a, m: F.cross_entropy(from_log_partitions("bernoulli", a, m), target, **settings),
        *(a, messages),
        tolerance=EVIDENCE_TOLERANCE,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_all_rows_ignored(backend, reduction, label_smoothing):
    settings = dict(target=torch.full((5,), -100), reduction=reduction, label_smoothing=label_smoothing)
    results = value_and_gradients(
        lambda a, m: evidence_cross_entropy(a, m, **settings), torch.randn(5, 6), torch.randn(4, 6)
    )
    assert all(torch.equal(x, torch.zeros_like(x)) for x in results)


def test_one_class_costs_nothing(backend):
    target = torch.zeros(5, dtype=torch.int64)
    results = value_and_gradients(
        lambda a, m: evidence_cross_entropy(a, m, target), torch.randn(5, 6), torch.randn(1, 6)
    )
    assert all(torch.equal(x, torch.zeros_like(x)) for x in results)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gaussian_is_a_linear_head_with_tied_bias(backend, reduction):
    a, messages, target = torch.randn(9, 13), torch.randn(4, 13), torch.randint(4, (9,))
    assert_matches_float64(
        lambda a, m: evidence_cross_entropy(a, m, target, "gaussian", reduction),
        lambda a, m: linear_in_float64(a, m, target, reduction),
        *(a, messages),
        tolerance=EVIDENCE_TOLERANCE,
    )


def linear_in_float64(a, messages, target, reduction):
    return F.cross_entropy(a @ messages.T + messages.square().sum(1) / 2, target, reduction=reduction)


def test_gaussian_is_linear_cross_entropy_with_tied_bias():
    a, messages = torch.randn(9, 13, dtype=torch.float64), torch.randn(4, 13, dtype=torch.float64)
    target = torch.randint(4, (9,))
    assert_matches_float64(
        lambda a, m: evidence_cross_entropy(a, m, target, "gaussian"),
        lambda a, m: linear_cross_entropy(a, m, m.square().sum(1) / 2, target),
        *(a, messages),
        tolerance=1e-12,
    )


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_low_precision(backend, name, dtype):
    a = parameters(name, 17, 30, dtype=dtype)
    messages = message_parameters(name, 5, 30).to(dtype)
    target = torch.randint(5, (17,))
    assert_no_worse_than_eager(
        lambda a, m: evidence_cross_entropy(a, m, target, name),
        lambda a, m: F.cross_entropy(from_log_partitions(name, a, m), target),
        *(a, messages),
    )


@pytest.mark.parametrize("name", ["bernoulli", "categorical:3", "categorical", "gaussian"])
def test_extreme_parameters(backend, name):
    a, messages = 1e4 * (2 * torch.rand(6, 30) - 1), 1e4 * (2 * torch.rand(4, 30) - 1)
    a[:, :3], messages[0] = 1e4, -1e4
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    actual = value_and_gradients(lambda a, m: evidence_cross_entropy(a, m, target, name), a, messages)
    truth = value_and_gradients(
        lambda a, m: F.cross_entropy(from_log_partitions(name, a, m), target), a.double(), messages.double()
    )
    for x, t in zip(actual, truth, strict=True):
        assert x.isfinite().all() and relative_l2(x, t) <= EVIDENCE_TOLERANCE


@pytest.mark.parametrize("name", ["bernoulli", "categorical:3"])
def test_messages_that_exclude_a_value(backend, name):
    """A parameter of -inf: the class never shows that bit, or that member of the group."""
    a, messages, target = torch.randn(5, 6), torch.randn(4, 6), torch.tensor([0, 3, 3, 1, 2])
    messages[:, 1] = messages[2, 5] = -torch.inf
    actual = value_and_gradients(lambda a, m: evidence_cross_entropy(a, m, target, name), a, messages)
    truth = value_and_gradients(
        lambda a, m: F.cross_entropy(expected_evidence(name, a, m), target),
        a.double(),
        messages.double().clamp(min=-1e3),
    )
    for x, t in zip(actual, truth, strict=True):
        assert relative_l2(x, t) <= EVIDENCE_TOLERANCE


def test_classes_that_exclude_the_sample(backend):
    """Forward message and message 0 share no possible value: the log evidence is -inf, and costs nothing."""
    a, messages, target = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([1, 2, 1])
    a[:, 0] = messages[0, 1] = -torch.inf
    actual = value_and_gradients(lambda a, m: evidence_cross_entropy(a, m, target, "categorical:2"), a, messages)
    truth = value_and_gradients(
        lambda a, m: F.cross_entropy(expected_evidence("categorical:2", a, m), target),
        *(x.double().clamp(min=-1e3) for x in (a, messages)),
    )
    for x, t in zip(actual, truth, strict=True):
        assert relative_l2(x, t) <= EVIDENCE_TOLERANCE


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(a=torch.zeros(2, 6, dtype=torch.int64)), TypeError, "a must be a floating-point tensor"),
        (dict(messages=torch.zeros(4, 6, dtype=torch.int64)), TypeError, "messages must be a floating-point tensor"),
        (dict(a=torch.zeros(6)), ValueError, r"a must have shape \[N, D\], got \[6\]"),
        (dict(messages=torch.zeros(4, 5)), ValueError, r"messages must have shape \[C, 6\].*got \[4, 5\]"),
        (dict(messages=torch.zeros(0, 6)), ValueError, r"messages must have shape \[C, 6\] with C >= 1, got \[0, 6\]"),
        (dict(messages=torch.zeros(4, 6, device="meta")), ValueError, "messages must be on the device of a, cpu"),
        (dict(target=torch.zeros(2, dtype=torch.int64, device="meta")), ValueError, "target must be on the device"),
        (dict(target=torch.zeros(3, dtype=torch.int64)), ValueError, r"target must have shape \[2\].*got \[3\]"),
        (dict(target=torch.zeros(2, dtype=torch.int32)), TypeError, "target must be int64.*got torch.int32"),
        (dict(target=torch.zeros(2, 3)), ValueError, r"target must have shape \[2, 4\] as floats, got \[2, 3\]"),
        (dict(target=torch.tensor([0, 4])), ValueError, r"target must hold class indices from 0 to 3 .*got 4"),
        (dict(target=torch.tensor([-1, 0])), ValueError, r"target must hold .*ignore_index -100\), got -1"),
        (dict(family="normal"), ValueError, "family must be one of"),
        (dict(family="categorical:4"), ValueError, "a must have .*group_size 4, got 6"),
        (dict(log_prior=torch.zeros(3)), ValueError, r"log_prior must be None or have shape \[4\], got \[3\]"),
        (dict(log_prior=torch.zeros(4, device="meta")), ValueError, "log_prior must be on the device of a, cpu"),
        (dict(label_smoothing=1.5), ValueError, "label_smoothing must be from 0 to 1, got 1.5"),
        (dict(label_smoothing=float("nan")), ValueError, "label_smoothing must be from 0 to 1, got nan"),
        (dict(reduction="none"), ValueError, r"reduction must be one of \('mean', 'sum'\), got 'none'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    good = dict(a=torch.zeros(2, 6), messages=torch.zeros(4, 6), target=torch.tensor([0, 3]))
    with pytest.raises(error, match=message):
        evidence_cross_entropy(**good | change)
