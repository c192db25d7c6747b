"""Search of a cut and a head: the candidates, which of them to go on with, and how a cut carries over to a relative.

How a candidate is trained and scored is the caller's: ``bllkern split`` trains on one part of the training data and
scores on another.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ..objectives.heads import HEADS
from .structure import units

POOLS = (1, 2, 4)
CHOICES = tuple(head for head in HEADS if head != "auto")  # which is one of the others at every cut
DRAWS = 20  # for every candidate, so that those drawn twice or refused are made up for
FACTOR = 3  # of every so many candidates one goes on, to train so many times longer


@dataclass(frozen=True)
class Candidate:
    """Cuts, and the ``head`` and ``pool`` of the objective at all of them."""

    cuts: tuple[str, ...]
    head: str
    pool: int


def places(net: nn.Module, example: Tensor, takes: Callable[[str, str], bool]) -> dict[str, list[str]]:
    """Modules of ``net`` after which a block can end, each with the heads that go there: ``takes(module, head)``."""
    ends = [unit.names[-1] for unit in units(net, (example,))[:-1]]
    return {end: [head for head in CHOICES if takes(end, head)] for end in ends}


def sample(places: dict[str, list[str]], blocks: int, count: int, seed: int) -> list[Candidate]:
    """Up to ``count`` different candidates for so many blocks, drawn at random; fewer where there are hardly more.

    Raises ``ValueError`` for fewer than 2 blocks, or more than there are places for.
    """
    if not 2 <= blocks <= len(places) + 1:
        raise ValueError(f"the number of blocks must be from 2 to {len(places) + 1}, got {blocks}")
    names, draw, found = list(places), random.Random(seed), {}
    for _ in range(DRAWS * count):
        cuts = tuple(names[i] for i in sorted(draw.sample(range(len(names)), blocks - 1)))
        heads = [head for head in CHOICES if all(head in places[cut] for cut in cuts)]
        if heads and len(found) < count:
            found[Candidate(cuts, draw.choice(heads), draw.choice(POOLS))] = None
    return list(found)


def rungs(count: int, epochs: int) -> list[tuple[int, int]]:
    """Candidates and their epochs at each rung of successive halving (Jamieson and Talwalkar, arXiv 1502.07943).

    The last rung trains for ``epochs``; the first for at least one.
    """
    steps = int(math.log(epochs, FACTOR) + 1e-9)
    return [(math.ceil(count / FACTOR**i), max(1, epochs // FACTOR ** (steps - i))) for i in range(steps + 1)]


def halving(candidates: list[Candidate], epochs: int, score: Callable[[Candidate, int], float | None]) -> Candidate:
    """The best of the candidates that reach the last rung.

    ``score(candidate, epochs)`` trains for so many epochs; larger is better, ``None`` drops the candidate.
    Raises ``ValueError`` where every candidate is dropped.
    """
    for count, length in rungs(len(candidates), epochs):
        scores = {candidate: score(candidate, length) for candidate in candidates[:count]}
        kept = [candidate for candidate in scores if scores[candidate] is not None]
        candidates = sorted(kept, key=scores.get, reverse=True)  # stable: of equals, the first drawn
    if not candidates:
        raise ValueError("every candidate is over the budget or has diverged")
    return candidates[0]


def transfer(cuts: list[str], source: nn.Module, target: nn.Module, example: Tensor) -> list[str]:
    """Cuts of ``target`` at the places of ``cuts`` in its relative ``source``.

    A stage is what lies in one container (``layer1`` of a residual network).  A cut keeps its stage, and goes after the
    unit at which the share of the stage's cost (operations on ``example``) that has been spent is nearest.

    Raises: ``ValueError`` for a cut that is not one of ``source``, a stage that ``target`` lacks, or two cuts that fall
    on one place.
    """
    here, there = _positions(source, example), _positions(target, example)
    found = []
    for cut in cuts:
        inside = [place for place in here if any(name == cut or name.startswith(cut + ".") for name in place.unit)]
        if not inside:
            raise ValueError(f"cuts: {cut!r} is not a place to cut the source, which are {[p.unit[-1] for p in here]}")
        stage = [place for place in there if place.stage == inside[-1].stage]
        if not stage:
            raise ValueError(f"cuts: the network has no stage {inside[-1].stage!r}, in which {cut!r} lies")
        found.append(min(stage, key=lambda place: abs(place.share - inside[-1].share)).unit[-1])
    if len(set(found)) < len(found):
        raise ValueError(f"cuts: of {cuts} two fall on one place: {found}")
    return found


@dataclass(frozen=True)
class _Place:
    """The end of a unit: its stage, and the share of the stage's cost up to there."""

    unit: list[str]
    stage: str
    share: float


def _positions(net: nn.Module, example: Tensor) -> list[_Place]:
    found = units(net, (example,))
    costs = [max(unit.flops, 1.0) for unit in found]
    stages = [unit.names[0].rpartition(".")[0] for unit in found]
    totals = {stage: sum(c for c, s in zip(costs, stages) if s == stage) for stage in stages}
    spent, positions = dict.fromkeys(totals, 0.0), []
    for unit, cost, stage in zip(found, costs, stages):
        spent[stage] += cost
        positions.append(_Place(unit.names, stage, spent[stage] / totals[stage]))
    return positions[:-1]
