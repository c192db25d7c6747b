// Cross-entropy of a whole linear head in one call, for heads whose matrix products are too small for a library's.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bllkern {

struct LinearHeadJob {
    const void* x;               // [rows, width]
    const void* weight;          // [classes, width]
    const void* bias;            // [classes] or null
    const int64_t* labels;       // [rows], each below classes or ignore_index; null where probabilities are given
    const float* probabilities;  // [rows, classes] or null
    void* grad_x;                // like x, or null
    void* grad_weight;           // like weight, or null
    void* grad_bias;             // like bias, or null
    int64_t rows, width, classes;
    int64_t ignore_index;  // rows with this label have loss and gradient 0
    float smoothing;
    float scale;  // of loss and gradients
    DType dtype;  // of x, weight, bias and their gradients
};

// The sum of the rows' losses.
BLLKERN_DECLARE(double linear_head(const LinearHeadJob& job))

}  // namespace bllkern
