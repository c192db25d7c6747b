"""What a block learns from: each objective is a sum of the terms in ``terms.py``."""

from __future__ import annotations

import dataclasses

from .alignment import DirectFeedbackAlignment, FeedbackAlignment
from .backprop import Backprop
from .base import Objective
from .bll import BLL
from .bwbpf import BWBPF, DeepSupervision
from .predsim import PredSim
from .presets import PRESETS

OBJECTIVES = {
    "bll": BLL,
    "bwbpf": BWBPF,
    "predsim": PredSim,
    "deep_supervision": DeepSupervision,
    "backprop": Backprop,
    **PRESETS,
}
__all__ = [
    "BLL",
    "BWBPF",
    "OBJECTIVES",
    "PRESETS",
    "Backprop",
    "DeepSupervision",
    "DirectFeedbackAlignment",
    "FeedbackAlignment",
    "Objective",
    "PredSim",
    "get",
]


def get(objective: str | Objective, **options) -> Objective:
    """The objective of that name with these options, or the objective itself.

    Raises ``ValueError`` for another name, ``TypeError`` for an option that it does not have.
    """
    if isinstance(objective, Objective) and not options:
        return objective
    if not isinstance(objective, str) or objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {sorted(OBJECTIVES)} or an Objective, got {objective!r}")
    known = [field.name for field in dataclasses.fields(OBJECTIVES[objective]())]
    for name in options:
        if name not in known:
            raise TypeError(f"objective {objective!r} has no option {name!r}; it has {known or 'none'}")
    return OBJECTIVES[objective](**options)
