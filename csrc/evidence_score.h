// Pass one of evidence_cross_entropy: log evidences [classes, rows] in blocks of rows x classes, over all units.
#pragma once

#include "evidence_cross_entropy.h"
#include "evidence_tiles.h"
#include "evidence_wide.h"

namespace bllkern::BLLKERN_ISA {

constexpr int64_t kRows = 64;   // rows of a block: with kClasses 32 KiB of sums in double
constexpr float kRange = 86.f;  // a product stays a normal float while its logarithm is smaller

BLLKERN_INLINE int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

template <class T> struct Inputs {
    const EvidenceJob& job;
    const EvidenceWorkspace& work;
    const T* a;
    const T* messages;
    int64_t group;

    Inputs(const EvidenceJob& job, const EvidenceWorkspace& work)
        : job(job), work(work), a(static_cast<const T*>(job.a)), messages(static_cast<const T*>(job.messages)),
          group(job.family == Family::categorical ? job.group : 1) {}

    int lanes(int64_t n) const { return static_cast<int>(smaller(kLanes, job.rows - n)); }
    const T* message(int64_t c, int64_t at) const { return messages + c * job.width + at; }
    bool wide(int64_t c, int64_t at) const { return any_wide(message(c, at), group); }
    WideUnit<T> wide_unit(int64_t n, int64_t c, int64_t at) const {
        bool bernoulli = job.family == Family::bernoulli;
        return {a + n * job.width + at, message(c, at), job.width, group, bernoulli, lanes(n)};
    }
    // raw parameter `at` of the rows from n on
    Lanes row(int64_t n, int64_t at) const {
        float x[kLanes] = {};
        for (int l = 0; l < lanes(n); l++) x[l] = scalar(a + (n + l) * job.width + at);
        return load(x);
    }
};

// rows [count, rows_stride] from n on to softmax(a), of part of the large group g
template <class T>
void softmax_large(const Inputs<T>& in, int64_t g, int64_t n, int64_t rows, float* packed, int64_t rows_stride,
                   int64_t count) {
    for (int64_t i = 0; i < rows; i += kLanes) {
        int64_t at = g * in.work.rows + n + i;
        Lanes highest = load(in.work.highest + at), weight = load(in.work.weight + at);
        for (float* p = packed + i; p < packed + i + count * rows_stride; p += rows_stride)
            store(p, exp(load(p) - highest) * weight);
    }
}

// What softmax(a) of a large group needs: its largest a, and 1 / sum of exp(a - largest), of rows n to n + kLanes.
template <class T> void prepare_large(const Inputs<T>& in, int64_t n) {
    for (int64_t g = 0; g < in.work.large; g++)
        for (int l = 0; l < kLanes; l++) {
            int64_t at = g * in.work.rows + n + l;
            float *highest = in.work.highest + at, *weight = in.work.weight + at;
            *highest = 0, *weight = 1;
            if (n + l >= in.job.rows) continue;
            const T* a = in.a + (n + l) * in.job.width + g * in.group;
            Lanes largest = splat<Lanes>(-__builtin_inff()), total = splat<Lanes>(0.f);
            for (int64_t j = 0; j < in.group; j += kLanes)
                largest = max(largest, load_first(a + j, in.group - j, -__builtin_inff()));
            *highest = maximum(largest);
            for (int64_t j = 0; j < in.group; j += kLanes)
                total += exp(load_first(a + j, in.group - j, -__builtin_inff()) - *highest);
            *weight = static_cast<float>(1 / sum(total));
        }
}

// The mean message, of kLanes parameters from d on.
template <class T> void average_messages(const Inputs<T>& in, int64_t d) {
    Lanes total = splat<Lanes>(0.f);
    for (int64_t c = 0; c < in.job.classes; c++) total += load_first(in.message(c, d), in.job.width - d, 0.f);
    store_first(in.work.mean + d, total / static_cast<float>(in.job.classes), in.job.width - d);
}

// ---- pass one: log evidences ----

template <class F, class T> class Score {
    const Inputs<T>& in;
    static constexpr int64_t kUnits = F::kUnits;
    static constexpr int kSums = F::kLarge ? 3 : 1;
    const int64_t class_blocks = ceil_div(in.job.classes, kClasses);

    struct Block {
        int64_t n, rows, c, classes;
        float* packed;    // [kUnits, kRow, kRows]
        Messages messages;
        double* sums;     // [kClasses, kRows] log evidences
        double* members;  // [2, kClasses, kRows] both sums over members of a large group
    };

  public:
    explicit Score(const Inputs<T>& in) : in(in) {}
    int64_t blocks() const { return ceil_div(in.job.rows, kRows) * class_blocks; }
    int64_t elements() const { return smaller(in.job.rows, kRows) * smaller(in.job.classes, kClasses) * in.job.width; }

    void operator()(int64_t i) const {
        Buffer buffer((kUnits * F::kRow + 2 * kSums * kClasses) * kRows + F::kMessage * kClasses * kUnits);
        double* sums = reinterpret_cast<double*>(buffer.p);
        float* packed = buffer.p + 2 * kSums * kClasses * kRows;
        int64_t n = i / class_blocks * kRows, c = i % class_blocks * kClasses;
        Block block = {n, smaller(kRows, in.job.rows - n), c, smaller(kClasses, in.job.classes - c), packed,
                       {packed + kUnits * F::kRow * kRows, kUnits}, sums, sums + kClasses * kRows};
        for (int64_t k = 0; k < ceil_div(block.classes, kTileClasses) * kTileClasses * kRows; k++) sums[k] = 0;
        if constexpr (F::kLarge) large_groups(block);
        else units(block);
        write(block);
    }

  private:
    void units(const Block& block) const {
        int64_t width = in.job.width / F::kParameters, step = kUnits / in.group * in.group;
        for (int64_t first = 0; first < width; first += step) {
            Units units = {first, smaller(step, width - first), width, in.job.width};
            float bounds[kClasses];
            pack(block, units, bounds);
            if constexpr (F::kGrouped) softmax_groups(block.packed, block.rows, kRows, units.count, in.group);
            if constexpr (F::kExponential) wide_units(block, units, bounds);
            add(block, units.count, bounds, block.sums);
        }
    }

    void pack(const Block& block, const Units& units, float* bounds) const {
        pack_rows<F>(in.a + block.n * in.job.width, in.work.mean, block.rows, units, kRows, block.packed);
        pack_messages<F>(in.message(block.c, 0), in.work.mean, block.classes, kTileClasses, units, block.messages,
                         bounds);
    }

    void wide_units(const Block& block, const Units& units, float* bounds) const {
        for (int64_t c = 0; c < block.classes; c++) {
            if (bounds[c] <= kWide) continue;
            bounds[c] = kWide;
            for (int64_t u = 0; u < units.count; u += in.group)
                if (in.wide(block.c + c, units.first + u)) {
                    neutralize(block.messages, c, u, in.group);
                    wide_evidence(block, c, units.first + u);
                }
        }
    }

    void wide_evidence(const Block& block, int64_t c, int64_t at) const {
        for (int64_t n = 0; n < block.rows; n += kLanes) {
            WideUnit<T> unit = in.wide_unit(block.n + n, block.c + c, at);
            Lanes logarithm = log(unit.total);
            for (int l = 0; l < kLanes; l++)
                block.sums[c * kRows + n + l] += double{unit.top_b[l]} + unit.top_l[l] + logarithm[l];
            if (!F::kLarge) continue;
            int64_t to = (at / in.group * in.job.classes + block.c + c) * in.work.rows + block.n + n;
            store(in.work.errors + to, unit.total);
            store(in.work.tops_l + to, unit.top_l);
            store(in.work.tops_b + to, unit.top_b);
        }
    }

    void add(const Block& block, int64_t count, const float* bounds, double* sums) const {
        // V vectors of rows, whose accumulators for kTileClasses classes take half of the registers
        constexpr int V = kRegisters / (2 * kTileClasses) / F::kAccumulators;
        for (int64_t c = 0; c < block.classes; c += kTileClasses) {
            float bound = 0;
            for (int64_t k = c; k < c + kTileClasses; k++) bound = bounds[k] <= bound ? bound : bounds[k];
            int64_t interval = kUnits;
            if (bound * kUnits > kRange) interval = bound < kRange ? static_cast<int64_t>(kRange / bound) : 1;
            for_vectors<V>(ceil_div(block.rows, kLanes), [&](auto vectors, int64_t i) {
                double* to = sums + c * kRows + i * kLanes;
                add_evidence<F, decltype(vectors)::value>(block.packed + i * kLanes, kRows, block.messages, c, count,
                                                          in.group, interval, to, to + kClasses * kRows, kRows);
            });
        }
    }

    void large_groups(const Block& block) const {
        for (int64_t g = 0; g < in.work.large; g++) {
            for (int64_t k = 0; k < 2 * kClasses * kRows; k++) block.members[k] = 0;
            bool wide[kClasses];
            for (int64_t c = 0; c < block.classes; c++) wide[c] = in.wide(block.c + c, g * in.group);
            for (int64_t j = 0; j < in.group; j += kUnits) {
                Units units = {g * in.group + j, smaller(kUnits, in.group - j), in.job.width, in.job.width};
                float bounds[kClasses];
                pack(block, units, bounds);
                softmax_large(in, g, block.n, block.rows, block.packed, kRows, units.count);
                for (int64_t c = 0; c < block.classes; c++)
                    if (wide[c]) neutralize(block.messages, c, 0, units.count);
                add(block, units.count, bounds, block.members);
            }
            for (int64_t c = 0; c < block.classes; c++) {
                if (block.n == 0) in.work.wide[g * in.job.classes + block.c + c] = wide[c];
                if (wide[c]) wide_evidence(block, c, g * in.group);
                else close_large_group(block, g, c);
            }
        }
    }

    void close_large_group(const Block& block, int64_t g, int64_t c) const {
        int64_t kept = (g * in.job.classes + block.c + c) * in.work.rows + block.n;
        for (int64_t n = 0; n < ceil_div(block.rows, kLanes) * kLanes; n++) {
            double sum = block.members[c * kRows + n], difference = block.members[(kClasses + c) * kRows + n];
            bool small = difference > -0.5 && difference < 0.5;
            block.sums[c * kRows + n] += small ? __builtin_log1p(difference) : __builtin_log(sum);
            in.work.errors[kept + n] = static_cast<float>(sum);
            in.work.differences[kept + n] = static_cast<float>(difference);
        }
    }

    void write(const Block& block) const {
        for (int64_t c = 0; c < block.classes; c++) {
            double constant = in.job.log_prior ? scalar(static_cast<const T*>(in.job.log_prior) + block.c + c) : 0;
            if (in.job.family == Family::gaussian) constant += half_square(block.c + c);
            int64_t to = (block.c + c) * in.work.rows + block.n;
            for (int64_t n = 0; n < ceil_div(block.rows, kLanes) * kLanes; n++) {
                double x = block.sums[c * kRows + n] + constant;
                float rounded = static_cast<float>(x);
                in.work.error[to + n] = rounded;
                in.work.rest[to + n] = __builtin_isfinite(rounded) ? static_cast<float>(x - rounded) : 0;
            }
        }
    }

    double half_square(int64_t c) const {
        double total = 0;
        for (int64_t d = 0; d < in.job.width; d += kUnits) {
            Lanes lanes = splat<Lanes>(0.f);
            int64_t end = smaller(d + kUnits, in.job.width);
            for (int64_t u = d; u < end; u += kLanes) {
                Lanes b = load_first(in.message(c, u), end - u, 0.f);
                lanes += b * b;
            }
            total += sum(lanes);
        }
        return total / 2;
    }
};

}  // namespace bllkern::BLLKERN_ISA
