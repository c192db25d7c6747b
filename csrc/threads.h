// A parallel loop on torch's own OpenMP threads, without linking to torch or to an OpenMP library.
#pragma once

#include <cstdint>

namespace bllkern {

using Range = void (*)(void* context, int64_t begin, int64_t end);

// Calls range(context, begin, end) for consecutive pieces of [0, count) of at most `grain` each, on as many threads as
// torch.set_num_threads allows.  Which thread runs a piece is not determined; what the pieces are depends on `grain`
// alone.  Serial where no OpenMP library is loaded.
void parallel_ranges(int64_t count, int64_t grain, Range range, void* context);

// Calls body(i) for each i of [0, count), `grain` of them in one piece.
template <class Body> static void parallel_for(int64_t count, int64_t grain, Body& body) {
    auto range = [](void* context, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) (*static_cast<Body*>(context))(i);
    };
    parallel_ranges(count, grain, range, &body);
}

}  // namespace bllkern
