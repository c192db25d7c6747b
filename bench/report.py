"""A table and a roofline plot from the JSON of the benchmarks.

usage: python bench/report.py RESULTS.json [OUTPUT_DIR]

RESULTS.json is what `pytest bench/ --benchmark-only --benchmark-json=RESULTS.json` wrote.  Prints Markdown tables with
one row for each case, and writes `table.md` and `roofline.png` to OUTPUT_DIR (default: beside RESULTS.json).  Gains are
median times of eager torch and of torch.compile over ours, peak memory is eager torch's over ours; small sizes have a
table of their own, whole networks `bench/report_training.py`.  The plot shows the bytes that a step must move against
the rate at which ours moves them, below the copy bandwidth of the same run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

OURS, OTHERS = "bllkern", ("eager", "compile")
HEAD = ("case", "ours", "× eager", "× compile", "memory × eager", "of copy bandwidth")
SMALL_HEAD = ("small sizes", "size", "ours", "× eager")


def cases(results: dict) -> dict[str, dict[str, dict]]:
    """The benchmarks by case (their group) and provider."""
    found: dict[str, dict[str, dict]] = {}
    for benchmark in results["benchmarks"]:
        if "which" in (benchmark["params"] or {}):
            found.setdefault(benchmark["group"], {})[benchmark["params"]["which"]] = benchmark
    return found


def _time(seconds: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.2f} {unit}"
    return f"{seconds * 1e6:.1f} µs"


def _row(case: str, providers: dict[str, dict]) -> tuple[str, ...]:
    ours = providers[OURS]
    median, info = ours["stats"]["median"], ours["extra_info"]
    gains = [f"{providers[p]['stats']['median'] / median:.2f}" if p in providers else "-" for p in OTHERS]
    peak = info["peak_memory_bytes"]
    eager_peak = providers.get("eager", {}).get("extra_info", {}).get("peak_memory_bytes")
    memory = f"{eager_peak / peak:.1f}" if eager_peak and peak else "-"
    bounds = f"{info['fraction_of_copy_bandwidth']:.0%}"
    if "bound" in info:
        bounds += f" ({info['bound']}: {info['fraction_of_bound']:.0%})"
    return case, _time(median), *gains, memory, bounds


def _small_sizes(results: dict):
    """Case, size and measurements of the benchmarks of small sizes, which measure several in turn."""
    for benchmark in results["benchmarks"]:
        for size, measured in benchmark["extra_info"].get("sizes", {}).items():
            yield benchmark["group"].removeprefix("small sizes: "), size, measured


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def table(results: dict) -> str:
    """The Markdown tables of what was run: ops, and ops at small sizes."""
    ops = [_row(case, providers) for case, providers in cases(results).items() if OURS in providers]
    small = [(case, size, _time(t["seconds"]), f"{t['gain']:.2f}") for case, size, t in _small_sizes(results)]
    return "\n\n".join(_markdown(head, rows) for head, rows in ((HEAD, ops), (SMALL_HEAD, small)) if rows)


def draw(results: dict, path: Path) -> None:
    """The roofline: bytes moved by a step against the rate of moving them, by provider."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    colors = {OURS: "tab:blue", "eager": "tab:gray", "compile": "tab:orange"}
    ceiling = 0.0
    for provider, color in colors.items():
        points = [
            p[provider] for p in cases(results).values() if provider in p and p[provider]["extra_info"]["bytes_moved"]
        ]
        moved = [point["extra_info"]["bytes_moved"] for point in points]
        rates = [size / point["stats"]["median"] / 1e9 for size, point in zip(moved, points, strict=True)]
        axes.plot(moved, rates, "o", color=color, alpha=0.7, label=provider)
        ceiling = max([ceiling, *(point["extra_info"]["copy_bytes_per_second"] / 1e9 for point in points)])
    axes.axhline(ceiling, color="black", linewidth=1, label="copy bandwidth")
    axes.set(xscale="log", yscale="log", xlabel="bytes a step must move", ylabel="GB/s")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str]) -> int:
    if not 1 <= len(arguments) <= 2 or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    source = Path(arguments[0])
    results = json.loads(source.read_text())
    output = Path(arguments[1]) if len(arguments) == 2 else source.parent
    output.mkdir(parents=True, exist_ok=True)
    text = table(results)
    (output / "table.md").write_text(text + "\n")
    draw(results, output / "roofline.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
