"""What goes wrong on one rank ends the others in time, with an error that names it; the last checkpoint continues."""

import itertools
import os
import random
import re
import signal
import time

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import bllkern
from bllkern.parallel import BlockParallel, ParallelError


import nets
import parallel_ranks

TIMEOUT = 2.0  # seconds that a rank may let the others wait
STATED = 4.0  # seconds within which they end: the time-out, and three heartbeats to see which rank is silent


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
def test_a_lost_rank_is_named_in_time(how, victim, tmp_path):
    jobs = parallel_ranks.start(lose, 3, tmp_path, victim, random.randrange(12), how)
    others = [job for rank, job in enumerate(jobs) if rank != victim]
    outcomes = parallel_ranks.finish(others, 20, kill_too=[jobs[victim]])
    blocks = {0: "'1'", 1: "'3'", 2: "'5', 'output'"}[victim]
    for outcome in outcomes:
        assert outcome is not None and outcome[0], outcome
        message, seconds = outcome[1]
        assert f"rank {victim} (blocks {blocks})" in message
        assert seconds < STATED, (message, seconds)
