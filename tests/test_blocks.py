"""Boundary, BlockLocal and the block-local layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bllkern

LAYERS = [
    (bllkern.BlockLocalLinear, nn.Linear, (6, 5), (4, 6)),
    (bllkern.BlockLocalConv1d, nn.Conv1d, (6, 5, 3), (4, 6, 9)),
    (bllkern.BlockLocalConv2d, nn.Conv2d, (6, 5, 3), (4, 6, 9, 7)),
    (bllkern.BlockLocalConv3d, nn.Conv3d, (6, 5, 3), (4, 6, 5, 5, 5)),
]
Y = torch.tensor([0, 2, 1, 2])


def sgd_step(net, x, y, optimizer):
    with bllkern.targets(y):
        net(x)
    optimizer.step()


@pytest.mark.parametrize("layer, plain, arguments, shape", LAYERS)
def test_layer_is_the_plain_layer(layer, plain, arguments, shape):
    block, other, x = (
        layer(*arguments, target_features=3, bias=False),
        plain(*arguments, bias=False),
        torch.randn(shape),
    )
    block.load_state_dict(other.state_dict())
    assert isinstance(block, plain)
    assert torch.equal(block.weight, other.weight) and block.bias is None
    assert torch.equal(block.eval()(x), other(x))
    with torch.no_grad():
        assert torch.equal(block.train()(x), other(x))
    assert type(block.plain()) is plain and block.plain().weight is block.weight
    assert list(block.plain().state_dict()) == list(other.state_dict())
    assert torch.equal(block.plain()(x), other(x))


@pytest.mark.parametrize("layer, plain, arguments, shape", LAYERS)
@pytest.mark.parametrize("objective", ["bll", "bwbpf", "predsim"])
def test_layer_learns(layer, plain, arguments, shape, objective):
    block, x = layer(*arguments, target_features=3, objective=objective), torch.randn(shape)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.05)  # before the heads have their size
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        sgd_step(block, x, Y, optimizer)
        losses.append(block.local.loss)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


def test_conv_is_conv2d():
    assert bllkern.BlockLocalConv is bllkern.BlockLocalConv2d


def test_output_is_detached_and_unchanged():
    block, x = bllkern.BlockLocalLinear(6, 5, target_features=3), torch.randn(4, 6)
    with bllkern.targets(Y):
        z = block(x)
    assert not z.requires_grad and torch.equal(z, F.linear(x, block.weight, block.bias))


def test_graph_is_freed_inside_the_forward_pass():
    freed = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            freed.append(True)
            return 2 * ctx.saved_tensors[0] * grad

    class Module(nn.Linear):
        def forward(self, x):
            return Square.apply(super().forward(x))

    block = bllkern.BlockLocal(Module(6, 5), 3, "bwbpf")
    with bllkern.targets(Y):
        block(torch.randn(4, 6))
        assert freed


def test_training_needs_targets():
    block = bllkern.BlockLocalLinear(6, 5, target_features=3)
    with pytest.raises(RuntimeError, match=r"write `with bllkern.targets\(y\)"):
        block(torch.randn(4, 6))
    with bllkern.targets(Y):
        block(torch.randn(4, 6))
    with pytest.raises(RuntimeError, match="needs targets"):
        block(torch.randn(4, 6))


def test_targets_nest():
    block = bllkern.BlockLocalLinear(6, 5, target_features=3, objective="bwbpf")
    with bllkern.targets(Y):
        with bllkern.targets(Y[:2]):
            block(torch.randn(2, 6))
        block(torch.randn(4, 6))


@pytest.mark.parametrize(
    "y, kind, error, message",
    [
        ([0, 1], None, TypeError, "y must be a tensor"),
        (torch.zeros(4, dtype=torch.int32), None, TypeError, "int64 or floats, got torch.int32"),
        (torch.zeros(4), None, ValueError, r"\[B, C\] as floats"),
        (torch.zeros(4, 2, 2, dtype=torch.int64), None, ValueError, r"y must have shape"),
        (Y, "real", ValueError, "kind must be 'classes' for int64"),
        (torch.zeros(4, 3), "vectors", ValueError, "kind must be"),
    ],
)
def test_bad_targets(y, kind, error, message):
    with pytest.raises(error, match=message), bllkern.targets(y, kind=kind):
        pass


@pytest.mark.parametrize(
    "y, message",
    [
        (torch.tensor([0, 1, 2, 3]), "class indices from 0 to 2"),
        (torch.tensor([0, 1, 2, -1]), "class indices from 0 to 2"),
        (torch.tensor([0, 1, 2]), "a row per sample, 4, got 3"),
        (torch.rand(4, 5), "target_features=3 columns, got 5"),
        (torch.zeros(4, 6, dtype=torch.int64), r"need activations \[B, T, D\]"),
        (torch.zeros(4, dtype=torch.int64, device="meta"), "device of the activations, cpu, got meta"),
    ],
)
@pytest.mark.parametrize("objective", ["bll", "bwbpf", "predsim"])
def test_targets_that_do_not_fit_change_nothing(objective, y, message):
    block = bllkern.BlockLocalLinear(6, 5, target_features=3, objective=objective, example=torch.randn(4, 6))
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match=message), bllkern.targets(y):
        block(torch.randn(4, 6))
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
    assert all(p.grad is None for p in block.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_block_and_term(value):
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    net = bllkern.convert(net, ["0"], 3, "predsim", example=torch.randn(4, 6))
    x = torch.randn(4, 6)
    x[1, 2] = value
    with pytest.raises(FloatingPointError, match="block '0' is not finite: prediction = nan"), bllkern.targets(Y):
        net(x)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("kind", ["probabilities", "real"])
@pytest.mark.parametrize("objective", ["bwbpf", "predsim"])
def test_float_targets(kind, objective):
    x = torch.randn(4, 6)
    y = torch.softmax(torch.randn(4, 3), 1) if kind == "probabilities" else torch.randn(4, 3)
    block = bllkern.BlockLocalLinear(6, 5, target_features=3, objective=objective, example=x)
    with bllkern.targets(y):
        z = block(x)
    head = block.local.objective.head
    out = F.linear(z, head.weight, head.bias)
    expected = F.cross_entropy(out, y, label_smoothing=0.1) if kind == "probabilities" else F.mse_loss(out, y)
    if objective == "predsim":
        expected = expected + 4 * bllkern.functional.similarity_matching(z, y)
    torch.testing.assert_close(block.local.loss, expected.detach())


def test_evidence_refuses_real_targets():
    block = bllkern.BlockLocalLinear(6, 5, target_features=3)
    with pytest.raises(ValueError, match="evidence normalises over classes"), bllkern.targets(torch.randn(4, 3)):
        block(torch.randn(4, 6))


@pytest.mark.parametrize("per_token", [True, False])
def test_tokens(per_token):
    x, y = torch.randn(4, 7, 6), torch.randint(0, 3, (4, 7) if per_token else (4,))
    block = bllkern.BlockLocalLinear(6, 5, target_features=3, objective="bwbpf", example=x)
    with bllkern.targets(y):
        z = block(x)
    head = block.local.objective.head
    rows = z if per_token else z.mean(1)
    logits = F.linear(rows, head.weight, head.bias).flatten(0, -2)
    expected = F.cross_entropy(logits, y.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(block.local.loss, expected.detach())


@pytest.mark.parametrize("objective", ["bll", "bwbpf", "predsim", bllkern.objectives.BLL(agreement=0.1)])
def test_ignore_index(objective):
    x = torch.randn(4, 6)
    y = torch.tensor([0, -1, 1, -1])
    block = bllkern.BlockLocalLinear(6, 5, target_features=3, objective=objective, example=x)
    other = copy.deepcopy(block)
    with bllkern.targets(y, ignore_index=-1):
        block(x)
    with bllkern.targets(y[::2]):
        other(x[::2])
    torch.testing.assert_close(block.local.loss, other.local.loss)
    torch.testing.assert_close(block.weight.grad, other.weight.grad)


def test_block_local_takes_tuples_and_passes_attributes_on():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 5)
            self.answer = 42

        def forward(self, x, scale=1.0):
            return self.linear(x) * scale, "extra"

    block = bllkern.BlockLocal(Pair(), 3, "bwbpf")
    with bllkern.targets(Y):
        z, extra = block(torch.randn(4, 6), scale=2.0)
    assert extra == "extra" and not z.requires_grad and block.answer == 42
    assert block.linear.weight.grad is not None
    with pytest.raises(AttributeError, match="nothing"):
        block.nothing  # noqa: B018
    sequential = bllkern.BlockLocal(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), 3)
    assert len(sequential) == 2 and isinstance(sequential[1], nn.ReLU) and len(list(sequential)) == 2


def test_checkpoints():
    x = torch.randn(4, 6)
    block = bllkern.BlockLocal(nn.Linear(6, 5), 3, "predsim", example=x)
    plain = nn.Linear(6, 5)
    block.load_state_dict(plain.state_dict())
    assert torch.equal(block.module.weight, plain.weight)
    unsized = bllkern.BlockLocal(nn.Linear(6, 5), 3, "predsim")
    unsized.load_state_dict(block.state_dict())
    assert all(torch.equal(value, unsized.state_dict()[key]) for key, value in block.state_dict().items())
    missing = {key: value for key, value in block.state_dict().items() if "head.bias" not in key}
    with pytest.raises(RuntimeError, match="local.objective.head.bias"):
        block.load_state_dict(missing)
    unsized = bllkern.BlockLocal(nn.Linear(6, 5), 3, "predsim")
    unsized.load_state_dict(plain.state_dict())
    with bllkern.targets(Y):
        unsized(x)


def test_state_dict_and_parameters_tell_everything():
    block = bllkern.BlockLocalLinear(6, 5, target_features=3, objective="predsim", example=torch.randn(4, 6))
    keys = ["weight", "bias", "local.objective.head.weight", "local.objective.head.bias"]
    assert list(block.state_dict()) == keys and [name for name, _ in block.named_parameters()] == keys


def test_deepcopy_and_pickle_after_a_step(tmp_path):
    block, x = bllkern.BlockLocalLinear(6, 5, target_features=3, schedule="deferred"), torch.randn(4, 6)
    with bllkern.targets(Y):
        block(x)
    torch.save(block, tmp_path / "block.pt")
    for other in (copy.deepcopy(block), torch.load(tmp_path / "block.pt", weights_only=False)):
        assert torch.equal(other.weight, block.weight) and not other.local.pending


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"target_features": 0}, ValueError, "target_features must be a positive int, got 0"),
        ({"target_features": 3, "objective": "blll"}, ValueError, "objective must be one of"),
        ({"target_features": 3, "schedule": "late"}, ValueError, "schedule must be one of"),
        (
            {"target_features": 3, "objective": "deep_supervision", "schedule": "eager"},
            ValueError,
            "must be 'deferred'",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        bllkern.BlockLocalLinear(6, 5, **arguments)


def test_block_local_needs_a_module():
    with pytest.raises(TypeError, match="module must be a torch.nn.Module, got function"):
        bllkern.BlockLocal(F.relu, 3)
