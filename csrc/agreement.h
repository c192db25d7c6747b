// Agreement of two messages and its gradients (BLL, arXiv 2305.14974): csrc/families.h over whole tensors.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bllkern {

enum class Family { bernoulli, categorical, gaussian, gaussian_learned, poisson };
constexpr const char* kFamilyNames[] = {"bernoulli", "categorical", "gaussian", "gaussian_learned", "poisson"};

struct AgreementJob {
    const void* a;   // [rows, width]
    const void* b;   // [rows, width]
    void* grad_a;    // [rows, width] or null
    void* grad_b;    // [rows, width] or null
    float* loss;     // [rows] if per_row, else [1]
    int64_t rows, width;
    int64_t group;   // units of a categorical group; divides width
    Family family;
    DType dtype;     // of a, b and the gradients
    bool per_row;    // a loss for each row, not their sum
    float scale;     // of the gradients and of the sum; 1 if per_row
};

BLLKERN_DECLARE(void agreement(const AgreementJob& job))

// On the current device.  `partials` holds agreement_cuda_partials(job) floats; its contents do not matter.  Returns
// null or what went wrong.
int64_t agreement_cuda_partials(const AgreementJob& job);
const char* agreement_cuda(const AgreementJob& job, float* partials, void* stream);

}  // namespace bllkern
