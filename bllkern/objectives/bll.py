"""BLL: block-local learning with probabilistic latent representations (arXiv 2305.14974)."""

from __future__ import annotations

from dataclasses import dataclass

from .. import families
from ..feedback import KINDS
from .base import Objective, check_options
from .heads import HEADS
from .terms import LocalLoss


@dataclass(frozen=True, repr=False)
class BLL(Objective):
    """The activation is the forward message ``a`` of a block, a feedback network sends the backward message ``b``.

    Args:
        family: how messages are read; a name or :class:`bllkern.families.Family`.
        evidence: weight of the class-normalised prediction from the log evidence of every class.
        similarity: weight of matching the batch's Gram matrix to ``similarity_target``, ``"labels"`` or ``"feedback"``;
            with a head that of its hidden features and that of the pooled ones are both matched.
        likelihood: weight of the log evidence of the target's own message, which does not normalise over classes.
        agreement: weight of the free energy of ``a`` and ``b``; alone it collapses, since nothing tells classes apart.
        decorrelation: weight of the squared off-diagonal Gram matrix.
        denoising: weight of pulling the output under input noise of standard deviation ``noise`` to the clean output.
            The whole block runs a second time for it, from its input, or from the embeddings of tokens; a
            :class:`bllkern.BlockLocal` or layer that stands alone, from the module's input.
        prediction: weight of an auxiliary head.
        label_smoothing: the share of the target that evidence and prediction spread over all classes.  Blocks that are
            sure of their class keep less for the blocks above: 0.1 is worth about a point of CIFAR-10 accuracy.
        feedback: ``"direct"`` (a learned message per class at every boundary), ``"chained"`` (each boundary's message
            from that of the boundary above; needs :func:`bllkern.convert`), ``"attention"`` (chained, a message per
            token of targets [B, T], which attends to all tokens of the messages above; without evidence, which needs
            one per class), ``"inverse"`` (chained, by maps that learn to undo the block above; needs an agreement), or
            ``"fixed"`` (random, untrained).
        bootstrapping: the next block reads the posterior ``a + b`` instead of ``a`` while training.
        pool: convolutional features are averaged to at most ``pool`` places a side.
        head: what the terms (but denoising) see of the activation: its pooled features (``"linear"``), a hidden layer
            on them (``"mlp"``), a small convolution before the pooling (``"conv"``; see :class:`.heads.Head`), or by
            default (``"auto"``) the hidden layer for maps [B, C, *spatial] and the features themselves for all else.
            With bootstrapping or ``feedback="inverse"``, whose messages stand for the activation itself, it is
            ``"linear"``.

    Raises: ``TypeError`` for unknown options, ``ValueError`` for their values.
    """

    family: str | families.Family = "gaussian"
    evidence: float = 1.0
    similarity: float = 4.0
    likelihood: float = 0.0
    agreement: float = 0.0
    decorrelation: float = 0.0
    denoising: float = 0.0
    prediction: float = 0.0
    feedback: str = "direct"
    similarity_target: str = "labels"
    label_smoothing: float = 0.1
    noise: float = 0.01
    bootstrapping: bool = False
    pool: int = 4
    head: str = "auto"

    def __post_init__(self):
        families.get(self.family)
        choices = {"feedback": KINDS, "similarity_target": ("labels", "feedback"), "bootstrapping": (False, True)}
        check_options(self, **choices, head=HEADS)
        if self.head in ("mlp", "conv") and self.reads_itself:
            raise ValueError(
                f"head={self.head!r} does not go with bootstrapping or feedback='inverse': messages are not hidden"
            )
        if self.feedback == "inverse" and not self.agreement:
            raise ValueError(f"feedback='inverse' learns with the agreement: it needs a weight above 0, got {self}")
        if self.feedback == "attention" and (self.evidence or not (self.agreement or self.likelihood)):
            raise ValueError(
                "feedback='attention' has a message for each token, not for each class: it needs evidence=0, and a "
                f"weight of agreement or likelihood above 0, got {self}"
            )

    @property
    def reads_itself(self) -> bool:
        """Whether messages stand for the activation itself, not for what a head reads in it."""
        return self.bootstrapping or self.feedback == "inverse"

    def build(self, target_features):
        return LocalLoss(self, target_features)
