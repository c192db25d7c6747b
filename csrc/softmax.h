// Softmax cross-entropy of one row of logits, and its gradient by them, which takes their place.
#pragma once

#include "elementary.h"
#include "linear_cross_entropy.h"
#include "rows.h"

namespace bllkern::BLLKERN_ISA {

constexpr float kLowest = -__builtin_inff();

// What a row should predict: one class, or a weight for each.
struct RowTarget {
    int64_t label;               // used where probabilities is null
    const float* probabilities;  // [classes] or null
    float smoothing;             // the share that is spread over all classes

    BLLKERN_MEMBER double own() const { return 1. - smoothing; }
    BLLKERN_MEMBER double uniform(int64_t classes) const {
        return static_cast<double>(smoothing) / static_cast<double>(classes);
    }
};

// p_c of n classes from c on, where the label's own share is not yet in it; `uniform` is the share of every class.
BLLKERN_INLINE Lanes class_weights(const RowTarget& t, int64_t c, int64_t n, float uniform) {
    return t.probabilities ? load_first(t.probabilities + c, n, 0.f) * (1.f - t.smoothing) + uniform
                           : splat<Lanes>(uniform);
}

// sum_c p_c
BLLKERN_INLINE double total_weight(const RowTarget& t, int64_t classes) {
    if (!t.probabilities) return 1;
    return t.smoothing + t.own() * sum_vectors(classes, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        return load_first(t.probabilities + c, n, 0.f);
    });
}

// e^z of z <= 0; 0 where that is no normal float
BLLKERN_INLINE Lanes exponential(Lanes z) {
    return select(z < -87.f, splat<Lanes>(0.f), exp_nonpositive(z).value);
}

// The logits z = values + bias of one row.
template <class T> struct RowLogits {
    T* values;
    const float* bias;  // [classes] or null
    int64_t classes;

    // z of n classes from c on, then -infinity
    BLLKERN_MEMBER Lanes at(int64_t c, int64_t n) const {
        Lanes z = load_first(values + c, n, kLowest);
        return bias ? z + load_first(bias + c, n, 0.f) : z;
    }
    BLLKERN_MEMBER float of(int64_t c) const { return load_first(values + c, 1, 0.f)[0] + (bias ? bias[c] : 0.f); }
    BLLKERN_MEMBER float largest() const {
        Lanes result = splat<Lanes>(kLowest);
        each_vector(0, classes, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
            result = max(result, at(c, n));
        });
        return maximum(result);
    }
};

// sum_c p_c (z_c - m), where classes with p_c = 0 are left out: their logits may be -infinity.
template <class T> BLLKERN_INLINE double expected_logit(const RowLogits<T>& z, const RowTarget& target, float m) {
    double uniform = target.uniform(z.classes), result = 0;
    if (!target.probabilities && target.own() > 0) result = target.own() * (z.of(target.label) - m);
    if (!target.probabilities && !(uniform > 0)) return result;
    return result + sum_vectors(z.classes, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        Lanes p = class_weights(target, c, n, static_cast<float>(uniform)), difference = z.at(c, n) - m;
        Lanes terms = select(p > 0.f, p * difference, splat<Lanes>(0.f));
        for (int l = static_cast<int>(n); l < kLanes; l++) terms[l] = 0;
        return terms;
    });
}

// Replaces the logits by softmax_scale e^(z_c - m) - scale p_c.
template <class T>
BLLKERN_INLINE void write_error(const RowLogits<T>& z, const RowTarget& target, float m, float softmax_scale,
                                float scale) {
    const double uniform = target.uniform(z.classes);
    const float spread = static_cast<float>(uniform), label_weight = static_cast<float>(target.own() + uniform);
    const float label_logit = target.probabilities ? 0.f : z.of(target.label) - m;
    const float label_error = exponential(splat<Lanes>(label_logit))[0] * softmax_scale - scale * label_weight;
    each_vector(0, z.classes, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        Lanes p = class_weights(target, c, n, spread);
        store_first(z.values + c, exponential(z.at(c, n) - m) * softmax_scale - p * scale, n);
    });
    if (target.probabilities) return;
    T error[kLanes];
    store(error, splat<Lanes>(label_error));
    z.values[target.label] = error[0];
}

// Cross-entropy sum_c p_c (lse - z_c) of z = logits + bias, times `scale`.  Where `write`, the logits become its
// gradient, scale (softmax(z)_c sum_c p_c - p_c).
//
// With m the largest z the cost is log(sum_c e^(z_c - m)) sum_c p_c - sum_c p_c (z_c - m).  `bias` may be null.
template <class T>
BLLKERN_INLINE double softmax_error(T* logits, const float* bias, int64_t classes, const RowTarget& target, float scale,
                                    bool write) {
    const RowLogits<T> z = {logits, bias, classes};
    const float m = z.largest();
    const double sum = sum_vectors(classes, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        return exponential(z.at(c, n) - m);
    });
    const double total = total_weight(target, classes), expected = expected_logit(z, target, m);
    if (write) write_error(z, target, m, static_cast<float>(scale * total / sum), scale);
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
