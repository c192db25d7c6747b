"""BWBPF: block-wise training with local prediction losses (arXiv 2312.13311)."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Objective, check_options
from .bll import BLL


@dataclass(frozen=True, repr=False)
class BWBPF(Objective):
    """Every block but the last predicts the target through pooling and a linear head; the global loss is the output's.

    Args:
        label_smoothing: of the local cross-entropies.
        pool: convolutional features are averaged to at most ``pool`` places a side before the head.
        isolate: ``False`` is what the released code does: local losses reach all earlier blocks too.
    """

    label_smoothing: float = 0.0
    pool: int = 4
    isolate: bool = True

    def __post_init__(self):
        check_options(self, isolate=(False, True))

    def build(self, target_features):
        recipe = BLL(evidence=0, similarity=0, prediction=1, label_smoothing=self.label_smoothing, pool=self.pool)
        return recipe.build(target_features)


@dataclass(frozen=True, repr=False)
class DeepSupervision(BWBPF):
    """BWBPF without isolation: auxiliary heads on a network trained end to end.  Here to be compared with."""

    isolate: bool = False

    def __post_init__(self):
        check_options(self, isolate=(False,))
