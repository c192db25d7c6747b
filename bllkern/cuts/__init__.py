"""Where a network is cut: where it can be, evenly by cost, by search, and the file that says so."""

from .balance import balanced, even
from .structure import channel_dim, units

__all__ = ["balanced", "channel_dim", "even", "units"]
