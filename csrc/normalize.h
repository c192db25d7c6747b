// Rows centred and scaled to length 1, and the gradient back through that.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bllkern {

// Constant rows, and rows whose label is ignore_index, have no direction: they become 0.
struct NormalizeJob {
    const void* x;          // [rows, width]
    const int64_t* labels;  // [rows] or null, where every row counts
    float* normalized;      // [rows, width]
    int64_t rows, width;
    int64_t ignore_index;
    DType dtype;  // of x
};

// The gradient by each normalized row n is scale * (by_rows[n] + by_classes[labels[n]] / counts[labels[n]]).
struct NormalizeGradientJob {
    const void* x;            // [rows, width]
    const float* by_rows;     // [rows, width] or null
    const float* by_classes;  // [classes, width] or null
    const int64_t* labels;    // [rows]; null without by_classes where every row counts
    const int64_t* counts;    // [classes], or null for 1
    void* grad_x;             // [rows, width]
    int64_t rows, width;
    int64_t ignore_index;
    float scale;
    DType dtype;  // of x and grad_x
};

// How many rows count, constant ones among them.
BLLKERN_DECLARE(int64_t normalize_rows(const NormalizeJob& job))
BLLKERN_DECLARE(void normalize_gradient(const NormalizeGradientJob& job))

}  // namespace bllkern
