"""Tables that are read as well in a terminal as in a rendered page, and the numbers in them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]

    def line(cells):
        aligned = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:]))]
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation, which is ``None`` for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def percent(mean: float, spread: float | None) -> str:
    """Such as ``69.87 ± 0.53``."""
    return f"{100 * mean:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")
