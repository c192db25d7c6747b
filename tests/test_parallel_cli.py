"""``torchrun -m bllkern train --block-parallel``: what one process learns."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from bllkern.cli import main

ARGUMENTS = ["train", "--train-size", "60", "--test-size", "40", "--batch-size", "20", "--threads", "1"]


def torchrun(processes, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command += ["-m", "bllkern", *ARGUMENTS, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def ended(job, seconds=60):
    """Output and errors of the job, which is killed with all of its processes if it takes longer."""
    try:
        return job.communicate(timeout=seconds)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()


def weights(folder):
    return torch.load(folder / "weights.pt", weights_only=True)


def test_two_ranks_train_as_one_process_does(tmp_path, capsys):
    assert main([*ARGUMENTS, "--epochs", "8", "--output", str(tmp_path / "one")]) == 0
    folder = tmp_path / "two"
    job = torchrun(2, "--epochs", 8, "--block-parallel", 2, "--output", folder)
    printed, errors = ended(job)
    assert job.returncode == 0, errors
    assert weights(tmp_path / "one").keys() == weights(folder).keys()
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    # not bit for bit: on a loaded machine two processes have once differed in the last place, which training amplifies
    for epoch, other in zip(first, second, strict=True):
        assert epoch["losses"] == pytest.approx(other["losses"], abs=1e-3)
        assert epoch["accuracy"] == pytest.approx(other["accuracy"], abs=0.05)
    assert "rank 0: blocks 'layer1'" in printed and f"test accuracy {second[-1]['accuracy']:.2%}" in printed


def test_mistakes_are_one_line(tmp_path, capsys):
    assert main([*ARGUMENTS, "--block-parallel", "2"]) == 2
    assert "--block-parallel needs torchrun" in capsys.readouterr().err
