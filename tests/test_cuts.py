"""Where networks are cut: places that no path skips, blocks of similar cost."""

import pytest
import torch
from torch import nn

import bllkern
import nets
from bllkern.cli import measure
from bllkern.cuts import even, structure


def test_trunk_opens_containers_but_not_residual_blocks():
    net = nets.build("resnet")[0]
    stem = ["conv1", "bn1", "relu", "maxpool"]
    assert structure.trunk(net) == [*stem, "layer1.0", "layer2.0", "layer2.1", "layer3.0", "avgpool", "fc"]
    assert structure.groups(net)[0] == stem and structure.groups(net)[-2] == ["layer3.0", "avgpool"]
    transformer = nets.build("transformer")[0]
    assert structure.trunk(transformer) == ["embedding", "layers.0", "layers.1", "layers.2", "norm", "head"]


def test_blocks_of_similar_cost():
    widths = [4, 64, 64, 4, 4, 4, 4]
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in zip(widths, widths[1:], strict=False)]
    net = nn.Sequential(*layers)
    assert even(net, 2) == ["2.1"]
    assert even(net, 3, (torch.randn(3, 4),)) == ["0.1", "1.1"]
    assert even(net, 6) == ["0.1", "1.1", "2.1", "3.1", "4.1"]
    assert even(net, 1) == []


class Branches(nn.Module):
    """Two paths side by side, each a container, and their sum: no cut lies inside."""

    def __init__(self, width):
        super().__init__()
        self.left = nn.Sequential(
            nn.Sequential(nn.Linear(width, width), nn.ReLU()), nn.Sequential(nn.Linear(width, width))
        )
        self.right = nn.Sequential(nn.Sequential(nn.Linear(width, width)))

    def forward(self, x):
        return self.left(x) + self.right(x)


class Branched(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(8, 8), Branches(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.body(self.stem(x))))


def test_with_an_example_no_cut_lies_inside_a_branch():
    net, x = Branched(), torch.randn(6, 8)
    assert even(net, 4)[1].startswith("body.left")  # what the names alone suggest
    assert even(net, 2, (x,)) == ["stem"]
    with pytest.raises(ValueError, match="from 1 to 2, the layers in a row, got 3"):
        even(net, 3, (x,))
    bllkern.assert_isolated(bllkern.convert(net, 2, 5, example=x), x, torch.randint(0, 5, (6,)))


def test_an_example_is_only_looked_at():
    net, _, x, _ = nets.build("convnet")
    state = {key: value.clone() for key, value in net.state_dict().items()}
    net[0].eval()
    even(net, 3, (x,), "memory")
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert [m.training for m in net] == [False, True, True, True] and all(p.grad is None for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def held_and_peak(run):
    """Bytes that ``run`` leaves allocated while what it returns lives, and the most that it held."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = run()
    held = measure.held(profile)
    del result
    return held[-1], max(held)


def test_what_units_keep_is_what_a_forward_pass_holds():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 144, 5)
    )
    x = torch.randn(4, 3, 16, 16)
    units = structure._Trace(net, structure.groups(net), (x,)).units
    kept = {}
    for unit in units:
        kept |= unit.saved
    held, _ = held_and_peak(lambda: net(x))
    assert sum(kept.values()) == held - 4 * 5 * 4  # less the logits, which no layer keeps
    assert [sum(unit.saved.values()) for unit in units] == [
        4 * 8 * 14**2 * 4,
        4 * 8 * (14**2 + 12**2) * 4,
        4 * 8 * 144 * 4,
    ]
    assert [unit.gradients for unit in units] == [4 * sum(p.numel() for p in net[i].parameters()) for i in (0, 2, 5)]


def test_memory_balance_lowers_the_peak():
    def unit(width, out, stride):
        return nn.Sequential(nn.Conv2d(width, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU())

    def net():
        torch.manual_seed(0)
        large = [unit(3, 4, 1), *(unit(4, 4, 1) for _ in range(5))]
        deep = [unit(4, 96, 8), unit(96, 96, 1), unit(96, 96, 1)]
        return nn.Sequential(*large, *deep, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 5))

    x, y = torch.randn(16, 3, 32, 32), torch.randint(0, 5, (16,))
    peaks, names = {}, {}
    for balance in ("flops", "memory"):
        converted = bllkern.convert(net(), 3, 5, "bwbpf", "immediate", example=x, balance=balance)
        optimizers = bllkern.optimizers(converted, lambda params: torch.optim.SGD(params, lr=0.1))
        names[balance] = list(bllkern.network.boundaries(converted))

        def step(converted=converted, optimizers=optimizers):
            with bllkern.targets(y):
                loss = nets.cross_entropy(converted(x), y)
            loss.backward()
            optimizers.step()
            optimizers.zero_grad()

        peaks[balance] = held_and_peak(step)[1]
        bllkern.assert_isolated(converted, x, y)
    assert peaks["memory"] < 0.75 * peaks["flops"], (peaks, names)


def test_bad_balance():
    net, _, x, _ = nets.build("mlp")
    with pytest.raises(ValueError, match=r"balance must be one of \['flops', 'memory'\], got 'time'"):
        bllkern.convert(net, 3, nets.CLASSES, example=x, balance="time")
    with pytest.raises(ValueError, match="balance is for a number of blocks, got balance='memory' with the names"):
        bllkern.convert(net, ["1"], nets.CLASSES, example=x, balance="memory")
    with pytest.raises(ValueError, match="balance='memory' needs example=, an input of the batch size to train with"):
        bllkern.convert(net, 3, nets.CLASSES, balance="memory")
