// Softmax cross-entropy of one row of logits, and its gradient by them, which takes their place.
#pragma once

#include "elementary.h"
#include "linear_cross_entropy.h"
#include "rows.h"

namespace bllkern::BLLKERN_ISA {

// What a row should predict: one class, or a weight for each.
struct RowTarget {
    int64_t label;               // used where probabilities is null
    const float* probabilities;  // [classes] or null
    float smoothing;             // the share that is spread over all classes

};

// p_c of n classes from c on, where the label's own share is not yet in it; `uniform` is the share of every class.
BLLKERN_INLINE Lanes class_weights(const RowTarget& t, int64_t c, int64_t n, float uniform) {
    return t.probabilities ? load_first(t.probabilities + c, n, 0.f) * (1.f - t.smoothing) + uniform
                           : splat<Lanes>(uniform);
}

// Cross-entropy sum_c p_c (lse - z_c) of z = logits + bias, times `scale`.  Where `write`, the logits become its gradient
// scale (softmax(z)_c sum_c p_c - p_c).
//
// With m the largest z the cost is log(sum_c e^(z_c - m)) sum_c p_c - sum_c p_c (z_c - m).  Classes with p_c = 0 are left
// out of the second sum: their logits may be -infinity.  `bias` may be null.
template <class T>
BLLKERN_INLINE double softmax_error(T* logits, const float* bias, int64_t classes, const RowTarget& target, float scale,
                                    bool write) {
    constexpr float kLowest = -__builtin_inff();
    auto logit = [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        Lanes z = load_first(logits + c, n, kLowest);
        return bias ? z + load_first(bias + c, n, 0.f) : z;
    };
    Lanes largest = splat<Lanes>(kLowest);
    each_vector(0, classes, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        largest = max(largest, logit(c, n));
    });
    const float m = maximum(largest);
    auto exponential = [&](Lanes z) __attribute__((always_inline)) {
        return select(z < -87.f, splat<Lanes>(0.f), exp_nonpositive(z).value);
    };
    double sum = sum_vectors(classes, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        return exponential(logit(c, n) - m);
    });

    double uniform = static_cast<double>(target.smoothing) / static_cast<double>(classes), own = 1. - target.smoothing;
    double total = 1, expected = 0;  // sum_c p_c and sum_c p_c (z_c - m)
    float label_logit = 0;
    if (target.probabilities) {
        total = target.smoothing + own * sum_vectors(classes, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
            return load_first(target.probabilities + c, n, 0.f);
        });
    } else {
        label_logit = load_first(logits + target.label, 1, 0.f)[0] + (bias ? bias[target.label] : 0.f) - m;
        if (own > 0) expected = own * label_logit;
    }
    if (target.probabilities || uniform > 0) {
        expected += sum_vectors(classes, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
            Lanes p = class_weights(target, c, n, static_cast<float>(uniform)), z = logit(c, n) - m;
            Lanes terms = select(p > 0.f, p * z, splat<Lanes>(0.f));
            for (int l = static_cast<int>(n); l < kLanes; l++) terms[l] = 0;
            return terms;
        });
    }
    if (write) {
        const float softmax_scale = static_cast<float>(scale * total / sum), spread = static_cast<float>(uniform);
        const float label_error = exponential(splat<Lanes>(label_logit))[0] * softmax_scale -
                                  scale * static_cast<float>(own + uniform);
        each_vector(0, classes, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
            Lanes p = class_weights(target, c, n, spread);
            store_first(logits + c, exponential(logit(c, n) - m) * softmax_scale - p * scale, n);
        });
        if (!target.probabilities) {
            T error[kLanes];
            store(error, splat<Lanes>(label_error));
            logits[target.label] = error[0];
        }
    }
    return (__builtin_log(sum) * total - expected) * scale;
}

// The loss of row i of a job.
template <class T> BLLKERN_INLINE double softmax_row(const SoftmaxErrorJob& job, int64_t i) {
    T* logits = static_cast<T*>(job.logits) + i * job.classes;
    if (job.labels && job.labels[i] == job.ignore_index) {
        if (job.write) memset(static_cast<void*>(logits), 0, job.classes * sizeof(T));
        return 0;
    }
    RowTarget target = {
        job.labels ? job.labels[i] : 0,
        job.probabilities ? job.probabilities + i * job.classes : nullptr,
        job.smoothing,
    };
    return softmax_error(logits, job.bias, job.classes, target, job.scale, job.write);
}

}  // namespace bllkern::BLLKERN_ISA
