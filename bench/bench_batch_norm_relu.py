"""batch_norm_relu: the end of each block of the convnet (batch 100), against the torch functions that it stands for."""

import pytest
import torch
import torch.nn.functional as F

from bllkern.functional import batch_norm_relu

from common import compared, provider

SHAPES = [  # images, channels, height, width; side of the windows of max pooling
    ((100, 32, 32, 32), 2),
    ((100, 64, 16, 16), 2),
    ((100, 128, 8, 8), 2),
    ((100, 128, 4, 4), 2),
    ((100, 64, 32, 32), 1),
]


@compared()
@pytest.mark.parametrize("shape, window", SHAPES, ids=str)
def test_batch_norm_relu(bench, which, shape, window):
    kind = {"device": bench.device}
    mean, variance = torch.zeros(shape[1], **kind), torch.ones(shape[1], **kind)

    def plain(x, weight, bias):
        z = F.relu(F.batch_norm(x, mean, variance, weight, bias, training=True))
        z = F.max_pool2d(z, window) if window > 1 else z
        return F.adaptive_avg_pool2d(z, min(4, z.shape[2])).square().mean()

    def ours(x, weight, bias):
        return batch_norm_relu(x, weight, bias, max_pool=window)[1].square().mean()

    def inputs():
        return bench.randn(*shape), torch.rand(shape[1], **kind), torch.randn(shape[1], **kind)

    # forward: x read for the statistics and again, z written; backward: x read, its gradient written
    x_bytes = inputs()[0].nbytes
    moved = 2 * x_bytes + x_bytes // window**2 + (2 * x_bytes if bench.backward else 0)
    bench(f"batch_norm_relu {list(shape)} {window}", provider(which, plain, ours), inputs, moved)
