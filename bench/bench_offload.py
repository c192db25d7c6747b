"""Training with weights and optimizer states on the CPU, next to the same network wholly on the device.

The two take turns in one process.  ``extra_info["variants"]`` holds for each the median step time, the most bytes that
it had on the device, and both as ratios to the resident network; ``extra_info["weights_and_states"]`` the bytes that
the resident one must hold.  On a CPU, which plays the device, a step is charged for the copies of the weights.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bllkern

from common import DEVICES, in_turn, peak_memory

ROUNDS = 5
SIZES = {"cpu": (256, 16, 512), "cuda": (4096, 24, 65536)}  # width, blocks, rows of a batch


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def training_step(variant, width, depth, x, y):
    """A step of a fresh network, and the bytes of its weights and optimizer states."""
    layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)]
    net = nn.Sequential(*layers, nn.Linear(width, 10))
    cuts, device = [str(i) for i in range(depth)], x.device
    if variant == "resident":
        net = bllkern.convert(net.to(device), cuts, 10, "bwbpf", "immediate", example=x[:2])
    else:
        net = bllkern.convert(net, cuts, 10, "bwbpf", example=x[:2].cpu(), offload="cpu")
    optimizers = bllkern.optimizers(net, sgd)

    def step():
        with bllkern.targets(y), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()

    return step, 2 * sum(p.nbytes for p in net.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_offload(benchmark, device):
    torch.manual_seed(0)
    width, depth, rows = SIZES[device]
    x, y = torch.randn(rows, width, device=device), torch.randint(0, 10, (rows,), device=device)
    steps, peaks = {}, {}
    for variant in ("resident", "offload"):
        steps[variant], size = training_step(variant, width, depth, x, y)
        steps[variant]()
        peaks[variant] = peak_memory(steps[variant], device) + (size if variant == "resident" else 0)
    benchmark.group = f"offload {depth} blocks of {width} units, {rows} rows, {device}"
    benchmark.extra_info["weights_and_states"] = size
    in_turn(benchmark, steps, peaks, "resident", device, ROUNDS)
