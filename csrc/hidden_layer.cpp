#include "hidden_layer.h"

#include "products.h"
#include "threads.h"

namespace bllkern::BLLKERN_ISA {
namespace {

constexpr int64_t kPiece = 65536;  // products that a thread takes at a time

BLLKERN_INLINE int64_t groups_of(int64_t size, int64_t count) { return (count + size - 1) / size; }

// The sum over all rows of term(row) for one vector of columns, in runs.
template <class Term> BLLKERN_INLINE Lanes sum_of_rows(int64_t rows, Term term) {
    Lanes total = {};
    for (int64_t begin = 0; begin < rows; begin += kRun) {
        Lanes sum = {};
        for (int64_t i = begin; i < at_most(begin + kRun, rows); i++) sum += term(i);
        total += sum;
    }
    return total;
}

// u of columns [c, c + n), then y and out of them, for all rows.
void columns(const HiddenLayerJob& job, int64_t c, int64_t n) {
    for (int64_t j = 0; j < n; j += kColumns)
        for (int64_t i = 0; i < job.rows; i += kRows)
            dot_rows<float>(job.x + i * job.width, job.rows - i, job.weight + (c + j) * job.width, n - j, job.width,
                            job.y + i * job.units + c + j, job.units);
    float* const y = job.y + c;
    const float share = 1 / static_cast<float>(job.rows);
    const Lanes mean = share * sum_of_rows(job.rows, [&](int64_t i) __attribute__((always_inline)) {
        return load_first(y + i * job.units, n, 0.f);
    });
    Lanes r = share * sum_of_rows(job.rows, [&](int64_t i) __attribute__((always_inline)) {
        const Lanes d = load_first(y + i * job.units, n, 0.f) - mean;
        return d * d;
    });
    for (int l = 0; l < kLanes; l++) r[l] = 1 / __builtin_sqrtf(r[l] + job.eps);
    store_first(job.r + c, r, n);
    for (int64_t i = 0; i < job.rows; i++) {
        const Lanes normal = (load_first(y + i * job.units, n, 0.f) - mean) * r;
        store_first(y + i * job.units, normal, n);
        store_first(job.out + i * job.units + c, select(normal < 0.f, Lanes{}, normal), n);  // NaN stays NaN
    }
}

// With g that by y, 0 where ReLU was closed, the gradient by u is r (g - mean(g) - y mean(g y)); [rows, units] and turned.
void by_products(const HiddenLayerGradientJob& job, int64_t c, int64_t n, float* by_u, float* turned) {
    const float share = 1 / static_cast<float>(job.rows);
    auto y = [&](int64_t i) __attribute__((always_inline)) { return load_first(job.y + i * job.units + c, n, 0.f); };
    auto g = [&](int64_t i) __attribute__((always_inline)) {
        return select(y(i) > 0.f, load_first(job.by_out + i * job.units + c, n, 0.f), Lanes{});
    };
    const Lanes mean = share * sum_of_rows(job.rows, g), r = load_first(job.r + c, n, 0.f);
    const Lanes along = share * sum_of_rows(job.rows, [&](int64_t i) __attribute__((always_inline)) { return g(i) * y(i); });
    for (int64_t i = 0; i < job.rows; i++) {
        const Lanes by = r * (g(i) - mean - y(i) * along);
        store_first(by_u + i * job.units + c, by, n);
        for (int64_t l = 0; l < n; l++) turned[(c + l) * job.rows + i] = by[l];
    }
}

// out = factors y for factors [rows, terms] and y [terms, width].
void combine(const float* factors, int64_t rows, int64_t terms, const float* y, int64_t width, float* out) {
    auto group = [&](int64_t i) {
        const int64_t r = i * kRows;
        combine_rows(factors + r * terms, at_most(kRows, rows - r), terms, y, width, out + r * width);
    };
    parallel_for(groups_of(kRows, rows), kPiece / (kRows * terms * width + 1) + 1, group);
}

}  // namespace

void hidden_layer(const HiddenLayerJob& job) {
    auto vector = [&](int64_t i) { columns(job, i * kLanes, at_most(kLanes, job.units - i * kLanes)); };
    parallel_for(groups_of(kLanes, job.units), kPiece / (job.rows * job.width * kLanes + 1) + 1, vector);
}

void hidden_layer_gradient(const HiddenLayerGradientJob& job) {
    Scratch<float> by_u(job.rows * job.units), turned(job.rows * job.units);
    auto vector = [&](int64_t i) {
        by_products(job, i * kLanes, at_most(kLanes, job.units - i * kLanes), by_u.data, turned.data);
    };
    parallel_for(groups_of(kLanes, job.units), kPiece / (8 * job.rows * kLanes + 1) + 1, vector);
    if (job.by_x) combine(by_u.data, job.rows, job.units, job.weight, job.width, job.by_x);
    if (job.by_weight) combine(turned.data, job.units, job.rows, job.x, job.width, job.by_weight);
}

}  // namespace bllkern::BLLKERN_ISA
