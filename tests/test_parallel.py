"""Blocks on several processes: the result is that of one process, for every objective, schedule and kind of network."""

import copy
import os
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import bllkern
from bllkern.objectives import BLL
from bllkern.parallel import BlockParallel, channel, messages
from bllkern.parallel.messages import HEADER_BYTES
from bllkern.parallel.part import Layout, Part

import nets
import parallel_ranks

STEPS, MICRO_BATCHES = 20, 2
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


def fast(parameters):
    """For feedback, where it has optimizers of its own."""
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.5, nesterov=True)


def build(name, objective, schedule):
    """A network, a micro-batch, and batches of ``MICRO_BATCHES`` micro-batches, the same in every process."""
    torch.manual_seed(0)
    plain, cuts, x, y = nets.build(name)
    x = x.double() if x.is_floating_point() else x
    net = bllkern.convert(plain.double(), cuts, nets.CLASSES, OBJECTIVES[objective], schedule, example=x)
    draw = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(len(x), generator=draw) for _ in range(STEPS)])
    return net, (x, y), [(x[rows], y[rows]) for rows in order]


def in_one_process(net, batches, schedule, micro_batches=MICRO_BATCHES, feedback=None):
    """The loop as any user writes it."""
    optimizers = bllkern.optimizers(net, sgd, feedback)
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


def train(rank, cases, ranks, feedback=None):
    """This rank's tensors and losses after training, by case."""
    found = {}
    for case in cases:
        net, example, batches = build(*case)
        mesh = init_device_mesh("cpu", (ranks,))
        options = {"example": example, "loss": nets.cross_entropy, "feedback": feedback, "timeout": 20}
        with BlockParallel(net, mesh, optimizer=sgd, **options) as parallel:
            given = batches if parallel.is_first else [(None, None)] * len(batches)
            losses = [parallel.step(x, y, MICRO_BATCHES) for x, y in given]
            output = parallel.predict(example[0] if parallel.is_first else None)
        found[case] = parallel.part.tensors(), losses, output
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_equals_one_process(ranks, tmp_path):
    cases = [case for case in CASES if ranks == 2 or case[0] == "mlp"]
    results = parallel_ranks.run(train, ranks, tmp_path, cases, ranks, seconds=120)
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


def test_feedback_with_optimizers_of_its_own_equals_one_process(tmp_path):
    objectives = ("bll", "bll, chained", "bll, fixed, bootstrapping")
    cases = [("mlp", objective, schedule) for objective in objectives for schedule in ("deferred", "immediate")]
    results = parallel_ranks.run(train, 2, tmp_path, cases, 2, fast)
    for case in cases:
        net, _, batches = build(*case)
        shared = copy.deepcopy(net)
        in_one_process(net, batches, case[2], feedback=fast)
        in_one_process(shared, batches, case[2])
        trained = {name: tensor for found in results for name, tensor in found[case][0].items()}
        for name, tensor in net.state_dict().items():
            torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-10, msg=f"{case}: {name}")
            moved = "feedback" in name and "fixed" not in case[1]
            assert not moved or (tensor - shared.state_dict()[name]).abs().max() > 1e-3, name


def train_rows(rank, cases, feedback=None):
    """This rank's tensors by case, on a mesh (data, blocks) whose rows see half of every batch each."""
    found = {}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "blocks"))
    for case in cases:
        net, example, batches = build(*case)
        if rank >= 2:  # rows that were drawn differently are made equal
            size = sum(p.numel() for p in net.parameters())
            nn.utils.vector_to_parameters(torch.randn(size, dtype=torch.float64), net.parameters())
        options = {"example": example, "loss": nets.cross_entropy, "after": ["3"], "timeout": 20, "feedback": feedback}
        with BlockParallel(net, mesh, optimizer=sgd, **options) as parallel:
            events = note(parallel)
            for x, y in batches:
                parallel.step(x.chunk(2)[parallel.row], y.chunk(2)[parallel.row], MICRO_BATCHES)
        found[case] = parallel.part.tensors(), events
    return found


def note(parallel):
    """What happens from now on: means of gradients begun, and blocks reached."""
    events = []
    for number, reducer in enumerate(parallel._reducers):
        start = reducer._start
        reducer._start = lambda start=start, number=number: events.append(f"mean {number}") or start()
    for number, module in enumerate([m for m in parallel.part.net if isinstance(m, bllkern.BlockLocal)]):
        module.register_forward_pre_hook(lambda *_, number=number: events.append(f"block {number}"))
    return events


def assert_rows_hold(results, case, expected):
    """Both rows of a 2 x 2 mesh hold the expected tensors."""
    for row in (results[:2], results[2:]):
        trained = {name: tensor for found in row for name, tensor in found[case][0].items()}
        assert trained.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-10, msg=f"{case}: {name}")


def assert_rows_equal_one_process(results, cases, feedback=None):
    """Both rows hold the tensors of one process, which has seen the batches of both."""
    for case in cases:
        net, _, batches = build(*case)
        in_one_process(net, batches, case[2], 2 * MICRO_BATCHES, feedback)
        assert_rows_hold(results, case, net.state_dict())


def test_rows_of_a_mesh_equal_one_row_with_twice_the_batch(tmp_path):
    cases = [("mlp", "bll", "eager"), ("mlp", "bwbpf", "deferred")]
    results = parallel_ranks.run(train_rows, 4, tmp_path, cases)
    assert_rows_equal_one_process(results, cases)
    # gradients of a block are averaged while the next one computes, and once per step
    first_step = results[0][cases[0]][1][:6]
    assert first_step == ["block 0", "block 1", "block 0", "mean 0", "block 1", "mean 1"], first_step


def test_rows_of_a_mesh_average_the_gradients_of_feedback_with_optimizers_of_its_own(tmp_path):
    """Equal to the last place, where each row's own feedback would have drifted off (peers.md)."""
    cases = [("mlp", "bll, chained", "eager"), ("mlp", "bll with every term", "deferred")]
    results = parallel_ranks.run(train_rows, 4, tmp_path, cases, fast)
    assert_rows_equal_one_process(results, cases, fast)
    for case in cases:
        for first, second in zip(results[:2], results[2:]):
            assert all(torch.equal(first[case][0][name], tensor) for name, tensor in second[case][0].items())


def train_chained(rank, staleness):
    """This rank's tensors, and after each step the message that rank 0 read, or that rank 1 then has."""
    net, example, batches = build("mlp", "bll, chained", "eager")
    mesh = init_device_mesh("cpu", (2,))
    options = {"example": example, "loss": nets.cross_entropy, "after": ["1"], "staleness": staleness, "timeout": 20}
    with BlockParallel(net, mesh, optimizer=sgd, **options) as parallel:
        seen = []
        for x, y in batches:
            parallel.step(x, y)
            if rank == 0:
                seen.append(parallel._exchange._above.message)
            else:
                seen.append(parallel.part.feedback(1).messages().detach().clone())
    return parallel.part.tensors(), seen


@pytest.mark.parametrize("staleness", [0, 3])
def test_a_chained_message_is_as_old_as_allowed(staleness, tmp_path):
    (_, read), (_, sent) = parallel_ranks.run(train_chained, 2, tmp_path, staleness)
    for step in range(staleness + 1, STEPS):  # `sent` holds the messages after each step
        assert torch.equal(read[step], sent[step - staleness - 1]), step
    assert all(torch.equal(message, read[0]) for message in read[: staleness + 1])


def compressed(rank, compress, shared=True, chunk=channel.CHUNK_BYTES):
    """The losses of a training with compressed messages, the bytes sent, and those of them through shared memory."""
    net, example, batches = build("mlp", "bll", "eager")
    options = {"example": example, "loss": nets.cross_entropy, "after": ["1"], "timeout": 20, "compress": compress}
    create = os.memfd_create if shared else mock.Mock(side_effect=OSError)
    with mock.patch("os.memfd_create", create), mock.patch.object(channel, "CHUNK_BYTES", chunk):
        with BlockParallel(net, init_device_mesh("cpu", (2,)), optimizer=sgd, **options) as parallel:
            losses = [parallel.step(x, y) for x, y in batches]
    return losses, parallel.bytes_sent, parallel.bytes_shared


@pytest.mark.parametrize("compress, bytes_each, tolerance", [("bf16", 2, 0.02), ("fp8", 1, 0.2)])
def test_compressed_messages_train_nearly_the_same(compress, bytes_each, tolerance, tmp_path):
    (_, sent, shared), (losses, *_) = parallel_ranks.run(compressed, 2, tmp_path, compress)
    net, example, batches = build("mlp", "bll", "eager")
    expected = in_one_process(net, batches, "eager", 1)
    torch.testing.assert_close(torch.stack(losses), expected, rtol=tolerance, atol=0)
    rows, width = len(example[0]), 16
    message = HEADER_BYTES + rows * width * bytes_each + rows * 8  # header, activation, targets
    assert sent == shared == STEPS * message + HEADER_BYTES  # and the last word


@pytest.mark.parametrize("compress, chunk", [(None, 600), ("bf16", channel.CHUNK_BYTES)])
def test_sockets_carry_what_memory_does(compress, chunk, tmp_path):
    (_, sent, shared), (losses, *_) = parallel_ranks.run(compressed, 2, tmp_path, compress, False, chunk)
    (_, sent_too, _), (losses_too, *_) = parallel_ranks.run(compressed, 2, tmp_path, compress)
    assert torch.equal(torch.stack(losses), torch.stack(losses_too))
    headers = (STEPS + 1) * HEADER_BYTES
    assert shared == 0 and headers < sent < headers + 0.7 * (sent_too - headers)  # zeros stay behind


@pytest.mark.parametrize("compress, rounding, least", [("bf16", 2**-8, 0), ("fp8", 2**-4, 2**-10), (None, 0, 0)])
def test_compression_rounds_once(compress, rounding, least):
    """Relative errors are those of the format; below its normal numbers the error is half their spacing, scaled."""
    z = torch.cat([torch.randn(999) * 10 ** torch.linspace(-4, 4, 999), torch.zeros(1)])
    wire, scale = messages.compress(z, compress)
    back = messages.expand(wire, messages.Header("train", dtype="float32", scale=scale))
    assert back.dtype == z.dtype and back[-1] == 0 and not torch.equal(back, z) or compress is None
    assert ((back - z).abs() <= rounding * 1.001 * z.abs() + least * scale).all()
    assert scale == (z.abs().max().item() / 448 if compress == "fp8" else 1)


def one_rank(rank, mistakes):
    """The error of each mistake, in a job of one process."""
    mesh, found = init_device_mesh("cpu", (1,)), []
    for name, options in mistakes:
        net, example, _ = build(*name)
        with pytest.raises((ValueError, RuntimeError)) as error:
            BlockParallel(net, mesh, **{"optimizer": sgd, "example": example, **options})
        found.append(str(error.value))
    return found


def test_mistakes_are_named(tmp_path):
    good = ("mlp", "bll", "eager")
    mistakes = [
        ((good, {"staleness": -1}), "staleness must be a count of steps, got -1"),
        ((good, {"compress": "zip"}), "compress must be one of"),
        ((good, {"timeout": 0}), "timeout must be a positive number of seconds, got 0"),
        ((good, {"after": ["1"]}), "after must name the last blocks of 0 ranks"),
        ((good, {"after": ["seven"]}), "after must name blocks of ['1', '3', '5'], got ['seven']"),
    ]
    found = parallel_ranks.run(one_rank, 1, tmp_path, [mistake for mistake, _ in mistakes])[0]
    for message, (_, expected) in zip(found, mistakes, strict=True):
        assert expected in message


class Tied(nn.Module):
    """An embedding whose weight is also the output's."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(7, 8), nn.Linear(8, 8)

    def forward(self, tokens):
        return self.layer(self.embedding(tokens)).tanh() @ self.embedding.weight.T


class Skipping(nn.Module):
    """The input is added behind a boundary."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 7)

    def forward(self, x):
        return self.second(self.first(x).relu() + x)


def test_what_cannot_be_divided_is_refused():
    tokens, x = torch.randint(7, (4, 3)), torch.randn(4, 8)
    tied = bllkern.convert(Tied(), ["layer"], 7, "bwbpf")
    with pytest.raises(
        RuntimeError, match="the output of the network also reaches 'embedding.weight' of block 'layer'"
    ):
        Layout(tied, (tokens,))
    skipping = bllkern.convert(Skipping(), ["first"], 7, "bwbpf", example=x)
    part = Part(skipping, Layout(skipping, (x,)), 1, 2, print)
    with pytest.raises(RuntimeError, match="blocks \\['output'\\] read something from before block 'output'"):
        part((x.to("meta"),), x)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 7))
    with pytest.raises(ValueError, match="no block-local boundary"):
        Layout(plain, (x,))
    joint = bllkern.convert(plain, ["0"], 7, "deep_supervision", example=x)
    with pytest.raises(ValueError, match="need isolated losses; '0' has DeepSupervision"):
        Layout(joint, (x,))


@pytest.mark.parametrize("name", nets.NAMES)
def test_a_part_holds_its_own_blocks_only_and_is_isolated(name):
    net, (x, y), _ = build(name, "bll", "eager")
    layout = Layout(net, (x,))
    sent, held = [], []
    for block in range(len(layout.names)):
        part = Part(net, layout, block, block + 1, sent.append)
        part.net.train()
        with bllkern.targets(y):
            output = part((x if block == 0 else x.to("meta"),), sent[-1] if sent else None)
        held += part.tensors()
        gradients = [n for n, p in part.net.named_parameters() if p.grad is not None]
        assert set(gradients) <= set(part.own) and (gradients or output is not None)
        assert all(p.is_meta for n, p in part.net.named_parameters() if n not in part.own)
    assert output.requires_grad and sorted(held) == sorted(net.state_dict())
