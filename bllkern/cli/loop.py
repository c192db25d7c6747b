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
from .data import Dataset, batches, in_order
from .errors import UserError
from .measure import PeakMemory, StepTimer

REPORT_EVERY = 10  # steps between two looks at the losses: reading one waits for the device
MEMORY_STEPS = 3  # steps until memory is measured
EVALUATION_BATCH = 500
MOMENTUM = 0.9  # of SGD


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
    validation: int | None = None
    augment: str | None = None
    image_size: int | None = None
    optimizer: str = "adamw"
    lr_schedule: str = "onecycle"
    autocast: bool = False


@dataclass
class Epoch:
    """Means of an epoch: training losses by block, the output's under ``"output"``; time in seconds.

    ``accuracy`` (from 0 to 1) and ``loss`` (cross-entropy of the output, in nats) are those on the held-out data.
    """

    epoch: int
    losses: dict[str, float]
    accuracy: float
    loss: float
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


def build(recipe: Recipe, data: Dataset) -> nn.Module:
    """The plain network of the recipe for this data.  Raises :class:`UserError` where the two do not fit."""
    shape = tuple(data.train_x.shape[1:])
    takes, has = ("tokens" if rank == 1 else "images" for rank in (models.MODELS[recipe.model].rank, len(shape)))
    if takes != has:
        raise UserError(f"--model {recipe.model} takes {takes}, and --data {recipe.data} has {has}")
    if recipe.model == "transformer":
        return models.transformer(data.num_classes, shape, causal=data.causal)
    if has == "tokens" and not data.causal:
        raise UserError(f"--data {recipe.data} needs a model that sees the whole sequence: --model transformer")
    return models.build(recipe.model, data.num_classes, shape)


def cross_entropy(logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """The global loss, in float32: of one class per sample [B], or per token [B, T]."""
    return F.cross_entropy(logits.flatten(0, -2).float(), y.flatten(), reduction=reduction)


def train_step(net: nn.Module, optimizers, x: Tensor, y: Tensor, deferred: bool, autocast: bool) -> Tensor:
    """The loop's body, as any user would write it; returns the detached loss of the output."""
    with bllkern.targets(y), torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        output = net(x)  # local gradients are taken in here
    loss = cross_entropy(output, y)
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
            samples = len(data.train_x)
            raise UserError(f"--batch-size must be at most {samples}, the training samples, got {recipe.batch_size}")
        self.recipe, self.data, self.device = recipe, data, device
        self.steps = len(data.train_x) // recipe.batch_size
        torch.manual_seed(recipe.seed)
        objective = bllkern.objectives.get(recipe.objective, **recipe.options)
        plain = build(recipe, data).to(device)
        example = data.train_x[:2]
        self.net = bllkern.convert(plain, recipe.cuts, data.num_classes, objective, recipe.schedule, example)
        _check_output_block(self.net, objective)
        schedule = recipe.schedule or ("eager" if objective.isolate else "deferred")
        self.deferred = schedule == "deferred" and objective.local
        self.optimizers = bllkern.optimizers(self.net, self._optimizer)
        total = recipe.epochs * self.steps
        self.schedulers = [self._scheduler(optimizer, total) for optimizer in self.optimizers]
        self.order = torch.Generator().manual_seed(recipe.seed)
        self.history: list[Epoch] = []
        self.timer, self.memory = StepTimer(device), PeakMemory(device, min(MEMORY_STEPS, total))

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        lr, decay = self.recipe.lr, self.recipe.weight_decay
        if self.recipe.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr, momentum=MOMENTUM, weight_decay=decay)
        return torch.optim.AdamW(parameters, lr, weight_decay=decay)

    def _scheduler(self, optimizer: torch.optim.Optimizer, total: int) -> torch.optim.lr_scheduler.LRScheduler:
        if self.recipe.lr_schedule == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, self.recipe.lr, total)

    def train_epoch(self, progress: Callable[[float | None], None]) -> Epoch:
        """One pass over the training data, then the test; ``progress(loss or None)`` is called after every step."""
        epoch_timer, losses = StepTimer(self.device), _Mean()
        self.memory.start()
        self.net.train()
        data = self.data
        with epoch_timer.step():
            loader = batches(data.train_x, data.train_y, self.recipe.batch_size, data.augment, self.order)
            for i, (x, y) in enumerate(loader):
                with self.timer.step(), self.memory.step():
                    loss = train_step(self.net, self.optimizers, x, y, self.deferred, self.recipe.autocast)
                for scheduler in self.schedulers:
                    scheduler.step()
                reported = i % REPORT_EVERY == 0
                if reported:
                    losses.add(_finite({**bllkern.local_losses(self.net), "output": loss}))
                progress(float(loss) if reported else None)
        done = Epoch(len(self.history) + 1, losses.means(), *self.evaluate(), epoch_timer.median())
        self.history.append(done)
        return done

    def evaluate(self) -> tuple[float, float]:
        """On the held-out data: share of the samples (or tokens) whose largest logit is their class, mean loss."""
        self.net.eval()
        right, loss = 0, 0.0
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.autocast):
            for x, y in in_order(self.data.test_x, self.data.test_y, EVALUATION_BATCH):
                logits = self.net(x)
                right += (logits.argmax(-1) == y).sum()
                loss += cross_entropy(logits, y, "sum")
        count = self.data.test_y.numel()
        return int(right) / count, float(loss) / count

    def results(self) -> dict:
        """Accuracy and loss of the last epoch, seconds of all, median seconds of a step, peak bytes of a step."""
        return {
            "accuracy": self.history[-1].accuracy,
            "loss": self.history[-1].loss,
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
