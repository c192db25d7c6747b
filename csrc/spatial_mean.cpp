#include "spatial_mean.h"

#include "rows.h"
#include "threads.h"

namespace bllkern::BLLKERN_ISA {
namespace {

constexpr int64_t kMaps = 4;       // are summed together
constexpr int64_t kPiece = 16384;  // places that a thread takes at a time

// The means of maps m..m + 3; those past the last repeat it.
template <class T> void means(const SpatialMeanJob& job, int64_t m) {
    const int64_t count = job.maps - m < kMaps ? job.maps - m : kMaps;
    const T* maps[kMaps];
    Lanes sums[kMaps] = {};
    for (int64_t i = 0; i < kMaps; i++)
        maps[i] = static_cast<const T*>(job.x) + (m + (i < count ? i : count - 1)) * job.places;
    each_vector(0, job.places, [&](int64_t p, int64_t n) __attribute__((always_inline)) {
        for (int64_t i = 0; i < kMaps; i++) sums[i] += load_first(maps[i] + p, n, 0.f);
    });
    float total[kLanes] = {};
    store_sums(total, sums[0], sums[1], sums[2], sums[3]);
    store_first(static_cast<T*>(job.mean) + m, load(total) * (1.f / static_cast<float>(job.places)), count);
}

template <class T> void spread(const SpatialMeanJob& job, int64_t m) {
    T* map = static_cast<T*>(job.x) + m * job.places;
    const float share = load_first(static_cast<const T*>(job.mean) + m, 1, 0.f)[0] / static_cast<float>(job.places);
    each_vector(0, job.places, [&](int64_t p, int64_t n) __attribute__((always_inline)) {
        store_first(map + p, Lanes{} + share, n);
    });
}

}  // namespace

void spatial_mean(const SpatialMeanJob& job) {
    with_type(job.dtype, [&](auto type) {
        auto group = [&](int64_t i) { means<decltype(type)>(job, i * kMaps); };
        parallel_for((job.maps + kMaps - 1) / kMaps, kPiece / (kMaps * job.places + 1) + 1, group);
    });
}

void spread_mean(const SpatialMeanJob& job) {
    with_type(job.dtype, [&](auto type) {
        auto map = [&](int64_t m) { spread<decltype(type)>(job, m); };
        parallel_for(job.maps, kPiece / (job.places + 1) + 1, map);
    });
}

}  // namespace bllkern::BLLKERN_ISA
