"""The compiled kernels of linear heads, Gram matrices, prototypes: instruction sets, threads, tiles, repeatability."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from bllkern import _native, backends
from bllkern import functional as BF

from checks import relative_l2, value_and_gradients

if _native.error:
    pytest.skip(_native.error, allow_module_level=True)

TILES = importlib.import_module("bllkern._native.linear_cross_entropy")
GRAM = importlib.import_module("bllkern._native.gram")
LABELS = torch.arange(70) * 7 % 11
LABELS[::9] = -100
SOFT = torch.rand(70, 11, generator=torch.Generator().manual_seed(0)).softmax(1)


def prototypes(x):
    weights = torch.arange(11.0 * x.shape[1]).view(11, -1).sin()
    return (BF.prototypes(x, LABELS, 11)[0] * weights).sum()


CALLS = {
    "linear": lambda x, w, b: BF.linear_cross_entropy(x, w, b, LABELS, 0.1),
    "linear-soft": lambda x, w, b: BF.linear_cross_entropy(x, w, b, SOFT, 0.1, "sum"),
    "linear-plain": lambda x, w, b: BF.linear_cross_entropy(x, w, None, LABELS) + 0 * b.sum(),
    "similarity": lambda x: BF.similarity_matching(x, LABELS),
    "similarity-rows": lambda x: BF.similarity_matching(x, SOFT),
    "decorrelation": BF.decorrelation,
    "prototypes": prototypes,
}
every_call = pytest.mark.parametrize("name", CALLS)
both_paths = pytest.mark.parametrize("small", [False, True], ids=["tiles", "whole"])


def inputs(name, width=37, dtype=torch.float32):
    x = torch.randn(70, width)
    head = (torch.randn(11, width) / width**0.5, torch.randn(11)) if name.startswith("linear") else ()
    return [t.to(dtype) for t in (x, *head)]


def expected(name, tensors):
    with backends.backend("reference"):
        return value_and_gradients(CALLS[name], *(t.double() for t in tensors))


@pytest.fixture
def limits(monkeypatch):
    """Sets which heads are small and how many rows a tile has."""

    def set_limits(small, rows):
        monkeypatch.setattr(TILES, "_SMALL_CLASSES", dict.fromkeys(_native.DTYPES, 0))
        monkeypatch.setattr(TILES, "_SMALL_PRODUCTS", 10**9 if small else 0)
        monkeypatch.setattr(TILES, "_TILE_ROWS", rows)
        monkeypatch.setattr(TILES, "_TILE_BYTES", 1)
        monkeypatch.setattr(GRAM, "_SMALL", 10**9 if small else 0)
        monkeypatch.setattr(GRAM, "_TILE_ROWS", rows)

    return set_limits


@every_call
@both_paths
@pytest.mark.parametrize("width", [5, 16, 37, 130])
def test_each_instruction_set(isa, limits, name, small, width):
    limits(small, 32)
    tensors = inputs(name, width)
    for actual, truth in zip(value_and_gradients(CALLS[name], *tensors), expected(name, tensors), strict=True):
        assert relative_l2(actual, truth) <= 1e-6 if truth.any() else not actual.any()


@every_call
@both_paths
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)], ids=str)
def test_low_precision_on_each_instruction_set(isa, limits, name, small, dtype, tolerance):
    limits(small, 32)
    tensors = inputs(name, dtype=dtype)
    for actual, truth in zip(value_and_gradients(CALLS[name], *tensors), expected(name, tensors), strict=True):
        assert relative_l2(actual, truth) <= tolerance if truth.any() else not actual.any()


@every_call
@both_paths
def test_the_number_of_threads_does_not_matter_to_the_kernels(limits, name, small):
    """Products of one thread and of two may differ in torch's library; nothing of this size is split there."""
    limits(small, 256)
    tensors = inputs(name)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(value_and_gradients(CALLS[name], *tensors))
    torch.set_num_threads(2)
    for one, two in zip(*results, strict=True):
        assert relative_l2(one, two) <= 1e-6 if two.any() else not one.any()


@pytest.mark.parametrize("threads", [1, 3])
def test_prototypes_do_not_depend_on_threads(threads):
    x, target = torch.randn(3000, 67), torch.randint(40, (3000,)) ** 2 // 60
    truth = BF.prototypes(x, target, 27)
    torch.set_num_threads(threads)
    actual = BF.prototypes(x, target, 27)
    torch.set_num_threads(2)
    assert all(torch.equal(a, t) for a, t in zip(actual, truth, strict=True))


@every_call
@both_paths
def test_results_repeat_bit_for_bit(limits, name, small):
    limits(small, 16)
    tensors = inputs(name, 130)
    first = value_and_gradients(CALLS[name], *tensors)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(value_and_gradients(CALLS[name], *tensors), first, strict=True))


@pytest.mark.parametrize("rows", [1, 2, 69, 70, 71])
@pytest.mark.parametrize("name", ["linear", "linear-soft", "similarity", "similarity-rows", "decorrelation"])
def test_tile_edges(limits, name, rows):
    limits(False, rows)
    tensors = inputs(name)
    for actual, truth in zip(value_and_gradients(CALLS[name], *tensors), expected(name, tensors), strict=True):
        assert relative_l2(actual, truth) <= 1e-6


def test_no_logits_beyond_a_tile(limits):
    """The largest tensor made is a tile of logits, whatever the number of rows."""
    limits(False, 16)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    head = torch.randn(400, 12), torch.randn(300, 12), torch.randn(300), torch.randint(300, (400,))
    with Sizes():
        TILES.linear_cross_entropy(*head, 0.0, "mean", -100, True, True, True)
    assert max(sizes) == 400 * 12


@both_paths
def test_similarity_that_is_nearly_reached_keeps_its_digits(limits, small):
    """Classes along the axes: the small loss is a difference of large terms where features are few."""
    limits(small, 256)
    target = torch.arange(200) % 4
    x = F.one_hot(target, 9) + 0.01 * torch.randn(200, 9)
    x[target == 3, 8] += 1
    (loss, gradient), truth = (
        value_and_gradients(lambda x: BF.similarity_matching(x, target), x),
        expected_similarity(x, target),
    )
    assert relative_l2(loss, truth[0]) <= 1e-5 and relative_l2(gradient, truth[1]) <= 1e-5


def expected_similarity(x, target):
    with backends.backend("reference"):
        return value_and_gradients(lambda x: BF.similarity_matching(x, target), x.double())


@pytest.mark.parametrize("op", ["linear_cross_entropy", "prototypes", "prototypes_gradient"])
def test_labels_out_of_range_are_refused_by_the_op_itself(op):
    x, target = torch.randn(2, 3), torch.tensor([0, 4])
    arguments = {
        "linear_cross_entropy": (x, torch.randn(4, 3), None, target, 0.0, "mean", -100, True, True, False),
        "prototypes": (x, target, 4, -100),
        "prototypes_gradient": (x, target, torch.ones(4, dtype=torch.int64), torch.randn(4, 3), -100),
    }
    with pytest.raises(ValueError, match="target must hold class indices from 0 to 3 .*got 4"):
        getattr(torch.ops.bllkern, op).default(*arguments[op])
