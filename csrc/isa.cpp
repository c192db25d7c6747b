#include "isa.h"

#include <atomic>

namespace bllkern {

bool isa_supported(Isa isa) {
    if (isa == Isa::baseline) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return avx512 && (isa == Isa::avx512 || __builtin_cpu_supports("avx512bf16"));
#else
    return false;
#endif
}

static Isa widest() {
    Isa found = Isa::baseline;
    for (Isa isa : kIsas)
        if (isa_supported(isa)) found = isa;
    return found;
}

static std::atomic<Isa> current{widest()};

Isa current_isa() { return current.load(std::memory_order_relaxed); }

void set_isa(Isa isa) { current.store(isa, std::memory_order_relaxed); }

}  // namespace bllkern
