"""Plots of what training steps cost, from the JSON of bench_training.py and bench_depth.py.

usage: python bench/report_training.py RESULTS.json [OUTPUT_DIR]

RESULTS.json is what `pytest bench/ -k "training or depth" --benchmark-only --benchmark-json=RESULTS.json` wrote.
Prints a Markdown table of the ratios to backprop, and writes `training.md`, `time_against_memory.png` and
`memory_against_depth.png` to OUTPUT_DIR (default: beside RESULTS.json).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

MARKERS = {"backprop": "s", "checkpointing": "D"}


def by_key(results: dict, key: str) -> dict[str, dict]:
    """``extra_info`` of the benchmarks that measured ``key``, by their group."""
    return {b["group"]: b["extra_info"] for b in results["benchmarks"] if key in b["extra_info"]}


def table(results: dict) -> str:
    """The Markdown table: a row for each case and variant."""
    rows = [("case", "variant", "step", "time", "peak memory"), ("---",) * 5]
    for group, info in by_key(results, "variants").items():
        for variant, found in info["variants"].items():
            ratios = f"{found['time_ratio']:.2f}", f"{found['memory_ratio']:.2f}"
            rows.append((group, variant, f"{found['step_seconds'] * 1e3:.1f} ms", *ratios))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw_time_against_memory(axes, results: dict) -> None:
    """A point for each case (colour) and variant, as ratios to backprop; schedules other than immediate are hollow."""
    for i, (group, info) in enumerate(by_key(results, "variants").items()):
        for variant, found in info["variants"].items():
            point = found["memory_ratio"], found["time_ratio"]
            color = f"C{i}"
            axes.plot(*point, MARKERS.get(variant, "o"), color=color, fillstyle="none" if " " in variant else "full")
            axes.annotate(variant, point, (4, 3), textcoords="offset points", fontsize=6)
        axes.plot([], [], "o", color=f"C{i}", label=group)
    axes.set(xlabel="peak memory of a step / backprop's", ylabel="time of a step / backprop's", xlim=(0, None))
    axes.legend(frameon=False, fontsize=7)


def draw_memory_against_depth(axes, results: dict) -> None:
    """A line for each variant of each group."""
    for group, info in by_key(results, "depths").items():
        for variant, peaks in info["peak_memory_bytes"].items():
            axes.plot(info["depths"], [peak / 2**20 for peak in peaks], "o-", label=variant)
        axes.set_title(group, fontsize=9)
    axes.set(xlabel="residual units, a boundary after each", ylabel="peak memory of a step, MiB", ylim=(0, None))
    if axes.lines:
        axes.legend(frameon=False)


def main(arguments: list[str]) -> int:
    if not 1 <= len(arguments) <= 2 or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    source = Path(arguments[0])
    results = json.loads(source.read_text())
    output = Path(arguments[1]) if len(arguments) == 2 else source.parent
    output.mkdir(parents=True, exist_ok=True)
    for draw, name in (
        (draw_time_against_memory, "time_against_memory"),
        (draw_memory_against_depth, "memory_against_depth"),
    ):
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        draw(axes, results)
        axes.grid(alpha=0.3)
        figure.savefig(output / f"{name}.png", dpi=150)
        pyplot.close(figure)
    (output / "training.md").write_text(table(results) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
