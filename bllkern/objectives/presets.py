"""The special cases that BLL's framework (arXiv 2305.14974) contains, by name: ``objectives.get("drtp")``.

Write h for the activation at a boundary, y for the one-hot target, e for the gradient of the global loss by the output;
of cross-entropy, e = p - y.  With the Gaussian family the log evidence of the target's own message b = y B is
A(h + b) - A(h) = h.b + |b|^2 / 2, and the agreement is |h - b|^2 / 4 up to a constant.

- ``drtp``, direct random target projection (Frenkel et al., arXiv 1909.01311): minus that log evidence, B fixed and
  random, has the gradient -y B by h.  That is the algorithm exactly: its error signal is a projection of the target.
- ``dfa``, direct feedback alignment, has e B in its place: -y B of ``drtp`` plus p B.  BLL's messages start from the
  target and wait for nothing, so p B is what BLL cannot contain; the output's error is carried instead
  (:class:`bllkern.objectives.DirectFeedbackAlignment`).
- ``fa``, feedback alignment, and ``sign_symmetric`` feedback chain that error from layer to layer, through each layer's
  derivative (:class:`bllkern.objectives.FeedbackAlignment`).  What BLL contains is the chain without the derivatives of
  the forward path and with the target at its top, that is ``target_propagation`` with weights that do not learn.
- ``target_propagation``, in its plain (not difference) form (Bengio, arXiv 1407.7906): a block moves towards the target
  of the block above sent through a learned inverse, |h - g(t)|^2 / 2 with t = b of the boundary above; and g learns to
  give back what the block above has read, |g(h') - h|^2 / 2 with h' its activation.  Both are twice the Gaussian
  agreement, with ``feedback="inverse"``.  Here g is linear, and the target of the last boundary a fixed random code of
  the class.  With maps that learn from h and g(t) instead (``feedback="chained"``) it collapses to chance.
- ``predsim``, ``deep_supervision`` and ``backprop`` (one block) are objectives of these names.
"""

from __future__ import annotations

from functools import partial

from .alignment import DirectFeedbackAlignment, FeedbackAlignment
from .bll import BLL

PRESETS = {
    "drtp": partial(BLL, evidence=0.0, similarity=0.0, likelihood=1.0, feedback="fixed"),
    "fa": FeedbackAlignment,
    "dfa": DirectFeedbackAlignment,
    "sign_symmetric": partial(FeedbackAlignment, weights="sign"),
    "target_propagation": partial(BLL, evidence=0.0, similarity=0.0, agreement=2.0, feedback="inverse"),
}
