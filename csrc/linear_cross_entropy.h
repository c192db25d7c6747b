// The part of a linear head's cross-entropy between its matrix products: logits of a tile of rows to their gradient.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bllkern {

struct SoftmaxErrorJob {
    void* logits;                // [rows, classes] without the bias; becomes the gradient where `write`
    const float* bias;           // [classes] or null
    const int64_t* labels;       // [rows], each below classes or ignore_index; null where probabilities are given
    const float* probabilities;  // [rows, classes] or null
    int64_t rows, classes;
    int64_t ignore_index;  // rows with this label have loss and gradient 0
    float smoothing;
    float scale;   // of losses and gradients
    DType dtype;   // of the logits
    bool write;
};

// The sum of the rows' losses.
BLLKERN_DECLARE(double softmax_errors(const SoftmaxErrorJob& job))

}  // namespace bllkern
