"""What an objective is: options that build the local loss of each boundary."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, repr=False)
class Objective:
    """Options of a local objective.  ``build`` makes the module that scores the activation at one boundary.

    ``isolate``: the boundary hands on a detached activation, so that every loss moves its own block only.
    """

    @property
    def isolate(self) -> bool:
        return True

    @property
    def local(self) -> bool:
        """Whether there is a local loss; where there is none, what ``build`` makes only changes what goes backwards."""
        return True

    def places(self, net: nn.Module, cuts: list[str]) -> list[str]:
        """The modules of ``net`` after which boundaries stand, for these cuts."""
        return cuts

    def __repr__(self):
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    def build(self, target_features: int) -> nn.Module | None:
        """The local loss of one boundary, or ``None`` where there is nothing to learn from."""
        raise TypeError(f"{type(self).__name__} does not say what a block learns from: override build")


@dataclass(frozen=True, repr=False)
class EndToEnd(Objective):
    """Options of a baseline without local losses: blocks learn from the global loss, and nothing is detached."""

    @property
    def isolate(self) -> bool:
        return False

    @property
    def local(self) -> bool:
        return False


def check_options(objective: Objective, **allowed: tuple) -> None:
    """Raise ``ValueError`` for a negative weight or a choice that is not ``allowed``."""
    for field in dataclasses.fields(objective):
        value = getattr(objective, field.name)
        if field.name in allowed and value not in allowed[field.name]:
            raise ValueError(f"{field.name} must be one of {allowed[field.name]}, got {value!r}")
        if field.type in ("float", float) and not (isinstance(value, (int, float)) and 0 <= value < float("inf")):
            raise ValueError(f"{field.name} must be a non-negative number, got {value!r}")
        if field.type in ("int", int) and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{field.name} must be a positive integer, got {value!r}")
