"""similarity_matching (labels, rows) and decorrelation against the formulas of their documentation."""

import pytest
import torch
import torch.nn.functional as F

from bllkern.functional import decorrelation, similarity_matching

from common import DEVICES, PROVIDERS, provider

SHAPES = [(32, 64), (100, 2048), (1024, 2048), (4096, 256)]
CLASSES = 10


def normalized(x):
    return F.normalize(x - x.mean(1, keepdim=True), dim=1)


def plain(x, target):
    xn = normalized(x)
    if target is None:
        gram = xn @ xn.T
        return (gram - torch.diag(gram.diagonal())).square().mean()
    if target.is_floating_point():
        yn = normalized(target)
        return (xn @ xn.T - yn @ yn.T).square().mean()
    return (xn @ xn.T - (target[:, None] == target).to(xn)).square().mean()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows, width", SHAPES)
@pytest.mark.parametrize("target", ["labels", "rows", "none"])
@pytest.mark.parametrize("which", PROVIDERS)
def test_gram(bench, benchmark, which, target, rows, width, dtype, device):
    if which == "compile" and dtype != "float32" and device == "cpu":
        pytest.skip("compiling takes longer than it tells")
    op = "decorrelation" if target == "none" else f"similarity_matching {target}"
    benchmark.group = f"{op} {[rows, width]} {dtype} forward+backward {device}"
    kind = dict(dtype=getattr(torch, dtype), device=device)
    of_batch = {
        "labels": torch.randint(CLASSES, (rows,), device=device),
        "rows": torch.randn(rows, CLASSES, **kind),
        "none": None,
    }[target]
    ours = decorrelation if of_batch is None else lambda x: similarity_matching(x, of_batch)
    function = provider(which, lambda x: plain(x, of_batch), ours)
    x_bytes = rows * width * getattr(torch, dtype).itemsize
    bench(function, lambda: (torch.randn(rows, width, **kind),), True, 2 * x_bytes)
