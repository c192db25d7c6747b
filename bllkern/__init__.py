"""Training neural networks without end-to-end backpropagation: blocks that learn from local losses."""

from . import backends, families, functional, models, objectives, parallel
from .backends import backend
from .blocks import (
    BlockLocal,
    BlockLocalConv,
    BlockLocalConv1d,
    BlockLocalConv2d,
    BlockLocalConv3d,
    BlockLocalLinear,
    Boundary,
)
from .convert import convert, unwrap
from .execution.capture import capture
from .execution.streams import serial
from .execution.targets import targets
from .network import assert_isolated, local_loss, local_losses, optimizers

__version__ = "0.1.0"
__all__ = [
    "BlockLocal",
    "BlockLocalConv",
    "BlockLocalConv1d",
    "BlockLocalConv2d",
    "BlockLocalConv3d",
    "BlockLocalLinear",
    "Boundary",
    "assert_isolated",
    "backend",
    "backends",
    "capture",
    "convert",
    "families",
    "functional",
    "local_loss",
    "local_losses",
    "models",
    "objectives",
    "optimizers",
    "parallel",
    "serial",
    "targets",
    "unwrap",
]
