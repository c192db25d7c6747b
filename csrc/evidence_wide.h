// Units whose message b is too wide for products of exponentials: |b| > kWide, -infinity among them.
//
// The unit has members with log-probabilities l_j = a_j - logsumexp(a), and is taken relative to its own largest
// exponent, that of member k:  x_j = (l_j - l_k) + (b_j - b_k) <= 0,  s = sum_j e^x_j,
//   log evidence = b_k + l_k + log(s),  mean_j(a + b) = e^x_j / s.
// A Bernoulli unit has the members a and 0.
#pragma once

#include "evidence_blocks.h"

namespace bllkern::BLLKERN_ISA {

template <class T> BLLKERN_INLINE float scalar(const T* p) {
    T raw[kLanes] = {*p};
    return load(raw)[0];
}
BLLKERN_INLINE float scalar(const float* p) { return *p; }

template <class T> BLLKERN_INLINE bool any_wide(const T* b, int64_t n) {
    Ints wide = {};
    for (int64_t j = 0; j < n; j += kLanes) wide |= is_wide(load_first(b + j, n - j, 0.f));
    int32_t any = 0;
    for (int l = 0; l < kLanes; l++) any |= wide[l];
    return any != 0;
}

// One unit of kLanes rows under one message.
template <class T> class WideUnit {
    const T *a, *b;
    int64_t stride, size, members;
    int rows;
    Lanes highest, log_sum;

    Lanes row(int64_t j) const {
        float x[kLanes] = {};
        for (int l = 0; l < rows && j < size; l++) x[l] = scalar(a + l * stride + j);
        return load(x);
    }
    float message(int64_t j) const { return j < size ? scalar(b + j) : 0.f; }
    Lanes log_probability(int64_t j) const { return (row(j) - highest) - log_sum; }
    Lanes exponent(int64_t j) const { return (log_probability(j) - top_l) + (message(j) - top_b); }

  public:
    Lanes top_l, top_b, total;  // l_k, b_k and s

    // a [rows, stride] and b at the unit's first parameter
    WideUnit(const T* a, const T* b, int64_t stride, int64_t size, bool bernoulli, int rows)
        : a(a), b(b), stride(stride), size(size), members(size + bernoulli), rows(rows) {
        Lanes zero = splat<Lanes>(0.f), lowest = splat<Lanes>(-__builtin_inff()), sum = zero;
        highest = lowest, top_l = top_b = total = zero;
        for (int64_t j = 0; j < members; j++) highest = max(highest, row(j));
        for (int64_t j = 0; j < members; j++) sum += exp(row(j) - highest);
        log_sum = log(sum);
        Lanes top = lowest;  // where nothing is possible, l_k and b_k stay 0 and the log evidence is log(0)
        for (int64_t j = 0; j < members; j++) {
            Lanes l = log_probability(j), x = l + message(j);
            auto higher = x > top;
            top = select(higher, x, top), top_l = select(higher, l, top_l);
            top_b = select(higher, splat<Lanes>(message(j)), top_b);
        }
        for (int64_t j = 0; j < members; j++) total += exp(exponent(j));
    }

    // Adds the gradients of the unit, by_a [size, by_a_stride].
    void add_gradients(Lanes e, float* by_a, int64_t by_a_stride, float* by_message, int64_t by_message_stride) const {
        Lanes inverse = select(total > 0.f, divide(splat<Lanes>(1.f), total), splat<Lanes>(0.f));
        for (int64_t j = 0; j < size; j++) {
            Lanes mean = exp(exponent(j)) * inverse;
            store(by_a + j * by_a_stride, load(by_a + j * by_a_stride) + e * (mean - exp(log_probability(j))));
            by_message[j * by_message_stride] += static_cast<float>(sum(e * mean));
        }
    }
};

}  // namespace bllkern::BLLKERN_ISA
