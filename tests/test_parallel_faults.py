"""What goes wrong on one rank ends the others in time, with an error that names it; the last checkpoint continues."""

import fcntl
import itertools
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import bllkern
from bllkern.parallel import BlockParallel, ParallelError
from bllkern.parallel.messages import HEADER_BYTES, Header, MessageError, decode, describe


import nets
import parallel_ranks

TIMEOUT = 2.0  # seconds that a rank may let the others wait
DEADLINE = 20  # by which everything has ended, also on a machine that does other things


def make(**options):
    torch.manual_seed(0)
    plain, cuts, x, y = nets.build("mlp")
    net = bllkern.convert(plain, cuts, nets.CLASSES, "bll", example=x)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    options = {"timeout": TIMEOUT, "after": cuts[: mesh.size() - 1], **options}
    return BlockParallel(net, mesh, optimizer=torch.optim.SGD, example=(x, y), **options), x, y


def failing(run):
    """The error that ends ``run``, and how many seconds after its last step."""
    last = time.monotonic()
    try:
        for _ in run:
            last = time.monotonic()
    except ParallelError as error:
        return str(error), time.monotonic() - last
    return "no error", 0.0


def endless(parallel, x, y, at=None, then=None):
    for step in itertools.count():
        if step == at:
            then()
        yield parallel.step(x, y, 2)


def lose(rank, victim, step, how):
    """Train until rank ``victim`` stops by a signal at a step; what the others then see."""
    parallel, x, y = make()
    return failing(endless(parallel, x, y, step if rank == victim else None, lambda: os.kill(os.getpid(), how)))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_lost_rank_is_named(how, victim, tmp_path):
    jobs = parallel_ranks.start(lose, 3, tmp_path, victim, random.randrange(12), how)
    others = [job for rank, job in enumerate(jobs) if rank != victim]
    outcomes = parallel_ranks.finish(others, DEADLINE, kill_too=[jobs[victim]])
    blocks = {0: "'1'", 1: "'3'", 2: "'5', 'output'"}[victim]
    for outcome in outcomes:
        assert outcome is not None and outcome[0], outcome
        assert f"rank {victim} (blocks {blocks})" in outcome[1][0]


def freeze_with_the_store(folder):
    """Stop this process while it holds the lock without which no rank can ask the store anything."""
    for path in folder.glob("rendezvous-*"):
        fcntl.flock(os.open(path, os.O_RDWR), fcntl.LOCK_EX)
    os.kill(os.getpid(), signal.SIGSTOP)


def ended(rank, folder):
    """What this rank ends with where rank 1 freezes so at step 3, and the seconds from there until it has left."""
    parallel, x, y = make()
    try:
        with parallel:
            for step in itertools.count():
                if rank == 1 and step == 3:
                    freeze_with_the_store(folder)
                parallel.step(x, y, 2)
                last = time.monotonic()
    except ParallelError as error:
        return str(error), time.monotonic() - last


def test_a_frozen_rank_that_has_locked_the_store_is_named(tmp_path):
    jobs = parallel_ranks.start(ended, 3, tmp_path, tmp_path)
    outcomes = parallel_ranks.finish([jobs[0], jobs[2]], DEADLINE, kill_too=[jobs[1]])
    for succeeded, (error, seconds) in outcomes:
        assert succeeded and "rank 1 (blocks '3') did not answer" in error
        assert seconds < 5 * TIMEOUT, seconds


def wrong_shape(header, tensors):
    narrow = tensors[0][:, :-1].contiguous()
    return replace(header, tensors=[describe(narrow), *header.tensors[1:]]), [narrow, *tensors[1:]]


def wrong_dtype(header, tensors):
    return replace(header, tensors=[["float64", header.tensors[0][1]], *header.tensors[1:]]), tensors


def fewer_rows(header, tensors):
    return replace(header, tensors=[describe(tensors[0][1:]), *header.tensors[1:]]), tensors


def wrong_step(header, tensors):
    return replace(header, step=header.step + 1), tensors


def wrong_kind(header, tensors):
    return replace(header, kind="feedback"), tensors


def no_targets(header, tensors):
    return replace(header, tensors=header.tensors[:1]), tensors[:1]


def huge(header, tensors):
    return replace(header, tensors=[["float64", [1 << 20, 1 << 20]]]), tensors


class Garbage(Header):
    def encode(self):
        return torch.full((HEADER_BYTES,), 7, dtype=torch.uint8)


def garbage(header, tensors):
    return Garbage(header.kind), tensors


WRONG = {
    wrong_shape: "must have shape ['B', 16], got [8, 15]",
    wrong_dtype: "an activation must be sent as float32, got float64",
    fewer_rows: "an activation and targets of 8 samples were due, got [['float32', [7, 16]]",
    wrong_step: "train of step 2, micro-batch 0, was due, got train of step 3",
    wrong_kind: "an activation with its targets was due, got feedback",
    no_targets: "an activation with its targets was due, got train",
    huge: "a tensor may have",
    garbage: "a message must start with",
}


def change(outbox, fault):
    put = outbox.put
    outbox.put = lambda header, tensors: put(*fault(header, tensors))


def send_wrong(rank, faults):
    """What a job ends with whose rank 0 changes a message in one of several ways."""
    found = []
    for fault in faults:
        with suppress(ParallelError):
            parallel, x, y = make()
            with parallel:
                then = partial(change, parallel._exchange._outbox, fault) if rank == 0 else bool
                found.append(failing(endless(parallel, x, y, 2, then)))
                raise ParallelError
    return found


def test_a_wrong_message_is_refused_and_named(tmp_path):
    sender, receiver = parallel_ranks.run(send_wrong, 2, tmp_path, list(WRONG))
    for expected, (at_sender, _), (at_receiver, _) in zip(WRONG.values(), sender, receiver, strict=True):
        assert "rank 0 (blocks '1') sent a wrong message" in at_receiver and expected in at_receiver, at_receiver
        assert "rank 1 (blocks '3', '5', 'output')" in at_sender, at_sender


def test_a_damaged_header_never_passes():
    """Every change of a byte, every cut and every lie in the content is a MessageError, whatever it hits."""
    z, y = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    header = Header("train", 3, 1, "float32", 1.0, [describe(z), describe(y)], [describe(z)], {"ignore_index": -100})
    good = header.encode()
    assert decode(good) == header
    content = len(bytes(good).rstrip(b"\0"))
    for place in range(content):
        damaged = good.clone()
        damaged[place] ^= random.randrange(1, 256)
        with pytest.raises(MessageError):
            decode(damaged)
    for cut in range(content):
        damaged = good.clone()
        damaged[cut:] = 0
        with pytest.raises(MessageError):
            decode(damaged)
    for _ in range(200):
        with pytest.raises(MessageError):
            decode(torch.randint(0, 256, (HEADER_BYTES,), dtype=torch.uint8))


LIES = [None, -1, 1 << 70, 1.5, "x", [], {}, [[]], [["float32"]], [["float32", [-1]]], [["int3", [1]]], float("nan")]


@pytest.mark.parametrize("field", [field.name for field in fields(Header)])
def test_a_header_that_lies_with_a_right_checksum_is_refused(field):
    allowed = {
        "tensors": [[]],
        "packed": [[]],
        "inputs": [[]],
        "targets": [{}],
        "scale": [1.5],
        "dtype": [],
        "step": [1 << 70],
    }
    for lie in LIES:
        if lie in allowed.get(field, []) or field == "micro" and lie == 1 << 70:
            continue
        with pytest.raises(MessageError):
            decode(replace(Header("train"), **{field: lie}).encode())
