"""``bllkern split``: where to cut a network, and the head to learn through, found by training on a part of the data."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import bllkern

from ..cuts import balance, search
from ..cuts import file as cuts_file
from ..cuts.file import CutsFile
from ..cuts.search import Candidate
from ..objectives import Objective
from .checkpoint import write_json
from .data import Dataset, hold_out
from .errors import UserError, user_errors
from .journal import Journal
from .loop import Recipe, build
from .markdown import mean_and_spread, percent, table
from .train import device, load_data, recipe_of, train_through

VALIDATION_SHARE = 5  # one training image in so many is held out to choose by
BY_LAYERS, BY_COST, COST_FOUND = "even by layers", "even by cost", "even by cost, found head"
FOUND, TRANSFERRED = "found by search", "transferred"


def run(args: argparse.Namespace) -> int:
    shallow = _shallow(args)
    recipe = _recipe(args, shallow)
    data = load_data(args)
    objective = _objective(recipe)
    net = build(recipe, data)
    example = data.train_x[:2]
    places = places_of(net, objective, example)
    with user_errors("--blocks"):
        candidates = search.sample(places, recipe.cuts, args.candidates, args.seed)
        evens = {BY_LAYERS: balance.even(net, recipe.cuts), BY_COST: balance.even(net, recipe.cuts, (example,))}
    rows = {name: Candidate(tuple(cuts), objective.head, objective.pool) for name, cuts in evens.items()}
    if shallow is not None:
        source = build(dataclasses.replace(recipe, model=shallow.model), data)
        rows[TRANSFERRED] = _transferred(shallow, source, net, example)
    with tqdm(total=_epochs(args, len(candidates), len(rows)), disable=None, leave=False, unit="epoch") as bar:
        trainer = Trainer(args, recipe, data, bar)
        if candidates:
            direct = [rows[BY_LAYERS], rows[BY_COST], *candidates]  # what is transferred is not searched
            first = list(dict.fromkeys(direct))[: len(candidates)]
            with user_errors("--max-time-ratio, --max-memory-ratio"):
                rows[FOUND] = search.halving(first, args.epochs, trainer.score)
            other = dataclasses.replace(rows[FOUND], cuts=rows[BY_COST].cuts)
            if other not in rows.values() and all(other.head in places[cut] for cut in other.cuts):
                rows[COST_FOUND] = other
        report = {name: trainer.test(candidate) for name, candidate in rows.items()}
    summary = {"protocol": trainer.protocol, "candidates": len(candidates), "table": report, **_verdicts(report)}
    chosen = rows[TRANSFERRED if TRANSFERRED in rows else FOUND]
    options = {name: value for name, value in recipe.options.items() if name not in ("head", "pool")}
    cuts = list(chosen.cuts)
    file = CutsFile(recipe.model, cuts, recipe.objective, chosen.head, chosen.pool, options, summary)
    write_json(Path(args.output), file.content())
    print("\n".join([_table(report), "", *_verdicts(report).values(), f"\n{args.output}: take it with --cuts"]))
    return 0


def places_of(net: nn.Module, objective: Objective, example: torch.Tensor) -> dict[str, list[str]]:
    """Modules of ``net`` after which a block can end, each with the heads that ``objective`` takes there."""

    def takes(cut: str, head: str) -> bool:
        try:
            bllkern.convert(net, [cut], 2, dataclasses.replace(objective, head=head), example=example)
        except ValueError:  # a convolution where there is no map; a head that does not go with another option
            return False
        return True

    return search.places(net, example, takes)


def _shallow(args: argparse.Namespace) -> CutsFile | None:
    """The file to transfer from; then the number of blocks is its own."""
    if args.source is None:
        if args.blocks is None:
            raise UserError("--blocks K is needed, or --from FILE")
        if not args.candidates:
            raise UserError("--candidates 0 searches nothing: it needs --from FILE")
        return None
    with user_errors("--from"):
        file = cuts_file.read(args.source)
    blocks = len(file.cuts) + 1
    if args.blocks not in (None, blocks):
        raise UserError(f"--blocks must be {blocks}, as in {args.source}, got {args.blocks}")
    return file


def _recipe(args: argparse.Namespace, shallow: CutsFile | None) -> Recipe:
    """What every candidate is trained with; ``cuts`` is the number of blocks."""
    if shallow is None:
        args.cuts = args.blocks
        return recipe_of(args, args.objective, {**args.preset_options, **args.option})
    args.cuts = Path(args.source)
    recipe = recipe_of(args, args.objective, {**args.preset_options, **args.option})
    options = {n: v for n, v in recipe.options.items() if n not in ("head", "pool") or n in args.option}
    return dataclasses.replace(recipe, cuts=len(shallow.cuts) + 1, options=options)


def _objective(recipe: Recipe) -> bllkern.objectives.Objective:
    with user_errors("--option"):
        return bllkern.objectives.get(recipe.objective, **recipe.options)


def _transferred(shallow: CutsFile, source: nn.Module, net: nn.Module, example: torch.Tensor) -> Candidate:
    with user_errors("--from"):
        cuts = search.transfer(shallow.cuts, source, net, example)
    return Candidate(tuple(cuts), shallow.head, shallow.pool)


def _epochs(args: argparse.Namespace, candidates: int, rows: int) -> int:
    """Epochs to train for, all in all, at most; one of backprop for its cost."""
    searched = sum(count * epochs for count, epochs in search.rungs(candidates, args.epochs)) if candidates else 0
    return 1 + searched + args.seeds * args.epochs * (rows + 2 * bool(candidates))


class Trainer:
    """Trains candidates, and keeps what came out in the journal beside ``--output``.

    To choose, it trains on a part of the training images and scores on the rest of them; test images are for the
    final table only.
    """

    def __init__(self, args: argparse.Namespace, recipe: Recipe, data: Dataset, bar: tqdm):
        self.recipe, self.args, self.where, self.bar, self.epochs = recipe, args, device(args), bar, 0
        self.parts = {"validation": held_out(data), "test": data}
        sizes = {"train_size": len(data.train_x), "test_size": len(data.test_x)}
        fixed = {k: v for k, v in vars(recipe).items() if k not in ("cuts", "epochs", "seed")}
        fixed |= {**sizes, "device": str(self.where), "options": dataclasses.asdict(_objective(recipe))}
        path = Path(args.output)
        self.journal = Journal(path.with_name(path.stem + ".journal.json"), fixed)
        self.protocol = {**fixed, "epochs": args.epochs, "seed": args.seed, "seeds": args.seeds}

    def score(self, candidate: Candidate, epochs: int) -> float | None:
        """Validation accuracy; ``None`` where training diverges or costs more than the budget."""
        result = self._result("validation", self._recipe_of(candidate, epochs, self.args.seed))
        if result["accuracy"] is None:
            return None
        limits = {"step_seconds": self.args.max_time_ratio, "peak_bytes": self.args.max_memory_ratio}
        for cost, limit in limits.items():
            if limit is not None and result[cost] > limit * self.backprop[cost]:
                return None
        return result["accuracy"]

    def test(self, candidate: Candidate) -> dict:
        """Test accuracy over the seeds, trained on all training images, and the cost as multiples of backprop's."""
        seeds = range(self.args.seed, self.args.seed + self.args.seeds)
        runs = [self._result("test", self._recipe_of(candidate, self.args.epochs, seed)) for seed in seeds]
        if any(run["accuracy"] is None for run in runs):
            raise FloatingPointError(f"the training of {candidate} has diverged")
        mean, std = mean_and_spread([run["accuracy"] for run in runs])
        ratios = {
            f"{cost}_ratio": statistics.median(run[cost] for run in runs) / self.backprop[cost]
            for cost in ("step_seconds", "peak_bytes")
        }
        return {**dataclasses.asdict(candidate), "accuracy_mean": mean, "accuracy_std": std, **ratios, "runs": runs}

    def _recipe_of(self, candidate: Candidate, epochs: int, seed: int) -> Recipe:
        options = {**self.recipe.options, "head": candidate.head, "pool": candidate.pool}
        return dataclasses.replace(self.recipe, cuts=list(candidate.cuts), options=options, epochs=epochs, seed=seed)

    @cached_property
    def backprop(self) -> dict:
        """What an epoch of backprop costs."""
        recipe = dataclasses.replace(self.recipe, objective="backprop", options={}, schedule=None, epochs=1)
        return self._result("validation", recipe)

    def _result(self, part: str, recipe: Recipe) -> dict:
        chosen = [part, recipe.objective, recipe.options, recipe.cuts, recipe.epochs, recipe.seed]
        train = partial(train_through, recipe, self.parts[part], self.where, self.bar)
        result = self.journal.result(json.dumps(chosen), train)
        self.epochs += recipe.epochs
        self.bar.update(self.epochs - self.bar.n)  # of those that are in the journal, or diverged
        self.bar.clear()
        print(_line(part, recipe, result), flush=True)
        return result


def _line(part: str, recipe: Recipe, result: dict) -> str:
    """Such as ``validation  38.33 %  2 epochs  seed 0  layer1.1, layer2.0; mlp, pool 1``."""
    accuracy = "diverged" if result["accuracy"] is None else f"{percent(result['accuracy'], None)} %"
    what = recipe.objective
    if isinstance(recipe.cuts, list):
        what = f"{', '.join(recipe.cuts)}; {recipe.options['head']}, pool {recipe.options['pool']}"
    return f"{part:10} {accuracy:>8}  epochs {recipe.epochs}  seed {recipe.seed}  {what}"


def held_out(data: Dataset) -> Dataset:
    """One in ``VALIDATION_SHARE`` of the training images in place of the test images."""
    train, chosen = hold_out(data.train_x, data.train_y, len(data.train_x) // VALIDATION_SHARE)
    return dataclasses.replace(data, train_x=train[0], train_y=train[1], test_x=chosen[0], test_y=chosen[1])


def kept(report: dict[str, dict]) -> float | None:
    """Share of the direct search's gain over the better even cut that the transferred cut keeps, if there is a gain."""
    means = {name: row["accuracy_mean"] for name, row in report.items()}
    if not {FOUND, TRANSFERRED} <= means.keys():
        return None
    even = max(means[BY_LAYERS], means[BY_COST])
    gain = means[FOUND] - even
    return (means[TRANSFERRED] - even) / gain if gain > 0 else None


def _verdicts(report: dict[str, dict]) -> dict[str, str]:
    """What the table shows, in words."""
    better = {name: _better_than_even(name, report) for name in (FOUND, TRANSFERRED) if name in report}
    words = {
        None: "no spread to compare with, with one seed",
        True: "beats both even cuts by more than the seeds' spread",
        False: "does not beat both even cuts by more than the seeds' spread",
    }
    said = {name: f"{name}: {words[better[name]]}" for name in better}
    if len(said) == 2:
        accuracy = report[TRANSFERRED]["accuracy_mean"] / report[FOUND]["accuracy_mean"]
        gain = "its gain over the better even cut"
        share = kept(report)
        words = f"{gain} is none" if share is None else f"{share:.0%} of {gain}"
        if share is not None and better[FOUND] is False:
            words += ", which is within the seeds' spread"
        said["kept"] = f"kept by the transfer: {accuracy:.0%} of the direct search's accuracy; {words}"
    return said


def _better_than_even(name: str, report: dict[str, dict]) -> bool | None:
    """Whether the row ``name`` is better than both even cuts by more than the larger standard deviation of the two.

    ``None`` where there is no standard deviation.
    """
    better = []
    for even in (BY_LAYERS, BY_COST):
        spreads = [report[row]["accuracy_std"] for row in (name, even)]
        if None in spreads:
            return None
        better.append(report[name]["accuracy_mean"] - report[even]["accuracy_mean"] > max(spreads))
    return all(better)


def _table(report: dict[str, dict]) -> str:
    head = ("", "cuts", "head", "pool", "test accuracy (%)", "time / backprop", "memory / backprop")
    rows = [
        (
            name,
            ", ".join(row["cuts"]),
            row["head"],
            str(row["pool"]),
            percent(row["accuracy_mean"], row["accuracy_std"]),
            f"{row['step_seconds_ratio']:.2f}",
            f"{row['peak_bytes_ratio']:.2f}",
        )
        for name, row in report.items()
    ]
    return table(head, rows)
