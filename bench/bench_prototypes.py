"""prototypes against normalised rows, index_add_ and a division by bincount."""

import pytest
import torch
import torch.nn.functional as F

from bllkern.functional import prototypes

from common import compared, provider

SHAPES = [(32, 64, 10), (512, 512, 10), (4096, 512, 1000)]


def plain(x, target, classes):
    xn = F.normalize(x - x.mean(1, keepdim=True), dim=1).float()
    sums = xn.new_zeros(classes, x.shape[1]).index_add_(0, target, xn)
    return sums / torch.bincount(target, minlength=classes).clamp(min=1)[:, None]


@compared()
@pytest.mark.parametrize("rows, width, classes", SHAPES)
def test_prototypes(bench, which, rows, width, classes):
    if bench.device == "cuda" and which != "bllkern":
        pytest.skip("bincount waits for the device, so that the step cannot be captured")
    weights = torch.randn(classes, width, device=bench.device)

    def inputs():
        return bench.randn(rows, width), bench.labels(classes, rows)

    function = provider(
        which,
        lambda x, target: (plain(x, target, classes) * weights).sum(),
        lambda x, target: (prototypes(x, target, classes)[0] * weights).sum(),
    )
    moved = (3 if bench.backward else 1) * rows * width * bench.dtype.itemsize + classes * width * 4
    bench(f"prototypes {[rows, width, classes]}", function, inputs, moved)
