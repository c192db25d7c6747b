"""Training steps of whole networks: each objective next to backprop and to backprop with activation checkpointing.

The variants take turns in one process, so that what else the machine does weighs on all alike.  One benchmark times a
round of one step each; ``extra_info["variants"]`` holds for each variant the median step time, the peak of torch's
allocator in a step (beyond what the step began with), and both as ratios to backprop: that of time is the median of the
ratios within each round.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bllkern
from bllkern import models
from bllkern.models.resnet import BasicBlock, ResNet

from common import DEVICES, in_turn, peak_memory, seconds

SECONDS = {"cpu": 60, "cuda": 3}  # to spend on a case, roughly; at least ROUNDS rounds
ROUNDS = 7
LOCAL = {  # objective and schedule; what eager costs beside immediate, the gradients, is the same for every objective
    "bwbpf": ("bwbpf", "immediate"),
    "bwbpf, the paper's head": (bllkern.objectives.BWBPF(head="linear", label_smoothing=0.0), "immediate"),
    "bll": ("bll", "immediate"),
    "bll eager": ("bll", "eager"),
    "predsim": ("predsim", "immediate"),
}
CHANNELS_LAST = ("bwbpf", "bll")  # also of a network whose weights are channels-last, as those of "backprop channels-last"
STAGES = models.default_cuts("resnet50")
CASES = {  # network, cuts (names, or a number and what to balance), batch
    "convnet": ("convnet", models.default_cuts("convnet"), 100),
    "resnet50-stages": ("resnet50", STAGES, 32),
    "resnet50-4-blocks-memory": ("resnet50", (4, "memory"), 32),
    "resnet32-16-blocks": ("resnet32", (16, "flops"), 64),
    "resnet110-16-blocks": ("resnet110", (16, "flops"), 64),
    "stack-16": ("stack16", [f"layer1.{i}" for i in range(16)], 16),
    "vit": ("vit", models.default_cuts("vit"), 64),
    "gpt": ("gpt", models.default_cuts("gpt"), 32),
}
CLASSES, TOKENS, LENGTH = 10, 65, 64


def build(name):
    """The network ``name`` for images of CIFAR's size; ``stackN`` has N residual units of 32 channels in a row.

    ``gpt`` is one for characters.
    """
    if name.startswith("stack"):
        return ResNet(BasicBlock, (int(name.removeprefix("stack")),), CLASSES, (3, 32, 32), planes=32)
    return models.build(name, TOKENS, (LENGTH,)) if name == "gpt" else models.build(name, CLASSES, (3, 32, 32))


class Checkpointed(nn.Module):
    """Layers whose activations are computed again in the backward pass."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return checkpoint(self.layers, x, use_reentrant=False)


class ChannelsLast(nn.Module):
    """``net`` as torch advises to train it: weights and images channels-last."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.net(x.contiguous(memory_format=torch.channels_last))


def checkpointed(net, cuts):
    """``net`` with a checkpoint around each block that ``cuts`` end; blocks that span stages are cut there too.

    Where modules deep in the network are named, the checkpoint is around each of these and of its siblings.
    """
    deep = {name.rpartition(".")[0] for name in cuts if name.count(".") > 1}
    for siblings in map(net.get_submodule, deep):
        for name, module in list(siblings.named_children()):
            setattr(siblings, name, Checkpointed(module))
    if deep:
        return net
    for name, stage in net.named_children():
        if f"{name}" in cuts and any(True for _ in stage.parameters()):
            setattr(net, name, Checkpointed(stage))
        elif isinstance(stage, nn.Sequential):
            ends = [i + 1 for i in range(len(stage)) if f"{name}.{i}" in cuts]
            segments = [Checkpointed(*stage[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
            setattr(net, name, nn.Sequential(*segments, *stage[ends[-1] if ends else 0 :]))
    return net


def variants(name, cuts, example):
    """A fresh network for each variant."""
    names = cuts
    if isinstance(cuts, tuple):
        names = bllkern.cuts.even(build(name).to(example.device), cuts[0], (example,), cuts[1])
    yield "backprop", build(name).to(example.device)
    yield "checkpointing", checkpointed(build(name).to(example.device), names)
    classes = TOKENS if name == "gpt" else CLASSES
    for variant, options in LOCAL.items():
        net = build(name).to(example.device)
        yield variant, bllkern.convert(net, names, classes, *options, example=example[:2])
    if any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        yield "backprop channels-last", ChannelsLast(build(name).to(example.device))
        for variant in CHANNELS_LAST:
            net = build(name).to(example.device, memory_format=torch.channels_last)
            yield f"{variant} channels-last", bllkern.convert(net, names, classes, *LOCAL[variant], example=example[:2])


def training_step(net, x, y):
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    local = bool(bllkern.network.boundaries(net))
    optimizer = bllkern.optimizers(net, sgd) if local else sgd(net.parameters())

    def step():
        with bllkern.targets(y):
            loss = F.cross_entropy(net(x).flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def batch(size, device, name=""):
    """Inputs and targets for the network ``name``."""
    if name == "gpt":
        return tuple(torch.randint(0, TOKENS, (size, LENGTH), device=device) for _ in range(2))
    return torch.randn(size, 3, 32, 32, device=device), torch.randint(0, CLASSES, (size,), device=device)


def peak_of_step(step, device):
    """The peak of a step once everything that lives longer than a step is there."""
    step()
    return peak_memory(step, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_training(benchmark, case, device):
    torch.manual_seed(0)
    name, cuts, size = CASES[case]
    x, y = batch(size, device, name)
    steps = {variant: training_step(net, x, y) for variant, net in variants(name, cuts, x)}
    peaks = {variant: peak_of_step(step, device) for variant, step in steps.items()}
    benchmark.group = f"training {case} batch {size} {device}"
    once = sum(seconds(step, device, rounds=1)[0] for step in steps.values())
    in_turn(benchmark, steps, peaks, "backprop", device, max(ROUNDS, int(SECONDS[device] / once)))
