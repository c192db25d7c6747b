"""The feedback network: from the target to the backward message of each boundary.

BLL (arXiv 2305.14974) carries the target backwards through weights of its own (no weight transport) and without waiting
for the forward path (no locking).  A message ``b`` holds natural parameters for the same latent units as the forward
message.  For class targets the messages of all classes, one row per class, are computed at once; that of a sample is
its class's row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from .execution import streams
from .families import Family

KINDS = ("direct", "chained", "fixed")


class LazyWeight(LazyModuleMixin, nn.Module):
    """A weight [rows, D] (and bias [rows]) for features [N, D], which get their size from the first features seen.

    For maps [N, C, *spatial] the weight is a kernel [rows, C, 3, ..] of three places a side.  Initialised as
    ``nn.Linear`` and ``nn.Conv2d``: uniform within ``1 / sqrt(fan in)``.  ``forward(features)`` returns weight, bias.
    """

    cls_to_become = None

    def __init__(self, rows: int, bias: bool = True, trained: bool = True):
        super().__init__()
        self.rows = rows
        self.weight = UninitializedParameter(requires_grad=trained)
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None

    def initialize_parameters(self, features: Tensor) -> None:
        if self.has_uninitialized_params():
            kernel = [3] * (features.dim() - 2)
            self.weight.materialize((self.rows, features.shape[1], *kernel), features.device, features.dtype)
            bound = self.weight[0].numel() ** -0.5
            nn.init.uniform_(self.weight, -bound, bound)
            if self.bias is not None:
                self.bias.data = self.bias.data.to(features)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias


class Feedback(nn.Module):
    """Backward messages [C, D] of one boundary, one per class (or per target dimension).

    ``direct``: a learned row per class.  ``fixed``: the same rows, random and never trained (direct random target
    projection).  ``chained``: from the messages of the boundary above, ``mean(b_{k+1}) @ W_k`` (the paper's
    b_{k-1} = g_k(b_k)); ``W_k`` learns from this boundary's loss alone, the messages above are detached.
    """

    def __init__(self, kind: str, target_features: int, family: Family):
        super().__init__()
        self.kind, self.family = kind, family
        self._above: list[Feedback] = []  # in a list, so that it is not this module's child
        self._chained = False
        self.link = LazyWeight(target_features, bias=False, trained=kind != "fixed")

    def chain(self, above: Feedback | None) -> None:
        """Read the messages of ``above``, or the target where there is none.  To be called before the first message."""
        self._chained = True
        self._above = [] if above is None else [above]

    def initialize(self, features: Tensor) -> None:
        """Size the weights for features [N, D]; the boundary above must have its size already."""
        if self.kind == "chained" and not self._chained:
            raise RuntimeError("feedback='chained' needs bllkern.convert, which knows the boundary above")
        if self._above and self.link.has_uninitialized_params():
            self.link.rows = self._above[0].link.weight.shape[1]
        self.link(features)

    def forward(self, features: Tensor) -> Tensor:
        self.link(features)
        running = streams.running()
        return self.messages(running.message(self._above[0]) if running and self._above else None)

    def messages(self, above: Tensor | None = None) -> Tensor:
        """The messages once the weights have their size, from those ``above``, which are computed if not given."""
        messages = self.link.weight
        if self._above:
            if above is None:
                above = self._above[0].messages()
            messages = self._above[0].family.mean(above.detach()) @ messages
        return self.family.message(messages)

    def chain_above(self) -> list[Feedback]:
        """This one and those whose messages it reads, directly or through others, up to the last boundary."""
        return [self, *(self._above[0].chain_above() if self._above else ())]
