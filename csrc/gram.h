// The error of the Gram matrix of rows of length 1: of a tile of it, or whole, with its gradient.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bllkern {

// Rows first .. first + rows of the matrix, columns first .. first + columns: a tile that begins on the diagonal.
struct GramErrorJob {
    float* gram;            // [rows, columns]; the target is subtracted in place
    const int64_t* labels;  // [first + columns] or null: the target is 1 for equal labels but ignore_index
    int64_t first, rows, columns;
    int64_t ignore_index;
    bool without_diagonal;  // the target of the diagonal is what the diagonal holds
};

// Few rows that are not yet of length 1: matrix products too small for a library's.
struct GramLossJob {
    const void* x;          // [rows, width]
    const int64_t* labels;  // [rows] or null, as above
    void* grad_x;           // like x, or null
    int64_t rows, width;
    int64_t ignore_index;
    bool without_diagonal;
    DType dtype;  // of x and grad_x
};

// The mean of the squared errors of all pairs of rows that count.
BLLKERN_DECLARE(double gram_loss(const GramLossJob& job))

// The sum of the squared errors of the tile and of its mirror image below the diagonal.
BLLKERN_DECLARE(double gram_error(const GramErrorJob& job))
BLLKERN_DECLARE(double sum_of_squares(const float* x, int64_t count))

}  // namespace bllkern
