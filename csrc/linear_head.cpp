#include "linear_head.h"

#include "linear_cross_entropy.h"
#include "products.h"
#include "softmax.h"
#include "threads.h"

namespace bllkern::BLLKERN_ISA {
namespace {

constexpr int64_t kPiece = 65536;  // products that a thread takes at a time
constexpr int kSums = 8;           // classes whose weights' gradients are added up together

template <class T> void to_float(const T* x, int64_t count, float* out) {
    each_vector(0, count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        store_first(out + i, load_first(x + i, n, 0.f), n);
    });
}

// x as operands for the time of a call.
template <class T, class Operand> struct As : Scratch<float> {
    As(const T* x, int64_t count) : Scratch<float>(count) { to_float(x, count, data); }
};
template <class T> struct As<T, T> {
    const T* data;
    As(const T* x, int64_t) : data(x) {}
};

// grad_weight of classes c..c + count - 1, columns d..: sum_r e_rc x_r with the gradient e [rows, classes] by the logits
template <class T, int count> void by_weight(const LinearHeadJob& job, const float* error, int64_t c, int64_t d) {
    const T* x = static_cast<const T*>(job.x);
    auto block = [&](int64_t d, int64_t n, auto vectors) __attribute__((always_inline)) {
        constexpr int kCount = decltype(vectors)::value;
        Lanes totals[count][kCount] = {};
        for (int64_t begin = 0; begin < job.rows; begin += kRun) {
            Lanes sums[count][kCount] = {};
            for (int64_t r = begin; r < at_most(begin + kRun, job.rows); r++)
                for (int v = 0; v < kCount; v++) {
                    Lanes row = load_first(x + r * job.width + d + v * kLanes, n - v * kLanes, 0.f);
                    for (int j = 0; j < count; j++)
                        sums[j][v] += row * error[r * job.classes + at_most(c + j, job.classes - 1)];
                }
            for (int j = 0; j < count; j++)
                for (int v = 0; v < kCount; v++) totals[j][v] += sums[j][v];
        }
        for (int j = 0; j < count && c + j < job.classes; j++)
            for (int v = 0; v < kCount; v++)
                store_first(static_cast<T*>(job.grad_weight) + (c + j) * job.width + d + v * kLanes, totals[j][v],
                            n - v * kLanes);
    };
    one_block(d, job.width, block);
}

template <class T> void by_bias(const LinearHeadJob& job, const float* error) {
    each_vector(0, job.classes, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        Lanes total = {};
        for (int64_t r = 0; r < job.rows; r++) total += load_first(error + r * job.classes + c, n, 0.f);
        store_first(static_cast<T*>(job.grad_bias) + c, total, n);
    });
}

template <class T> double run(const LinearHeadJob& job) {
    using Operand = typename Operands<T>::Type;
    Scratch<float> error(job.rows * job.classes), bias(job.classes);  // error: the logits, then the gradient by them
    As<T, Operand> weight(static_cast<const T*>(job.weight), job.classes * job.width);
    const T* x = static_cast<const T*>(job.x);
    if (job.bias) to_float(static_cast<const T*>(job.bias), job.classes, bias.data);
    const bool write = job.grad_x || job.grad_weight || job.grad_bias;
    const int64_t groups = (job.rows + kRows - 1) / kRows;
    Scratch<double> losses(groups);

    auto rows = [&](int64_t group) {
        const int64_t r = group * kRows, count = at_most(kRows, job.rows - r);
        As<T, Operand> part(x + r * job.width, count * job.width);
        for (int64_t c = 0; c < job.classes; c += kColumns)  // logits of the rows and classes c..: x_r . w_c
            dot_rows<T>(part.data, count, weight.data + c * job.width, job.classes - c, job.width,
                        error.data + r * job.classes + c, job.classes);
        SoftmaxErrorJob softmax = {
            error.data + r * job.classes, job.bias ? bias.data : nullptr, job.labels ? job.labels + r : nullptr,
            job.probabilities ? job.probabilities + r * job.classes : nullptr, count, job.classes, job.ignore_index,
            job.smoothing, job.scale, DType::float32, write};
        losses[group] = 0;
        for (int64_t i = 0; i < count; i++) losses[group] += softmax_row<float>(softmax, i);
        if (job.grad_x)  // sum_c e_rc w_c
            combine_rows(error.data + r * job.classes, count, job.classes, weight.data, job.width,
                         static_cast<T*>(job.grad_x) + r * job.width);
    };
    parallel_for(groups, kPiece / (kRows * job.width * job.classes + 1) + 1, rows);

    const int64_t class_groups = (job.classes + kSums - 1) / kSums, block = kVectors * kLanes;
    auto columns = [&](int64_t i) {
        const int64_t c = i % class_groups * kSums, d = i / class_groups * block;
        c + kSums / 2 < job.classes ? by_weight<T, kSums>(job, error.data, c, d)
                                    : by_weight<T, kSums / 2>(job, error.data, c, d);
    };
    const int64_t blocks = (job.width + block - 1) / block;
    if (job.grad_weight) parallel_for(blocks * class_groups, kPiece / (kSums * block * job.rows + 1) + 1, columns);
    if (job.grad_bias) by_bias<T>(job, error.data);
    return sum_in_order(losses.data, groups);
}

}  // namespace

double linear_head(const LinearHeadJob& job) {
    double loss = 0;
    with_type(job.dtype, [&](auto type) { loss = run<decltype(type)>(job); });
    return loss;
}

}  // namespace bllkern::BLLKERN_ISA
