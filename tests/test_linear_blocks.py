"""BlockLocalLinear whose matrix product ends with the agreement term, against the layer followed by the term."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bllkern
import nets
from bllkern import functional
from bllkern.objectives import BLL

from checks import record_calls

CLASSES = 5


@pytest.fixture
def fused(monkeypatch):
    """The calls of ``linear_agreement``."""
    return record_calls(monkeypatch, functional, "linear_agreement")


def pair(objective, dtype, x, schedule="eager", chained=False):
    """Two equal networks of two linear blocks and an output; the first has fused layers, the second separate ones."""
    layers = [nn.Linear(6, 8), nn.Linear(8, 8)]
    options = dict(target_features=CLASSES, objective=objective, schedule=schedule)
    separate = nn.Sequential(*(bllkern.BlockLocal(layer, **options) for layer in layers), nn.Linear(8, CLASSES))
    fused = nn.Sequential(
        *(bllkern.BlockLocalLinear(layer.in_features, 8, **options) for layer in layers), copy.deepcopy(separate[2])
    )
    both = [net.to(dtype) for net in (fused, separate)]
    if chained:
        both = [bllkern.convert(net, [], CLASSES) for net in both]
    fused, separate = both
    with torch.no_grad(), bllkern.targets(torch.zeros(len(x), dtype=torch.int64)):
        for net in both:
            bllkern.execution.sizing.size(net, x)
    state = separate.state_dict()
    fused.load_state_dict({name.replace(".module.", "."): value for name, value in state.items()})
    return fused, separate


def train(net, x, y, **given):
    """Local losses and parameters after some steps of whatever schedule."""
    losses = nets.train(net, x, y, 3, momentum=0.9, **given)
    return losses, {name.replace(".module.", "."): p.detach() for name, p in net.named_parameters()}


def compare(objective, x, y, dtype=torch.float64, schedule="eager", chained=False, **arguments):
    fused, separate = pair(objective, dtype, x, schedule, chained)
    tolerance = dict(rtol=1e-9, atol=1e-12) if dtype == torch.float64 else dict(rtol=1e-5, atol=1e-6)
    (losses, after), (expected, expected_after) = (train(net, x, y, **arguments) for net in (fused, separate))
    for loss, e in zip(losses, expected, strict=True):
        torch.testing.assert_close(loss, e, **tolerance)
    assert after.keys() == expected_after.keys()
    for name, parameter in after.items():
        torch.testing.assert_close(parameter, expected_after[name], **tolerance)


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


LABELS = torch.arange(12) % CLASSES
AGREEMENT = BLL(evidence=0, similarity=0.3, agreement=0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("schedule", ["eager", "deferred", "immediate"])
def test_schedules(fused, schedule, dtype):
    compare(AGREEMENT, draw(12, 6, dtype=dtype), LABELS, dtype, schedule)
    assert len(fused) == 6


@pytest.mark.parametrize("family", ["bernoulli", "categorical:4", "gaussian", "poisson"])
def test_families(fused, family):
    compare(BLL(family=family, agreement=0.5, decorrelation=0.5, prediction=0.5), draw(12, 6), LABELS)
    assert len(fused) == 6


@pytest.mark.parametrize("feedback", ["direct", "fixed", "chained"])
def test_feedback(fused, feedback):
    objective = BLL(agreement=0.5, similarity=0, feedback=feedback)
    compare(objective, draw(12, 6), LABELS, chained=feedback == "chained")
    assert len(fused) == 6


def test_agreement_alone_and_scaled(fused):
    compare(BLL(evidence=0, similarity=0, agreement=1.0), draw(12, 6), LABELS, scale=0.25)
    assert len(fused) == 6


@pytest.mark.parametrize("options", [dict(denoising=1.0), dict(bootstrapping=True)], ids=str)
def test_other_parts_of_the_method(fused, options):
    objective = BLL(agreement=0.5, noise=1e-12, **options)
    compare(objective, draw(12, 6), LABELS)
    assert len(fused) == 6


def test_ignored_rows_teach_nothing(fused):
    compare(AGREEMENT, draw(12, 6), LABELS.where(LABELS != 2, 7), ignore_index=7)
    compare(AGREEMENT, draw(12, 6), torch.full((12,), -100))
    assert len(fused) == 12


def test_tokens(fused):
    y = torch.arange(12).view(3, 4) % CLASSES
    y[0, 1] = -100
    compare(AGREEMENT, draw(3, 4, 6), y)
    assert len(fused) == 6


@pytest.mark.parametrize("kind", ["probabilities", "real"])
def test_float_targets(fused, kind):
    y = draw(12, CLASSES)
    compare(AGREEMENT, draw(12, 6), y.softmax(1) if kind == "probabilities" else y)
    assert len(fused) == 6


def test_what_does_not_read_rows_of_the_activation_stays_separate(fused):
    compare(AGREEMENT, draw(3, 4, 6), LABELS[:3])
    compare(BLL(family="gaussian_learned", agreement=0.5), draw(12, 6), LABELS)
    compare(BLL(), draw(12, 6), LABELS)
    assert not fused


def test_half_precision_reads_the_message_in_float32(fused):
    layer = bllkern.BlockLocalLinear(6, 8, target_features=CLASSES, objective=AGREEMENT, example=torch.randn(12, 6))
    x = torch.randn(12, 6)
    with bllkern.targets(LABELS), torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
    (arguments,) = fused
    assert z.dtype == torch.bfloat16 and arguments[3].dtype == torch.float32
    assert layer.weight.grad.dtype == torch.float32
    expected = nn.Linear(6, 8)
    expected.load_state_dict({name: getattr(layer, name) for name in ("weight", "bias")})
    a = expected(x)
    local = layer.local.objective
    message = local.feedback.link.weight.detach()[LABELS]
    loss = 0.5 * functional.agreement(a, message, "gaussian") + 0.3 * functional.similarity_matching(a, LABELS)
    loss.backward()
    torch.testing.assert_close(layer.local.loss, loss.detach(), rtol=1e-2, atol=0)
    for name in ("weight", "bias"):
        error = getattr(layer, name).grad - getattr(expected, name).grad
        assert error.norm() <= 2e-2 * getattr(expected, name).grad.norm()


@pytest.mark.parametrize("schedule", ["eager", "deferred", "immediate"])
@pytest.mark.parametrize("feedback", ["direct", "chained"])
def test_isolated(fused, feedback, schedule):
    x = draw(12, 6)
    net, _ = pair(BLL(agreement=0.5, feedback=feedback), torch.float64, x, schedule, feedback == "chained")
    bllkern.optimizers(net, lambda params: torch.optim.SGD(params, lr=0.1))
    bllkern.assert_isolated(net, x, LABELS)
    assert len(fused) == 2


def test_no_parameter_stands_in_a_block_twice():
    x = draw(12, 6)
    net, _ = pair(AGREEMENT, torch.float64, x)
    with bllkern.targets(LABELS):
        net(x)
    for layer in net[:2]:
        own = [id(p) for p in layer.local.own_parameters()]
        assert len(own) == len(set(own)) == 3


def test_plain_outside_of_training(fused):
    x = draw(12, 6)
    net, _ = pair(AGREEMENT, torch.float64, x)
    plain = F.linear(F.linear(x, net[0].weight, net[0].bias), net[1].weight, net[1].bias)
    with torch.no_grad():
        torch.testing.assert_close(net[:2](x), plain)
    torch.testing.assert_close(net.eval()[:2](x), plain)
    assert not fused
    with pytest.raises(RuntimeError, match="training needs targets"):
        net.train()(x)
