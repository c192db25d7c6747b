"""agreement: families, sizes and dtypes, forward and forward with backward, against plain torch."""

import math

import pytest
import torch.nn.functional as F

from bllkern import families
from bllkern.functional import agreement

from common import compared, provider

LARGE = {"cpu": (8192, 2048), "cuda": (32768, 4096)}
MEDIUM = (512, 2048)
OTHERS = ["gaussian", "gaussian_learned", "poisson", "categorical", "categorical:16"]
SIZES = [("bernoulli", (16, 256)), ("bernoulli", "large"), *((name, MEDIUM) for name in OTHERS)]


def plain(name, a, b):
    if name == "bernoulli":
        return (F.softplus(a) + F.softplus(b) - F.softplus(a + b)).sum(-1).mean()
    f = families.get(name)
    return (f.A(a) + f.A(b) - f.A2(a + b)).mean()


@compared()
@pytest.mark.parametrize("name, size", SIZES, ids=lambda value: str(value).replace(" ", ""))
def test_agreement(bench, which, name, size):
    shape = LARGE[bench.device] if size == "large" else size

    def inputs():
        return tuple(families.get(name).natural(bench.randn(*shape)) for _ in range(2))

    function = provider(which, lambda a, b: plain(name, a, b), lambda a, b: agreement(a, b, name))
    tensors = 4 if bench.backward else 2
    bench(f"agreement {name} {size}", function, inputs, tensors * math.prod(shape) * bench.dtype.itemsize)
