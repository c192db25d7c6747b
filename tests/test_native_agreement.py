"""The compiled agreement kernels: every family, dtype and instruction set against float64, at sizes around edges."""

import pytest
import torch

from bllkern import _native, families
from bllkern.backends import cpu, reference

from checks import log_densities, log_sum, relative_l2

pytestmark = pytest.mark.skipif(_native.error is not None, reason=str(_native.error))

FAMILIES = ["bernoulli", "gaussian", "gaussian_learned", "poisson", "categorical"]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def sample(family, shape, dtype=torch.float32, spread=1.0):
    x = torch.randn(shape) * spread
    if family == "poisson":
        x = x.clamp(-40, 9 if dtype == torch.float16 else 40)
    return families.get(family).natural(x).to(dtype)


def errors(actual, a, b, family, group_size, reduction):
    """Relative L2 errors of loss and gradients."""
    truth = reference.agreement(a.double(), b.double(), family, group_size, reduction, True, True)
    return [relative_l2(x, t) for x, t in zip(actual, truth, strict=True)]


def score(a, b, family="bernoulli", group_size=0, reduction="mean", grad_a=True, grad_b=True):
    return cpu.agreement(a, b, family, group_size, reduction, grad_a, grad_b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "shape",
    [(1, 2), (5, 6), (3, 30), (1, 34), (700, 2), (129, 62), (3, 1022), (2, 1026), (2, 3, 2050), (1, 20002)],
    ids=str,
)
def test_sizes_around_vectors_tiles_and_rows(isa, shape, family, reduction):
    a, b = sample(family, shape), sample(family, shape)
    assert max(errors(score(a, b, family, 0, reduction), a, b, family, 0, reduction)) <= 1e-6


@pytest.mark.parametrize("family", ["bernoulli", "gaussian", "gaussian_learned", "poisson"])
@pytest.mark.parametrize("width", [1, 3, 7, 9, 15, 17, 31, 33, 65])
def test_odd_numbers_of_units(isa, width, family):
    width *= 2 if family == "gaussian_learned" else 1
    a, b = sample(family, (37, width)), sample(family, (37, width))
    assert max(errors(score(a, b, family, reduction="none"), a, b, family, 0, "none")) <= 1e-6


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("group_size", [2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 1023, 1025, 3001])
def test_group_sizes(isa, group_size, reduction):
    a, b = torch.randn(5, 3 * group_size), torch.randn(5, 3 * group_size)
    settings = "categorical", group_size, reduction
    assert max(errors(score(a, b, *settings), a, b, *settings)) <= 1e-6


@pytest.mark.parametrize("group_size", [1, 2, 10])
def test_more_small_groups_than_a_tile(isa, group_size):
    a, b = torch.randn(1500, 2 * group_size), torch.randn(1500, 2 * group_size)
    actual = score(a, b, "categorical", group_size, "none")
    truth = reference.agreement(a.double(), b.double(), "categorical", group_size, "none", True, True)
    for x, t in zip(actual, truth, strict=True):
        torch.testing.assert_close(x, t.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_extreme_parameters(isa, family):
    a, b = (sample(family, (40, 126), spread=20.0 if family == "poisson" else 1e4) for _ in range(2))
    actual = score(a, b, family, reduction="none")
    assert all(x.isfinite().all() for x in actual)
    assert max(errors(actual, a, b, family, 0, "none")) <= 1e-6


@pytest.mark.parametrize("swap", [False, True], ids=["b", "a"])
@pytest.mark.parametrize("spread", [1e-3, 1e-6])
@pytest.mark.parametrize("family", ["bernoulli", "gaussian", "poisson", "categorical:3", "categorical"])
def test_gradients_of_small_messages_keep_their_accuracy(isa, family, spread, swap):
    """Where b is near 0 the means of prior and posterior nearly agree; their difference must not be taken."""
    a, b = sample(family, (40, 126)), sample(family, (40, 126), spread=spread)
    if family == "poisson":
        b = b - 12  # of a rate, a small message is one near 0
    settings = family.partition(":")[0], families.get(family).group_size if ":" in family else 0, "none"
    pair = (b, a) if swap else (a, b)
    assert max(errors(score(*pair, *settings), *pair, *settings)) <= 1e-6


@pytest.mark.parametrize("improper", ["a", "b", "both"])
def test_a_message_without_positive_precision_has_no_loss(isa, improper):
    a, b = sample("gaussian_learned", (3, 40)), sample("gaussian_learned", (3, 40))
    for name, x in (("a", a), ("b", b)):
        if improper in (name, "both"):
            x[1, 30] = 1e-3 if name == "a" else 50.0
    loss = score(a, b, "gaussian_learned", reduction="none")[0]
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("family", FAMILIES)
def test_against_the_overlap_of_distributions(isa, family):
    a, b = (0.5 * sample(family, (6, 8), torch.float64) for _ in range(2))
    expected = -log_sum(family, log_densities(family, a) + log_densities(family, b))
    assert relative_l2(score(a.float(), b.float(), family, reduction="none")[0], expected) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(3, 34), (65, 30), (1, 2062)], ids=str)
def test_low_precision(isa, shape, family, dtype):
    """Inputs are exact in float32, gradients are rounded once.  Of bfloat16, the arithmetic is csrc/coarse.h's."""
    a, b = sample(family, shape, dtype), sample(family, shape, dtype)
    loss, by_a, by_b = errors(score(a, b, family, reduction="none"), a, b, family, 0, "none")
    assert loss <= (2**-16 if dtype == torch.bfloat16 else 1e-6) and max(by_a, by_b) <= ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torchs(isa, dtype):
    """Gaussian gradients (a - b)/2 of every 16-bit number: normal, subnormal, infinite and NaN."""
    a = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    b = a.roll(12345, 1)
    _, by_a, _ = score(a, b, "gaussian", reduction="sum")
    expected = ((a.float() - b.float()) / 2).to(dtype)
    assert torch.equal(by_a.isnan(), expected.isnan())
    assert torch.equal(by_a.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("family", FAMILIES)
def test_nan_stays_in_its_row(isa, family):
    a, b = sample(family, (9, 50)), sample(family, (9, 50))
    a[4, 7] = torch.nan
    loss, by_a, by_b = score(a, b, family, reduction="none")
    bad = torch.arange(9) == 4
    assert torch.equal(loss.isnan(), bad)
    assert by_a[4, 7].isnan() and by_b[4, 7].isnan()
    assert by_a[~bad].isfinite().all() and by_b[~bad].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 6), (0, 3, 6), (4, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_score(isa, shape, reduction):
    loss, by_a, by_b = score(torch.empty(shape), torch.empty(shape), reduction=reduction)
    assert loss.shape == (shape[:-1] if reduction == "none" else ()) and not loss.any()
    assert by_a.shape == by_b.shape == shape


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_gradients_asked_for(isa, family):
    a, b = sample(family, (5, 70)), sample(family, (5, 70))
    loss, by_a, by_b = score(a, b, family)
    for grad_a in (False, True):
        for grad_b in (False, True):
            one, one_a, one_b = score(a, b, family, grad_a=grad_a, grad_b=grad_b)
            assert torch.equal(one, loss)
            assert torch.equal(one_a, by_a) if grad_a else one_a is None
            assert torch.equal(one_b, by_b) if grad_b else one_b is None


@pytest.mark.parametrize("family", FAMILIES)
def test_strided_inputs(isa, family):
    a, b = sample(family, (40, 6)).T.contiguous().T, sample(family, (80, 6))[::2]
    for x, y in zip(score(a, b, family), score(a.contiguous(), b.contiguous(), family), strict=True):
        assert x.is_contiguous() and torch.equal(x, y)


@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_inputs(isa, offset):
    a, b = torch.randn(2, 5000)
    aligned = score(a[offset:].clone()[None], b[offset:].clone()[None])
    for x, y in zip(score(a[None, offset:], b[None, offset:]), aligned, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(2, 100_002), (30_001, 6)], ids=str)
def test_bits_do_not_depend_on_threads_or_repetition(isa, shape, family, reduction):
    a, b = sample(family, shape), sample(family, shape)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 2, 3):
            torch.set_num_threads(n)
            results.append(score(a, b, family, reduction=reduction))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_results_larger_than_the_caches(isa):
    """Gradients of more than 24 MiB are stored past the caches."""
    a, b = torch.randn(2, 1, (4 << 20) + 5)
    actual = score(a, b)
    assert max(errors(actual, a, b, "bernoulli", 0, "mean")) <= 1e-6


@pytest.mark.parametrize("b", [torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.bfloat16)], ids=["shape", "dtype"])
def test_inputs_that_differ_are_refused(b):
    with pytest.raises(ValueError, match="b must have the dtype, device and shape of a"):
        score(torch.zeros(2, 3), b)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="isa must be one of .*'baseline'.* got 'mmx'"):
        _native._C.set_isa("mmx")
