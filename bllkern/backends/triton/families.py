"""The exponential families on tiles of float32 parameters, rearranged so that nothing large cancels.

``bllkern/families.py`` has the definitions.  ``agreement_*`` return ``A(a) + A(b) - A2(a + b)`` of every unit and its
gradients by ``a`` and ``b``; where both are -inf, Bernoulli and Poisson give 0.
"""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """Two instructions, where ``tl.exp`` also takes care of subnormal results.  Relative error |x| 2^-24."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def log1p(u):
    """``log(1 + u)``: the second term is what rounding ``1 + u`` lost."""
    w = 1 + u
    return tl.log(w) + (u - (w - 1)) / w


@triton.jit
def agreement_bernoulli(a, b):
    """With ``softplus(x) = max(x, 0) + log f_x``, ``f_x = 1 + e_x``, ``e_x = exp(-|x|)``, it is ``m + log w``:

    ``m = max(a, 0) + max(b, 0) - max(a + b, 0)`` is 0, or the smaller modulus where the signs differ, and
    ``w = f_a f_b / f_ab = 1 + u`` with ``u = (e_a + e_b + (e_a e_b - e_ab)) / f_ab``.  What rounding 1 + u lost is
    added back over w; all quotients come from one, ``1 / (f_a f_b f_ab)``.  Returns the loss without its ``log w``, and
    w, from 1/2 to 4, since the logarithm of a product costs less than those of its factors.
    """
    e_a, e_b, e_ab = exp(-tl.abs(a)), exp(-tl.abs(b)), exp(-tl.abs(a + b))
    f_a, f_b, f_ab = 1 + e_a, 1 + e_b, 1 + e_ab
    both = f_a * f_b
    reciprocal = 1 / (both * f_ab)
    over_ab, over_both = reciprocal * both, reciprocal * f_ab
    over_a, over_b = over_both * f_b, over_both * f_a
    m = tl.maximum(tl.maximum(tl.minimum(a, -b), tl.minimum(-a, b)), 0.0)
    u = (e_a + e_b + (e_a * e_b - e_ab)) * over_ab
    w = 1 + u
    lost = (u - (w - 1)) * (f_ab * over_both)
    posterior = tl.where(a + b >= 0, over_ab, e_ab * over_ab)
    mean_a, mean_b = tl.where(a >= 0, over_a, e_a * over_a), tl.where(b >= 0, over_b, e_b * over_b)
    return m + lost, w, mean_a - posterior, mean_b - posterior


@triton.jit
def sum_of_logs(w, ROWS: tl.constexpr, COLS: tl.constexpr):
    """``sum_j log w_ij`` [ROWS]: one logarithm for four neighbours, which one thread has loaded together."""
    w, other = tl.split(tl.reshape(w, [ROWS, COLS // 2, 2]))
    w, other = tl.split(tl.reshape(w * other, [ROWS, COLS // 4, 2]))
    return tl.sum(tl.log(w * other), 1)


@triton.jit
def agreement_gaussian(a, b):
    """``a^2/2 + b^2/2 - (a + b)^2/4 + log(4 pi)/2 = (a - b)^2/4 + log(4 pi)/2``."""
    half = (a - b) / 2
    return half * half + 1.2655121234846454, half, -half


@triton.jit
def agreement_categorical(a, b):
    """Of groups [groups, size]: losses [groups], gradients [groups, size].

    With ``a' = a - max(a)``, ``b' = b - max(b)``, ``s = a' + b'`` and ``t = max(s)``, the maxima cancel:
    ``logsumexp(a) + logsumexp(b) - logsumexp(a + b) = log sum exp(a') + log sum exp(b') - log sum exp(s - t) - t``.
    """
    a -= tl.max(a, 1)[:, None]
    b -= tl.max(b, 1)[:, None]
    top = tl.max(a + b, 1)
    e_a, e_b, e_ab = exp(a), exp(b), exp(a + b - top[:, None])
    sum_a, sum_b, sum_ab = tl.sum(e_a, 1), tl.sum(e_b, 1), tl.sum(e_ab, 1)
    posterior = e_ab / sum_ab[:, None]
    losses = tl.log(sum_a) + tl.log(sum_b) - tl.log(sum_ab) - top
    return losses, e_a / sum_a[:, None] - posterior, e_b / sum_b[:, None] - posterior


@triton.jit
def bessel(x):
    """For x >= 0: ``x - log I0(x)``, and ``r, t`` with ``x I1(x)/I0(x) = x r - 2 t``; beyond 6 r is 1.

    Minimax polynomials, relative error below 3e-8 before rounding: up to 6 of ``(I0 - 1) / y`` and ``2 I1 / x`` in
    ``y = x^2/4``; beyond 6, in ``i = 1/x``, of ``x - log I0 - log(x)/2`` (from ``log(2 pi)/2`` at infinity) and of
    ``x (1 - I1/I0)`` (from 1/2).
    """
    small = x < 6.0
    y = tl.minimum(x * x / 4, 9.0)
    i0 = 9.31724142e-10
    i0 = i0 * y + 3.477356e-08
    i0 = i0 * y + 1.96218139e-06
    i0 = i0 * y + 6.9315538e-05
    i0 = i0 * y + 0.00173637597
    i0 = i0 * y + 0.0277775191
    i0 = i0 * y + 0.250000089
    i0 = (i0 * y + 1.0) * y
    i1 = 7.72517517e-09
    i1 = i1 * y + 2.3626049e-07
    i1 = i1 * y + 1.18454454e-05
    i1 = i1 * y + 0.000346225308
    i1 = i1 * y + 0.00694635324
    i1 = i1 * y + 0.0833316222
    i1 = i1 * y + 0.500000536
    i1 = (i1 * y + 1.0) * x / 2
    i = 1 / tl.maximum(x, 6.0)
    tail = -2.01253009
    tail = tail * i - 0.379766464
    tail = tail * i - 0.000555415463
    tail = tail * i - 0.0764165819
    tail = tail * i - 0.062018428
    tail = tail * i - 0.125007048
    tail = tail * i + 0.918938577
    rest = -3429.68164
    rest = rest * i + 1797.05408
    rest = rest * i - 346.431519
    rest = rest * i + 35.2351036
    rest = rest * i - 1.35391331
    rest = rest * i + 0.240113512
    rest = rest * i + 0.124572091
    rest = rest * i + 0.124999568
    rest = rest * i + 0.5
    log = log1p(tl.where(small, i0, x - 1))
    return tl.where(small, x - log, tail + log / 2), tl.where(small, i1 / (1 + i0), 1.0), tl.where(small, 0.0, rest / 2)


@triton.jit
def agreement_poisson(a, b):
    """With ``p = exp(a/2)``, ``q = exp(b/2)``: ``p^2 + q^2 - log I0(2pq) = (p - q)^2 + (2pq - log I0(2pq))``.

    By a: ``p^2 - pq I1/I0 (2pq) = p (p - q r) + t``.
    """
    p, q = exp(a / 2), exp(b / 2)
    rest, r, t = bessel(2 * p * q)
    return (p - q) * (p - q) + rest, p * (p - q * r) + t, q * (q - p * r) + t


@triton.jit
def agreement_gaussian_learned(a1, a2, b1, b2):
    """Gaussians of means ``m, n`` and variances ``v, w``: ``-log N(m; n, v + w)``, for their overlap is that density.

    With ``t = (m - n) / (v + w)``, the posterior has mean ``m - v t`` and variance ``v - v^2 / (v + w)``; so by the
    parameters of a: ``v t`` and ``v^2 / (v + w) + v t (2m - v t)``.  Returns the loss and the four gradients.
    """
    v, w = -0.5 / a2, -0.5 / b2
    m, n = a1 * v, b1 * w
    precision = 1 / (v + w)
    t = (m - n) * precision
    loss = ((m - n) * t - tl.log(precision)) / 2 + 0.91893853320467274
    by_a2 = v * (v * precision + t * (2 * m - v * t))
    by_b2 = w * (w * precision - t * (2 * n + w * t))
    return loss, v * t, by_a2, -w * t, by_b2
