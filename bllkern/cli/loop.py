"""One training: network, optimizers, order of the data, and the loop over them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bllkern

from .. import models
from .data import Dataset, batches
from .errors import UserError
from .measure import PeakMemory, StepTimer

REPORT_EVERY = 10  # steps between two looks at the losses: reading one waits for the device
MEMORY_STEPS = 3  # steps until memory is measured
EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Recipe:
    """The arguments that decide what a training ends with; a checkpoint continues under the same ones only."""

    data: str
    model: str
    objective: str
    options: dict
    schedule: str | None
    cuts: list[str] | int
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int
    train_size: int | None
    test_size: int | None


@dataclass
class Epoch:
    """Means of an epoch: losses by block, the output's under ``"output"``; accuracy from 0 to 1; time in seconds."""

    epoch: int
    losses: dict[str, float]
    accuracy: float
    seconds: float


@dataclass
class _Mean:
    """Running means of named numbers."""

    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def add(self, values: dict[str, Tensor]) -> None:
        self.count += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def means(self) -> dict[str, float]:
        return {name: total / self.count for name, total in self.sums.items()}


def _finite(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of {name!r} is not finite: {float(loss):g}")
    return losses


def _check_output_block(net: nn.Module, objective: bllkern.objectives.Objective) -> None:
    """The global loss must have something to move, unless it moves all blocks."""
    if not objective.isolate:
        return
    owned = {id(p) for boundary in bllkern.network.boundaries(net).values() for p in boundary.own_parameters()}
    if all(id(p) in owned for p in net.parameters() if p.requires_grad):
        raise UserError("--cuts: a layer with parameters must follow the last cut, to learn from the global loss")


def train_step(net: nn.Module, optimizers, x: Tensor, y: Tensor, deferred: bool) -> Tensor:
    """The loop's body, as any user would write it; returns the detached loss of the output."""
    with bllkern.targets(y):
        loss = F.cross_entropy(net(x), y)  # local gradients are taken in here
    (loss + bllkern.local_loss(net) if deferred else loss).backward()
    optimizers.step()
    optimizers.zero_grad()
    return loss.detach()


class Training:
    """A network in training and everything that a checkpoint has to bring back.

    Raises ``ValueError`` or ``TypeError`` for a recipe that the library refuses, :class:`UserError` for one that does
    not fit the data.  Training raises ``FloatingPointError`` for a loss that is not finite.
    """

    def __init__(self, recipe: Recipe, data: Dataset, device: torch.device):
        if recipe.batch_size > len(data.train_x):
            images = len(data.train_x)
            raise UserError(f"--batch-size must be at most {images}, the training images, got {recipe.batch_size}")
        self.recipe, self.data, self.device = recipe, data, device
        self.steps = len(data.train_x) // recipe.batch_size
        torch.manual_seed(recipe.seed)
        objective = bllkern.objectives.get(recipe.objective, **recipe.options)
        plain = models.build(recipe.model, data.num_classes, data.train_x.shape[1:]).to(device)
        example = data.train_x[:2]
        self.net = bllkern.convert(plain, recipe.cuts, data.num_classes, objective, recipe.schedule, example)
        _check_output_block(self.net, objective)
        schedule = recipe.schedule or ("eager" if objective.isolate else "deferred")
        self.deferred = schedule == "deferred" and recipe.objective != "backprop"
        self.optimizers = bllkern.optimizers(self.net, self._adamw)
        total = recipe.epochs * self.steps
        self.schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, recipe.lr, total) for o in self.optimizers]
        self.order = torch.Generator().manual_seed(recipe.seed)
        self.history: list[Epoch] = []
        self.timer, self.memory = StepTimer(device), PeakMemory(device, min(MEMORY_STEPS, total))

    def _adamw(self, parameters) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, self.recipe.lr, weight_decay=self.recipe.weight_decay)

    def train_epoch(self, progress: Callable[[float | None], None]) -> Epoch:
        """One pass over the training images, then the test; ``progress(loss or None)`` is called after every step."""
        epoch_timer, losses = StepTimer(self.device), _Mean()
        self.memory.start()
        self.net.train()
        data = self.data
        with epoch_timer.step():
            loader = batches(data.train_x, data.train_y, self.recipe.batch_size, data.flips, self.order)
            for i, (x, y) in enumerate(loader):
                with self.timer.step(), self.memory.step():
                    loss = train_step(self.net, self.optimizers, x, y, self.deferred)
                for scheduler in self.schedulers:
                    scheduler.step()
                reported = i % REPORT_EVERY == 0
                if reported:
                    losses.add(_finite({**bllkern.local_losses(self.net), "output": loss}))
                progress(float(loss) if reported else None)
        done = Epoch(len(self.history) + 1, losses.means(), self.accuracy(), epoch_timer.median())
        self.history.append(done)
        return done

    def accuracy(self) -> float:
        """Share of the test images whose largest logit is their class."""
        self.net.eval()
        right = 0
        with torch.no_grad():
            for x, y in zip(self.data.test_x.split(EVALUATION_BATCH), self.data.test_y.split(EVALUATION_BATCH)):
                right += (self.net(x).argmax(1) == y).sum()
        return int(right) / len(self.data.test_y)

    def results(self) -> dict:
        """Accuracy of the last epoch, seconds of all, median seconds of a step, peak bytes of a step."""
        return {
            "accuracy": self.history[-1].accuracy,
            "seconds": sum(epoch.seconds for epoch in self.history),
            "step_seconds": self.timer.median(),
            "peak_bytes": self.memory.bytes,
        }

    def state_dict(self) -> dict:
        return {
            "net": self.net.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "order": self.order.get_state(),
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "history": [vars(epoch) for epoch in self.history],
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from :meth:`state_dict`.  Raises whatever a state that is not one of this training leads to."""
        self.net.load_state_dict(state["net"])
        self.optimizers.load_state_dict(state["optimizers"])
        for scheduler, one in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(one)
        self.order.set_state(state["order"])
        self.history = [Epoch(**epoch) for epoch in state["history"]]
        torch.set_rng_state(state["torch_rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
