"""Every schedule ends with the same weights: kinds of models, objectives, clipping, accumulation, what goes around."""

import pytest
import torch
from torch import nn

import bllkern
import nets

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 20
OBJECTIVES = {
    "bll": "bll",
    "bll with every term": nets.EVERY_TERM,
    "bwbpf": "bwbpf",
    "predsim": "predsim",
    "drtp": "drtp",
    "target_propagation": "target_propagation",
}
PAIRS = [(model, objective) for model in nets.NAMES for objective in OBJECTIVES]


def sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3)


def clipped_sgd(params):
    """The gradient of each block is clipped to a norm of its own, just before its optimizer steps."""

    def clip(optimizer, args, kwargs):
        nn.utils.clip_grad_norm_(params, 0.1)

    optimizer = sgd(params)
    optimizer.register_step_pre_hook(clip)
    return optimizer


def converted(model, objective, schedule):
    torch.manual_seed(0)
    net, cuts, x, _ = nets.build(model)
    x = x.double() if x.is_floating_point() else x
    return bllkern.convert(net.double(), cuts, nets.CLASSES, OBJECTIVES[objective], schedule, example=x)


def batches(model):
    for _ in range(STEPS):
        x, y = nets.build(model)[2:]
        yield x.double() if x.is_floating_point() else x, y


def weights(model, objective, schedule, factory, parts=1, clip=None, after=lambda net, optimizers: None):
    """The weights after ``STEPS`` steps, each over ``parts`` micro-batches, the gradient of all clipped to ``clip``."""
    net = converted(model, objective, schedule)
    optimizers = bllkern.optimizers(net, factory)
    follow = after(net, optimizers)
    for x, y in batches(model):
        optimizers.zero_grad()
        for part, (xs, ys) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True), 1):
            with bllkern.targets(ys, scale=1 / parts, accumulate=part < parts):
                loss = nets.cross_entropy(net(xs), ys) / parts
            if schedule == "deferred":
                loss = loss + bllkern.local_loss(net)
            loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizers.step()
        if follow is not None:
            follow()
    return net.state_dict()


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=0, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("model, objective", PAIRS)
def test_accumulation_and_global_clipping(model, objective):
    results = [weights(model, objective, schedule, sgd, 2, 0.5) for schedule in ("deferred", "eager")]
    assert_same(*results)


@pytest.mark.parametrize("model, objective", PAIRS)
def test_accumulation_and_clipping_per_block(model, objective):
    results = [weights(model, objective, schedule, clipped_sgd, 2) for schedule in ("deferred", "immediate")]
    assert_same(*results)


def test_clipping_does_something():
    plain, per_block, together = (
        weights("mlp", "bwbpf", "eager", factory, clip=clip)
        for factory, clip in ((sgd, None), (clipped_sgd, None), (sgd, 0.5))
    )
    assert not torch.equal(plain["0.weight"], per_block["0.weight"])
    assert not torch.equal(plain["0.weight"], together["0.weight"])


@pytest.mark.parametrize("schedule", ["eager", "immediate"])
def test_learning_rate_schedulers(schedule):
    rates = {}

    def cosine(net, optimizers):
        schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS) for optimizer in optimizers]
        assert len(schedulers) == 4

        def follow():
            for scheduler in schedulers:
                scheduler.step()
            rates.setdefault(id(optimizers), []).append([scheduler.get_last_lr()[0] for scheduler in schedulers])

        return follow

    assert_same(*(weights("mlp", "predsim", one, sgd, after=cosine) for one in ("deferred", schedule)))
    first, second = rates.values()
    assert first == second and first[0][0] < 0.05 and max(first[-1]) < 1e-6


@pytest.mark.parametrize("schedule", ["eager", "immediate"])
def test_averaged_weights(schedule):
    averages = []

    def exponential(net, optimizers):
        average = torch.optim.swa_utils.AveragedModel(
            net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=False
        )
        averages.append(average)
        return lambda: average.update_parameters(net)

    assert_same(*(weights("convnet", "bll", one, sgd, after=exponential) for one in ("deferred", schedule)))
    assert_same(*(average.state_dict() for average in averages))
    x = next(batches("convnet"))[0]
    plain = bllkern.unwrap(averages[1].module).eval()
    torch.testing.assert_close(averages[1].eval()(x), plain(x), rtol=0, atol=0)
