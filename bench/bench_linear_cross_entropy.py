"""linear_cross_entropy: small heads, pooled features and many classes, against F.cross_entropy of a linear head."""

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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape, classes", SHAPES, ids=str)
@pytest.mark.parametrize("which", PROVIDERS)
def test_linear_cross_entropy(bench, benchmark, which, shape, classes, dtype, direction, device):
    backward = direction == "forward+backward"
    if which == "compile" and (dtype != "float32" or not backward) and device == "cpu":
        pytest.skip("compiling takes longer than it tells")
    benchmark.group = f"linear_cross_entropy {list(shape)} {classes} {dtype} {direction} {device}"
    kind = dict(dtype=getattr(torch, dtype), device=device)

    def inputs():
        x, weight = torch.randn(shape, **kind), torch.randn(classes, shape[1], **kind) / shape[1] ** 0.5
        return x, weight, torch.randn(classes, **kind), torch.randint(classes, shape[:1], device=device)

    read = sum(t.nbytes for t in inputs()[:3])
    bench(provider(which, plain, linear_cross_entropy), inputs, backward, 2 * read if backward else read)
