"""evidence_cross_entropy: families, sizes and dtypes, forward and forward with backward, against plain torch."""

import math

import pytest
import torch
import torch.nn.functional as F

from bllkern import families
from bllkern.functional import evidence_cross_entropy

from common import DEVICES, PROVIDERS, provider

LARGE = (512, 100, 2048)  # N, C, D
MEDIUM = (128, 20, 1024)
OTHERS = ["gaussian", "gaussian_learned", "poisson", "categorical", "categorical:16"]
SIZES = [("bernoulli", size) for size in [(1, 2, 16), (16, 10, 16), (16, 10, 64), LARGE]]
SIZES += [(name, MEDIUM) for name in OTHERS]
CASES = [(name, size, dtype) for name, size in SIZES for dtype in ("float32", "bfloat16")]


def plain(name, a, messages, target):
    if name == "bernoulli":
        logits = (F.softplus(a[:, None] + messages) - F.softplus(a)[:, None]).sum(-1)
    else:
        logits = families.get(name).evidence(a[:, None], messages)
    return F.cross_entropy(logits, target)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("name, size, dtype", CASES, ids=lambda value: str(value).replace(" ", ""))
@pytest.mark.parametrize("which", PROVIDERS)
def test_evidence_cross_entropy(bench, benchmark, which, name, size, dtype, direction, device):
    backward = direction == "forward+backward"
    if which == "compile" and (dtype != "float32" or not backward) and device == "cpu":
        pytest.skip("compiling takes longer than it tells")
    benchmark.group = f"evidence_cross_entropy {name} {size} {dtype} {direction} {device}"
    rows, classes, width = size

    def inputs():
        draw = families.get(name).natural
        a = draw(torch.randn(rows, width, device=device))
        messages = draw(torch.randn(classes, width, device=device)) / math.sqrt(width)
        target = torch.randint(classes, (rows,), device=device)
        return a.to(getattr(torch, dtype)), messages.to(getattr(torch, dtype)), target

    function = provider(which, lambda *x: plain(name, *x), lambda a, m, t: evidence_cross_entropy(a, m, t, name))
    reads_and_writes = 2 if backward else 1
    bench(function, inputs, backward, reads_and_writes * (rows + classes) * width * getattr(torch, dtype).itemsize)
