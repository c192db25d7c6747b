"""Exponential families whose natural parameters are what the blocks exchange.

A family has a sufficient statistic ``T(z)``, a base measure ``h(z)``, the log-partition ``A`` with mean map
``mean = grad A``, and ``A2``/``mean2``: the same under the squared base measure ``h**2`` (``A2 = A`` where ``h`` is
constant).  BLL (arXiv 2305.14974) reads the activation of a block as natural parameters ``a`` of its forward message
and the feedback as natural parameters ``b`` of its backward message; the posterior of both has natural parameters
``a + b``.

Everything here is plain torch.  Parameters have shape [..., D]; log-partitions, agreement and evidence are summed over
the latent units of the last dimension and have shape [...]; means have shape [..., D].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)
MIN_PRECISION = 1e-3  # twice of it is the least precision that an activation can ask for
MAX_LOG_RATE = 8.0  # of a backward message


@dataclass(frozen=True)
class Family:
    """What every family offers.  ``unit_A2`` and ``mean2`` default to ``unit_A`` and ``mean``: a constant base measure.

    Differences of log-partitions are taken unit by unit before they are summed, so that large sums do not cancel.
    """

    name = "family"
    group_size = 1  # number of neighbouring parameters that belong to one latent variable

    def unit_A(self, a: Tensor) -> Tensor:
        """Log-partition of each latent unit: [..., units]."""
        raise TypeError(f"{type(self).__name__} is abstract; use one of {sorted(FAMILIES)}")

    def unit_A2(self, a: Tensor) -> Tensor:
        """Log-partition of each latent unit under the squared base measure: [..., units]."""
        return self.unit_A(a)

    def A(self, a: Tensor) -> Tensor:
        """Log-partition of parameters [..., D], summed over units: [...]."""
        return self.unit_A(a).sum(-1)

    def mean(self, a: Tensor) -> Tensor:
        """Expected sufficient statistic, the gradient of :meth:`A`: [..., D]."""
        raise TypeError(f"{type(self).__name__} is abstract; use one of {sorted(FAMILIES)}")

    def A2(self, a: Tensor) -> Tensor:
        """Log-partition under the squared base measure, summed over units: [...]."""
        return self.unit_A2(a).sum(-1)

    def mean2(self, a: Tensor) -> Tensor:
        """Gradient of :meth:`A2`: [..., D]."""
        return self.mean(a)

    def agreement(self, a: Tensor, b: Tensor) -> Tensor:
        """``-log`` of the overlap of the densities with parameters a and b, summed over units: [...]."""
        return (self.unit_A(a) + self.unit_A(b) - self.unit_A2(a + b)).sum(-1)

    def evidence(self, a: Tensor, b: Tensor) -> Tensor:
        """``log E[exp(T(z) . b)]`` under the density of a, ``A(a + b) - A(a)``: [...]; a and b broadcast."""
        return (self.unit_A(a + b) - self.unit_A(a)).sum(-1)

    def natural(self, z: Tensor) -> Tensor:
        """Valid natural parameters [..., D] from unconstrained activations [..., D]."""
        return z

    def message(self, z: Tensor) -> Tensor:
        """Valid natural parameters [..., D] of a backward message from unconstrained numbers [..., D]."""
        return self.natural(z)

    def activation(self, a: Tensor) -> Tensor:
        """What :meth:`natural` makes the parameters ``a`` [..., D] of: its inverse."""
        return a

    def check_width(self, width: int, argument: str) -> None:
        """Raise ``ValueError`` unless parameters of last dimension ``width`` are whole latent variables."""


@dataclass(frozen=True)
class Bernoulli(Family):
    """Independent bits; a parameter is a log-odds."""

    name = "bernoulli"

    def unit_A(self, a):
        return F.softplus(a)

    def mean(self, a):
        return torch.sigmoid(a)


@dataclass(frozen=True)
class Categorical(Family):
    """Groups of ``group_size`` neighbouring units, one active per group; ``None`` makes the whole row one group."""

    group_size: int | None = None
    name = "categorical"

    def __post_init__(self):
        size = self.group_size
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(f"group_size must be None or a positive int, got {size!r}")

    def _grouped(self, a):
        self.check_width(a.shape[-1], "a")
        return a.unflatten(-1, (-1, self.group_size or a.shape[-1]))

    def unit_A(self, a):
        return torch.logsumexp(self._grouped(a), -1)

    def mean(self, a):
        grouped = self._grouped(a)
        # where all of a group is impossible (-inf) there is no mean; 0 keeps a class that excludes it out of gradients
        possible = (grouped > -math.inf).any(-1, keepdim=True)
        return torch.where(possible, torch.softmax(grouped, -1), 0).flatten(-2)

    def check_width(self, width, argument):
        if width < 1 or width % (self.group_size or width):
            raise ValueError(
                f"{argument} must have a last dimension that is a positive multiple of the categorical group_size "
                f"{self.group_size}, got {width}"
            )


@dataclass(frozen=True)
class Gaussian(Family):
    """Unit precision; a parameter is a mean.  ``h(z)`` is the standard normal density."""

    name = "gaussian"

    def unit_A(self, a):
        return a * a / 2

    def mean(self, a):
        return a

    def unit_A2(self, a):
        return a * a / 4 - math.log(4 * math.pi) / 2

    def mean2(self, a):
        return a / 2

    def agreement(self, a, b):
        # the squares of A and A2 would cancel where a and b are large and close
        return ((a - b) ** 2 / 4 + math.log(4 * math.pi) / 2).sum(-1)

    def evidence(self, a, b):
        return ((a + b / 2) * b).sum(-1)


@dataclass(frozen=True)
class GaussianLearned(Family):
    """Learned precision: the first half of the last dimension is ``m / var``, the second half ``-1 / (2 var) < 0``."""

    name = "gaussian_learned"

    def unit_A(self, a):
        eta1, eta2 = a.chunk(2, -1)
        return -eta1 * eta1 / (4 * eta2) - torch.log(-2 * eta2) / 2

    def mean(self, a):
        eta1, eta2 = a.chunk(2, -1)
        m, var = -eta1 / (2 * eta2), -1 / (2 * eta2)
        return torch.cat([m, m * m + var], -1)

    def unit_A2(self, a):
        return self.unit_A(a) - LOG_2PI / 2

    def natural(self, z):
        eta1, raw = z.chunk(2, -1)
        return torch.cat([eta1, -F.softplus(raw) - MIN_PRECISION], -1)

    def activation(self, a):
        eta1, eta2 = a.chunk(2, -1)
        excess = (-eta2 - MIN_PRECISION).clamp_min(1e-6)
        return torch.cat([eta1, excess + torch.log(-torch.expm1(-excess))], -1)  # log(exp(x) - 1)

    def check_width(self, width, argument):
        if width % 2:
            raise ValueError(f"{argument} must have an even last dimension for 'gaussian_learned', got {width}")


@dataclass(frozen=True)
class Poisson(Family):
    """Counts; a parameter is a log rate.  ``A2 = log I0(2 exp(a/2))``, by the exponentially scaled Bessel functions."""

    name = "poisson"

    def unit_A(self, a):
        return torch.exp(a)

    def mean(self, a):
        return torch.exp(a)

    def message(self, z):
        return z.clamp(max=MAX_LOG_RATE)  # rates beyond overflow where messages are chained

    def unit_A2(self, a):
        x = 2 * torch.exp(a / 2)
        return torch.log(torch.special.i0e(x)) + x

    def mean2(self, a):
        x = 2 * torch.exp(a / 2)
        return x / 2 * torch.special.i1e(x) / torch.special.i0e(x)


FAMILIES = {f.name: f for f in (Bernoulli, Categorical, Gaussian, GaussianLearned, Poisson)}
_DEFAULT = {name: family() for name, family in FAMILIES.items()}


def get(family: str | Family) -> Family:
    """A family from its name, or the family itself.

    Names: ``bernoulli``, ``categorical`` (the row is one group), ``categorical:G`` (groups of G units), ``gaussian``,
    ``gaussian_learned``, ``poisson``.  Raises ``ValueError`` for any other name, ``TypeError`` for other types.
    """
    found = _DEFAULT.get(family) if isinstance(family, str) else family
    if isinstance(found, Family):
        return found
    if not isinstance(family, str):
        raise TypeError(f"family must be a name or a bllkern.families.Family, got {type(family).__name__}")
    name, _, size = family.partition(":")
    if name == "categorical" and size.isdecimal():
        return Categorical(int(size))
    raise ValueError(f"family must be one of {sorted(FAMILIES)} or 'categorical:G', got {family!r}")
