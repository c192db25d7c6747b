"""linear_agreement: the forward pass of a linear block with its loss, and all gradients, against plain torch.

Beside the usual providers: ``separate``, F.linear followed by our agreement, and, forward only, ``matmul``, F.linear
alone.
"""

import pytest
import torch.nn.functional as F

from bllkern.functional import agreement, linear_agreement

from common import compared, provider

LARGE = (8192, 4096, 4096)  # rows, width, inner
SIZES = [(16, 16, 16), (128, 256, 256), (512, 1024, 1024), LARGE]


def plain(x, weight, bias, b):
    z = F.linear(x, weight, bias)
    return (F.softplus(z) + F.softplus(b) - F.softplus(z + b)).sum(-1).mean()


def separate(x, weight, bias, b):
    return agreement(F.linear(x, weight, bias), b)


def ours(x, weight, bias, b):
    return linear_agreement(x, weight, bias, b)[1]


@compared("separate", "matmul")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_linear_agreement(bench, which, sizes):
    if which == "matmul" and bench.backward:
        pytest.skip("a matrix product has no loss")
    if sizes == LARGE and bench.device == "cpu":
        pytest.skip("minutes on a CPU")
    rows, width, inner = sizes

    def inputs():
        weight = bench.randn(width, inner) / inner**0.5
        return bench.randn(rows, inner), weight, bench.randn(width), bench.randn(rows, width)

    others = {"separate": separate, "matmul": lambda x, weight, bias, b: F.linear(x, weight, bias)}
    function = others.get(which) or provider(which, plain, ours)
    x, weight, z = rows * inner, width * inner, rows * width
    # forward: x, weight and b read, z written; backward: gradients by z and b written, that by z read for each of two
    # products, which read x and weight again and write their gradients
    moved = x + weight + 2 * z + (2 * x + 2 * weight + 4 * z if bench.backward else 0)
    bench(f"linear_agreement bernoulli {sizes}", function, inputs, moved * bench.dtype.itemsize)
