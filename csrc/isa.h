// The instruction set that the CPU kernels run on: the widest that the machine has, or one set by name.
//
// A kernel `f` is declared once per instruction set by BLLKERN_DECLARE(void f(...)), defined in a file that CMake
// compiles once per instruction set, and called as BLLKERN_DISPATCH(f)(...).
#pragma once

namespace bllkern {

enum class Isa { baseline, avx2, avx512, avx512bf16 };  // from the narrowest on

constexpr Isa kIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512bf16};
constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", "avx512bf16"};

// Whether this machine runs it and this build has it.
bool isa_supported(Isa isa);

Isa current_isa();

// `isa` is supported.
void set_isa(Isa isa);

#if defined(__x86_64__)
#define BLLKERN_DECLARE(...)                  \
    namespace baseline { __VA_ARGS__; }       \
    namespace avx2 { __VA_ARGS__; }           \
    namespace avx512 { __VA_ARGS__; }     \
    namespace avx512bf16 { __VA_ARGS__; }
#define BLLKERN_DISPATCH(kernel)                                                \
    (::bllkern::current_isa() == ::bllkern::Isa::avx512bf16 ? &::bllkern::avx512bf16::kernel \
     : ::bllkern::current_isa() == ::bllkern::Isa::avx512   ? &::bllkern::avx512::kernel     \
     : ::bllkern::current_isa() == ::bllkern::Isa::avx2 ? &::bllkern::avx2::kernel   \
                                                        : &::bllkern::baseline::kernel)
#else
#define BLLKERN_DECLARE(...) namespace baseline { __VA_ARGS__; }
#define BLLKERN_DISPATCH(kernel) (&::bllkern::baseline::kernel)
#endif

}  // namespace bllkern
