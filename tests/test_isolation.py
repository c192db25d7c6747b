"""The promise of the library: every local loss moves its own block only."""

import pytest
import torch

import bllkern
import nets
from bllkern import objectives
from bllkern.objectives import BLL, BWBPF

OBJECTIVES = {
    "bll": "bll",
    "bwbpf": "bwbpf",
    "predsim": "predsim",
    "everything": nets.EVERY_TERM,
    "chained": BLL(feedback="chained"),
    "fixed": BLL(feedback="fixed", agreement=0.1),
    "linear head": BLL(head="linear"),
    "mlp head": BLL(head="mlp", feedback="chained", agreement=0.1),
}


@pytest.mark.parametrize("schedule", ["eager", "deferred", "immediate"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model", [*nets.NAMES, "resnet by number"])
def test_isolated(model, objective, schedule):
    net, cuts, x, y = nets.build(model.split()[0])
    net = bllkern.convert(net, 3 if "number" in model else cuts, nets.CLASSES, OBJECTIVES[objective], schedule)
    bllkern.optimizers(net, lambda params: torch.optim.SGD(params, lr=0.1))
    before = {name: value.clone() for name, value in bllkern.unwrap(net).state_dict().items()}
    bllkern.assert_isolated(net, x, y)
    for name, value in bllkern.unwrap(net).state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("schedule", ["eager", "deferred", "immediate"])
@pytest.mark.parametrize("name", ["bll", "bwbpf", "predsim"])
def test_conv_heads_are_isolated(name, schedule):
    net, cuts, x, y = nets.build("resnet")
    net = bllkern.convert(net, cuts, nets.CLASSES, objectives.get(name, head="conv", pool=2), schedule)
    bllkern.optimizers(net, lambda params: torch.optim.SGD(params, lr=0.1))
    bllkern.assert_isolated(net, x, y)


@pytest.mark.parametrize("objective", ["deep_supervision", BWBPF(isolate=False)])
@pytest.mark.parametrize("model", nets.NAMES)
def test_deep_supervision_is_not_isolated(model, objective):
    net, cuts, x, y = nets.build(model)
    net = bllkern.convert(net, cuts, nets.CLASSES, objective)
    with pytest.raises(AssertionError, match=f"moved by the losses of both '{cuts[0]}' and '{cuts[1]}'"):
        bllkern.assert_isolated(net, x, y)


def test_backprop_is_not_isolated():
    net, cuts, x, y = nets.build("mlp")
    with pytest.raises(AssertionError, match="'1' has no local loss"):
        bllkern.assert_isolated(bllkern.convert(net, cuts, nets.CLASSES, "backprop"), x, y)


def test_layers_of_their_own_are_isolated():
    net = torch.nn.Sequential(
        bllkern.BlockLocalConv2d(3, 8, 3, padding=1, target_features=nets.CLASSES),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        bllkern.BlockLocalLinear(512, 16, target_features=nets.CLASSES, objective="bwbpf"),
        torch.nn.Linear(16, nets.CLASSES),
    )
    _, _, x, y = nets.build("convnet")
    bllkern.assert_isolated(net, x, y)


def test_a_leak_is_found():
    class Leak(torch.nn.Module):
        """Reads the weight of the first layer again after the boundary."""

        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(12, 12)
            self.second = torch.nn.Linear(12, nets.CLASSES)

        def forward(self, x):
            return self.second(torch.nn.functional.linear(self.first(x), self.first.weight))

    _, _, x, y = nets.build("mlp")
    with pytest.raises(
        AssertionError, match="'first.module.weight' is moved by the losses of both 'first' and 'the output'"
    ):
        bllkern.assert_isolated(bllkern.convert(Leak(), ["first"], nets.CLASSES), x, y)


def test_plain_networks_are_refused():
    net, _, x, y = nets.build("mlp")
    with pytest.raises(ValueError, match="no block-local boundary"):
        bllkern.assert_isolated(net, x, y)
