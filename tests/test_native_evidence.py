"""The compiled evidence kernels: every family and instruction set against float64, at sizes around tiles' edges."""

import pytest
import torch

from bllkern import _native, families
from bllkern.backends import cpu, reference

from checks import relative_l2

pytestmark = pytest.mark.skipif(_native.error is not None, reason=str(_native.error))

FAMILIES = ["bernoulli", "gaussian", "gaussian_learned", "poisson", "categorical"]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def sample(family, rows, classes, width, dtype=torch.float32):
    """a, messages and a log prior: log evidences that differ by about 1."""
    natural = families.get(family).natural
    spread = 0.5 if family == "poisson" else 1.5
    a, messages = natural(spread * torch.randn(rows, width)), natural(spread * torch.randn(classes, width))
    return a.to(dtype), (messages / max(width, 1) ** 0.5).to(dtype), torch.randn(classes).to(dtype)


def arguments(
    inputs, target, family="bernoulli", group=0, reduction="mean", ignore_index=-100, smoothing=0.0, wanted=(True,) * 3
):
    return *inputs, target, family, group, smoothing, reduction, ignore_index, *wanted


def errors(inputs, target, *settings):
    """Relative L2 errors of loss and gradients."""
    actual = cpu.evidence_cross_entropy(*arguments(inputs, target, *settings))
    soft = target.double() if target.is_floating_point() else target
    truth = reference.evidence_cross_entropy(*arguments([x.double() for x in inputs], soft, *settings))
    assert all(x.isfinite().all() for x in actual)
    return [relative_l2(x, t) for x, t in zip(actual, truth, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "rows, classes, width",
    [(2, 2, 2), (15, 3, 30), (17, 5, 34), (63, 65, 62), (65, 4, 258), (130, 67, 10), (513, 3, 18), (5, 129, 514)],
)
def test_sizes_around_vectors_and_blocks(isa, rows, classes, width, family):
    inputs = sample(family, rows, classes, width)
    assert max(errors(inputs, torch.randint(classes, (rows,)), family)) <= 1e-5


@pytest.mark.parametrize("family", ["bernoulli", "gaussian", "poisson"])
@pytest.mark.parametrize("width", [1, 3, 7, 15, 17, 31, 255, 257])
def test_odd_numbers_of_units(isa, width, family):
    assert max(errors(sample(family, 19, 6, width), torch.randint(6, (19,)), family)) <= 1e-5


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("group", [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 255, 257, 600])
def test_group_sizes(isa, group, groups):
    inputs = sample("categorical", 21, 7, groups * group)
    results = errors(inputs, torch.randint(7, (21,)), "categorical", group)
    # a group of 1 has a log evidence of b and no gradient by a
    assert max(results if group > 1 else results[:1] + results[2:]) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_class_probabilities(isa, family):
    target = torch.rand(33, 9).softmax(1) * torch.linspace(0, 2, 33)[:, None]
    assert max(errors(sample(family, 33, 9, 34), target, family, 0, "sum")) <= 1e-5


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("family, group", [*((name, 0) for name in FAMILIES), ("categorical", 3)])
def test_label_smoothing(isa, family, group, soft):
    """Rows to ignore, probabilities that do not sum to 1, and classes in several blocks."""
    target = torch.randint(130, (33,))
    target[::4] = 7
    if soft:
        target = torch.rand(33, 130).softmax(1) * torch.linspace(0, 2, 33)[:, None]
    for smoothing in (0.1, 1.0):
        settings = (family, group, "mean", 7, smoothing)
        assert max(errors(sample(family, 33, 130, 66), target, *settings)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spread", [3.0, 10.0, 30.0])
def test_products_stay_in_range(isa, family, spread):
    """Messages so strong that products of a few factors would overflow."""
    a, messages, prior = sample(family, 20, 6, 530)
    if family == "poisson":
        spread = spread / 10
    messages = messages * (spread * 530**0.5)
    assert max(errors((a, messages, prior), torch.randint(6, (20,)), family)) <= 1e-5


@pytest.mark.parametrize("a_1, b_1", [(1e-30, 1e30), (1e20, 1e-20), (1e-3, 1e6)])
def test_precisions_far_apart(isa, a_1, b_1):
    a, messages = torch.randn(6, 44), torch.randn(3, 44)
    a[:, 22:], messages[:, 22:] = -a_1 * (0.5 + torch.rand(6, 22)), -b_1 * (0.5 + torch.rand(3, 22))
    a[:, :22] *= a_1**0.5
    messages[:, :22] *= b_1**0.5
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    actual = cpu.evidence_cross_entropy(*arguments((a, messages, None), target, "gaussian_learned"))
    truth = reference.evidence_cross_entropy(
        *arguments((a.double(), messages.double(), None), target, "gaussian_learned")
    )
    assert relative_l2(actual[0], truth[0]) <= 1e-5
    assert relative_l2(actual[2], truth[2]) <= 1e-5


@pytest.mark.parametrize("group", [0, 3, 11, 66])
@pytest.mark.parametrize("wide", [61.0, -61.0, 1e4, -1e4, -torch.inf])
def test_wide_messages(isa, wide, group):
    """Single units whose message leaves the range of products: beside others, and for rows that agree and disagree."""
    family = "categorical" if group else "bernoulli"
    a, messages, prior = sample(family, 19, 5, 132)
    messages[1, 7] = messages[3, 130] = wide
    a[2:5, 7], a[5:8, 7] = 1e4, -1e4
    a[8, :] = 0
    inputs = a, messages, prior
    finite = a, messages.clamp(min=-1e5), prior
    actual = cpu.evidence_cross_entropy(*arguments(inputs, torch.randint(5, (19,)) * 0 + 2, family, group))
    truth = reference.evidence_cross_entropy(
        *arguments([x.double() for x in finite], torch.full((19,), 2), family, group)
    )
    for x, t in zip(actual, truth, strict=True):
        assert x.isfinite().all() and relative_l2(x, t) <= 1e-5
    if wide == -torch.inf:
        assert actual[2][1, 7] == 0 and actual[2][3, 130] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision(isa, family, dtype):
    """The loss has float32's error: inputs are exact in float32.  Gradients are rounded once."""
    loss, *gradients = errors(sample(family, 37, 5, 50, dtype), torch.randint(5, (37,)), family)
    assert loss <= 1e-5 and max(gradients) <= ROUNDING[dtype]


@pytest.mark.parametrize("family", FAMILIES)
def test_small_messages_keep_the_accuracy_of_gradients(isa, family):
    """The means under prior and posterior nearly agree; their difference must not be taken."""
    a, messages, prior = sample(family, 40, 10, 126)
    if family == "gaussian_learned":
        messages[:, 63:] = -0.5 - 1e-3 * torch.rand(10, 63)
        messages[:, :63] *= 1e-3
    else:
        messages *= 1e-3
    assert max(errors((a, messages, prior), torch.randint(10, (40,)), family)) <= 1e-5


def test_nan_reaches_the_loss(isa):
    for family in FAMILIES:
        for which in (0, 1):
            inputs = sample(family, 5, 3, 70)
            inputs[which][1, 3] = torch.nan
            loss = cpu.evidence_cross_entropy(*arguments(inputs, torch.tensor([0, 1, 2, 0, 1]), family))[0]
            assert loss.isnan(), (family, which)


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_do_not_depend_on_the_number_of_threads(family):
    inputs, target = sample(family, 150, 70, 300), torch.randint(70, (150,))
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            runs.append(cpu.evidence_cross_entropy(*arguments(inputs, target, family)))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(x, first) for x, first in zip(run, runs[0], strict=True))


def test_bits_repeat(isa):
    inputs, target = sample("bernoulli", 150, 70, 300), torch.randint(70, (150,))
    first = cpu.evidence_cross_entropy(*arguments(inputs, target))
    for _ in range(20):
        assert all(torch.equal(x, f) for x, f in zip(cpu.evidence_cross_entropy(*arguments(inputs, target)), first))


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_each_result_alone(wanted):
    inputs, target = sample("bernoulli", 70, 9, 40), torch.randint(9, (70,))
    everything = cpu.evidence_cross_entropy(*arguments(inputs, target))
    some = cpu.evidence_cross_entropy(*arguments(inputs, target, wanted=wanted))
    for x, t, present in zip(some, everything, (True, *wanted), strict=True):
        assert torch.equal(x, t) if present else x is None


def test_no_units_leaves_the_prior():
    prior, target = torch.randn(4), torch.tensor([0, 3])
    loss, *_ = cpu.evidence_cross_entropy(*arguments((torch.empty(2, 0), torch.empty(4, 0), prior), target))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(prior.expand(2, 4), target))


def test_memory_does_not_grow_with_rows_times_classes_times_units():
    """Workspace: two floats for each row and class."""
    assert _native._C.evidence_workspace(512, 100, 2048, 2048, 0) <= 2.1 * 512 * 100


@pytest.mark.parametrize("name, index", [("messages", 1), ("log_prior", 2)])
def test_errors_name_the_argument(name, index):
    inputs = list(sample("bernoulli", 5, 3, 6))
    inputs[index] = inputs[index].double()
    with pytest.raises(ValueError, match=f"{name} must have dtype and device of a"):
        cpu.evidence_cross_entropy(*arguments(inputs, torch.tensor([0, 1, 2, 0, 1])))
