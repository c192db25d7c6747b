// Two vectors of lanes side by side, for functions that are one long chain of dependent operations: alternating between
// two chains keeps busy the units that wait for the results of one.  L is Lanes or Coarse.
#pragma once

#include "elementary.h"

namespace bllkern::BLLKERN_ISA {

struct TwoInts {
    Ints a, b;

    BLLKERN_MEMBER friend TwoInts operator+(TwoInts x, int y) { return {x.a + y, x.b + y}; }
    BLLKERN_MEMBER friend TwoInts operator-(TwoInts x, int y) { return {x.a - y, x.b - y}; }
    BLLKERN_MEMBER friend TwoInts operator-(TwoInts x, TwoInts y) { return {x.a - y.a, x.b - y.b}; }
    BLLKERN_MEMBER friend TwoInts operator<<(TwoInts x, int y) { return {x.a << y, x.b << y}; }
    BLLKERN_MEMBER friend TwoInts operator>>(TwoInts x, int y) { return {x.a >> y, x.b >> y}; }
    BLLKERN_MEMBER friend TwoInts operator|(TwoInts x, int y) { return {x.a | y, x.b | y}; }
    BLLKERN_MEMBER friend TwoInts operator&(TwoInts x, int y) { return {x.a & y, x.b & y}; }
    BLLKERN_MEMBER friend TwoInts operator^(TwoInts x, TwoInts y) { return {x.a ^ y.a, x.b ^ y.b}; }
    BLLKERN_MEMBER friend TwoInts operator<(TwoInts x, int y) { return {x.a < y, x.b < y}; }
};

template <class L> struct Two {
    L a = {}, b = {};
    template <class M> BLLKERN_MEMBER operator Two<M>() const { return {a, b}; }

    BLLKERN_MEMBER friend Two operator+(Two x, Two y) { return {x.a + y.a, x.b + y.b}; }
    BLLKERN_MEMBER friend Two operator-(Two x, Two y) { return {x.a - y.a, x.b - y.b}; }
    BLLKERN_MEMBER friend Two operator*(Two x, Two y) { return {x.a * y.a, x.b * y.b}; }
    BLLKERN_MEMBER friend Two operator+(Two x, float y) { return {x.a + y, x.b + y}; }
    BLLKERN_MEMBER friend Two operator-(Two x, float y) { return {x.a - y, x.b - y}; }
    BLLKERN_MEMBER friend Two operator*(Two x, float y) { return {x.a * y, x.b * y}; }
    BLLKERN_MEMBER friend Two operator-(Two x) { return {-x.a, -x.b}; }
    BLLKERN_MEMBER friend TwoInts operator>(Two x, Two y) { return {x.a > y.a, x.b > y.b}; }
    BLLKERN_MEMBER friend TwoInts operator<(Two x, Two y) { return {x.a < y.a, x.b < y.b}; }
    BLLKERN_MEMBER friend TwoInts operator>(Two x, float y) { return {x.a > y, x.b > y}; }
    BLLKERN_MEMBER friend TwoInts operator<(Two x, float y) { return {x.a < y, x.b < y}; }
    BLLKERN_MEMBER friend TwoInts operator<=(Two x, float y) { return {x.a <= y, x.b <= y}; }
    BLLKERN_MEMBER friend TwoInts operator==(Two x, float y) { return {x.a == y, x.b == y}; }
};

template <class L> constexpr bool kCoarse<Two<L>> = kCoarse<L>;

template <class L> BLLKERN_INLINE TwoInts bits(Two<L> x) { return {bits(x.a), bits(x.b)}; }
BLLKERN_INLINE Two<Lanes> from_bits(TwoInts x) { return {from_bits(x.a), from_bits(x.b)}; }
BLLKERN_INLINE Two<Lanes> to_float(TwoInts x) { return {to_float(x.a), to_float(x.b)}; }
template <class L> BLLKERN_INLINE Two<L> select(TwoInts condition, Two<L> x, Two<L> y) {
    return {select(condition.a, x.a, y.a), select(condition.b, x.b, y.b)};
}
template <class L> BLLKERN_INLINE Two<L> at_least(Two<L> x, Two<L> low) {
    return {at_least(x.a, low.a), at_least(x.b, low.b)};
}
template <class L> BLLKERN_INLINE Two<L> divide(Two<L> x, Two<L> y) { return {divide(x.a, y.a), divide(x.b, y.b)}; }
template <class L> BLLKERN_INLINE Two<L> reciprocal(Two<L> x) { return {reciprocal(x.a), reciprocal(x.b)}; }

}  // namespace bllkern::BLLKERN_ISA
