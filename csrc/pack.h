// Words that are not zero, behind a bit for each word that says whether it is: what a message of activations needs.
//
// Packed: ceil(count / 64) masks of 64 bits, of which bit i of mask m belongs to word 64 m + i, then the words whose
// bit is set, in order.  Words are compared as integers, so that -0.0 and every NaN come through as they are.
#pragma once

#include <cstdint>

#include "isa.h"

namespace bllkern {

struct PackJob {
    void* words;    // [count] of word_bytes each: 1, 2, 4 or 8
    void* packed;   // any alignment
    int64_t count, word_bytes;
    int64_t bytes;  // of packed: of pack, the room there is; of unpack, what has come
};

// The bytes of `packed` that are used, or -1 where there is no room for what is needed.
BLLKERN_DECLARE(int64_t pack(const PackJob& job))

// Whether the masks fit the words that are there; only then `words` are written.
BLLKERN_DECLARE(bool unpack(const PackJob& job))

}  // namespace bllkern
