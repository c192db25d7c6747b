// Elementary functions over any lane type V: float in CUDA code, a vector of floats on the CPU.
//
// V has arithmetic and comparisons, and the functions bits, from_bits, to_float, select, at_least, divide and reciprocal
// (csrc/simd.h, csrc/device.cuh).  Errors are stated in ulp of float, the largest found on the CPU at 2e7 arguments over the
// stated range; NaN arguments give NaN.
#pragma once

#if defined(__CUDACC__)
#include "device.cuh"
#else
#include "simd.h"
#endif

namespace bllkern::BLLKERN_ISA {

// Whether V asks for functions to 2^-15 only, of which the errors stated below do not hold (csrc/coarse.h).
template <class V> constexpr bool kCoarse = false;

template <class V> BLLKERN_INLINE V splat(float x) { return V{} + x; }
template <class V> BLLKERN_INLINE V negative_abs(V x) { return from_bits(bits(x) | INT32_MIN); }
template <class V> BLLKERN_INLINE V max(V x, V y) { return select(x > y, x, y); }
// x with its sign turned where `sign` is negative
template <class V> BLLKERN_INLINE V flip(V x, V sign) { return from_bits(bits(x) ^ (bits(sign) & INT32_MIN)); }

// What rounding took from `sum` = x + y: x + y is sum + rounding exactly (Knuth).  0 where the sum is infinite.
template <class V> BLLKERN_INLINE V rounding_of_sum(V x, V y, V sum) {
    V y_in_sum = sum - x;
    V error = (x - (sum - y_in_sum)) + (y - y_in_sum);
    return select(error == error, error, splat<V>(0.f));
}

// c0 + c1 x + c2 x^2 + ..., by Horner's rule
template <class V> BLLKERN_INLINE V polynomial(V, float c0) { return splat<V>(c0); }
template <class V, class... Rest> BLLKERN_INLINE V polynomial(V x, float c0, Rest... rest) {
    return polynomial(x, rest...) * x + c0;
}

template <class V> struct Exponential {
    V value;      // e^x
    V minus_one;  // e^x - 1
};

// e^x to 1.1 ulp and e^x - 1 to 1.8 ulp, for x in [-87, 88].
//
// x = n ln 2 + r with n whole and |r| <= ln(2)/2, so e^x = s (1 + m) with s = 2^n and m = e^r - 1, a polynomial without
// constant term.  s m + s is e^x; s m + (s - 1) is e^x - 1, in which nothing cancels: s - 1 is exact, and 0 for n = 0.
template <class V> BLLKERN_INLINE Exponential<V> exp_in_range(V x) {
    V shifted = x * 1.44269504f + 0x1.8p23f;  // the unit of a float near 1.5 * 2^23 is 1: its low bits now hold n
    V n = shifted - 0x1.8p23f;
    V r, series;
    if constexpr (kCoarse<V>) {
        r = x - n * 0.693147181f;
        series = polynomial(r, 4.99991328e-1f, 1.67514731e-1f, 4.19079525e-2f);
    } else {
        r = (x - n * 0x1.62e4p-1f) - n * 1.42860677e-6f;  // ln 2 in two parts, the first with few enough bits
        series = polynomial(r, 0.5f, 1.666657336e-1f, 4.166636345e-2f, 8.363776144e-3f, 1.394216110e-3f);
    }
    V m = series * (r * r) + r;
    V s = from_bits((bits(shifted) << 23) + 0x3f800000);
    return {s * m + s, s * m + (s - 1.f)};
}

// The same for all x <= 0; below -87, where e^x < 2^-125, it stays at its value there.
template <class V> BLLKERN_INLINE Exponential<V> exp_nonpositive(V x) {
    return exp_in_range(at_least(x, splat<V>(-87.f)));
}

// e^x to 1.1 ulp for any x; 0 below -87 and infinity above 88.
template <class V> BLLKERN_INLINE V exp(V x) {
    V value = exp_in_range(at_least(select(x > 88.f, splat<V>(88.f), x), splat<V>(-87.f))).value;
    return select(x < -87.f, splat<V>(0.f), select(x > 88.f, splat<V>(__builtin_inff()), value));
}

// 2 atanh(z) = 2z + 2z^3/3 + 2z^5/5 + ..., to 0.6 ulp for |z| <= 1/3
template <class V> BLLKERN_INLINE V twice_atanh(V z) {
    V square = z * z, series;
    if constexpr (kCoarse<V>)
        series = polynomial(square, 3.32455446e-1f, 2.24556294e-1f);
    else
        series = polynomial(square, 3.333333368e-1f, 1.999984750e-1f, 1.429644033e-1f, 1.084943630e-1f,
                            1.162988504e-1f);
    V twice = z + z;
    return twice * (square * series) + twice;
}

// log(x) to 2.0 ulp for normal x; -infinity for 0, NaN below it.
//
// x = 2^e m with m in [2/3, 4/3), and log(m) = 2 atanh((m - 1) / (m + 1)), where m - 1 is exact.
template <class V> BLLKERN_INLINE V log(V x) {
    auto exponent = (bits(x) - 0x3f2aaaab) >> 23;
    V f = from_bits(bits(x) - (exponent << 23)) - 1.f;
    V e = to_float(exponent);
    V value = e * 0x1.62e4p-1f + (e * 1.42860677e-6f + twice_atanh(divide(f, f + 2.f)));
    V infinity = splat<V>(__builtin_inff());
    V nonpositive = select(x == 0.f, -infinity, splat<V>(__builtin_nanf("")));
    return select(x > 0.f, select(x < infinity, value, infinity), nonpositive);
}

}  // namespace bllkern::BLLKERN_ISA
