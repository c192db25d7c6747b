// Rows of any length: vectors of lanes along them, the last one partly filled.
#pragma once

#include <new>

#include "dtype.h"
#include "simd.h"

namespace bllkern::BLLKERN_ISA {

#if defined(__AVX512F__)
BLLKERN_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
BLLKERN_INLINE Lanes load_masked(const float* p, __mmask16 mask) { return (Lanes)_mm512_maskz_loadu_ps(mask, p); }
template <class T> BLLKERN_INLINE Lanes load_masked(const T* p, __mmask16 mask) {
    return widen((Shorts)_mm256_maskz_loadu_epi16(mask, p), T{});
}
BLLKERN_INLINE void store_masked(float* p, Lanes x, __mmask16 mask) { _mm512_mask_storeu_ps(p, mask, (__m512)x); }
template <class T> BLLKERN_INLINE void store_masked(T* p, Lanes x, __mmask16 mask) {
    _mm256_mask_storeu_epi16(p, mask, (__m256i)narrow(x, T{}));
}
#endif

// The first n > 0 lanes from memory, the others `fill`.
template <class T> BLLKERN_INLINE Lanes load_first(const T* p, int64_t n, float fill) {
    if (n >= kLanes) return load(p);
#if defined(__AVX512F__)
    return (Lanes)_mm512_mask_mov_ps((__m512)(Lanes{} + fill), first_lanes(n), (__m512)load_masked(p, first_lanes(n)));
#else
    T raw[kLanes] = {};
    for (int l = 0; l < n; l++) raw[l] = p[l];
    Lanes x = load(raw);
    for (int l = static_cast<int>(n); l < kLanes; l++) x[l] = fill;
    return x;
#endif
}

template <class T> BLLKERN_INLINE void store_first(T* p, Lanes x, int64_t n) {
    if (n >= kLanes) return store(p, x);
#if defined(__AVX512F__)
    store_masked(p, x, first_lanes(n));
#else
    T raw[kLanes];
    store(raw, x);
    for (int l = 0; l < n; l++) p[l] = raw[l];
#endif
}

// body(i, n) for the vectors that begin at each i of [begin, end); n elements of it belong to the row, kLanes of all but
// the last, which the compiler sees.
template <class Body> BLLKERN_INLINE void each_vector(int64_t begin, int64_t end, Body body) {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) body(i, kLanes);
    if (i < end) body(i, end - i);
}

// The sum in double of what term(i, n) gives for each vector; lanes past n are 0.  Chunks keep runs of float sums short.
template <class Term> BLLKERN_INLINE double sum_vectors(int64_t count, Term term) {
    constexpr int64_t kChunk = 64 * kLanes;
    double total = 0;
    for (int64_t begin = 0; begin < count; begin += kChunk) {
        int64_t end = begin + kChunk < count ? begin + kChunk : count;
        Lanes even = {}, odd = {};
        int64_t i = begin;
        for (; i + 2 * kLanes <= end; i += 2 * kLanes) even += term(i, kLanes), odd += term(i + kLanes, kLanes);
        if (i < end) even += term(i, end - i < kLanes ? end - i : kLanes);
        if (i + kLanes < end) odd += term(i + kLanes, end - i - kLanes);
        total += sum(even + odd);
    }
    return total;
}

// body(T{}) with the C++ type of `dtype`
template <class Body> BLLKERN_INLINE void with_type(DType dtype, Body body) {
    switch (dtype) {
        case DType::float32: return body(float{});
        case DType::bfloat16: return body(BFloat16{});
        case DType::float16: return body(Half{});
    }
}

// Whole vectors for n lanes, in lanes.
BLLKERN_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Memory for the time of a call, aligned to a cache line; a little of it is on the stack.
template <class T> struct Scratch {
    static constexpr std::align_val_t kLine{64};
    static constexpr int64_t kSmall = 4096 / sizeof(T);
    alignas(64) T small[kSmall];
    T* data;
    explicit Scratch(int64_t n) : data(n <= kSmall ? small : new (kLine) T[n]) {}
    Scratch(const Scratch&) = delete;
    ~Scratch() {
        if (data != small) ::operator delete[](data, kLine);
    }
    T& operator[](int64_t i) { return data[i]; }
    const T& operator[](int64_t i) const { return data[i]; }
};

BLLKERN_INLINE double sum_in_order(const double* x, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; i++) total += x[i];
    return total;
}

}  // namespace bllkern::BLLKERN_ISA
