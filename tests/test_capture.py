"""A whole training step as one CUDA graph: the same weights; on a CPU the same checks."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import bllkern
import nets
from bllkern.execution import capture as module
from bllkern.objectives import BLL


def adam(parameters):
    # a bias before a normalisation has no gradient but rounding errors, of which eps makes nothing
    return torch.optim.Adam(parameters, lr=0.01, eps=1e-3, capturable=parameters[0].is_cuda)


def build(schedule, device="cpu", objective="bll"):
    """A step of the small convolutional network, its network, and a batch."""
    torch.manual_seed(0)
    net, cuts, x, y = nets.build("convnet")
    net = bllkern.convert(net.to(device), cuts, nets.CLASSES, objective, schedule, example=x.to(device))
    return trainer(net, schedule), net, x.to(device), y.to(device)


def trainer(net, schedule):
    optimizers = bllkern.optimizers(net, adam)

    def step(x, y):
        optimizers.zero_grad()
        with bllkern.targets(y):
            loss = F.cross_entropy(net(x), y)
        (loss + bllkern.local_loss(net) if schedule == "deferred" else loss).backward()
        optimizers.step()
        return {"loss": loss.detach()}

    return step


def test_on_a_cpu_every_call_is_a_step():
    step, net, x, y = build("immediate")
    other = copy.deepcopy(net)
    captured, plain = bllkern.capture(step, x, y), trainer(other, "immediate")
    for _ in range(5):
        batch = torch.randn_like(x), y.flip(0)
        torch.testing.assert_close(captured(*batch), plain(*batch), rtol=0, atol=0)
    for one, same in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, same)


def test_what_cannot_be_captured():
    step, _, x, y = build("eager")
    with pytest.raises(TypeError, match="step must be callable, got Tensor"):
        bllkern.capture(x, y)
    with pytest.raises(TypeError, match=r"inputs\[1\] must be a tensor, got list"):
        bllkern.capture(step, x, [1])
    with pytest.raises(ValueError, match="got no tensor"):
        bllkern.capture(step)
    with pytest.raises(ValueError, match=r"on one device, got \['cpu', 'meta'\]"):
        bllkern.capture(step, x, y.to("meta"))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, y: (x,), "captured with 2 inputs, got 1"),
        (lambda x, y: (x[:8], y[:8]), r"inputs\[0\] must be torch.float32 \[16, 3, 8, 8\] on cpu, as captured, got"),
        (lambda x, y: (x.double(), y), r"got torch.float64 \[16, 3, 8, 8\] on cpu"),
        (lambda x, y: (x, y.to("meta")), r"inputs\[1\] must be torch.int64 \[16\] on cpu, as captured, got .* meta"),
        (lambda x, y: (x, 3), "got int"),
    ],
)
def test_inputs_that_differ_change_nothing(change, message):
    step, net, x, y = build("immediate")
    captured = bllkern.capture(step, x, y)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        captured(*change(x, y))
    for key, value in before.items():
        assert torch.equal(value, net.state_dict()[key])


@pytest.mark.parametrize("options, refused", [({}, True), ({"capturable": True}, False), ({"fused": True}, False)])
def test_optimizers_that_count_on_the_host_are_refused(options, refused):
    optimizer = torch.optim.AdamW([torch.zeros(2, requires_grad=True)])
    optimizer.param_groups[0].update(options)
    if refused:
        with pytest.raises(RuntimeError, match=r"AdamW counts its steps on the host: write AdamW\(..., capturable=T"):
            module._check_capturable(optimizer, (), {})
    else:
        module._check_capturable(optimizer, (), {})
    module._check_capturable(torch.optim.SGD([torch.zeros(2)], lr=0.1, momentum=0.9), (), {})


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["eager", "immediate", "deferred"])
@pytest.mark.parametrize("objective", ["bll", "bwbpf", BLL(feedback="chained", agreement=0.1)])
def test_gpu_replays_train_as_steps_do(schedule, objective):
    step, net, x, y = build(schedule, "cuda", objective)
    other = copy.deepcopy(net)
    captured, plain = bllkern.capture(step, x, y), trainer(other, schedule)
    for _ in range(8):
        batch = torch.randn_like(x), y[torch.randperm(len(y), device="cuda")]
        torch.testing.assert_close(captured(*batch)["loss"], plain(*batch)["loss"], rtol=1e-3, atol=1e-4)
    assert captured.graph is not None
    for one, same in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, same, rtol=1e-2, atol=1e-3)
    assert len(bllkern.local_losses(net)) == 2


@pytest.mark.gpu
def test_gpu_step_that_reads_on_the_host_is_refused():
    step, _, x, y = build("eager", "cuda")
    captured = bllkern.capture(lambda x, y: step(x, y)["loss"].item(), x, y)
    for _ in range(module.WARM_UP):
        captured(x, y)
    with pytest.raises(RuntimeError, match="must not read a value on the host"):
        captured(x, y)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.randn(3, device="cuda")  # and what follows runs as if nothing had been recorded
    step(x, y)


@pytest.mark.gpu
def test_gpu_optimizer_that_counts_on_the_host_is_refused():
    p = torch.zeros(2, device="cuda", requires_grad=True)
    optimizer = torch.optim.Adam([p])

    def step(x):
        (p * x).sum().backward()
        optimizer.step()

    with pytest.raises(RuntimeError, match="capturable=True"):
        bllkern.capture(step, torch.ones(2, device="cuda"))(torch.ones(2, device="cuda"))
    assert not p.any()


def test_a_capture_that_fails_is_undone(monkeypatch):
    """The stream and the generator of torch, played on a CPU."""
    device, calls = torch.device("cuda", 0), []
    generator = SimpleNamespace(clone_state=lambda: "state", graphsafe_set_state=calls.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "set_stream", calls.append)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    with module.undone_if_it_fails(device):
        pass
    assert not calls
    with pytest.raises(RuntimeError, match="invalidated"), module.undone_if_it_fails(device):
        raise RuntimeError("capture invalidated")
    assert calls == ["stream", "state"]
