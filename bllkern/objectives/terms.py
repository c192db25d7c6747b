"""The local loss of a boundary: a weighted sum of terms, each scoring the activation in its own way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property, partial, reduce
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import families, feedback, functional
from ..execution.schedules import without_autocast
from ..execution.targets import Targets, kind_of
from ..feedback import LazyWeight
from .features import raised, rows
from .heads import MAP_HEAD, Head, is_map

if TYPE_CHECKING:
    from .bll import BLL

TERMS = ("agreement", "likelihood", "evidence", "prediction", "similarity", "decorrelation", "denoising")
PREDICT = {"agreement", "likelihood", "evidence"}  # the terms that read messages, and train them
GRAM_ROWS = 1024  # rows of a Gram matrix: of tokens there may be many more in a batch
SCATTER = 7919  # a prime: multiples of it, modulo the number of rows, meet every position of every sequence
_NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class LocalLoss(nn.Module):
    """The terms of a recipe (:class:`bllkern.objectives.BLL`) with a weight above 0; the others cost nothing."""

    def __init__(self, recipe: BLL, target_features: int):
        super().__init__()
        self.recipe, self.target_features = recipe, target_features
        self.family = families.get(recipe.family)
        self.terms = [name for name in TERMS if getattr(recipe, name) > 0]
        if not self.terms:
            raise ValueError(f"at least one term needs a weight above 0; the terms are {', '.join(TERMS)}")
        self.reader = self._reader()
        self.head = LazyWeight(target_features) if recipe.prediction > 0 else None
        reads_messages = PREDICT & set(self.terms) or recipe.bootstrapping
        if recipe.similarity > 0 and recipe.similarity_target == "feedback":
            reads_messages = True
        self.feedback = feedback.build(recipe.feedback, target_features, self.family) if reads_messages else None
        self.log_prior = nn.Parameter(torch.zeros(target_features)) if recipe.evidence > 0 else None
        self.channel_dim: int | None = None
        self._kind: str | None = None
        self.sized = False

    def _reader(self) -> Head | None:
        """The head that ``recipe.head`` names; ``"auto"`` is that of maps until an activation comes that is none."""
        if self.recipe.head == "linear" or self.terms == ["denoising"]:
            return None
        if self.recipe.head == "auto" and self.recipe.reads_itself:
            return None
        kind = MAP_HEAD if self.recipe.head == "auto" else self.recipe.head
        return Head(kind, self.target_features, self.recipe.pool)

    def extra_repr(self):
        weights = [f"{name}={getattr(self.recipe, name)}" for name in self.terms]
        return ", ".join([*weights, f"family={self.family.name}"])

    def initialize(self, z: Tensor) -> None:
        """Size heads and feedback for activations like ``z``."""
        if self.recipe.head == "auto" and not is_map(z, self.channel_dim):
            self.reader = None
        features = self._features(z, False)
        if self.head is not None:
            self.head(features)
        if self.feedback is not None:
            self.family.check_width(features.shape[1], "the message at a boundary")
            self.feedback.initialize(features, self._map_shape(z, features))
        if self.log_prior is not None:
            self.log_prior.data = self.log_prior.data.to(features)
        self.sized = True

    def _map_shape(self, z: Tensor, features: Tensor) -> tuple[int, ...] | None:
        """[channels, *spatial] of the maps that features [N, D] flatten, if they do."""
        if not is_map(z, self.channel_dim) or self.reader is not None and self.reader.kind == "mlp":
            return None
        spatial = [min(side, self.recipe.pool) for side in z.shape[2:]]
        return (features.shape[1] // math.prod(spatial), *spatial)

    def _features(self, z: Tensor, tokens: bool) -> Tensor:
        """What the terms see of ``z``: its pooled rows [N, D], or what the head reads in it."""
        if self.reader is not None:
            return self.reader(z, tokens, self.channel_dim)
        return rows(z, tokens, self.recipe.pool, self.channel_dim)

    def forward(
        self, z: Tensor, target: Targets, noisy: Tensor | None = None, known: Mapping[str, Tensor] = _NOTHING
    ) -> dict[str, Tensor]:
        """Weighted terms of activation ``z``; ``noisy`` is what the block makes of a noisy input.

        ``known`` are terms that came with ``z`` (:meth:`linear`), or its average over :attr:`side` places, ``pooled``.
        """
        if not self.sized:
            self.initialize(z)
        batch = self._batch(z, target, noisy, known.get("pooled"))
        if isinstance(self.feedback, feedback.InverseFeedback):
            tokens = len(batch.features) != len(z)
            self.feedback.remember(partial(rows, z.detach(), tokens, self.recipe.pool, self.channel_dim))
        found = {name: known[name] if name in known else getattr(batch, name)() for name in self.terms}
        return {name: _times(getattr(self.recipe, name), term) for name, term in found.items()}

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, target: Targets
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``F.linear(x, weight, bias)`` and the terms that one pass right after it yields: the agreement.

        Messages do not depend on the activation once they have their size, so they can be there before it.  No term is
        known where features are not the rows of the activation: the first time, for tokens that are averaged, and for
        families that make natural parameters of activations.
        """
        identity = type(self.family).natural is families.Family.natural and self.reader is None
        alone = "agreement" in self.terms and self.recipe.feedback != "inverse"
        if not alone or not self.sized or not identity or x.dim() not in (2, 3):
            return F.linear(x, weight, bias), {}
        y, x_rows = self._matched(x, target), x.flatten(0, -2)
        if len(y) != len(x_rows):
            return F.linear(x, weight, bias), {}
        batch = Batch(self, x, x_rows, y, self._kind, target.ignore_index, None)
        if torch.is_autocast_enabled(x.device.type):
            x_rows, weight, bias = _cast(torch.get_autocast_dtype(x.device.type), x_rows, weight, bias)
        with without_autocast(x.device.type):
            message, weights = batch.message(), batch.row_weights()
            z, loss = functional.linear_agreement(
                x_rows, weight, bias, message, self.family, "mean" if weights is None else "sum", weights
            )
        return z.view(*x.shape[:-1], -1), {"agreement": loss}

    def posterior(self, z: Tensor, target: Targets) -> Tensor:
        """The activation whose natural parameters ``a + b`` are the posterior's: what the next block reads in training."""
        batch = self._batch(z, target, None)
        posterior = self.family.activation(self.family.natural(batch.features) + batch.message())
        shift = (posterior - batch.features).detach()
        return z + raised(shift, z, self.channel_dim, self.recipe.pool).to(z.dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """A checkpoint says whether ``head="auto"`` has a head."""
        known = any(key.startswith(prefix) for key in state_dict)
        if self.recipe.head == "auto" and known and not any(key.startswith(prefix + "reader.") for key in state_dict):
            self.reader = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def side(self) -> int | None:
        """Places a side to which a map [B, C, H, W] is averaged before all else; ``None`` where channels come last."""
        if self.channel_dim not in (None, 1):
            return None
        return self.recipe.pool if self.reader is None else self.reader.side

    def _batch(self, z: Tensor, target: Targets, noisy: Tensor | None, pooled: Tensor | None = None) -> Batch:
        y = self._matched(z, target)
        tokens = y.dim() == 1 and target.y.dim() == 2  # [B, T] became a row per token
        read = z if pooled is None else pooled
        batch = Batch(self, z, self._features(read, tokens), y, self._kind, target.ignore_index, noisy)
        if self.reader is not None and self.recipe.similarity > 0:
            batch.plain = rows(read, tokens, self.recipe.pool, self.channel_dim)
        return batch

    def _matched(self, z: Tensor, target: Targets) -> Tensor:
        """The target of every row, class indices [N] or floats [N, target_features], checked against ``z``."""
        y = target.y
        if y.device != z.device:
            raise ValueError(f"targets must be on the device of the activations, {z.device}, got {y.device}")
        if len(y) != len(z):
            raise ValueError(f"targets must have a row per sample, {len(z)}, got {len(y)}")
        if y.is_floating_point():
            if y.shape[1] != self.target_features:
                raise ValueError(f"targets must have target_features={self.target_features} columns, got {y.shape[1]}")
            self._kind = target.kind or self._kind or kind_of(y)
            return y
        self._kind = "classes"
        if y.dim() == 2:
            if z.dim() != 3 or y.shape[1] != z.shape[1]:
                raise ValueError(f"targets [B, T] need activations [B, T, D], got {list(y.shape)} and {list(z.shape)}")
            return y.flatten()
        return y


def _cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As autocast does for a matrix product: all but float64 in ``dtype``."""
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


class Batch:
    """One batch at one boundary: features [N, D] with their targets, and every term that can score them."""

    def __init__(self, loss: LocalLoss, z, features, y, kind, ignore_index, noisy):
        self.loss, self.recipe, self.family = loss, loss.recipe, loss.family
        self.z, self.features, self.y = z, features, y
        self.kind, self.ignore_index, self.noisy = kind, ignore_index, noisy
        self.plain: Tensor | None = None  # the pooled rows, where features are what a head reads in them

    @cached_property
    def messages(self) -> Tensor:
        """The backward message of every class [C, D]; of every row [N, D] with ``feedback="attention"``."""
        return self.loss.feedback()

    def message(self) -> Tensor:
        """The backward message of every row [N, D]; a row with ``ignore_index`` reads that of class 0."""
        if self.recipe.feedback == "attention":
            return self.messages
        if self.kind == "classes":
            return self.messages[self.y.where(self.y != self.ignore_index, 0)]
        return self.y.to(self.messages) @ self.messages

    def agreement(self) -> Tensor:
        """Free energy of forward and backward message, per sample that counts (BLL).

        With ``feedback="inverse"``, also of what the block has read and of what its inverse makes of the activation.
        """
        a, b = self.family.natural(self.features), self.message()
        loss = self._mean(functional.agreement(a, b, self.family, "none"))
        if not isinstance(self.loss.feedback, feedback.InverseFeedback) or not self.loss.feedback.undoes:
            return loss
        read, message = self.loss.feedback.reconstruction(a)
        return loss + self._mean(functional.agreement(self.family.natural(read), message, self.family, "none"))

    def likelihood(self) -> Tensor:
        """Minus the log evidence of the own message, not normalised over classes, per sample that counts (BLL)."""
        return -self._mean(self.family.evidence(self.family.natural(self.features), self.message()))

    def row_weights(self) -> Tensor | None:
        """What each row counts in a mean over those without ``ignore_index``; ``None`` where all rows count."""
        if self.kind != "classes":
            return None
        counted = (self.y != self.ignore_index).to(torch.promote_types(self.features.dtype, torch.float32))
        return counted / counted.sum().clamp(min=1)

    def evidence(self) -> Tensor:
        """Class-normalised prediction from the log evidence of every class (BLL), with ``label_smoothing``.

        A likelihood is known up to a factor for each class: it is ``exp(log_prior_c - A(b_c))`` here, without which a
        large message would win whatever the activation says.  For the Gaussian of unit precision that leaves a linear
        head, ``a . b_c + log_prior_c``: ``A(a + b_c) - A(a) = a . b_c + A(b_c)``.
        """
        self._needs_classes("evidence")
        if type(self.family) is families.Gaussian:
            settings = {"label_smoothing": self.recipe.label_smoothing, "ignore_index": self.ignore_index}
            return functional.linear_cross_entropy(
                self.features, self.messages, self.loss.log_prior, self.y, **settings
            )
        return functional.evidence_cross_entropy(
            self.family.natural(self.features),
            self.messages,
            self.y,
            self.family,
            ignore_index=self.ignore_index,
            log_prior=self.loss.log_prior - self.family.A(self.messages),
            label_smoothing=self.recipe.label_smoothing,
        )

    def prediction(self) -> Tensor:
        """Cross-entropy of the auxiliary head (BWBPF), or its mean squared error for real targets."""
        weight, bias = self.loss.head(self.features)
        if self.kind == "real":
            return F.mse_loss(F.linear(self.features, weight, bias), self.y.to(self.features))
        return functional.linear_cross_entropy(
            self.features, weight, bias, self.y, self.recipe.label_smoothing, ignore_index=self.ignore_index
        )

    def similarity(self) -> Tensor:
        """Gram matrices of the features, hidden and pooled, against that of the labels or of the feedback messages."""
        by_feedback = self.recipe.similarity_target == "feedback"
        chosen = _gram_rows(self.message().detach() if by_feedback else self.y)
        target = (chosen,) if by_feedback else (chosen, self.ignore_index)
        matching = functional.similarity_matching(_gram_rows(self.features), *target)
        if self.plain is not None:
            matching = matching + functional.similarity_matching(_gram_rows(self.plain), *target)
        return matching if not by_feedback or PREDICT & set(self.loss.terms) else matching + self._prototypes()

    def _prototypes(self) -> Tensor:
        """What feedback learns from that no other term trains: the mean direction of each class (BLL, released recipe).

        Squared distance of the messages to it, a mean over the classes in the batch; the features are held fixed.
        """
        self._needs_classes("similarity_target='feedback' without evidence, likelihood or agreement")
        features, y = self.features.detach(), self.y if self.kind == "classes" else self.y.argmax(1)
        means, counts = functional.prototypes(features, y, len(self.messages), self.ignore_index)
        present = (counts > 0).to(means)
        return ((self.messages - means).square().sum(1) * present).sum() / present.sum().clamp(min=1)

    def decorrelation(self) -> Tensor:
        """Squared off-diagonal Gram matrix of the features (BLL, released recipe)."""
        return functional.decorrelation(_gram_rows(self.features))

    def denoising(self) -> Tensor:
        """The output under a noisy input is pulled to the clean output, which is held fixed (BLL)."""
        if self.noisy is None:
            raise ValueError("denoising needs the module that computed the activation: use BlockLocal or convert")
        return F.mse_loss(self.noisy.to(self.z.dtype), self.z.detach())

    def _mean(self, values: Tensor) -> Tensor:
        """Mean of values [N] over the rows whose target counts."""
        weights = self.row_weights()
        return values.mean() if weights is None else (values * weights).sum()

    def _needs_classes(self, term: str) -> None:
        if self.kind == "real":
            raise ValueError(f"{term} normalises over classes: targets must be classes or probabilities, got real")


def _gram_rows(x: Tensor) -> Tensor:
    """Up to ``GRAM_ROWS`` rows of ``x`` for a Gram matrix, which grows with their square; scattered over the batch."""
    if len(x) <= GRAM_ROWS:
        return x
    return x[torch.arange(GRAM_ROWS, device=x.device) * SCATTER % len(x)]


def total(terms: dict[str, Tensor], scale: float) -> Tensor:
    """The sum of the weighted terms, times the step's scale."""
    return _times(scale, reduce(torch.add, terms.values()))


def _times(factor: float, term: Tensor) -> Tensor:
    """``factor * term``; times 1 would still be an operation, and another in the backward pass."""
    return term if factor == 1 else factor * term
