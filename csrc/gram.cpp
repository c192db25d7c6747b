#include "gram.h"

#include "elementary.h"
#include "rows.h"
#include "threads.h"

namespace bllkern::BLLKERN_ISA {
namespace {

constexpr int64_t kPiece = 16384;  // elements that a thread takes at a time

typedef int64_t Longs __attribute__((vector_size(2 * kLaneBytes)));

// 1 where labels[0..n) equal `label`, else 0
BLLKERN_INLINE Lanes equal_labels(const int64_t* labels, int64_t n, int64_t label) {
    int64_t last[kLanes] = {};
    if (n < kLanes) memcpy(last, labels, n * sizeof *last);
    Longs equal = load_raw<Longs>(n < kLanes ? last : labels) == label;
    return select(__builtin_convertvector(equal, Ints), splat<Lanes>(1.f), splat<Lanes>(0.f));
}

BLLKERN_INLINE double squares(const float* x, int64_t count) {
    return sum_vectors(count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        Lanes e = load_first(x + i, n, 0.f);
        return e * e;
    });
}

}  // namespace

double gram_error(const GramErrorJob& job) {
    Scratch<double> losses(job.rows);
    auto row = [&](int64_t r) {
        float* gram = job.gram + r * job.columns;
        const int64_t* labels = job.labels ? job.labels + job.first : nullptr;
        if (labels && labels[r] != job.ignore_index)
            each_vector(0, job.columns, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
                store_first(gram + i, load_first(gram + i, n, 0.f) - equal_labels(labels + i, n, labels[r]), n);
            });
        if (job.without_diagonal) gram[r] = 0;
        losses[r] = squares(gram, job.rows) + 2 * squares(gram + job.rows, job.columns - job.rows);
    };
    parallel_for(job.rows, kPiece / (job.columns + 1) + 1, row);
    return sum_in_order(losses.data, job.rows);
}

double sum_of_squares(const float* x, int64_t count) {
    const int64_t pieces = (count + kPiece - 1) / kPiece;
    Scratch<double> sums(pieces);
    auto piece = [&](int64_t i) {
        int64_t left = count - i * kPiece;
        sums[i] = squares(x + i * kPiece, left < kPiece ? left : kPiece);
    };
    parallel_for(pieces, 1, piece);
    return sum_in_order(sums.data, pieces);
}

}  // namespace bllkern::BLLKERN_ISA
