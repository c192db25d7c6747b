#include "linear_cross_entropy.h"

#include "softmax.h"
#include "threads.h"

namespace bllkern::BLLKERN_ISA {
namespace {

constexpr int64_t kPiece = 16384;  // logits that a thread takes at a time

template <class T> double run(const SoftmaxErrorJob& job) {
    Scratch<double> losses(job.rows);
    auto row = [&](int64_t i) { losses[i] = softmax_row<T>(job, i); };
    parallel_for(job.rows, kPiece / job.classes + 1, row);
    return sum_in_order(losses.data, job.rows);
}

}  // namespace

double softmax_errors(const SoftmaxErrorJob& job) {
    double loss = 0;
    with_type(job.dtype, [&](auto type) { loss = run<decltype(type)>(job); });
    return loss;
}

}  // namespace bllkern::BLLKERN_ISA
