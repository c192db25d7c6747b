// The mean and length of a row, from which its direction follows: (x - mean) * reciprocal.
#pragma once

#include "rows.h"

namespace bllkern::BLLKERN_ISA {

struct Direction {
    float mean;
    float reciprocal;  // of the centred row's length; 0 for constant rows

    template <class T> BLLKERN_INLINE Direction of(const T* x, int64_t width) {
        double mean = sum_vectors(width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
                          return load_first(x + i, n, 0.f);
                      }) / static_cast<double>(width);
        const float center = static_cast<float>(mean);
        double square = sum_vectors(width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
            Lanes centred = load_first(x + i, n, center) - center;
            return centred * centred;
        });
        // |x|^2 = |x - mean|^2 + width mean^2; below 1e-6 |x| the centred row is rounding alone
        bool constant = !(square > 1e-12 * (square + static_cast<double>(width) * mean * mean));
        return {center, constant ? 0.f : static_cast<float>(1 / __builtin_sqrt(square))};
    }
};

}  // namespace bllkern::BLLKERN_ISA
