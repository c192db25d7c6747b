"""FSDP2 inside the blocks: the numbers of rows that copy them, divided; also in checkpoints and where a rank dies."""

import os
import signal

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from bllkern.parallel import BlockParallel, ParallelError, load, save

import nets
import parallel_ranks
from test_parallel import MICRO_BATCHES, assert_rows_hold, build, in_one_process, sgd

CASES = [("mlp", "bll, chained", "eager"), ("mlp", "bwbpf", "immediate"), ("mlp", "bll", "deferred")]
CASES += [("transformer", "bll", "eager")]
STEPS = 6


def make(case, rows, ranks, **options):
    """A job on a mesh (rows, ranks), and the share of this row in every batch."""
    net, example, batches = build(*case)
    mesh = init_device_mesh("cpu", (rows, ranks))
    options = {"example": example, "loss": nets.cross_entropy, "shard": rows > 1, "timeout": 20, **options}
    parallel = BlockParallel(net, mesh, optimizer=sgd, **options)
    shares = [(x.chunk(rows)[parallel.row], y.chunk(rows)[parallel.row]) for x, y in batches[:STEPS]]
    return parallel, shares


def whole(tensors):
    """The numbers of all ranks, of which this one has its share."""
    return {n: t.full_tensor() if isinstance(t, DTensor) else t.clone() for n, t in tensors.items()}


def train(rank, cases):
    """This rank's tensors after training, and the bytes of its parameters and of its share of them, by case."""
    found = {}
    for case in cases:
        parallel, shares = make(case, 2, 2)
        with parallel:
            for x, y in shares:
                parallel.step(x, y, MICRO_BATCHES)
            parallel.predict(shares[0][0])
            divided = [p for o in parallel.optimizers for p in o.state if isinstance(p, DTensor)]
            states = [value for o in parallel.optimizers for p in divided for value in o.state.get(p, {}).values()]
            sizes = [sum(t.to_local().numel() for t in tensors) for tensors in (divided, states)]
            found[case] = whole(parallel.part.tensors()), sum(p.numel() for p in divided), *sizes
    return found


def test_sharded_rows_equal_one_process(tmp_path):
    results = parallel_ranks.run(train, 4, tmp_path, CASES, seconds=90)
    for case in CASES:
        net, _, batches = build(*case)
        micro_batches = MICRO_BATCHES if case[2] == "immediate" else 2 * MICRO_BATCHES
        in_one_process(net, in_rows(batches[:STEPS]), case[2], micro_batches)
        assert_rows_hold(results, case, net.state_dict())
        for place in (0, 1):
            (parameters, *first), (_, *second) = (results[rank][case][1:] for rank in (place, place + 2))
            assert parameters > 0 and [a + b for a, b in zip(first, second)] == [parameters] * 2, case
            assert first[0] <= 0.6 * parameters, case


def in_rows(batches):
    """Batches whose micro-batches are those of the rows side by side."""

    def side_by_side(values):
        parts = [half.chunk(MICRO_BATCHES) for half in values.chunk(2)]
        return torch.cat([part for same in zip(*parts) for part in same])

    return [(side_by_side(x), side_by_side(y)) for x, y in batches]


def half_trained(rank, folder, case):
    parallel, shares = make(case, 2, 1)
    with parallel:
        for step, (x, y) in enumerate(shares):
            parallel.step(x, y)
            if step == 2:
                save(parallel, folder)
        return whole(parallel.part.tensors())


def continued(rank, folder, case, rows):
    parallel, shares = make(case, rows, 1)
    with parallel:
        for parameter in parallel.part.net.parameters():
            torch.nn.init.zeros_(parameter.data)
        begun = load(parallel, folder)
        states = {}
        for optimizer in parallel.optimizers:
            states.update(optimizer.state)
        states = {n: whole(states[p]) for n, p in parallel.part.net.named_parameters() if p in states}
        loaded = whole(parallel.part.tensors())
        for x, y in shares[begun:]:
            parallel.step(x, y)
        return begun, loaded, states, whole(parallel.part.tensors())


def test_a_sharded_checkpoint_is_read_sharded_and_whole(tmp_path):
    case, folder = CASES[0], tmp_path / "checkpoints"
    unbroken = parallel_ranks.run(half_trained, 2, tmp_path, folder, case)[0]
    sharded = parallel_ranks.run(continued, 2, tmp_path, folder, case, 2)[0]
    alone = parallel_ranks.run(continued, 1, tmp_path, folder, case, 1)[0]
    assert sharded[0] == alone[0] == 3
    assert all(torch.equal(sharded[3][name], tensor) for name, tensor in unbroken.items())
    assert all(torch.equal(sharded[1][name], tensor) for name, tensor in alone[1].items())
    for name, entries in alone[2].items():
        assert all(torch.equal(sharded[2][name][entry], value) for entry, value in entries.items())


def lose(rank, victim, step):
    parallel, shares = make(CASES[0], 2, 1, timeout=2)
    with pytest.raises(ParallelError) as error:
        for i, (x, y) in enumerate(shares):
            if i == step and rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            parallel.step(x, y)
    return str(error.value)


def test_a_lost_row_is_named(tmp_path):
    survivor, victim = parallel_ranks.start(lose, 2, tmp_path, 1, 3)
    ((succeeded, message),) = parallel_ranks.finish([survivor], 20, kill_too=[victim])
    assert succeeded and "lost rank 1 (blocks '1', '3', '5', 'output')" in message, message


def alone(rank):
    with pytest.raises(ValueError) as error:
        make(CASES[0], 1, 1, shard=True)
    return str(error.value)


def test_one_row_cannot_be_sharded(tmp_path):
    (message,) = parallel_ranks.run(alone, 1, tmp_path)
    assert message == "shard=True needs a mesh (data, blocks) of two rows or more, got [1, 1]"
