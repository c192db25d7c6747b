"""Ranks killed, frozen, or lying at random moments: always an error that names them, and a resume to the same weights.

One of each in a usual run; ``BLLKERN_FAULTS=20 pytest tests/test_parallel_random_faults.py -rP`` for twenty, and what
each of them did.
"""

import itertools
import os
import random
import signal
import time
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import bllkern
from bllkern.objectives import BLL
from bllkern.parallel import BlockParallel, ParallelError, channel, load, newest, save
from bllkern.parallel.channel import CHUNK_BYTES, Outbox
from bllkern.parallel.messages import CHECKSUM_BYTES, HEADER_BYTES, Header, decode

import nets
import parallel_ranks

TRIALS = range(int(os.environ.get("BLLKERN_FAULTS", 1)))
RANKS, STEPS = 3, 30
TIMEOUT = 4.0  # seconds that a rank may let the others wait
LIMIT = 3 * TIMEOUT  # seconds by which every other rank must have ended, in processes that share few cores
SHARED = (True, False)  # whether messages go through shared memory or sockets


def make(shared):
    torch.manual_seed(0)
    plain, cuts, x, y = nets.build("mlp")
    net = bllkern.convert(plain, cuts, nets.CLASSES, BLL(agreement=0.5, feedback="chained"), example=x)
    options = {"example": (x, y), "after": cuts[: RANKS - 1], "timeout": TIMEOUT}
    with mock.patch("os.memfd_create", os.memfd_create if shared else mock.Mock(side_effect=OSError)):
        return BlockParallel(net, init_device_mesh("cpu", (RANKS,)), optimizer=torch.optim.AdamW, **options), x, y


def train(rank, folder, shared):
    """Continue to the last step, with a checkpoint after each; where it began, and this rank's tensors."""
    parallel, x, y = make(shared)
    with parallel:
        begun = load(parallel, folder)
        draw = torch.Generator().manual_seed(7)
        for rows in [torch.randperm(len(x), generator=draw) for _ in range(STEPS)][begun:]:
            parallel.step(x[rows], y[rows], 2)
            save(parallel, folder)
    return begun, parallel.part.tensors()


def tensors(results):
    return {name: tensor for _, part in results for name, tensor in part.items()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return tensors(parallel_ranks.run(train, RANKS, folder, folder / "checkpoints", True))


def wait_for(folder, step):
    """Until the checkpoint of that step is there, and a moment longer."""
    deadline = time.monotonic() + 60
    while newest(folder) is None or newest(folder).name < f"step-{step:08d}":
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    time.sleep(random.uniform(0, 0.05))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("trial", TRIALS)
def test_a_lost_rank(trial, how, unbroken, tmp_path):
    victim, step, shared = random.randrange(RANKS), random.randrange(1, STEPS - 5), random.choice(SHARED)
    folder = tmp_path / "checkpoints"
    jobs = parallel_ranks.start(train, RANKS, tmp_path, folder, shared)
    wait_for(folder, step)
    os.kill(jobs[victim][0].pid, how)
    lost = time.monotonic()
    others = [job for rank, job in enumerate(jobs) if rank != victim]
    outcomes = parallel_ranks.finish(others, 60, kill_too=[jobs[victim]])
    seconds = time.monotonic() - lost
    reached = newest(folder).name
    print(f"{how.name}, rank {victim}, {'memory' if shared else 'sockets'}, {reached}: errors after {seconds:.1f} s")
    for outcome in outcomes:
        assert outcome is not None and not outcome[0], outcome
        assert "ParallelError" in outcome[1] and f"rank {victim} (blocks " in outcome[1], outcome[1]
    assert seconds < LIMIT
    results = parallel_ranks.run(train, RANKS, tmp_path, folder, shared)
    assert [f"step-{begun:08d}" for begun, _ in results] == [reached] * RANKS
    ended = tensors(results)
    assert ended.keys() == unbroken.keys() and all(torch.equal(ended[name], unbroken[name]) for name in ended)


class Damaged(Header):
    """A header of which some bytes are others, or the end is missing."""

    def encode(self):
        data = super().encode()
        if self.step % 2:
            data[random.randrange(HEADER_BYTES // 4) :] = 0
        else:
            places = torch.randint(HEADER_BYTES // 4, (random.randrange(1, 100),))
            data[places] ^= torch.randint(1, 256, (len(places),), dtype=torch.uint8)
        return data


def described_otherwise(header, tensors):
    (dtype, shape), *rest = header.tensors
    shape = random.choice([[*shape, 1], shape[:-1], [0, *shape[1:]], [*shape[:-1], shape[-1] + 1]])
    return replace(header, tensors=[[dtype, shape], *rest]), tensors


def of_another_dtype(header, tensors):
    return replace(header, tensors=[[random.choice(["float16", "int32", "float64"]), header.tensors[0][1]]]), tensors


def out_of_turn(header, tensors):
    field, by = random.choice(["step", "micro"]), random.randrange(1, 9)
    return replace(header, **{field: getattr(header, field) + by}), tensors


def damaged(header, tensors):
    return Damaged(header.kind, header.step), tensors


def shorter(data):
    """The message ends early: gloo takes it."""
    return data[: random.randrange(1, len(data) - 3)]


def longer(data):
    """There is more than the header says: a byte, or more than is received at once."""
    place = random.randrange(HEADER_BYTES, len(data) - CHECKSUM_BYTES)
    surplus = torch.randint(0, 256, (random.choice([1, 100, CHUNK_BYTES, 2 * CHUNK_BYTES]),), dtype=torch.uint8)
    return torch.cat([data[:place], surplus, data[place:]])


def of_other_masks(data):
    """A word more or less would have to be there, by the masks of what goes without zeros."""
    assert decode(data[:HEADER_BYTES]).packed[0] > 0
    changed = data.clone()
    changed[HEADER_BYTES + random.randrange(16)] ^= 1 << random.randrange(8)
    return changed


LIES = [described_otherwise, of_another_dtype, out_of_turn, damaged]
ON_SOCKETS = [shorter, longer, of_other_masks]  # changes of what a socket carries


def change(box, fault):
    """Let all messages forward go through ``fault``."""
    if fault in ON_SOCKETS:
        join = channel.join

        def changed(header, tensors):
            data = join(header, tensors)
            return fault(data) if header.kind == "train" else data

        channel.join = changed
    else:
        put = box.put
        box.put = lambda header, tensors: put(*fault(header, tensors))


def lie(rank, fault, at, shared):
    """The error that ends a job in which rank 1 changes a message to rank 2, and the seconds until it came."""
    parallel, x, y = make(shared)
    last = time.monotonic()
    try:
        for step in itertools.count():
            if rank == 1 and step == at:
                box = parallel._exchange._outbox
                assert shared != isinstance(box, Outbox)
                change(box, fault)
            parallel.step(x, y, 2)
            last = time.monotonic()
    except ParallelError as error:
        return str(error), time.monotonic() - last


@pytest.mark.parametrize("fault", [*LIES, *ON_SOCKETS])
@pytest.mark.parametrize("trial", TRIALS)
def test_a_lie(trial, fault, tmp_path):
    shared, at = fault in LIES and random.choice(SHARED), random.randrange(12)
    outcomes = parallel_ranks.run(lie, RANKS, tmp_path, fault, at, shared)
    longest = max(seconds for _, seconds in outcomes)
    print(f"{fault.__name__}, {'memory' if shared else 'sockets'}, step {at}: errors after {longest:.1f} s")
    assert "rank 1 (blocks '3') sent a wrong message" in outcomes[2][0], outcomes[2][0]
    assert all("rank 1 (blocks '3')" in error for error, _ in outcomes), outcomes
    assert longest < LIMIT
