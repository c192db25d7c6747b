"""similarity_matching (labels, rows) and decorrelation against the formulas of their documentation."""

import pytest
import torch
import torch.nn.functional as F

from bllkern.functional import decorrelation, similarity_matching

from common import compared, provider

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


@compared()
@pytest.mark.parametrize("rows, width", SHAPES)
@pytest.mark.parametrize("target", ["labels", "rows", "none"])
def test_gram(bench, which, target, rows, width):
    op = "decorrelation" if target == "none" else f"similarity_matching {target}"
    of_batch = {"labels": bench.labels(CLASSES, rows), "rows": bench.randn(rows, CLASSES), "none": None}[target]
    ours = decorrelation if of_batch is None else lambda x: similarity_matching(x, of_batch)
    function = provider(which, lambda x: plain(x, of_batch), ours)
    moved = (2 if bench.backward else 1) * rows * width * bench.dtype.itemsize
    bench(f"{op} {[rows, width]}", function, lambda: (bench.randn(rows, width),), moved)
