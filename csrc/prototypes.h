// Means by class of rows centred and scaled to length 1.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bllkern {

struct PrototypesJob {
    const void* x;          // [rows, width]
    const int64_t* labels;  // [rows], each below classes or ignore_index: such rows do not count
    float* prototypes;      // [classes, width]; 0 for absent classes
    int64_t* counts;        // [classes]
    int64_t rows, width, classes;
    int64_t ignore_index;
    DType dtype;  // of x
};

BLLKERN_DECLARE(void prototypes(const PrototypesJob& job))

}  // namespace bllkern
