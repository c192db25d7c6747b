"""Blocks on several processes, over torch.distributed: no backward messages, no bubbles, no locks."""

from .block_parallel import BlockParallel
from .checkpoint import load, newest, save
from .watch import ParallelError

__all__ = ["BlockParallel", "ParallelError", "load", "newest", "save"]
