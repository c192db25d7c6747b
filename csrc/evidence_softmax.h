// Softmax cross-entropy of log evidences that lie one row a lane.
#pragma once

#include "elementary.h"

namespace bllkern::BLLKERN_ISA {

// The target of kLanes rows: class indices, or probabilities [rows, classes].
class SoftmaxTarget {
    const float* probabilities;
    int64_t classes;
    int rows;
    Ints label = {};

  public:
    float scale;        // of the error of each row that counts
    Ints counted = {};  // -1 or 0

    // Of the lanes, `rows` are there; labels or probabilities is null.
    SoftmaxTarget(const int64_t* labels, const float* probabilities, int64_t classes, int64_t ignore_index, int rows,
                  float scale)
        : probabilities(probabilities), classes(classes), rows(rows), scale(scale) {
        for (int l = 0; l < rows; l++) {
            label[l] = labels ? static_cast<int32_t>(labels[l]) : -1;
            counted[l] = -(!labels || labels[l] != ignore_index);
        }
    }

    Lanes probability(int64_t c) const {
        if (!probabilities) return select(label == static_cast<int32_t>(c), splat<Lanes>(1.f), splat<Lanes>(0.f));
        Lanes result = {};
        for (int l = 0; l < rows; l++) result[l] = probabilities[l * classes + c];
        return result;
    }
};

// logits [classes, stride] are unevaluated sums of two floats, x + rest, and become the error
// (softmax * total - probability) * scale.  Returns the losses of the rows: total * log sum exp(x) - sum of
// probability * x, both relative to the largest x; classes without probability cost nothing.
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
        Lanes value = exp(difference), probability = target.probability(c);
        sum += value, total += probability;
        cost -= select(probability > 0.f, probability * difference, zero);
        store(x + c * stride, value);
    }
    Lanes factor = divide(total, sum) * target.scale;
    for (int64_t c = 0; c < classes; c++) {
        Lanes error = load(x + c * stride) * factor - target.probability(c) * target.scale;
        store(x + c * stride, select(target.counted, error, zero));
    }
    return select(target.counted, cost + total * log(sum), zero);
}

}  // namespace bllkern::BLLKERN_ISA
