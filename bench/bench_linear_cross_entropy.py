"""linear_cross_entropy: small heads, pooled features and many classes, against F.cross_entropy of a linear head.

On a GPU also against Liger-Kernel and cut-cross-entropy, where they are installed: on features [N, D], in bfloat16.
"""

from importlib.util import find_spec
from statistics import median

import pytest
import torch
import torch.nn.functional as F

from bllkern.functional import linear_cross_entropy

from common import compared, provider, seconds

SHAPES = [  # features, classes
    ((16, 64), 10),
    ((128, 2048), 10),
    ((128, 512, 4, 4), 10),
    ((128, 512), 100),
    ((512, 512), 1000),
    ((4096, 512), 32000),
]


def plain(x, weight, bias, target):
    return F.cross_entropy(F.linear(x.flatten(2).mean(2) if x.dim() > 2 else x, weight, bias), target)


def liger(x, weight, bias, target):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, weight, target, bias)


def cut(x, weight, bias, target):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, target)  # not every version takes a bias


PACKAGES = {"liger_kernel": liger, "cut_cross_entropy": cut}
INSTALLED = [name for name in PACKAGES if find_spec(name)]


def product_seconds(bench, x, weight):
    """What the matrix products alone take, over as many rows as a tile of ours has where classes are many."""
    part = x[:1024]
    logits = torch.empty(len(part), len(weight), dtype=x.dtype)
    by_weight, by_x = torch.zeros_like(weight), torch.empty_like(part)

    def products():
        torch.mm(part, weight.T, out=logits)
        if bench.backward:
            torch.mm(logits, weight, out=by_x)
            by_weight.addmm_(logits.T, part)

    return median(seconds(products, "cpu", rounds=5)) * len(x) / len(part)


@compared(*INSTALLED)
@pytest.mark.parametrize("shape, classes", SHAPES, ids=str)
def test_linear_cross_entropy(bench, which, shape, classes):
    if which in PACKAGES and (bench.device == "cpu" or bench.dtype == torch.float32 or len(shape) > 2):
        pytest.skip("it is compared on a GPU, in bfloat16, on features [N, D]")

    def inputs():
        weight = bench.randn(classes, shape[1]) / shape[1] ** 0.5
        return bench.randn(*shape), weight, bench.randn(classes), bench.labels(classes, shape[0])

    read = sum(t.nbytes for t in inputs()[:3])
    function = PACKAGES.get(which) or provider(which, plain, linear_cross_entropy)
    moved = 2 * read if bench.backward else read
    bench(f"linear_cross_entropy {list(shape)} {classes}", function, inputs, moved)
    if which == "bllkern" and bench.device == "cpu" and classes > 10_000:
        bench.bound("its products", product_seconds(bench, *inputs()[:2]))
