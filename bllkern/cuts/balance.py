"""Cutting into blocks of similar cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from .structure import Unit, units


def even(net: nn.Module, blocks: int, inputs: tuple = (), balance: str = "flops") -> list[str]:
    """Cuts after which ``net`` falls into ``blocks`` blocks of similar cost; see :func:`bllkern.convert`.

    Raises ``ValueError`` for fewer than 1 block or more than there are layers, for another ``balance``, and for
    ``"memory"`` without inputs to measure it on.
    """
    if balance not in COSTS:
        raise ValueError(f"balance must be one of {sorted(COSTS)}, got {balance!r}")
    if balance == "memory" and not inputs:
        raise ValueError("balance='memory' needs example=, an input of the batch size to train with")
    pieces = units(net, inputs)
    if isinstance(blocks, bool) or not 1 <= blocks <= len(pieces):
        raise ValueError(
            f"cuts: the number of blocks must be from 1 to {len(pieces)}, the layers in a row, got {blocks}"
        )
    return [pieces[end - 1].names[-1] for end in balanced(pieces, blocks, COSTS[balance])]


def _flops(units: Sequence[Unit]) -> float:
    return sum(unit.flops for unit in units)


def _peak_memory(units: Sequence[Unit]) -> float:
    """Bytes that a block of these units takes at most while it learns (schedule ``"immediate"``).

    The backward pass goes from the last unit to the first; what earlier units keep is there still, and so are the
    gradients of later ones.  Three gradients of the size of a unit's activation are in flight: by its output,
    by its input, and one between (torch's batch norm on the CPU allocates it twice).
    """
    peak, gradients = 0, 0
    for count in range(len(units), 0, -1):
        unit = units[count - 1]
        gradients += unit.gradients
        kept: dict[int, int] = {}
        for earlier in units[:count]:
            kept |= earlier.saved
        peak = max(peak, sum(kept.values()) + gradients + 3 * unit.output)
    return peak


COSTS = {"flops": _flops, "memory": _peak_memory}


def balanced(pieces: Sequence, blocks: int, cost: Callable[[Sequence], float]) -> list[int]:
    """Ends of all blocks but the last that make the block of the highest ``cost`` cheapest (dynamic programming)."""
    best = {(0, 0): (0.0, [])}
    for start in range(len(pieces)):
        for end in range(start + 1, len(pieces) + 1):
            price = cost(pieces[start:end])
            for count in range(blocks):
                if (start, count) in best:
                    option = max(best[start, count][0], price), [*best[start, count][1], end]
                    best[end, count + 1] = min(best.get((end, count + 1), option), option, key=lambda o: o[0])
    return best[len(pieces), blocks][1][:-1]
