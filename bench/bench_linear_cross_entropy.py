"""linear_cross_entropy: small heads, pooled features and many classes, against F.cross_entropy of a linear head.

On a GPU also against Liger-Kernel and cut-cross-entropy, where they are installed: on features [N, D], in bfloat16.
"""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from bllkern.functional import linear_cross_entropy

from common import DEVICES, PROVIDERS, provider

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

    return linear_cross_entropy(x, weight, target, bias)


PACKAGES = {"liger_kernel": liger, "cut_cross_entropy": cut}
INSTALLED = [name for name in PACKAGES if find_spec(name)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape, classes", SHAPES, ids=str)
@pytest.mark.parametrize("which", [*PROVIDERS, *INSTALLED])
def test_linear_cross_entropy(bench, benchmark, which, shape, classes, dtype, direction, device):
    backward = direction == "forward+backward"
    if which == "compile" and (dtype != "float32" or not backward) and device == "cpu":
        pytest.skip("compiling takes longer than it tells")
    if which in PACKAGES and (device == "cpu" or dtype == "float32" or len(shape) > 2):
        pytest.skip("it is compared on a GPU, in bfloat16, on features [N, D]")
    benchmark.group = f"linear_cross_entropy {list(shape)} {classes} {dtype} {direction} {device}"
    kind = dict(dtype=getattr(torch, dtype), device=device)

    def inputs():
        x, weight = torch.randn(shape, **kind), torch.randn(classes, shape[1], **kind) / shape[1] ** 0.5
        return x, weight, torch.randn(classes, **kind), torch.randint(classes, shape[:1], device=device)

    read = sum(t.nbytes for t in inputs()[:3])
    function = PACKAGES.get(which) or provider(which, plain, linear_cross_entropy)
    bench(function, inputs, backward, 2 * read if backward else read)
