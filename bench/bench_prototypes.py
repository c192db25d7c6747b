"""prototypes against normalised rows, index_add_ and a division by bincount."""

import pytest
import torch
import torch.nn.functional as F

from bllkern.functional import prototypes

from common import DEVICES, PROVIDERS, provider

SHAPES = [(32, 64, 10), (512, 512, 10), (4096, 512, 1000)]


def plain(x, target, classes):
    xn = F.normalize(x - x.mean(1, keepdim=True), dim=1).float()
    sums = xn.new_zeros(classes, x.shape[1]).index_add_(0, target, xn)
    return sums / torch.bincount(target, minlength=classes).clamp(min=1)[:, None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows, width, classes", SHAPES)
@pytest.mark.parametrize("which", PROVIDERS)
def test_prototypes(bench, benchmark, which, rows, width, classes, dtype, direction, device):
    backward = direction == "forward+backward"
    if which == "compile" and (dtype != "float32" or not backward) and device == "cpu":
        pytest.skip("compiling takes longer than it tells")
    if device == "cuda" and which != "bllkern":
        pytest.skip("bincount waits for the device, so that the step cannot be captured")
    benchmark.group = f"prototypes {[rows, width, classes]} {dtype} {direction} {device}"
    kind = dict(dtype=getattr(torch, dtype), device=device)
    weights = torch.randn(classes, width, device=device)

    def inputs():
        return torch.randn(rows, width, **kind), torch.randint(classes, (rows,), device=device)

    function = provider(
        which,
        lambda x, target: (plain(x, target, classes) * weights).sum(),
        lambda x, target: (prototypes(x, target, classes)[0] * weights).sum(),
    )
    x_bytes = rows * width * getattr(torch, dtype).itemsize
    bench(function, inputs, backward, (3 if backward else 1) * x_bytes + classes * width * 4)
