"""``torchrun -m bllkern train --block-parallel K``: one network on several processes, checkpoints and one report."""

from __future__ import annotations

import argparse
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm import tqdm

import bllkern

from .. import parallel
from ..network import boundaries
from . import checkpoint
from .data import batches, in_order
from .errors import UserError, user_errors
from .loop import EVALUATION_BATCH, REPORT_EVERY, Epoch, Training, _finite, _Mean, cross_entropy
from .measure import human_bytes, human_time
from .train import _print_row, load_data, recipe_of

TIMEOUT = 60.0  # seconds that a rank may let the others wait


def run(args: argparse.Namespace) -> int:
    mesh = _join(args.block_parallel)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    recipe = recipe_of(args, args.objective, {**args.preset_options, **args.option})
    data = load_data(args)
    output = None if args.output is None else Path(args.output)
    try:
        with user_errors(), RankTraining(recipe, data, mesh) as training:
            _continue(training, output, args.resume)
            _train(training, output)
    except parallel.ParallelError as error:
        raise UserError(str(error)) from error
    finally:
        dist.destroy_process_group()
    return 0


def _join(ranks: int) -> DeviceMesh:
    """The process group that torchrun describes, as a mesh (data, blocks)."""
    if "WORLD_SIZE" not in os.environ:
        raise UserError("--block-parallel needs torchrun: torchrun --nproc-per-node N -m bllkern train ...")
    limit = timedelta(seconds=TIMEOUT)
    store, rank, size = next(dist.rendezvous("env://", timeout=limit))
    # torchrun's store outlives a restart, and holds the addresses of the ranks before (pytorch issue 135712)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"bllkern attempt {attempt}", store)
    dist.init_process_group("gloo", timeout=limit, store=store, rank=rank, world_size=size)
    if dist.get_world_size() % ranks:
        raise UserError(f"--block-parallel must divide the number of processes, {dist.get_world_size()}, got {ranks}")
    return init_device_mesh("cpu", (dist.get_world_size() // ranks, ranks), mesh_dim_names=("data", "blocks"))


class RankTraining:
    """This rank's share of a training: its blocks, on its part of every batch.

    Raises :class:`UserError` for a recipe that does not fit the data or the mesh.
    """

    def __init__(self, recipe, data, mesh: DeviceMesh):
        rows = mesh.size(0)
        if recipe.autocast:
            raise UserError("--autocast is not available with --block-parallel, whose messages are float32")
        if recipe.batch_size % rows:
            raise UserError(f"--batch-size must be a multiple of {rows}, the rows of the mesh, got {recipe.batch_size}")
        self.whole = Training(recipe, data, torch.device("cpu"))
        self.recipe, self.data, self.steps = recipe, data, self.whole.steps
        self.order, self.history = self.whole.order, []
        blocks = len(boundaries(self.whole.net)) + 1
        if mesh.size(1) > blocks:
            raise UserError(f"--block-parallel must be at most {blocks}, the blocks of the network, got {mesh.size(1)}")
        share = recipe.batch_size // rows
        example = data.train_x[:share], data.train_y[:share]
        options = {"optimizer": self.whole._optimizer, "example": example, "loss": cross_entropy, "timeout": TIMEOUT}
        self.blocks = parallel.BlockParallel(self.whole.net, mesh, **options)
        total = recipe.epochs * self.steps
        self.schedulers = [self.whole._scheduler(optimizer, total) for optimizer in self.blocks.optimizers]
        self.rows, self.is_root = rows, dist.get_rank() == 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.blocks.__exit__(*error)

    def resume(self, folder: Path) -> None:
        """Continue from the newest checkpoint in ``folder``, if there is one."""
        order = self.order.get_state()
        done = parallel.load(self.blocks, folder, order=order)
        self.order.set_state(order)
        for scheduler in self.schedulers if done else ():
            scheduler.load_state_dict({"last_epoch": done, "_step_count": done + 1})

    def save(self, folder: Path) -> None:
        parallel.save(self.blocks, folder, order=self.order.get_state())

    def train_epoch(self, progress) -> dict:
        """One pass over the training data, then the test; what this rank has seen of it."""
        losses, start, data = _Mean(), time.perf_counter(), self.data
        loader = batches(data.train_x, data.train_y, self.recipe.batch_size, data.augment, self.order)
        for i, (x, y) in enumerate(loader):
            loss = self.blocks.step(x.chunk(self.rows)[self.blocks.row], y.chunk(self.rows)[self.blocks.row])
            for scheduler in self.schedulers:
                scheduler.step()
            if i % REPORT_EVERY == 0:
                output = {} if loss is None else {"output": loss}
                losses.add(_finite({**self.blocks.local_losses(), **output}))
            progress()
        seconds = time.perf_counter() - start
        right, loss = self._evaluate()
        return {"losses": losses.means(), "right": right, "loss": loss, "seconds": seconds}

    def _evaluate(self) -> tuple[int, float]:
        """Right answers and sum of the losses on the held-out data, on the rank that computes the output; else 0."""
        right, loss = 0, 0.0
        for x, y in in_order(self.data.test_x, self.data.test_y, EVALUATION_BATCH):
            logits = self.blocks.predict(x)
            if logits is not None:
                right += int((logits.argmax(-1) == y).sum())
                loss += float(cross_entropy(logits, y, "sum"))
        return right, loss

    def gathered(self, found: object) -> list | None:
        """What every rank of the first row has found, on the root."""
        all_found = [None] * dist.get_world_size() if self.is_root else None
        dist.gather_object(found, all_found, group=self.blocks.group)
        return [all_found[rank] for rank in self.blocks.rows[0]] if self.is_root else None

    def merge(self, reports: list[dict]) -> Epoch:
        """The epoch of the whole network."""
        losses = {name: loss for report in reports for name, loss in report["losses"].items()}
        count, seconds = self.data.test_y.numel(), max(report["seconds"] for report in reports)
        accuracy, loss = (sum(report[name] for report in reports) / count for name in ("right", "loss"))
        self.history.append(Epoch(len(self.history) + 1, losses, accuracy, loss, seconds))
        return self.history[-1]


def _continue(training: RankTraining, output: Path | None, resume: bool) -> None:
    if resume and output is None:
        raise UserError("--resume needs --output DIR, the folder of the training to continue")
    arguments = vars(training.recipe)
    file = None if output is None else output / "arguments.json"
    if file is not None and file.exists():
        if not resume:
            raise UserError(f"--output: {file} exists; add --resume to continue it, or choose another folder")
        checkpoint.check_arguments(file, checkpoint.read_json(file), arguments)
    if resume:
        training.resume(output / "checkpoints")
        metrics = output / "metrics.json"
        done = training.blocks.steps // training.steps
        training.history = [Epoch(**epoch) for epoch in checkpoint.read_json(metrics)[:done]] if done else []
    training.gathered(None)  # all have looked before the root writes
    if file is not None and training.is_root:
        with user_errors("--output"):
            output.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(file, arguments)


def _train(training: RankTraining, output: Path | None) -> None:
    total, steps = training.recipe.epochs, training.steps
    done, columns = training.blocks.steps // steps, None
    if training.is_root:
        _describe(training)
        for epoch in training.history:
            columns = _print_row(epoch, columns)
    names = ", ".join(training.blocks.part.names)
    bar = {"total": total * steps, "initial": done * steps, "desc": f"rank {dist.get_rank()}: {names}"}
    with tqdm(**bar, position=dist.get_rank(), disable=None, leave=False, unit="step") as progress:
        for _ in range(done, total):
            reports = training.gathered(training.train_epoch(progress.update))
            if training.is_root:
                columns = _print_row(training.merge(reports), columns)
                if output is not None:  # before the checkpoint: what is ahead of that is cut off when it is continued
                    checkpoint.write_json(output / "metrics.json", [vars(epoch) for epoch in training.history])
            if output is not None:
                training.save(output / "checkpoints")
    _summarise(training, output)


def _describe(training: RankTraining) -> None:
    recipe, data, blocks = training.recipe, training.data, training.blocks
    print(f"data      {recipe.data}: {len(data.train_x):,} training and {len(data.test_x):,} {data.held_out} samples")
    print(
        f"model     {recipe.model}, {recipe.objective}, seed {recipe.seed}, {torch.get_num_threads()} CPU threads each"
    )
    for place, rank in enumerate(blocks.rows[0]):
        ranks = ", ".join(str(row[place]) for row in blocks.rows)
        print(f"rank {ranks}: {blocks.watch.labels[rank].partition('(')[2].rstrip(')')}")


def _summarise(training: RankTraining, output: Path | None) -> None:
    """One report of all ranks, and the weights of the plain network."""
    found = training.gathered((training.blocks.part.tensors(), training.blocks.bytes_sent))
    if not training.is_root:
        return
    seconds = sum(epoch.seconds for epoch in training.history)
    sent = human_bytes(sum(number for _, number in found))
    accuracy = training.history[-1].accuracy
    print(f"\ntest accuracy {accuracy:.2%}, training time {human_time(seconds)}, {sent} passed between ranks of a row")
    if output is not None:
        net = training.whole.net
        net.load_state_dict({name: tensor for tensors, _ in found for name, tensor in tensors.items()})
        checkpoint.write_tensors(output / "weights.pt", bllkern.unwrap(net).state_dict())
        print(f"{output}: checkpoints (to --resume), metrics.json, weights.pt (state_dict of the plain network)")
