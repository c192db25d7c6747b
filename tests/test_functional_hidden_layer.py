"""The hidden layer of local heads: the compiled kernel and torch's formula, against float64."""

import pytest
import torch
import torch.nn.functional as F

from bllkern import _native, backends
from bllkern.functional.hidden_layer import hidden_layer

from checks import relative_l2

SHAPES = [(16, 512, 128), (3, 7, 5), (33, 70, 17), (6, 2, 1), (5, 40, 130)]  # rows, width, units


def formula(x, weight):
    return torch.relu(F.batch_norm(F.linear(x, weight), None, None, training=True))


def inputs(rows, width, units, dtype=torch.float32):
    torch.manual_seed(0)
    tensors = torch.randn(rows, width), torch.randn(units, width) / width**0.5, torch.randn(rows, units)
    return [t.to(dtype) for t in tensors]


def results(function, x, weight, upstream):
    """The value and its gradients times ``upstream``."""
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def compiled(x, weight):
    return "HiddenLayer" in hidden_layer(x.detach().requires_grad_(), weight).grad_fn.name()


def check(x, weight, upstream, tolerance=1e-6):
    expected = results(formula, *(t.double() for t in (x, weight, upstream)))
    for got, e in zip(results(hidden_layer, x, weight, upstream), expected, strict=True):
        assert got.shape == e.shape and got.dtype == x.dtype and relative_l2(got, e) < tolerance


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_instruction_set(isa, shape):
    given = inputs(*shape)
    assert compiled(*given[:2])
    check(*given)


def test_float64_large_products_and_other_backends_are_torch_s():
    given = inputs(6, 5, 4, torch.float64)
    assert not compiled(*given[:2])
    check(*given, tolerance=1e-12)
    large = inputs(130, 640, 128)
    assert not compiled(*large[:2])
    check(*large)
    with backends.backend("reference"):
        assert not compiled(*inputs(6, 5, 4)[:2])
    with torch.autocast("cpu", torch.bfloat16):
        assert hidden_layer(*inputs(6, 5, 4)[:2]).dtype == torch.bfloat16


@pytest.mark.skipif(_native.error is not None, reason=str(_native.error))
def test_other_strides_and_one_gradient_alone():
    x, weight, upstream = inputs(12, 20, 9)
    for given in [(x.t().contiguous().t(), weight, upstream), (x, weight[:, ::2].repeat(1, 2), upstream),
                  (x[::2], weight[::3], upstream[::2, ::3])]:  # fmt: skip
        assert compiled(*given[:2])
        check(*given)
    whole = results(hidden_layer, x, weight, upstream)
    for i in range(2):
        leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate((x, weight))]
        (alone,) = torch.autograd.grad(hidden_layer(*leaves), leaves[i], upstream)
        assert torch.equal(alone, whole[1 + i])


def test_bits_do_not_depend_on_the_number_of_threads():
    given, found = inputs(*SHAPES[0]), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found.append(results(hidden_layer, *given))
    torch.set_num_threads(2)
    assert all(torch.equal(a, b) for one in found for a, b in zip(found[0], one, strict=True))


def test_equal_rows_and_one_row_have_no_gradient():
    x, weight, upstream = inputs(4, 6, 5)
    for rows in (1, 4):
        out, *gradients = results(hidden_layer, x[:1].repeat(rows, 1), weight, upstream[:rows])
        assert max(t.abs().max() for t in (out, *gradients)) < 1e-3


def test_no_rows():
    out, *gradients = results(hidden_layer, *inputs(0, 6, 5))
    assert out.shape == (0, 5) and not gradients[1].any()


def test_widths_that_differ():
    x, weight, _ = inputs(4, 6, 5)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        hidden_layer(x[:, :5], weight)
