"""Networks of convolutions train channels-last on the CPU where an example shows that they can."""

import pytest
import torch
from torch import nn

import bllkern
from bllkern.execution import layout

CLASSES = 3


class Viewing(nn.Sequential):
    """Flattens with ``view``, which refuses maps that are channels-last."""

    def forward(self, x):
        return self[1](self[0](x).view(len(x), -1))


def layers(flatten=True, channels=2):
    head = [nn.Flatten()] if flatten else []
    return nn.Conv2d(channels, 4, 3, padding=1), *head, nn.Linear(4 * 6 * 6, CLASSES)


def converted(net, x):
    return bllkern.convert(net, ["0"], CLASSES, "bwbpf", example=x)


def formats(net, x):
    """Whether what the first module reads, and what it hands on, is channels-last in a step of training."""
    seen = []
    net[0].register_forward_hook(lambda module, args, output: seen.extend(t.stride(1) == 1 for t in (args[0], output)))
    with bllkern.targets(torch.arange(len(x)) % CLASSES):
        net(x)
    return seen


@pytest.mark.parametrize("channels", [1, 2])
def test_from_the_input_on(channels):
    x = torch.randn(5, channels, 6, 6)
    net = converted(nn.Sequential(*layers(channels=channels)), x)
    assert layout.attached(net) and formats(net, x) == [True, True]


def test_the_same_up_to_rounding():
    x, y = torch.randn(5, 2, 6, 6), torch.arange(5) % CLASSES
    plain = nn.Sequential(*layers())
    with_example, without = converted(plain, x), bllkern.convert(plain, ["0"], CLASSES, "bwbpf")
    results = []
    for net in (with_example, without):
        with bllkern.targets(y):
            results.append(net(x).detach())
    torch.testing.assert_close(*results)


def test_not_where_the_network_takes_views():
    x = torch.randn(5, 2, 6, 6)
    net = converted(Viewing(*layers(flatten=False)), x)
    assert not layout.attached(net) and formats(net, x) == [False, False]


def test_not_without_an_example_without_convolutions_or_in_double_precision():
    x = torch.randn(5, 2, 6, 6)
    assert not layout.attached(bllkern.convert(nn.Sequential(*layers()), ["0"], CLASSES))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.Linear(4, CLASSES))
    assert not layout.attached(bllkern.convert(flat, ["1"], CLASSES, example=x))
    assert not layout.attached(converted(nn.Sequential(*layers()).double(), x.double()))


def test_evaluation_and_outputs_are_as_they_were():
    x = torch.randn(5, 2, 6, 6)
    maps = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, CLASSES, 1))
    net = converted(maps, x)
    with bllkern.targets(torch.arange(5) % CLASSES):
        assert net(x).is_contiguous()
    net.eval()
    assert formats(net, x) == [False, False] and torch.equal(net(x), maps.eval()(x))


def test_another_error_of_the_trial_is_raised():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(7, CLASSES))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        converted(net, torch.randn(5, 2, 6, 6))


def test_unwrap():
    x = torch.randn(5, 2, 6, 6)
    plain = bllkern.unwrap(converted(nn.Sequential(*layers()), x))
    assert not layout.attached(plain) and formats(plain, x) == [False, False]
