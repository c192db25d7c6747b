"""Feedback: its own optimizer, its own loss, its messages from boundary to boundary, and what reads them."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from test_objectives import FAMILIES, X, Y, block, chained_net, local_loss
from torch import nn

import bllkern
from bllkern import families, functional
from bllkern.models.transformer import Transformer
from bllkern.objectives import BLL, terms
from bllkern.objectives.heads import CHANNELS
from bllkern.parallel.part import Layout


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


INVERSE = BLL(evidence=0, similarity=0, agreement=2.0, feedback="inverse", pool=2)


def half_distance(a, b):
    """Twice the Gaussian agreement of rows [N, D], as far as it depends on them."""
    return 0.5 * (a - b).square().sum(1).mean()


@pytest.mark.parametrize("schedule", ["eager", "deferred", "immediate"])
def test_an_inverse_learns_to_give_back_what_the_block_above_has_read(schedule):
    """Between maps it is a convolution."""
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh(), nn.Conv2d(5, 7, 3, stride=3), nn.Flatten(), nn.Linear(28, 4))
    x = torch.randn(16, 3, 10, 10)
    net = bllkern.convert(net, ["0", "2"], 4, INVERSE, schedule, example=x)
    bllkern.optimizers(net, lambda params: torch.optim.SGD(params, 1.0))
    low, high = (net[i].local.objective.feedback for i in (0, 2))
    assert low.link is None and not high.link.weight.requires_grad and 0.8 < high.link.weight.std() < 1.2
    learned = {name: p for name, p in net.named_parameters() if p.requires_grad and not name.startswith("4.")}
    before = {name: p.detach().clone() for name, p in learned.items()}

    z = net[0].module(x)
    h = net[2].module(torch.tanh(z.detach()))
    z_rows, h_rows = F.adaptive_avg_pool2d(z, 2).flatten(1), h.flatten(1)
    goal = F.conv2d(high.link.weight.view(4, 7, 2, 2), high.inverse.weight, padding=1).flatten(1).detach()
    given_back = F.conv2d(h.detach(), high.inverse.weight, padding=1).flatten(1)
    loss = half_distance(z_rows, goal[Y]) + half_distance(h_rows, high.link.weight[Y])
    loss = loss + half_distance(z_rows.detach(), given_back)
    expected = torch.autograd.grad(loss, list(learned.values()))

    with bllkern.targets(Y):
        net(x)
        if schedule == "deferred":
            bllkern.local_loss(net).backward()
    for (name, p), gradient in zip(learned.items(), expected, strict=True):
        found = before[name] - p.detach() if schedule == "immediate" else p.grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)
    bllkern.assert_isolated(net, x, Y)


def test_what_inverse_feedback_cannot_do():
    with pytest.raises(ValueError, match="feedback='inverse' learns with the agreement: it needs a weight above 0"):
        BLL(feedback="inverse")
    with pytest.raises(ValueError, match="head='mlp' does not go with bootstrapping or feedback='inverse'"):
        dataclasses.replace(INVERSE, head="mlp")
    net = bllkern.convert(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), ["0"], 4, INVERSE, example=X)
    with pytest.raises(ValueError, match="one per class and learn alone; '0' has feedback='inverse'"):
        Layout(net, (X,))


TOKENS = BLL(evidence=0, agreement=0.1, prediction=1.0, feedback="attention")


def sequences(count=8):
    """Sequences of 4 symbols, and their reversals as targets."""
    x = torch.randint(0, 4, (count, 6))
    return x, x.flip(1)


def token_net(objective=TOKENS, schedule=None):
    net = Transformer(4, 6, width=16, heads=2, depth=3, causal=False)
    return bllkern.convert(net, ["embedding", "layers.0", "layers.1"], 4, objective, schedule, example=sequences()[0])


def feedback_of(net, name):
    return bllkern.network.boundaries(net)[name].objective.feedback


def test_attention_feedback_attends_to_the_messages_above():
    net, (_, y) = token_net(), sequences()
    low, high, top = (feedback_of(net, name) for name in ("embedding", "layers.0", "layers.1"))
    with bllkern.targets(y):
        messages, above, first = low.messages(), high.messages().detach(), top.messages()
    assert messages.shape == above.shape == (8 * 6, 16)
    assert torch.equal(first, top.link.weight[y.flatten()])
    for b, m in enumerate(above.view(8, 6, 16)):
        angles = torch.arange(6.0)[:, None] / 10_000 ** (torch.arange(8) / 8)
        placed = m + torch.cat([angles.sin(), angles.cos()], 1)
        scores = (placed @ low.queries.weight.T) @ (placed @ low.keys.weight.T).T / 4
        expected = (m + scores.softmax(1) @ (m @ low.values.weight.T)) @ low.link.weight
        torch.testing.assert_close(messages.view(8, 6, 16)[b], expected)
    messages.sum().backward()
    assert all(p.grad is not None for p in low.parameters())
    assert all(p.grad is None for p in [*high.parameters(), *top.parameters()])


@pytest.mark.parametrize("schedule", ["eager", "deferred", "immediate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_feedback_is_isolated(family, schedule):
    net = token_net(dataclasses.replace(TOKENS, family=family, bootstrapping=True), schedule)
    bllkern.optimizers(net, lambda params: torch.optim.SGD(params, lr=0.1))
    bllkern.assert_isolated(net, *sequences())


def test_attention_feedback_from_a_checkpoint_and_with_padding():
    net, (x, y) = token_net(), sequences()
    fresh = bllkern.convert(Transformer(4, 6, width=16, heads=2, causal=False), ["layers.0", "layers.1"], 4, TOKENS)
    net = bllkern.convert(Transformer(4, 6, width=16, heads=2, causal=False), ["layers.0", "layers.1"], 4, TOKENS)
    with bllkern.targets(y):
        net(x)
    fresh.load_state_dict(net.state_dict())  # before any data has come by
    y = y.masked_fill(torch.arange(6) == 0, -100)
    with bllkern.targets(y):
        fresh(x), net(x)
    for name, loss in bllkern.local_losses(net).items():
        assert loss.isfinite()
        torch.testing.assert_close(bllkern.local_losses(fresh)[name], loss)


class Reversing(nn.Module):
    """Embeds a sequence; then reads it backwards, so that the last boundary is at the target's own place."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear, self.head = nn.Embedding(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.linear(self.embedding(x).flip(1)))


@pytest.mark.parametrize("kind, learns", [("attention", True), ("chained", False)])
def test_attention_feedback_learns_to_reverse(kind, learns):
    """Blocks stay as they are.  The message of a token must come to mean the target at the other end of the sequence."""
    net = bllkern.convert(
        Reversing(), ["embedding", "linear"], 4, BLL(evidence=0, similarity=0, agreement=1.0, feedback=kind)
    )
    with bllkern.targets(sequences()[1]):
        net(sequences()[0])
    chosen = bllkern.optimizers(
        net, lambda params: torch.optim.SGD(params, 0.0), feedback=lambda params: torch.optim.Adam(params, 0.03)
    )
    for _ in range(300):
        x, y = sequences(32)
        with bllkern.targets(y):
            net(x)
        chosen.step()
        chosen.zero_grad()
    x, y = sequences(200)
    with bllkern.targets(y), torch.no_grad():
        feedback = feedback_of(net, "embedding")
        messages = feedback.messages() if kind == "attention" else feedback.messages()[y.flatten()]
    z = net.get_submodule("embedding").weight.detach()[x.flatten()]
    unexplained = (messages - z).square().mean() / (z - z.mean(0)).square().mean()
    assert unexplained < 0.05 if learns else unexplained > 0.8


def test_a_transformer_learns_to_reverse_with_attention_feedback():
    net = token_net()
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3)
    for _ in range(200):
        x, y = sequences(64)
        with bllkern.targets(y):
            F.cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    x, y = sequences(200)
    assert (net.eval()(x).argmax(-1) == y).float().mean() >= 0.99


def test_what_attention_feedback_cannot_do():
    for options in ({"agreement": 0.1}, {"evidence": 0}):
        with pytest.raises(ValueError, match="feedback='attention' has a message for each token"):
            BLL(feedback="attention", **options)
    layer = bllkern.BlockLocalLinear(6, 8, target_features=4, objective=TOKENS)
    with pytest.raises(RuntimeError, match="feedback='attention' needs bllkern.convert"), bllkern.targets(Y):
        layer(X)
    net = bllkern.convert(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), ["0"], 4, TOKENS, example=X)
    with pytest.raises(ValueError, match=r"feedback='attention' needs targets \[B, T\]"), bllkern.targets(Y):
        net(X)
    with pytest.raises(ValueError, match="one per class and learn alone; 'embedding' has feedback='attention'"):
        Layout(token_net(), (sequences()[0],))
    with pytest.raises(ValueError, match="feedback='attention' reads weights of all blocks above"):
        plain = Transformer(4, 6, width=16, heads=2)
        bllkern.convert(plain, ["layers.0"], 4, TOKENS, "immediate", example=sequences()[0], offload="cpu")
