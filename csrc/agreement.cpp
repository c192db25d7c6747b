#include "agreement.h"

#include "coarse.h"
#include "families.h"
#include "rows.h"
#include "threads.h"
#include "two.h"

// The tensors are cut into tiles of fixed size.  Each tile leaves the losses of its units in a buffer of the first
// cache and one sum in double; the sums are added in order.  So results do not depend on the number of threads.
namespace bllkern::BLLKERN_ISA {
namespace {

constexpr int64_t kTile = 1024;                 // parameters of a tile, and the most units
constexpr int64_t kPiece = 8 * kTile;           // parameters that a thread takes at a time
constexpr int64_t kStreamBytes = int64_t{24} << 20;  // gradients larger than this pass by the caches

// Rows of `units` latent units each, cut into tiles of whole rows, or of parts of one row where rows are long.
struct Tiling {
    int64_t rows, units, rows_per_tile, tiles_per_row, units_per_tile, count;

    Tiling(int64_t rows, int64_t units, int64_t parameters_per_unit) : rows(rows), units(units) {
        units_per_tile = parameters_per_unit < kTile ? kTile / parameters_per_unit : 1;
        rows_per_tile = units <= units_per_tile ? units_per_tile / units : 1;
        tiles_per_row = (units + units_per_tile - 1) / units_per_tile;
        count = rows_per_tile > 1 ? (rows + rows_per_tile - 1) / rows_per_tile : rows * tiles_per_row;
    }
};

struct Tile {
    int64_t row;    // the first
    int64_t begin;  // its first unit in that row
    int64_t units;  // of all rows of the tile

    Tile(const Tiling& tiling, int64_t i) {
        if (tiling.rows_per_tile > 1) {
            row = i * tiling.rows_per_tile, begin = 0;
            int64_t left = tiling.rows - row;
            units = (left < tiling.rows_per_tile ? left : tiling.rows_per_tile) * tiling.units;
        } else {
            row = i / tiling.tiles_per_row, begin = i % tiling.tiles_per_row * tiling.units_per_tile;
            int64_t left = tiling.units - begin;
            units = left < tiling.units_per_tile ? left : tiling.units_per_tile;
        }
    }
};

template <class T> struct Tensors {
    const T* a;
    const T* b;
    T* grad_a;
    T* grad_b;
    float scale;
    bool stream;
};

// What the arithmetic on tensors of type T is done in.
template <class T> struct Arithmetic { using V = Lanes; };
template <> struct Arithmetic<BFloat16> { using V = Coarse; };

BLLKERN_INLINE bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kLaneBytes == 0; }

// ---- families whose units stand alone; a unit's parameters lie `units` apart in its row ----

template <class F, class T> struct Separate {
    static constexpr int N = F::kParameters;
    static constexpr bool kTwo = kLanes >= 16;  // where there are registers enough for two
    using One = typename Arithmetic<T>::V;

    // Runs of whole vectors of units; a vector that crosses the end of a row, or of the tile, is gathered.
    static void score(const Tensors<T>& tensors, const Tiling& tiling, const Tile& tile, float* losses) {
        const Tensors<T> t = tensors;
        for (int64_t i = 0; i < tile.units; i += kLanes) {
            int64_t at = offset(tiling, tile, i), stride = tiling.units;
            int64_t in_row = N == 1 ? tile.units : stride - (tile.begin + i) % stride;
            int64_t left = tile.units - i, run = (in_row < left ? in_row : left) / kLanes * kLanes;
            bool past_caches = t.stream && N == 1 && aligned(t.grad_a + at) && aligned(t.grad_b + at);
            int64_t j = 0;
            if constexpr (kTwo)
                for (; j + 2 * kLanes <= run; j += 2 * kLanes)
                    score_vector<Two<One>>(t, at + j, stride, past_caches, losses + i + j);
            for (; j < run; j += kLanes) score_vector<One>(t, at + j, stride, past_caches, losses + i + j);
            i += run;
            if (i < tile.units) gather(t, tiling, tile, i, losses);
        }
    }

  private:
    static int64_t offset(const Tiling& tiling, const Tile& tile, int64_t i) {
        int64_t unit = tile.row * tiling.units + tile.begin + i;
        return N == 1 ? unit : unit / tiling.units * tiling.units * N + unit % tiling.units;
    }

    // Loads V from p; stores it, past the caches where `past` says so.
    BLLKERN_INLINE void get(Lanes& x, const T* p) { x = load(p); }
    BLLKERN_INLINE void get(Coarse& x, const T* p) { x = load(p); }
    template <class L> BLLKERN_INLINE void get(Two<L>& x, const T* p) { get(x.a, p), get(x.b, p + kLanes); }

    BLLKERN_INLINE void put(T* p, Lanes x, bool past) {
        if (past) stream(p, x);
        else store(p, x);
    }
    BLLKERN_INLINE void put(T* p, Coarse x, bool past) { put(p, x.v, past); }
    template <class L> BLLKERN_INLINE void put(T* p, Two<L> x, bool past) {
        put(p, x.a, past), put(p + kLanes, x.b, past);
    }

    BLLKERN_INLINE void keep(float* p, Lanes x) { store(p, x); }
    BLLKERN_INLINE void keep(float* p, Coarse x) { store(p, x.v); }
    template <class L> BLLKERN_INLINE void keep(float* p, Two<L> x) { keep(p, x.a), keep(p + kLanes, x.b); }

    // The units that V holds.
    template <class V>
    BLLKERN_INLINE void score_vector(const Tensors<T>& t, int64_t at, int64_t stride, bool past_caches, float* losses) {
        V a[N], b[N];
        for (int c = 0; c < N; c++) get(a[c], t.a + at + c * stride), get(b[c], t.b + at + c * stride);
        Agreement<V, N> result = F::agreement(a, b);
        for (int c = 0; c < N; c++) {
            if (t.grad_a) put(t.grad_a + at + c * stride, result.by_a[c] * t.scale, past_caches);
            if (t.grad_b) put(t.grad_b + at + c * stride, result.by_b[c] * t.scale, past_caches);
        }
        keep(losses, result.loss);
    }

    static void gather(const Tensors<T>& t, const Tiling& tiling, const Tile& tile, int64_t i, float* losses) {
        int n = tile.units - i < kLanes ? static_cast<int>(tile.units - i) : kLanes;
        T a[N * kLanes] = {}, b[N * kLanes] = {}, grad_a[N * kLanes], grad_b[N * kLanes];
        float loss[kLanes];
        for (int c = 0; c < N; c++)
            for (int l = 0; l < n; l++) {
                int64_t at = offset(tiling, tile, i + l) + c * tiling.units;
                a[c * kLanes + l] = t.a[at], b[c * kLanes + l] = t.b[at];
            }
        Tensors<T> local = {a, b, t.grad_a ? grad_a : nullptr, t.grad_b ? grad_b : nullptr, t.scale, false};
        score_vector<One>(local, 0, kLanes, false, loss);
        for (int l = 0; l < n; l++) losses[i + l] = loss[l];
        for (int c = 0; c < N; c++)
            for (int l = 0; l < n; l++) {
                int64_t at = offset(tiling, tile, i + l) + c * tiling.units;
                if (t.grad_a) t.grad_a[at] = grad_a[c * kLanes + l];
                if (t.grad_b) t.grad_b[at] = grad_b[c * kLanes + l];
            }
    }
};

// ---- categorical: a unit is a group, A its logsumexp ----

template <class T> struct Grouped {
    static constexpr int64_t kSmall = 2 * kLanes;  // groups below this size lie across the lanes, others along them

    static void score(const Tensors<T>& t, const Tiling& tiling, const Tile& tile, float* losses, int64_t group) {
        int64_t at = (tile.row * tiling.units + tile.begin) * group;
        if (group >= kSmall) {
            for (int64_t i = 0; i < tile.units; i++) losses[i] = score_large(t, at + i * group, group);
            return;
        }
        for (int64_t i = 0; i < tile.units; i += kLanes) {
            int n = tile.units - i < kLanes ? static_cast<int>(tile.units - i) : kLanes;
            float loss[kLanes];
            store(loss, score_small(t, at + i * group, static_cast<int>(group), n));
            for (int l = 0; l < n; l++) losses[i + l] = loss[l];
        }
    }

  private:
    static constexpr float kLowest = -__builtin_inff();  // adds nothing to a logsumexp

    struct Three { Lanes a, b, both; };  // of the parameters a, b and a + b

    BLLKERN_INLINE void raise(Three& m, Lanes a, Lanes b) {
        m.a = max(m.a, a), m.b = max(m.b, b), m.both = max(m.both, a + b);
    }

    // e^x of the parameters less their maxima, all at most 1, and e^x - 1 of a and b.
    struct Member { Exponential<Lanes> a, b; Lanes both; };

    BLLKERN_INLINE Exponential<Lanes> exponential(Lanes x) {
        auto e = exp_nonpositive(typename Arithmetic<T>::V(x));
        return {(Lanes)e.value, (Lanes)e.minus_one};
    }

    // Here and below a + b keeps what it loses in rounding: of large parameters, that is enough to change a softmax.
    BLLKERN_INLINE Member member(const Three& m, Lanes a, Lanes b) {
        Lanes both = a + b;
        return {exponential(a - m.a), exponential(b - m.b),
                exponential((both - m.both) + rounding_of_sum(a, b, both)).value};
    }

    // With x and y the exponentials of a and b, softmax(a) - softmax(a + b) of member j is
    //   x_j / sum x - (xy)_j / sum xy = x_j (sum xy / sum x - y_j) / sum xy = x_j (sum x(y - 1) / sum x - (y_j - 1)) / sum xy,
    // which keeps its relative accuracy where b, and with it y - 1, is close to 0.  Where sum xy is small, which it is
    // for messages that contradict each other, the difference is large, and is taken of exponentials of a + b itself.
    struct Sums {
        Three s = {};                                  // of x, y and the exponentials of a + b
        Lanes product = {}, by_b = {}, by_a = {};      // of xy, x(y - 1) and y(x - 1)

        BLLKERN_INLINE void add(Sums& t, const Member& e) {
            t.s.a += e.a.value, t.s.b += e.b.value, t.s.both += e.both;
            t.product += e.a.value * e.b.value;
            t.by_b += e.a.value * e.b.minus_one, t.by_a += e.b.value * e.a.minus_one;
        }
        void sum_lanes() {
            Lanes* each[] = {&s.a, &s.b, &s.both, &product, &by_b, &by_a};
            for (Lanes* x : each) *x = splat<Lanes>(static_cast<float>(sum(*x)));
        }
    };

    // What the gradients by the members of a group have in common.
    struct Slopes {
        Lanes inverse_a, inverse_b, inverse_both, inverse_product, mean_b, mean_a;
        Ints close_a, close_b;

        Slopes(const Sums& t, float scale)
            : inverse_a(scale / t.s.a), inverse_b(scale / t.s.b), inverse_both(scale / t.s.both),
              inverse_product(scale / t.product), mean_b(t.by_b / t.s.a), mean_a(t.by_a / t.s.b),
              close_a(t.product > t.s.a * 0.5f), close_b(t.product > t.s.b * 0.5f) {}

        Lanes by_a(const Member& e) const {
            return select(close_a, e.a.value * inverse_product * (mean_b - e.b.minus_one),
                          e.a.value * inverse_a - e.both * inverse_both);
        }
        Lanes by_b(const Member& e) const {
            return select(close_b, e.b.value * inverse_product * (mean_a - e.a.minus_one),
                          e.b.value * inverse_b - e.both * inverse_both);
        }
    };

    // log(e^max_a sum_a) + log(e^max_b sum_b) - log(e^max_both sum_both), with one logarithm
    BLLKERN_INLINE Lanes loss(const Three& m, const Three& s) {
        Lanes highest = m.a + m.b;
        return (highest - m.both) + rounding_of_sum(m.a, m.b, highest) + log(s.a * s.b / s.both);
    }

    BLLKERN_INLINE Three lowest() {
        Lanes low = splat<Lanes>(kLowest);
        return {low, low, low};
    }

    static float score_large(const Tensors<T>& t, int64_t at, int64_t group) {
        const T *a = t.a + at, *b = t.b + at;
        Three m = lowest();
        for (int64_t j = 0; j < group; j += kLanes)
            raise(m, load_first(a + j, group - j, kLowest), load_first(b + j, group - j, kLowest));
        m = {splat<Lanes>(maximum(m.a)), splat<Lanes>(maximum(m.b)), splat<Lanes>(maximum(m.both))};

        auto at_member = [&](int64_t j) {
            return member(m, load_first(a + j, group - j, kLowest), load_first(b + j, group - j, kLowest));
        };
        Member kept[kTile / kLanes];  // so that the gradients of a group of usual size need no second exponential
        Sums sums;
        for (int64_t j = 0; j < group; j += kLanes) {
            Member e = at_member(j);
            Sums::add(sums, e);
            if (j < kTile) kept[j / kLanes] = e;
        }
        sums.sum_lanes();
        Slopes slopes(sums, t.scale);
        for (int64_t j = 0; j < group && (t.grad_a || t.grad_b); j += kLanes) {
            Member e = j < kTile ? kept[j / kLanes] : at_member(j);
            if (t.grad_a) store_first(t.grad_a + at + j, slopes.by_a(e), group - j);
            if (t.grad_b) store_first(t.grad_b + at + j, slopes.by_b(e), group - j);
        }
        return loss(m, sums.s)[0];
    }

    // n <= kLanes neighbouring groups, one in each lane
    static Lanes score_small(const Tensors<T>& t, int64_t at, int group, int n) {
        Lanes a[kSmall], b[kSmall];
        Member kept[kSmall];
        across_lanes(t.a + at, a, group, n);
        across_lanes(t.b + at, b, group, n);
        Three m = lowest();
        for (int j = 0; j < group; j++) raise(m, a[j], b[j]);
        Sums sums;
        for (int j = 0; j < group; j++) Sums::add(sums, kept[j] = member(m, a[j], b[j]));
        Slopes slopes(sums, t.scale);
        for (int j = 0; j < group; j++) a[j] = slopes.by_a(kept[j]), b[j] = slopes.by_b(kept[j]);
        if (t.grad_a) from_across_lanes(a, t.grad_a + at, group, n);
        if (t.grad_b) from_across_lanes(b, t.grad_b + at, group, n);
        return loss(m, sums.s);
    }

    // p [n, group] to x [group, kLanes]
    static void across_lanes(const T* p, Lanes* x, int group, int n) {
        float rows[kSmall * kLanes];
        for (int i = 0; i < n * group; i += kLanes) store(rows + i, load_first(p + i, n * group - i, 0.f));
        for (int j = 0; j < group; j++) {
            float column[kLanes] = {};
            for (int l = 0; l < n; l++) column[l] = rows[l * group + j];
            x[j] = load(column);
        }
    }

    static void from_across_lanes(const Lanes* x, T* p, int group, int n) {
        float rows[kSmall * kLanes];
        for (int j = 0; j < group; j++) {
            float column[kLanes];
            store(column, x[j]);
            for (int l = 0; l < n; l++) rows[l * group + j] = column[l];
        }
        for (int i = 0; i < n * group; i += kLanes) store_first(p + i, load(rows + i), n * group - i);
    }
};

// ---- tiles to results ----

// losses [rows, units] of n units to sums [rows]
static void sum_rows(const float* losses, int64_t n, int64_t units, float* sums) {
    if (units == 1) memcpy(sums, losses, n * sizeof(float));
    else for (int64_t i = 0; i < n; i += units) *sums++ = static_cast<float>(sum(losses + i, units));
}

// `score` leaves the losses of a tile's units in a buffer.
template <class T, class Score>
void run(const AgreementJob& job, int64_t units, int64_t parameters_per_unit, Score score) {
    bool stream = job.rows * job.width * int64_t{sizeof(T)} * 2 > kStreamBytes;
    Tensors<T> tensors = {static_cast<const T*>(job.a), static_cast<const T*>(job.b), static_cast<T*>(job.grad_a),
                          static_cast<T*>(job.grad_b), job.scale, stream};
    // rows matter only where each has a loss of its own, or where they say which parameters belong together
    bool one_row = !job.per_row && parameters_per_unit == 1;
    Tiling tiling(one_row ? 1 : job.rows, one_row ? job.rows * units : units, parameters_per_unit);
    bool rows_in_tiles = job.per_row && tiling.tiles_per_row == 1;
    Scratch<double> partials(rows_in_tiles ? 0 : tiling.count);

    auto body = [&](int64_t i) {
        float losses[kTile];
        Tile tile(tiling, i);
        score(tensors, tiling, tile, losses);
        if (rows_in_tiles) sum_rows(losses, tile.units, units, job.loss + tile.row);
        else partials[i] = sum(losses, tile.units);
        if (stream) stream_fence();
    };
    int64_t parameters = tiling.units_per_tile * parameters_per_unit;
    parallel_for(tiling.count, parameters < kPiece ? kPiece / parameters : 1, body);

    if (rows_in_tiles) return;
    int64_t results = job.per_row ? job.rows : 1, each = tiling.count / results;
    for (int64_t r = 0; r < results; r++) {
        double total = 0;
        for (int64_t i = r * each; i < (r + 1) * each; i++) total += partials[i];
        job.loss[r] = static_cast<float>(total * job.scale);
    }
}

template <class F, class T> void run_separate(const AgreementJob& job) {
    run<T>(job, job.width / F::kParameters, F::kParameters, Separate<F, T>::score);
}

template <class T> void run_typed(const AgreementJob& job) {
    switch (job.family) {
        case Family::bernoulli: return run_separate<Bernoulli, T>(job);
        case Family::gaussian: return run_separate<Gaussian, T>(job);
        case Family::gaussian_learned: return run_separate<GaussianLearned, T>(job);
        case Family::poisson: return run_separate<Poisson, T>(job);
        case Family::categorical:
            auto score = [&](const Tensors<T>& tensors, const Tiling& tiling, const Tile& tile, float* losses) {
                Grouped<T>::score(tensors, tiling, tile, losses, job.group);
            };
            return run<T>(job, job.width / job.group, job.group, score);
    }
}

}  // namespace

void agreement(const AgreementJob& job) {
    if (job.rows == 0 || job.width == 0) {
        for (int64_t i = 0; i < (job.per_row ? job.rows : 1); i++) job.loss[i] = 0;
        return;
    }
    switch (job.dtype) {
        case DType::float32: return run_typed<float>(job);
        case DType::bfloat16: return run_typed<BFloat16>(job);
        case DType::float16: return run_typed<Half>(job);
    }
}

}  // namespace bllkern::BLLKERN_ISA
