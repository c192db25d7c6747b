"""From activations to the rows that losses compare."""

import pytest
import torch
import torch.nn.functional as F

from bllkern.objectives import features

POOLS = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape, pool",
    [((3, 5, 9), 3), ((3, 5, 8, 8), 4), ((3, 5, 12, 4), 4), ((3, 5, 9, 8), 4), ((2, 3, 8, 8), 8), ((2, 3, 4, 8, 8), 2)],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels first in memory last", "strided"])
def test_rows_are_averages_over_space(layout, shape, pool, dtype):
    z = torch.randn(shape).to(dtype)
    if layout == "strided":
        z = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    elif layout != "contiguous":
        z = z.movedim(1, -1).contiguous().movedim(-1, 1)
    gradients = []
    for function in (lambda z: features.rows(z, False, pool, 1), lambda z: POOLS[z.dim() - 2](z, size).flatten(1)):
        leaf = z.detach().requires_grad_()
        size = [min(side, pool) for side in shape[2:]]
        rows = function(leaf)
        gradients.append((rows.to(dtype), torch.autograd.grad(rows, leaf, torch.ones_like(rows) + rows.detach())[0]))
    (rows, by_z), (expected, by_z_expected) = gradients
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(rows, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(by_z, by_z_expected, rtol=tolerance, atol=tolerance)


def test_the_gradient_has_the_layout_of_the_activation():
    z = torch.randn(3, 5, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    features.rows(z, False, 4, None).sum().backward()
    assert z.grad.stride() == z.stride()
