// Blocks of rows and messages as evidence_cross_entropy reads them: rows across the lanes, messages as scalars.
#pragma once

#include <new>

#include "evidence_families.h"
#include "rows.h"

namespace bllkern::BLLKERN_ISA {

// Classes of a block.  In pass one their packed messages, 128 KiB for 256 units of two values, stay in a core's L2
// while rows go by; with fewer classes rows would be packed more often.
constexpr int kClasses = 64;

struct Buffer {
    float* p;
    explicit Buffer(int64_t n) : p(static_cast<float*>(::operator new(n * sizeof(float), std::align_val_t{64}))) {}
    Buffer(const Buffer&) = delete;
    ~Buffer() { ::operator delete(p, std::align_val_t{64}); }
};

BLLKERN_INLINE int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

// x0 y0 x1 y1 ... of the lower and of the upper halves
BLLKERN_INLINE void interleave(Lanes x, Lanes y, Lanes& low, Lanes& high) {
#if defined(__AVX512F__)
    low = __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high = __builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
    low = __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    low = __builtin_shufflevector(x, y, 0, 4, 1, 5);
    high = __builtin_shufflevector(x, y, 2, 6, 3, 7);
#endif
}

// Interleaving rows i and i + kLanes/2 moves the highest bit of the row into the lowest of the column; as many times as
// rows have bits exchanges both.
BLLKERN_INLINE void transpose(Lanes (&m)[kLanes]) {
    for (int step = 1; step < kLanes; step *= 2) {
        Lanes t[kLanes];
        for (int i = 0; i < kLanes / 2; i++) interleave(m[i], m[i + kLanes / 2], t[2 * i], t[2 * i + 1]);
        for (int i = 0; i < kLanes; i++) m[i] = t[i];
    }
}

// A range of latent units; `group` parameters of each lie side by side, kParameters `plane` apart.
struct Units {
    int64_t first;   // parameter
    int64_t count;   // of parameters in a plane; whole groups, or part of a large one
    int64_t plane;   // parameters from one plane to the next
    int64_t stride;  // of a row
};

// rows [count, kRow, rows_stride] of a [rows, stride]; rows are filled up to whole vectors
template <class F, class T>
void pack_rows(const T* a, const float* b_0, int64_t rows, const Units& units, int64_t rows_stride, float* packed) {
    constexpr int P = F::kParameters;
    for (int64_t n = 0; n < rows; n += kLanes)
        for (int64_t u = 0; u < units.count; u += kLanes) {
            Lanes m[P][kLanes];
            for (int p = 0; p < P; p++) {
                int64_t at = units.first + p * units.plane + u, left = units.count - u;
                for (int l = 0; l < kLanes; l++)
                    m[p][l] = n + l < rows ? load_first(a + (n + l) * units.stride + at, left, F::kFill[p])
                                           : splat<Lanes>(F::kFill[p]);
                transpose(m[p]);
            }
            for (int l = 0; l < kLanes && u + l < units.count; l++) {
                Lanes in[P], out[F::kRow];
                for (int p = 0; p < P; p++) in[p] = m[p][l];
                if constexpr (F::kRelative) {
                    Lanes base[P];
                    for (int p = 0; p < P; p++) base[p] = splat<Lanes>(b_0[units.first + p * units.plane + u + l]);
                    F::row(in, base, out);
                } else F::row(in, out);
                for (int k = 0; k < F::kRow; k++) store(packed + ((u + l) * F::kRow + k) * rows_stride + n, out[k]);
            }
        }
}

// a to softmax(a) within groups, packed [count, rows_stride]
BLLKERN_INLINE void softmax_groups(float* packed, int64_t rows, int64_t rows_stride, int64_t count, int64_t group) {
    for (int64_t n = 0; n < rows; n += kLanes)
        for (float* p = packed + n; p < packed + n + count * rows_stride; p += group * rows_stride) {
            Lanes highest = load(p), sum = splat<Lanes>(0.f);
            for (int64_t j = 1; j < group; j++) highest = max(highest, load(p + j * rows_stride));
            for (int64_t j = 0; j < group; j++) {
                Lanes e = exp(load(p + j * rows_stride) - highest);
                sum += e;
                store(p + j * rows_stride, e);
            }
            Lanes inverse = divide(splat<Lanes>(1.f), sum);
            for (int64_t j = 0; j < group; j++) store(p + j * rows_stride, load(p + j * rows_stride) * inverse);
        }
}

// The values of kClasses messages [kMessage, kClasses, stride]; classes are filled up to a multiple of `multiple`.
struct Messages {
    float* values;
    int64_t stride;

    const float* at(int k, int64_t c) const { return values + (k * kClasses + c) * stride; }
    float* at(int k, int64_t c) { return values + (k * kClasses + c) * stride; }
};

// Packs classes [classes, units.stride] and leaves the largest F::size of each in `bounds`.
template <class F, class T>
void pack_messages(const T* b, const float* b_0, int64_t classes, int64_t multiple, const Units& units, Messages packed,
                   float* bounds) {
    constexpr int P = F::kParameters;
    for (int64_t c = 0; c < (classes + multiple - 1) / multiple * multiple; c++) {
        Lanes largest = splat<Lanes>(0.f);
        for (int64_t u = 0; u < units.count; u += kLanes) {
            Lanes in[P], base[P], out[F::kMessage];
            for (int p = 0; p < P; p++) {
                int64_t at = units.first + p * units.plane + u, left = units.count - u;
                base[p] = F::kRelative ? load_first(b_0 + at, left, F::kFill[p]) : splat<Lanes>(0.f);
                in[p] = c < classes ? load_first(b + c * units.stride + at, left, F::kFill[p]) : base[p];
            }
            Lanes size = F::size(in, base);
            largest = select(size <= largest, largest, size);
            if constexpr (F::kRelative) F::message(in, base, out);
            else F::message(in, out);
            for (int k = 0; k < F::kMessage; k++) store(packed.at(k, c) + u, out[k]);
        }
        bounds[c] = 0;
        for (int l = 0; l < kLanes; l++) bounds[c] = largest[l] <= bounds[c] ? bounds[c] : largest[l];
    }
}

// The unit whose parameters begin at u says nothing; what it says is added by csrc/evidence_wide.h.
BLLKERN_INLINE void neutralize(Messages packed, int64_t c, int64_t u, int64_t size) {
    for (int64_t j = 0; j < size; j++) packed.at(0, c)[u + j] = 1.f, packed.at(1, c)[u + j] = 0.f;
}

}  // namespace bllkern::BLLKERN_ISA
