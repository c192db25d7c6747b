"""linear_agreement against F.linear followed by agreement, per backend."""

import pytest
import torch
import torch.nn.functional as F

from bllkern import families
from bllkern.functional import agreement, linear_agreement

from checks import (
    LOW_PRECISION,
    NAMES,
    Results,
    assert_matches_float64,
    assert_no_worse_than_eager,
    parameters,
    relative_l2,
    value_and_gradients,
)

pytestmark = pytest.mark.op("linear_agreement")


def block(name, rows, width, inner, dtype=torch.float32):
    """x, weight, b and bias of a block whose activations are natural parameters."""
    weight, bias = torch.randn(width, inner) / max(inner, 1) ** 0.5, torch.randn(width)
    if name == "gaussian_learned":  # the second half of an activation must be negative
        weight[width // 2 :] = 0
        bias[width // 2 :] = -bias[width // 2 :].abs() - 0.1
    x, b = torch.randn(rows, inner), parameters(name, rows, width)
    return [tensor.to(dtype) for tensor in (x, weight, b, bias)]


def loss_of(name, reduction="mean"):
    return lambda x, weight, b, bias=None: linear_agreement(x, weight, bias, b, name, reduction)[1]


def formula(name, reduction="mean"):
    f = families.get(name)

    def loss(x, weight, b, bias=None):
        z = F.linear(x, weight, bias)
        return getattr(f.A(z) + f.A(b) - f.A2(z + b), reduction)()

    return loss


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", NAMES)
def test_is_linear_then_agreement(backend, name, reduction):
    x, weight, b, bias = block(name, 9, 6, 5)
    z, loss = linear_agreement(x, weight, bias, b, name, reduction)
    torch.testing.assert_close(z, F.linear(x, weight, bias))
    torch.testing.assert_close(loss, agreement(z, b, name, reduction))
    assert_matches_float64(loss_of(name, reduction), formula(name, reduction), x, weight, b, bias)


@pytest.mark.parametrize("name", NAMES)
def test_without_bias(backend, name):
    x, weight, b, bias = block(name, 9, 6, 5)
    if name == "gaussian_learned":
        weight[3:, 0], x[:, 0] = bias[3:], 1
    assert_matches_float64(loss_of(name), formula(name), x, weight, b)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (3, 5, 7), (17, 33, 9), (65, 130, 31), (2, 3, 1025), (129, 1, 2)], ids=str
)
@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "poisson"])
def test_odd_sizes(backend, name, sizes):
    tensors = block(name, *sizes)
    actual = value_and_gradients(loss_of(name), *tensors)
    eager = value_and_gradients(formula(name), *tensors)
    truth = value_and_gradients(formula(name), *(x.double() for x in tensors))
    for x, e, t in zip(actual, eager, truth, strict=True):
        assert relative_l2(x, t) <= relative_l2(e, t) + 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_both_outputs(name):
    tensors = [x.requires_grad_() for x in block(name, 4, 6, 3, torch.float64)]
    assert torch.autograd.gradcheck(lambda x, weight, b, bias: linear_agreement(x, weight, bias, b, name), tensors)


def test_activation_and_loss_share_one_backward(backend):
    x, weight, b, bias = (tensor.requires_grad_() for tensor in block("bernoulli", 9, 6, 5))
    z, loss = linear_agreement(x, weight, bias, b)
    gradients = torch.autograd.grad(3 * loss + z.sin().sum(), (x, weight, b, bias))
    z = F.linear(x, weight, bias)
    expected = torch.autograd.grad(3 * agreement(z, b) + z.sin().sum(), (x, weight, b, bias))
    for gradient, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, e)


def test_activation_does_not_depend_on_the_message():
    x, weight, b, bias = block("bernoulli", 9, 6, 5)
    z, loss = linear_agreement(x, weight, bias, b.requires_grad_())
    assert loss.requires_grad and not z.requires_grad
    z, _ = linear_agreement(x.requires_grad_(), weight, bias, b)
    assert torch.autograd.grad(z.sum(), b, allow_unused=True) == (None,)


def test_a_message_alone_gets_its_scaled_gradient(backend):
    x, weight, b, bias = block("bernoulli", 9, 6, 5)
    (gradient,) = torch.autograd.grad(3 * linear_agreement(x, weight, bias, b.requires_grad_())[1], b)
    (expected,) = torch.autograd.grad(3 * agreement(F.linear(x, weight, bias), b), b)
    torch.testing.assert_close(gradient, expected)


def test_only_what_is_asked_for_is_computed(backend):
    for needed in range(4):
        x, weight, b, bias = tensors = block("bernoulli", 9, 6, 5)
        tensors[needed].requires_grad_()
        with Results() as results:
            linear_agreement(x, weight, bias, b)[1].backward()
        ((_, _, by_z, by_b),) = results.kept
        assert (by_z is not None, by_b is not None) == (needed != 2, needed == 2)
        assert [tensor.grad is not None for tensor in tensors] == [i == needed for i in range(4)]


def test_no_gradient_without_grad_mode(backend):
    x, weight, b, bias = (tensor.requires_grad_() for tensor in block("bernoulli", 9, 6, 5))
    with torch.no_grad(), Results() as results:
        z, loss = linear_agreement(x, weight, bias, b)
    assert not z.requires_grad and not loss.requires_grad and results.kept[0][2:] == (None, None)


def test_empty_batch(backend):
    x, weight, b, bias = (tensor.requires_grad_() for tensor in block("bernoulli", 0, 6, 5))
    z, loss = linear_agreement(x, weight, bias, b)
    loss.backward()
    assert z.shape == (0, 6) and loss == 0
    assert not weight.grad.any() and not bias.grad.any() and x.grad.shape == (0, 5)


def test_no_inputs_leave_the_bias(backend):
    x, weight, b, bias = block("bernoulli", 3, 6, 0)
    z, loss = linear_agreement(x, weight, bias, b)
    assert torch.equal(z, bias.expand(3, 6))
    torch.testing.assert_close(loss, agreement(bias.expand(3, 6), b))


def test_non_contiguous(backend):
    tensors = block("bernoulli", 9, 6, 5)
    views = [torch.stack([x, x + 1], -1)[..., 0].detach().requires_grad_() for x in tensors]
    assert not any(x.is_contiguous() for x in views)
    loss = loss_of("bernoulli")(*views)
    plain = value_and_gradients(loss_of("bernoulli"), *tensors)
    for x, p in zip((loss, *torch.autograd.grad(loss, views)), plain, strict=True):
        torch.testing.assert_close(x, p)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_low_precision(backend, name, dtype):
    x, weight, b, bias = block(name, 33, 66, 40, dtype)
    assert linear_agreement(x, weight, bias, b, name)[0].dtype == dtype
    assert_no_worse_than_eager(loss_of(name), formula(name), x, weight, b, bias)


def test_differing_dtypes_are_promoted(backend):
    x, weight, b, bias = block("bernoulli", 9, 6, 5)
    z, loss = linear_agreement(x.bfloat16(), weight, bias, b)
    expected_z, expected_loss = linear_agreement(x.bfloat16().float(), weight, bias, b)
    assert torch.equal(z, expected_z) and torch.equal(loss, expected_loss)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", NAMES)
def test_row_weights(backend, name, reduction):
    tensors, f = block(name, 9, 6, 5), families.get(name)
    weights = torch.rand(9).where(torch.arange(9) % 4 > 0, 0)

    def weighted(x, weight, b, bias):
        z = F.linear(x, weight, bias)
        return getattr((f.A(z) + f.A(b) - f.A2(z + b)) * weights.to(z.dtype), reduction)()

    loss = lambda x, weight, b, bias: linear_agreement(x, weight, bias, b, name, reduction, weights)[1]  # noqa: E731
    assert_matches_float64(loss, weighted, *tensors)


def test_a_message_keeps_its_dtype(backend):
    x, weight, b, bias = block("bernoulli", 9, 6, 5)
    low = [tensor.bfloat16().requires_grad_() for tensor in (x, weight, bias)]
    z, loss = linear_agreement(*low, b.requires_grad_())
    loss.backward()
    assert z.dtype == low[0].grad.dtype == torch.bfloat16 and b.grad.dtype == torch.float32
    assert_no_worse_than_eager(loss_of("bernoulli"), formula("bernoulli"), *low[:2], b, low[2])


@pytest.mark.parametrize("function", ["loss", "both"])
def test_compiles_into_one_graph(function):
    torch.compiler.reset()
    tensors = block("bernoulli", 9, 6, 5)

    def step(x, weight, b, bias):
        z, loss = linear_agreement(torch.tanh(x), weight, bias, b)
        return 2 * loss if function == "loss" else 2 * loss + z.sin().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = value_and_gradients(step, *tensors)
    for x, e in zip(value_and_gradients(compiled, *tensors), expected, strict=True):
        torch.testing.assert_close(x, e)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(2, 3, dtype=torch.int64)), TypeError, "x must be a floating-point tensor.*int64"),
        (dict(b=torch.zeros(2, 4, dtype=torch.bool)), TypeError, "b must be a floating-point tensor.*bool"),
        (dict(x=torch.zeros(2, 3, 1)), ValueError, r"x must have shape \[N, K\], got \[2, 3, 1\]"),
        (dict(weight=torch.zeros(4, 2)), ValueError, r"weight must have shape \[D, 3\], got \[4, 2\]"),
        (dict(bias=torch.zeros(3)), ValueError, r"bias must be None or have shape \[4\], got \[3\]"),
        (dict(b=torch.zeros(2, 3)), ValueError, r"b must have shape \[2, 4\], got \[2, 3\]"),
        (dict(b=torch.zeros(2, 4, device="meta")), ValueError, "b must be on the device of x, cpu, got meta"),
        (dict(row_weights=torch.zeros(3)), ValueError, r"row_weights must be None or floats of shape \[2\].*\[3\]"),
        (dict(row_weights=torch.ones(2, dtype=torch.bool)), ValueError, "row_weights must be None or floats.*bool"),
        (dict(reduction="none"), ValueError, r"reduction must be one of \('mean', 'sum'\), got 'none'"),
        (dict(family="normal"), ValueError, "family must be one of"),
        (dict(family="categorical:3"), ValueError, "b must have .*group_size 3, got 4"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    given = dict(x=torch.zeros(2, 3), weight=torch.zeros(4, 3), bias=torch.zeros(4), b=torch.zeros(2, 4)) | change
    with pytest.raises(error, match=message):
        linear_agreement(**given)
