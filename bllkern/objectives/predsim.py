"""PredSim: local error signals of prediction and similarity matching (Nokland and Eidnes, arXiv 1901.06656)."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Objective, check_options
from .bll import BLL
from .heads import HEADS


@dataclass(frozen=True, repr=False)
class PredSim(Objective):
    """A linear head plus matching of the batch's Gram matrix to label equality.

    Args: prediction, similarity: weights.  label_smoothing, pool, head: as in :class:`bllkern.objectives.BWBPF`.
    """

    prediction: float = 1.0
    similarity: float = 4.0
    label_smoothing: float = 0.0
    pool: int = 4
    head: str = "linear"

    def __post_init__(self):
        check_options(self, head=HEADS)

    def build(self, target_features):
        recipe = BLL(
            evidence=0,
            prediction=self.prediction,
            similarity=self.similarity,
            label_smoothing=self.label_smoothing,
            pool=self.pool,
            head=self.head,
        )
        return recipe.build(target_features)
