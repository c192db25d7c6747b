#include "threads.h"

#include <dlfcn.h>

#include <atomic>

namespace bllkern {
namespace {

// torch loads its OpenMP library into the global scope; both GCC's and LLVM's have these two functions.
struct OpenMP {
    using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
    using MaxThreads = int (*)();
    Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    MaxThreads max_threads = reinterpret_cast<MaxThreads>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"));
};

struct Loop {
    Range range;
    void* context;
    int64_t count, grain;
    std::atomic<int64_t> next{0};

    void work() {
        for (int64_t begin; (begin = next.fetch_add(grain, std::memory_order_relaxed)) < count;)
            range(context, begin, begin + grain < count ? begin + grain : count);
    }
};

}  // namespace

void parallel_ranges(int64_t count, int64_t grain, Range range, void* context) {
    Loop loop{range, context, count, grain};
    if (count > grain) {
        static const OpenMP openmp;
        int64_t pieces = (count + grain - 1) / grain;
        int64_t threads = openmp.parallel && openmp.max_threads ? openmp.max_threads() : 1;
        threads = threads < pieces ? threads : pieces;
        if (threads > 1) {
            auto work = [](void* data) { static_cast<Loop*>(data)->work(); };
            openmp.parallel(work, &loop, static_cast<unsigned>(threads), 0);
            return;
        }
    }
    loop.work();
}

}  // namespace bllkern
