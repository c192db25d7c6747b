"""End-to-end backprop as an objective: the boundaries do nothing."""

from __future__ import annotations

from dataclasses import dataclass

from .base import EndToEnd


@dataclass(frozen=True, repr=False)
class Backprop(EndToEnd):
    """No local losses, no detaching: the baseline under the same protocol."""

    def build(self, target_features):
        return None
