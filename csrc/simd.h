// Lanes of float on the CPU, as wide as the instruction set that this file is compiled for.
//
// GCC and Clang vector extensions carry the arithmetic; intrinsics appear only where the extensions have no word for
// the instruction.  Every kernel file is compiled once per instruction set (CMakeLists.txt) with BLLKERN_ISA as its
// namespace, so that no function compiled for a wider one can be linked in place of a narrower one.  For the same
// reason kernels use no templates of the standard library.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define BLLKERN_MEMBER inline __attribute__((always_inline))
#define BLLKERN_INLINE static BLLKERN_MEMBER

namespace bllkern::BLLKERN_ISA {

#if defined(__AVX512F__)
constexpr int kLaneBytes = 64;
#elif defined(__AVX2__)
constexpr int kLaneBytes = 32;
#else
constexpr int kLaneBytes = 16;
#endif
constexpr int kLanes = kLaneBytes / 4;

typedef float Lanes __attribute__((vector_size(kLaneBytes)));
typedef int32_t Ints __attribute__((vector_size(kLaneBytes)));
typedef uint32_t Words __attribute__((vector_size(kLaneBytes)));
typedef uint16_t Shorts __attribute__((vector_size(kLaneBytes / 2)));

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

// ---- what csrc/elementary.h asks of a lane type ----

BLLKERN_INLINE Ints bits(Lanes x) { return (Ints)x; }
BLLKERN_INLINE Lanes from_bits(Ints x) { return (Lanes)x; }
BLLKERN_INLINE Lanes to_float(Ints x) { return __builtin_convertvector(x, Lanes); }
BLLKERN_INLINE Lanes select(Ints condition, Lanes x, Lanes y) { return condition ? x : y; }

// The larger of both; NaN where x is NaN.
BLLKERN_INLINE Lanes at_least(Lanes x, Lanes low) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_max_ps((__m512)low, (__m512)x);
#elif defined(__AVX2__)
    return (Lanes)_mm256_max_ps((__m256)low, (__m256)x);
#else
    return low > x ? low : x;
#endif
}

BLLKERN_INLINE Lanes divide(Lanes x, Lanes y) { return x / y; }

// 1/x to 0.6 ulp for |x| in [2^-100, 2^100]
BLLKERN_INLINE Lanes reciprocal(Lanes x) {
#if defined(__AVX512F__)
    Lanes y = (Lanes)_mm512_rcp14_ps((__m512)x);
    return (1.f - x * y) * y + y;  // Newton's step: 14 bits become 28
#else
    return 1.f / x;
#endif
}

// ---- memory ----

template <class T> BLLKERN_INLINE T load_raw(const void* p) {
    T x;
    memcpy(&x, p, sizeof x);
    return x;
}

// A bfloat16 is the upper half of a float.  It is rounded to nearest even: half a unit of the kept part is added, less
// one where that part is even.  A NaN stays one: the low half of its bits is 0 in what processors make and in what comes
// from bfloat16, so nothing carries over.
#if defined(__AVX512F__)
BLLKERN_INLINE Lanes widen(Shorts x, BFloat16) {
    const __m512i to_upper = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0,
                                              7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
    return (Lanes)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, to_upper, _mm512_castsi256_si512((__m256i)x));
}
#if defined(__AVX512BF16__)
// Its own instruction takes numbers below the least normal one for 0.
BLLKERN_INLINE Shorts narrow(Lanes x, BFloat16) { return (Shorts)_mm512_cvtneps_pbh((__m512)x); }
#else
BLLKERN_INLINE Shorts narrow(Lanes x, BFloat16) {
    const __m512i less = _mm512_set1_epi32(0x7fff), half = _mm512_set1_epi32(0x8000), odd = _mm512_set1_epi32(0x10000);
    const __m512i bits = (__m512i)x, add = _mm512_mask_mov_epi32(less, _mm512_test_epi32_mask(bits, odd), half);
    return (Shorts)_mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(bits, add), 16));
}
#endif
#else
BLLKERN_INLINE Lanes widen(Shorts x, BFloat16) {
    return (Lanes)(__builtin_convertvector(x, Words) << 16);
}
BLLKERN_INLINE Shorts narrow(Lanes x, BFloat16) {
    Words w = (Words)x;
    return __builtin_convertvector((w + 0x7fff + ((w >> 16) & 1)) >> 16, Shorts);
}
#endif

#if defined(__AVX512F__)
BLLKERN_INLINE Lanes widen(Shorts x, Half) { return (Lanes)_mm512_cvtph_ps((__m256i)x); }
BLLKERN_INLINE Shorts narrow(Lanes x, Half) { return (Shorts)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
BLLKERN_INLINE Lanes widen(Shorts x, Half) { return (Lanes)_mm256_cvtph_ps((__m128i)x); }
BLLKERN_INLINE Shorts narrow(Lanes x, Half) { return (Shorts)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
// The exponent bias of half is 15, of float 127: read as float, the shifted bits are too small by 2^(127 - 15).
BLLKERN_INLINE Lanes widen(Shorts x, Half) {
    Words h = __builtin_convertvector(x, Words);
    Lanes magnitude = (Lanes)((h & 0x7fff) << 13) * 0x1p112f;
    Words infinite = (h & 0x7c00) == 0x7c00 ? (Words)magnitude | 0x7f800000 : (Words)magnitude;
    return (Lanes)(infinite | (h & 0x8000) << 16);
}

BLLKERN_INLINE Shorts narrow(Lanes x, Half) {
    Words sign = (Words)x & 0x80000000, magnitude = (Words)x ^ sign;
    Words normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // adding 0.5 leaves a multiple of 2^-24, the unit of half's subnormals, in the low bits of the float
    Words subnormal = (Words)((Lanes)magnitude + 0.5f) - (126 << 23);
    Words finite = magnitude < (113 << 23) ? subnormal : normal;
    Words h = magnitude >= (143 << 23) ? (magnitude > (255 << 23) ? Words{} + 0x7e00 : Words{} + 0x7c00) : finite;
    return __builtin_convertvector(h | sign >> 16, Shorts);
}
#endif

BLLKERN_INLINE Lanes load(const float* p) { return load_raw<Lanes>(p); }
template <class T> BLLKERN_INLINE Lanes load(const T* p) { return widen(load_raw<Shorts>(p), T{}); }

BLLKERN_INLINE void store(float* p, Lanes x) { memcpy(p, &x, sizeof x); }
template <class T> BLLKERN_INLINE void store(T* p, Lanes x) {
    Shorts raw = narrow(x, T{});
    memcpy(p, &raw, sizeof raw);
}

// Stores past the caches: the line is written without being read first.  `p` is aligned to a whole vector.
BLLKERN_INLINE void stream(float* p, Lanes x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)x);
#elif defined(__x86_64__)
    _mm_stream_ps(p, (__m128)x);
#else
    store(p, x);
#endif
}

template <class T> BLLKERN_INLINE void stream(T* p, Lanes x) {
    Shorts raw = narrow(x, T{});
#if defined(__AVX512F__)
    _mm256_stream_si256((__m256i*)p, (__m256i)raw);
#elif defined(__AVX2__)
    _mm_stream_si128((__m128i*)p, (__m128i)raw);
#else
    memcpy(p, &raw, sizeof raw);
#endif
}

// Makes streamed stores visible before anything that the thread writes next.
BLLKERN_INLINE void stream_fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

// ---- across lanes ----

BLLKERN_INLINE double sum(Lanes x) {
#if defined(__AVX512F__)
    __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
    return _mm512_reduce_add_pd(low + _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1)));
#else
    double total = 0;
    for (int i = 0; i < kLanes; i++) total += x[i];
    return total;
#endif
}

// Stores the sums in float, pair by pair, of a, b, c and d: where many short sums are taken.
//
// Two steps leave [sum a, sum b, sum c, sum d] of every four lanes; the last adds these quarters of a vector.
#if defined(__AVX512F__)
BLLKERN_INLINE void store_sums(float* p, Lanes a, Lanes b, Lanes c, Lanes d) {
    __m512 ab = _mm512_unpacklo_ps((__m512)a, (__m512)b) + _mm512_unpackhi_ps((__m512)a, (__m512)b);
    __m512 cd = _mm512_unpacklo_ps((__m512)c, (__m512)d) + _mm512_unpackhi_ps((__m512)c, (__m512)d);
    __m512d low = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), high = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
    __m512 sums = (__m512)low + (__m512)high;
    __m256 half = _mm512_castps512_ps256(sums) + _mm512_extractf32x8_ps(sums, 1);
    _mm_storeu_ps(p, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
}
#elif defined(__AVX2__)
BLLKERN_INLINE void store_sums(float* p, Lanes a, Lanes b, Lanes c, Lanes d) {
    __m256 ab = _mm256_hadd_ps((__m256)a, (__m256)b), cd = _mm256_hadd_ps((__m256)c, (__m256)d);
    __m256 sums = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(p, _mm256_castps256_ps128(sums) + _mm256_extractf128_ps(sums, 1));
}
#else
BLLKERN_INLINE void store_sums(float* p, Lanes a, Lanes b, Lanes c, Lanes d) {
    const Lanes each[] = {a, b, c, d};
    for (int i = 0; i < 4; i++) p[i] = (each[i][0] + each[i][2]) + (each[i][1] + each[i][3]);
}
#endif

BLLKERN_INLINE float maximum(Lanes x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float largest = x[0];
    for (int i = 1; i < kLanes; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
#endif
}

// Sum of x[0..n) for n of a few thousand: eight vectors at a time as a tree, so that few roundings follow each other.
BLLKERN_INLINE double sum(const float* x, int64_t n) {
    Lanes lanes = {};
    int64_t i = 0;
    for (; i + 8 * kLanes <= n; i += 8 * kLanes) {
        const float* p = x + i;
        Lanes low = (load(p) + load(p + kLanes)) + (load(p + 2 * kLanes) + load(p + 3 * kLanes));
        p += 4 * kLanes;
        lanes += low + ((load(p) + load(p + kLanes)) + (load(p + 2 * kLanes) + load(p + 3 * kLanes)));
    }
    double total = i ? sum(lanes) : 0;
    for (; i < n; i++) total += x[i];
    return total;
}

}  // namespace bllkern::BLLKERN_ISA
