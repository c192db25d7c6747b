// What csrc/elementary.h and the CUDA kernels ask of a lane of float on the device, and how a few threads read, write
// and add up the elements of one item together.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define BLLKERN_INLINE static __device__ __forceinline__

namespace bllkern::BLLKERN_ISA {

BLLKERN_INLINE int32_t bits(float x) { return __float_as_int(x); }
BLLKERN_INLINE float from_bits(int32_t x) { return __int_as_float(x); }
BLLKERN_INLINE float to_float(int32_t x) { return __int2float_rn(x); }
BLLKERN_INLINE float select(bool condition, float x, float y) { return condition ? x : y; }
BLLKERN_INLINE float at_least(float x, float low) { return x < low ? low : x; }
BLLKERN_INLINE float divide(float x, float y) { return __fdividef(x, y); }
BLLKERN_INLINE float reciprocal(float x) { return __fdividef(1.f, x); }

BLLKERN_INLINE float widen(float x) { return x; }
BLLKERN_INLINE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
BLLKERN_INLINE float widen(__half x) { return __half2float(x); }
BLLKERN_INLINE void narrow(float x, float& y) { y = x; }
BLLKERN_INLINE void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
BLLKERN_INLINE void narrow(float x, __half& y) { y = __float2half_rn(x); }

constexpr int kBlock = 256;  // threads
constexpr int kHeld = 8;     // elements that a thread holds at a time: 16 or 32 bytes of each tensor in flight

// `count` threads (a power of two up to 32, or a whole block) that share an item; this one is number `lane`.
struct Team {
    int count, lane;

    __device__ explicit Team(int count) : count(count), lane(threadIdx.x & (count - 1)) {}
};

template <class T> struct alignas(16) Packed {
    static constexpr int kCount = 16 / sizeof(T);
    T values[kCount];
};

// Where a thread's element j lies among the kHeld * team.count next ones: in 16-byte vectors, or one by one where rows
// are not aligned to them.
template <class T> BLLKERN_INLINE int place(const Team& team, bool vectors, int j) {
    constexpr int V = Packed<T>::kCount;
    return vectors ? (j / V * team.count + team.lane) * V + j % V : j * team.count + team.lane;
}

// The team's next elements p[0..n), `fill` in place of those past n.
template <class T>
BLLKERN_INLINE void load(float (&x)[kHeld], const T* p, int64_t n, const Team& team, bool vectors, float fill) {
    constexpr int V = Packed<T>::kCount;
#pragma unroll
    for (int j = 0; j < kHeld; j += V) {
        int at = place<T>(team, true, j);
        if (vectors && at + V <= n) {
            Packed<T> packed = *reinterpret_cast<const Packed<T>*>(p + at);
#pragma unroll
            for (int i = 0; i < V; i++) x[j + i] = widen(packed.values[i]);
        } else {
#pragma unroll
            for (int i = 0; i < V; i++) {
                int one = place<T>(team, vectors, j + i);
                x[j + i] = one < n ? widen(p[one]) : fill;
            }
        }
    }
}

template <class T>
BLLKERN_INLINE void store(T* p, const float (&x)[kHeld], int64_t n, const Team& team, bool vectors) {
    constexpr int V = Packed<T>::kCount;
#pragma unroll
    for (int j = 0; j < kHeld; j += V) {
        int at = place<T>(team, true, j);
        if (vectors && at + V <= n) {
            Packed<T> packed;
#pragma unroll
            for (int i = 0; i < V; i++) narrow(x[j + i], packed.values[i]);
            *reinterpret_cast<Packed<T>*>(p + at) = packed;
        } else {
#pragma unroll
            for (int i = 0; i < V; i++) {
                int one = place<T>(team, vectors, j + i);
                if (one < n) narrow(x[j + i], p[one]);
            }
        }
    }
}

struct Add {
    template <class V> __device__ static V combine(V x, V y) { return x + y; }
};

struct Larger {
    template <class V> __device__ static V combine(V x, V y) { return x > y ? x : y; }
};

// Combines x over the team in a fixed order; every thread gets the result.  All threads of the block call it.
template <class Op, class V> BLLKERN_INLINE V combine(V x, const Team& team) {
    int width = team.count < 32 ? team.count : 32;
    for (int distance = width / 2; distance > 0; distance /= 2)
        x = Op::combine(x, __shfl_xor_sync(0xffffffff, x, distance, width));
    if (team.count <= 32) return x;
    __shared__ V warps[32];
    __syncthreads();  // the previous use of `warps` is over
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = warps[0];
    for (int i = 1; i < team.count / 32; i++) x = Op::combine(x, warps[i]);
    return x;
}

// Threads that share an item of n elements.
inline int team_size(int64_t n) {
    if (n > 4 * 32 * kHeld) return kBlock;
    int count = 1;
    while (count < 32 && count * kHeld < n) count *= 2;
    return count;
}

}  // namespace bllkern::BLLKERN_ISA
