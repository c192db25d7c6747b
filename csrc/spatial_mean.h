// The mean over space of each map, and what it spreads back over the map.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bllkern {

struct SpatialMeanJob {
    void* x;     // [maps, places]; of spread_mean, the gradient by it
    void* mean;  // [maps]; of spread_mean, the gradient by it
    int64_t maps, places;
    DType dtype;  // of both
};

BLLKERN_DECLARE(void spatial_mean(const SpatialMeanJob& job))
BLLKERN_DECLARE(void spread_mean(const SpatialMeanJob& job))

}  // namespace bllkern
