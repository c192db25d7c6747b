"""The Triton backend's losses on Gram matrices, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
triton_worker = pytest.importorskip("triton_worker")

from bllkern.backends import reference  # noqa: E402

# one row, odd sizes, both sides of a chunk's edge (64 rows), rows longer than a tile (2048)
SHAPES = ((1, 3), (2, 5), (7, 16), (64, 9), (130, 3), (3, 2048), (4, 2051))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def targets(rows):
    classes = torch.arange(rows) % 4
    ignored = classes.clone()
    ignored[:: max(2, rows // 5)] = -100
    return {"labels": classes, "ignored": ignored, "rows": random(rows, 6, seed=1)}


def double(x):
    return x.double() if x.is_floating_point() else x


def relative_error(got, expected):
    # a pair of one row with itself has no gradient: what counts then is that it is as good as 0
    return float((got.double() - expected).norm() / expected.norm().clamp(min=0.1))


def compare(op, x, *args, tolerance=1e-6):
    got = triton_worker.run(op, x, *args)
    expected = getattr(reference, op)(x.double(), *(double(a) if isinstance(a, torch.Tensor) else a for a in args))
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        assert relative_error(g, e) <= tolerance
    return got


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ("labels", "ignored", "rows"))
def test_similarity_matching(shape, kind):
    compare("similarity_matching", random(*shape), targets(shape[0])[kind], -100, True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decorrelation(shape):
    compare("decorrelation", random(*shape), True)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_low_precision_is_no_worse_than_eager(dtype):
    x, labels = random(20, 24).to(dtype), targets(20)["ignored"]
    for op, args in (("similarity_matching", (labels, -100)), ("decorrelation", ())):
        got = triton_worker.run(op, x, *args, True)
        expected = getattr(reference, op)(x.double(), *args, True)
        leaf = x.clone().requires_grad_()
        loss = eager(leaf, *args)
        native = loss.detach(), *torch.autograd.grad(loss, leaf)
        assert got[1].dtype == dtype
        for g, n, e in zip(got, native, expected, strict=True):
            assert (g.double() - e).norm() <= (n.double() - e).norm() + 1e-2 * e.norm()


def eager(x, labels=None, ignore_index=None):
    """Both losses as torch computes them in the dtype of x."""
    centred = x - x.mean(1, keepdim=True)
    xn = centred / centred.norm(dim=1, keepdim=True)
    if labels is None:
        return ((xn @ xn.t()) * (1 - torch.eye(len(x), dtype=x.dtype))).square().mean()
    counted = labels != ignore_index
    xn, labels = xn[counted], labels[counted]
    return (xn @ xn.t() - (labels[:, None] == labels).to(x.dtype)).square().mean()


def test_constant_rows_have_no_direction():
    x = random(5, 7)
    x[1], x[3] = 0, 2.5
    for op, args in (("similarity_matching", (torch.tensor([0, 1, 1, 0, 0]), -100)), ("decorrelation", ())):
        grad = compare(op, x, *args, True)[1]
        assert not grad[1].any() and not grad[3].any() and torch.isfinite(grad).all()


@pytest.mark.parametrize("scale", (1e-4, 1e4))
def test_extreme_scales(scale):
    x = random(6, 9) * scale
    loss, grad = triton_worker.run("decorrelation", x, True)
    expected = reference.decorrelation(x.double(), True)
    assert abs(loss - expected[0]) <= 1e-6 * expected[0]
    assert (grad - expected[1]).norm() <= 1e-6 * expected[1].norm()


def test_empty_and_ignored_batches():
    for op, args in (("similarity_matching", (torch.empty(0, dtype=torch.int64), -100)), ("decorrelation", ())):
        loss, grad = triton_worker.run(op, torch.empty(0, 4), *args, True)
        assert loss.item() == 0 and grad.shape == (0, 4)
    loss, grad = triton_worker.run("similarity_matching", random(3, 4), torch.full((3,), -100), -100, True)
    assert loss.item() == 0 and not grad.any()


def test_non_contiguous_without_gradient():
    x, target = random(9, 6).t().contiguous().t(), targets(18)["rows"][::2]
    loss, grad = triton_worker.run("similarity_matching", x, target, -100, False)
    assert grad is None
    assert relative_error(loss, reference.similarity_matching(x.double(), target.double(), -100, False)[0]) <= 1e-6
