"""The only package that calls the compiled module: checks, allocation, stream.

A kernel of ``_C`` takes the addresses of contiguous tensors and writes into tensors allocated here.
"""

from .agreement import agreement
from .batch_norm_relu import batch_norm_relu, batch_norm_relu_gradient
from .evidence_cross_entropy import evidence_cross_entropy
from .gram import decorrelation, similarity_matching
from .hidden_layer import hidden_layer, hidden_layer_gradient, small_hidden_layer
from .linear_cross_entropy import linear_cross_entropy, small_linear_cross_entropy
from .module import _C, DTYPES, cuda_built, error, keep_freed_memory
from .pack import pack, unpack
from .prototypes import prototypes, prototypes_gradient

__all__ = [
    "DTYPES",
    "_C",
    "agreement",
    "batch_norm_relu",
    "batch_norm_relu_gradient",
    "cuda_built",
    "decorrelation",
    "error",
    "evidence_cross_entropy",
    "hidden_layer",
    "hidden_layer_gradient",
    "keep_freed_memory",
    "linear_cross_entropy",
    "pack",
    "prototypes",
    "prototypes_gradient",
    "similarity_matching",
    "small_hidden_layer",
    "small_linear_cross_entropy",
    "unpack",
]
