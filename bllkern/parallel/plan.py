"""What a training step takes on many devices, predicted from the seconds of each block on one.

Four ways to use N devices on one batch of M micro-batches a step, in steady state; t is seconds, B bytes per second of
the link between neighbours, L its latency in seconds:

- block-parallel: stage s takes F_s + B_s (forward pass and local learning) per micro-batch, with nobody to wait for, so
  a step takes M times the slowest of stages and links; a message overlaps the computation of the next one.  It goes
  without its zeros (:mod:`.stream`), which a gradient, all of whose entries may differ from 0, does not.
- 1F1B (Narayanan et al., arXiv 2104.04473): the slowest stage works M times, and the pipeline fills and drains once per
  step, S - 1 stages of forward and backward pass and of messages both ways.
- zero-bubble (Qi et al., arXiv 2401.10241, ZB-H1): weight gradients fill the drain, so a third of the bubble of 1F1B is
  left where forward, input and weight gradient cost the same; messages as in 1F1B.
- data-parallel: every device has the network and M / N micro-batches (at least 1 sample each); gradients are averaged
  by a ring, 2 (N - 1) / N times their bytes over the link and 2 (N - 1) latencies, overlapped with the backward pass.

More devices than stages are rows of a mesh: each row takes its share of the micro-batches, and gradients of a stage are
averaged over its column, overlapped with what the stage computes.

Devices may be processes of one machine, which share its ``cores``.  A message is work then, for the one that sends as
for the one that receives.  With fewer cores than devices, none of them idles while any device has work: the work of all
devices is divided by the number of cores, and a pipeline fills and drains as one of as many stages as there are cores.
Blocks are slower on cores that take turns between processes, and where others use the same caches: let as many
processes measure them at once as there will be devices (:func:`bllkern.parallel.profile.at_once`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..cuts import balanced

METHODS = ("block-parallel", "1F1B", "zero-bubble", "data-parallel")


@dataclass(frozen=True)
class Block:
    """One block on one micro-batch: seconds, and bytes of what it sends on, keeps for its backward pass, and holds.

    ``forward`` and ``backward`` are those of end-to-end backprop; ``local`` is the forward pass with local learning.
    ``packed``: the message as block-parallel sends it through a socket.  ``activations``: kept between forward and backward pass.  ``parameters``: without gradients and optimizer states.
    """

    name: str
    forward: float
    backward: float
    local: float
    message: int
    packed: int
    activations: int
    parameters: int


@dataclass(frozen=True)
class Prediction:
    """Of one method on ``devices``: seconds of a step, the share of it that devices idle, peak bytes of a device."""

    method: str
    devices: int
    stages: int
    seconds: float
    bubble: float
    memory: int


def predict(
    method: str,
    blocks: Sequence[Block],
    devices: int,
    bandwidth: float,
    latency: float = 0.0,
    micro_batches: int = 4,
    states: int = 3,
    cores: int | None = None,
) -> Prediction:
    """Predict one method; see the module.

    Args: bandwidth: bytes per second.  latency: seconds.  states: tensors as large as a parameter that training holds
    (parameter, gradient, momentum).  cores: that all devices share, each with the speed of a device; by default each
    device has its own.
    Raises: ``ValueError`` for a method that is not known, or a number that is not positive.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    for name, value in (
        ("devices", devices),
        ("bandwidth", bandwidth),
        ("micro_batches", micro_batches),
        ("cores", cores),
    ):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    link = _Link(bandwidth, latency)
    if method == "data-parallel":
        return _data_parallel(blocks, devices, link, micro_batches, states, cores)
    stages = _stages(blocks, min(devices, len(blocks)), method)
    if cores is not None:
        stages = _with_messages(stages, link, method)
    rows = devices // len(stages)
    shares = micro_batches / rows  # below 1: rows take parts of a micro-batch
    compute = _pipeline if method != "block-parallel" else _block_parallel
    seconds = compute(method, stages, link, shares)
    reduction = max(link.mean(stage.parameters, rows) for stage in stages)
    used = rows * len(stages)
    used = rows * len(stages)
    seconds = max(seconds, reduction)
    if cores is not None and cores < used:
        seconds = max(seconds, _on_cores(method, stages, micro_batches, min(1.0, shares), cores))
    busy = shares * sum(stage.busy(method) for stage in stages) / len(stages)
    kept = min(1.0, shares) * max(_kept(method, i, stages, shares) for i in range(len(stages)))
    held = max(states * stage.parameters for stage in stages)
    return Prediction(method, used, len(stages), seconds, 1 - busy / seconds, int(kept + held))


@dataclass(frozen=True)
class _Link:
    bandwidth: float
    latency: float

    def message(self, size: float) -> float:
        return self.latency + size / self.bandwidth

    def mean(self, size: float, devices: int) -> float:
        """Seconds of a ring all-reduce."""
        return 2 * (devices - 1) * (size / devices / self.bandwidth + self.latency)


@dataclass(frozen=True)
class _Stage:
    """A run of blocks on one device."""

    forward: float
    backward: float
    local: float
    message: int
    packed: int
    activations: int
    largest: int
    parameters: int

    def busy(self, method: str) -> float:
        """Seconds of work on a micro-batch."""
        return self.local if method == "block-parallel" else self.forward + self.backward

    def sent(self, method: str) -> int:
        """Bytes of a message."""
        return self.packed if method == "block-parallel" else self.message


def _stages(blocks: Sequence[Block], count: int, method: str) -> list[_Stage]:
    """Runs of blocks of which the slowest is fastest."""
    costs = [b.local if method == "block-parallel" else b.forward + b.backward for b in blocks]
    ends = [*balanced(costs, count, sum), len(blocks)]
    return [_stage(blocks[start:end]) for start, end in zip([0, *ends], ends)]


def _stage(run: Sequence[Block]) -> _Stage:
    sums = {name: sum(getattr(b, name) for b in run) for name in ("forward", "backward", "local")}
    sizes = {name: sum(getattr(b, name) for b in run) for name in ("activations", "parameters")}
    messages = {name: getattr(run[-1], name) for name in ("message", "packed")}
    return _Stage(**sums, **messages, largest=max(b.activations for b in run), **sizes)


def _block_parallel(method: str, stages: list[_Stage], link: _Link, shares: float) -> float:
    """Nothing but the slowest of stages and links: what is ahead of it waits in queues, what is behind it idles."""
    sent = max((link.message(stage.sent(method)) for stage in stages[:-1]), default=0.0)
    return shares * max(sent, *(stage.busy(method) for stage in stages))


def _pipeline(method: str, stages: list[_Stage], link: _Link, shares: float) -> float:
    """The slowest stage's micro-batches, and one way through all others and back, with the messages on it."""
    slowest = max(stage.busy(method) for stage in stages)
    part = min(1.0, shares)
    bubble = part * (sum(stage.busy(method) for stage in stages) - slowest)
    messages = 2 * sum(link.message(part * stage.message) for stage in stages[:-1])
    sent = max((2 * link.message(stage.message) for stage in stages[:-1]), default=0.0)
    return shares * max(slowest, sent) + (bubble / 3 if method == "zero-bubble" else bubble) + messages


def _with_messages(stages: list[_Stage], link: _Link, method: str) -> list[_Stage]:
    """The stages, where sending and receiving take the processor's time: activations forward, gradients backward."""
    sizes = [0, *(stage.sent(method) for stage in stages[:-1]), 0]
    seconds = [(received + sent) / link.bandwidth for received, sent in pairwise(sizes)]
    return [
        replace(s, forward=s.forward + extra, backward=s.backward + extra, local=s.local + extra)
        for s, extra in zip(stages, seconds, strict=True)
    ]


def _on_cores(method: str, stages: list[_Stage], micro_batches: int, part: float, cores: int) -> float:
    """Seconds in which ``cores`` do the work of all stages; ``part`` of a micro-batch fills a pipeline."""
    work = sum(stage.busy(method) for stage in stages)
    ends = {"block-parallel": 0.0, "1F1B": 1.0, "zero-bubble": 1 / 3}[method]
    return micro_batches * work / cores + ends * part * (min(cores, len(stages)) - 1) * work / len(stages)


def _kept(method: str, place: int, stages: list[_Stage], shares: float) -> float:
    """Bytes of activations: of the largest block, or of every micro-batch that waits for its backward pass."""
    if method == "block-parallel":
        received = 3 * stages[place - 1].message if place else 0  # one to work on, two in the queue
        return stages[place].largest + received + 2 * stages[place].message * (place + 1 < len(stages))
    return stages[place].activations * min(len(stages) - place, max(1.0, shares))


def _data_parallel(
    blocks: Sequence[Block], devices: int, link: _Link, micro_batches: int, states: int, cores: int | None
) -> Prediction:
    whole = _stage(blocks)
    shares = micro_batches / devices
    turns = max(1.0, devices / (cores or devices))  # in which devices have a core
    forward, backward = turns * shares * whole.forward, turns * shares * whole.backward
    seconds = forward + max(backward, link.mean(whole.parameters, devices))
    memory = min(1.0, shares) * whole.activations + states * whole.parameters
    return Prediction("data-parallel", devices, 1, seconds, 1 - (forward + backward) / turns / seconds, int(memory))
