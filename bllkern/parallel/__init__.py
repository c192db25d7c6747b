"""Blocks on several processes, over torch.distributed: no backward messages, no bubbles, no locks."""

from .block_parallel import BlockParallel
from .watch import ParallelError

__all__ = ["BlockParallel", "ParallelError"]
