#include "pack.h"

#include "simd.h"

namespace bllkern::BLLKERN_ISA {
namespace {

typedef unsigned char Byte;

#if defined(__AVX512F__)
// The words of one vector, in lanes of 32 or 64 bits: shorter ones are widened on their way.  `compress` moves the
// words that the mask names to the front, `expand` back to their places.
struct Lanes32 {
    static constexpr int kWords = 16;
    static __m512i compress(__mmask16 mask, __m512i x) { return _mm512_maskz_compress_epi32(mask, x); }
    static __m512i expand(__mmask16 mask, __m512i x) { return _mm512_maskz_expand_epi32(mask, x); }
    static __mmask16 nonzero(__m512i x) { return _mm512_test_epi32_mask(x, x); }
};

template <class T> struct Vector;

template <> struct Vector<uint8_t> : Lanes32 {
    static __m512i load(const Byte* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
    static __m512i load(const Byte* p, __mmask16 first) {
        return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first, p));
    }
    static void store(Byte* p, __m512i x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x)); }
};

template <> struct Vector<uint16_t> : Lanes32 {
    static __m512i load(const Byte* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
    static __m512i load(const Byte* p, __mmask16 first) {
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, p));
    }
    static void store(Byte* p, __m512i x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(x)); }
};

template <> struct Vector<uint32_t> : Lanes32 {
    static __m512i load(const Byte* p) { return _mm512_loadu_si512(p); }
    static __m512i load(const Byte* p, __mmask16 first) { return _mm512_maskz_loadu_epi32(first, p); }
    static void store(Byte* p, __m512i x) { _mm512_storeu_si512(p, x); }
};

template <> struct Vector<uint64_t> {
    static constexpr int kWords = 8;
    static __m512i load(const Byte* p) { return _mm512_loadu_si512(p); }
    static __m512i load(const Byte* p, __mmask8 first) { return _mm512_maskz_loadu_epi64(first, p); }
    static void store(Byte* p, __m512i x) { _mm512_storeu_si512(p, x); }
    static __m512i compress(__mmask8 mask, __m512i x) { return _mm512_maskz_compress_epi64(mask, x); }
    static __m512i expand(__mmask8 mask, __m512i x) { return _mm512_maskz_expand_epi64(mask, x); }
    static __mmask8 nonzero(__m512i x) { return _mm512_test_epi64_mask(x, x); }
};

// Packs 64 words to `out`; returns their mask.  A vector is stored whole: what is too much of it is overwritten next.
template <class T> BLLKERN_INLINE uint64_t pack_64(const Byte* in, Byte* out) {
    typedef Vector<T> V;
    uint64_t mask = 0;
    for (int i = 0; i < 64; i += V::kWords) {
        const __m512i x = V::load(in + i * sizeof(T));
        const auto bits = V::nonzero(x);
        V::store(out, V::compress(bits, x));
        out += __builtin_popcount(bits) * sizeof(T);
        mask |= static_cast<uint64_t>(bits) << i;
    }
    return mask;
}

// Unpacks 64 words from `in`, which ends at `end`.
template <class T> BLLKERN_INLINE void unpack_64(uint64_t mask, const Byte* in, const Byte* end, Byte* out) {
    typedef Vector<T> V;
    for (int i = 0; i < 64; i += V::kWords, mask >>= V::kWords) {
        const auto bits = static_cast<decltype(V::nonzero(__m512i{}))>(mask);
        const int64_t left = (end - in) / static_cast<int64_t>(sizeof(T));
        const __m512i x = left >= V::kWords ? V::load(in) : V::load(in, static_cast<decltype(bits)>((1u << left) - 1));
        V::store(out + i * sizeof(T), V::expand(bits, x));
        in += __builtin_popcount(bits) * sizeof(T);
    }
}
#endif

// The same for any number of words up to 64, on any machine.
template <class T> BLLKERN_INLINE uint64_t pack_some(const Byte* in, int64_t count, Byte* out) {
    uint64_t mask = 0;
    for (int64_t i = 0; i < count; i++) {
        const T word = load_raw<T>(in + i * sizeof(T));
        memcpy(out, &word, sizeof word);
        out += (word != 0) * sizeof(T);
        mask |= static_cast<uint64_t>(word != 0) << i;
    }
    return mask;
}

template <class T>
BLLKERN_INLINE void unpack_some(uint64_t mask, const Byte* in, const Byte* end, int64_t count, Byte* out) {
    const bool ample = end - in >= 64 * static_cast<int64_t>(sizeof(T));  // then no branch waits for a mask
    for (int64_t i = 0; i < count; i++, mask >>= 1) {
        const T word = ample || mask & 1 ? load_raw<T>(in) & static_cast<T>(-(mask & 1)) : T{};
        memcpy(out + i * sizeof(T), &word, sizeof word);
        in += (mask & 1) * sizeof(T);
    }
}

int64_t masks(int64_t count) { return (count + 63) / 64; }

template <class T> BLLKERN_INLINE uint64_t pack_group(const Byte* in, int64_t count, Byte* out) {
#if defined(__AVX512F__)
    if (count == 64) return pack_64<T>(in, out);
#endif
    return pack_some<T>(in, count, out);
}

template <class T> int64_t pack_words(const PackJob& job) {
    const Byte* in = static_cast<const Byte*>(job.words);
    Byte* mask_out = static_cast<Byte*>(job.packed);
    Byte* out = mask_out + masks(job.count) * 8;
    Byte* const end = mask_out + job.bytes;
    if (out > end) return -1;
    for (int64_t i = 0; i < job.count; i += 64, in += 64 * sizeof(T), mask_out += 8) {
        const int64_t count = job.count - i < 64 ? job.count - i : 64;
        Byte last[64 * sizeof(T)];  // a group may write as much, of which only its words that are not zero must fit
        const bool fits = end - out >= static_cast<int64_t>(sizeof last);
        const uint64_t mask = pack_group<T>(in, count, fits ? out : last);
        const int64_t bytes = __builtin_popcountll(mask) * sizeof(T);
        if (!fits) {
            if (bytes > end - out) return -1;
            memcpy(out, last, bytes);
        }
        memcpy(mask_out, &mask, sizeof mask);
        out += bytes;
    }
    return out - static_cast<Byte*>(job.packed);
}

template <class T>
BLLKERN_INLINE void unpack_group(uint64_t mask, const Byte* in, const Byte* end, int64_t count, Byte* out) {
#if defined(__AVX512F__)
    if (count == 64) return unpack_64<T>(mask, in, end, out);
#endif
    unpack_some<T>(mask, in, end, count, out);
}

template <class T> bool unpack_words(const PackJob& job) {
    const Byte* mask_in = static_cast<const Byte*>(job.packed);
    const Byte* in = mask_in + masks(job.count) * 8;
    const Byte* const end = mask_in + job.bytes;
    if (in > end) return false;
    int64_t words = 0;
    uint64_t last = 0;
    for (int64_t i = 0; i < masks(job.count); i++) {
        last = load_raw<uint64_t>(mask_in + i * 8);
        words += __builtin_popcountll(last);
    }
    const bool beyond = job.count % 64 && last >> job.count % 64;
    if (beyond || end - in != words * static_cast<int64_t>(sizeof(T))) return false;
    Byte* out = static_cast<Byte*>(job.words);
    for (int64_t i = 0; i < job.count; i += 64, mask_in += 8, out += 64 * sizeof(T)) {
        const uint64_t mask = load_raw<uint64_t>(mask_in);
        const int64_t count = job.count - i < 64 ? job.count - i : 64;
        unpack_group<T>(mask, in, end, count, out);
        in += __builtin_popcountll(mask) * sizeof(T);
    }
    return true;
}

}  // namespace

int64_t pack(const PackJob& job) {
    switch (job.word_bytes) {
        case 1: return pack_words<uint8_t>(job);
        case 2: return pack_words<uint16_t>(job);
        case 4: return pack_words<uint32_t>(job);
        default: return pack_words<uint64_t>(job);
    }
}

bool unpack(const PackJob& job) {
    switch (job.word_bytes) {
        case 1: return unpack_words<uint8_t>(job);
        case 2: return unpack_words<uint16_t>(job);
        case 4: return unpack_words<uint32_t>(job);
        default: return unpack_words<uint64_t>(job);
    }
}

}  // namespace bllkern::BLLKERN_ISA
