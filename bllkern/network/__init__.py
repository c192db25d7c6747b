"""Questions to a block-local network: its boundaries, their losses, an optimizer for each block, its isolation."""

from .isolation import assert_isolated
from .losses import boundaries, local_loss, local_losses
from .optim import BlockOptimizers, Factory, optimizers

__all__ = ["BlockOptimizers", "Factory", "assert_isolated", "boundaries", "local_loss", "local_losses", "optimizers"]
