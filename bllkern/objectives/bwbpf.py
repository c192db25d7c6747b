"""BWBPF: block-wise training with local prediction losses (arXiv 2312.13311)."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Objective, check_options
from .bll import BLL
from .heads import HEADS


@dataclass(frozen=True, repr=False)
class BWBPF(Objective):
    """Every block but the last predicts the target through pooling and a head; the global loss is the output's.

    The paper's own setting is ``BWBPF(head="linear", label_smoothing=0.0)``.

    Args:
        label_smoothing: of the local cross-entropies, as in :class:`bllkern.objectives.BLL`.
        pool: convolutional features are averaged to at most ``pool`` places a side before the head.
        isolate: ``False`` is what the released code does: local losses reach all earlier blocks too.
        head: ``"linear"``, ``"mlp"``, ``"conv"`` or ``"auto"``, as in :class:`bllkern.objectives.BLL`.  On CIFAR-10 hidden
            layer and smoothing are worth three points, see bench/results/ablation-cifar10-convnet.md.
    """

    label_smoothing: float = 0.1
    pool: int = 4
    isolate: bool = True
    head: str = "auto"

    def __post_init__(self):
        check_options(self, isolate=(False, True), head=HEADS)

    def build(self, target_features):
        head = {"label_smoothing": self.label_smoothing, "pool": self.pool, "head": self.head}
        return BLL(evidence=0, similarity=0, prediction=1, **head).build(target_features)


@dataclass(frozen=True, repr=False)
class DeepSupervision(BWBPF):
    """The paper's heads without isolation, on a network trained end to end.  Here to be compared with."""

    label_smoothing: float = 0.0
    isolate: bool = False
    head: str = "linear"

    def __post_init__(self):
        check_options(self, isolate=(False,), head=HEADS)
