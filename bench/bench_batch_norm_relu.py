"""batch_norm_relu: the end of each block of the convnet (batch 100), against the torch functions that it stands for."""

import pytest
import torch
import torch.nn.functional as F

from bllkern.functional import batch_norm_relu

from common import compared, provider

SHAPES = [  # images, channels, height, width; side of the windows of max pooling; layout
    ((100, 32, 32, 32), 2, "contiguous"),
    ((100, 64, 16, 16), 2, "contiguous"),
    ((100, 128, 8, 8), 2, "contiguous"),
    ((100, 128, 4, 4), 2, "contiguous"),
    ((100, 64, 32, 32), 1, "contiguous"),
    ((100, 64, 32, 32), 1, "channels-last"),
    ((100, 64, 16, 16), 2, "channels-last"),
    ((100, 512, 4, 4), 1, "channels-last"),
]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


@compared()
@pytest.mark.parametrize("shape, window, layout", SHAPES, ids=str)
def test_batch_norm_relu(bench, which, shape, window, layout):
    kind = {"device": bench.device}
    mean, variance = torch.zeros(shape[1], **kind), torch.ones(shape[1], **kind)

    def plain(x, weight, bias):
        z = F.relu(F.batch_norm(x, mean, variance, weight, bias, training=True))
        z = F.max_pool2d(z, window) if window > 1 else z
        return F.adaptive_avg_pool2d(z, min(4, z.shape[2])).square().mean()

    def ours(x, weight, bias):
        return batch_norm_relu(x, weight, bias, max_pool=window)[1].square().mean()

    def inputs():
        x = bench.randn(*shape).contiguous(memory_format=LAYOUTS[layout])
        return x, torch.rand(shape[1], **kind), torch.randn(shape[1], **kind)

    # forward: x read for the statistics and again, z written; backward: x read, its gradient written
    x_bytes = inputs()[0].nbytes
    moved = 2 * x_bytes + x_bytes // window**2 + (2 * x_bytes if bench.backward else 0)
    case = f"batch_norm_relu {list(shape)} {window}" + (" channels-last" if layout == "channels-last" else "")
    bench(case, provider(which, plain, ours), inputs, moved)
