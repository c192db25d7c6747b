"""Ranks that share the blocks of a network, next to one process and to torch's 1F1B pipeline on the same ranks.

Eight equal convolutions, micro-batch 16, four micro-batches a step, one thread a process, gloo.  The variants take
turns, so that what else the machine does weighs on all alike; where one process works alone, the others wait.  A step
is timed on every rank after a first one, and the slowest rank counts: what fills the ranks when a job begins, and
empties them when it ends is no part of a step.
``extra_info`` holds the least and median seconds of a step over the rounds, the least CPU seconds of the busiest rank
(what a step would take on cores of its own), the bytes of a step that go through sockets or through shared memory, and
what ``bllkern plan`` predicts for each from blocks measured in the same rounds, by all ranks at once, with its relative
error.  Ratios and errors are those of medians.  Two cores at work are slower than twice one: ``times_two_processes`` is
what two processes that exchange nothing reach.

glibc is told to keep what is freed.  Otherwise it gives the pages of freed activations back to the system or not, as
the order on its heap has it by chance, and faulting them in again takes up to a fifth of a step of any variant.
"""

import json
import os
import time
from dataclasses import replace
from statistics import median
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import bllkern
from bllkern.parallel import BlockParallel
from bllkern.parallel.plan import predict
from bllkern.parallel.profile import profile

LAYERS, CHANNELS, SIDE, CLASSES = 8, 32, 32, 10
MICRO_BATCH, MICRO_BATCHES = 16, 4
TWO = "two processes, each by itself"
SOCKETS = "block-parallel, through sockets"  # as between machines
ROUNDS, STEPS = 3, 16
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
METHODS = {
    "one process": "block-parallel",
    "block-parallel": "block-parallel",
    SOCKETS: "block-parallel",
    "1F1B": "1F1B",
}


def stack():
    """Eight convolutions of equal cost and a linear output."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.ReLU()) for _ in range(LAYERS)]
    return nn.Sequential(*layers, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, CLASSES)))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def cuts():
    """The last layer of each rank but the last."""
    per_rank = LAYERS // dist.get_world_size()
    return [str(end - 1) for end in range(per_rank, LAYERS, per_rank)]


def block_local(objective, example):
    return bllkern.convert(stack(), cuts(), CLASSES, objective, example=example)


def one_process(objective, x, y, ranks=(0,)):
    """``run(steps)`` of the whole network on rank 0, or on each of several ranks by itself."""
    net = block_local(objective, x[:MICRO_BATCH])
    optimizers = bllkern.optimizers(net, sgd)

    def step():
        for x_, y_ in zip(x.split(MICRO_BATCH), y.split(MICRO_BATCH)):
            with bllkern.targets(y_, scale=1 / MICRO_BATCHES):
                loss = F.cross_entropy(net(x_), y_) / MICRO_BATCHES
            loss.backward()
        optimizers.step()
        optimizers.zero_grad()

    def run(steps):
        for _ in range(steps if dist.get_rank() in ranks else 0):
            step()

    return run, lambda: (0, 0), lambda: None


def block_parallel(objective, x, y):
    """``run(steps)`` of this rank's blocks, the bytes through sockets and through memory so far, and what ends it."""
    example = x[:MICRO_BATCH], y[:MICRO_BATCH]
    net, mesh = block_local(objective, example[0]), init_device_mesh("cpu", (dist.get_world_size(),))
    parallel = BlockParallel(net, mesh, optimizer=sgd, example=example, after=cuts(), timeout=60)

    def run(steps):
        for _ in range(steps):
            parallel.step(x, y, MICRO_BATCHES)

    def sent():
        return parallel.bytes_sent - parallel.bytes_shared, parallel.bytes_shared

    return run, sent, parallel.close


def without_shared_memory(make, *args):
    with mock.patch("os.memfd_create", side_effect=OSError):
        return make(*args)


def pipeline(x, y):
    """The same for end-to-end backprop of the same network in torch's pipeline."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    layers = list(stack())
    per_rank = LAYERS // ranks
    mine = nn.Sequential(*layers[rank * per_rank : None if rank == ranks - 1 else (rank + 1) * per_rank])
    stage = PipelineStage(mine, rank, ranks, torch.device("cpu"))
    optimizer, sent = sgd(mine.parameters()), [0]
    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=F.cross_entropy)
    for name in ("get_fwd_send_ops", "get_bwd_send_ops"):
        setattr(stage, name, _counting(getattr(stage, name), sent))

    def run(steps):
        for _ in range(steps):
            schedule.step(*([x] if rank == 0 else []), target=y if rank == ranks - 1 else None)
            optimizer.step()
            optimizer.zero_grad()

    return run, lambda: (sent[0], 0), lambda: None


def _counting(operations, sent):
    def counted(*args):
        found = operations(*args)
        sent[0] += sum(operation.tensor.nbytes for operation in found)
        return found

    return counted


def _socket_bandwidth():
    """Bytes per second between ranks 0 and 1, of messages as large as an activation, there and back."""
    message = torch.empty(MICRO_BATCH * CHANNELS * SIDE * SIDE)
    seconds = []
    for _ in range(9):
        dist.barrier()
        start = time.perf_counter()
        if dist.get_rank() == 0:
            dist.send(message, 1)
            dist.recv(message, 1)
        elif dist.get_rank() == 1:
            dist.recv(message, 0)
            dist.send(message, 0)
        seconds.append(time.perf_counter() - start)
    return 2 * message.nbytes / median(seconds)


def _memory_bandwidth():
    """Bytes per second of passing such a message through memory: written by one rank, read by the other."""
    source, slot, target = torch.randn(3, MICRO_BATCHES, MICRO_BATCH * CHANNELS * SIDE * SIDE).unbind()
    start = time.perf_counter()
    for i in range(MICRO_BATCHES):
        slot[i].copy_(source[i])
        target[i].copy_(slot[i])
    return MICRO_BATCHES * source[0].nbytes * 2 / (time.perf_counter() - start)


def _predictions(blocks, sockets, memory):
    """Seconds of a step by variant, on the cores of this machine."""
    found = {}
    for name, method in METHODS.items():
        devices = 1 if name == "one process" else dist.get_world_size()
        bandwidth = memory if name == "block-parallel" else sockets
        links = {"bandwidth": bandwidth, "micro_batches": MICRO_BATCHES, "cores": os.cpu_count()}
        found[name] = predict(method, blocks, devices, **links).seconds
    return found


def _typical(profiles):
    """Of each block the median seconds of all profiles."""
    times = ("forward", "backward", "local")
    return [replace(same[0], **{t: median(getattr(b, t) for b in same) for t in times}) for same in zip(*profiles)]


def _rank(rank, ranks, folder, objective):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    x, y = (
        torch.randn(MICRO_BATCHES * MICRO_BATCH, CHANNELS, SIDE, SIDE),
        torch.arange(MICRO_BATCHES * MICRO_BATCH) % 10,
    )
    variants = {
        "one process": one_process(objective, x, y),
        "block-parallel": block_parallel(objective, x, y),
        SOCKETS: without_shared_memory(block_parallel, objective, x, y),
        "1F1B": pipeline(x, y),
    }
    if ranks == 2:
        variants[TWO] = one_process(objective, x, y, (0, 1))
    seconds, busy = {name: [] for name in variants}, {name: [] for name in variants}
    for run, *_ in variants.values():
        run(1)
    sent = {}
    profiles, sockets, memory = [], _socket_bandwidth(), _memory_bandwidth()
    for _ in range(ROUNDS):
        dist.barrier()
        example = x[:MICRO_BATCH], y[:MICRO_BATCH]
        options = {"repeats": 2, "clock": time.thread_time}
        profiles.append(profile(stack(), cuts(), CLASSES, objective, *example, F.cross_entropy, **options))
        for name, (run, bytes_sent, _) in variants.items():
            dist.barrier()
            run(1)
            before, start, cpu = bytes_sent(), time.perf_counter(), time.process_time()
            run(STEPS)
            used = torch.tensor([time.perf_counter() - start, time.process_time() - cpu]) / STEPS
            total = torch.tensor(bytes_sent()) - torch.tensor(before)
            dist.all_reduce(total)
            dist.all_reduce(used, dist.ReduceOp.MAX)
            seconds[name].append(float(used[0]))
            sent[name] = dict(zip(("sockets", "memory"), (total // STEPS).tolist()))
            busy[name].append(float(used[1]))
    for *_, close in variants.values():
        close()
    if rank == 0:
        with open(f"{folder}/results.json", "w") as file:
            predicted = _predictions(_typical(profiles), sockets, memory)
            json.dump({"seconds": seconds, "cpu": busy, "bytes": sent, "predicted": predicted}, file)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("objective", ["bwbpf", "bll"])
def test_ranks(benchmark, objective, ranks, tmp_path, monkeypatch):
    """One round is the whole job: all processes, all variants in turns."""
    for name, value in KEEP.items():
        monkeypatch.setenv(name, value)
    benchmark.group = f"{ranks} ranks, {LAYERS} convolutions, {objective}, load {os.getloadavg()[0]:.1f}"
    benchmark.pedantic(lambda: mp.spawn(_rank, (ranks, tmp_path, objective), nprocs=ranks), rounds=1, iterations=1)
    with open(tmp_path / "results.json") as file:
        results = json.load(file)
    medians = {name: median(times) for name, times in results["seconds"].items()}
    benchmark.extra_info.update(
        load=os.getloadavg()[0],
        median_seconds=medians,
        least_seconds={name: min(times) for name, times in results["seconds"].items()},
        least_cpu_seconds={name: min(times) for name, times in results["cpu"].items()},
        bytes_per_step=results["bytes"],
        predicted_seconds=results["predicted"],
        prediction_error={name: seconds / medians[name] - 1 for name, seconds in results["predicted"].items()},
        times_one_process=medians["one process"] / medians["block-parallel"],
        times_1f1b=medians["1F1B"] / medians["block-parallel"],
    )
    if TWO in medians:
        benchmark.extra_info["times_two_processes"] = 2 * medians["one process"] / medians[TWO]
    print(_table(benchmark.group, benchmark.extra_info))


def _table(title, found):
    """``extra_info`` in Markdown."""
    lines = [f"\n### {title}\n"]
    lines += ["| | step, median | least | CPU of the busiest rank | through sockets | memory | predicted |"]
    lines += ["| --- " * 7 + "|"]
    for name, seconds in found["median_seconds"].items():
        times = [seconds, found["least_seconds"][name], found["least_cpu_seconds"][name]]
        cells = [f"{1e3 * time:.1f} ms" for time in times]
        cells += [f"{count / 1e6:.2f} MB" if count else "" for count in found["bytes_per_step"][name].values()]
        if name in found["predicted_seconds"]:
            cells += [f"{1e3 * found['predicted_seconds'][name]:.1f} ms, {found['prediction_error'][name]:+.0%}"]
        lines += [f"| {name} | {' | '.join(cells)} |"]
    names = ("times_one_process", "times_1f1b", "times_two_processes")
    ratios = [f"{name.replace('_', ' ')} {found[name]:.2f}" for name in names if name in found]
    return "\n".join([*lines, "", f"Block-parallel: {', '.join(ratios)}."])
