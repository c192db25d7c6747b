// The exponential families of bllkern/families.py for host and device, one definition, over any lane type V.
//
// agreement(a, b) is A(a) + A(b) - A2(a + b) of one latent unit and its gradients by every natural parameter of a and b
// (BLL, arXiv 2305.14974).  The formulas are rearranged so that large terms never cancel and few transcendental
// functions are left; each derivation stands above its code.  The categorical family needs sums over a group: its
// kernels hold the passes over the group.
#pragma once

#include "elementary.h"

namespace bllkern::BLLKERN_ISA {

// One unit's loss and gradients; N is the number of natural parameters of a unit.
template <class V, int N> struct Agreement {
    V loss;
    V by_a[N];
    V by_b[N];
};

struct Bernoulli {
    static constexpr int kParameters = 1;

    // With u = e^a and v = e^b the loss is log((1 + u)(1 + v) / (1 + uv)).  Let p = e^-|a|, q = e^-|b|, and multiply
    // numerator and denominator by what makes every exponential at most 1.  With k = min(|a|, |b|):
    //   a, b of one sign:    loss =     log((1 + p)(1 + q) / d), d = 1 + pq;
    //   of opposite signs:   loss = k + log((1 + p)(1 + q) / d), d = e^k (p + q) = 1 + s, s = e^-||a| - |b||.
    // The quotient lies in [1/2, 2] and is 1 + x/d with x = p + q, or x = p + q + pq - s; its logarithm is
    // 2 atanh(x/(2d + x)).
    //
    // The gradients are u (1 - v) / ((1 + u)(1 + uv)) and the same with u and v exchanged.  In p and q:
    //   |by_a| = p' (1 - q) / ((1 + p) d), |by_b| = q' (1 - p) / ((1 + q) d), signs against b and against a,
    // with p' = p, q' = q for one sign and p' = p e^k, q' = q e^k for opposite ones.  1 - p is -expm1(-|a|), and
    // 1 - fs = (1 - f) + f (1 - s), so gradients keep their relative accuracy where a message is close to 0.
    //
    // Two exponentials give all of it: f = e^-k is the larger of p and q, and f s the smaller.
    template <class V> BLLKERN_INLINE Agreement<V, 1> agreement(const V (&a)[1], const V (&b)[1]) {
        V minus_a = negative_abs(a[0]), minus_b = negative_abs(b[0]);
        auto a_smaller = minus_a > minus_b;
        V minus_k = select(a_smaller, minus_a, minus_b);
        Exponential<V> f = exp_nonpositive(minus_k), s = exp_nonpositive(negative_abs(minus_a - minus_b));
        V far = f.value * s.value;
        V far_minus_one = f.value * s.minus_one + f.minus_one;

        auto opposite = (bits(a[0]) ^ bits(b[0])) < 0;
        V product = f.value * far;
        V d = select(opposite, s.value, product) + 1.f;
        V x = f.value + far + select(opposite, product - s.value, splat<V>(0.f));
        V c = d + x;  // (1 + p)(1 + q)
        // one reciprocal serves both x/(2d + x) = x/(d + c) of the logarithm and 1/(cd) of the gradients
        V cd = c * d, inverse = reciprocal(cd * (d + c));
        V loss = twice_atanh(x * cd * inverse) - select(opposite, minus_k, splat<V>(0.f));

        V near_scale = select(opposite, splat<V>(1.f), f.value);  // p' where p = f
        V common = near_scale * ((d + c) * inverse);
        V by_near = common * far_minus_one * (far + 1.f);  // with the sign still to come
        V by_far = common * s.value * (f.minus_one * (f.value + 1.f));  // p' = near_scale s where p = f s
        return {
            loss,
            {flip(select(a_smaller, by_near, by_far), b[0])},
            {flip(select(a_smaller, by_far, by_near), a[0])},
        };
    }
};

struct Gaussian {
    static constexpr int kParameters = 1;

    // a^2/2 + b^2/2 - ((a + b)^2/4 - log(4 pi)/2) = (a - b)^2/4 + log(4 pi)/2
    template <class V> BLLKERN_INLINE Agreement<V, 1> agreement(const V (&a)[1], const V (&b)[1]) {
        V half = (a[0] - b[0]) * 0.5f;
        return {half * half + 1.265512123f, {half}, {-half}};
    }
};

struct GaussianLearned {
    static constexpr int kParameters = 2;

    // Precisions s = -2 a[1], t = -2 b[1], means m = a[0]/s, n = b[0]/t.  Completing the square in
    // a[0]^2/2s + b[0]^2/2t - (a[0] + b[0])^2/2(s + t) leaves v (m - n)^2/2 with v = st/(s + t), and the logarithms
    // leave -log(v)/2 + log(2 pi)/2: the loss is -log N(m; n, 1/s + 1/t).
    //
    // The posterior has mean M = (a[0] + b[0])/(s + t), so m - M = t (m - n)/(s + t) is the gradient by a[0]; by a[1]
    // it is the difference of second moments m^2 + 1/s - M^2 - 1/(s + t) = (m - M)(m + M) + t/(s (s + t)).
    //
    // A message without positive precision is no density: its loss is NaN, as that of A is.
    template <class V> BLLKERN_INLINE Agreement<V, 2> agreement(const V (&a)[2], const V (&b)[2]) {
        V s = a[1] * -2.f, t = b[1] * -2.f;
        V variance_a = divide(splat<V>(1.f), s), variance_b = divide(splat<V>(1.f), t);
        V m = a[0] * variance_a, n = b[0] * variance_b, difference = m - n;
        V inverse = divide(splat<V>(1.f), s + t);
        V weight_a = s * inverse, weight_b = t * inverse, v = s * weight_b;
        V by_m = difference * weight_b, by_n = -difference * weight_a;
        v = select(s > 0.f, select(t > 0.f, v, splat<V>(__builtin_nanf(""))), splat<V>(__builtin_nanf("")));
        return {
            (difference * difference * v - log(v)) * 0.5f + 0.9189385332f,
            {by_m, by_m * (m + m - by_m) + weight_b * variance_a},
            {by_n, by_n * (n + n - by_n) + weight_a * variance_b},
        };
    }
};

struct Poisson {
    static constexpr int kParameters = 1;

    // With p = e^(a/2), q = e^(b/2) and w = pq:  p^2 + q^2 - log I0(2w) = (p - q)^2 + L, where L = 2w - log I0(2w) >= 0
    // and p - q = p (1 - e^-(a - b)/2), the larger of both taken for p.  By a: p^2 - w R with R = I1(2w)/I0(2w), which
    // for large w, where R approaches 1, is p (p - q) + K with K = w (1 - R).
    template <class V> BLLKERN_INLINE Agreement<V, 1> agreement(const V (&a)[1], const V (&b)[1]) {
        auto a_larger = a[0] > b[0];
        V high = select(a_larger, a[0], b[0]), low = select(a_larger, b[0], a[0]);
        Exponential<V> ratio = exp_nonpositive((low - high) * 0.5f);
        V larger = exp(high * 0.5f), smaller = larger * ratio.value;
        V difference = -larger * ratio.minus_one, w = larger * smaller;
        Bessel<V> bessel = scaled_bessel(w);
        auto small = w <= kSmall;
        V by_larger = larger * select(small, larger, difference) + bessel.k;
        V by_smaller = smaller * select(small, smaller, -difference) + bessel.k;
        return {
            difference * difference + bessel.l,
            {select(a_larger, by_larger, by_smaller)},
            {select(a_larger, by_smaller, by_larger)},
        };
    }

  private:
    static constexpr float kSmall = 3.25f;

    template <class V> struct Bessel {
        V l;  // L
        V k;  // K; for w <= kSmall, -w R
    };

    // For w <= kSmall by the power series in t = w^2, economised: I0 = 1 + t U(t) and I1 = w Q(t), all terms positive;
    //   L = 2w - log1p(tU) and wR = t Q/I0.  For larger w by polynomials in 1/w of bounded functions:
    //   e^2L = 1/(e^-2w I0)^2 = w S(1/w), and K itself.  Fitted to 1e-7 by weighted least squares.
    template <class V> BLLKERN_INLINE Bessel<V> scaled_bessel(V w) {
        auto small = w <= kSmall;
        V t = w * w;
        V u = t * polynomial(t, 9.999999828e-1f, 2.500002694e-1f, 2.777712124e-2f, 1.736694865e-3f, 6.919831563e-5f,
                             1.983641933e-6f, 3.287084690e-8f, 9.967729167e-10f);
        V q = polynomial(t, 9.999999177e-1f, 5.000015213e-1f, 8.332912781e-2f, 6.948569837e-3f, 3.453427909e-4f,
                         1.201772604e-5f, 2.201639648e-7f, 8.299870986e-9f);
        V i0 = u + 1.f;
        V inverse = divide(splat<V>(1.f), select(small, i0, w));
        V ws = w * polynomial(inverse, 12.56637127f, -1.570942359f, -2.892590544e-1f, -2.271625742e-1f,
                              2.375891593e-1f, -9.160678193e-1f);
        V k = polynomial(inverse, 2.499999391e-1f, 3.126485643e-2f, 1.504347500e-2f, 2.029234535e-2f,
                         -3.481214653e-2f, 1.235099183e-1f);
        V logarithm = log(select(small, i0, ws));
        V rounding = (u - (i0 - 1.f)) * inverse;  // log1p(u) - log(i0): what i0 = 1 + u lost
        return {
            select(small, w + w - (logarithm + rounding), logarithm * 0.5f),
            select(small, -t * q * inverse, k),
        };
    }
};

}  // namespace bllkern::BLLKERN_ISA
