"""Blocks whose normalisation, shortcut, ReLU and max pooling are one pass, against the modules one after the other."""

import copy

import pytest
import torch
from torch import nn

import bllkern
import nets
from bllkern import backends
from bllkern.execution import epilogue
from bllkern.functional import convolution
from bllkern.models import resnet as models
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


def compare(net, x, monkeypatch, objective="bll", schedule="eager", cuts=None):
    cuts = cuts or [str(i) for i in range(len(net) - 3)]
    one = bllkern.convert(net, cuts, CLASSES, objective, schedule, example=x)
    other = copy.deepcopy(one)
    losses = nets.train(one, x, Y, 2)
    monkeypatch.setattr(epilogue, "run", lambda module, x, side: (module(x), None))
    monkeypatch.setattr(epilogue, "_residual", lambda unit, x, side: (type(unit).forward(unit, x), None))
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
    "modules, fused_to",
    [
        ([norm(), nn.GELU()], 0),
        ([norm(affine=False), nn.ReLU()], 0),
        ([norm(momentum=None), nn.ReLU()], 0),
        ([norm().eval(), nn.ReLU()], 0),
        ([norm(), nn.ReLU(), nn.MaxPool2d(3, 2)], 2),
        ([norm(), nn.ReLU(), nn.MaxPool2d(2, padding=1)], 2),
        ([norm(), nn.ReLU(), nn.MaxPool2d((1, 2))], 2),
        ([norm(), nn.ReLU(), nn.MaxPool2d(5)], 2),
        ([norm(), nn.ReLU(), nn.Dropout2d()], 2),
        ([norm(), nn.ReLU(), norm(), nn.ReLU(), nn.Conv2d(6, 6, 3)], 4),
        ([nn.GroupNorm(2, 6), nn.ReLU()], 0),
        ([nn.ReLU()], 0),
        ([], 0),
    ],
    ids=str,
)
def test_other_ends_run_as_they_are(fused, modules, fused_to):
    x, module = torch.randn(3, 6, 11, 10), nn.Sequential(*modules)
    same = copy.deepcopy(module)
    torch.manual_seed(0)
    z, pooled = epilogue.run(module, x, 4)
    torch.manual_seed(0)
    torch.testing.assert_close(z, same(x))
    for buffer, expected in zip(module.buffers(), same.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected)
    assert pooled is None and len(fused) == (fused_to / 2 if NATIVE else 0)


@pytest.mark.parametrize("which", [0, 1, 2, 3, 4])
def test_a_hook_sees_what_it_has_to_see(fused, which):
    module = nn.Sequential(nn.Conv2d(3, 6, 3), norm(), nn.ReLU(), nn.MaxPool2d(2))
    seen = []
    hooked = (*module, module)[which]
    hooked.register_forward_hook(lambda module, args, output: seen.append(output))
    epilogue.run(module, torch.randn(2, 3, 8, 8), 4)
    assert len(seen) == 1 and len(fused) == (which in (0, 3) if NATIVE else 0)


def test_what_is_compiled_runs_as_compiled(fused):
    unit, graphs = models.BasicBlock(4, 4, 1, None), []
    unit.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    epilogue.run(unit, torch.randn(2, 4, 8, 8), 4)
    assert graphs and not fused


def residual(kind, planes=4):
    return models.ResNet(kind, (2, 2), CLASSES, (3, 8, 8), planes)


def torchvisions(kind):
    resnet = pytest.importorskip("torchvision.models.resnet")
    net = resnet.ResNet(getattr(resnet, kind), [2, 1, 1, 1], num_classes=CLASSES, width_per_group=64)
    return net.requires_grad_()


UNITS = {"BasicBlock": models.BasicBlock, "Bottleneck": models.Bottleneck}


@pytest.mark.parametrize("schedule", ["eager", "deferred", "immediate"])
@pytest.mark.parametrize("kind, planes, passes", [("BasicBlock", 4, 2), ("BasicBlock", 64, 1), ("Bottleneck", 4, 3)])
def test_residual_units_learn_as_they_would(fused, monkeypatch, kind, planes, passes, schedule):
    monkeypatch.setitem(convolution.LARGE_BYTES, "cpu", 1)
    monkeypatch.setattr(epilogue, "LARGE_BYTES", 1)
    net, x = residual(UNITS[kind], planes), torch.randn(12, 3, 8, 8)
    compare(net, x, monkeypatch, "bwbpf", schedule, ["layer1.1", "layer2.0"])
    # in two steps of four units; wide ones normalise within the second convolution
    assert len(fused) == (2 * 4 * passes if NATIVE else 0)


@pytest.mark.parametrize("kind", UNITS)
def test_torchvisions_units_too(fused, monkeypatch, kind):
    monkeypatch.setattr(epilogue, "LARGE_BYTES", 1)
    compare(torchvisions(kind), torch.randn(12, 3, 32, 32), monkeypatch, "bwbpf", "eager", ["layer1", "layer3"])
    assert len(fused) >= (2 * 5 if NATIVE else 0)


def test_small_units_inside_a_block_run_as_they_are(fused, monkeypatch):
    x = torch.randn(12, 3, 8, 8)
    net = bllkern.convert(residual(models.BasicBlock), ["layer1.1", "layer2.0"], CLASSES, example=x)
    for large, units in ((12 * 4 * 8 * 8 * 4, 3), (12 * 4 * 8 * 8 * 4 + 1, 2)):  # layer2.1 reads half as much
        monkeypatch.setattr(epilogue, "LARGE_BYTES", large)
        fused.clear()
        nets.train(net, x, Y, 1)
        assert len(fused) == (2 * units if NATIVE else 0)


@pytest.mark.parametrize("autocast", [False, True])
def test_residual_units_under_autocast(monkeypatch, autocast):
    monkeypatch.setattr(epilogue, "LARGE_BYTES", 1)
    net = bllkern.convert(
        residual(models.BasicBlock), ["layer1.0", "layer2.0"], CLASSES, example=torch.randn(2, 3, 8, 8)
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), bllkern.targets(Y):
        net(torch.randn(12, 3, 8, 8)).float().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_the_networks_own_units_stay_as_they_are():
    x, plain = torch.randn(12, 3, 8, 8), residual(models.BasicBlock)
    net = bllkern.convert(plain, ["layer1.0"], CLASSES, example=x[:2])
    attached = [name for name, module in net.named_modules() if epilogue.attached(module)]
    assert attached == ["layer1.1", "layer2.0", "layer2.1"]
    twin = copy.deepcopy(net)
    assert all(twin.get_submodule(name).forward.__self__ is twin.get_submodule(name) for name in attached)
    bllkern.assert_isolated(net, x, Y)
    again = bllkern.convert(bllkern.unwrap(net), ["layer1.0", "layer2.0"], CLASSES, "backprop")
    for one in (plain, bllkern.unwrap(net), again):
        assert not any(epilogue.attached(module) for module in one.modules())
    assert torch.equal(net.eval()(x), bllkern.unwrap(net).eval()(x))


def test_a_hook_inside_a_unit_sees_what_it_has_to_see(fused):
    unit = residual(models.BasicBlock).layer1[0]
    seen = []
    unit.bn1.register_forward_hook(lambda module, args, output: seen.append(output))
    z, pooled = epilogue.run(unit, torch.randn(2, 4, 8, 8), 4)
    assert len(seen) == 1 and pooled is None and not fused


@pytest.mark.parametrize("how", [None, "hook", "forward"])
def test_what_others_have_of_a_convolution_stays(how, fused):
    unit, seen = models.BasicBlock(8, 8, 1, None), []
    if how == "hook":
        unit.conv2.register_forward_hook(lambda module, args, output: seen.append(output))
    elif how == "forward":
        unit.conv2.forward = lambda x: seen.append(type(unit.conv2).forward(unit.conv2, x)) or seen[0]
    z, _ = epilogue.run(unit, torch.randn(2, 8, 6, 6))
    before = [output.detach().clone() for output in seen]
    z.square().sum().backward()
    assert all(map(torch.equal, seen, before)) and len(seen) == (how is not None)
    assert [args[-1] for args in fused] == ([True, how is None] if NATIVE else [])  # spend_x


class OnGpu:
    """What is asked of a tensor [N, C, H, W] in bfloat16 on a GPU before anything is launched."""

    is_cuda, device, dtype = True, torch.device("cuda"), torch.bfloat16

    def __init__(self, *shape):
        self.shape = torch.Size(shape)
        self.nbytes = 2 * self.shape.numel()

    def dim(self):
        return len(self.shape)

    def numel(self):
        return self.shape.numel()

    def is_contiguous(self, **options):
        return True


def test_on_a_gpu_what_is_large_or_recorded_is_one_pass(monkeypatch):
    pytest.importorskip("triton")
    norm, small, large = nn.BatchNorm2d(64), OnGpu(64, 64, 32, 32), OnGpu(512, 64, 32, 32)
    assert large.nbytes == epilogue.LARGE_ON_GPU
    assert not epilogue._applies(norm, small) and epilogue._applies(norm, large)
    monkeypatch.setattr(epilogue, "recording", lambda: True)
    assert epilogue._applies(norm, small)


def test_on_a_gpu_what_is_large_is_made_again(monkeypatch):
    conv, small, large = nn.Conv2d(64, 256, 1, bias=False), OnGpu(64, 64, 32, 32), OnGpu(256, 64, 32, 32)
    assert not convolution.cheap_to_repeat(conv, large)  # float32 weights without autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    assert [convolution.cheap_to_repeat(conv, x) for x in (small, large)] == [False, True]
    assert not convolution.cheap_to_repeat(nn.Conv2d(64, 64, 1), large)  # too few products for each value
