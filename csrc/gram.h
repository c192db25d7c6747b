// The error of a tile of a Gram matrix of rows of length 1.
#pragma once

#include <cstdint>

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

// The sum of the squared errors of the tile and of its mirror image below the diagonal.
BLLKERN_DECLARE(double gram_error(const GramErrorJob& job))
BLLKERN_DECLARE(double sum_of_squares(const float* x, int64_t count))

}  // namespace bllkern
