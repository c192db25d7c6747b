"""``bllkern reproduce``: a paper's table, published figures beside what is measured here, with backprop."""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import bllkern

from .. import models
from .checkpoint import write_atomically
from .data import Dataset, load
from .errors import UserError
from .journal import Journal
from .loop import Recipe
from .markdown import mean_and_spread, percent, table
from .published import NAMES, PAPERS, SCALES, Paper, Scale
from .train import device, train_through

UNMEASURED = "not measured"


def run(args: argparse.Namespace) -> int:
    paper, scale = PAPERS[args.paper], SCALES[args.paper, args.scale]
    if args.seeds is not None:
        scale = dataclasses.replace(scale, seeds=args.seeds)
    where, output = device(args), Path(args.output)
    name = f"{args.paper}-{args.scale}"
    methods = {m: dataclasses.asdict(bllkern.objectives.get(o, **options)) for m, (o, options) in paper.methods.items()}
    arguments = {"paper": paper.title, **scale.recipe, "device": where.type, "methods": methods}
    data = _data(scale, args.data_dir)
    journal = Journal(output / f"{name}.json", arguments)
    try:
        _train_all(paper, scale, data, journal, where)
    finally:  # what an interrupted command has measured is in the table too
        rows = _rows(paper, scale, journal.content["results"])
        text = _markdown(args, paper, scale, where, rows)
        journal.finish(table=rows, versions={"bllkern": bllkern.__version__, "torch": torch.__version__})
        write_atomically(output / f"{name}.md", text.encode())
        write_atomically(output / f"{name}.png", _plot(paper, args.scale, rows))
    print(f"{text}\n{output}: {name}.json, {name}.md, {name}.png")
    return 0


def _data(scale: Scale, folder: str | None) -> dict[tuple[str, str], Dataset]:
    """The data of every row that can be trained; what is missing is said.  Raises :class:`UserError` where all is."""
    found, missing = {}, {}
    chosen = {name: scale.recipe.get(name) for name in ("train_size", "test_size", "augment")}
    for row in scale.rows:
        try:
            found[row] = load(row[0], folder, **chosen)
        except UserError as error:
            missing[row] = error
    if not found:
        raise next(iter(missing.values()))
    for row, error in missing.items():
        print(f"bllkern reproduce: {' '.join(row)} is not measured: {error}", file=sys.stderr)
    return found


def _train_all(paper: Paper, scale: Scale, data: dict, journal: Journal, where: torch.device) -> None:
    """Every method on every row with every seed, one seed after the other, but for what the journal has."""
    cells = [(row, method, seed) for row in data for seed in range(scale.seeds) for method in paper.methods]
    epochs = scale.recipe["epochs"]
    with tqdm(total=len(cells) * epochs, disable=None, leave=False, unit="epoch") as bar:
        for count, (row, method, seed) in enumerate(cells, 1):
            what = ", ".join([*row, method, f"seed {seed}"])
            bar.set_description(what)
            train = partial(train_through, _recipe(paper, scale, row, method, seed), data[row], where, bar)
            result = journal.result(_key(row, method, seed), train)
            bar.update(count * epochs - bar.n)  # of those that are in the journal, or diverged
            bar.clear()
            error = "diverged" if result["accuracy"] is None else f"error {percent(1 - result['accuracy'], None)} %"
            print(f"{what}: {error}", flush=True)


def _recipe(paper: Paper, scale: Scale, row: tuple[str, str], method: str, seed: int) -> Recipe:
    data, model = row
    objective, options = paper.methods[method]
    cuts = models.default_cuts(model)
    what = {"data": data, "model": model, "objective": objective, "options": options, "cuts": cuts, "seed": seed}
    return Recipe(**scale.recipe, **what, schedule=None)


def _key(row: tuple[str, str], method: str, seed: int) -> str:
    return "/".join([*row, method, str(seed)])


def _rows(paper: Paper, scale: Scale, results: dict[str, dict]) -> list[dict]:
    """A row for each network, of the paper and of the scale: published errors, and measured ones as mean and spread."""
    rows = []
    for row in dict.fromkeys([*paper.published, *scale.rows]):
        measured = {}
        for method in paper.methods:
            keys = [_key(row, method, seed) for seed in range(scale.seeds)]
            accuracies = [results[key]["accuracy"] for key in keys if key in results]
            errors = [1 - accuracy for accuracy in accuracies if accuracy is not None]
            mean, spread = mean_and_spread(errors) if errors else (None, None)
            counts = {"seeds": len(errors), "diverged": len(accuracies) - len(errors)}
            measured[method] = {**counts, "error_mean": mean, "error_std": spread}
        published = dict(zip(paper.columns, paper.published.get(row, [None] * len(paper.columns))))
        rows.append({"data": row[0], "network": row[1], "published": published, "measured": measured})
    return rows


def _markdown(args: argparse.Namespace, paper: Paper, scale: Scale, where: torch.device, rows: list[dict]) -> str:
    head = ["", *(f"{column} (published)" for column in paper.columns), *paper.methods]
    lines = []
    for row in rows:
        published = ["-" if error is None else f"{error:.2f}" for error in row["published"].values()]
        measured = [_cell(cell, scale.seeds) for cell in row["measured"].values()]
        lines.append([f"{NAMES[row['data']]}, {row['network']}", *published, *measured])
    recipe = scale.recipe
    sizes = ["all" if recipe[size] is None else f"{recipe[size]:,}" for size in ("train_size", "test_size")]
    seeds = "one seed" if scale.seeds == 1 else f"mean and standard deviation over {scale.seeds} seeds"
    measured = (
        f"Measured: {sizes[0]} training and {sizes[1]} test samples, {recipe['epochs']} epochs, batches of "
        f"{recipe['batch_size']}, {_optimizer(recipe)}; {seeds}; torch {torch.__version__} on {where.type}. {scale.note}"
    )
    title = f"# {paper.title} at the scale `{args.scale}`"
    command = f"bllkern reproduce {args.paper} --scale {args.scale} --seeds {scale.seeds} --data-dir DIR"
    intro = f"`{command}`: test error in %. A dash: no published figure at hand."
    return "\n\n".join([title, intro, table(head, lines), measured.rstrip(), paper.note]) + "\n"


def _optimizer(recipe: dict) -> str:
    """Such as ``adamw, onecycle schedule, learning rate up to 0.004``."""
    name, schedule = recipe.get("optimizer", "adamw"), recipe.get("lr_schedule", "onecycle")
    return f"{name}, {schedule} schedule, learning rate up to {recipe['lr']:g}"


def _cell(measured: dict, seeds: int) -> str:
    done, diverged = measured["seeds"], measured["diverged"]
    if not done:
        return "diverged" if diverged else UNMEASURED
    partly = "" if done == seeds else f" ({done} of {seeds} seeds{f', {diverged} diverged' if diverged else ''})"
    return percent(measured["error_mean"], measured["error_std"]) + partly


def _plot(paper: Paper, name: str, rows: list[dict]) -> bytes:
    """The errors of every row, published ones hollow and measured ones filled, as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.42 * len(rows)), layout="constrained")
    labels = [f"{NAMES[row['data']]}, {row['network']}" for row in rows]
    methods = [*paper.columns, *paper.methods]
    for series, (method, colour) in enumerate(zip(methods, pyplot.cm.tab10.colors)):
        points = [_point(row, method) for row in rows]
        places = [(i + 0.6 * series / len(methods) - 0.3, *p) for i, p in enumerate(points) if p is not None]
        style = {"color": colour, "fillstyle": "none" if series < len(paper.columns) else "full"}
        label = method + (" (published)" if series < len(paper.columns) else "")
        y, x, spread = zip(*places) if places else ((), (), ())
        axes.errorbar(x, y, xerr=spread, fmt="o", markersize=5, capsize=2, label=label, **style)
    axes.set(yticks=range(len(rows)), yticklabels=labels, xlabel="test error (%)", title=f"{paper.title}, {name} scale")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    pyplot.close(figure)
    return content.getvalue()


def _point(row: dict, method: str) -> tuple[float, float] | None:
    """Error and spread in percent, if there is one; a spread that is not known is not a number, and not drawn."""
    if method in row["published"]:
        error, spread = row["published"][method], None
    else:
        error, spread = (row["measured"][method][key] for key in ("error_mean", "error_std"))
        error, spread = (value and 100 * value for value in (error, spread))
    return None if error is None else (error, math.nan if spread is None else spread)
