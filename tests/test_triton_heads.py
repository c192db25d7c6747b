"""The Triton backend's cross-entropies, interpreted, against float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
triton_worker = pytest.importorskip("triton_worker")

from bllkern import families  # noqa: E402
from bllkern.backends import reference  # noqa: E402

FAMILIES = ("bernoulli", "categorical", "gaussian", "gaussian_learned", "poisson")
EVERY = (True, True, True)
LOW = (torch.bfloat16, torch.float16)


def random(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def labels(rows, classes, ignored=True):
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(rows))
    if ignored:
        target[:: max(3, rows // 4)] = -100
    return target


def double(args):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]


def relative_error(got, expected, least=1e-30):
    return float((got.double() - expected).norm() / expected.norm().clamp(min=least))


def compare(op, args, tolerance, least=1e-30):
    """``least``: the norm that a result counts for where its exact value is as good as 0."""
    got, expected = triton_worker.run(op, *args), getattr(reference, op)(*double(args))
    for x, y in zip(got, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.shape == y.shape
            assert relative_error(x, y, least) <= tolerance
    return got


def linear_arguments(rows, width, classes, target, smoothing=0.0, reduction="mean", bias=True, spatial=()):
    weight = random(classes, width, seed=1) / width**0.5
    return [random(rows, width, *spatial), weight, random(classes, seed=2) if bias else None, target, smoothing,
            reduction, -100, *EVERY]  # fmt: skip


@pytest.mark.parametrize("sizes", ((4, 3, 2), (5, 7, 1), (64, 8, 10), (65, 5, 129), (130, 4, 3), (3, 6, 2050)), ids=str)
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_linear(sizes, smoothing):
    rows, width, classes = sizes
    for target in (labels(rows, classes, rows > 1), random(rows, classes, seed=3).softmax(1)):
        for reduction in ("mean", "sum"):
            compare("linear_cross_entropy", linear_arguments(*sizes, target, smoothing, reduction), 1e-6)


def test_linear_of_many_classes_sweeps_tiles():
    args = linear_arguments(2, 3, 8200, labels(2, 8200, False))
    got, native = triton_worker.run("linear_cross_entropy", *args), reference.linear_cross_entropy(*args)
    for x, eager, y in zip(got, native, reference.linear_cross_entropy(*double(args)), strict=True):
        assert relative_error(x, y) <= relative_error(eager, y) + 1e-6


@pytest.mark.parametrize("spatial", ((1,), (3, 5)), ids=str)
def test_linear_averages_over_space(spatial):
    args = linear_arguments(6, 5, 4, labels(6, 4), bias=False, spatial=spatial)
    grad = compare("linear_cross_entropy", args, 1e-6)[1]
    assert grad.is_contiguous()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("spatial", ((), (2, 2)), ids=str)
def test_linear_in_low_precision_is_no_worse_than_eager(dtype, spatial):
    args = linear_arguments(70, 16, 12, labels(70, 12), spatial=spatial)
    args[:3] = (x.to(dtype) for x in args[:3])
    got, expected = triton_worker.run("linear_cross_entropy", *args), reference.linear_cross_entropy(*double(args))
    leaves = [x.clone().requires_grad_() for x in args[:3]]
    pooled = leaves[0].flatten(2).mean(2) if spatial else leaves[0]
    loss = F.cross_entropy(pooled @ leaves[1].t() + leaves[2], args[3])
    native = (loss.detach(), *torch.autograd.grad(loss, leaves))
    for x, eager, y in zip(got, native, expected, strict=True):
        assert relative_error(x, y) <= relative_error(eager, y) + 1e-2


def test_linear_with_minus_infinity_and_large_logits():
    args = linear_arguments(4, 3, 5, torch.tensor([2, 4, 2, 4]))
    # whole numbers, so that float32 holds the logits exactly
    args[0], args[1], args[2] = args[0].round(), args[1].round(), torch.tensor([0.0, -math.inf, 1e4, -1e4, 9999.0])
    compare("linear_cross_entropy", args, 1e-6)


def evidence_arguments(
    rows, width, classes, target, family, size=0, reduction="mean", prior=True, scale=1.0, smoothing=0.0
):
    f = families.get(family)
    a, messages = f.natural(random(rows, width)), f.natural(random(classes, width, seed=1, scale=scale))
    log_prior = random(classes, seed=2) if prior else None
    return [a, messages, log_prior, target, family, size, smoothing, reduction, -100, *EVERY]


@pytest.mark.parametrize("sizes", ((1, 2, 2), (5, 14, 1), (33, 18, 17), (3, 10, 65), (66, 6, 3), (4, 50, 5)), ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_evidence(family, sizes):
    rows, width, classes = sizes
    for target in (labels(rows, classes, rows > 1), random(rows, classes, seed=3).softmax(1)):
        compare("evidence_cross_entropy", evidence_arguments(*sizes, target, family), 1e-5)


@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("family", FAMILIES)
def test_evidence_with_label_smoothing(family, reduction):
    for target in (labels(9, 7), random(9, 7, seed=3).softmax(1)):
        args = evidence_arguments(9, 10, 7, target, family, 0, reduction, smoothing=0.1)
        compare("evidence_cross_entropy", args, 1e-5)


@pytest.mark.parametrize("size", (2, 5, 16))
def test_evidence_of_groups(size):
    args = evidence_arguments(9, 3 * size, 7, labels(9, 7), "categorical", size, "sum", prior=False)
    compare("evidence_cross_entropy", args, 1e-5)


def test_evidence_of_groups_of_one_unit_does_not_depend_on_a():
    args = evidence_arguments(9, 3, 7, labels(9, 7), "categorical", 1)
    by_a = compare("evidence_cross_entropy", args, 1e-5, least=1 / 9)[1]
    assert by_a.abs().max() < 1e-6


@pytest.mark.parametrize("groups, size", ((2, 260), (3, 33), (1, 70)))
def test_evidence_of_large_groups_keeps_their_normalisers(groups, size):
    args = evidence_arguments(3, groups * size, 4, labels(3, 4, False), "categorical", size)
    compare("evidence_cross_entropy", args, 1e-5)


@pytest.mark.parametrize("family", ("bernoulli", "categorical", "gaussian"))
def test_evidence_of_extreme_parameters(family):
    args = evidence_arguments(6, 8, 5, labels(6, 5, False), family, 4 if family == "categorical" else 0)
    args[0] = torch.tensor([1e4, -1e4, 30.0, -30.0, 0.0, 1e-3]).repeat(8).view(6, 8)
    compare("evidence_cross_entropy", args, 1e-5, least=1 / 6)
    args[1] = args[1] * 3e3
    got = compare("evidence_cross_entropy", args, 1e-5, least=1 / 6)
    assert all(torch.isfinite(x).all() for x in got)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_evidence_in_low_precision_is_no_worse_than_eager(family, dtype):
    args = evidence_arguments(20, 24, 6, labels(20, 6), family)
    args[:3] = (x.to(dtype) for x in args[:3])
    got, expected = triton_worker.run("evidence_cross_entropy", *args), reference.evidence_cross_entropy(*double(args))
    leaves, f = [x.clone().requires_grad_() for x in args[:3]], families.get(family)
    logits = f.A(leaves[0][:, None] + leaves[1]) - f.A(leaves[0])[:, None] + leaves[2]
    loss = F.cross_entropy(logits, args[3])
    native = (loss.detach(), *torch.autograd.grad(loss, leaves))
    for x, eager, y in zip(got, native, expected, strict=True):
        assert relative_error(x, y) <= relative_error(eager, y) + 1e-2


def test_empty_batches():
    args = linear_arguments(0, 4, 3, torch.empty(0, dtype=torch.int64))
    cases = [("linear_cross_entropy", args)]
    for family in FAMILIES:
        args = evidence_arguments(0, 4, 3, torch.empty(0, dtype=torch.int64), family)
        cases.append(("evidence_cross_entropy", args))
    for op, args in cases:
        loss, *grads = triton_worker.run(op, *args)
        assert loss.item() == 0
        assert all(not g.any() and g.shape == x.shape for g, x in zip(grads, args[:3], strict=True))


def test_all_rows_ignored():
    target = torch.full((4,), -100)
    for op, args in (
        ("linear_cross_entropy", linear_arguments(4, 3, 5, target)),
        ("evidence_cross_entropy", evidence_arguments(4, 3, 5, target, "bernoulli")),
    ):
        loss, *grads = triton_worker.run(op, *args)
        assert loss.item() == 0 and not any(g.any() for g in grads)


def test_non_contiguous():
    args = linear_arguments(6, 5, 4, labels(6, 4))
    args[:3] = (x.t().contiguous().t() if x.dim() == 2 else x.repeat_interleave(2)[::2] for x in args[:3])
    compare("linear_cross_entropy", args, 1e-6)
    args = evidence_arguments(6, 8, 4, labels(6, 4), "bernoulli")
    args[:3] = (x.t().contiguous().t() if x.dim() == 2 else x.repeat_interleave(2)[::2] for x in args[:3])
    compare("evidence_cross_entropy", args, 1e-5)


@pytest.mark.parametrize("which", (None, 0, 1, 2))
def test_unwanted_gradients_are_none(which):
    cases = [("linear_cross_entropy", linear_arguments(5, 4, 3, labels(5, 3)))]
    for family in FAMILIES:
        cases.append(("evidence_cross_entropy", evidence_arguments(5, 4, 3, labels(5, 3), family)))
    for op, args in cases:
        compare(op, [*args[:-3], *(which == i for i in range(3))], 1e-5)
