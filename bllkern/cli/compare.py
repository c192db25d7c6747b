"""``bllkern compare``: several objectives under one protocol, over several seeds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import bllkern

from .checkpoint import write_atomically, write_json
from .data import Dataset
from .errors import UserError, user_errors
from .journal import Journal
from .loop import Recipe
from .markdown import mean_and_spread, percent, table
from .measure import human_bytes, human_time
from .train import device, load_data, recipe_of, start

BASELINE = "backprop"
HEAD = (
    *("objective", "accuracy (%)", f"- {BASELINE}", "loss", f"/ {BASELINE}"),
    *("step time", f"/ {BASELINE}", "peak memory", f"/ {BASELINE}"),
)


def run(args: argparse.Namespace) -> int:
    recipes = _recipes(args)
    data = load_data(args)
    output, where = Path(args.output), device(args)
    for recipe in recipes.values():  # what the library refuses, it refuses before hours of training
        start(recipe, data, where)
    protocol = _protocol(args, data, where)
    report = {
        "protocol": protocol,
        "objectives": {name: {"options": recipe.options, "runs": []} for name, recipe in recipes.items()},
    }
    journal = Journal(
        output / "compare.journal.json", {k: v for k, v in protocol.items() if k not in ("seed", "seeds")}
    )
    total = args.epochs * args.seeds * len(recipes)
    with tqdm(total=total, disable=None, leave=False, unit="epoch") as bar:
        for seed in range(args.seed, args.seed + args.seeds):
            for name, recipe in recipes.items():
                bar.set_description(f"{name}, seed {seed}")
                chosen = dataclasses.replace(recipe, seed=seed)
                key = json.dumps([name, dataclasses.asdict(bllkern.objectives.get(name, **recipe.options)), seed])
                run = journal.result(key, partial(_one, chosen, data, where, bar))
                report["objectives"][name]["runs"].append(run)
                bar.clear()
                print(f"{name:16} seed {seed}  {_describe(run)}", flush=True)
    for name, entry in report["objectives"].items():
        entry["summary"] = _summary(entry["runs"])
    _add_ratios(report["objectives"])
    write_json(output / "compare.json", report)
    text = _markdown(report)
    write_atomically(output / "compare.md", text.encode())
    print("\n" + text)
    _draw(report, output / "compare.png")
    print(f"{output}: compare.json, compare.md, compare.png")
    return 0


def _recipes(args: argparse.Namespace) -> dict[str, Recipe]:
    options: dict[str, dict] = {name: {} for name in args.objectives}
    for qualified, value in args.option.items():
        name, dot, option = qualified.partition(".")
        if not dot or name not in options:
            raise UserError(f"--option must be OBJECTIVE.NAME=VALUE with one of {args.objectives}, got {qualified!r}")
        options[name][option] = value
    recipes = {name: recipe_of(args, name, options[name]) for name in args.objectives}
    with user_errors("--option"):
        isolated = {name: bllkern.objectives.get(name, **options[name]).isolate for name in recipes}
    # the baselines that do not isolate know one schedule only
    return {n: r if isolated[n] else dataclasses.replace(r, schedule=None) for n, r in recipes.items()}


def _protocol(args: argparse.Namespace, data: Dataset, where: torch.device) -> dict:
    """Everything that the results depend on beyond the objective."""
    recipe = dataclasses.asdict(recipe_of(args, BASELINE, {}))
    sizes = {"train_size": len(data.train_x), "test_size": len(data.test_x), "seeds": args.seeds}
    machine = {"device": str(where), "threads": torch.get_num_threads()}
    versions = {"torch": torch.__version__, "bllkern": bllkern.__version__}
    held_out = {"held_out": data.held_out}
    return (
        {k: v for k, v in recipe.items() if k not in ("objective", "options")} | sizes | held_out | machine | versions
    )


def _one(recipe: Recipe, data: Dataset, where: torch.device, bar: tqdm) -> dict:
    training = start(recipe, data, where)
    for _ in range(recipe.epochs):
        training.train_epoch(lambda loss: None)
        bar.update()
    return {"seed": recipe.seed, **training.results()}


def _describe(run: dict) -> str:
    return (
        f"accuracy {run['accuracy']:.2%}, loss {run['loss']:.4f}, {human_time(run['seconds'])}, "
        f"step {human_time(run['step_seconds'])}, peak memory {human_bytes(run['peak_bytes'])}"
    )


def _summary(runs: list[dict]) -> dict:
    """Over the seeds: mean and standard deviation of the accuracy, mean loss, medians of step time and peak memory."""
    mean, std = mean_and_spread([run["accuracy"] for run in runs])
    return {
        "accuracy_mean": mean,
        "accuracy_std": std,
        "loss_mean": statistics.fmean(run["loss"] for run in runs),
        "step_seconds": statistics.median(run["step_seconds"] for run in runs),
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
    }


def _add_ratios(objectives: dict[str, dict]) -> None:
    """Accuracy as difference to backprop's; loss, step time and memory as multiples of its; where it was trained too."""
    baseline = objectives.get(BASELINE, {}).get("summary")
    for entry in objectives.values():
        s = entry["summary"]
        s["accuracy_difference"] = s["accuracy_mean"] - baseline["accuracy_mean"] if baseline else None
        for name in ("loss_mean", "step_seconds", "peak_bytes"):
            s[f"{name}_ratio"] = s[name] / baseline[name] if baseline else None


def _markdown(report: dict) -> str:
    """The protocol in a sentence, and a row for each objective."""
    protocol = report["protocol"]
    rows = [_row(name, entry["summary"]) for name, entry in report["objectives"].items()]
    cuts = protocol["cuts"] if isinstance(protocol["cuts"], int) else f"{len(protocol['cuts']) + 1}"
    precision = ", bfloat16 autocast" if protocol["autocast"] else ""
    settings = (
        f"{protocol['model']} in {cuts} blocks on {protocol['data']}: {protocol['train_size']:,} training and "
        f"{protocol['test_size']:,} {protocol['held_out']} samples, {protocol['epochs']} epochs, batches of "
        f"{protocol['batch_size']}, {protocol['optimizer']} ({protocol['lr_schedule']}, learning rate up to "
        f"{protocol['lr']:g}), {protocol['seeds']} seeds; torch {protocol['torch']} on {protocol['device']}, "
        f"threads: {protocol['threads']}{precision}."
    )
    return f"{settings}\n\n{table(HEAD, rows)}\n"


def _row(name: str, s: dict) -> tuple[str, ...]:
    difference = "-" if s["accuracy_difference"] is None else f"{100 * s['accuracy_difference']:+.2f}"
    ratios = (s[f"{key}_ratio"] for key in ("loss_mean", "step_seconds", "peak_bytes"))
    loss, seconds, memory = ("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
    accuracy = percent(s["accuracy_mean"], s["accuracy_std"]), difference, f"{s['loss_mean']:.4f}", loss
    return (name, *accuracy, human_time(s["step_seconds"]), seconds, human_bytes(s["peak_bytes"]), memory)


def _draw(report: dict, path: Path) -> None:
    """Accuracy of every seed with its mean, and peak memory, one row per objective."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    objectives, protocol = report["objectives"], report["protocol"]
    names = list(objectives)[::-1]  # matplotlib's axis points up
    size = (9, 1.8 + 0.45 * len(names))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for row, name in enumerate(names):
        summary = objectives[name]["summary"]
        seeds = [100 * run["accuracy"] for run in objectives[name]["runs"]]
        mean, mebibytes = 100 * summary["accuracy_mean"], summary["peak_bytes"] / 2**20
        left.plot(seeds, [row] * len(seeds), "o", color="tab:blue", alpha=0.5, label="one seed" if row == 0 else None)
        left.plot(mean, row, "|", color="black", markersize=22, markeredgewidth=2, label="mean" if row == 0 else None)
        left.annotate(f"{mean:.1f}", (mean, row), (0, 12), textcoords="offset points", ha="center", fontsize=9)
        right.barh(row, mebibytes, color="tab:orange", height=0.55)
        right.annotate(f" {human_bytes(summary['peak_bytes'])}", (mebibytes, row), va="center", fontsize=9)
    left.set(
        yticks=range(len(names)),
        yticklabels=names,
        xlabel=f"{protocol['held_out']} accuracy (%)",
        ylim=(-0.6, len(names) - 0.3),
    )
    left.grid(axis="x", alpha=0.3)
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, fontsize=9, markerscale=0.5)
    right.set(xlabel="peak memory of a step (MiB)")
    right.margins(x=0.25)
    right.tick_params(axis="y", length=0)
    figure.suptitle(
        f"{protocol['model']} on {protocol['data']}: {protocol['train_size']:,} training samples, "
        f"{protocol['epochs']} epochs, {protocol['seeds']} seeds",
        fontsize=11,
    )
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    pyplot.close(figure)
    write_atomically(path, content.getvalue())
