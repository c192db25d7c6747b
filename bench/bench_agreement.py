"""agreement: families, sizes and dtypes, forward and forward with backward, against plain torch."""

import math
from statistics import median

import pytest
import torch
import torch.nn.functional as F

from bllkern import families
from bllkern._native.module import empty
from bllkern.functional import agreement

from common import compared, provider, seconds, step

LARGE = {"cpu": (8192, 2048), "cuda": (32768, 4096)}
MEDIUM = (512, 2048)
OTHERS = ["gaussian", "gaussian_learned", "poisson", "categorical", "categorical:16"]
SIZES = [("bernoulli", (16, 256)), ("bernoulli", "large"), *((name, MEDIUM) for name in OTHERS)]


def plain(name, a, b):
    if name == "bernoulli":
        return (F.softplus(a) + F.softplus(b) - F.softplus(a + b)).sum(-1).mean()
    f = families.get(name)
    return (f.A(a) + f.A(b) - f.A2(a + b)).mean()


def page_seconds(shape, dtype):
    """What the system takes to map the pages of one new tensor, as glibc has it do for each of this size."""
    return median(seconds(lambda: empty(shape, torch.empty(0), dtype).view(-1)[::1024].zero_(), "cpu", rounds=9))


def arithmetic_seconds(bench, name, elements):
    """What a step of so many elements takes on these threads where nothing waits for memory.

    By the difference, which leaves out what a call costs, of two sizes that one thread's cache holds.
    """
    threads, times = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    for rows in (2, 32):
        inputs = tuple(families.get(name).natural(bench.randn(rows, 2048)) for _ in range(2))
        run = step(lambda a, b: agreement(a, b, name), inputs, bench.backward)
        times[rows * 2048] = median(seconds(run, "cpu", rounds=200))
    torch.set_num_threads(threads)
    (few, fast), (many, slow) = times.items()
    return (slow - fast) / (many - few) * elements / threads


@compared()
@pytest.mark.parametrize("name, size", SIZES, ids=lambda value: str(value).replace(" ", ""))
def test_agreement(bench, which, name, size):
    shape = LARGE[bench.device] if size == "large" else size

    def inputs():
        return tuple(families.get(name).natural(bench.randn(*shape)) for _ in range(2))

    function = provider(which, lambda a, b: plain(name, a, b), lambda a, b: agreement(a, b, name))
    tensors = 4 if bench.backward else 2
    bench(f"agreement {name} {size}", function, inputs, tensors * math.prod(shape) * bench.dtype.itemsize)
    if size == "large" and which == "bllkern" and bench.device == "cpu":
        arithmetic = arithmetic_seconds(bench, name, math.prod(shape))
        if bench.backward:
            bench.bound("its arithmetic, and pages of gradients", arithmetic + 2 * page_seconds(shape, bench.dtype))
        else:
            bench.bound("its arithmetic", arithmetic)
