#include "linear_head.h"

#include "linear_cross_entropy.h"
#include "softmax.h"
#include "threads.h"

// Three small matrix products, each in blocks that stay in registers; blocks past the last row or class repeat the last.
namespace bllkern::BLLKERN_ISA {
namespace {

constexpr int64_t kPiece = 65536;  // products that a thread takes at a time
constexpr int kRows = 4, kClasses = 4, kVectors = 2;
constexpr int kSums = 8;           // classes whose weights' gradients are added up together
constexpr int64_t kRun = 64;       // rows whose products are added in one run of float sums

BLLKERN_INLINE int64_t at_most(int64_t i, int64_t last) { return i < last ? i : last; }

template <class T> void to_float(const T* x, int64_t count, float* out) {
    each_vector(0, count, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        store_first(out + i, load_first(x + i, n, 0.f), n);
    });
}

// What the logits' products are taken of: floats or, where a vector has an instruction for it, pairs of bfloat16.
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

// x as operands for the time of a call.
template <class T, class Operand> struct As : Scratch<float> {
    As(const T* x, int64_t count) : Scratch<float>(count) { to_float(x, count, data); }
};
template <class T> struct As<T, T> {
    const T* data;
    As(const T* x, int64_t) : data(x) {}
};

// error [rows, classes] holds the logits without bias, then their gradient.
template <class T> struct Head {
    using Of = Operands<T>;
    using W = typename Of::Type;
    const LinearHeadJob& job;
    const W* weight;
    float* error;
    const T* x = static_cast<const T*>(job.x);

    // logits of rows r.., which `part` holds, and classes c..: x_r . w_c
    void logits(const W* part, int64_t r, int64_t c) const {
        Lanes sums[kRows][kClasses] = {};
        const W *rows[kRows], *classes[kClasses];
        for (int i = 0; i < kRows; i++) rows[i] = part + at_most(i, job.rows - 1 - r) * job.width;
        for (int j = 0; j < kClasses; j++) classes[j] = weight + at_most(c + j, job.classes - 1) * job.width;
        auto add = [&](int64_t d, int64_t n) __attribute__((always_inline)) {
            typename Of::Vector w[kClasses];
            for (int j = 0; j < kClasses; j++) w[j] = Of::load(classes[j] + d, n);
            for (int i = 0; i < kRows; i++) {
                typename Of::Vector v = Of::load(rows[i] + d, n);
                for (int j = 0; j < kClasses; j++) sums[i][j] = Of::add_product(sums[i][j], v, w[j]);
            }
        };
        int64_t d = 0;
        for (; d + Of::kWidth <= job.width; d += Of::kWidth) add(d, Of::kWidth);
        if (d < job.width) add(d, job.width - d);
        for (int i = 0; i < kRows && r + i < job.rows; i++) {
            const Lanes* of = sums[i];
            float last[kClasses], *out = error + (r + i) * job.classes + c;
            const bool whole = c + kClasses <= job.classes;
            store_sums(whole ? out : last, of[0], of[1], of[2], of[3]);
            if (!whole) memcpy(out, last, (job.classes - c) * sizeof *out);
        }
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

    // grad_weight of classes c..c + count - 1: sum_r e_rc x_r, for the columns of block d
    template <int count> void by_weight(int64_t c, int64_t d) const {
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

template <class T> void by_bias(const LinearHeadJob& job, const float* error) {
    each_vector(0, job.classes, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        Lanes total = {};
        for (int64_t r = 0; r < job.rows; r++) total += load_first(error + r * job.classes + c, n, 0.f);
        store_first(static_cast<T*>(job.grad_bias) + c, total, n);
    });
}

template <class T> double run(const LinearHeadJob& job) {
    using Operand = typename Operands<T>::Type;
    Scratch<float> error(job.rows * job.classes), bias(job.classes);
    As<T, Operand> weight(static_cast<const T*>(job.weight), job.classes * job.width);
    Head<T> head{job, weight.data, error.data};
    if (job.bias) to_float(static_cast<const T*>(job.bias), job.classes, bias.data);
    const bool write = job.grad_x || job.grad_weight || job.grad_bias;
    const int64_t groups = (job.rows + kRows - 1) / kRows;
    Scratch<double> losses(groups);

    auto rows = [&](int64_t group) {
        const int64_t r = group * kRows, count = at_most(kRows, job.rows - r);
        As<T, Operand> part(head.x + r * job.width, count * job.width);
        for (int64_t c = 0; c < job.classes; c += kClasses) head.logits(part.data, r, c);
        SoftmaxErrorJob softmax = {
            error.data + r * job.classes, job.bias ? bias.data : nullptr, job.labels ? job.labels + r : nullptr,
            job.probabilities ? job.probabilities + r * job.classes : nullptr, count, job.classes, job.ignore_index,
            job.smoothing, job.scale, DType::float32, write};
        losses[group] = 0;
        for (int64_t i = 0; i < count; i++) losses[group] += softmax_row<float>(softmax, i);
        if (job.grad_x) head.by_x(r);
    };
    parallel_for(groups, kPiece / (kRows * job.width * job.classes + 1) + 1, rows);

    const int64_t class_groups = (job.classes + kSums - 1) / kSums, block = head.kBlock;
    auto columns = [&](int64_t i) {
        const int64_t c = i % class_groups * kSums, d = i / class_groups * block;
        c + kSums / 2 < job.classes ? head.template by_weight<kSums>(c, d) : head.template by_weight<kSums / 2>(c, d);
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
