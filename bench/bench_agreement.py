"""agreement: families, sizes and dtypes, forward and forward with backward, against plain torch."""

import math

import pytest
import torch
import torch.nn.functional as F

from bllkern import families
from bllkern.functional import agreement

from common import DEVICES, PROVIDERS, provider

LARGE = {"cpu": (8192, 2048), "cuda": (32768, 4096)}
MEDIUM = (512, 2048)
OTHERS = ["gaussian", "gaussian_learned", "poisson", "categorical", "categorical:16"]
SIZES = [("bernoulli", (1, 16)), ("bernoulli", (16, 256)), ("bernoulli", "large"), *((name, MEDIUM) for name in OTHERS)]
CASES = [(name, size, dtype) for name, size in SIZES for dtype in ("float32", "bfloat16")]


def plain(name, a, b):
    if name == "bernoulli":
        return (F.softplus(a) + F.softplus(b) - F.softplus(a + b)).sum(-1).mean()
    f = families.get(name)
    return (f.A(a) + f.A(b) - f.A2(a + b)).mean()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("name, size, dtype", CASES, ids=lambda value: str(value).replace(" ", ""))
@pytest.mark.parametrize("which", PROVIDERS)
def test_agreement(bench, benchmark, which, name, size, dtype, direction, device):
    backward = direction == "forward+backward"
    if which == "compile" and (dtype != "float32" or not backward) and device == "cpu":
        pytest.skip("compiling takes longer than it tells")
    benchmark.group = f"agreement {name} {size} {dtype} {direction} {device}"
    shape = LARGE[device] if size == "large" else size

    def inputs():
        draw = families.get(name).natural
        return tuple(draw(torch.randn(shape, device=device)).to(getattr(torch, dtype)) for _ in range(2))

    function = provider(which, lambda a, b: plain(name, a, b), lambda a, b: agreement(a, b, name))
    tensors = 4 if backward else 2
    bench(function, inputs, backward, tensors * math.prod(shape) * getattr(torch, dtype).itemsize)
