"""Blocks side by side: a missing wait is found, on a CPU that plays streams and on a GPU that has them."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bllkern
from bllkern.execution import streams
from bllkern.objectives import BLL
from stream_order import Recorder, races

CLASSES = 4
OBJECTIVES = {
    "bll": "bll",
    "chained": BLL(feedback="chained", agreement=0.1),
    "bwbpf": "bwbpf",
    "bootstrapping": BLL(bootstrapping=True),
    "denoising": BLL(denoising=1.0),
    "inverse": BLL(evidence=0, agreement=1.0, feedback="inverse"),
}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


class Deep(nn.Module):
    """Seven blocks of a residual layer; each is told the scales that the first one makes of the input."""

    def __init__(self, blocks=7, width=12):
        super().__init__()
        self.blocks = nn.ModuleList(Residual(width) for _ in range(blocks))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(width), nn.Linear(width, width)

    def forward(self, x, scale=None):
        z = x + F.relu(self.linear(self.norm(x)))
        return z if scale is None else z * scale[0]


class Scaled(Deep):
    """As :class:`Deep`, but what the second block makes of the activation is read by all that follow."""

    def forward(self, x):
        scale = None
        for i, block in enumerate(self.blocks):
            x = block(x, scale)
            if i == 1:
                scale = (torch.sigmoid(x),)
        return self.head(x)


class Delayed(Deep):
    """As :class:`Deep`, but each block reads what was made of the activation two blocks before, and nobody after it."""

    def forward(self, x):
        scales = [None, None]
        for block in self.blocks:
            x = block(x, scales.pop(0))
            scales.append((torch.sigmoid(x),))
        return self.head(x)


class Repeated(Deep):
    def forward(self, x):
        for block in self.blocks:
            x = block(block(x))
        return self.head(x)


def convert(net, schedule, objective, device="cpu", dtype=None):
    names = [f"blocks.{i}" for i in range(len(net.blocks))]
    example = torch.randn(8, 12, device=device, dtype=dtype)
    net = bllkern.convert(net.to(device), names, CLASSES, OBJECTIVES[objective], schedule, example=example)
    return net, bllkern.optimizers(net, sgd)


def step(net, optimizers, x, y):
    with bllkern.targets(y):
        loss = F.cross_entropy(net(x.clone()), y)
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizers.step()
    optimizers.zero_grad()
    return [loss.detach(), *bllkern.local_losses(net).values()]


def recorded(monkeypatch, net, optimizers):
    """Two steps, the first step ever behind them, with what they do on which stream."""
    x, y = torch.randn(8, 12), torch.randint(0, CLASSES, (8,))
    step(net, optimizers, x, y)
    recorder = Recorder()
    monkeypatch.setattr(streams, "of", lambda device: recorder)
    with recorder:
        torch._foreach_mul_([p.detach() for p in net.parameters()], 1.0)  # what came before, on the caller's stream
        for _ in range(2):
            step(net, optimizers, x, y)
    return recorder


@pytest.mark.parametrize("schedule", ["eager", "immediate"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_wait_is_needed_and_none_is_missing(monkeypatch, objective, schedule):
    recorder = recorded(monkeypatch, *convert(Deep(), schedule, objective))
    assert not races(recorder)
    used = {"bootstrapping": {"main", "A"}} | dict.fromkeys(["chained", "inverse"], {"main", "A", "B", "C", "F"})
    assert recorder.used() == used.get(objective, {"main", "A", "B", "C"})
    waits = sum(kind == "wait" for kind, *_ in recorder.trace)
    needless = [i for i in range(waits) if not races(recorder, dropped=i)]
    assert waits and not needless


@pytest.mark.parametrize("model", [Deep, Scaled])
def test_memory_that_another_stream_reads_is_kept(monkeypatch, model):
    recorder = recorded(monkeypatch, *convert(model(), "eager", "bwbpf"))
    assert not races(recorder)
    found = races(recorder, keeps=False)
    assert found and all("given freed memory" in race for race in found)


def test_an_argument_that_another_stream_reads_is_kept(monkeypatch):
    net, optimizers = convert(Delayed(), "eager", "bwbpf")
    assert not races(recorded(monkeypatch, net, optimizers))
    arrive = streams.Pass.arrive
    monkeypatch.setattr(streams.Pass, "arrive", lambda self, boundary, inputs: arrive(self, boundary, ()))
    found = races(recorded(monkeypatch, net, optimizers))
    assert found and all("given freed memory" in race for race in found)


@pytest.mark.parametrize("schedule", ["eager", "immediate"])
def test_a_block_used_twice_in_a_step_goes_on_with_its_stream(monkeypatch, schedule):
    recorder = recorded(monkeypatch, *convert(Repeated(3), schedule, "bll"))
    assert not races(recorder)
    assert recorder.used() == {"main", "A"}


def test_an_inverse_of_a_block_used_twice_is_refused():
    net, optimizers = convert(Repeated(3), "eager", "inverse")
    with pytest.raises(RuntimeError, match="feedback='inverse' reads .* passed several times in a step"):
        step(net, optimizers, torch.randn(8, 12), torch.randint(0, CLASSES, (8,)))


@pytest.mark.parametrize("mode", ["serial", "deferred", "unwrapped", "isolation"])
def test_where_everything_stays_on_one_stream(monkeypatch, mode):
    net, optimizers = convert(Deep(3), "deferred" if mode == "deferred" else "eager", "bll")
    x, y = torch.randn(8, 12), torch.randint(0, CLASSES, (8,))
    recorder = Recorder()
    monkeypatch.setattr(streams, "of", lambda device: recorder)
    with recorder:
        for _ in range(2):
            if mode == "serial":
                with bllkern.serial():
                    step(net, optimizers, x, y)
            elif mode == "isolation":
                bllkern.assert_isolated(net, x, y)
            elif mode == "unwrapped":
                bllkern.unwrap(net)(x)
            else:
                with bllkern.targets(y):
                    net(x)
                bllkern.local_loss(net).backward()
    assert not races(recorder) and recorder.now == "main"
    assert recorder.used() == ({"main", "A"} if mode == "deferred" else {"main"})


def test_after_an_error_the_caller_has_its_stream_again(monkeypatch):
    net, _ = convert(Deep(3), "eager", "bll")
    recorder = Recorder()
    monkeypatch.setattr(streams, "of", lambda device: recorder)
    with pytest.raises(ValueError, match="a row per sample"), bllkern.targets(torch.zeros(3, dtype=torch.int64)):
        net(torch.randn(8, 12))
    assert recorder.now == "main" and streams.running() is None


def test_messages_launched_ahead_teach_the_same():
    """The weights that the messages come from move in between, in every block of an immediate step."""
    results = []
    for ahead in (True, False):
        torch.manual_seed(0)
        net, optimizers = convert(Deep(4).double(), "immediate", "chained", dtype=torch.float64)
        for _ in range(5):
            with contextlib.nullcontext() if ahead else bllkern.serial():
                step(net, optimizers, torch.randn(8, 12, dtype=torch.float64), torch.randint(0, CLASSES, (8,)))
        results.append(list(net.parameters()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_step_never_reads_a_value_on_the_host(monkeypatch):
    """On the meta device there is none to read: anything that waits for the device raises."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # it knows no meta
    for schedule in ("eager", "immediate", "deferred"):
        for objective in OBJECTIVES:
            with torch.device("meta"):
                net, optimizers = convert(Deep(2), schedule, objective, device="meta")
            x, y = torch.randn(8, 12, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")
            for _ in range(2):
                with bllkern.targets(y):
                    loss = F.cross_entropy(net(x), y)
                (loss + bllkern.local_loss(net) if schedule == "deferred" else loss).backward()
                optimizers.step()
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                bllkern.local_losses(net)


class Slow(torch.autograd.Function):
    """The identity, so late on the GPU, forwards and backwards, that what does not wait for it comes first."""

    CYCLES = 20_000_000  # about 10 ms

    @staticmethod
    def forward(ctx, x):
        torch.cuda._sleep(Slow.CYCLES)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        torch.cuda._sleep(Slow.CYCLES)
        return gradient.clone()


class SlowResidual(Residual):
    def forward(self, x, scale=None):
        return Slow.apply(super().forward(Slow.apply(x), scale))


class Dropping(streams.CudaStreams if torch.cuda.is_available() else streams.NoStreams):
    """The streams of the GPU without wait number ``dropped`` of a block, or without those of the caller (``"end"``)."""

    def __init__(self, device, dropped):
        super().__init__(device)
        self.dropped, self.waits = dropped, 0

    def wait(self, stream, event):
        number = self.waits if stream in self.blocks else "end"
        self.waits += stream in self.blocks
        if number != self.dropped:
            super().wait(stream, event)


def forget(device):
    """What was freed on each stream becomes NaN: else it has the right values from the run before."""
    for stream in (device.current(), *device.blocks, device.feedback):
        with torch.cuda.stream(stream):
            freed = [torch.full((size,), torch.nan, device="cuda") for size in (128, 256, 1024) for _ in range(1000)]
            del freed
    torch.cuda.synchronize()


def trained_on_gpu(monkeypatch, model, objective, schedule, slow=False, dropped=None, serial=False):
    """The weights after three steps of different data, and the number of waits."""
    torch.manual_seed(0)
    net = model(4)
    if slow:
        net.blocks = nn.ModuleList(SlowResidual(12) for _ in net.blocks)
    data = [(torch.randn(8, 12, device="cuda"), torch.randint(0, CLASSES, (8,), device="cuda")) for _ in range(3)]
    net, optimizers = convert(net, schedule, objective, device="cuda")
    device = Dropping(torch.device("cuda", torch.cuda.current_device()), dropped)
    monkeypatch.setattr(streams, "of", lambda _: device)
    forget(device)
    with bllkern.serial() if serial else contextlib.nullcontext():
        for x, y in data:
            if slow:  # longer than a block, which sleeps before it reads
                torch.cuda._sleep(3 * Slow.CYCLES)
            with bllkern.targets(y):
                loss = F.cross_entropy(net(x.clone()), y)
            loss.backward()
            if slow:
                torch.cuda._sleep(3 * Slow.CYCLES)
            optimizers.step()
            optimizers.zero_grad()
    torch.cuda.synchronize()
    return torch.cat([p.detach().flatten() for p in net.parameters()]), device.waits


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["eager", "immediate"])
@pytest.mark.parametrize("model, objective", [*itertools.product([Deep, Scaled], OBJECTIVES), (Repeated, "bll")])
def test_gpu_streams_give_the_serial_result(monkeypatch, model, objective, schedule):
    for slow in (False, True) if model is not Repeated else (False,):
        expected, none = trained_on_gpu(monkeypatch, model, objective, schedule, slow, serial=True)
        weights, waits = trained_on_gpu(monkeypatch, model, objective, schedule, slow)
        assert waits > none == 0
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_gpu_goes_wrong_without_any_one_wait(monkeypatch):
    expected, _ = trained_on_gpu(monkeypatch, Deep, "bwbpf", "eager", slow=True, serial=True)
    _, waits = trained_on_gpu(monkeypatch, Deep, "bwbpf", "eager", slow=True)
    for dropped in (*range(waits), "end"):
        weights, _ = trained_on_gpu(monkeypatch, Deep, "bwbpf", "eager", slow=True, dropped=dropped)
        assert not torch.allclose(weights, expected, rtol=1e-4, atol=1e-6), f"wait {dropped} of {waits}"


@pytest.mark.gpu
@pytest.mark.parametrize("schedule", ["eager", "immediate"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gpu_step_never_waits_for_the_device(objective, schedule):
    net, optimizers = convert(Deep(3), schedule, objective, device="cuda")
    x, y = torch.randn(8, 12, device="cuda"), torch.randint(0, CLASSES, (8,), device="cuda")
    for checked in (False, True):
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        try:
            with bllkern.targets(y):
                loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizers.step()
            optimizers.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
