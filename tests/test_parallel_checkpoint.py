"""Checkpoints of a job of several processes: read by another number of ranks, bit for bit, and after a kill."""

import os
import signal

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import bllkern
from bllkern.parallel import BlockParallel, ParallelError, load, newest, save

import nets
import parallel_ranks

STEPS = 6


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


def build(name):
    torch.manual_seed(0)
    plain, cuts, x, y = nets.build(name)
    return bllkern.convert(plain, cuts, nets.CLASSES, "bll", example=x), x, y


def train(rank, name, ranks, folder, until, die_at=None):
    """Continue to step ``until``, with a checkpoint after every step; this rank's tensors and the step it began at."""
    net, x, y = build(name)
    if folder.exists():  # what is loaded must not be there already
        for parameter in net.parameters():
            torch.nn.init.zeros_(parameter.data)
    feedback = adamw if name == "mlp" else None
    options = {"example": (x, y), "loss": nets.cross_entropy, "timeout": 3, "feedback": feedback}
    draw = torch.Generator().manual_seed(7)
    orders = [torch.randperm(len(x), generator=draw) for _ in range(until)]
    with BlockParallel(net, init_device_mesh("cpu", (ranks,)), optimizer=adamw, **options) as parallel:
        begun = load(parallel, folder)
        for order in orders[begun:]:
            if rank == ranks - 1 and parallel.steps == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            for optimizer in parallel.optimizers:
                optimizer.param_groups[0]["lr"] *= 0.9
            parallel.step(x[order], y[order], 2)
            save(parallel, folder)
    return parallel.part.tensors(), begun


def tensors(results):
    return {name: tensor for part, _ in results for name, tensor in part.items()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The end of a training in one process, by network."""
    folder = tmp_path_factory.mktemp("unbroken")
    return {n: tensors(parallel_ranks.run(train, 1, folder, n, 1, folder / n, STEPS)) for n in ("mlp", "convnet")}


@pytest.mark.parametrize("name, before, after", [("mlp", 4, 2), ("mlp", 1, 4), ("convnet", 2, 3)])
def test_another_number_of_ranks_continues_to_the_same_bits(name, before, after, unbroken, tmp_path):
    folder = tmp_path / "checkpoints"
    parallel_ranks.run(train, before, tmp_path, name, before, folder, STEPS // 2)
    assert newest(folder).name == f"step-{STEPS // 2:08d}"
    results = parallel_ranks.run(train, after, tmp_path, name, after, folder, STEPS)
    assert [begun for _, begun in results] == [STEPS // 2] * after
    ended = tensors(results)
    assert ended.keys() == unbroken[name].keys()
    assert all(torch.equal(ended[key], unbroken[name][key]) for key in ended)


def test_a_killed_job_continues_from_its_last_whole_checkpoint(unbroken, tmp_path):
    folder = tmp_path / "checkpoints"
    jobs = parallel_ranks.start(train, 2, tmp_path, "mlp", 2, folder, STEPS, 4)
    survivor, victim = parallel_ranks.finish(jobs, 30)
    assert victim is None and not survivor[0] and "rank 1" in survivor[1]
    (folder / "step-00000099").mkdir()  # as if the job had died while it wrote
    assert newest(folder).name == "step-00000004"
    results = parallel_ranks.run(train, 2, tmp_path, "mlp", 2, folder, STEPS)
    ended = tensors(results)
    assert [begun for _, begun in results] == [4, 4] and all(torch.equal(ended[k], unbroken["mlp"][k]) for k in ended)


def load_another(rank, folder):
    net, x, y = build("convnet")
    mesh = init_device_mesh("cpu", (1,))
    parallel = BlockParallel(net, mesh, optimizer=adamw, example=(x, y), timeout=3)
    with pytest.raises(ValueError) as error:
        load(parallel, folder)
    parallel.close()
    return str(error.value)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    folder = tmp_path / "checkpoints"
    parallel_ranks.run(train, 1, tmp_path, "mlp", 1, folder, 1)
    (message,) = parallel_ranks.run(load_another, 1, tmp_path, folder)
    assert "is of another network or of other optimizers: it lacks" in message and "net.0.module.0.weight" in message


def load_with_another_optimizer(rank, folder):
    net, x, y = build("mlp")
    mesh = init_device_mesh("cpu", (1,))
    with BlockParallel(net, mesh, optimizer=adamw, example=(x, y), loss=nets.cross_entropy, timeout=3) as parallel:
        before = {name: tensor.clone() for name, tensor in parallel.part.tensors().items()}
        parallel.steps = 7
        save(parallel, folder)
    net, x, y = build("mlp")
    with pytest.raises(ValueError) as error:
        load(BlockParallel(net, mesh, optimizer=adamw, feedback=adamw, example=(x, y), timeout=3), folder)
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in before.items())
    return str(error.value)


def test_a_checkpoint_of_other_optimizers_is_refused(tmp_path):
    (message,) = parallel_ranks.run(load_with_another_optimizer, 1, tmp_path, tmp_path / "checkpoints")
    assert "of other optimizers: it lacks ['options.1.feedback', 'options.3.feedback'" in message


def fail_to_save(rank, folder):
    net, x, y = build("mlp")
    options = {"example": (x, y), "loss": nets.cross_entropy, "timeout": 3}
    parallel = BlockParallel(net, init_device_mesh("cpu", (2,)), optimizer=adamw, **options)
    with pytest.raises(ParallelError) as error:
        save(parallel, folder)
    return str(error.value)


def test_a_checkpoint_that_cannot_be_written_names_a_rank(tmp_path):
    (tmp_path / "file").write_text("")
    for message in parallel_ranks.run(fail_to_save, 2, tmp_path, tmp_path / "file"):
        assert "rank 0 (blocks" in message and "could not read or write the checkpoint" in message, message
