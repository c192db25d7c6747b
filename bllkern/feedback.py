"""The feedback network: from the target to the backward message of each boundary.

BLL (arXiv 2305.14974) carries the target backwards through weights of its own (no weight transport) and without waiting
for the forward path (no locking).  A message ``b`` holds natural parameters for the same latent units as the forward
message.  For class targets the messages of all classes, one row per class, are computed at once; that of a sample is
its class's row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from .execution import streams, targets
from .families import Family

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CHAINED = ("chained", "attention", "inverse")  # which read the messages of the boundary above
KINDS = ("direct", *CHAINED, "fixed")
PERIOD = 10_000.0  # of the slowest wave in the position encoding (Vaswani et al., arXiv 1706.03762, section 3.5)


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


class Codes(LazyWeight):
    """Fixed random rows of standard normal numbers: targets that a Gaussian of unit precision can tell apart."""

    def __init__(self, rows: int):
        super().__init__(rows, bias=False, trained=False)

    def initialize_parameters(self, features: Tensor) -> None:
        if self.has_uninitialized_params():
            super().initialize_parameters(features)
            nn.init.normal_(self.weight)


class Feedback(nn.Module):
    """Backward messages [C, D] of one boundary, one per class (or per target dimension).

    ``direct``: a learned row per class.  ``fixed``: the same rows, random and never trained (direct random target
    projection).  ``chained``: from the messages of the boundary above, ``mean(b_{k+1}) @ W_k`` (the paper's
    b_{k-1} = g_k(b_k)); ``W_k`` learns from this boundary's loss alone, the messages above are detached.  Between two
    boundaries whose features are maps [channels, *spatial], ``W_k`` is a convolution of three places a side on the
    nearest places of the maps above.  For tokens, the message of a class is that of every position, and ``W_k`` a matrix.
    """

    def __init__(self, kind: str, target_features: int, family: Family):
        super().__init__()
        self.kind, self.family = kind, family
        self._above: list[Feedback] = []  # in a list, so that it is not this module's child
        self._chained = False
        self.width = 0  # D, once it is known
        self.shape: tuple[int, ...] | None = None  # [channels, *spatial] of the maps that messages flatten, if they do
        self.source: tuple[int, ...] | None = None  # the same of the boundary above
        self.link = LazyWeight(target_features, bias=False, trained=kind != "fixed")

    @property
    def reads_above(self) -> bool:
        """Whether its messages are made of those of the boundary above."""
        return self.kind in CHAINED

    def chain(self, above: Feedback | None) -> None:
        """Read the messages of ``above``, or the target where there is none.  To be called before the first message."""
        self._chained = True
        self._above = [] if above is None else [above]

    def initialize(self, features: Tensor, shape: tuple[int, ...] | None) -> None:
        """Size the weights for features [N, D] that flatten maps of ``shape``; the boundary above has its size already."""
        if self.reads_above and not self._chained:
            raise RuntimeError(f"feedback={self.kind!r} needs bllkern.convert, which knows the boundary above")
        self.width, self.shape = features.shape[1], shape
        if not self._above:
            self.link(features)
            return
        above = self._above[0]
        self.source = above.shape if shape is not None else None
        if self.source is None:
            self.carrier.rows = above.width
            self.carrier(features)
        else:
            self.carrier.rows = shape[0]
            self.carrier(features.new_empty(1, *self.source))

    @property
    def carrier(self) -> LazyWeight:
        """The weights that carry the messages above to this boundary."""
        return self.link

    def forward(self) -> Tensor:
        running = streams.running()
        return self.messages(running.message(self._above[0]) if running and self._above else None)

    def messages(self, above: Tensor | None = None) -> Tensor:
        """The messages once the weights have their size, from those ``above``, which are computed if not given."""
        if not self._above:
            return self._first()
        if above is None:
            above = self._above[0].messages()
        means = self._above[0].family.mean(above.detach())
        return self.family.message(self._carried(means, self.carrier.weight))

    def _first(self) -> Tensor:
        """The messages [C, D] of a boundary with none above."""
        return self.family.message(self.link.weight)

    def _carried(self, means: Tensor, weight: Tensor) -> Tensor:
        """The means [C, D'] of the messages above, through the link: [C, D]."""
        if self.source is None:
            return means @ weight
        maps = F.interpolate(means.unflatten(1, self.source), self.shape[1:])
        return CONVOLUTIONS[len(self.shape) - 1](maps, weight, padding=1).flatten(1)

    def chain_above(self) -> list[Feedback]:
        """This one and those whose messages it reads, directly or through others, up to the last boundary."""
        return [self, *(self._above[0].chain_above() if self._above else ())]


class InverseFeedback(Feedback):
    """Backward messages [C, D] of one boundary, carried down by a linear map that learns to undo the block above.

    At the last boundary they are :class:`Codes`, a row per class.  Below it they are ``mean(b_{k+1}) @ G_{k+1}``, or a
    convolution, as those of ``chained``; but ``G_{k+1}`` belongs to the boundary above, where it learns to give back
    what its block has read: the activation ``h_k`` from ``h_{k+1}``, both held fixed (target propagation, Bengio, arXiv
    1407.7906, section 3).  A map that learned from ``h_k`` and the message, as in ``chained``, would follow activations
    that follow it, until both are the same for every class.
    """

    def __init__(self, kind: str, target_features: int, family: Family):
        super().__init__(kind, target_features, family)
        self._below: list[InverseFeedback] = []
        self._seen: Callable[[], Tensor] | None = None

    def chain(self, above: Feedback | None) -> None:
        super().chain(above)
        if above is None:
            self.link = Codes(self.link.rows)
        else:
            self.link, above.inverse, above._below = None, LazyWeight(0, bias=False), [self]

    @property
    def carrier(self) -> LazyWeight:
        return self._above[0].inverse

    def forward(self) -> Tensor:
        """The messages; launched ahead where blocks run side by side: the block above moves the weights."""
        running = streams.running()
        ahead = running.message(self) if running else None
        return self.messages() if ahead is None else ahead

    def messages(self, above: Tensor | None = None) -> Tensor:
        return super().messages(above).detach()

    @property
    def undoes(self) -> bool:
        """Whether there is a boundary below, to which it carries messages."""
        return bool(self._below)

    def remember(self, features: Callable[[], Tensor]) -> None:
        """What gives the features [N, D] of this step's activation, for the boundary above."""
        if self._above:
            self._seen = features

    def reconstruction(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """The features [N, D'] of the boundary below, and the message about them made of own parameters ``a`` [N, D].

        Both ``a`` and the features are held fixed: only ``G`` learns.  Raises ``RuntimeError`` where the boundary below
        has no activation of its own for it.
        """
        below = self._below[0]
        if below._seen is None:
            raise RuntimeError(
                "feedback='inverse' reads the activation of the boundary below once for each of its own: a block is "
                "passed several times in a step, so use another feedback"
            )
        seen, below._seen = below._seen(), None
        return seen, self.family.message(below._carried(self.family.mean(a.detach()), self.inverse.weight))


class AttentionFeedback(Feedback):
    """Backward messages [B * T, D] of one boundary, one per token of the step's targets [B, T].

    The counterpart of a block that mixes tokens by attention: at the last boundary, a learned row per class, and below
    it ``(m + attention(m)) @ W_k``, where ``m`` are the means [B, T, D'] of the messages above.  The attention is
    scaled dot-product attention with one head (Vaswani et al., arXiv 1706.03762, equation 1) over all positions of the
    sequence; queries and keys read ``m`` with the sinusoidal encoding of its positions added to it.  Tokens whose target
    is ``ignore_index`` send the message of class 0.  Raises ``ValueError`` for other targets than [B, T].
    """

    def chain(self, above: Feedback | None) -> None:
        super().chain(above)
        if above is not None:
            self.queries, self.keys, self.values = (LazyWeight(0, bias=False) for _ in range(3))

    def initialize(self, features: Tensor, shape: tuple[int, ...] | None) -> None:
        super().initialize(features, None)
        if self._above:
            width = self._above[0].width
            for layer in (self.queries, self.keys, self.values):
                layer.rows = width
                layer(features.new_empty(1, width))

    def _first(self) -> Tensor:
        step = targets.current()
        if step.y.dim() != 2 or step.y.is_floating_point():
            raise ValueError(f"feedback='attention' needs targets [B, T] of classes, got {list(step.y.shape)}")
        return super()._first()[step.y.where(step.y != step.ignore_index, 0).flatten()]

    def _carried(self, means: Tensor, weight: Tensor) -> Tensor:
        """The means [B * T, D'] of the messages above, through attention and link: [B * T, D]."""
        sequences = means.unflatten(0, targets.current().y.shape)
        placed = sequences + positions(sequences)
        q, k = F.linear(placed, self.queries.weight), F.linear(placed, self.keys.weight)
        attended = F.scaled_dot_product_attention(q, k, F.linear(sequences, self.values.weight))
        return (sequences + attended).flatten(0, 1) @ weight


def positions(x: Tensor) -> Tensor:
    """The sinusoidal encoding [T, D] of the positions of x [B, T, D]: sines, then cosines (arXiv 1706.03762, 3.5)."""
    waves = (x.shape[2] + 1) // 2
    rates = PERIOD ** (-torch.arange(waves, device=x.device) / waves)
    angles = torch.arange(x.shape[1], device=x.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, : x.shape[2]].to(x)


def build(kind: str, target_features: int, family: Family) -> Feedback:
    """The feedback of one boundary, of a kind in :data:`KINDS`."""
    return _CLASSES.get(kind, Feedback)(kind, target_features, family)


_CLASSES = {"attention": AttentionFeedback, "inverse": InverseFeedback}
