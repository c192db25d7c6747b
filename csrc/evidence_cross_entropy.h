// Class-normalised prediction (BLL, arXiv 2305.14974): log evidence of every class, softmax cross-entropy over them,
// and the gradients by a, messages and priors, without a tensor of rows x classes x width.
#pragma once

#include <cstdint>

#include "agreement.h"
#include "isa.h"

namespace bllkern {

struct EvidenceJob {
    const void* a;               // [rows, width]
    const void* messages;        // [classes, width]
    const void* log_prior;       // [classes] or null
    const int64_t* labels;       // [rows], or null where probabilities are given
    const float* probabilities;  // [rows, classes] or null
    void* grad_a;                // like a, or null
    void* grad_messages;         // like messages, or null
    void* grad_log_prior;        // [classes] or null
    float* loss;                 // [1]
    float* workspace;            // EvidenceWorkspace::size floats; its contents do not matter
    int64_t rows, classes, width;
    int64_t group;  // units of a categorical group; divides width
    int64_t ignore_index;
    float smoothing;  // the share of every target that is spread over all classes
    Family family;
    DType dtype;  // of a, messages, log_prior and the gradients
    float scale;  // of loss and gradients
};

// Categorical groups above this size are summed over blocks, and their sums kept [groups, classes, rows].  Smaller ones
// lie in a block as a whole; 64 units of kChunk rows (csrc/evidence_gradients.h) are 128 KiB, a part of a core's L2.
constexpr int64_t kLargeGroup = 64;

// Floats of the widest vector of any instruction set, AVX-512's; the parts of the workspace are multiples of it.
constexpr int64_t kWidestVector = 16;
static constexpr int64_t whole_vectors(int64_t n) { return (n + kWidestVector - 1) / kWidestVector * kWidestVector; }

// The parts of the workspace.  What code is outside BLLKERN_ISA is inlined, see csrc/simd.h.
struct EvidenceWorkspace {
    int64_t rows;           // padded
    int64_t large;          // groups that are summed over blocks
    float* error;           // [classes, rows] log evidences, then the softmax error
    float* rest;            // [classes, rows] what rounding the log evidences left
    float* errors;          // [large, classes, rows] sums of each group, then the error divided by them
    float* differences;     // [large, classes, rows] those sums less 1
    float* tops_l;          // [large, classes, rows] of wide groups (csrc/evidence_wide.h)
    float* tops_b;          // [large, classes, rows]
    float* highest;         // [large, rows] largest a of each group
    float* weight;          // [large, rows] 1 / sum of exp(a - highest)
    float* wide;            // [large, classes] whether the group is wide
    float* mean;            // [width] the mean message, of families that are taken relative to it
    float* row_loss;        // [rows]
    float* over_classes;    // [large, rows] sum over classes of errors times sums less 1
    float* over_rows;       // [classes] sum over rows of the error
    int64_t size;

    inline __attribute__((always_inline)) EvidenceWorkspace(const EvidenceJob& job, float* base) {
        rows = whole_vectors(job.rows);
        large = job.family == Family::categorical && job.group > kLargeGroup ? job.width / job.group : 0;
        size = 0;
        auto take = [&](int64_t n) __attribute__((always_inline)) {
            float* p = base ? base + size : nullptr;
            size += whole_vectors(n);
            return p;
        };
        error = take(job.classes * rows), rest = take(job.classes * rows);
        errors = take(large * job.classes * rows), differences = take(large * job.classes * rows);
        tops_l = take(large * job.classes * rows), tops_b = take(large * job.classes * rows);
        highest = take(large * rows), weight = take(large * rows), wide = take(large * job.classes);
        mean = take(job.family == Family::gaussian_learned ? job.width : 0);
        row_loss = take(rows), over_classes = take(large * rows), over_rows = take(job.classes);
    }
};

BLLKERN_DECLARE(void evidence_cross_entropy(const EvidenceJob& job))

}  // namespace bllkern
