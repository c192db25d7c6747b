#include "normalize.h"

#include "direction.h"
#include "elementary.h"
#include "threads.h"

namespace bllkern::BLLKERN_ISA {
namespace {

constexpr int64_t kPiece = 16384;  // elements that a thread takes at a time

template <class T> void normalize(const NormalizeJob& job) {
    auto row = [&](int64_t r) {
        const T* x = static_cast<const T*>(job.x) + r * job.width;
        float* out = job.normalized + r * job.width;
        Direction d = {0, 0};
        if (!job.labels || job.labels[r] != job.ignore_index) d = Direction::of(x, job.width);
        if (d.reciprocal == 0) {
            memset(out, 0, job.width * sizeof(float));
            return;
        }
        each_vector(0, job.width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
            store_first(out + i, (load_first(x + i, n, 0.f) - d.mean) * d.reciprocal, n);
        });
    };
    parallel_for(job.rows, kPiece / job.width + 1, row);
}

// With the row's direction u and the gradient g by it: by x it is (g - mean(g) - u (u . g)) / length, as u has mean 0.
template <class T> void gradient(const NormalizeGradientJob& job) {
    auto row = [&](int64_t r) {
        const T* x = static_cast<const T*>(job.x) + r * job.width;
        T* out = static_cast<T*>(job.grad_x) + r * job.width;
        Direction d = {0, 0};
        bool counted = !job.labels || job.labels[r] != job.ignore_index;
        if (counted) d = Direction::of(x, job.width);
        if (d.reciprocal == 0) {
            memset(static_cast<void*>(out), 0, job.width * sizeof(T));
            return;
        }
        const int64_t label = job.labels ? job.labels[r] : 0;
        const float* by_row = job.by_rows ? job.by_rows + r * job.width : nullptr;
        const float* by_class = job.by_classes ? job.by_classes + label * job.width : nullptr;
        const float share = job.scale / static_cast<float>(job.counts ? job.counts[label] : 1);
        auto upstream = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
            Lanes g = by_row ? load_first(by_row + i, n, 0.f) * job.scale : Lanes{};
            return by_class ? load_first(by_class + i, n, 0.f) * share + g : g;
        };
        auto direction = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
            return (load_first(x + i, n, d.mean) - d.mean) * d.reciprocal;
        };
        double total = sum_vectors(job.width, upstream);
        double along = sum_vectors(job.width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
            return upstream(i, n) * direction(i, n);
        });
        const float mean = static_cast<float>(total / static_cast<double>(job.width)), dot = static_cast<float>(along);
        each_vector(0, job.width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
            store_first(out + i, (upstream(i, n) - mean - direction(i, n) * dot) * d.reciprocal, n);
        });
    };
    parallel_for(job.rows, kPiece / job.width + 1, row);
}

}  // namespace

int64_t normalize_rows(const NormalizeJob& job) {
    if (job.width) with_type(job.dtype, [&](auto type) { normalize<decltype(type)>(job); });
    if (!job.labels) return job.rows;
    int64_t counted = 0;
    for (int64_t r = 0; r < job.rows; r++) counted += job.labels[r] != job.ignore_index;
    return counted;
}

void normalize_gradient(const NormalizeGradientJob& job) {
    if (job.width) with_type(job.dtype, [&](auto type) { gradient<decltype(type)>(job); });
}

}  // namespace bllkern::BLLKERN_ISA
