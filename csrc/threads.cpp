#include "threads.h"

#include <dlfcn.h>

#include <atomic>

namespace bllkern {
namespace {

// torch loads its OpenMP library into the global scope; both GCC's and LLVM's have these functions.
struct OpenMP {
    using Parallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
    using Number = int (*)();
    Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    Number max_threads = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"));
    Number thread = reinterpret_cast<Number>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));

    bool found() const { return parallel && max_threads && thread; }
};

const OpenMP& openmp() {
    static const OpenMP found;
    return found;
}

constexpr int64_t kMostThreads = 64;  // no more are asked for

// Pieces in shares of consecutive ones, a thread's own first: torch's and oneDNN's threads take the same parts of a
// tensor, so that much of what one wrote or read is in its core's cache.  Who has finished takes from other shares.
struct Loop {
    struct alignas(64) Share {
        std::atomic<int64_t> next;
        int64_t end;
    };
    Range range;
    void* context;
    int64_t count, grain, threads;
    Share shares[kMostThreads];

    Loop(Range range, void* context, int64_t count, int64_t grain, int64_t threads)
        : range(range), context(context), count(count), grain(grain), threads(threads) {
        const int64_t pieces = (count + grain - 1) / grain;
        for (int64_t i = 0; i < threads; i++) {
            shares[i].next.store(i * pieces / threads * grain, std::memory_order_relaxed);
            shares[i].end = i + 1 == threads ? count : (i + 1) * pieces / threads * grain;
        }
    }
    void work(int64_t thread) {
        for (int64_t i = 0; i < threads; i++) {
            Share& share = shares[(thread + i) % threads];
            for (int64_t begin; (begin = share.next.fetch_add(grain, std::memory_order_relaxed)) < share.end;)
                range(context, begin, begin + grain < count ? begin + grain : count);
        }
    }
};

}  // namespace

void parallel_ranges(int64_t count, int64_t grain, Range range, void* context) {
    const int64_t pieces = (count + grain - 1) / grain;
    int64_t threads = pieces > 1 && openmp().found() ? openmp().max_threads() : 1;
    threads = threads < pieces ? threads : pieces;
    if (threads < 2) {
        for (int64_t begin = 0; begin < count; begin += grain)
            range(context, begin, begin + grain < count ? begin + grain : count);
        return;
    }
    Loop loop(range, context, count, grain, threads < kMostThreads ? threads : kMostThreads);
    auto work = [](void* data) { static_cast<Loop*>(data)->work(openmp().thread()); };
    openmp().parallel(work, &loop, static_cast<unsigned>(loop.threads), 0);
}

}  // namespace bllkern
