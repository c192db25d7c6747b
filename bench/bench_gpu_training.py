"""ResNet-50 at its stages on a GPU: bfloat16 and channels-last next to compiled backprop, and steps as one CUDA graph.

The variants take turns in one process, as in :mod:`bench_training`; ratios are to the first.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import bllkern

from bench_training import STAGES, batch, build, peak_of_step
from common import in_turn

ROUNDS = 20
LOCAL = {  # objective, its options, and whether blocks run side by side or one after the other
    "bwbpf": ("bwbpf", {}, nullcontext),
    "bll": ("bll", {}, nullcontext),
    "bll, fixed feedback": ("bll", {"feedback": "fixed"}, nullcontext),  # beside bll: what learning the feedback costs
    "bll, one after the other": ("bll", {}, bllkern.serial),
}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def mixed_step(net, optimizer, x, y, mode=nullcontext):
    """A training step under autocast, of inputs that may be in static memory."""

    def step(x=x, y=y):
        with mode(), bllkern.targets(y), torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def local_step(x, y, name, options, mode=nullcontext):
    net = build("resnet50").to(x.device, memory_format=torch.channels_last)
    objective = bllkern.objectives.get(name, **options)
    net = bllkern.convert(net, STAGES, 10, objective, "immediate", example=x[:2])
    return mixed_step(net, bllkern.optimizers(net, sgd), x, y, mode)


def backprop_step(x, y, compiled):
    net = build("resnet50").to(x.device, memory_format=torch.channels_last)
    return mixed_step(torch.compile(net) if compiled else net, sgd(net.parameters()), x, y)


def inputs(size, device):
    x, y = batch(size, device)
    return x.contiguous(memory_format=torch.channels_last), y


@pytest.mark.gpu
def test_beside_compiled_backprop(benchmark, device="cuda", size=256):
    torch.manual_seed(0)
    x, y = inputs(size, device)
    steps = {"compiled backprop": backprop_step(x, y, True), "backprop": backprop_step(x, y, False)}
    steps |= {variant: local_step(x, y, *chosen) for variant, chosen in LOCAL.items()}
    peaks = {variant: peak_of_step(step, device) for variant, step in steps.items()}
    benchmark.group = f"training resnet50 bfloat16 batch {size} {device}"
    in_turn(benchmark, steps, peaks, "compiled backprop", device, ROUNDS)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bwbpf", "bll"])
def test_captured(benchmark, name, device="cuda", size=16):
    torch.manual_seed(0)
    x, y = inputs(size, device)
    captured = bllkern.capture(local_step(x, y, name, {}), x, y)
    steps = {"as it is": local_step(x, y, name, {}), "captured": lambda: captured(x, y)}
    for _ in range(4):  # until it is recorded
        captured(x, y)
    peaks = {variant: peak_of_step(step, device) for variant, step in steps.items()}
    benchmark.group = f"training resnet50 captured {name} batch {size} {device}"
    in_turn(benchmark, steps, peaks, "as it is", device, ROUNDS)
