"""Larger than the device: two blocks there at a time, the same weights, and the truth in checkpoints."""

import contextlib
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.profiler import profile

import bllkern
import nets
from bllkern.cli import measure
from bllkern.execution import streams
from stream_order import Recorder, races

OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=torch.tensor(0.01), foreach=False),
}


def build(model="convnet", objective="bll", optimizer="momentum", offload="cpu", dtype=torch.float64):
    torch.manual_seed(0)
    net, cuts, x, y = nets.build(model)
    x = x.to(dtype) if x.is_floating_point() else x
    net = bllkern.convert(net.to(dtype), cuts, nets.CLASSES, objective, "immediate", example=x, offload=offload)
    return net, bllkern.optimizers(net, OPTIMIZERS[optimizer]), x, y


def step(net, optimizers, x, y):
    with bllkern.targets(y):
        loss = nets.cross_entropy(net(x), y)
    loss.backward()
    optimizers.step()
    optimizers.zero_grad()


def manager(net):
    return next(iter(bllkern.network.boundaries(net).values())).offload


@pytest.mark.parametrize(
    "model, objective, optimizer",
    [*((model, "bll", "momentum") for model in nets.NAMES), *(("convnet", "bwbpf", each) for each in OPTIMIZERS)],
)
def test_the_same_weights_as_without(model, objective, optimizer):
    results = []
    for offload in (None, "cpu"):
        net, optimizers, x, y = build(model, objective, optimizer, offload)
        for _ in range(20):
            step(net, optimizers, x, y)
        results.append((net.state_dict(), optimizers.state_dict(), net.eval()(x)))
    for key, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][key], value, rtol=0, atol=1e-10)
    assert str(results[0][1]) == str(results[1][1])
    torch.testing.assert_close(results[1][2], results[0][2], rtol=0, atol=1e-10)


def test_a_copy_moves_states_of_its_own():
    net, optimizers, x, y = build()
    step(net, optimizers, x, y)

    def holders(net):
        for block in manager(net).blocks:
            block.moved = True  # as in training
            yield from (id(place.holder) for place in manager(net).places(block))

    assert not {*holders(net)} & {*holders(copy.deepcopy(net))}


@pytest.mark.parametrize("training", [True, False])
def test_two_blocks_are_there_at_a_time(training):
    net, optimizers, x, y = build("resnet")
    blocks = manager(net).blocks
    assert len(blocks) == 4
    seen = []

    def look(*_):
        seen.append([i for i, block in enumerate(blocks) if block.hosts is not None])

    for module in net.modules():
        if module is not net and not isinstance(module, bllkern.Boundary):
            module.register_forward_hook(look)
    for tensor in net.parameters():
        if tensor.requires_grad:
            tensor.register_hook(look)
    net.train(training)
    step(net, optimizers, x, y) if training else net(x)
    assert max(map(len, seen)) == 2
    assert [key for key, _ in itertools.groupby(seen)] == [[0, 1], [1, 2], [2, 3], [3]]
    assert all(block.hosts is None for block in blocks)
    where = {id(tensor): i for i, block in enumerate(blocks) for tensor in block.tensors}
    assert where[id(net.get_parameter("conv1.weight"))] == 0 and where[id(net.get_parameter("fc.weight"))] == 3
    assert len(where) == len(list(net.parameters())) + len(list(net.buffers()))


def peak(run):
    """Bytes that torch's allocator holds at most during ``run``, beyond those it holds before."""
    with profile(profile_memory=True) as events:
        run()
    return max(measure.held(events))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_network_above_the_cap_trains_below_it(autocast):
    """What a step allocates, on a CPU that plays the device, is what would have to fit there."""
    width, depth = 256, 12
    net = nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)], nn.Linear(width, 5))
    x, y = torch.randn(8, width), torch.randint(0, 5, (8,))
    names = [str(i) for i in range(depth)]
    net = bllkern.convert(net, names, 5, "bwbpf", example=x, offload="cpu")
    optimizers = bllkern.optimizers(net, OPTIMIZERS["adam"])
    for _ in range(2):
        step(net, optimizers, x, y)
    states = [value for one in optimizers for state in one.state.values() for value in state.values()]
    total = sum(t.nbytes for t in [*net.parameters(), *states])
    cap = total // 3
    before = [p.clone() for p in net.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert peak(lambda: step(net, optimizers, x, y)) < cap
    assert all(not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert peak(lambda: net.eval()(x)) < cap // 3


def test_checkpoints_tell_the_truth():
    net, optimizers, x, y = build(optimizer="adam")
    for _ in range(3):
        step(net, optimizers, x, y)
    saved, states = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizers.state_dict())
    assert int(saved["0.module.1.num_batches_tracked"]) == 3
    resident, plain_optimizers, _, _ = build(optimizer="adam", offload=None)
    for one, its_optimizers in ((net, optimizers), (resident, plain_optimizers)):
        step(one, its_optimizers, x, y)
        one.load_state_dict(saved)
        its_optimizers.load_state_dict(copy.deepcopy(states))
        step(one, its_optimizers, x, y)
    for key, value in resident.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value, rtol=0, atol=1e-10)
    plain = bllkern.unwrap(net)
    assert not plain._forward_pre_hooks and not plain._forward_hooks
    assert torch.equal(plain.eval()(x), net.eval()(x))


def test_isolation_and_copies():
    net, optimizers, x, y = build(optimizer="adam")
    bllkern.optimizers(net, OPTIMIZERS["adam"])
    bllkern.assert_isolated(net, x, y)
    other = copy.deepcopy(net)
    assert manager(other) is not manager(net)
    step(other, bllkern.optimizers(other, OPTIMIZERS["adam"]), x, y)
    changed = [not torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True)]
    assert all(changed)


def test_frozen_weights_come_along_and_stay_as_they_are():
    net, cuts, x, y = nets.build("mlp")
    for p in net[2].parameters():
        p.requires_grad_(False)
    frozen = net[2].weight.clone()
    net = bllkern.convert(net, cuts, nets.CLASSES, example=x, offload="cpu")
    assert any(tensor is net[2].weight for tensor in manager(net).blocks[1].tensors)
    step(net, bllkern.optimizers(net, OPTIMIZERS["momentum"]), x, y)
    assert torch.equal(net[2].weight, frozen)


def test_after_an_interrupted_pass_the_next_one_begins_anew():
    net, optimizers, x, y = build()
    twin, twin_optimizers, _, _ = build(offload=None)
    with pytest.raises(ValueError, match="a row per sample"), bllkern.targets(y[:3]):
        net(x)
    net.load_state_dict(twin.state_dict())
    for one, its_optimizers in ((net, optimizers), (twin, twin_optimizers)):
        step(one, its_optimizers, x, y)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


def test_gradients_of_the_output_block_accumulate_over_passes():
    results = []
    for offload in (None, "cpu"):
        net, optimizers, x, y = build(offload=offload)
        for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):
            with bllkern.targets(ys):
                loss = F.cross_entropy(net(xs), ys)
            loss.backward()
            net.eval()(xs)
            net.train()
        optimizers.step()
        results.append(net.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=0, atol=1e-10)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, nets.CLASSES)

    def forward(self, x):
        return self.two(self.one(self.one(x)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"offload": "gpu"}, "offload must be None or 'cpu', got 'gpu'"),
        ({"schedule": "eager"}, "offload='cpu' needs schedule='immediate'.* got 'eager'"),
        ({"example": None}, "offload='cpu' needs example="),
        ({"objective": "backprop"}, "block '1' has an objective that does not isolate"),
        ({"objective": bllkern.objectives.BLL(feedback="chained")}, "feedback='chained' reads weights of all"),
        ({"net": Twice(), "cuts": ["one"]}, "block 'one' is passed 2 times"),
    ],
)
def test_what_offload_refuses(change, message):
    net, cuts, x, _ = nets.build("mlp")
    arguments = {"net": net, "cuts": cuts, "target_features": nets.CLASSES, "example": x, "offload": "cpu"}
    with pytest.raises(ValueError, match=message):
        bllkern.convert(**{**arguments, **change})


@pytest.mark.parametrize("serial", [True, False])
def test_every_copy_waits_for_what_it_needs(monkeypatch, serial):
    net, optimizers, x, y = build("mlp", "bwbpf", "adam")
    recorder = Recorder()
    monkeypatch.setattr(streams, "of", lambda device: recorder)
    with recorder, bllkern.serial() if serial else contextlib.nullcontext():
        for _ in range(3):
            step(net, optimizers, x.clone(), y)
            net.eval()(x)
            net.train()
    assert not races(recorder)
    assert recorder.used() == {"main", "copies", *("ABC" if not serial else ())}


def test_no_copy_waits_for_more_than_it_needs(monkeypatch):
    net, optimizers, x, y = build("mlp", "bwbpf", "adam")
    recorder = Recorder()
    monkeypatch.setattr(streams, "of", lambda device: recorder)
    with recorder, bllkern.serial():
        for _ in range(2):
            step(net, optimizers, x.clone(), y)
    waits = sum(kind == "wait" for kind, *_ in recorder.trace)
    needless = [i for i in range(waits) if not races(recorder, dropped=i)]
    assert waits and not needless
    assert races(recorder, keeps=False)  # states of the first step, made by the optimizer


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("objective", ["bll", "bwbpf"])
def test_gpu_offload_gives_the_resident_weights(objective, optimizer):
    net, optimizers, x, y = build("resnet", objective, optimizer)
    torch.manual_seed(0)
    plain, cuts, _, _ = nets.build("resnet")
    plain = bllkern.convert(plain.double().cuda(), cuts, nets.CLASSES, objective, "immediate", example=x.cuda())
    plain.load_state_dict(net.state_dict())
    plain_optimizers = bllkern.optimizers(plain, OPTIMIZERS[optimizer])
    for _ in range(20):
        step(net, optimizers, x.cuda(), y.cuda())
        step(plain, plain_optimizers, x.cuda(), y.cuda())
    for key, value in net.state_dict().items():
        assert value.device.type == "cpu"
        torch.testing.assert_close(value, plain.state_dict()[key].cpu(), rtol=0, atol=1e-10)
    torch.testing.assert_close(net.eval()(x.cuda()), plain.eval()(x.cuda()), rtol=0, atol=1e-10)
    bllkern.assert_isolated(net, x.cuda(), y.cuda())


@pytest.mark.gpu
def test_gpu_trains_a_network_above_the_cap():
    width, depth, rows = 2048, 24, 256
    net = nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)], nn.Linear(width, 5))
    x, y = torch.randn(rows, width), torch.randint(0, 5, (rows,))
    net = bllkern.convert(net, [str(i) for i in range(depth)], 5, "bwbpf", example=x[:2], offload="cpu")
    optimizers = bllkern.optimizers(net, OPTIMIZERS["adam"])
    cap = sum(p.nbytes for p in net.parameters()) * 3 // 2  # half of weights and states
    before = torch.cuda.memory_allocated()
    x, y = x.cuda(), y.cuda()
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        step(net, optimizers, x, y)
        assert torch.cuda.max_memory_allocated() - before < cap
    assert all(p.device.type == "cpu" for p in net.parameters())


def test_gradients_cannot_wait_on_the_device():
    net, optimizers, x, y = build()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="accumulate must be False with offload='cpu', which keeps no gradients"):
        with bllkern.targets(y, accumulate=True):
            net(x)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    step(net, optimizers, x, y)
