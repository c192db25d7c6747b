"""Convolutions of what they normalise first, which is made again for the backward pass, against torch's."""

import copy

import pytest
import torch
from torch import nn

from bllkern import backends
from bllkern.execution import epilogue
from bllkern.functional import convolution as convolutional

from bllkern.models import resnet as models

from checks import record_calls, relative_l2

NATIVE = backends.choose("batch_norm_relu", "cpu", torch.float32) != "reference"

LAYERS = {
    "3x3": dict(kernel_size=3, padding=1),
    "1x1": dict(kernel_size=1, bias=False),
    "strided": dict(kernel_size=3, stride=(2, 1), padding=(1, 0), bias=False),
    "dilated groups": dict(kernel_size=3, dilation=2, groups=2),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def taken(conv, norm, x):
    return convolutional.normalized_convolution(conv, norm, x)[0]


def results(function, x, *modules):
    """What ``function(*modules, x)`` is, and its gradients by x and all parameters."""
    x = x.clone().requires_grad_()
    leaves = [x, *(p for module in modules for p in module.parameters())]
    out = function(*modules, x)
    factors = 2 + torch.arange(out.numel(), dtype=torch.float64).sin().view(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad((out * factors).sum(), leaves)]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_is_the_convolution_of_what_is_normalised(monkeypatch, options, batch, layout):
    monkeypatch.setattr(convolutional, "PIECE_BYTES", 3 * 4 * 256 * 4)  # three images
    conv, norm = nn.Conv2d(4, 4, **options), nn.BatchNorm2d(4)
    x = 3 * torch.randn(batch, 4, 16, 16) + torch.arange(4.0)[:, None, None]
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    ours = results(taken, x.contiguous(memory_format=layout), conv, norm)
    exact = (copy.deepcopy(module).double() for module in (conv, norm))
    expected = results(lambda conv, norm, x: conv(norm(x).relu()), x.double(), *exact)
    for one, e in zip(ours, expected, strict=True):
        assert relative_l2(one, e) <= 2e-6
    assert all(one.is_contiguous(memory_format=layout) for one in ours[:2])


@pytest.mark.parametrize("images, pieces", [(1, 8), (3, 3), (20, 1)])
def test_in_pieces(monkeypatch, images, pieces):
    x = torch.randn(8, 4, 8, 8)
    monkeypatch.setattr(convolutional, "PIECE_BYTES", images * x[0].nbytes)
    recorded = record_calls(monkeypatch, torch.ops.aten, "convolution_backward")
    taken(nn.Conv2d(4, 4, 5), nn.BatchNorm2d(4), x).sum().backward()
    assert len(recorded) == 2 * pieces  # for each the gradient of what was normalised, then the parameters'


@pytest.mark.parametrize("width, repeated", [(8, False), (64, True)])
def test_what_is_cheap_to_repeat_is_not_kept(monkeypatch, width, repeated):
    monkeypatch.setitem(convolutional.LARGE_BYTES, "cpu", 1)
    unit, kept = models.BasicBlock(width, width, 1, None), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        epilogue.run(unit, torch.randn(2, width, 16, 16))
    images = {t.data_ptr() for t in kept if t.shape == (2, width, 16, 16)}
    assert len(images) == (4 if NATIVE and repeated else 5)  # input, both convolutions' outputs, z, the first z


def test_frozen_weights_and_inputs():
    conv, norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    for wanted in (conv.weight, norm.bias):
        for p in (*conv.parameters(), *norm.parameters()):
            p.requires_grad_(p is wanted)
            p.grad = None
        taken(conv, norm, torch.randn(5, 4, 8, 8)).square().sum().backward()
        assert wanted.grad is not None and wanted.grad.any()


@pytest.mark.parametrize(
    "conv, dtype",
    [
        (nn.Conv2d(4, 64, 3, padding_mode="circular", padding=1), torch.float32),
        (nn.Conv2d(4, 64, 3, padding="same"), torch.float32),
        (nn.Conv2d(4, 64, 3).double(), torch.float64),
        (nn.Conv2d(64, 4, 3), torch.float32),
    ],
    ids=["padding mode", "padding", "float64", "few products"],
)
def test_others_keep_it(monkeypatch, conv, dtype):
    monkeypatch.setitem(convolutional.LARGE_BYTES, "cpu", 1)
    assert not convolutional.cheap_to_repeat(conv, torch.randn(8, conv.in_channels, 8, 8, dtype=dtype))


def test_small_ones_and_those_under_autocast_too(monkeypatch):
    x = torch.randn(8, 4, 8, 8)
    assert not convolutional.cheap_to_repeat(nn.Conv2d(4, 64, 3), x)
    monkeypatch.setitem(convolutional.LARGE_BYTES, "cpu", x.nbytes)
    assert convolutional.cheap_to_repeat(nn.Conv2d(4, 64, 3), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not convolutional.cheap_to_repeat(nn.Conv2d(4, 64, 3), x)
