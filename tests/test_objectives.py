"""Objectives: each term as its formula says, options, feedback networks, and the faults that peers had."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bllkern
from bllkern import families, functional, objectives
from bllkern.objectives import BLL, BWBPF, PredSim
from bllkern.objectives.heads import CHANNELS, WIDTH

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(7))
Y = torch.arange(16) % 4
OFF = dict(evidence=0.0, similarity=0.0)


def block(objective, width=8, **arguments):
    return bllkern.BlockLocalLinear(6, width, target_features=4, objective=objective, example=X, **arguments)


def local_loss(layer, x=X, y=Y):
    """One training pass: the loss of the layer and the activation it came from."""
    with bllkern.targets(y):
        layer(x)
    return layer.local.loss, F.linear(x, layer.weight, layer.bias).detach()


FAMILIES = ["bernoulli", "categorical:4", "gaussian", "gaussian_learned", "poisson"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("similarity_target", ["labels", "feedback"])
def test_bll_is_the_weighted_sum_of_its_terms(family, similarity_target):
    weights = dict(evidence=0.9, similarity=3.0, agreement=0.2, decorrelation=0.7, prediction=0.5)
    layer = block(BLL(family=family, similarity_target=similarity_target, label_smoothing=0.1, **weights))
    loss, z = local_loss(layer)
    f, local = families.get(family), layer.local.objective
    messages = f.natural(local.feedback.link.weight)
    a, b = f.natural(z), messages[Y]
    evidence = f.A(a[:, None] + messages) - f.A(a)[:, None] - f.A(messages) + local.log_prior
    expected = (
        0.9 * F.cross_entropy(evidence, Y, label_smoothing=0.1)
        + 3.0 * functional.similarity_matching(z, Y if similarity_target == "labels" else b)
        + 0.2 * (f.A(a) + f.A(b) - f.A2(a + b)).mean()
        + 0.7 * functional.decorrelation(z)
        + 0.5 * F.cross_entropy(F.linear(z, local.head.weight, local.head.bias), Y, label_smoothing=0.1)
    )
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns(family):
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    net = bllkern.convert(net, ["0"], 4, BLL(family=family), example=X)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    x = X + 2 * torch.eye(6)[Y]
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        with bllkern.targets(Y):
            F.cross_entropy(net(x), Y).backward()
        optimizer.step()
        losses.append(float(bllkern.local_losses(net)["0"]))
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def test_gaussian_evidence_is_a_linear_head():
    layer = block(BLL(similarity=0))
    loss, z = local_loss(layer)
    local = layer.local.objective
    expected = F.cross_entropy(F.linear(z, local.feedback.link.weight, local.log_prior), Y, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["classes", "classes to ignore", "probabilities", "all ignored"])
def test_label_smoothing_of_evidence(kind, label_smoothing):
    x, classes = X.double(), Y.clone()
    layer = block(BLL(similarity=0, label_smoothing=label_smoothing)).double()
    if kind != "classes":
        classes[:: 1 if kind == "all ignored" else 3] = -100
    y = torch.softmax(X[:, :4].double(), 1) if kind == "probabilities" else classes
    loss, z = local_loss(layer, x, y)
    local = layer.local.objective
    logits = F.linear(z, local.feedback.link.weight, local.log_prior)
    expected = F.cross_entropy(logits, y, label_smoothing=label_smoothing).nan_to_num()  # torch divides by no rows
    by_logits = torch.autograd.grad(expected, logits)[0].nan_to_num()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    by_weight = local.feedback.link.weight.detach().T @ by_logits.T @ x
    torch.testing.assert_close(layer.weight.grad, by_weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("label", [-1, 4])
def test_a_class_out_of_range_is_named_with_smoothing_too(label):
    with pytest.raises(ValueError, match=f"target must hold class indices from 0 to 3 .*got {label}"):
        local_loss(block(BLL()), y=Y.where(Y != 3, label))


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_unknown_options_are_errors(name):
    with pytest.raises(TypeError, match=f"objective '{name}' has no option 'nope'"):
        objectives.get(name, nope=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nope'"):
        objectives.OBJECTIVES[name](nope=1)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("bll", dict(similarity=-1.0), "similarity must be a non-negative number, got -1.0"),
        ("bll", dict(agreement=float("nan")), "agreement must be a non-negative number, got nan"),
        ("bll", dict(evidence="1"), "evidence must be a non-negative number, got '1'"),
        ("bll", dict(family="normal"), "family must be one of"),
        ("bll", dict(feedback="upward"), "feedback must be one of .*'fixed'.*, got 'upward'"),
        ("bll", dict(similarity_target="y"), "similarity_target must be one of"),
        ("bll", dict(bootstrapping=2), "bootstrapping must be one of"),
        ("bwbpf", dict(pool=0), "pool must be a positive integer, got 0"),
        ("bwbpf", dict(isolate="no"), "isolate must be one of"),
        ("deep_supervision", dict(isolate=True), "isolate must be one of"),
        ("predsim", dict(head="deep"), r"head must be one of \('auto', 'linear', 'mlp', 'conv'\), got 'd"),
        ("bll", dict(head="mlp", bootstrapping=True), "head='mlp' does not go with bootstrapping"),
        ("predsim", dict(label_smoothing=-0.1), "label_smoothing must be a non-negative number"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        objectives.get(name, **options)


@pytest.mark.parametrize(
    "objective",
    [
        BLL(**OFF),
        BLL(**OFF, bootstrapping=True),
        PredSim(prediction=0, similarity=0),
    ],
)
def test_an_objective_without_terms_is_refused(objective):
    with pytest.raises(ValueError, match="at least one term needs a weight above 0"):
        block(objective)


def test_a_term_of_weight_0_has_no_parameters_and_runs_nothing(monkeypatch):
    calls = []
    for name in ("agreement", "evidence_cross_entropy", "linear_cross_entropy", "similarity_matching", "decorrelation"):
        real = getattr(functional, name)
        monkeypatch.setattr(functional, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k))
    layer = block(BLL(evidence=0, similarity=1.0))
    runs = []
    layer.register_forward_hook(lambda *_: runs.append(1))
    local_loss(layer)
    assert calls == ["similarity_matching"] and len(runs) == 1
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_denoising_runs_the_block_a_second_time_with_noise():
    inputs = []

    class Module(nn.Linear):
        def forward(self, x):
            inputs.append(x)
            return super().forward(x)

    layer = bllkern.BlockLocal(Module(6, 8), 4, BLL(**OFF, denoising=2.0, noise=0.5), example=X)
    inputs.clear()
    with bllkern.targets(Y):
        z = layer(X)
    clean, noisy = inputs
    assert torch.equal(clean, X) and 0.3 < (noisy - X).std() < 0.7
    pulled = layer.module(noisy)
    torch.testing.assert_close(layer.local.loss, 2 * F.mse_loss(pulled, z).detach())
    expected = torch.autograd.grad(2 * F.mse_loss(pulled, z), layer.module.weight)[0]
    torch.testing.assert_close(layer.module.weight.grad, expected)


def test_a_boundary_alone_cannot_denoise():
    net = nn.Sequential(nn.Linear(6, 8), bllkern.Boundary(4, BLL(**OFF, denoising=1.0)))
    with pytest.raises(ValueError, match="denoising needs the module"), bllkern.targets(Y):
        net(X)


def test_similarity_pulls_classes_together():
    """A released code base has the sign wrong: its features move away from their own prototype."""
    layer = block(BLL(evidence=0, similarity=1.0))

    def contrast():
        z = F.linear(X, layer.weight, layer.bias).detach()
        zn = F.normalize(z - z.mean(1, keepdim=True), dim=1)
        same = Y[:, None] == Y
        cosines = zn @ zn.T
        return cosines[same].mean() - cosines[~same].mean()

    before = contrast()
    for _ in range(10):
        layer.zero_grad()
        local_loss(layer)
        torch.optim.SGD(layer.parameters(), lr=1.0).step()
    assert contrast() > before + 0.05


@pytest.mark.parametrize("feedback", ["direct", "fixed"])
def test_feedback_trains_unless_it_is_fixed(feedback):
    layer = block(BLL(feedback=feedback))
    weight = layer.local.objective.feedback.link.weight
    before = weight.clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    local_loss(layer)
    optimizer.step()
    assert torch.equal(weight, before) == (feedback == "fixed")
    assert weight.requires_grad == (feedback == "direct")
    assert "local.objective.feedback.link.weight" in layer.state_dict()


def test_the_message_of_a_class_that_is_absent_is_not_moved_by_agreement():
    layer = block(BLL(**OFF, agreement=1.0))
    local_loss(layer, X[:4], torch.tensor([0, 1, 1, 0]))
    grad = layer.local.objective.feedback.link.weight.grad
    assert (grad[:2].abs().sum(1) > 0).all() and (grad[2:] == 0).all()


def chained_net(**options):
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    return bllkern.convert(net, ["0", "2"], 4, BLL(feedback="chained", **options), example=X)


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_chained_feedback_reads_the_boundary_above(family):
    net = chained_net(family=family)
    low, high = net[0].local.objective.feedback, net[2].local.objective.feedback
    top = high.link.weight
    assert low.link.weight.shape == (top.shape[1], 8)
    expected = families.get(family).mean(top) @ low.link.weight
    torch.testing.assert_close(low.messages(), expected)
    low.messages().sum().backward()
    assert top.grad is None and low.link.weight.grad is not None


def test_chained_feedback_survives_copy_and_checkpoint():
    net = chained_net()
    twin = copy.deepcopy(net)
    low, high = twin[0].local.objective.feedback, twin[2].local.objective.feedback
    with torch.no_grad():
        high.link.weight.add_(1.0)
    torch.testing.assert_close(low.messages(), high.link.weight @ low.link.weight)
    net.load_state_dict(twin.state_dict())
    torch.testing.assert_close(net[0].local.objective.feedback.messages(), low.messages())


def test_chained_feedback_needs_convert():
    layer = bllkern.BlockLocalLinear(6, 8, target_features=4, objective=BLL(feedback="chained"))
    with pytest.raises(RuntimeError, match="feedback='chained' needs bllkern.convert"), bllkern.targets(Y):
        layer(X)


def test_bootstrapping_hands_on_the_posterior():
    layer = block(BLL(bootstrapping=True))
    message = layer.local.objective.feedback.link.weight.detach()[Y]
    with bllkern.targets(Y):
        out = layer(X)
    plain = F.linear(X, layer.weight, layer.bias)
    torch.testing.assert_close(out, (plain + message).detach())
    assert not out.requires_grad
    assert torch.equal(layer.eval()(X), plain)


PAPER = BWBPF(head="linear", label_smoothing=0.0)


def test_bwbpf_of_the_paper_is_pooling_and_a_linear_head():
    layer = bllkern.BlockLocalConv2d(3, 8, 3, padding=1, target_features=4, objective=PAPER)
    x = torch.randn(16, 3, 9, 9)
    with bllkern.targets(Y):
        z = layer(x)
    head = layer.local.objective.head
    expected = F.cross_entropy(F.linear(F.adaptive_avg_pool2d(z, 4).flatten(1), head.weight, head.bias), Y)
    torch.testing.assert_close(layer.local.loss, expected.detach())


@pytest.mark.parametrize("objective", [BLL(head="mlp", prediction=0.5, agreement=0.3), BWBPF(head="mlp")])
def test_mlp_head_is_a_hidden_layer_before_all_terms_and_similarity_reads_both(objective):
    layer = block(objective)
    loss, z = local_loss(layer)
    local = layer.local.objective
    hidden = F.linear(z, local.reader.hidden.weight)
    h = torch.relu(F.batch_norm(hidden, None, None, training=True))
    smoothing = objective.label_smoothing
    expected = F.cross_entropy(F.linear(h, local.head.weight, local.head.bias), Y, label_smoothing=smoothing)
    if isinstance(objective, BLL):
        messages, f = local.feedback.link.weight, families.get("gaussian")
        agreement = (f.A(h) + f.A(messages[Y]) - f.A2(h + messages[Y])).mean()
        similarity = functional.similarity_matching(h, Y) + functional.similarity_matching(z, Y)
        evidence = F.cross_entropy(F.linear(h, messages, local.log_prior), Y, label_smoothing=smoothing)
        expected = 0.5 * expected + 0.3 * agreement + 4.0 * similarity + evidence
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)


def test_bwbpf_has_a_hidden_layer_on_maps_only():
    layer = bllkern.BlockLocalConv2d(3, 8, 3, padding=1, target_features=4, objective="bwbpf")
    x = torch.randn(16, 3, 9, 9)
    with bllkern.targets(Y):
        z = F.adaptive_avg_pool2d(layer(x), 4).flatten(1)
    local = layer.local.objective
    h = torch.relu(F.batch_norm(F.linear(z, local.reader.hidden.weight), None, None, training=True))
    expected = F.cross_entropy(F.linear(h, local.head.weight, local.head.bias), Y, label_smoothing=0.1)
    torch.testing.assert_close(layer.local.loss, expected.detach())
    layer = block("bwbpf")
    local_loss(layer)
    assert layer.local.objective.reader is None


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_conv_head_is_a_small_convolution(dimensions):
    layer = getattr(bllkern, f"BlockLocalConv{dimensions}d")
    layer = layer(3, 8, 3, padding=1, target_features=4, objective=BWBPF(head="conv", pool=2, label_smoothing=0.0))
    x = torch.randn(16, 3, *[6] * dimensions)
    with bllkern.targets(Y):
        z = layer(x)
    local = layer.local.objective
    pool = getattr(F, f"adaptive_avg_pool{dimensions}d")
    hidden = getattr(F, f"conv{dimensions}d")(pool(z, 4), local.reader.hidden.weight, padding=1)
    assert hidden.shape == (16, CHANNELS, *[4] * dimensions)
    hidden = pool(torch.relu(F.batch_norm(hidden, None, None, training=True)), 2).flatten(1)
    expected = F.cross_entropy(F.linear(hidden, local.head.weight, local.head.bias), Y)
    torch.testing.assert_close(layer.local.loss, expected.detach())


@pytest.mark.parametrize("head", ["mlp", "conv"])
@pytest.mark.parametrize("name", ["bll", "bwbpf", "predsim"])
def test_every_weight_of_a_head_learns_and_is_saved(name, head):
    def net(example):
        torch.manual_seed(0)
        return bllkern.BlockLocalConv2d(
            3, 4, 3, padding=1, target_features=4, objective=objectives.get(name, head=head), example=example
        )

    x = torch.randn(16, 3, 9, 9)
    layer = net(None)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)  # before the head has its size
    with bllkern.targets(Y):
        layer(x)
    before = {key: p.detach().clone() for key, p in layer.named_parameters()}
    optimizer.step()
    assert [key for key, p in layer.named_parameters() if torch.equal(p, before[key])] == []
    assert "local.objective.reader.hidden.weight" in before
    for other in (net(x), net(None)):  # sized already, or by the checkpoint
        other.load_state_dict(layer.state_dict())
        assert all(torch.equal(p, layer.state_dict()[key]) for key, p in other.state_dict().items())


def _losses_with_the_same_weights(layer, other, x):
    for net in (layer, other):  # gives them their size
        with bllkern.targets(Y):
            net(x)
    other.load_state_dict(layer.state_dict())  # strict: the same keys
    for net in (layer, other):
        with bllkern.targets(Y):
            net(x)
    return layer.local.loss, other.local.loss


@pytest.mark.parametrize("name", ["bll", "predsim"])
def test_auto_head_is_a_hidden_layer_on_maps(name):
    layer = bllkern.BlockLocalConv2d(3, 4, 3, target_features=4, objective=objectives.get(name, head="auto"))
    same = bllkern.BlockLocalConv2d(3, 4, 3, target_features=4, objective=objectives.get(name, head="mlp"))
    x = torch.randn(16, 3, 9, 9)
    losses = _losses_with_the_same_weights(layer, same, x)
    assert layer.local.objective.reader.hidden.weight.shape == (WIDTH, 4 * 4 * 4)
    assert torch.equal(*losses)


@pytest.mark.parametrize("shape", [(16, 6), (16, 5, 6), (16, 3, 5, 6)])
def test_auto_head_is_linear_on_all_else(shape):
    assert BLL().head == "auto"
    layer, plain = (
        bllkern.BlockLocalLinear(6, 8, target_features=4, objective=BLL(head=h)) for h in ("auto", "linear")
    )
    x = torch.randn(shape)
    assert torch.equal(*_losses_with_the_same_weights(layer, plain, x))
    fresh = bllkern.BlockLocalLinear(6, 8, target_features=4, objective=BLL())
    fresh.load_state_dict(layer.state_dict())
    assert fresh.state_dict().keys() == layer.state_dict().keys()


def test_auto_head_leaves_bootstrapping_its_messages():
    objective = BLL(bootstrapping=True)
    layer = bllkern.BlockLocalConv2d(3, 4, 3, target_features=4, objective=objective, example=torch.randn(2, 3, 9, 9))
    assert layer.local.objective.reader is None


def test_heads_are_for_training_only():
    x = torch.randn(16, 3, 9, 9)
    layer = bllkern.BlockLocalConv2d(3, 4, 3, target_features=4, objective=BWBPF(head="conv"), example=x).eval()
    layer.local.objective.reader = None
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias))


@pytest.mark.parametrize("head", ["mlp", "conv"])
def test_heads_take_a_single_sample(head):
    layer = bllkern.BlockLocalConv2d(3, 4, 3, target_features=4, objective=objectives.get("bll", head=head))
    with bllkern.targets(Y[:1]):
        layer(torch.randn(1, 3, 3, 3))
    assert layer.local.loss.isfinite() and all(p.grad.isfinite().all() for p in layer.parameters())


def test_conv_head_needs_a_map():
    with pytest.raises(ValueError, match=r"head='conv' needs an activation \[B, C, \*spatial\], got \[16, 8\]"):
        block(BWBPF(head="conv"))


def test_deep_supervision_is_bwbpf_without_isolation():
    assert isinstance(objectives.get("deep_supervision"), BWBPF) and not objectives.get("deep_supervision").isolate
    results = []
    for objective in ("deep_supervision", dataclasses.replace(PAPER, isolate=False)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        net = bllkern.convert(net, ["0", "2"], 4, objective, example=X)
        with bllkern.targets(Y):
            loss = F.cross_entropy(net(X), Y)
        (loss + bllkern.local_loss(net)).backward()
        results.append([p.grad for p in net.parameters()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_backprop_is_the_plain_network():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    F.cross_entropy(net(X), Y).backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    converted = bllkern.convert(net, ["0"], 4, "backprop", schedule="eager")
    F.cross_entropy(converted(X), Y).backward()
    for p, grad in zip(net.parameters(), expected, strict=True):
        assert torch.equal(p.grad, grad)
    assert len(list(converted.parameters())) == len(list(net.parameters()))


def test_repr_says_what_was_chosen():
    assert repr(BLL(similarity=2.0, family="poisson")) == "BLL(family='poisson', similarity=2.0)"
    assert "BWBPF(pool=2)" in repr(block(BWBPF(pool=2)))
