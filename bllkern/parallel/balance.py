"""Which blocks go to which rank: seconds that each block takes to learn, measured, and runs of similar cost."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor, nn

from ..cuts import balanced
from ..execution.targets import targets
from ..network import boundaries


def block_seconds(
    net: nn.Module,
    inputs: tuple,
    y: Tensor,
    loss: Callable,
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Median seconds of forward pass and local learning of each block, the output block last, over ``repeats`` runs.

    ``net`` stays as it is, and so do the random numbers of torch.
    """
    net = copy.deepcopy(net).train()
    marks: list[float] = []
    for boundary in boundaries(net).values():
        boundary.schedule = "eager"
        boundary.register_forward_hook(lambda *_: marks.append(clock()))
    runs = []
    with torch.random.fork_rng():
        for _ in range(repeats + 1):
            marks[:] = [clock()]
            with targets(y):
                loss(net(*inputs), y).backward()
            marks.append(clock())
            runs.append([after - before for before, after in pairwise(marks)])
            net.zero_grad()
    return [median(seconds) for seconds in zip(*runs[1:])]


def assign(costs: list[float], ranks: int) -> list[int]:
    """The first block of each rank, and the number of blocks: runs of which the most expensive is cheapest.

    Raises ``ValueError`` for more ranks than blocks.
    """
    if ranks > len(costs):
        raise ValueError(f"mesh must have at most {len(costs)} ranks for blocks, as many as there are, got {ranks}")
    return [0, *balanced(costs, ranks, sum), len(costs)]


def named(after: Sequence[str], names: list[str], ranks: int) -> list[int]:
    """As :func:`assign`, where each rank but the last ends with the block of that name.  Raises ``ValueError``."""
    unknown = [name for name in after if name not in names[:-1]]
    if unknown:
        raise ValueError(f"after must name blocks of {names[:-1]}, got {unknown}")
    starts = [0, *(names.index(name) + 1 for name in after), len(names)]
    if len(after) != ranks - 1 or starts != sorted(set(starts)):
        raise ValueError(f"after must name the last blocks of {ranks - 1} ranks in order, got {list(after)}")
    return starts
