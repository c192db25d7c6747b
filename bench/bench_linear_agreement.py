"""linear_agreement: the forward pass of a linear block with its loss, and all gradients, against plain torch.

Beside the usual providers: ``separate``, F.linear followed by our agreement, and, forward only, ``matmul``, F.linear
alone.
"""

import pytest
import torch
import torch.nn.functional as F

from bllkern.functional import agreement, linear_agreement

from common import DEVICES, PROVIDERS, provider

SIZES = {"cpu": [(16, 16, 16), (128, 256, 256), (512, 1024, 1024)], "cuda": [(512, 1024, 1024), (8192, 4096, 4096)]}
CASES = [(device, sizes) for device in ("cpu", "cuda") for sizes in SIZES[device]]
MARKS = {mark.values[0]: mark.marks for mark in DEVICES if not isinstance(mark, str)}


def plain(x, weight, bias, b):
    z = F.linear(x, weight, bias)
    return (F.softplus(z) + F.softplus(b) - F.softplus(z + b)).sum(-1).mean()


def separate(x, weight, bias, b):
    return agreement(F.linear(x, weight, bias), b)


def ours(x, weight, bias, b):
    return linear_agreement(x, weight, bias, b)[1]


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "device, sizes", [pytest.param(*case, marks=MARKS.get(case[0], ()), id=f"{case[0]}-{case[1]}") for case in CASES]
)
@pytest.mark.parametrize("which", [*PROVIDERS, "separate", "matmul"])
def test_linear_agreement(bench, benchmark, which, device, sizes, dtype, direction):
    backward = direction == "forward+backward"
    if which == "compile" and device == "cpu" and (dtype != "float32" or not backward):
        pytest.skip("compiling takes longer than it tells")
    if which == "matmul" and backward:
        pytest.skip("a matrix product has no loss")
    benchmark.group = f"linear_agreement bernoulli {sizes} {dtype} {direction} {device}"
    rows, width, inner = sizes

    def inputs():
        draw = lambda *shape: torch.randn(shape, device=device).to(getattr(torch, dtype))  # noqa: E731
        return draw(rows, inner), draw(width, inner) / inner**0.5, draw(width), draw(rows, width)

    others = {"separate": separate, "matmul": lambda x, weight, bias, b: F.linear(x, weight, bias)}
    function = others.get(which) or provider(which, plain, ours)
    x, weight, z = rows * inner, width * inner, rows * width
    # forward: x, weight and b read, z written; backward: gradients by z and b written, that by z read for each of two
    # products, which read x and weight again and write their gradients
    moved = x + weight + 2 * z + (2 * x + 2 * weight + 4 * z if backward else 0)
    bench(function, inputs, backward, moved * getattr(torch, dtype).itemsize)
