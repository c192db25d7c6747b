#include "gram.h"

#include "elementary.h"
#include "normalize.h"
#include "products.h"
#include "threads.h"

namespace bllkern::BLLKERN_ISA {
namespace {

constexpr int64_t kPiece = 16384;     // elements that a thread takes at a time
constexpr int64_t kProducts = 65536;  // products that one does

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

// Rows u_i of length 1 with errors e_ij = u_i . u_j - target_ij have the loss sum(e_ij^2) / pairs, whose gradient by u_i is
// 4 / pairs sum_j e_ij u_j.
double gram_loss(const GramLossJob& job) {
    const int64_t rows = job.rows, width = job.width, groups = (rows + kRows - 1) / kRows;
    Scratch<float> u(rows * width), errors(rows * rows);
    const int64_t counted =
        normalize_rows({job.x, job.labels, u.data, rows, width, job.ignore_index, job.dtype});
    const double pairs = static_cast<double>(counted ? counted * counted : 1);
    const int64_t grain = kProducts / (kRows * rows * width + 1) + 1;
    auto products = [&](int64_t group) {
        const int64_t i = group * kRows;
        for (int64_t j = 0; j < rows; j += kColumns)
            dot_rows<float>(u.data + i * width, rows - i, u.data + j * width, rows - j, width,
                            errors.data + i * rows + j, rows);
    };
    parallel_for(groups, grain, products);
    const double loss = gram_error({errors.data, job.labels, 0, rows, rows, job.ignore_index, job.without_diagonal});
    if (job.grad_x) {
        Scratch<float> by_u(rows * width);
        auto gradient = [&](int64_t group) {
            const int64_t i = group * kRows;
            combine_rows(errors.data + i * rows, rows - i, rows, u.data, width, by_u.data + i * width);
        };
        parallel_for(groups, grain, gradient);
        normalize_gradient({job.x, by_u.data, nullptr, job.labels, nullptr, job.grad_x, rows, width, job.ignore_index,
                            static_cast<float>(4 / pairs), job.dtype});
    }
    return loss / pairs;
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
