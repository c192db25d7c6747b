"""Blocks that end with batch normalisation, ReLU and max pooling: one pass, against the modules one after the other."""

import copy

import pytest
import torch
from torch import nn

import bllkern
import nets
from bllkern import backends
from bllkern.execution import epilogue
from bllkern.objectives import BLL

from checks import record_calls

CLASSES = 5
Y = torch.arange(12) % CLASSES
NATIVE = backends.choose("batch_norm_relu", "cpu", torch.float32) != "reference"


@pytest.fixture
def fused(monkeypatch):
    """The calls of ``batch_norm_relu``; without a kernel for it, every block runs its modules."""
    return record_calls(monkeypatch, epilogue, "batch_norm_relu")


def blocks(*ends):
    """A network with a block for each of ``ends``, the modules that follow its convolution and normalisation."""
    layers, width = [], 3
    for end in ends:
        layers.append(nn.Sequential(nn.Conv2d(width, 6, 3, padding=1), nn.BatchNorm2d(6), *end))
        width = 6
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))


def compare(net, x, monkeypatch, objective="bll", schedule="eager"):
    cuts = [str(i) for i in range(len(net) - 3)]
    one = bllkern.convert(net, cuts, CLASSES, objective, schedule, example=x)
    other = copy.deepcopy(one)
    losses = nets.train(one, x, Y, 2)
    monkeypatch.setattr(epilogue, "of", lambda module: None)
    for loss, expected in zip(losses, nets.train(other, x, Y, 2), strict=True):
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


ENDS = ([nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)], [nn.ReLU(inplace=True)], [nn.ReLU(), nn.MaxPool2d(3)])


@pytest.mark.parametrize("schedule", ["eager", "deferred", "immediate"])
@pytest.mark.parametrize("objective", ["bll", "bwbpf", "predsim"])
def test_learns_as_the_modules_do(fused, monkeypatch, schedule, objective):
    compare(blocks(*ENDS), torch.randn(12, 3, 17, 14), monkeypatch, objective, schedule)
    assert len(fused) == (6 if NATIVE else 0)


@pytest.mark.parametrize("options", [dict(agreement=0.5), dict(bootstrapping=True), dict(pool=2)], ids=str)
def test_other_options(fused, monkeypatch, options):
    compare(blocks(*ENDS), torch.randn(12, 3, 17, 14), monkeypatch, BLL(**options))
    assert len(fused) == (6 if NATIVE else 0)


def test_isolated(fused):
    x = torch.randn(12, 3, 17, 14)
    net = bllkern.convert(blocks(*ENDS), ["0", "1", "2"], CLASSES, example=x)
    bllkern.assert_isolated(net, x, Y)
    assert len(fused) == (3 if NATIVE else 0)


def test_eval_is_the_plain_network(fused):
    x = torch.randn(12, 3, 17, 14)
    plain = blocks(*ENDS)
    net = bllkern.convert(plain, ["0", "1", "2"], CLASSES, example=x)
    nets.train(net, x, Y, 2)
    calls = len(fused)
    assert torch.equal(net.eval()(x), bllkern.unwrap(net)(x)) and len(fused) == calls


def norm(**options):
    return nn.BatchNorm2d(6, **options)


@pytest.mark.parametrize(
    "modules",
    [
        [norm(), nn.GELU()],
        [norm(affine=False), nn.ReLU()],
        [norm(momentum=None), nn.ReLU()],
        [norm().eval(), nn.ReLU()],
        [norm(), nn.ReLU(), nn.MaxPool2d(3, 2)],
        [norm(), nn.ReLU(), nn.MaxPool2d(2, padding=1)],
        [norm(), nn.ReLU(), nn.MaxPool2d((1, 2))],
        [norm(), nn.ReLU(), nn.MaxPool2d(5)],
        [norm(), nn.ReLU(), nn.Dropout2d()],
        [nn.GroupNorm(2, 6), nn.ReLU()],
        [nn.ReLU()],
        [],
    ],
    ids=str,
)
def test_other_ends_run_as_they_are(modules):
    assert epilogue.of(nn.Sequential(*modules)) is None


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_a_hook_sees_what_it_has_to_see(which):
    module = nn.Sequential(nn.Conv2d(3, 6, 3), norm(), nn.ReLU(), nn.MaxPool2d(2))
    assert epilogue.of(module) is not None
    module[which].register_forward_hook(lambda *_: None)
    assert (epilogue.of(module) is None) == (which > 0)
