"""``torchrun -m bllkern train --block-parallel``: the weights of one process, also after a rank was killed."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bllkern
from bllkern import _native
from bllkern.cli import main

ARGUMENTS = ["train", "--train-size", "60", "--test-size", "40", "--batch-size", "20", "--threads", "1"]
EPOCHS, STEPS = 8, 3  # an epoch
DYING = Path(__file__).with_name("dying_rank.py")


def torchrun(folder, *arguments):
    """A job of two ranks in ``folder``, from where `python -m` finds no other bllkern than the one that runs here."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(bllkern.__file__).parents[1])}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command += map(str, arguments)
    return subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True, **pipes)


def ended(job, seconds=90):
    """Output and errors of the job, which is killed with all of its processes if it takes longer."""
    try:
        return job.communicate(timeout=seconds)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of the training in one process."""
    folder = tmp_path_factory.mktemp("one")
    assert main([*ARGUMENTS, "--epochs", str(EPOCHS), "--output", str(folder)]) == 0
    return folder


def same_training(folder, other):
    """Whether weights and losses of two trainings are the same bits."""
    first, second = (json.loads((path / "metrics.json").read_text()) for path in (folder, other))
    losses = [[(epoch["losses"], epoch["accuracy"]) for epoch in epochs] for epochs in (first, second)]
    weights = [torch.load(path / "weights.pt", weights_only=True) for path in (folder, other)]
    equal = [torch.equal(weights[0][name], weights[1][name]) for name in weights[0]]
    return losses[0] == losses[1] and weights[0].keys() == weights[1].keys() and all(equal)


def test_two_ranks_train_as_one_process_does(one, tmp_path):
    train = [*ARGUMENTS, "--epochs", EPOCHS, "--block-parallel", 2, "--output", tmp_path / "two"]
    job = torchrun(tmp_path, "-m", "bllkern", *train)
    printed, errors = ended(job)
    assert job.returncode == 0, errors
    assert same_training(one, tmp_path / "two")
    accuracy = json.loads((one / "metrics.json").read_text())[-1]["accuracy"]
    assert "rank 0: blocks 'layer1'" in printed and f"test accuracy {accuracy:.2%}" in printed


def test_a_killed_rank_is_restarted_and_trains_as_one_process_does(one, tmp_path):
    rank, step = random.randrange(2), random.randrange(STEPS + 1, EPOCHS * STEPS)
    train = [*ARGUMENTS, "--epochs", EPOCHS, "--block-parallel", 2, "--output", tmp_path / "two", "--resume"]
    job = torchrun(tmp_path, "--max-restarts", 1, DYING, rank, step, *train)
    printed, errors = ended(job)
    assert job.returncode == 0, f"rank {rank} was killed at step {step}: {errors}"
    assert "attempt 0" in printed and "attempt 1" in printed
    assert same_training(one, tmp_path / "two"), f"rank {rank} was killed at step {step}"


def test_mistakes_are_one_line(capsys):
    assert main([*ARGUMENTS, "--block-parallel", "2"]) == 2
    assert "--block-parallel needs torchrun" in capsys.readouterr().err


def test_a_command_without_the_compiled_kernels_says_so(monkeypatch, capsys):
    """As in a rank that `python -m` gives a source tree: it would train, slower and to other last digits."""
    monkeypatch.setattr(_native, "error", "the compiled module bllkern._C is not there")
    assert main(["train", "--block-parallel", "2"]) == 2
    assert capsys.readouterr().err.startswith("bllkern train: the compiled module bllkern._C is not there")
