"""Feedback: its own optimizer, its own loss, its messages from boundary to boundary, and what reads them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_objectives import FAMILIES, X, Y, block, chained_net, local_loss
from torch import nn

import bllkern
from bllkern import families, functional
from bllkern.objectives import BLL, terms
from bllkern.objectives.heads import CHANNELS


@pytest.mark.parametrize("schedule", ["eager", "deferred", "immediate"])
@pytest.mark.parametrize("feedback", ["direct", "chained", "fixed"])
def test_feedback_with_an_optimizer_of_its_own(schedule, feedback):
    """Blocks that do not learn stay, while their feedback descends the local loss of its own boundary."""
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    net = bllkern.convert(net, ["0", "2"], 4, BLL(feedback=feedback, agreement=0.1), schedule, example=X)
    chosen = bllkern.optimizers(
        net, lambda params: torch.optim.SGD(params, 0.0), feedback=lambda params: torch.optim.SGD(params, 0.1)
    )
    assert len(chosen) == (3 if feedback == "fixed" else 5)
    with bllkern.targets(Y):  # the same step, taken apart
        twin = copy.deepcopy(net)
        for boundary in bllkern.network.boundaries(twin).values():
            boundary.schedule = "deferred"
        twin(X)
        bllkern.local_loss(twin).backward()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with bllkern.targets(Y):
        loss = F.cross_entropy(net(X), Y)
    (loss + bllkern.local_loss(net) if schedule == "deferred" else loss).backward()
    chosen.step()
    gradients = {name: p.grad for name, p in twin.named_parameters()}
    for name, p in net.named_parameters():
        if "feedback" in name and feedback != "fixed":
            torch.testing.assert_close(p.detach(), before[name] - 0.1 * gradients[name])
            assert gradients[name].abs().sum() > 0
        else:
            assert torch.equal(p, before[name]), name
    state = chosen.state_dict()
    assert len(state["optimizers"]) == len(chosen)
    chosen.load_state_dict(state)


@pytest.mark.parametrize("family", FAMILIES)
def test_bootstrapping_hands_on_the_posterior_of_every_family(family):
    f = families.get(family)
    layer = block(BLL(family=family, bootstrapping=True))
    message = layer.local.objective.feedback.messages().detach()[Y]
    with bllkern.targets(Y):
        out = layer(X)
    plain = F.linear(X, layer.weight, layer.bias).detach()
    torch.testing.assert_close(f.natural(out), f.natural(plain) + message, rtol=1e-5, atol=1e-5)


def test_chained_rates_stay_finite():
    net = chained_net(family="poisson")
    with torch.no_grad():
        for boundary in bllkern.network.boundaries(net).values():
            boundary.objective.feedback.link.weight.fill_(100.0)
    with bllkern.targets(Y):
        F.cross_entropy(net(X), Y).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_feedback_that_only_similarity_reads_learns_the_prototypes():
    layer = block(BLL(evidence=0, similarity=2.0, similarity_target="feedback"))
    messages = layer.local.objective.feedback.link.weight
    loss, z = local_loss(layer)
    xn = F.normalize(z - z.mean(1, keepdim=True), dim=1)
    means = torch.stack([xn[Y == c].mean(0) for c in range(4)])
    distance = (messages - means).square().sum(1).mean()
    expected = 2 * (functional.similarity_matching(z, messages[Y].detach()) + distance)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(messages.grad, torch.autograd.grad(2 * distance, messages)[0])
    own = layer.weight.grad.clone()
    layer.zero_grad()
    a = F.linear(X, layer.weight, layer.bias)
    (2 * functional.similarity_matching(a, messages[Y].detach())).backward()
    torch.testing.assert_close(own, layer.weight.grad)  # the features are not moved towards the prototypes by it


def test_gram_matrices_of_many_tokens_take_some_of_them(monkeypatch):
    monkeypatch.setattr(terms, "GRAM_ROWS", 10)
    layer = block(BLL(evidence=0, similarity=1.0, decorrelation=1.0))
    tokens, y = torch.randn(4, 6, 6), torch.arange(24).view(4, 6) % 4
    with bllkern.targets(y):
        z = layer(tokens).flatten(0, 1)
    chosen = torch.tensor([7919 * i % 24 for i in range(10)])
    assert len(set(chosen.tolist())) == 10
    expected = functional.similarity_matching(z[chosen], y.flatten()[chosen]) + functional.decorrelation(z[chosen])
    torch.testing.assert_close(layer.local.loss, expected)


@pytest.mark.parametrize("head, channels", [("linear", (5, 7)), ("conv", (CHANNELS, CHANNELS))])
def test_chained_feedback_between_maps_is_a_convolution(head, channels):
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3, stride=3), nn.Flatten(), nn.Linear(28, 4))
    x = torch.randn(16, 3, 10, 10)
    net = bllkern.convert(net, ["0", "2"], 4, BLL(feedback="chained", head=head), example=x)
    low, high = net[0].local.objective.feedback, net[2].local.objective.feedback
    assert high.messages().shape == (4, 4 * channels[1]) and low.messages().shape == (4, 16 * channels[0])
    maps = high.link.weight.view(4, channels[1], 2, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = F.conv2d(maps, low.link.weight, padding=1).flatten(1)
    torch.testing.assert_close(low.messages(), expected)
    assert low.link.weight.shape == (channels[0], channels[1], 3, 3)
    bllkern.assert_isolated(net, x, Y)
    fresh = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3, stride=3), nn.Flatten(), nn.Linear(28, 4))
    fresh = bllkern.convert(fresh, ["0", "2"], 4, BLL(feedback="chained", head=head))
    fresh.load_state_dict(net.state_dict())  # before any data has come by
    with bllkern.targets(Y):
        fresh(x), net(x)
    for name, loss in bllkern.local_losses(net).items():
        torch.testing.assert_close(bllkern.local_losses(fresh)[name], loss)
