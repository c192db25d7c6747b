// Small matrix products in blocks that stay in registers: for matrices that a library takes longer to be called for.
#pragma once

#include "rows.h"

namespace bllkern::BLLKERN_ISA {

constexpr int kRows = 4, kColumns = 4;  // of a product that are computed at a time; past the last one, that is repeated
constexpr int kVectors = 2;             // of a row of results that are
constexpr int64_t kRun = 32;            // products that are added in one run of float sums

BLLKERN_INLINE int64_t at_most(int64_t i, int64_t last) { return i < last ? i : last; }

// What products are taken of: floats or, where a vector has an instruction for it, pairs of bfloat16.
template <class T> struct Operands {
    using Type = float;
    using Vector = Lanes;
    static constexpr int64_t kWidth = kLanes;
    BLLKERN_INLINE Vector load(const float* p, int64_t n) { return load_first(p, n, 0.f); }
    BLLKERN_INLINE Lanes add_product(Lanes sum, Vector x, Vector y) { return sum + x * y; }
};
#if defined(__AVX512BF16__)
template <> struct Operands<BFloat16> {
    using Type = BFloat16;
    using Vector = __m512i;
    static constexpr int64_t kWidth = 2 * kLanes;
    BLLKERN_INLINE Vector load(const BFloat16* p, int64_t n) {
        return n < kWidth ? _mm512_maskz_loadu_epi16((1u << n) - 1, p) : _mm512_loadu_si512(p);
    }
    BLLKERN_INLINE Lanes add_product(Lanes sum, Vector x, Vector y) {
        return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
    }
};
#endif

// out[i, j] = x_i . y_j of the first kRows of `rows` rows of x and the first kColumns of `columns` rows of y, all of
// `width`; a row of out is `stride` long.
template <class T>
void dot_rows(const typename Operands<T>::Type* x, int64_t rows, const typename Operands<T>::Type* y, int64_t columns,
              int64_t width, float* out, int64_t stride) {
    using Of = Operands<T>;
    Lanes sums[kRows][kColumns] = {};
    const typename Of::Type *of_x[kRows], *of_y[kColumns];
    for (int i = 0; i < kRows; i++) of_x[i] = x + at_most(i, rows - 1) * width;
    for (int j = 0; j < kColumns; j++) of_y[j] = y + at_most(j, columns - 1) * width;
    auto add = [&](int64_t d, int64_t n) __attribute__((always_inline)) {
        typename Of::Vector w[kColumns];
        for (int j = 0; j < kColumns; j++) w[j] = Of::load(of_y[j] + d, n);
        for (int i = 0; i < kRows; i++) {
            typename Of::Vector v = Of::load(of_x[i] + d, n);
            for (int j = 0; j < kColumns; j++) sums[i][j] = Of::add_product(sums[i][j], v, w[j]);
        }
    };
    int64_t d = 0;
    for (; d + Of::kWidth <= width; d += Of::kWidth) add(d, Of::kWidth);
    if (d < width) add(d, width - d);
    for (int i = 0; i < kRows && i < rows; i++) {
        const Lanes* of = sums[i];
        float last[kColumns], *row = out + i * stride;
        const bool whole = kColumns <= columns;
        store_sums(whole ? row : last, of[0], of[1], of[2], of[3]);
        if (!whole) memcpy(row, last, columns * sizeof *row);
    }
}

template <int n> struct Count { static constexpr int value = n; };

// block(d, n, how many vectors) from column d on: a whole block of kVectors vectors, or single ones, the last partly filled.
template <class Block> BLLKERN_INLINE void one_block(int64_t d, int64_t width, Block block) {
    constexpr int64_t kBlock = kVectors * kLanes;
    if (d + kBlock <= width) return block(d, kBlock, Count<kVectors>{});
    each_vector(d, width, [&](int64_t i, int64_t n) __attribute__((always_inline)) { block(i, n, Count<1>{}); });
}

// out[i] = sum_c factors[i, c] y_c of the first kRows of `rows` rows of factors [rows, terms]; rows of y and out are `width`
// long.
template <class T, class Y>
void combine_rows(const float* factors, int64_t rows, int64_t terms, const Y* y, int64_t width, T* out) {
    auto block = [&](int64_t d, int64_t n, auto vectors) __attribute__((always_inline)) {
        constexpr int kCount = decltype(vectors)::value;
        Lanes totals[kRows][kCount] = {};
        for (int64_t begin = 0; begin < terms; begin += kRun) {
            Lanes sums[kRows][kCount] = {};
            for (int64_t c = begin; c < at_most(begin + kRun, terms); c++)
                for (int v = 0; v < kCount; v++) {
                    Lanes w = load_first(y + c * width + d + v * kLanes, n - v * kLanes, 0.f);
                    for (int i = 0; i < kRows; i++) sums[i][v] += w * factors[at_most(i, rows - 1) * terms + c];
                }
            for (int i = 0; i < kRows; i++)
                for (int v = 0; v < kCount; v++) totals[i][v] += sums[i][v];
        }
        for (int i = 0; i < kRows && i < rows; i++)
            for (int v = 0; v < kCount; v++)
                store_first(out + i * width + d + v * kLanes, totals[i][v], n - v * kLanes);
    };
    for (int64_t d = 0; d < width; d += kVectors * kLanes) one_block(d, width, block);
}

}  // namespace bllkern::BLLKERN_ISA
