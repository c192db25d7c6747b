"""Blocks on several processes: the result is that of one process, for every objective, schedule and kind of network."""

import copy

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import bllkern
from bllkern.objectives import BLL
from bllkern.parallel import BlockParallel

import nets
import parallel_ranks

STEPS, MICRO_BATCHES = 20, 4
OBJECTIVES = {
    "bll": BLL(),
    "bll with every term": BLL(agreement=0.3, decorrelation=0.2, prediction=0.5, similarity_target="feedback"),
    "bll, chained": BLL(agreement=0.5, feedback="chained"),
    "bll, fixed, bootstrapping": BLL(feedback="fixed", bootstrapping=True),
    "bwbpf": "bwbpf",
    "predsim": "predsim",
}
CASES = [("mlp", objective, schedule) for objective in OBJECTIVES for schedule in ("deferred", "immediate")]
CASES += [(name, "bll", "eager") for name in nets.NAMES]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def build(name, objective, schedule):
    """A network, a micro-batch, and batches of ``MICRO_BATCHES`` micro-batches, the same in every process."""
    torch.manual_seed(0)
    plain, cuts, x, y = nets.build(name)
    x = x.double() if x.is_floating_point() else x
    net = bllkern.convert(plain.double(), cuts, nets.CLASSES, OBJECTIVES[objective], schedule, example=x)
    draw = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(len(x), generator=draw) for _ in range(STEPS)])
    return net, (x, y), [(x[rows], y[rows]) for rows in order]


def in_one_process(net, batches, schedule, micro_batches=MICRO_BATCHES):
    """The loop as any user writes it."""
    optimizers = bllkern.optimizers(net, sgd)
    parts = 1 if schedule == "immediate" else micro_batches
    losses = []
    for x, y in batches:
        pieces = list(zip(x.chunk(micro_batches), y.chunk(micro_batches)))
        for i, (x_, y_) in enumerate(pieces):
            with bllkern.targets(y_, scale=1 / parts):
                loss = nets.cross_entropy(net(x_), y_)
            total = loss / parts
            (total + bllkern.local_loss(net) if schedule == "deferred" else total).backward()
            if schedule == "immediate" or i == len(pieces) - 1:
                optimizers.step()
                optimizers.zero_grad()
            losses.append(loss.detach())
    return torch.stack(losses).view(len(batches), -1).mean(1)


def train(rank, cases, ranks):
    """This rank's tensors and losses after training, by case."""
    found = {}
    for case in cases:
        net, example, batches = build(*case)
        mesh = init_device_mesh("cpu", (ranks,))
        with BlockParallel(net, mesh, optimizer=sgd, example=example, loss=nets.cross_entropy, timeout=20) as parallel:
            given = batches if parallel.is_first else [(None, None)] * len(batches)
            losses = [parallel.step(x, y, MICRO_BATCHES) for x, y in given]
            output = parallel.predict(example[0] if parallel.is_first else None)
        found[case] = parallel.part.tensors(), losses, output
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_equals_one_process(ranks, tmp_path):
    cases = [case for case in CASES if ranks == 2 or case[0] == "mlp"]
    results = parallel_ranks.run(train, ranks, tmp_path, cases, ranks)
    for case in cases:
        net, example, batches = build(*case)
        before = copy.deepcopy(net.state_dict())
        expected = in_one_process(net, batches, case[2])
        trained = {name: tensor for found in results for name, tensor in found[case][0].items()}
        assert trained.keys() == before.keys() and sum(len(found[case][0]) for found in results) == len(trained)
        for name, tensor in net.state_dict().items():
            torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-10, msg=f"{case}: {name}")
            assert not tensor.is_floating_point() or "fixed" in case[1] or not torch.equal(tensor, before[name])
        *others, (_, losses, output) = [found[case] for found in results]
        torch.testing.assert_close(torch.stack(losses), expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(output, net.eval()(example[0]), rtol=0, atol=1e-10)
        assert all(loss is None for found in others for loss in found[1])
