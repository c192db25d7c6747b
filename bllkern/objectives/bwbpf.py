"""BWBPF: block-wise training with local prediction losses (arXiv 2312.13311)."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Objective, check_options
from .bll import BLL
from .heads import HEADS


@dataclass(frozen=True, repr=False)
class BWBPF(Objective):
    """Every block but the last predicts the target through pooling and a head; the global loss is the output's.

    Args:
        label_smoothing: of the local cross-entropies.
        pool: convolutional features are averaged to at most ``pool`` places a side before the head.
        isolate: ``False`` is what the released code does: local losses reach all earlier blocks too.
        head: ``"linear"``, ``"mlp"`` or ``"conv"``, as in :class:`bllkern.objectives.BLL`.
    """

    label_smoothing: float = 0.0
    pool: int = 4
    isolate: bool = True
    head: str = "linear"

    def __post_init__(self):
        check_options(self, isolate=(False, True), head=HEADS)

    def build(self, target_features):
        head = {"label_smoothing": self.label_smoothing, "pool": self.pool, "head": self.head}
        return BLL(evidence=0, similarity=0, prediction=1, **head).build(target_features)


@dataclass(frozen=True, repr=False)
class DeepSupervision(BWBPF):
    """BWBPF without isolation: auxiliary heads on a network trained end to end.  Here to be compared with."""

    isolate: bool = False

    def __post_init__(self):
        check_options(self, isolate=(False,), head=HEADS)
