#include "isa.h"

#include <atomic>

namespace bllkern {

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == Isa::avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return isa == Isa::baseline;
}

static std::atomic<Isa> current{isa_supported(Isa::avx512) ? Isa::avx512
                                : isa_supported(Isa::avx2) ? Isa::avx2
                                                           : Isa::baseline};

Isa current_isa() { return current.load(std::memory_order_relaxed); }

void set_isa(Isa isa) { current.store(isa, std::memory_order_relaxed); }

}  // namespace bllkern
