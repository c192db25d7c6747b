#include "linear_head.h"

#include "linear_cross_entropy.h"
#include "softmax.h"
#include "threads.h"

// Three small matrix products, each in blocks that stay in registers; blocks past the last row or class repeat the last.
namespace bllkern::BLLKERN_ISA {
namespace {

constexpr int64_t kPiece = 65536;  // products that a thread takes at a time
constexpr int kRows = 4, kClasses = 4, kVectors = 2;
constexpr int64_t kRun = 64;       // rows whose products are added in one run of float sums

BLLKERN_INLINE int64_t at_most(int64_t i, int64_t last) { return i < last ? i : last; }

// error [rows, classes] holds the logits without bias, then their gradient.
template <class T> struct Head {
    const LinearHeadJob& job;
    const T* x = static_cast<const T*>(job.x);
    const T* weight = static_cast<const T*>(job.weight);
    float* error;

    // logits of rows r.. and classes c..: x_r . w_c
    void logits(int64_t r, int64_t c) const {
        Lanes sums[kRows][kClasses] = {};
        const T *rows[kRows], *classes[kClasses];
        for (int i = 0; i < kRows; i++) rows[i] = x + at_most(r + i, job.rows - 1) * job.width;
        for (int j = 0; j < kClasses; j++) classes[j] = weight + at_most(c + j, job.classes - 1) * job.width;
        each_vector(0, job.width, [&](int64_t d, int64_t n) __attribute__((always_inline)) {
            Lanes w[kClasses];
            for (int j = 0; j < kClasses; j++) w[j] = load_first(classes[j] + d, n, 0.f);
            for (int i = 0; i < kRows; i++) {
                Lanes v = load_first(rows[i] + d, n, 0.f);
                for (int j = 0; j < kClasses; j++) sums[i][j] += v * w[j];
            }
        });
        for (int i = 0; i < kRows && r + i < job.rows; i++)
            for (int j = 0; j < kClasses && c + j < job.classes; j++)
                error[(r + i) * job.classes + c + j] = sum_quickly(sums[i][j]);
    }

    // grad_x of rows r..: sum_c e_rc w_c
    void by_x(int64_t r) const {
        auto block = [&](int64_t d, int64_t n, auto vectors) __attribute__((always_inline)) {
            constexpr int kCount = decltype(vectors)::value;
            Lanes sums[kRows][kCount] = {};
            for (int64_t c = 0; c < job.classes; c++)
                for (int v = 0; v < kCount; v++) {
                    Lanes w = load_first(weight + c * job.width + d + v * kLanes, n - v * kLanes, 0.f);
                    for (int i = 0; i < kRows; i++)
                        sums[i][v] += w * error[at_most(r + i, job.rows - 1) * job.classes + c];
                }
            for (int i = 0; i < kRows && r + i < job.rows; i++)
                for (int v = 0; v < kCount; v++)
                    store_first(static_cast<T*>(job.grad_x) + (r + i) * job.width + d + v * kLanes, sums[i][v],
                                n - v * kLanes);
        };
        each_block(block);
    }

    // grad_weight of classes c..: sum_r e_rc x_r, for the columns of block d
    void by_weight(int64_t c, int64_t d) const {
        auto block = [&](int64_t d, int64_t n, auto vectors) __attribute__((always_inline)) {
            constexpr int kCount = decltype(vectors)::value;
            Lanes totals[kClasses][kCount] = {};
            for (int64_t begin = 0; begin < job.rows; begin += kRun) {
                Lanes sums[kClasses][kCount] = {};
                for (int64_t r = begin; r < at_most(begin + kRun, job.rows); r++)
                    for (int v = 0; v < kCount; v++) {
                        Lanes row = load_first(x + r * job.width + d + v * kLanes, n - v * kLanes, 0.f);
                        for (int j = 0; j < kClasses; j++)
                            sums[j][v] += row * error[r * job.classes + at_most(c + j, job.classes - 1)];
                    }
                for (int j = 0; j < kClasses; j++)
                    for (int v = 0; v < kCount; v++) totals[j][v] += sums[j][v];
            }
            for (int j = 0; j < kClasses && c + j < job.classes; j++)
                for (int v = 0; v < kCount; v++)
                    store_first(static_cast<T*>(job.grad_weight) + (c + j) * job.width + d + v * kLanes, totals[j][v],
                                n - v * kLanes);
        };
        one_block(d, block);
    }

    static constexpr int64_t kBlock = kVectors * kLanes;  // columns

  private:
    template <int n> struct Count { static constexpr int value = n; };

    // block(d, n, how many vectors): whole blocks of kVectors vectors, then single vectors, the last partly filled
    template <class Block> BLLKERN_INLINE void whole_or_single(int64_t d, int64_t width, Block block) {
        if (d + kBlock <= width) return block(d, kBlock, Count<kVectors>{});
        each_vector(d, width, [&](int64_t i, int64_t n) __attribute__((always_inline)) { block(i, n, Count<1>{}); });
    }
    template <class Block> void one_block(int64_t d, Block block) const { whole_or_single(d, job.width, block); }
    template <class Block> void each_block(Block block) const {
        for (int64_t d = 0; d < job.width; d += kBlock) whole_or_single(d, job.width, block);
    }
};

void bias_to_float(const LinearHeadJob& job, float* out) {
    with_type(job.dtype, [&](auto type) {
        const auto* bias = static_cast<const decltype(type)*>(job.bias);
        each_vector(0, job.classes, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
            store_first(out + c, load_first(bias + c, n, 0.f), n);
        });
    });
}

template <class T> void by_bias(const LinearHeadJob& job, const float* error) {
    each_vector(0, job.classes, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        Lanes total = {};
        for (int64_t r = 0; r < job.rows; r++) total += load_first(error + r * job.classes + c, n, 0.f);
        store_first(static_cast<T*>(job.grad_bias) + c, total, n);
    });
}

template <class T> void run(const LinearHeadJob& job) {
    Scratch<float> error(job.rows * job.classes), bias(job.classes);
    Head<T> head{job};
    head.error = error.data;
    if (job.bias) bias_to_float(job, bias.data);
    const bool write = job.grad_x || job.grad_weight || job.grad_bias;
    const int64_t groups = (job.rows + kRows - 1) / kRows;
    Scratch<double> losses(groups);

    auto rows = [&](int64_t group) {
        const int64_t r = group * kRows, count = at_most(kRows, job.rows - r);
        for (int64_t c = 0; c < job.classes; c += kClasses) head.logits(r, c);
        SoftmaxErrorJob part = {
            error.data + r * job.classes, job.bias ? bias.data : nullptr, job.labels ? job.labels + r : nullptr,
            job.probabilities ? job.probabilities + r * job.classes : nullptr, count, job.classes, job.ignore_index,
            job.smoothing, job.scale, DType::float32, write};
        losses[group] = 0;
        for (int64_t i = 0; i < count; i++) losses[group] += softmax_row<float>(part, i);
        if (job.grad_x) head.by_x(r);
    };
    parallel_for(groups, kPiece / (kRows * job.width * job.classes + 1) + 1, rows);
    *job.loss = static_cast<float>(sum_in_order(losses.data, groups));

    const int64_t class_groups = (job.classes + kClasses - 1) / kClasses;
    auto columns = [&](int64_t i) {
        head.by_weight(i % class_groups * kClasses, i / class_groups * Head<T>::kBlock);
    };
    const int64_t blocks = (job.width + Head<T>::kBlock - 1) / Head<T>::kBlock;
    if (job.grad_weight)
        parallel_for(blocks * class_groups, kPiece / (kClasses * Head<T>::kBlock * job.rows + 1) + 1, columns);
    if (job.grad_bias) by_bias<T>(job, error.data);
}

}  // namespace

void linear_head(const LinearHeadJob& job) {
    with_type(job.dtype, [&](auto type) { run<decltype(type)>(job); });
}

}  // namespace bllkern::BLLKERN_ISA
