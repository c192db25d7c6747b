"""Training steps of whole networks: each objective next to backprop and to backprop with activation checkpointing.

The variants take turns in one process, so that what else the machine does weighs on all alike.  One benchmark times a
round of one step each; ``extra_info["variants"]`` holds for each variant the median step time, the peak of torch's
allocator in a step (beyond what the step began with), and both as ratios to backprop.
"""

import time
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bllkern
from bllkern import models

from common import DEVICES, device_clock, peak_memory

ROUNDS = 5
LOCAL = {"bwbpf": "immediate", "bll": "immediate", "predsim": "immediate"}
CASES = {  # network, blocks (names or number), batch
    "convnet": ("convnet", models.default_cuts("convnet"), 100),
    "resnet50-stages": ("resnet50", models.default_cuts("resnet50"), 32),
    "resnet32-16-blocks": ("resnet32", 16, 64),
}


class Checkpointed(nn.Module):
    """A stage whose activations are computed again in the backward pass."""

    def __init__(self, stage: nn.Module):
        super().__init__()
        self.stage = stage

    def forward(self, x):
        return checkpoint(self.stage, x, use_reentrant=False)


def variants(name, cuts, example):
    """A fresh network for each variant, with what steps it."""
    plain = models.build(name, 10, (3, 32, 32)).to(example.device)
    names = bllkern.cuts.even(plain, cuts, (example,)) if isinstance(cuts, int) else cuts
    for variant in ("backprop", "checkpointing", *LOCAL):
        net = models.build(name, 10, (3, 32, 32)).to(example.device)
        if variant == "checkpointing":
            for cut in names:
                parent, _, last = cut.rpartition(".")
                if any(True for _ in net.get_submodule(cut).parameters()):
                    setattr(net.get_submodule(parent), last, Checkpointed(net.get_submodule(cut)))
        elif variant in LOCAL:
            net = bllkern.convert(net, names, 10, variant, LOCAL[variant], example=example)
        yield variant, net


def training_step(net, x, y):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)

    local = bool(bllkern.network.boundaries(net))
    optimizer = bllkern.optimizers(net, sgd) if local else sgd(net.parameters())

    def step():
        with bllkern.targets(y):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_training(benchmark, case, device):
    torch.manual_seed(0)
    name, cuts, batch = CASES[case]
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(0, 10, (batch,), device=device)
    steps = {variant: training_step(net, x, y) for variant, net in variants(name, cuts, x[:2])}
    times = {variant: [] for variant in steps}
    now = device_clock() if device == "cuda" else time.perf_counter
    peaks = {}
    for variant, step in steps.items():
        step()
        peaks[variant] = peak_memory(step, device)

    def round_of_all():
        for variant, step in steps.items():
            start = now()
            step()
            times[variant].append(now() - start)

    benchmark.group = f"training {case} batch {batch} {device}"
    benchmark.pedantic(round_of_all, rounds=ROUNDS, iterations=1)
    base = median(times["backprop"]), peaks["backprop"]
    benchmark.extra_info["variants"] = {
        variant: {
            "step_seconds": median(times[variant]),
            "peak_memory_bytes": peaks[variant],
            "time_ratio": median(times[variant]) / base[0],
            "memory_ratio": peaks[variant] / base[1],
        }
        for variant in steps
    }
