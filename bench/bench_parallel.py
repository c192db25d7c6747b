"""Ranks that share the blocks of a network, next to one process and to torch's 1F1B pipeline on the same ranks.

Eight equal convolutions, micro-batch 16, four micro-batches a step, one thread a process, gloo.  The variants take
turns in many short rounds, so that what else the machine does weighs on all alike; where one process works alone, the
others wait.  A step is timed on every rank after a first one, and the slowest rank counts: what fills the ranks when a
job begins, and empties them when it ends is no part of a step.
``extra_info`` holds the least and median seconds of a step over the rounds, the least CPU seconds of the busiest rank
(what a step would take on cores of its own), the bytes of a step that go through sockets or through shared memory, and
what ``bllkern plan`` predicts for each from blocks measured in the same rounds: by one process for what one process
does, by all ranks at once for what all do.  Ratios and errors are those of medians.  Two cores at work are slower than
twice one: ``times_two_processes`` is what two processes that exchange nothing reach.  Of each variant those rounds count
in which other processes took least of the machine; where they take much, more rounds are run.

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
from bllkern.parallel.profile import profile, typical

LAYERS, CHANNELS, SIDE, CLASSES = 8, 32, 32, 10
MICRO_BATCH, MICRO_BATCHES = 16, 4
TWO = "two processes, each by itself"
SOCKETS = "block-parallel, through sockets"  # as between machines
ROUNDS, MOST, STEPS = 5, 8, 4  # rounds that count, rounds at most
CALM = 0.05  # of the machine, for all other processes
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}


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


def _measured(objective, example):
    """The blocks as a process by itself finds them, and as all ranks do at once."""
    options = {"repeats": 3, "clock": time.thread_time}
    found = []
    for ranks in ([0], range(dist.get_world_size())):
        dist.barrier()
        here = dist.get_rank() in ranks
        blocks = profile(stack(), cuts(), CLASSES, objective, *example, F.cross_entropy, **options) if here else None
        profiles = [None] * dist.get_world_size()
        dist.all_gather_object(profiles, blocks)
        found.append(typical([blocks for blocks in profiles if blocks]))
    return found


def _predictions(alone, together):
    """Seconds of a step by variant, on the cores of this machine."""
    sockets, memory, ranks = _socket_bandwidth(), _memory_bandwidth(), dist.get_world_size()
    whole = [replace(block, packed=block.message) for block in together]  # as it lies in memory
    plans = {
        "one process": ("block-parallel", alone, 1, memory),
        "block-parallel": ("block-parallel", whole, ranks, memory),
        SOCKETS: ("block-parallel", together, ranks, sockets),
        "1F1B": ("1F1B", together, ranks, sockets),
        TWO: ("block-parallel", together, 1, memory),
    }
    options = {"micro_batches": MICRO_BATCHES, "cores": os.cpu_count()}
    return {name: predict(*plan, **options).seconds for name, plan in plans.items()}


def _busy():
    """Seconds, and CPU seconds of this process and of all, so far."""
    with open("/proc/stat") as file:
        user, nice, system = map(int, file.readline().split()[1:4])
    ticks = os.sysconf("SC_CLK_TCK")
    return torch.tensor([time.perf_counter(), time.process_time(), (user + nice + system) / ticks], dtype=torch.float64)


def _others(before):
    """The share of the machine that processes other than the ranks have had since."""
    seconds, own, every = _busy() - before
    dist.all_reduce(own)
    share = (every - own) / seconds / os.cpu_count()
    dist.broadcast(share, 0)
    return float(share)


def _rank(rank, ranks, folder, objective):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    x = torch.randn(MICRO_BATCHES * MICRO_BATCH, CHANNELS, SIDE, SIDE)
    y = torch.arange(MICRO_BATCHES * MICRO_BATCH) % CLASSES
    variants = {
        "one process": one_process(objective, x, y),
        "block-parallel": block_parallel(objective, x, y),
        SOCKETS: without_shared_memory(block_parallel, objective, x, y),
        "1F1B": pipeline(x, y),
    }
    if ranks == 2:
        variants[TWO] = one_process(objective, x, y, (0, 1))
    for run, *_ in variants.values():
        run(1)
    rounds = []
    while len(rounds) < MOST and min(sum(r[name]["others"] < CALM for r in rounds) for name in variants) < ROUNDS:
        this = {}
        predicted = _predictions(*_measured(objective, (x[:MICRO_BATCH], y[:MICRO_BATCH])))
        for name, (run, *_) in variants.items():
            dist.barrier()
            run(1)
            before = _busy()
            run(STEPS)
            used = (_busy() - before)[:2] / STEPS
            others = _others(before)
            dist.all_reduce(used, dist.ReduceOp.MAX)
            seconds, busy = used.tolist()
            this[name] = {"seconds": seconds, "cpu": busy, "predicted": predicted[name], "others": others}
        rounds.append(this)
    sent = {}
    for name, (_, bytes_sent, close) in variants.items():
        close()
        total = torch.tensor(bytes_sent())
        dist.all_reduce(total)
        sent[name] = dict(zip(("sockets", "memory"), (total // (1 + len(rounds) * (1 + STEPS))).tolist()))
    if rank == 0:
        with open(f"{folder}/results.json", "w") as file:
            json.dump({"rounds": rounds, "bytes": sent}, file)
    dist.barrier()
    dist.destroy_process_group()


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
    of = {kind: {} for kind in ("seconds", "cpu", "predicted", "others")}
    for name in results["bytes"]:
        calmest = sorted((r[name] for r in results["rounds"]), key=lambda found: found["others"])[:ROUNDS]
        for kind, values in of.items():
            values[name] = [found[kind] for found in calmest]
    seconds = of["seconds"]
    benchmark.extra_info.update(
        load=os.getloadavg()[0],
        rounds=len(results["rounds"]),
        others={name: max(shares) for name, shares in of["others"].items()},
        median_seconds={name: median(times) for name, times in seconds.items()},
        least_seconds={name: min(times) for name, times in seconds.items()},
        least_cpu_seconds={name: min(times) for name, times in of["cpu"].items()},
        bytes_per_step=results["bytes"],
        predicted_seconds={name: median(times) for name, times in of["predicted"].items()},
        prediction_error={name: _ratio(of["predicted"][name], times) - 1 for name, times in seconds.items()},
        times_one_process=_ratio(seconds["one process"], seconds["block-parallel"]),
        times_1f1b=_ratio(seconds["1F1B"], seconds["block-parallel"]),
        share_of_bytes=results["bytes"][SOCKETS]["sockets"] / results["bytes"]["1F1B"]["sockets"],
    )
    if TWO in seconds:
        benchmark.extra_info["times_two_processes"] = 2 * _ratio(seconds["one process"], seconds[TWO])
    print(_table(benchmark.group, benchmark.extra_info))


def _ratio(times, others):
    return median(times) / median(others)


def _table(title, found):
    """``extra_info`` in Markdown."""
    lines = [f"\n### {title}\n"]
    lines += ["| | step, median | least | CPU of the busiest rank | through sockets | memory | predicted |"]
    lines += ["| --- " * 7 + "|"]
    for name, seconds in found["median_seconds"].items():
        times = [seconds, found["least_seconds"][name], found["least_cpu_seconds"][name]]
        cells = [f"{1e3 * time:.1f} ms" for time in times]
        cells += [f"{count / 1e6:.2f} MB" if count else "" for count in found["bytes_per_step"][name].values()]
        cells += [f"{1e3 * found['predicted_seconds'][name]:.1f} ms, {found['prediction_error'][name]:+.0%}"]
        lines += [f"| {name} | {' | '.join(cells)} |"]
    names = ("times_one_process", "times_1f1b", "times_two_processes")
    ratios = [f"{name.replace('_', ' ')} {found[name]:.2f}" for name in names if name in found]
    others = (
        f"{max(found['others'].values()):.0%} of the machine in the {ROUNDS} of {found['rounds']} rounds that count"
    )
    share = f"through sockets {found['share_of_bytes']:.3f} of 1F1B's bytes"
    return "\n".join([*lines, "", f"Block-parallel: {', '.join(ratios)}; {share}. Others had at most {others}."])
