// Pass two of evidence_cross_entropy: both gradients in blocks of units, going through rows and classes.  A block owns
// its part of both gradients, so that every sum has one order whatever the number of threads.
#pragma once

#include "evidence_score.h"

namespace bllkern::BLLKERN_ISA {

// Most rows that are prepared at a time: with kNarrow parameters 32 KiB for each value of the rows, and as much for
// each sum over classes, which stay in a core's L2 while the classes go by.
constexpr int64_t kChunk = 512;
// Parameters of a block; more where a group has more.  The widest vector, which is what transposes take at a time.
constexpr int64_t kNarrow = kWidestVector;

template <class F, class T> class Gradients {
    static constexpr int P = F::kParameters;

    const Inputs<T>& in;
    const int64_t width = in.job.width / P;                              // parameters of a plane
    const int64_t whole = F::kLarge ? in.group : width;                     // is cut into blocks
    const int64_t step = F::kLarge ? kNarrow : ceil_div(kNarrow, in.group) * in.group;
    const int64_t blocks_per_whole = ceil_div(whole, step);
    const int64_t classes = ceil_div(in.job.classes, kLanes) * kLanes;
    const int64_t chunk_rows = smaller(kChunk, ceil_div(in.job.rows, kLanes) * kLanes);

    struct Block {
        Units units;
        int64_t stride;       // units.count in whole vectors
        float* rows;          // [count, kRow, chunk_rows] the rows of a chunk
        float* over_classes;  // [count, P, chunk_rows] sums over classes, then gradients by a
        Lanes* partial;       // [count, P, kClasses] sums over the rows of a chunk, across lanes
        Messages messages;
        float* over_rows;     // [P, stride, classes] sums over rows; begins at 0, as all that follows
        float* wide;          // [stride, classes] gradients by wide messages
        float* is_wide;       // [classes] whether any unit of the message is wide
        int64_t size = 0;     // floats of all parts, which lie one after the other from `base` on

        Block(const Gradients& of, const Units& units, float* base)
            : units(units), stride(ceil_div(units.count, kLanes) * kLanes) {
            auto take = [&](int64_t n) {
                float* p = base ? base + size : nullptr;
                size += n;
                return p;
            };
            rows = take(units.count * F::kRow * of.chunk_rows), over_classes = take(units.count * P * of.chunk_rows);
            partial = reinterpret_cast<Lanes*>(take(units.count * P * kClasses * kLanes));
            messages = {take(F::kMessage * kClasses * stride), stride};
            over_rows = take(P * stride * of.classes);
            wide = take(F::kExponential ? stride * of.classes : 0), is_wide = take(F::kExponential ? of.classes : 0);
            for (float* p = over_rows; base && p < base + size; p++) *p = 0;
        }
    };

  public:
    explicit Gradients(const Inputs<T>& in) : in(in) {}
    int64_t blocks() const { return width / (whole ? whole : 1) * blocks_per_whole; }
    int64_t elements() const { return in.job.rows * in.job.classes * step; }

    void operator()(int64_t i) const {
        int64_t begin = i % blocks_per_whole * step, count = smaller(step, whole - begin);
        Units units = {i / blocks_per_whole * whole + begin, count, width, in.job.width};
        Buffer buffer(Block(*this, units, nullptr).size);
        Block block(*this, units, buffer.p);
        for (int64_t n = 0; n < in.job.rows; n += chunk_rows) chunk(block, n, smaller(chunk_rows, in.job.rows - n));
        if (in.job.grad_messages) write_messages(block);
    }

  private:
    int64_t large_group(const Block& block) const { return block.units.first / in.group; }

    void chunk(const Block& block, int64_t n, int64_t rows) const {
        const Units& units = block.units;
        pack_rows<F>(in.a + n * in.job.width, in.work.mean, rows, units, chunk_rows, block.rows);
        if constexpr (F::kGrouped) softmax_groups(block.rows, rows, chunk_rows, units.count, in.group);
        if constexpr (F::kLarge) softmax_large(in, large_group(block), n, rows, block.rows, chunk_rows, units.count);
        for (int64_t k = 0; k < units.count * P * chunk_rows; k++) block.over_classes[k] = 0;
        for (int64_t c = 0; c < in.job.classes; c += kClasses) {
            pack_classes(block, c);
            sum_classes(block, n, rows, c);
            sum_partial(block, c);
        }
        finish_a(block, n, rows);
        if constexpr (F::kExponential)
            for_wide(block, [&](int64_t c, int64_t u, int64_t size) { add_wide(block, n, rows, c, u, size); });
        if (in.job.grad_a) write_a(block, n, rows);
    }

    void pack_classes(const Block& block, int64_t c) const {
        float bounds[kClasses];
        int64_t count = smaller(kClasses, in.job.classes - c);
        pack_messages<F>(in.message(c, 0), in.work.mean, count, 1, block.units, block.messages, bounds);
        if constexpr (F::kExponential) {
            for (int64_t k = 0; k < count; k++)
                block.is_wide[c + k] = F::kLarge ? in.work.wide[large_group(block) * in.job.classes + c + k]
                                                 : !(bounds[k] <= kWide);
            for_wide(block, c, count, [&](int64_t k, int64_t u, int64_t size) {
                neutralize(block.messages, k - c, u, size);
            });
        }
    }

    // Calls f(class, offset in the block, parameters) for each wide unit.
    template <class Call> void for_wide(const Block& block, int64_t first, int64_t count, Call f) const {
        int64_t size = F::kLarge ? block.units.count : in.group;
        for (int64_t c = first; c < first + count; c++)
            if (block.is_wide[c] != 0)
                for (int64_t u = 0; u < block.units.count; u += size)
                    if (F::kLarge || in.wide(c, block.units.first + u)) f(c, u, size);
    }
    template <class Call> void for_wide(const Block& block, Call f) const { for_wide(block, 0, in.job.classes, f); }

    void sum_classes(const Block& block, int64_t n, int64_t rows, int64_t c) const {
        // V vectors of rows, whose values and sums over classes take half of the registers at most; the others are for
        // one class: its message, its sums over rows and what F::slope computes
        constexpr int V = F::kRow == 1 && !F::kGrouped ? kRegisters / 4 : kRegisters / 8 / F::kAccumulators;
        int64_t count = smaller(kClasses, in.job.classes - c), size = F::kGrouped ? in.group : 1;
        const float* errors = in.work.error;
        if (F::kLarge) errors = in.work.errors + large_group(block) * in.job.classes * in.work.rows;
        for (int64_t u = 0; u < block.units.count * P; u++)
            for (int64_t k = 0; k < ceil_div(count, kLanes) * kLanes; k++)
                block.partial[u * kClasses + k] = splat<Lanes>(0.f);
        for_vectors<V>(ceil_div(rows, kLanes), [&](auto vectors, int64_t i) {
            const float* error = errors + c * in.work.rows + n + i * kLanes;
            for (int64_t u = 0; u < block.units.count; u += size) {
                const float* row = block.rows + u * F::kRow * chunk_rows + i * kLanes;
                float* over_classes = block.over_classes + u * P * chunk_rows + i * kLanes;
                Lanes* partial = block.partial + u * P * kClasses;
                constexpr int W = decltype(vectors)::value;
                if constexpr (F::kGrouped)
                    add_group_slopes<W>(row, chunk_rows, block.messages, u, size, error, in.work.rows, count,
                                        over_classes, partial);
                else
                    add_slopes<F, W>(row, chunk_rows, block.messages, u, error, in.work.rows, count, over_classes,
                                     partial);
            }
        });
    }

    void sum_partial(const Block& block, int64_t c) const {
        for (int64_t u = 0; u < block.units.count; u++)
            for (int p = 0; p < P; p++)
                for (int64_t k = 0; k < smaller(kClasses, in.job.classes - c); k += kLanes) {
                    Lanes m[kLanes], total = splat<Lanes>(0.f);
                    for (int l = 0; l < kLanes; l++) m[l] = block.partial[(u * P + p) * kClasses + k + l];
                    transpose(m);
                    for (int l = 0; l < kLanes; l++) total += m[l];
                    float* to = block.over_rows + (p * block.stride + u) * classes + c + k;
                    store(to, load(to) + total);
                }
    }

    // From sums over classes to gradients by a.
    void finish_a(const Block& block, int64_t n, int64_t rows) const {
        int64_t size = F::kGrouped ? in.group : 1;
        for (int64_t i = 0; i < rows; i += kLanes) {
            const float* row = block.rows + i;
            float* sums = block.over_classes + i;
            for (int64_t u = 0; u < block.units.count; u += size) {
                if constexpr (F::kGrouped) finish_group(row + u * chunk_rows, sums + u * chunk_rows, size);
                else if constexpr (F::kLarge) {
                    float* sum = sums + u * chunk_rows;
                    Lanes mean = load(in.work.over_classes + large_group(block) * in.work.rows + n + i);
                    store(sum, load(row + u * chunk_rows) * (load(sum) - mean));
                } else finish_unit(row + u * F::kRow * chunk_rows, sums + u * P * chunk_rows);
            }
        }
    }

    // p_j (h_j - sum_k p_k h_k)
    void finish_group(const float* row, float* sums, int64_t size) const {
        Lanes mean = splat<Lanes>(0.f);
        for (int64_t j = 0; j < size; j++) mean += load(row + j * chunk_rows) * load(sums + j * chunk_rows);
        for (int64_t j = 0; j < size; j++)
            store(sums + j * chunk_rows, load(row + j * chunk_rows) * (load(sums + j * chunk_rows) - mean));
    }

    void finish_unit(const float* row, float* sums) const {
        Lanes values[F::kRow], by_a[P];
        for (int r = 0; r < F::kRow; r++) values[r] = load(row + r * chunk_rows);
        for (int p = 0; p < P; p++) by_a[p] = load(sums + p * chunk_rows);
        F::by_a(values, by_a);
        for (int p = 0; p < P; p++) store(sums + p * chunk_rows, by_a[p]);
    }

    void add_wide(const Block& block, int64_t n, int64_t rows, int64_t c, int64_t u, int64_t size) const {
        for (int64_t i = 0; i < rows; i += kLanes) {
            Lanes e = load(in.work.error + c * in.work.rows + n + i);
            float *by_a = block.over_classes + u * chunk_rows + i, *by_message = block.wide + u * classes + c;
            if constexpr (F::kLarge) add_wide_part(block, n + i, c, e, by_a, by_message);
            else in.wide_unit(n + i, c, block.units.first + u).add_gradients(e, by_a, chunk_rows, by_message, classes);
        }
    }

    // The part of a large group that lies in the block; pass one has left its largest exponent and s, then error / s.
    void add_wide_part(const Block& block, int64_t n, int64_t c, Lanes e, float* by_a, float* by_message) const {
        int64_t g = large_group(block), at = (g * in.job.classes + c) * in.work.rows + n;
        Lanes q = load(in.work.errors + at), top_l = load(in.work.tops_l + at), top_b = load(in.work.tops_b + at);
        Lanes highest = load(in.work.highest + g * in.work.rows + n);
        Lanes log_weight = log(load(in.work.weight + g * in.work.rows + n));
        for (int64_t j = 0; j < block.units.count; j++) {
            Lanes log_probability = in.row(n, block.units.first + j) - highest + log_weight;
            float b = scalar(in.message(c, block.units.first + j));
            Lanes mean = q * exp((log_probability - top_l) + (b - top_b));
            store(by_a + j * chunk_rows, load(by_a + j * chunk_rows) + (mean - e * exp(log_probability)));
            by_message[j * classes] += static_cast<float>(sum(mean));
        }
    }

    void write_a(const Block& block, int64_t n, int64_t rows) const {
        const Units& units = block.units;
        for (int64_t i = 0; i < rows; i += kLanes)
            for (int p = 0; p < P; p++)
                for (int64_t u = 0; u < units.count; u += kLanes) {
                    Lanes m[kLanes];
                    for (int l = 0; l < kLanes; l++)
                        m[l] = u + l < units.count ? load(block.over_classes + ((u + l) * P + p) * chunk_rows + i)
                                                   : splat<Lanes>(0.f);
                    transpose(m);
                    T* to = static_cast<T*>(in.job.grad_a) + (n + i) * in.job.width + units.first + p * units.plane + u;
                    for (int l = 0; l < kLanes && i + l < rows; l++)
                        store_first(to + l * in.job.width, m[l], units.count - u);
                }
    }

    void write_messages(const Block& block) const {
        if constexpr (F::kExponential)
            for_wide(block, [&](int64_t c, int64_t u, int64_t size) {
                for (int64_t j = u; j < u + size; j++) block.over_rows[j * classes + c] = 0;
            });
        for (int64_t c = 0; c < in.job.classes; c += kLanes)
            for (int64_t u = 0; u < block.units.count; u += kLanes) write_tile(block, c, u);
    }

    // Gradients by kLanes messages and units.
    void write_tile(const Block& block, int64_t c, int64_t u) const {
        const Units& units = block.units;
        Lanes m[P][kLanes], wide[kLanes];
        for (int l = 0; l < kLanes; l++) {
            for (int p = 0; p < P; p++) m[p][l] = load(block.over_rows + (p * block.stride + u + l) * classes + c);
            wide[l] = F::kExponential ? load(block.wide + (u + l) * classes + c) : splat<Lanes>(0.f);
        }
        for (int p = 0; p < P; p++) transpose(m[p]);
        transpose(wide);
        for (int l = 0; l < kLanes && c + l < in.job.classes; l++) {
            Lanes b[P], by_message[P];
            int64_t at = units.first + u;
            for (int p = 0; p < P; p++) {
                b[p] = load_first(in.message(c + l, at + p * units.plane), units.count - u, 0.f);
                by_message[p] = m[p][l];
            }
            F::by_message(b, by_message, splat<Lanes>(in.work.over_rows[c + l]));
            for (int p = 0; p < P; p++) {
                T* to = static_cast<T*>(in.job.grad_messages) + (c + l) * in.job.width + at + p * units.plane;
                store_first(to, by_message[p] + wide[l], units.count - u);
            }
        }
    }
};

}  // namespace bllkern::BLLKERN_ISA
