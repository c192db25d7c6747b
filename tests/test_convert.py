"""Boundaries into existing networks and out of them again."""

import copy

import pytest
import torch
from torch import nn

import bllkern
import nets


@pytest.mark.parametrize("by", ["names", "number", "number and example"])
@pytest.mark.parametrize("model", nets.NAMES)
def test_unwrap_gives_the_network_back(model, by):
    net, names, x, y = nets.build(model)
    original = copy.deepcopy(net)
    converted = bllkern.convert(
        net, names if by == "names" else 3, nets.CLASSES, example=x if "example" in by else None
    )
    assert [type(m) for m in net.modules()] == [type(m) for m in original.modules()]
    plain = bllkern.unwrap(converted)
    assert list(plain.state_dict()) == list(original.state_dict())
    assert [type(m) for m in plain.modules()] == [type(m) for m in original.modules()]
    for module in (net, plain, converted, original):
        module.eval()
    assert (
        torch.equal(plain(x), original(x)) and torch.equal(converted(x), original(x)) and torch.equal(net(x), plain(x))
    )
    for name, parameter in plain.named_parameters():
        assert parameter is net.get_parameter(name)
    converted.train()
    with bllkern.targets(y):
        nets.cross_entropy(converted(x), y).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_training_the_converted_network_trains_the_original():
    net, names, x, y = nets.build("convnet")
    converted = bllkern.convert(net, names, nets.CLASSES)
    with bllkern.targets(y):
        nets.cross_entropy(converted(x), y).backward()
    torch.optim.SGD(converted.parameters(), lr=0.1).step()
    assert torch.equal(net.eval()(x), converted.eval()(x))
    assert int(net[0][1].num_batches_tracked) == 1


def test_plain_checkpoints_load():
    net, names, x, _ = nets.build("resnet")
    converted = bllkern.convert(net, names, nets.CLASSES, example=x)
    checkpoint = copy.deepcopy(nets.build("resnet")[0].state_dict())
    converted.load_state_dict(checkpoint)
    for key, value in net.state_dict().items():
        assert torch.equal(value, checkpoint[key]), key
    other = bllkern.convert(nets.build("resnet")[0], names, nets.CLASSES)
    other.load_state_dict(converted.state_dict())
    for key, value in converted.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_checkpoints_of_a_cut_after_a_module_without_parameters():
    net, names, x, _ = nets.build("mlp")
    converted = bllkern.convert(net, names, nets.CLASSES, "predsim", example=x)
    state = copy.deepcopy(converted.state_dict())
    other = bllkern.convert(nets.build("mlp")[0], names, nets.CLASSES, "predsim", example=x)
    other.load_state_dict(state)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in state.items())


def test_local_losses_have_the_names_of_the_cuts():
    net, names, x, y = nets.build("resnet")
    converted = bllkern.convert(net, names, nets.CLASSES)
    assert bllkern.local_losses(converted) == {}
    with bllkern.targets(y):
        converted(x)
    losses = bllkern.local_losses(converted)
    assert list(losses) == names and all(loss.dim() == 0 and not loss.requires_grad for loss in losses.values())


@pytest.mark.parametrize(
    "names, message",
    [
        (["layer7"], r"no module 'layer7'; the nearest names are \['layer"),
        (["xyz"], r"no module 'xyz'; the nearest names are \['conv1', "),
        (["layer1", "layer1"], "'layer1' stands more than once"),
        (["layer1", ""], "no module ''"),
        ([3], "no module 3"),
        (0, "from 1 to 6"),
        (7, "from 1 to 6"),
        (True, "from 1 to 6"),
    ],
)
def test_bad_cuts_change_nothing(names, message):
    net = nets.build("resnet")[0]
    with pytest.raises(ValueError, match=message):
        bllkern.convert(net, names, nets.CLASSES)
    assert not any(isinstance(module, bllkern.Boundary) for module in net.modules())


def test_a_cut_in_a_shared_module_is_refused():
    shared = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    net = nn.Sequential(shared, nn.Linear(8, 8), shared, nn.Linear(8, 5))
    for name in ("0", "0.1", "2.1"):
        with pytest.raises(ValueError, match=r"several places: \['0"):
            bllkern.convert(net, [name], 5)
    bllkern.convert(net, ["1"], 5)


class Skip(nn.Module):
    """The stem's output is read before and after the cut ``body``; ``late`` says from which call on."""

    def __init__(self, late):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.top, self.calls, self.late = nn.Bilinear(8, 8, 8), 0, late

    def forward(self, x):
        stem = torch.tanh(self.stem(x))
        body = self.body(stem)
        self.calls += 1
        return self.head(self.top(body, stem if self.calls > self.late else body))


@pytest.mark.parametrize("schedule", ["eager", "deferred"])
@pytest.mark.parametrize("example", [None, torch.randn(2, 8)])
def test_a_skip_across_a_boundary_is_named(schedule, example):
    with pytest.raises(RuntimeError, match=r"block 'top' also reaches a parameter \[8\] of block 'body'"):
        net = bllkern.convert(Skip(0), ["body", "top"], 5, schedule=schedule, example=example)
        with bllkern.targets(torch.tensor([0, 1, 2, 3])):
            net(torch.randn(4, 8))


def test_a_skip_that_appears_later_is_named():
    net = bllkern.convert(Skip(2), ["body", "top"], 5)
    with bllkern.targets(torch.tensor([0, 1, 2, 3])):
        net(torch.randn(4, 8))
        with pytest.raises(RuntimeError, match="block 'top' reads a tensor computed before the previous boundary"):
            net(torch.randn(4, 8))


def test_nested_cuts():
    net, _, x, y = nets.build("resnet")
    converted = bllkern.convert(net, ["layer2.0", "layer2"], nets.CLASSES)
    with bllkern.targets(y):
        nets.cross_entropy(converted(x), y).backward()
    assert list(bllkern.local_losses(converted)) == ["layer2.0", "layer2"]
    assert list(bllkern.unwrap(converted).state_dict()) == list(net.state_dict())
    bllkern.assert_isolated(converted, x, y)


def test_bound_methods_and_hooks_follow_the_copy():
    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(6, 6), nn.Linear(6, 5))
            self.run = self.run_layers

        def run_layers(self, x):
            return self[1](self[0](x))

        def forward(self, x):
            return self.run(x)

    net, calls = Net(), []
    net.register_forward_hook(lambda *_: calls.append(True))
    converted = bllkern.convert(net, ["0"], 5)
    with bllkern.targets(torch.tensor([0, 1])):
        converted(torch.randn(2, 6))
    assert calls == [True] and list(bllkern.local_losses(converted)) == ["0"]


@pytest.mark.parametrize("feedback", ["direct", "chained"])
def test_sizes_come_from_an_example_or_the_first_call(feedback):
    objective = bllkern.objectives.BLL(feedback=feedback)
    for example in (True, False):
        net, names, x, y = nets.build("mlp")
        converted = bllkern.convert(net, names, nets.CLASSES, objective, example=x if example else None)
        lazy = [nn.parameter.is_lazy(p) for p in converted.parameters()]
        assert any(lazy) != example
        optimizer = torch.optim.AdamW(converted.parameters())
        before = [p.clone() for p in net.parameters()]
        for _ in range(2):
            with bllkern.targets(y):
                nets.cross_entropy(converted(x), y).backward()
            optimizer.step()
        assert not any(nn.parameter.is_lazy(p) for p in converted.parameters())
        assert not any(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_an_example_leaves_the_network_as_it_is():
    net, names, x, _ = nets.build("convnet")
    state = copy.deepcopy(net.state_dict())
    net[0].eval()
    converted = bllkern.convert(net, names, nets.CLASSES, example=x)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert converted.training and not converted[0].module.training and all(p.grad is None for p in net.parameters())


def test_convert_needs_a_module():
    with pytest.raises(TypeError, match="net must be a torch.nn.Module, got str"):
        bllkern.convert("resnet", ["layer1"], 5)
    with pytest.raises(TypeError, match="net must be a torch.nn.Module, got str"):
        bllkern.unwrap("resnet")
