"""What every operation keeps, whatever it computes: autograd's rules, dtypes, strides, opcheck, torch.compile."""

from dataclasses import dataclass
from typing import Callable

import pytest
import torch

import bllkern.functional as BF
from bllkern import _ops, backends
from bllkern.backends import reference

from checks import Results, available, parameters, relative_l2, value_and_gradients

LABELS = torch.tensor([0, 3, 3, -100, 1, 2, 0])
SOFT = torch.tensor([[0.7, 0.1, 0.1, 0.1]]).repeat(7, 1)
ROWS = torch.eye(7, 5) + torch.eye(7, 5).roll(3, 0)


@dataclass(frozen=True)
class Case:
    """One way to call an op: ``call`` of float tensors of these ``shapes``; ``family`` where the op takes one."""

    name: str
    op: str
    call: Callable
    shapes: tuple
    family: str = "bernoulli"

    def inputs(self, dtype=torch.float32):
        return [parameters(self.family, *shape, dtype=dtype) for shape in self.shapes]


def agreement(family, reduction, *shape):
    call = lambda a, b: BF.agreement(a, b, family, reduction)  # noqa: E731
    return Case(f"agreement-{family}-{reduction}", "agreement", call, (shape, shape), family)


def evidence(family, reduction, target, smoothing=0.0):
    def call(a, messages):
        return BF.evidence_cross_entropy(a, messages, target, family, reduction, label_smoothing=smoothing)

    name = f"evidence-{family}-{reduction}-{'soft' if target is SOFT else 'labels'}" + "-smoothed" * (smoothing > 0)
    return Case(name, "evidence_cross_entropy", call, ((7, 6), (4, 6)), family)


def linear(name, x, target, reduction="mean", bias=True, smoothing=0.0):
    def call(x, weight, bias=None):
        return BF.linear_cross_entropy(x, weight, bias, target, smoothing, reduction)

    return Case(f"linear-{name}", "linear_cross_entropy", call, (x, (4, 5), (4,))[: 2 + bias])


def weighted_prototypes(x, target):
    means, _ = BF.prototypes(x, target, 5)
    return (means * torch.arange(1.0, 26).view(5, 5).sqrt()).sum()


def weighted_features(x, weight, bias):
    features = BF.batch_norm_relu(x, weight, bias, max_pool=2, ceil_mode=True, pool=2)[1]
    return (features * torch.arange(1.0, features.numel() + 1).view(features.shape).sqrt()).sum()


def block(family, reduction="mean", bias=True):
    def call(x, weight, b, bias=None):
        return BF.linear_agreement(x, weight, bias, b, family, reduction)[1]

    shapes = ((7, 5), (6, 5), (7, 6), (6,))[: 3 + bias]
    return Case(f"block-{family}-{reduction}{'' if bias else '-without-bias'}", "linear_agreement", call, shapes)


CASES = [
    agreement("bernoulli", "mean", 7, 5),
    agreement("bernoulli", "sum", 7, 5),
    agreement("bernoulli", "none", 2, 3, 5),
    agreement("categorical:3", "none", 4, 6),
    agreement("categorical", "mean", 4, 5),
    agreement("gaussian", "mean", 4, 5),
    agreement("gaussian_learned", "sum", 4, 6),
    agreement("poisson", "none", 4, 5),
    evidence("bernoulli", "mean", LABELS),
    evidence("bernoulli", "sum", SOFT, smoothing=0.1),
    evidence("categorical:3", "mean", LABELS),
    evidence("categorical", "sum", LABELS),
    evidence("gaussian", "mean", SOFT),
    evidence("gaussian_learned", "mean", LABELS, smoothing=0.1),
    evidence("poisson", "sum", LABELS),
    linear("labels", (7, 5), LABELS),
    linear("sum-smoothed", (7, 5), LABELS, reduction="sum", smoothing=0.1),
    linear("soft", (7, 5), SOFT, smoothing=0.1),
    linear("spatial", (7, 5, 2, 3), LABELS),
    linear("without-bias", (7, 5), LABELS, bias=False),
    block("bernoulli"),
    block("categorical:3", bias=False),
    block("gaussian", "sum"),
    block("poisson"),
    Case("similarity-labels", "similarity_matching", lambda x: BF.similarity_matching(x, LABELS), ((7, 5),)),
    Case("similarity-rows", "similarity_matching", lambda x: BF.similarity_matching(x, ROWS), ((7, 5),)),
    Case("decorrelation", "decorrelation", BF.decorrelation, ((7, 5),)),
    Case("prototypes", "prototypes", lambda x: weighted_prototypes(x, LABELS), ((7, 5),)),
]
CASES.append(Case("batch_norm_relu", "batch_norm_relu", weighted_features, ((3, 4, 5, 6), (4,), (4,))))
# ops that return a loss with its gradients
LOSSES = [case for case in CASES if case.op not in ("prototypes", "batch_norm_relu")]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def on_every_backend_of(cases):
    parameters = [pytest.param(case, name, id=f"{case.name}-{name}") for case in cases for name in available(case.op)]
    return pytest.mark.parametrize("case, backend", parameters, indirect=["backend"])


on_every_backend = on_every_backend_of(CASES)


def test_every_op_has_a_case():
    assert {case.op for case in CASES} | {"prototypes_gradient", "batch_norm_relu_gradient"} == set(_ops.SCHEMAS)


@every_case
@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_gradcheck(case, factor):
    inputs = [x.requires_grad_() for x in case.inputs(torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: factor * case.call(*x), inputs)


@on_every_backend
def test_gradients_are_scaled_by_what_comes_from_above(case, backend):
    inputs = case.inputs()
    _, *gradients = value_and_gradients(case.call, *inputs)
    _, *scaled = value_and_gradients(lambda *x: -2.5 * case.call(*x), *inputs)
    for gradient, s in zip(gradients, scaled, strict=True):
        torch.testing.assert_close(s, -2.5 * gradient)


@on_every_backend
def test_a_graph_that_is_kept_gives_the_same_again(case, backend):
    leaves = [x.requires_grad_() for x in case.inputs()]
    loss = (-2.5 * case.call(*leaves)).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    last = torch.autograd.grad(loss, leaves)
    for gradient, copy, again in zip(first, copies, last, strict=True):
        assert torch.equal(gradient, copy) and torch.equal(again, copy)


@on_every_backend
def test_each_row_has_its_own_gradient_from_above(case, backend):
    leaves = [x.requires_grad_() for x in case.inputs()]
    loss = case.call(*leaves)
    weights = torch.randn_like(loss)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    with backends.backend("reference"):  # which gradcheck has checked in float64
        expected = torch.autograd.grad(case.call(*wide), wide, weights.double())
    for gradient, e in zip(torch.autograd.grad(loss, leaves, weights), expected, strict=True):
        assert relative_l2(gradient, e) <= 1e-5


@on_every_backend
def test_only_what_is_asked_for_gets_a_gradient(case, backend):
    inputs = case.inputs()
    loss, *gradients = value_and_gradients(case.call, *inputs)
    for i, gradient in enumerate(gradients):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        case.call(*leaves).sum().backward()
        torch.testing.assert_close(leaves[i].grad, gradient)
        assert all(x.grad is None for j, x in enumerate(leaves) if i != j)
    without = case.call(*inputs)
    assert not without.requires_grad
    torch.testing.assert_close(without, loss)
    with torch.no_grad():
        assert not case.call(*(x.clone().requires_grad_() for x in inputs)).requires_grad


# linear_agreement, whose gradients are by z and b, has a test of its own
@on_every_backend_of([case for case in LOSSES if case.op != "linear_agreement"])
def test_only_what_is_asked_for_is_computed(case, backend):
    inputs = case.inputs()
    for i in range(-1, len(inputs)):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        with Results() as results:
            case.call(*leaves)
        ((_, *gradients),) = results.kept
        assert [j for j, gradient in enumerate(gradients) if gradient is not None] == ([i] if i >= 0 else [])


@on_every_backend
def test_inputs_are_left_alone(case, backend):
    leaves = [x.requires_grad_() for x in case.inputs()]
    before = [x.detach().clone() for x in leaves]
    versions = [x._version for x in leaves]
    case.call(*leaves).sum().backward()
    assert all(torch.equal(x, b) for x, b in zip(leaves, before, strict=True))
    assert [x._version for x in leaves] == versions


@on_every_backend
def test_a_second_backward_gives_the_same_gradient(case, backend):
    leaves = [x.requires_grad_() for x in case.inputs()]
    loss = case.call(*leaves).sum()
    loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in leaves]
    for x in leaves:
        x.grad.mul_(-7)  # what the optimizer or clipping does to .grad must not reach the saved gradient
        x.grad = None
    loss.backward()
    assert all(torch.equal(x.grad, f) for x, f in zip(leaves, first, strict=True))


@on_every_backend
def test_gradients_accumulate(case, backend):
    leaves = [x.requires_grad_() for x in case.inputs()]
    loss = case.call(*leaves).sum()
    loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in leaves]
    loss.backward()
    assert all(torch.equal(x.grad, 2 * f) for x, f in zip(leaves, first, strict=True))


@pytest.mark.parametrize("case", [case for case in LOSSES if "none" not in case.name], ids=lambda case: case.name)
def test_a_saved_gradient_that_was_changed_is_noticed(case):
    """``autograd.grad`` may hand out the saved gradient itself; changing it must not go unseen."""
    inputs = case.inputs()
    leaf = inputs[2 if case.op == "linear_agreement" else 0].requires_grad_()
    loss = case.call(*inputs)
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    gradient.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)


@every_case
def test_losses_are_differentiable_once(case):
    leaf, *others = case.inputs()
    loss = case.call(leaf.requires_grad_(), *others)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf, create_graph=True)
    assert not gradient.requires_grad
    (gradient,) = torch.autograd.grad(loss.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@on_every_backend
def test_results_repeat_bit_for_bit(case, backend):
    inputs = case.inputs()
    first, second = value_and_gradients(case.call, *inputs), value_and_gradients(case.call, *inputs)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@on_every_backend
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_strides_do_not_matter(case, backend, layout):
    inputs = case.inputs()
    if layout == "expanded":
        inputs = [x[:1].expand(x.shape) for x in inputs]
        views = inputs
    elif layout == "transposed":
        views = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    else:
        views = [torch.stack([x, x + 1], -1)[..., 0] for x in inputs]
    plain = value_and_gradients(case.call, *(x.contiguous() for x in inputs))
    leaves = [x.requires_grad_() for x in views]
    loss = case.call(*leaves)
    strided = [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]
    for x, p in zip(strided, plain, strict=True):
        torch.testing.assert_close(x, p)


@on_every_backend
def test_an_empty_batch_has_loss_zero(case, backend):
    call, inputs = empty(case)
    loss, *gradients = value_and_gradients(call, *inputs)
    assert loss.numel() == 0 if loss.dim() else loss == 0
    for x, gradient in zip(inputs, gradients, strict=True):
        assert gradient.shape == x.shape and not gradient.any()


def empty(case):
    """The case with no rows."""
    no_labels = torch.empty(0, dtype=torch.int64)
    x, *others = case.inputs()
    x = x[:0]
    if case.op == "agreement":
        return case.call, (x, others[0][:0])
    if case.op == "evidence_cross_entropy":
        return lambda a, m: BF.evidence_cross_entropy(a, m, no_labels, case.family), (x, *others)
    if case.op == "linear_cross_entropy":
        return lambda x, w, b=None: BF.linear_cross_entropy(x, w, b, no_labels), (x, *others)
    if case.op == "linear_agreement":
        weight, b, *bias = others
        return case.call, (x, weight, b[:0], *bias)
    if case.op == "similarity_matching":
        return lambda x: BF.similarity_matching(x, no_labels), (x,)
    if case.op == "batch_norm_relu":
        return case.call, (x, *others)
    if case.op == "prototypes":
        return lambda x: weighted_prototypes(x, no_labels), (x,)
    return case.call, (x,)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loss_is_float32_and_gradients_have_the_dtype_of_their_input(case, backend, dtype):
    inputs = case.inputs(dtype)
    loss, *gradients = value_and_gradients(case.call, *inputs)
    assert loss.dtype == torch.float32 and all(g.dtype == dtype for g in gradients)


@every_case
def test_float64_stays_float64(case):
    assert all(x.dtype == torch.float64 for x in value_and_gradients(case.call, *case.inputs(torch.float64)))


@on_every_backend
def test_mixed_dtypes_promote(case, backend):
    first, *others = case.inputs()
    low = first.bfloat16()
    loss, *gradients = value_and_gradients(case.call, low, *others)
    expected_loss, *expected = value_and_gradients(case.call, low.float(), *others)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6 if others else 1e-2)
    assert [g.dtype for g in gradients] == [torch.bfloat16, *(torch.float32 for _ in others)]
    for gradient, e in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, e.to(gradient.dtype))


def raw_calls(op, wanted):
    """Arguments of the op itself, with and without gradients wanted, in plain and other strides."""
    x, weight, bias = torch.randn(7, 6), torch.randn(4, 6), torch.randn(4)
    transposed = torch.randn(6, 7).T
    if op == "agreement":
        for reduction in ("mean", "none"):
            yield x, transposed, "bernoulli", 0, reduction, wanted, wanted
            yield transposed, x, "categorical", 3, reduction, wanted, not wanted
    elif op == "evidence_cross_entropy":
        yield x, weight, bias, LABELS, "bernoulli", 0, 0.1, "mean", -100, wanted, wanted, wanted
        yield transposed, weight, None, SOFT, "gaussian", 0, 0.0, "sum", -100, wanted, not wanted, False
    elif op == "linear_cross_entropy":
        for features in (x, transposed, torch.randn(7, 6, 2, 2)):
            yield features, weight, bias, LABELS, 0.1, "mean", -100, wanted, wanted, wanted
            yield features, weight, None, SOFT, 0.0, "sum", -100, wanted, not wanted, False
    elif op == "linear_agreement":
        b = torch.randn(7, 4)
        yield x, weight, bias, b, None, "bernoulli", 0, "mean", wanted, wanted
        yield transposed, weight, None, b.bfloat16(), torch.rand(7), "categorical", 2, "sum", wanted, not wanted
    elif op == "similarity_matching":
        yield x, LABELS, -100, wanted
        yield transposed, SOFT, -100, wanted
    elif op.startswith("batch_norm_relu"):
        images, bias = torch.randn(2, 6, 5, 4), torch.randn(6)
        for layout in (torch.contiguous_format, torch.channels_last):
            images = images.contiguous(memory_format=layout)
            if op == "batch_norm_relu":
                yield images, bias, bias, None, 1e-5, 2, True, 2
                yield images, bias, bias, torch.randn_like(images), 1e-5, 1, False, 0
            else:
                yield from _gradient_calls(images, bias, wanted)
    elif op == "prototypes":
        yield x, LABELS, 5, -100
        yield transposed, LABELS, 4, -100
    elif op == "prototypes_gradient":
        counts = torch.tensor([2, 1, 1, 2, 0])
        yield x, LABELS, counts, torch.randn(5, 6), -100
        yield transposed, LABELS, counts, torch.randn(6, 5).T, -100
    else:
        yield x, wanted
        yield transposed, wanted


def _gradient_calls(images, bias, wanted):
    """Of ``batch_norm_relu_gradient``: what the forward pass has kept, with each of the gradients that may come."""
    by_features, shortcut = torch.randn(2, 6, 2, 2), torch.randn_like(images)
    for given, settings, by_features, shares in (
        (None, (1e-5, 2, True), by_features, False),
        (shortcut, (1e-5, 1, False), by_features, True),
        (None, (1e-5, 2, True), None, False),
    ):
        pool = 0 if by_features is None else 2
        z, _, *kept = reference.batch_norm_relu(images, bias, bias, given, *settings, pool)
        by_z = None if pool and not shares else torch.randn_like(z)
        yield images, bias, bias, *kept, z if shares else None, by_z, by_features, *settings, wanted, shares, False


@pytest.mark.parametrize("wanted", [False, True], ids=["loss", "gradients"])
@pytest.mark.parametrize(
    "op, backend", [(op, name) for op in _ops.SCHEMAS for name in available(op)], indirect=["backend"]
)
def test_opcheck(op, backend, wanted):
    for arguments in raw_calls(op, wanted):
        torch.library.opcheck(getattr(torch.ops.bllkern, op).default, arguments)


@every_case
def test_compiles_into_one_graph(case):
    torch.compiler.reset()
    inputs = case.inputs()
    compiled = torch.compile(lambda *x: 3 * case.call(*x), fullgraph=True, backend="aot_eager")
    eager = value_and_gradients(lambda *x: 3 * case.call(*x), *inputs)
    for x, e in zip(value_and_gradients(compiled, *inputs), eager, strict=True):
        torch.testing.assert_close(x, e)


def test_compiles_with_inductor():
    torch.compiler.reset()

    def step(x, weight):
        features = torch.tanh(x) * 2
        return BF.linear_cross_entropy(features, weight, None, LABELS) + BF.decorrelation(features)

    compiled = torch.compile(step, fullgraph=True)
    inputs = torch.randn(7, 6), torch.randn(4, 6)
    for x, e in zip(value_and_gradients(compiled, *inputs), value_and_gradients(step, *inputs), strict=True):
        torch.testing.assert_close(x, e)


@pytest.mark.parametrize(
    "op, backend", [(op, name) for op in _ops.SCHEMAS for name in available(op)], indirect=["backend"]
)
def test_autocast_does_not_lower_the_precision(op, backend):
    for arguments in raw_calls(op, True):
        expected = getattr(torch.ops.bllkern, op).default(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            actual = getattr(torch.ops.bllkern, op).default(*arguments)
        for one, other in zip(actual, expected, strict=True):
            assert one is None and other is None or torch.equal(one, other)
