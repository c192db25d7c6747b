"""Peak memory of a training step against the depth of a residual stack, a boundary after each unit.

``extra_info["peak_memory_bytes"]`` holds for each variant the peak of torch's allocator in a step at each depth.
"""

import pytest
import torch

import bllkern

from bench_training import batch, build, peak_of_step, training_step
from common import DEVICES

DEPTHS = (8, 16, 32, 64)
VARIANTS = {"backprop": ("backprop", "deferred"), "eager": ("bwbpf", "eager"), "immediate": ("bwbpf", "immediate")}


@pytest.mark.parametrize("device", DEVICES)
def test_memory_against_depth(benchmark, device):
    torch.manual_seed(0)
    x, y = batch(16, device)

    def peak(objective, schedule, depth):
        cuts = [f"layer1.{i}" for i in range(depth)]
        net = bllkern.convert(build(f"stack{depth}").to(device), cuts, 10, objective, schedule, example=x[:2])
        return peak_of_step(training_step(net, x, y), device)

    benchmark.group = f"memory against depth, residual stack, batch 16 {device}"
    benchmark.extra_info["depths"] = DEPTHS
    benchmark.extra_info["peak_memory_bytes"] = benchmark.pedantic(
        lambda: {name: [peak(*options, depth) for depth in DEPTHS] for name, options in VARIANTS.items()}
    )
