#include "batch_norm_relu.h"

#include "rows.h"
#include "threads.h"

// With d = x - mean, r = 1 / sqrt(variance + eps), normalised d r and t = weight d r + bias + shortcut, z is max(t, 0) at the
// place of each window where t is largest.  For M values a channel and the gradient g by t (at those places, where t > 0):
//   by bias  sum(g),   by weight  sum(g d r),   by x  weight r (g - by bias / M - d r by weight / M),   by shortcut  g.
// What comes back through the features is constant in a bin, so its part of the two sums follows from what each bin has
// kept, `active` and `along`; what comes back through z itself is read once more for its part.
namespace bllkern::BLLKERN_ISA {
namespace {

constexpr int64_t kPiece = 16384;  // elements that a thread takes at a time

BLLKERN_INLINE int64_t bin_begin(int64_t bin, int64_t bins, int64_t places) { return bin * places / bins; }
BLLKERN_INLINE int64_t bin_end(int64_t bin, int64_t bins, int64_t places) { return ((bin + 1) * places + bins - 1) / bins; }

template <class T> void statistics(const BatchNormReluJob& job) {
    const int64_t places = job.height * job.width;
    Scratch<double> means(job.images * job.channels), squares(job.images * job.channels);
    auto plane = [&](int64_t i) {
        const T* x = static_cast<const T*>(job.x) + i * places;
        means[i] = sum_vectors(places, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
                       return load_first(x + j, n, 0.f);
                   }) / static_cast<double>(places);
        const float center = static_cast<float>(means[i]);
        squares[i] = sum_vectors(places, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
            Lanes d = load_first(x + j, n, center) - center;
            return d * d;
        });
    };
    parallel_for(job.images * job.channels, kPiece / places + 1, plane);
    for (int64_t c = 0; c < job.channels; c++) {
        double mean = 0, square = 0;
        for (int64_t n = 0; n < job.images; n++) mean += means[n * job.channels + c];
        mean /= static_cast<double>(job.images);
        for (int64_t n = 0; n < job.images; n++) {
            double off = means[n * job.channels + c] - mean;
            square += squares[n * job.channels + c] + static_cast<double>(places) * off * off;
        }
        job.mean[c] = static_cast<float>(mean);
        job.variance[c] = static_cast<float>(square / static_cast<double>(job.images * places));
    }
}

// What normalises one plane.
struct Channel {
    const float mean, r, scale, bias;

    Channel(const BatchNormReluJob& job, int64_t channel)
        : mean(job.mean[channel]), r(1 / __builtin_sqrtf(job.variance[channel] + job.eps)),
          scale(job.weight[channel] * r), bias(job.bias[channel]) {}
};

// One plane as float: d, [rows, stride] with whole windows; places past the edges repeat those at the edge, which are no
// new maximum.
template <int K> struct Plane : Channel {
    const int64_t height, width, down, across, stride;  // windows down and across
    Scratch<float> d;

    template <class T> Plane(const BatchNormReluJob& job, const T* x, int64_t channel)
        : Channel(job, channel), height(job.height), width(job.width), down((height + K - 1) / K),
          across((width + K - 1) / K), stride(K * across), d(K * down * stride) {
        each_run([&](int64_t from, int64_t to, int64_t n) __attribute__((always_inline)) {
            each_vector(0, n, [&](int64_t k, int64_t m) __attribute__((always_inline)) {
                store_first(d.data + to + k, load_first(x + from + k, m, 0.f) - mean, m);
            });
        });
        for (int64_t h = 0; h < height && stride > width; h++)
            for (int64_t w = width; w < stride; w++) d[h * stride + w] = d[h * stride + width - 1];
        for (int64_t h = height; h < K * down; h++)
            memcpy(d.data + h * stride, d.data + (height - 1) * stride, stride * sizeof(float));
    }

    // body(place in x, place in d, how many) for each run of places that follow each other in both.
    template <class Body> void each_run(Body body) const {
        const bool whole = stride == width;
        for (int64_t h = 0; h < (whole ? 1 : height); h++)
            body(h * width, h * stride, whole ? height * width : width);
    }

    // Of window (h, w) the largest t, d there, and where that is; the first of equal ones.
    void largest(int64_t h, int64_t w, float& t, float& at, int32_t& place) const {
        const float* p = d.data + h * K * stride + w * K;
        at = p[0], t = at * scale + bias, place = 0;
        for (int k = 1; k < K * K; k++) {
            float other = p[k / K * stride + k % K], u = other * scale + bias;
            at = u > t ? other : at, place = u > t ? k : place, t = u > t ? u : t;
        }
    }
};

// One plane whose windows are single places, as vectors.
template <class T> struct Places : Channel {
    const T *x, *shortcut, *z, *by_z;

    Places(const BatchNormReluJob& job, int64_t index) : Channel(job, index % job.channels) {
        const int64_t first = index * job.height * job.width;
        auto at = [&](const void* p) { return p ? static_cast<const T*>(p) + first : nullptr; };
        x = at(job.x), shortcut = at(job.shortcut), z = at(job.z), by_z = at(job.by_z);
    }

    __attribute__((always_inline)) Lanes d(int64_t i, int64_t n) const { return load_first(x + i, n, 0.f) - mean; }
    __attribute__((always_inline)) Lanes t(Lanes d, int64_t i, int64_t n) const {
        Lanes t = d * scale + bias;
        return shortcut ? t + load_first(shortcut + i, n, 0.f) : t;
    }
    // `by_z` before ReLU; with a shortcut z tells where that was open
    __attribute__((always_inline)) Lanes through(Lanes by_z, Lanes d, int64_t i, int64_t n) const {
        Lanes open = z ? load_first(z + i, n, 0.f) : d * scale + bias;
        return select(open > 0.f, by_z, Lanes{});
    }
};

// Of one plane, sums down the columns of a row of bins: of z, of the places where z > 0, and of d there.
struct Columns {
    const int64_t stride;  // whole vectors
    Scratch<float> data;
    float *sums, *counts, *totals;

    explicit Columns(int64_t width)
        : stride(width + kLanes), data(3 * stride), sums(data.data), counts(sums + stride), totals(counts + stride) {}

    void clear() { memset(sums, 0, 3 * stride * sizeof(float)); }

    // Writes the row of bins p, which has rows `top` to `bottom`.
    void to_bins(const BatchNormReluJob& job, int64_t index, int64_t p, int64_t rows, float r) const {
        for (int64_t q = 0; q < job.bins_across; q++) {
            const int64_t left = bin_begin(q, job.bins_across, job.out_width);
            const int64_t right = bin_end(q, job.bins_across, job.out_width);
            float sum = 0, count = 0, total = 0;
            for (int64_t w = left; w < right; w++) sum += sums[w], count += counts[w], total += totals[w];
            const float share = 1.f / static_cast<float>(rows * (right - left));
            const int64_t bin = (index * job.bins_down + p) * job.bins_across + q;
            job.features[bin] = sum * share, job.active[bin] = count * share, job.along[bin] = total * r * share;
        }
    }
};

// row(h) for the rows of z of each row of bins in turn, and what the bins keep.
template <class Row>
BLLKERN_INLINE void each_bin_row(const BatchNormReluJob& job, int64_t index, float r, Columns& columns, Row row) {
    for (int64_t p = 0; p < job.bins_down; p++) {
        const int64_t top = bin_begin(p, job.bins_down, job.out_height), bottom = bin_end(p, job.bins_down, job.out_height);
        columns.clear();
        for (int64_t h = top; h < bottom; h++) row(h);
        columns.to_bins(job, index, p, bottom - top, r);
    }
}

template <class T> void forward_places(const BatchNormReluJob& job, int64_t index) {
    const Places<T> plane(job, index);
    const int64_t width = job.width;
    T* z = static_cast<T*>(job.z) + index * job.height * width;
    if (!job.bins_down) {
        each_vector(0, job.height * width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
            Lanes t = plane.t(plane.d(i, n), i, n);
            store_first(z + i, select(t < 0.f, Lanes{}, t), n);  // NaN stays NaN
        });
        return;
    }
    Columns columns(width);
    each_bin_row(job, index, plane.r, columns, [&](int64_t h) __attribute__((always_inline)) {
        each_vector(0, width, [&](int64_t w, int64_t n) __attribute__((always_inline)) {
            const int64_t i = h * width + w;
            Lanes d = plane.d(i, n), t = plane.t(d, i, n), y = select(t < 0.f, Lanes{}, t);
            Ints on = t > 0.f;
            store_first(z + i, y, n);
            store(columns.sums + w, load(columns.sums + w) + y);
            store(columns.counts + w, load(columns.counts + w) + select(on, Lanes{} + 1.f, Lanes{}));
            store(columns.totals + w, load(columns.totals + w) + select(on, d, Lanes{}));
        });
    });
}

template <class T, int K> void forward_windows(const BatchNormReluJob& job, int64_t index) {
    const Plane<K> plane(job, static_cast<const T*>(job.x) + index * job.height * job.width, index % job.channels);
    const int64_t height = job.out_height, width = job.out_width;
    Scratch<float> z(height * width);
    Columns columns(width);
    auto row = [&](int64_t h) __attribute__((always_inline)) {
        for (int64_t w = 0; w < width; w++) {
            float t, at, *out = z.data + h * width + w;
            int32_t place;
            plane.largest(h, w, t, at, place);
            const bool on = t > 0;
            *out = t < 0 ? 0.f : t;
            columns.sums[w] += *out, columns.counts[w] += on ? 1.f : 0.f, columns.totals[w] += on ? at : 0.f;
        }
    };
    if (job.bins_down) each_bin_row(job, index, plane.r, columns, row);
    else for (int64_t h = 0; h < height; h++) row(h);
    T* out = static_cast<T*>(job.z) + index * height * width;
    each_vector(0, height * width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        store_first(out + i, load_first(z.data + i, n, 0.f), n);
    });
}

// The gradient by each place of z that comes through the features, [windows down, `across`].
void spread(const BatchNormReluJob& job, int64_t index, int64_t across, float* out) {
    const float* by_bins = job.by_features + index * job.bins_down * job.bins_across;
    Scratch<float> row(across);
    for (int64_t p = 0; p < job.bins_down; p++) {
        const int64_t top = bin_begin(p, job.bins_down, job.out_height), bottom = bin_end(p, job.bins_down, job.out_height);
        memset(row.data, 0, across * sizeof(float));
        for (int64_t q = 0; q < job.bins_across; q++) {
            const int64_t left = bin_begin(q, job.bins_across, job.out_width);
            const int64_t right = bin_end(q, job.bins_across, job.out_width);
            const float g = by_bins[p * job.bins_across + q] / static_cast<float>((bottom - top) * (right - left));
            for (int64_t w = left; w < right; w++) row[w] += g;
        }
        for (int64_t h = top; h < bottom; h++)
            for (int64_t w = 0; w < across; w++) out[h * across + w] += row[w];
    }
}

// The gradient by x is scale g + slope d + constant.
struct Slopes {
    float slope, constant;
    Slopes(const BatchNormReluJob& job, const Channel& plane, int64_t channel) {
        const float values = static_cast<float>(job.images * job.height * job.width);
        slope = -plane.scale * plane.r * job.by_weight[channel] / values;
        constant = -plane.scale * job.by_bias[channel] / values;
    }
};

template <class T> void backward_places(const BatchNormReluJob& job, int64_t index) {
    const Places<T> plane(job, index);
    const Slopes by(job, plane, index % job.channels);
    const int64_t places = job.height * job.width;
    Scratch<float> by_bins(job.by_features ? places : 1);
    if (job.by_features) {
        memset(by_bins.data, 0, places * sizeof(float));
        spread(job, index, job.width, by_bins.data);
    }
    auto at = [&](void* p) { return p ? static_cast<T*>(p) + index * places : nullptr; };
    T *grad_x = at(job.grad_x), *grad_shortcut = at(job.grad_shortcut);
    each_vector(0, places, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        Lanes d = plane.d(i, n), g = {};
        if (job.by_features) g = load_first(by_bins.data + i, n, 0.f);
        if (plane.by_z) g += load_first(plane.by_z + i, n, 0.f);
        g = plane.through(g, d, i, n);
        if (grad_x) store_first(grad_x + i, g * plane.scale + (d * by.slope + by.constant), n);
        if (grad_shortcut) store_first(grad_shortcut + i, g, n);
    });
}

// The gradient by z itself as float, [windows down, `across`], 0 for windows without a place in z.
template <class T> void read_by_z(const BatchNormReluJob& job, int64_t index, int64_t down, int64_t across, float* out) {
    memset(out, 0, down * across * sizeof(float));
    const T* by_z = static_cast<const T*>(job.by_z);
    for (int64_t h = 0; by_z && h < job.out_height; h++)
        each_vector(0, job.out_width, [&](int64_t w, int64_t n) __attribute__((always_inline)) {
            store_first(out + h * across + w, load_first(by_z + (index * job.out_height + h) * job.out_width + w, n, 0.f), n);
        });
}

template <class T, int K> void backward_windows(const BatchNormReluJob& job, int64_t index) {
    const int64_t channel = index % job.channels, places = job.height * job.width;
    const Plane<K> plane(job, static_cast<const T*>(job.x) + index * places, channel);
    const Slopes by(job, plane, channel);
    const int64_t windows = plane.down * plane.across;
    Scratch<float> scratch(windows + K * K * windows);
    Scratch<int32_t> places_in_windows(plane.across);
    float *g = scratch.data, *out = g + windows;
    int32_t* chosen = places_in_windows.data;
    read_by_z<T>(job, index, plane.down, plane.across, g);
    if (job.by_features) spread(job, index, plane.across, g);
    for (int64_t h = 0; h < plane.down; h++) {
        float* row = g + h * plane.across;
        for (int64_t w = 0; w < plane.across; w++) {
            float t, at;
            plane.largest(h, w, t, at, chosen[w]);
            row[w] = t > 0 ? row[w] * plane.scale : 0.f;
        }
        for (int down = 0; down < K; down++) {
            const int64_t begin = (h * K + down) * plane.stride;
            for (int64_t w = 0; w < plane.across; w++)
                for (int across = 0; across < K; across++) {
                    const int64_t i = begin + w * K + across;
                    const float through = chosen[w] == down * K + across ? row[w] : 0.f;
                    out[i] = plane.d.data[i] * by.slope + by.constant + through;
                }
        }
    }
    T* grad = static_cast<T*>(job.grad_x) + index * places;
    plane.each_run([&](int64_t to, int64_t from, int64_t n) __attribute__((always_inline)) {
        each_vector(0, n, [&](int64_t k, int64_t m) __attribute__((always_inline)) {
            store_first(grad + to + k, load_first(out + from + k, m, 0.f), m);
        });
    });
}

// Of one plane, what comes through z itself of the sums of g and of g d.
template <class T> void sums_of_places(const BatchNormReluJob& job, int64_t index, double& sum, double& along) {
    const Places<T> plane(job, index);
    auto g = [&](int64_t i, int64_t n, Lanes d) __attribute__((always_inline)) {
        return plane.through(load_first(plane.by_z + i, n, 0.f), d, i, n);
    };
    sum = sum_vectors(job.height * job.width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        return g(i, n, plane.d(i, n));
    });
    along = sum_vectors(job.height * job.width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        Lanes d = plane.d(i, n);
        return g(i, n, d) * d;
    });
}

template <class T, int K> void sums_of_windows(const BatchNormReluJob& job, int64_t index, double& sum, double& along) {
    const Plane<K> plane(job, static_cast<const T*>(job.x) + index * job.height * job.width, index % job.channels);
    Scratch<float> g(plane.down * plane.across);
    read_by_z<T>(job, index, plane.down, plane.across, g.data);
    sum = along = 0;
    for (int64_t h = 0; h < plane.down; h++)
        for (int64_t w = 0; w < plane.across; w++) {
            float t, at;
            int32_t place;
            plane.largest(h, w, t, at, place);
            const float through = t > 0 ? g[h * plane.across + w] : 0.f;
            sum += through, along += through * at;
        }
}

template <class Body> void each_plane(const BatchNormReluJob& job, Body body) {
    parallel_for(job.images * job.channels, kPiece / (job.height * job.width) + 1, body);
}

template <class T, int K> void sums_of_gradient(const BatchNormReluJob& job) {
    const int64_t planes = job.by_z ? job.images * job.channels : 0, bins = job.bins_down * job.bins_across;
    Scratch<double> sums(planes), alongs(planes);
    if (planes) each_plane(job, [&](int64_t i) {
        if constexpr (K == 1) sums_of_places<T>(job, i, sums[i], alongs[i]);
        else sums_of_windows<T, K>(job, i, sums[i], alongs[i]);
    });
    for (int64_t c = 0; c < job.channels; c++) {
        double by_bias = 0, by_weight = 0;
        const float r = Channel(job, c).r;
        for (int64_t i = c; i < planes; i += job.channels) by_bias += sums[i], by_weight += alongs[i] * r;
        for (int64_t i = c; job.by_features && i < job.images * job.channels; i += job.channels)
            for (int64_t bin = i * bins; bin < (i + 1) * bins; bin++) {
                by_bias += job.by_features[bin] * job.active[bin];
                by_weight += job.by_features[bin] * job.along[bin];
            }
        job.by_bias[c] = static_cast<float>(by_bias), job.by_weight[c] = static_cast<float>(by_weight);
    }
}

template <class T, int K> void forward(const BatchNormReluJob& job) {
    statistics<T>(job);
    each_plane(job, [&](int64_t plane) {
        if constexpr (K == 1) forward_places<T>(job, plane);
        else forward_windows<T, K>(job, plane);
    });
}

template <class T, int K> void backward(const BatchNormReluJob& job) {
    sums_of_gradient<T, K>(job);
    if (!job.grad_x && !job.grad_shortcut) return;
    each_plane(job, [&](int64_t plane) {
        if constexpr (K == 1) backward_places<T>(job, plane);
        else backward_windows<T, K>(job, plane);
    });
}

}  // namespace

void batch_norm_relu(const BatchNormReluJob& job) {
    with_type(job.dtype, [&](auto type) {
        using T = decltype(type);
        job.window == 1 ? forward<T, 1>(job) : job.window == 2 ? forward<T, 2>(job) : forward<T, 3>(job);
    });
}

void batch_norm_relu_gradient(const BatchNormReluJob& job) {
    with_type(job.dtype, [&](auto type) {
        using T = decltype(type);
        job.window == 1 ? backward<T, 1>(job) : job.window == 2 ? backward<T, 2>(job) : backward<T, 3>(job);
    });
}

}  // namespace bllkern::BLLKERN_ISA
