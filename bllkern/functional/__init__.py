"""The local losses as differentiable functions.

Each loss is computed with the gradients by its inputs in one pass, on the backend that :mod:`bllkern.backends` chooses.
``BLL`` is arXiv 2305.14974, ``BWBPF`` arXiv 2312.13311.  Losses are float32 (float64 for float64 inputs).  Inputs may
be non-contiguous; where dtypes differ they are promoted as torch does.  None of the losses is twice differentiable.
"""

from .agreement import agreement
from .batch_norm_relu import batch_norm_relu
from .evidence_cross_entropy import evidence_cross_entropy
from .gram import decorrelation, similarity_matching
from .linear_agreement import linear_agreement
from .linear_cross_entropy import linear_cross_entropy
from .prototypes import prototypes

__all__ = [
    "agreement",
    "batch_norm_relu",
    "decorrelation",
    "evidence_cross_entropy",
    "linear_agreement",
    "linear_cross_entropy",
    "prototypes",
    "similarity_matching",
]
