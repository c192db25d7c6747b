"""Convolutions whose backward pass takes some images at a time, perhaps of what it normalises first, against torch's."""

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


@pytest.fixture
def pieces(monkeypatch):
    """Pieces of from four images of 4 channels and 16 x 16 places on; the calls of torch's backward pass."""
    monkeypatch.setattr(convolutional, "LARGE_BYTES", 4 * 4 * 256 * 4)
    return record_calls(monkeypatch, torch.ops.aten, "convolution_backward")


def taken(conv, x, norm=None):
    return convolutional.convolution(conv, x, convolutional.images_at_a_time(conv, x), norm)[0]


def results(function, x, *modules):
    """What ``function(x, *modules)`` is, and its gradients by x and all parameters."""
    x = x.clone().requires_grad_()
    leaves = [x, *(p for module in modules for p in module.parameters())]
    out = function(x, *modules)
    factors = 2 + torch.arange(out.numel(), dtype=torch.float64).sin().view(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad((out * factors).sum(), leaves)]


def compare(function, formula, x, *modules):
    ours = results(function, x, *modules)
    expected = results(formula, x.double(), *(copy.deepcopy(module).double() for module in modules))
    for one, e in zip(ours, expected, strict=True):
        assert one.is_contiguous() and relative_l2(one, e) <= 2e-6


@pytest.mark.parametrize("batch", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_is_the_convolution(pieces, options, batch):
    conv, x = nn.Conv2d(4, 4, **options), torch.randn(batch, 4, 16, 16)
    compare(lambda x, conv: taken(conv, x), lambda x, conv: conv(x), x, conv)
    assert len(pieces) == (8 if batch >= 4 else 2)  # for each the input's gradient, then the parameters'


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_of_what_is_normalised_first(pieces, options, batch):
    conv, norm = nn.Conv2d(4, 4, **options), nn.BatchNorm2d(4)
    x = 3 * torch.randn(batch, 4, 16, 16) + torch.arange(4.0)[:, None, None]
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    compare(lambda x, *m: taken(m[0], x, m[1]), lambda x, conv, norm: conv(norm(x).relu()), x, conv, norm)


@pytest.mark.parametrize("width, repeated", [(8, False), (64, True)])
def test_what_is_cheap_to_repeat_is_not_kept(width, repeated):
    unit, kept = models.BasicBlock(width, width, 1, None), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        epilogue.run(unit, torch.randn(2, width, 16, 16))
    images = {t.data_ptr() for t in kept if t.shape == (2, width, 16, 16)}
    assert len(images) == (4 if NATIVE and repeated else 5)  # input, both convolutions' outputs, z, the first z


def test_frozen_weights_and_inputs(pieces):
    conv, norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    for wanted in (conv.weight, norm.bias):
        for p in (*conv.parameters(), *norm.parameters()):
            p.requires_grad_(p is wanted)
            p.grad = None
        taken(conv, torch.randn(5, 4, 8, 8), norm).square().sum().backward()
        assert wanted.grad is not None and wanted.grad.any()


def test_only_the_gradients_that_are_needed(pieces):
    conv, x = nn.Conv2d(4, 4, 3), torch.randn(8, 4, 16, 16)
    conv.bias.requires_grad_(False)
    taken(conv, x).sum().backward()
    assert conv.weight.grad is not None and conv.bias.grad is None and x.grad is None and len(pieces) == 4


def test_the_weight_is_small_beside_a_piece(pieces):
    taken(nn.Conv2d(4, 64, 5), torch.randn(8, 4, 8, 8)).sum().backward()
    assert len(pieces) == 1


@pytest.mark.parametrize(
    "conv, x",
    [
        (nn.Conv2d(4, 4, 3, padding_mode="circular", padding=1), torch.randn(8, 4, 8, 8)),
        (nn.Conv2d(4, 4, 3, padding="same"), torch.randn(8, 4, 8, 8)),
        (nn.Conv2d(4, 4, 3).double(), torch.randn(8, 4, 8, 8).double()),
        (nn.Conv2d(4, 4, 3), torch.randn(8, 4, 8, 8).contiguous(memory_format=torch.channels_last)),
        (nn.Conv2d(4, 4, 3), torch.randn(4, 8, 8)),
        (nn.Conv2d(4, 4, 3), torch.randn(0, 4, 8, 8)),
    ],
    ids=["padding mode", "padding", "float64", "channels last", "one image", "no image"],
)
def test_others_are_left_to_the_module(conv, x):
    assert convolutional.images_at_a_time(conv, x) is None
    z, pooled = epilogue.run(conv, x)
    assert torch.equal(z, conv(x)) and pooled is None


def test_autocast_is_the_modules_business(pieces):
    conv, x = nn.Conv2d(4, 4, 3), torch.randn(8, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        z = epilogue.run(conv, x)[0]
    z.sum().backward()
    assert z.dtype == torch.bfloat16 and not pieces
