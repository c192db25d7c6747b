"""Questions to a block-local network: its boundaries, their losses, an optimizer for each block, its isolation."""

from .isolation import assert_isolated
from .losses import boundaries, local_loss, local_losses
from .optim import BlockOptimizers, optimizers

__all__ = ["BlockOptimizers", "assert_isolated", "boundaries", "local_loss", "local_losses", "optimizers"]
