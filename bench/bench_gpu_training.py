"""ResNet-50 at its stages on a GPU, bfloat16 and channels-last: next to compiled backprop, and steps as one CUDA graph.

The variants take turns in one process, as in :mod:`bench_training`; ratios are to the first.  A captured step is
replayed; its peak of memory is that of its last step before it is recorded.  Matrix products in float32 may use TF32.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import bllkern

from bench_training import STAGES, batch, build, peak_of_step
from common import in_turn, peak_memory

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


def local_step(x, y, variant, compiled=False):
    name, options, mode = LOCAL[variant]
    net = build("resnet50").to(x.device, memory_format=torch.channels_last)
    objective = bllkern.objectives.get(name, **options)
    net = bllkern.convert(net, STAGES, 10, objective, "immediate", example=x[:2])
    for stage in (*STAGES, "layer4") if compiled else ():
        block = net.get_submodule(stage)
        getattr(block, "module", block).compile(dynamic=False)
    return mixed_step(net, bllkern.optimizers(net, sgd), x, y, mode)


def backprop_step(x, y, compiled=False):
    net = build("resnet50").to(x.device, memory_format=torch.channels_last)
    return mixed_step(torch.compile(net) if compiled else net, sgd(net.parameters()), x, y)


def captured(step, x, y):
    """The recorded step, and the peak of its last step before."""
    replay = bllkern.capture(step, x, y)
    for _ in range(2):
        replay(x, y)
    peak = peak_memory(lambda: replay(x, y), x.device.type)
    replay(x, y)
    return lambda: replay(x, y), peak


def inputs(size, device):
    x, y = batch(size, device)
    return x.contiguous(memory_format=torch.channels_last), y


@pytest.fixture
def tf32():
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(precision)


def compare(benchmark, group, plain, to_capture, x, y):
    """Time the steps ``plain`` and, recorded, ``to_capture``."""
    device, steps, peaks = x.device.type, dict(plain), {}
    for variant, step in plain.items():
        peaks[variant] = peak_of_step(step, device)
    for variant, step in to_capture.items():
        steps[f"{variant}, captured"], peaks[f"{variant}, captured"] = captured(step, x, y)
    benchmark.group = f"{group} batch {len(x)} {device}"
    in_turn(benchmark, steps, peaks, next(iter(steps)), device, ROUNDS)


@pytest.mark.gpu
def test_beside_compiled_backprop(benchmark, tf32, device="cuda", size=256):
    torch.manual_seed(0)
    x, y = inputs(size, device)
    plain = {"compiled backprop": backprop_step(x, y, compiled=True), "backprop": backprop_step(x, y)}
    plain |= {variant: local_step(x, y, variant) for variant in LOCAL}
    compare(benchmark, "training resnet50 bfloat16", plain, {}, x, y)


@pytest.mark.gpu
def test_captured_beside_compiled_backprop(benchmark, tf32, device="cuda", size=256):
    torch.manual_seed(0)
    x, y = inputs(size, device)
    plain = {"compiled backprop": backprop_step(x, y, compiled=True)}
    to_capture = {"compiled backprop": backprop_step(x, y, compiled=True), "backprop": backprop_step(x, y)}
    to_capture |= {variant: local_step(x, y, variant) for variant in LOCAL}
    to_capture["bwbpf, blocks compiled"] = local_step(x, y, "bwbpf", compiled=True)
    compare(benchmark, "training resnet50 bfloat16, captured,", plain, to_capture, x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["bwbpf", "bll"])
def test_captured(benchmark, tf32, variant, device="cuda", size=16):
    torch.manual_seed(0)
    x, y = inputs(size, device)
    plain = {variant: local_step(x, y, variant), "backprop": backprop_step(x, y)}
    to_capture = {variant: local_step(x, y, variant), "backprop": backprop_step(x, y)}
    compare(benchmark, f"training resnet50 bfloat16, {variant} captured,", plain, to_capture, x, y)
