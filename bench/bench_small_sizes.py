"""Small sizes, where a call costs more than its arithmetic: every op next to eager torch, 16 to 4,096 elements.

Eager torch and ours take turns in one process.  Times are of the calling thread, which other processes do not lengthen,
with one thread, as nothing of these sizes is worth two; ``extra_info["sizes"]`` holds the median times of each size in
seconds and how much longer eager torch takes.
"""

import functools
import time
from statistics import median

import bench_agreement
import bench_evidence_cross_entropy
import bench_gram
import bench_linear_agreement
import bench_linear_cross_entropy
import bench_prototypes
import pytest
import torch
from torch import Tensor

from bllkern import families
from bllkern.functional import (
    agreement,
    decorrelation,
    evidence_cross_entropy,
    linear_cross_entropy,
    prototypes,
    similarity_matching,
)

from common import step

ROUNDS, CALLS = 11, 20
FAMILIES = ["bernoulli", "gaussian", "gaussian_learned", "poisson", "categorical", "categorical:16"]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def messages(name: str, *shape: int) -> Tensor:
    return families.get(name).natural(0.5 * normal(*shape))


def of_agreement(name, rows, width):
    inputs = messages(name, rows, width), messages(name, rows, width)
    return functools.partial(bench_agreement.plain, name), lambda a, b: agreement(a, b, name), inputs


def of_evidence(name, rows, classes, width):
    inputs = messages(name, rows, width), messages(name, classes, width), torch.randint(classes, (rows,))
    plain = functools.partial(bench_evidence_cross_entropy.plain, name)
    return plain, lambda a, b, target: evidence_cross_entropy(a, b, target, name), inputs


def of_linear_agreement(rows, width, inner):
    inputs = normal(rows, inner), normal(width, inner) / inner**0.5, normal(width), normal(rows, width)
    return bench_linear_agreement.plain, bench_linear_agreement.ours, inputs


def of_linear_cross_entropy(rows, width, classes):
    inputs = normal(rows, width), normal(classes, width) / width**0.5, normal(classes), torch.randint(classes, (rows,))
    return bench_linear_cross_entropy.plain, linear_cross_entropy, inputs


def of_gram(target, rows, width):
    known = {"labels": torch.randint(10, (rows,)), "rows": normal(rows, 10), "none": None}[target]
    ours = decorrelation if known is None else lambda x: similarity_matching(x, known)
    return lambda x: bench_gram.plain(x, known), ours, (normal(rows, width),)


def of_prototypes(rows, width):
    target = torch.randint(10, (rows,))
    plain = lambda x: bench_prototypes.plain(x, target, 10).sum()  # noqa: E731
    return plain, lambda x: prototypes(x, target, 10)[0].sum(), (normal(rows, width),)


ROWS = [(1, 16), (4, 16), (16, 64), (64, 64), (16, 256)]
EVIDENCE = [(1, 2, 16), (4, 4, 16), (16, 10, 16), (4, 10, 64), (8, 4, 128)]
LINEAR = [(1, 16, 16), (16, 16, 16), (16, 64, 64), (16, 256, 64)]
HEADS = [(1, 16, 2), (16, 16, 10), (64, 64, 10), (16, 64, 100), (32, 128, 100)]
CASES = {  # what makes formula, our function and inputs, its first arguments, sizes
    **{f"agreement {name}": (of_agreement, (name,), ROWS) for name in FAMILIES},
    **{f"evidence_cross_entropy {name}": (of_evidence, (name,), EVIDENCE) for name in FAMILIES},
    "linear_agreement bernoulli": (of_linear_agreement, (), LINEAR),
    "linear_cross_entropy": (of_linear_cross_entropy, (), HEADS),
    "similarity_matching labels": (of_gram, ("labels",), ROWS),
    "similarity_matching rows": (of_gram, ("rows",), ROWS),
    "decorrelation": (of_gram, ("none",), ROWS),
    "prototypes": (of_prototypes, (), ROWS),
}


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seconds(run) -> float:
    start = time.thread_time()
    for _ in range(CALLS):
        run()
    return (time.thread_time() - start) / CALLS


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("case", CASES)
def test_small_sizes(benchmark, one_thread, case, direction):
    torch.manual_seed(0)
    make, first, sizes = CASES[case]
    runs = {}
    for size in sizes:
        plain, ours, inputs = make(*first, *size)
        runs[str(size)] = [step(function, inputs, direction != "forward") for function in (plain, ours)]
    times = {size: ([], []) for size in runs}

    def round_of_all():
        for size, pair in runs.items():
            for run, measured in zip(pair, times[size], strict=True):
                measured.append(seconds(run))

    benchmark.group = f"small sizes: {case} {direction}"
    benchmark.pedantic(round_of_all, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["sizes"] = {
        size: {"eager_seconds": median(eager), "seconds": median(ours), "gain": median(eager) / median(ours)}
        for size, (eager, ours) in times.items()
    }
