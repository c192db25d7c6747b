"""End-to-end backprop as an objective: the boundaries do nothing."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Objective


@dataclass(frozen=True, repr=False)
class Backprop(Objective):
    """No local losses, no detaching: the baseline under the same protocol."""

    @property
    def isolate(self):
        return False

    @property
    def local(self):
        return False

    def build(self, target_features):
        return None
