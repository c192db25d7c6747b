// A linear layer, batch normalisation and ReLU as one call each way, for products too small for a library's.
#pragma once

#include <cstdint>

#include "isa.h"

namespace bllkern {

// y = (u - mean(u)) r by columns of u = x weight^T, r = 1 / sqrt(variance + eps); out = max(y, 0).
struct HiddenLayerJob {
    const float* x;       // [rows, width]
    const float* weight;  // [units, width]
    float* y;             // [rows, units]
    float* out;           // [rows, units]
    float* r;             // [units]
    int64_t rows, width, units;
    float eps;
};

struct HiddenLayerGradientJob {
    const float *x, *weight, *y, *r, *by_out;
    float* by_x;       // like x, or null
    float* by_weight;  // like weight, or null
    int64_t rows, width, units;
};

BLLKERN_DECLARE(void hidden_layer(const HiddenLayerJob& job))
BLLKERN_DECLARE(void hidden_layer_gradient(const HiddenLayerGradientJob& job))

}  // namespace bllkern
