"""``bllkern train``: one network, with checkpoints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import bllkern

from .. import models
from ..cuts import file as cuts_file
from . import checkpoint
from .data import Dataset, load
from .errors import UserError, user_errors
from .loop import Epoch, Recipe, Training
from .measure import human_bytes, human_time

RATES = {"adamw": {"lr": 4e-3, "weight_decay": 1e-2}, "sgd": {"lr": 0.1, "weight_decay": 5e-4}}  # where none is given


def run(args: argparse.Namespace) -> int:
    recipe = recipe_of(args, args.objective, {**args.preset_options, **args.option})
    data = load_data(args)
    output = None if args.output is None else Path(args.output)
    file = None if output is None else output / "checkpoint.pt"
    state = _state_to_continue(file, args.resume, recipe)
    training = start(recipe, data, device(args))
    if state is not None:
        _continue(training, state, file)
    if output is not None:
        with user_errors("--output"):
            output.mkdir(parents=True, exist_ok=True)
    _describe(training)
    _train(training, file)
    if output is not None:
        checkpoint.write_tensors(output / "weights.pt", bllkern.unwrap(training.net).state_dict())
    _summarise(training, output)
    return 0


def stage_cuts(args: argparse.Namespace) -> list[str] | int | Path:
    """``--cuts`` as given, or the names of those along the stages."""
    if args.cuts is not None and not isinstance(args.cuts, str):
        return args.cuts
    blocks = None if args.cuts is None else int(args.cuts.removeprefix("stages:"))
    with user_errors("--cuts"):
        return models.default_cuts(args.model, blocks)


def recipe_of(args: argparse.Namespace, objective: str | None, options: dict) -> Recipe:
    """The recipe that the arguments describe, for this objective (``None``: the cuts file's, or bll), these options."""
    cuts = stage_cuts(args)
    if isinstance(cuts, Path):
        with user_errors():
            file = cuts_file.read(cuts)
        objective = objective or file.objective
        cuts, options = file.cuts, {**file.options_of(objective), **options}
    objective = objective or "bll"
    given = {name: getattr(args, name) for name in Recipe.__dataclass_fields__ if hasattr(args, name)}
    rates = {name: value for name, value in RATES[args.optimizer].items() if given[name] is None}
    return Recipe(**{**given, **rates, "objective": objective, "options": options, "cuts": cuts})


def load_data(args: argparse.Namespace) -> Dataset:
    sizes = {"train_size": args.train_size, "test_size": args.test_size, "validation": args.validation}
    return load(args.data, args.data_dir, **sizes, augment=args.augment, image_size=args.image_size)


def start(recipe: Recipe, data: Dataset, device: torch.device) -> Training:
    with user_errors():
        return Training(recipe, data.to(device), device)


def train_through(recipe: Recipe, data: Dataset, device: torch.device, bar: tqdm) -> dict:
    """Results of a training from start to end; ``accuracy`` is ``None`` where it diverges.  ``bar`` counts epochs."""
    training = start(recipe, data, device)
    try:
        for _ in range(recipe.epochs):
            training.train_epoch(lambda loss: None)
            bar.update()
    except FloatingPointError as exception:
        return {"accuracy": None, "diverged": str(exception)}
    return training.results()


def device(args: argparse.Namespace) -> torch.device:
    """The device asked for, or a GPU where there is one; also sets the number of CPU threads."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as exception:
        raise UserError(f"--device {name}: {str(exception).splitlines()[0]}") from exception
    return found


def _state_to_continue(file: Path | None, resume: bool, recipe: Recipe) -> dict | None:
    """The checkpointed state, or ``None`` to start from the beginning."""
    if resume and file is None:
        raise UserError("--resume needs --output DIR, the folder of the training to continue")
    if file is None or not file.exists():
        if resume:
            print(f"bllkern train: no checkpoint in {file.parent} yet, starting from the beginning", file=sys.stderr)
        return None
    if not resume:
        raise UserError(f"--output: {file} exists; add --resume to continue it, or choose another folder")
    return checkpoint.load(file, vars(recipe))


def _continue(training: Training, state: dict, file: Path) -> None:
    try:
        training.load_state_dict(state)
    except Exception as exception:  # a foreign state can fail anywhere
        raise UserError(f"--resume: {file} does not fit this training: {exception!r:.200}") from exception


def _train(training: Training, file: Path | None) -> None:
    total, done = training.recipe.epochs, len(training.history)
    columns = None
    for epoch in training.history:
        columns = _print_row(epoch, columns)
    # disable=None: no bar where stderr is not a terminal
    steps = {"total": total * training.steps, "initial": done * training.steps}
    with tqdm(**steps, disable=None, leave=False, unit="step") as bar:

        def progress(loss):
            bar.update()
            if loss is not None:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

        for number in range(done + 1, total + 1):
            bar.set_description(f"epoch {number}/{total}")
            epoch = training.train_epoch(progress)
            if file is not None:
                checkpoint.save(file, vars(training.recipe), training.state_dict())
                checkpoint.write_json(file.with_name("metrics.json"), [vars(e) for e in training.history])
            bar.clear()
            columns = _print_row(epoch, columns)


def _describe(training: Training) -> None:
    recipe, data = training.recipe, training.data
    blocks = " | ".join([*bllkern.network.boundaries(training.net), "output"])
    parameters = sum(p.numel() for p in bllkern.unwrap(training.net).parameters())
    print(f"data      {recipe.data}: {len(data.train_x):,} training and {len(data.test_x):,} {data.held_out} samples")
    print(f"model     {recipe.model}: {parameters:,} parameters, blocks {blocks}")
    print(f"training  {recipe.objective}, {training.device}, {torch.get_num_threads()} CPU threads, seed {recipe.seed}")


def _print_row(epoch: Epoch, columns: list[str] | None) -> list[str]:
    """Print the epoch's row, below the head of the table if ``columns`` is ``None``; return the columns of losses."""
    if columns is None:
        columns = list(epoch.losses)
        head = "".join(f"{name:>12.12}" for name in columns)
        print(f"\nepoch{head}        loss    accuracy      time", flush=True)
    losses = "".join(f"{epoch.losses[name]:12.4f}" for name in columns)
    print(f"{epoch.epoch:5}{losses}{epoch.loss:12.4f}{epoch.accuracy:12.2%}{human_time(epoch.seconds):>11}", flush=True)
    return columns


def _summarise(training: Training, output: Path | None) -> None:
    results = training.results()
    accuracy, loss = f"accuracy {results['accuracy']:.2%}", f"loss {results['loss']:.4f}"
    print(f"\n{training.data.held_out} {accuracy}, {loss}, training time {human_time(results['seconds'])}", end="")
    if results["peak_bytes"] is not None:  # this run has trained, and not only read a finished checkpoint
        print(f", step {human_time(results['step_seconds'])}, peak memory {human_bytes(results['peak_bytes'])}", end="")
    print()
    if output is not None:
        print(f"{output}: checkpoint.pt (to --resume), metrics.json, weights.pt (state_dict of the plain network)")
