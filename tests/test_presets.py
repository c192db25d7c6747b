"""The special cases of the framework equal their algorithms, written out by hand: weights after 10 steps in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bllkern
from bllkern import objectives

N, WIDTHS, CLASSES, RATE, STEPS = 24, (6, 9, 8, 7), 4, 0.1, 10


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def batches():
    draw = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        y = torch.randint(0, CLASSES, (N,), generator=draw)
        yield torch.randn(N, WIDTHS[0], generator=draw) + F.one_hot(y, WIDTHS[0]), y


def perceptron():
    """Three hidden layers of tanh, cut after each, and the output layer."""
    hidden = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in zip(WIDTHS, WIDTHS[1:])]
    return nn.Sequential(*hidden, nn.Linear(WIDTHS[-1], CLASSES))


def trained(objective, net, cuts, data=batches):
    """The library: a converted network, its parameters before and after the training by SGD."""
    x, _ = next(data())
    net = bllkern.convert(net, cuts, CLASSES, objective, example=x)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], RATE)
    local = objectives.get(objective).local and not objectives.get(objective).isolate
    for x, y in data():
        optimizer.zero_grad()
        with bllkern.targets(y):
            loss = F.cross_entropy(net(x), y)
        (loss + bllkern.local_loss(net) if local else loss).backward()
        optimizer.step()
    return before, dict(net.named_parameters())


def layers(before):
    """Weights and biases of the four layers as they were drawn, to be trained by hand."""
    names = [name for name in before if ".local." not in name and not name.startswith("local")]
    values = [before[name].clone() for name in names]
    return names, list(zip(values[::2], values[1::2]))


def forward(x, parameters):
    """Activations h_0 = x, h_1 .., logits."""
    h = [x]
    for weight, bias in parameters[:-1]:
        h.append(torch.tanh(h[-1] @ weight.T + bias))
    weight, bias = parameters[-1]
    return h, h[-1] @ weight.T + bias


def error(logits, y):
    """Gradient of the mean cross-entropy by the logits."""
    return (torch.softmax(logits, 1) - F.one_hot(y, CLASSES)) / len(y)


def descend(parameters, h, deltas):
    """A step by hand, from the gradients ``deltas`` by what each layer computes before its nonlinearity."""
    for (weight, bias), x, delta in zip(parameters, h, deltas, strict=True):
        weight -= RATE * delta.T @ x
        bias -= RATE * delta.sum(0)


def assert_same(names, parameters, after):
    for name, expected in zip(names, (p for pair in parameters for p in pair), strict=True):
        torch.testing.assert_close(after[name].detach(), expected, rtol=0, atol=1e-8)


def assert_learned(before, after):
    assert all(not torch.equal(before[name], p) for name, p in after.items() if p.requires_grad)


CUTS = ["0", "1", "2"]


def feedback(before, i):
    (name,) = [name for name in before if name.startswith(f"{i}.local.") and "link" in name]
    return before[name].clone()


def by_hand(before, signals):
    """Train by hand with the gradient by each activation that ``signals(logits, y, h)`` returns."""
    names, parameters = layers(before)
    for x, y in batches():
        h, logits = forward(x, parameters)
        e = error(logits, y)
        deltas = [signal * (1 - z**2) for signal, z in zip(signals(e, y), h[1:], strict=True)]
        descend(parameters, h, [*deltas, e])
    return names, parameters


def test_direct_random_target_projection():
    before, after = trained("drtp", perceptron(), CUTS)
    fixed = [feedback(before, i) for i in range(3)]
    names, parameters = by_hand(before, lambda e, y: [-b[y] / N for b in fixed])
    assert_same(names, parameters, after)
    assert_learned(before, after)


def test_direct_feedback_alignment():
    before, after = trained("dfa", perceptron(), CUTS)
    fixed = [feedback(before, i) for i in range(3)]
    names, parameters = by_hand(before, lambda e, y: [e @ b for b in fixed])
    assert_same(names, parameters, after)
    assert_learned(before, after)


@pytest.mark.parametrize("preset", ["fa", "sign_symmetric"])
def test_feedback_alignment(preset):
    before, after = trained(preset, perceptron(), CUTS)
    names, parameters = layers(before)
    fixed = [value.clone() for name, value in before.items() if name.endswith("local.objective.weight")]
    assert len(fixed) == (4 if preset == "fa" else 0)
    for x, y in batches():
        h, logits = forward(x, parameters)
        back = fixed or [weight.sign() * weight.abs().mean() for weight, _ in parameters]
        deltas = [error(logits, y)]
        for z, b in zip(h[:0:-1], back[:0:-1], strict=True):
            deltas.insert(0, deltas[0] @ b * (1 - z**2))
        descend(parameters, h, deltas)
    assert_same(names, parameters, after)
    assert_learned(before, after)


def test_feedback_alignment_of_convolutions():
    def data():
        draw = torch.Generator().manual_seed(5)
        for _ in range(STEPS):
            yield torch.randn(N, 3, 8, 8, generator=draw), torch.randint(0, CLASSES, (N,), generator=draw)

    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 5, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(45, 4),
    )
    before, after = trained("fa", net, ["1"], data)
    names, ((w1, c1), (w2, c2), (w3, c3)) = layers(before)
    _, b2, b3 = (value for name, value in before.items() if name.endswith("local.objective.weight"))
    for x, y in data():
        h1 = torch.tanh(F.conv2d(x, w1, c1, padding=1))
        h2 = torch.tanh(F.conv2d(h1, w2, c2, stride=2))
        e = error(h2.flatten(1) @ w3.T + c3, y)
        d2 = (e @ b3).view(h2.shape) * (1 - h2**2)
        d1 = nn.grad.conv2d_input(h1.shape, b2, d2, stride=2) * (1 - h1**2)
        w3 -= RATE * e.T @ h2.flatten(1)
        w2 -= RATE * nn.grad.conv2d_weight(h1, w2.shape, d2, stride=2)
        w1 -= RATE * nn.grad.conv2d_weight(x, w1.shape, d1, padding=1)
        for bias, delta in ((c3, e), (c2, d2), (c1, d1)):
            bias -= RATE * delta.sum([0, *range(2, delta.dim())])
    assert_same(names, ((w1, c1), (w2, c2), (w3, c3)), after)


def test_target_propagation():
    """Targets t_3 = y B, t_k = t_{k+1} G_{k+1}; h_k descends |h_k - t_k|^2 / 2, G_k+1 |h_{k+1} G_{k+1} - h_k|^2 / 2."""
    before, after = trained("target_propagation", perceptron(), CUTS)
    names, parameters = layers(before)
    codes = feedback(before, 2)
    inverses = [before[f"{i}.local.objective.feedback.inverse.weight"].clone() for i in (1, 2)]
    for x, y in batches():
        h, logits = forward(x, parameters)
        goals = [codes[y]]
        for inverse in inverses[::-1]:
            goals.insert(0, goals[0] @ inverse)
        deltas = [(z - goal) / N * (1 - z**2) for z, goal in zip(h[1:], goals, strict=True)]
        for low, high, inverse in zip(h[1:-1], h[2:], inverses, strict=True):
            inverse -= RATE * high.T @ (high @ inverse - low) / N
        descend(parameters, h, [*deltas, error(logits, y)])
    assert_same(names, parameters, after)
    for i, inverse in zip((1, 2), inverses, strict=True):
        learned = after[f"{i}.local.objective.feedback.inverse.weight"].detach()
        torch.testing.assert_close(learned, inverse, rtol=0, atol=1e-8)
    assert_learned(before, after)


def similarity(z, y):
    """Mean squared difference of the cosines of centred features and those of the centred one-hot labels."""
    rows = F.normalize(z - z.mean(1, keepdim=True), dim=1)
    return (rows @ rows.T - (y[:, None] == y).double()).square().mean()


def autograd(before, losses):
    """A plain training with autograd of the sum of ``losses(h, logits, y, heads)``."""
    names, parameters = layers(before)
    heads = {name: value.clone() for name, value in before.items() if ".local." in name}
    leaves = [p.requires_grad_() for pair in parameters for p in pair] + [p.requires_grad_() for p in heads.values()]
    for x, y in batches():
        grads = torch.autograd.grad(losses(x, y, parameters, heads), leaves)
        with torch.no_grad():
            for p, grad in zip(leaves, grads, strict=True):
                p -= RATE * grad
    return names, [(w.detach(), b.detach()) for w, b in parameters]


def local_heads(x, y, parameters, heads, isolated, weight, smoothing):
    z, loss = x, 0.0
    for i, (w, b) in enumerate(parameters[:-1]):
        z = torch.tanh(F.linear(z.detach() if isolated else z, w, b))
        head = [heads[f"{i}.local.objective.head.{part}"] for part in ("weight", "bias")]
        loss = (
            loss
            + F.cross_entropy(F.linear(z, *head), y, label_smoothing=smoothing)
            + (weight * similarity(z, y) if weight else 0)
        )
    return loss + F.cross_entropy(F.linear(z.detach() if isolated else z, *parameters[-1]), y)


@pytest.mark.parametrize(
    "preset, isolated, weight", [("predsim", True, 4.0), ("bwbpf", True, 0), ("deep_supervision", False, 0)]
)
def test_local_heads(preset, isolated, weight):
    before, after = trained(preset, perceptron(), CUTS)
    smoothing = objectives.get(preset).label_smoothing
    assert_same(*autograd(before, lambda *args: local_heads(*args, isolated, weight, smoothing)), after)
    assert_learned(before, after)


def test_backprop_is_one_block():
    for cuts in ([], CUTS):
        before, after = trained("backprop", perceptron(), cuts)
        names, parameters = layers(before)
        for x, y in batches():
            h, logits = forward(x, parameters)
            deltas = [error(logits, y)]
            for z, (weight, _) in zip(h[:0:-1], parameters[:0:-1], strict=True):
                deltas.insert(0, deltas[0] @ weight * (1 - z**2))
            descend(parameters, h, deltas)
        assert_same(names, parameters, after)


@pytest.mark.parametrize("preset", ["fa", "dfa", "sign_symmetric"])
def test_the_plain_network_comes_back(preset):
    net = perceptron()
    x, y = next(batches())
    expected = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    converted = bllkern.convert(net, CUTS, CLASSES, preset, example=x)
    with bllkern.targets(y):
        torch.testing.assert_close(converted(x), net(x))
    plain = bllkern.unwrap(converted)
    assert list(plain.state_dict()) == list(net.state_dict())
    for one in (net, plain):
        grads = torch.autograd.grad(F.cross_entropy(one(x), y), list(one.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("preset", ["drtp", "target_propagation"])
def test_target_carrying_presets_are_isolated(preset):
    x, y = next(batches())
    bllkern.assert_isolated(bllkern.convert(perceptron(), CUTS, CLASSES, preset), x, y)


@pytest.mark.parametrize("preset", ["fa", "dfa", "sign_symmetric"])
def test_error_carrying_presets_are_not(preset):
    x, y = next(batches())
    with pytest.raises(AssertionError, match="not isolated"):
        bllkern.assert_isolated(bllkern.convert(perceptron(), CUTS, CLASSES, preset, example=x), x, y)


@pytest.mark.parametrize("preset, message", [("fa", "feedback alignment"), ("dfa", "direct feedback alignment")])
def test_layers_alone_cannot_know_the_error(preset, message):
    layer = bllkern.BlockLocalLinear(6, CLASSES, target_features=CLASSES, objective=preset)
    x, y = next(batches())
    with pytest.raises(RuntimeError, match=f"{message} needs bllkern.convert"), bllkern.targets(y):
        F.cross_entropy(layer(x.requires_grad_()), y).backward()
