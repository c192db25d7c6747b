"""From activations to the rows that losses compare."""

import pytest
import torch
import torch.nn.functional as F

from bllkern.objectives import BLL, features
from bllkern.objectives.features import raised, rows

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


@pytest.mark.parametrize("shape", [(3, 5), (3, 7, 5), (3, 5, 9), (3, 5, 9, 7), (3, 5, 2, 3), (3, 5, 4, 5, 6)])
def test_rows_and_their_way_back(shape):
    z = torch.randn(shape)
    channel_dim = 1 if shape == (3, 5, 9) else None
    found = rows(z, False, 4, channel_dim)
    assert found.shape[0] == 3 and found.dim() == 2
    spread = raised(found, z, channel_dim, 4)
    assert spread.shape == z.shape
    if all(side <= 4 or side % 4 == 0 for side in shape[2:]):
        torch.testing.assert_close(rows(spread, False, 4, channel_dim), found)


@pytest.mark.parametrize("shape", [(5,), (3, 5, 2, 2, 2, 2)])
def test_shapes_that_no_boundary_takes(shape):
    with pytest.raises(ValueError, match="an activation"):
        rows(torch.zeros(shape), False, 4, None)


def test_dtypes_that_no_boundary_takes():
    with pytest.raises(TypeError, match="floating-point tensor, got torch.int64"):
        rows(torch.zeros(3, 4, dtype=torch.int64), False, 4, None)
    with pytest.raises(TypeError, match="floating-point tensor, got torch.int64"):
        BLL().build(4).initialize(torch.zeros(3, 4, 5, 5, dtype=torch.int64))
