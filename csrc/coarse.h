// Lanes for bfloat16: floats whose elementary functions are as accurate as a number with eight bits can show, to about
// 2^-14, and so cost less than what reading and writing bfloat16 adds.
#pragma once

#include "elementary.h"

namespace bllkern::BLLKERN_ISA {

struct Coarse {
    Lanes v = {};
    Coarse() = default;
    BLLKERN_MEMBER Coarse(Lanes v) : v(v) {}
    BLLKERN_MEMBER explicit operator Lanes() const { return v; }

    BLLKERN_MEMBER friend Coarse operator+(Coarse x, Coarse y) { return x.v + y.v; }
    BLLKERN_MEMBER friend Coarse operator-(Coarse x, Coarse y) { return x.v - y.v; }
    BLLKERN_MEMBER friend Coarse operator*(Coarse x, Coarse y) { return x.v * y.v; }
    BLLKERN_MEMBER friend Coarse operator+(Coarse x, float y) { return x.v + y; }
    BLLKERN_MEMBER friend Coarse operator-(Coarse x, float y) { return x.v - y; }
    BLLKERN_MEMBER friend Coarse operator*(Coarse x, float y) { return x.v * y; }
    BLLKERN_MEMBER friend Coarse operator-(Coarse x) { return -x.v; }
    BLLKERN_MEMBER friend Ints operator>(Coarse x, Coarse y) { return x.v > y.v; }
    BLLKERN_MEMBER friend Ints operator<(Coarse x, Coarse y) { return x.v < y.v; }
    BLLKERN_MEMBER friend Ints operator>(Coarse x, float y) { return x.v > y; }
    BLLKERN_MEMBER friend Ints operator<(Coarse x, float y) { return x.v < y; }
    BLLKERN_MEMBER friend Ints operator<=(Coarse x, float y) { return x.v <= y; }
    BLLKERN_MEMBER friend Ints operator==(Coarse x, float y) { return x.v == y; }
};

template <> constexpr bool kCoarse<Coarse> = true;

BLLKERN_INLINE Ints bits(Coarse x) { return bits(x.v); }
BLLKERN_INLINE Coarse select(Ints condition, Coarse x, Coarse y) { return select(condition, x.v, y.v); }
BLLKERN_INLINE Coarse at_least(Coarse x, Coarse low) { return at_least(x.v, low.v); }

BLLKERN_INLINE Coarse reciprocal(Coarse x) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_rcp14_ps((__m512)x.v);
#else
    return reciprocal(x.v);
#endif
}

BLLKERN_INLINE Coarse divide(Coarse x, Coarse y) {
#if defined(__AVX512F__)
    return x * reciprocal(y);
#else
    return x.v / y.v;
#endif
}

}  // namespace bllkern::BLLKERN_ISA
