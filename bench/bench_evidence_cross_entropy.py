"""evidence_cross_entropy: families, sizes and dtypes, forward and forward with backward, against plain torch."""

import math

import pytest
import torch.nn.functional as F

from bllkern import families
from bllkern.functional import evidence_cross_entropy

from common import compared, provider

LARGE = (512, 100, 2048)  # N, C, D
MEDIUM = (128, 20, 1024)
OTHERS = ["gaussian", "gaussian_learned", "poisson", "categorical", "categorical:16"]
SIZES = [("bernoulli", (16, 10, 64)), ("bernoulli", LARGE), *((name, MEDIUM) for name in OTHERS)]


def plain(name, a, messages, target):
    if name == "bernoulli":
        logits = (F.softplus(a[:, None] + messages) - F.softplus(a)[:, None]).sum(-1)
    else:
        logits = families.get(name).evidence(a[:, None], messages)
    return F.cross_entropy(logits, target)


@compared()
@pytest.mark.parametrize("name, size", SIZES, ids=lambda value: str(value).replace(" ", ""))
def test_evidence_cross_entropy(bench, which, name, size):
    rows, classes, width = size

    def inputs():
        draw = families.get(name).natural
        messages = draw(bench.randn(classes, width)) / math.sqrt(width)
        return draw(bench.randn(rows, width)), messages, bench.labels(classes, rows)

    function = provider(which, lambda *x: plain(name, *x), lambda a, m, t: evidence_cross_entropy(a, m, t, name))
    moved = (2 if bench.backward else 1) * (rows + classes) * width * bench.dtype.itemsize
    bench(f"evidence_cross_entropy {name} {size}", function, inputs, moved)
