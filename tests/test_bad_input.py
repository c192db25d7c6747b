"""Networks and steps that cannot be trained block-locally are refused, and the module is named."""

import copy
from collections import namedtuple

import pytest
import torch
from torch import nn

import bllkern
import nets
from bllkern.objectives import BLL

X, Y = torch.randn(4, 8), torch.tensor([0, 1, 2, 3])


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def step(net, x=X, y=Y):
    with bllkern.targets(y):
        loss = nets.cross_entropy(net(x), y)
        if any(boundary.schedule == "deferred" for boundary in bllkern.network.boundaries(net).values()):
            loss = loss + bllkern.local_loss(net)
    loss.backward()


class Tied(nn.Module):
    """A head with the weight of the first layer."""

    def __init__(self):
        super().__init__()
        self.first, self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.body(torch.tanh(self.first(x)))))


class SkipToTheOutput(nn.Module):
    """The stem's output is read again at the head."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        stem = torch.tanh(self.stem(x))
        return self.head(self.body(stem) + stem)


class SkipToTheNextBlock(SkipToTheOutput):
    """The stem's output is read again in the second block."""

    def forward(self, x):
        stem = torch.tanh(self.stem(x))
        return self.head(self.norm(self.body(stem) * stem))


class TiedBlocks(SkipToTheOutput):
    """The second block has the weight of the first."""

    def __init__(self):
        super().__init__()
        self.body.weight = self.stem.weight

    def forward(self, x):
        return self.head(self.body(self.norm(self.stem(x))))


class Plain(SkipToTheOutput):
    def forward(self, x):
        return self.head(self.body(self.norm(self.stem(x))))


def by_hand(net, cuts, schedule):
    for cut in cuts:
        setattr(net, cut, bllkern.BlockLocal(getattr(net, cut), 5, "bwbpf", schedule))
    return net


def converted(net, cuts, schedule):
    return bllkern.convert(net, cuts, 5, "bwbpf", schedule)


def compiled(net, cuts, schedule):
    return torch.compile(converted(net, cuts, schedule), backend="eager")


def half(params):
    return sgd(params[: len(params) // 2])


SINGLE = "batch norm 'norm' needs more than one value per channel in training: give it a batch of at least 2"
WRONG = {
    "tied": (
        Tied,
        ["body"],
        "output of the network also reaches 'first.* of block 'body': .* is tied to 'head.weight'",
    ),
    "skip to the output": (SkipToTheOutput, ["body"], "also reaches 'stem.* of block 'body': a tensor skips the bound"),
    "skip": (SkipToTheNextBlock, ["body", "norm"], r"block 'norm' also reaches a parameter \[8\] of block 'body'"),
    "tied blocks": (TiedBlocks, ["stem", "body"], r"block 'body' also reaches a parameter \[8, 8\] of block 'stem'"),
    "optimizer": (Plain, ["stem", "body"], "that of block 'stem' misses 2 of 4, the first of shape"),
    "one sample": (Plain, ["stem", "body"], SINGLE),
}


@pytest.mark.parametrize("schedule", ["eager", "deferred", "immediate"])
@pytest.mark.parametrize("door", [converted, by_hand, compiled])
@pytest.mark.parametrize("what", WRONG)
def test_a_first_step_that_is_refused_changes_nothing(what, door, schedule):
    build, cuts, message = WRONG[what]
    plain = build()
    tensors = [*plain.parameters(), *plain.buffers()]
    before = [tensor.clone() for tensor in tensors]
    net = door(plain, cuts, schedule)
    optimizers = bllkern.optimizers(getattr(net, "_orig_mod", net), half if what == "optimizer" else sgd)
    count = 1 if what == "one sample" else len(X)
    for _ in range(2):
        with pytest.raises(ValueError if what in ("optimizer", "one sample") else RuntimeError, match=message):
            step(net, X[:count], Y[:count])
            optimizers.step()
    assert all(map(torch.equal, tensors, before)) and all(p.grad is None for p in plain.parameters())


@pytest.mark.parametrize("build, cuts, message", [WRONG[what] for what in ("tied", "skip to the output", "skip")])
def test_an_example_shows_it_at_once(build, cuts, message):
    with pytest.raises(RuntimeError, match=message):
        bllkern.convert(build(), cuts, 5, example=X)


def test_tied_layers_inside_one_block_are_fine():
    net = bllkern.convert(nn.Sequential(Tied(), nn.Linear(8, 5)), ["0"], 5, example=X)
    step(net)
    bllkern.assert_isolated(net, X, Y)


def test_parameters_tied_across_two_blocks():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5))
    net[1].weight = net[0].weight
    with pytest.raises(RuntimeError, match=r"block '1' also reaches a parameter \[8, 8\] of block '0'"):
        bllkern.convert(net, ["0", "1"], 5, example=X)


def activation_changed_in_place():
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.ReLU(inplace=True), nn.Linear(8, 5))
    return bllkern.convert(net, ["1"], 5, "bwbpf", "deferred", example=X)


def test_a_waiting_activation_changed_in_place_is_named():
    net = activation_changed_in_place()
    with pytest.raises(RuntimeError, match="the activation of block '1' was changed in place"):
        step(net)
    assert all(p.grad is None for p in net.parameters())
    net[2].inplace = False
    step(net)


@pytest.mark.parametrize("schedule", ["eager", "immediate"])
def test_a_detached_activation_may_change_in_place_once_its_block_is_done(schedule):
    results = []
    for inplace in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.ReLU(inplace=inplace), nn.Linear(8, 5))
        net = bllkern.convert(net, ["1"], 5, "predsim", schedule, example=X)
        optimizers = bllkern.optimizers(net, sgd)
        step(net)
        optimizers.step()
        results.append(net.state_dict())
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_what_a_block_still_needs_may_not_change():
    class Careless(nn.Linear):
        def forward(self, x):
            z = torch.exp(super().forward(x))
            y = 2 * z
            z.zero_()  # the gradient of exp needs it
            return y

    net = bllkern.convert(nn.Sequential(Careless(8, 8), nn.Linear(8, 5)), ["0"], 5, example=X)
    with pytest.raises(RuntimeError, match="the backward pass of block '0' needs a tensor that has changed: .*inplace"):
        step(net)
    assert all(p.grad is None for p in net[1].parameters())


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        return x * factor

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError


def test_noise_that_is_lost_on_the_way():
    class Net(nn.Sequential):
        def forward(self, x, lost):
            z = self[0](x)
            return self[2](self[1](torch.tensor(z.tolist()) if lost else Scale.apply(z, self[1].weight[0, 0])))

    net = Net(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5))
    net = bllkern.convert(net, ["0", "1"], 5, BLL(denoising=1.0), example=(X, False))
    with pytest.raises(RuntimeError, match="denoising: no noise has come to block '1': call the converted network"):
        with bllkern.targets(Y):
            net(X, True)
    with pytest.raises(RuntimeError, match="denoising cannot follow ScaleBackward between two boundaries: an auto"):
        with bllkern.targets(Y):
            net(X, False)


@pytest.mark.parametrize("schedule", ["eager", "immediate"])
@pytest.mark.parametrize("example", [None, X])
def test_an_optimizer_that_misses_parameters(schedule, example):
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
    net = bllkern.convert(net, ["1"], 5, "bwbpf", schedule, example=example)
    with pytest.raises(ValueError, match=r"that of block '1' misses 1 of 4, the first of shape \[5\]"):
        optimizers = bllkern.optimizers(net, lambda params: sgd(params[:3]))
        step(net)
        optimizers.step()
    net = bllkern.convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5)), ["0"], 5, example=X)
    with pytest.raises(ValueError, match=r"that of the output block misses 1 of 2, the first of shape \[5\]"):
        bllkern.optimizers(net, lambda params: sgd(params[:1] if len(params) == 2 else params))


@pytest.mark.parametrize("cut", ["0", "2"])
def test_batch_norm_of_one_sample_is_named(cut):
    net = nn.Sequential(
        nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), nn.Linear(8, 8), nn.Linear(8, 5)
    )
    net = bllkern.convert(net, [cut], 5, example=X)
    with pytest.raises(ValueError, match=r"batch norm '1.1' needs more than one value per channel in training: give"):
        step(net, X[:1], Y[:1])
    step(net)
    with torch.no_grad():
        assert net.eval()(X[:1]).shape == (1, 5)


def test_other_errors_of_the_network_stay_as_they_are():
    net = bllkern.convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5)), ["0"], 5, example=X)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        step(net, torch.randn(4, 7))


def test_the_plain_network_is_not_watched():
    net = bllkern.convert(SkipToTheOutput(), ["stem"], 5, example=X)
    plain = bllkern.unwrap(net)
    assert not plain._forward_hooks and net._forward_hooks
    assert len(copy.deepcopy(net)._forward_hooks) == len(net._forward_hooks)


Pair = namedtuple("Pair", "hidden extra")


@pytest.mark.parametrize("kind", [tuple, list, dict, Pair])
def test_outputs_of_other_kinds_keep_their_kind(kind):
    class Several(nn.Linear):
        def forward(self, x):
            z = super().forward(x)
            return {"hidden": z, "extra": "x"} if kind is dict else kind(*(z, "x")) if kind is Pair else kind((z, "x"))

    block = bllkern.BlockLocal(Several(8, 8), 5, "bwbpf")
    with bllkern.targets(Y):
        output = block(X)
    hidden, extra = output.values() if kind is dict else output
    assert type(output) is kind and extra == "x" and not hidden.requires_grad and block.module.weight.grad is not None
