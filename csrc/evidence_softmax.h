// Softmax cross-entropy of log evidences that lie one row a lane.
#pragma once

#include "elementary.h"

namespace bllkern::BLLKERN_ISA {

// The target of kLanes rows: class indices, or probabilities [rows, classes].
class SoftmaxTarget {
    const float* probabilities;
    int64_t classes;
    int rows;
    float smoothing, own, uniform;  // the share that is spread over all classes, the rest, and what each class gets
    Ints label = {};

  public:
    float scale;        // of the error of each row that counts
    Ints counted = {};  // -1 or 0

    // Of the lanes, `rows` are there; labels or probabilities is null.
    SoftmaxTarget(const int64_t* labels, const float* probabilities, int64_t classes, int64_t ignore_index,
                  float smoothing, int rows, float scale)
        : probabilities(probabilities), classes(classes), rows(rows), smoothing(smoothing),
          own(1.f - smoothing), uniform(smoothing / static_cast<float>(classes)), scale(scale) {
        for (int l = 0; l < rows; l++) {
            label[l] = labels ? static_cast<int32_t>(labels[l]) : -1;
            counted[l] = -(!labels || labels[l] != ignore_index);
        }
    }

    // p_c as it was given
    Lanes probability(int64_t c) const {
        if (!probabilities) return select(label == static_cast<int32_t>(c), splat<Lanes>(1.f), splat<Lanes>(0.f));
        Lanes result = {};
        for (int l = 0; l < rows; l++) result[l] = probabilities[l * classes + c];
        return result;
    }

    // From p_c, and from the sum of p, what smoothing makes of them; without smoothing the same to the bit.
    Lanes smoothed(Lanes p) const { return p * own + uniform; }
    Lanes smoothed_total(Lanes sum) const { return sum * own + smoothing; }
};

// logits [classes, stride] are unevaluated sums of two floats, x + rest, and become the error
// (softmax * total - p) * scale, p the smoothed target.  Returns the losses of the rows: total * log sum exp(x) - sum
// of p * x, both relative to the largest x; classes with p = 0 cost nothing.
BLLKERN_INLINE Lanes softmax_error(float* x, const float* rest, int64_t stride, int64_t classes,
                                   const SoftmaxTarget& target) {
    Lanes zero = splat<Lanes>(0.f), highest = splat<Lanes>(-__builtin_inff()), low = zero;
    for (int64_t c = 0; c < classes; c++) {
        Lanes logit = load(x + c * stride);
        auto higher = logit > highest;
        low = select(higher, load(rest + c * stride), low);
        highest = select(higher, logit, highest);
    }
    Lanes sum = zero, total = zero, cost = zero;
    for (int64_t c = 0; c < classes; c++) {
        Lanes difference = (load(x + c * stride) - highest) + (load(rest + c * stride) - low);
        Lanes value = exp(difference), probability = target.probability(c), p = target.smoothed(probability);
        sum += value, total += probability;
        cost -= select(p > 0.f, p * difference, zero);
        store(x + c * stride, value);
    }
    total = target.smoothed_total(total);
    Lanes factor = divide(total, sum) * target.scale;
    for (int64_t c = 0; c < classes; c++) {
        Lanes error = load(x + c * stride) * factor - target.smoothed(target.probability(c)) * target.scale;
        store(x + c * stride, select(target.counted, error, zero));
    }
    return select(target.counted, cost + total * log(sum), zero);
}

}  // namespace bllkern::BLLKERN_ISA
