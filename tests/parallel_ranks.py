"""Jobs of several processes for the tests: one thread each, gloo, a deadline, and nobody left behind."""

import functools
import io
import multiprocessing
import os
import time
import traceback
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path

import torch
import torch.distributed as dist

# children fork from a clean process that has imported torch once: importing it in each would cost seconds
LIMIT = timedelta(seconds=30)
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "bllkern", "torch.distributed.checkpoint"])


@functools.cache
def _start_server():
    """In this folder: in that of the sources it would import these, and not the package that is tested."""
    before = os.getcwd()
    os.chdir(Path(__file__).parent)
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(before)


def _child(function, rank, ranks, rendezvous, results, args):
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks, timeout=LIMIT)
        outcome = True, function(rank, *args)
    except BaseException as error:
        outcome = False, f"{error!r}\n{traceback.format_exc()}"
    content = io.BytesIO()  # tensors in a pipe are shared by a process that must outlive them; bytes are not
    torch.save(outcome, content)
    results.send_bytes(content.getvalue())


def start(function, ranks, folder, *args):
    """Processes that run ``function(rank, *args)`` in a process group, and where each will send its result."""
    _start_server()
    rendezvous = f"file://{folder}/rendezvous-{time.monotonic_ns()}"
    jobs = []
    for rank in range(ranks):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_child, args=(function, rank, ranks, rendezvous, sender, args), daemon=True)
        process.start()
        sender.close()
        jobs.append((process, receiver))
    return jobs


def finish(jobs, seconds, kill_too=()):
    """What each process sent, ``(succeeded, result or traceback)``, or ``None`` where it died; then all are dead."""
    deadline = time.monotonic() + seconds
    found = []
    try:
        for process, receiver in jobs:
            if not receiver.poll(max(0, deadline - time.monotonic())):
                raise TimeoutError(f"{process.name} did not end in {seconds} s")
            try:
                found.append(torch.load(io.BytesIO(receiver.recv_bytes()), weights_only=False))
            except EOFError:
                found.append(None)
    finally:
        for process, _ in [*jobs, *kill_too]:
            process.kill()
            process.join()
    return found


def run(function, ranks, folder, *args, seconds=60):
    """The results of ``function(rank, *args)`` on each of ``ranks`` processes, all of which must succeed."""
    outcomes = finish(start(function, ranks, folder, *args), seconds)
    for rank, outcome in enumerate(outcomes):
        assert outcome is not None and outcome[0], f"rank {rank}: {'died' if outcome is None else outcome[1]}"
    return [result for _, result in outcomes]
