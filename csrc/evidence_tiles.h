// The inner loops of evidence_cross_entropy: tiles of rows x classes in registers.
#pragma once

#include "evidence_blocks.h"

namespace bllkern::BLLKERN_ISA {

#if defined(__AVX512F__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
constexpr int kTileClasses = 4;

// x = 2^e m with m in [1, 2): e goes to `exponent`, m stays.  Of what is not positive and finite stays NaN.
BLLKERN_INLINE void take_exponent(Lanes& x, Ints& exponent) {
    exponent += (bits(x) >> 23) - 127;
    auto valid = (x > 0.f) & (x < __builtin_inff());
    x = select(valid, from_bits((bits(x) & 0x7fffff) | 0x3f800000), splat<Lanes>(__builtin_nanf("")));
}

// Adds the log evidences of `count` parameters to sums [kTileClasses, sums_stride] for V vectors of rows; of a large
// group both sums, the second to `differences`.  No more than `interval` units are multiplied before exponents are
// taken out.
template <class F, int V>
static void add_evidence(const float* rows, int64_t rows_stride, Messages messages, int64_t c, int64_t count,
                         int64_t group, int64_t interval, double* sums, double* differences, int64_t sums_stride) {
    Evidence evidence[V][kTileClasses];
    Ints exponents[V][kTileClasses] = {};
    for (int i = 0; F::kLarge && i < V; i++)
        for (int k = 0; k < kTileClasses; k++) evidence[i][k].product = splat<Lanes>(0.f);

    int64_t members = F::kGrouped ? group : 1;
    for (int64_t u = 0; u < count;) {
        int64_t end = F::kFactors ? smaller(count, u + interval * members) : count;
        while (u < end) {
            for (int64_t j = 0; j < members; j++, u++) {
                Lanes message[kTileClasses][F::kMessage], row[F::kRow];
                for (int k = 0; k < kTileClasses; k++)
                    for (int m = 0; m < F::kMessage; m++) message[k][m] = splat<Lanes>(messages.at(m, c + k)[u]);
                for (int i = 0; i < V; i++) {
                    const float* at = rows + u * F::kRow * rows_stride + i * kLanes;
                    for (int r = 0; r < F::kRow; r++) row[r] = load(at + r * rows_stride);
                    for (int k = 0; k < kTileClasses; k++) F::add(evidence[i][k], row, message[k]);
                }
            }
            if constexpr (F::kGrouped)
                for (int i = 0; i < V; i++)
                    for (int k = 0; k < kTileClasses; k++) F::close_group(evidence[i][k]);
        }
        if constexpr (F::kFactors)
            for (int i = 0; i < V; i++)
                for (int k = 0; k < kTileClasses; k++) take_exponent(evidence[i][k].product, exponents[i][k]);
    }
    for (int i = 0; i < V; i++)
        for (int k = 0; k < kTileClasses; k++) {
            int64_t to = k * sums_stride + i * kLanes;
            Lanes sum = evidence[i][k].sum, product = evidence[i][k].product, logarithm = log(product);
            for (int l = 0; l < kLanes; l++) {
                if (F::kLarge) sums[to + l] += sum[l], differences[to + l] += product[l];
                if (!F::kLarge && F::kSum != 0) sums[to + l] += F::kSum * sum[l];
                if (F::kFactors) sums[to + l] += F::kLog * (exponents[i][k][l] * 0.693147180559945309 + logarithm[l]);
            }
        }
}

// One unit under `classes` messages: adds to over_classes [kParameters, rows_stride] and to over_rows
// [kParameters, kClasses] vectors, for V vectors of rows with error [classes, error_stride].
template <class F, int V>
static void add_slopes(const float* rows, int64_t rows_stride, Messages messages, int64_t u, const float* error,
                       int64_t error_stride, int64_t classes, float* over_classes, Lanes* over_rows) {
    constexpr int P = F::kParameters;
    Lanes row[V][F::kRow], classes_sum[V][P];
    for (int i = 0; i < V; i++) {
        for (int r = 0; r < F::kRow; r++) row[i][r] = load(rows + r * rows_stride + i * kLanes);
        for (int p = 0; p < P; p++) classes_sum[i][p] = splat<Lanes>(0.f);
    }
    for (int64_t c = 0; c < classes; c++) {
        Lanes message[F::kMessage], rows_sum[P];
        for (int m = 0; m < F::kMessage; m++) message[m] = splat<Lanes>(messages.at(m, c)[u]);
        for (int p = 0; p < P; p++) rows_sum[p] = over_rows[p * kClasses + c];
        for (int i = 0; i < V; i++)
            F::slope(row[i], message, load(error + c * error_stride + i * kLanes), classes_sum[i], rows_sum);
        for (int p = 0; p < P; p++) over_rows[p * kClasses + c] = rows_sum[p];
    }
    for (int i = 0; i < V; i++)
        for (int p = 0; p < P; p++) {
            float* to = over_classes + p * rows_stride + i * kLanes;
            store(to, load(to) + classes_sum[i][p]);
        }
}

// The same for a categorical group: rows [group, rows_stride] softmax(a), over_classes [group, rows_stride] gets
// h_j = sum_c q (v_j - 1) and over_rows [group, kClasses] the vectors sum_n q p_j, where q = error / sum_k p_k v_k.
template <int V>
static void add_group_slopes(const float* rows, int64_t rows_stride, Messages messages, int64_t u, int64_t group,
                             const float* error, int64_t error_stride, int64_t classes, float* over_classes,
                             Lanes* over_rows) {
    constexpr int kPart = 16;  // classes at a time: their q, at most 2 KiB, stays in the L1 cache
    for (int64_t first = 0; first < classes; first += kPart) {
        int64_t part = smaller(kPart, classes - first);
        Lanes q[kPart][V];
        for (int64_t c = 0; c < part; c++) {
            Lanes dot[V];
            for (int i = 0; i < V; i++) dot[i] = splat<Lanes>(0.f);
            for (int64_t j = 0; j < group; j++) {
                Lanes v = splat<Lanes>(messages.at(0, first + c)[u + j]);
                for (int i = 0; i < V; i++) dot[i] += load(rows + j * rows_stride + i * kLanes) * v;
            }
            const float* e = error + (first + c) * error_stride;
            for (int i = 0; i < V; i++) q[c][i] = load(e + i * kLanes) * reciprocal(dot[i]);
        }
        for (int64_t j = 0; j < group; j++) {
            Lanes p[V], sum[V];
            for (int i = 0; i < V; i++) {
                int64_t at = j * rows_stride + i * kLanes;
                p[i] = load(rows + at), sum[i] = load(over_classes + at);
            }
            for (int64_t c = 0; c < part; c++) {
                Lanes w = splat<Lanes>(messages.at(1, first + c)[u + j]);
                Lanes rows_sum = over_rows[j * kClasses + first + c];
                for (int i = 0; i < V; i++) sum[i] += q[c][i] * w, rows_sum += q[c][i] * p[i];
                over_rows[j * kClasses + first + c] = rows_sum;
            }
            for (int i = 0; i < V; i++) store(over_classes + j * rows_stride + i * kLanes, sum[i]);
        }
    }
}

template <int N> struct Constant { static constexpr int value = N; };

// Calls f(Constant<number>, first) for runs of 8, 4, 2 or 1 vectors, no more than `most`.
template <int most, class Call> BLLKERN_INLINE void for_vectors(int64_t vectors, Call call) {
    int64_t i = 0;
    if constexpr (most >= 8)
        for (; i + 8 <= vectors; i += 8) call(Constant<8>{}, i);
    if constexpr (most >= 4)
        for (; i + 4 <= vectors; i += 4) call(Constant<4>{}, i);
    if constexpr (most >= 2)
        for (; i + 2 <= vectors; i += 2) call(Constant<2>{}, i);
    for (; i < vectors; i++) call(Constant<1>{}, i);
}

}  // namespace bllkern::BLLKERN_ISA
