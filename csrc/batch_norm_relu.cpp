#include "batch_norm_relu.h"

#include "batch_norm_channels.h"
#include "bins.h"

// With d = x - mean, r = 1 / sqrt(variance + eps), normalised d r and t = weight d r + bias + shortcut, z is max(t, 0) at the
// place of each window where t is largest.  For M values a channel and the gradient g by t (at those places, where t > 0):
//   by bias  sum(g),   by weight  sum(g d r),   by x  weight r (g - by bias / M - d r by weight / M),   by shortcut  g.
// What comes back through the features is constant in a bin, so its part of the two sums follows from what each bin has
// kept, `active` and `along`; what comes back through z itself is read once more for its part.
namespace bllkern::BLLKERN_ISA {
namespace {

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
    put_statistics_together(job, job.images, means.data, squares.data, [&](int64_t) { return places; });
}

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

// The bins of every plane.
struct Pooling {
    const Bins down, across;

    explicit Pooling(const BatchNormReluJob& job)
        : down(job.out_height, job.bins_down), across(job.out_width, job.bins_across) {}
};

// The bins of one plane, from kept(first place, how many) for each vector of every row of z.
template <class Each>
BLLKERN_INLINE void pool(const BatchNormReluJob& job, const Pooling& pooling, int64_t index, float r, Each kept) {
    const Bins &down = pooling.down, &across = pooling.across;
    const int64_t width = across.places;
    const int64_t stride = padded(width);  // whole vectors are stored: what few lanes store is slow to come by
    Scratch<float> columns(3 * stride);    // of a row of bins, added up
    float *z = columns.data, *on = z + stride, *along = on + stride;
    for (int64_t p = 0; p < down.count; p++) {
        each_vector(0, width, [&](int64_t w, int64_t n) __attribute__((always_inline)) {
            Kept sum;
            for (int64_t h = down.begin[p]; h < down.end[p]; h++) sum += kept(h * width + w, n);
            store(z + w, sum.z), store(on + w, sum.on), store(along + w, sum.along);
        });
        const int64_t first = (index * down.count + p) * across.count;
        each_vector(0, across.count, [&](int64_t q, int64_t n) __attribute__((always_inline)) {
            Kept sum;
            for (int64_t w = 0; w < width; w++) {
                const Lanes in = across.has(w, q);
                sum += Kept{z[w] * in, on[w] * in, along[w] * in};
            }
            const Lanes share = load(across.share.data + q) * down.share[p];
            store_first(job.features + first + q, sum.z * share, n);
            store_first(job.active + first + q, sum.on * share, n);
            store_first(job.along + first + q, sum.along * share * r, n);
        });
    }
}

template <class T> void forward_places(const BatchNormReluJob& job, const Pooling& pooling, int64_t index) {
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
    pool(job, pooling, index, plane.r, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        Lanes d = plane.d(i, n), t = plane.t(d, i, n), y = select(t < 0.f, Lanes{}, t);
        Ints on = t > 0.f;
        store_first(z + i, y, n);
        return Kept{y, select(on, Lanes{} + 1.f, Lanes{}), select(on, d, Lanes{})};
    });
}

template <class T, int K> void forward_windows(const BatchNormReluJob& job, const Pooling& pooling, int64_t index) {
    const Plane<K> plane(job, static_cast<const T*>(job.x) + index * job.height * job.width, index % job.channels);
    const int64_t places = job.out_height * job.out_width;
    Scratch<float> scratch(3 * places);
    float *z = scratch.data, *on = z + places, *along = on + places;
    for (int64_t i = 0, h = 0; h < job.out_height; h++)
        for (int64_t w = 0; w < job.out_width; w++, i++) {
            float t, at;
            int32_t place;
            plane.largest(h, w, t, at, place);
            z[i] = t < 0 ? 0.f : t, on[i] = t > 0 ? 1.f : 0.f, along[i] = t > 0 ? at : 0.f;
        }
    T* out = static_cast<T*>(job.z) + index * places;
    each_vector(0, places, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        store_first(out + i, load_first(z + i, n, 0.f), n);
    });
    pool(job, pooling, index, plane.r, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        return Kept{load_first(z + i, n, 0.f), load_first(on + i, n, 0.f), load_first(along + i, n, 0.f)};
    });
}

// The gradient by the places of one plane of z that comes through the features: a row of places for each row of bins.
struct FromFeatures {
    const Bins& down;
    const int64_t stride;  // whole vectors are stored, as above
    Scratch<float> rows;

    FromFeatures(const BatchNormReluJob& job, const Pooling& pooling, int64_t index)
        : down(pooling.down), stride(padded(job.out_width)), rows(job.by_features ? down.count * stride : 1) {
        for (int64_t p = 0; job.by_features && p < down.count; p++) {
            const float* by_bins = job.by_features + (index * down.count + p) * pooling.across.count;
            pooling.across.spread(by_bins, down.share[p], rows.data + p * stride);
        }
    }

    __attribute__((always_inline)) Lanes at(int64_t h, int64_t w) const {
        Lanes g = load(rows.data + down.first[h] * stride + w);
        for (int64_t p = down.first[h] + 1; p < down.last[h]; p++) g += load(rows.data + p * stride + w);
        return g;
    }
};

template <class T> void backward_places(const BatchNormReluJob& job, const Pooling& pooling, int64_t index) {
    const Places<T> plane(job, index);
    const Slopes by(job, plane, index % job.channels);
    const int64_t places = job.height * job.width;
    const FromFeatures features(job, pooling, index);
    auto at = [&](void* p) { return p ? static_cast<T*>(p) + index * places : nullptr; };
    T *grad_x = at(job.grad_x), *grad_shortcut = at(job.grad_shortcut);
    const int64_t rows = job.by_features ? job.height : 1, width = places / rows;
    for (int64_t h = 0; h < rows; h++)
        each_vector(0, width, [&](int64_t w, int64_t n) __attribute__((always_inline)) {
            const int64_t i = h * width + w;
            Lanes d = plane.d(i, n), g = {};
            if (job.by_features) g = features.at(h, w);
            if (plane.by_z) g += load_first(plane.by_z + i, n, 0.f);
            g = plane.through(g, d, i, n);
            if (grad_x) store_first(grad_x + i, g * plane.scale + (d * by.slope + by.constant), n);
            if (grad_shortcut) store_first(grad_shortcut + i, g, n);
        });
}

// The gradient by z as float, [windows down, `across`], 0 for windows without a place in z: that by z itself, where it is
// given, and that through the features.
template <class T>
void gradient_by_windows(const BatchNormReluJob& job, int64_t index, int64_t down, int64_t across,
                         const FromFeatures* features, float* out) {
    memset(out, 0, down * across * sizeof(float));
    const int64_t width = job.out_width, first = index * job.out_height * width;
    const T* by_z = job.by_z ? static_cast<const T*>(job.by_z) + first : nullptr;
    for (int64_t h = 0; h < job.out_height; h++)
        each_vector(0, width, [&](int64_t w, int64_t n) __attribute__((always_inline)) {
            const int64_t i = h * width + w;
            Lanes g = {};
            if (by_z) g = load_first(by_z + i, n, 0.f);
            if (features) g += features->at(h, w);
            store_first(out + h * across + w, g, n);
        });
}

template <class T, int K> void backward_windows(const BatchNormReluJob& job, const Pooling& pooling, int64_t index) {
    const int64_t channel = index % job.channels, places = job.height * job.width;
    const Plane<K> plane(job, static_cast<const T*>(job.x) + index * places, channel);
    const Slopes by(job, plane, channel);
    const int64_t windows = plane.down * plane.across;
    Scratch<float> scratch(windows + K * K * windows);
    Scratch<int32_t> places_in_windows(plane.across);
    float *g = scratch.data, *out = g + windows;
    int32_t* chosen = places_in_windows.data;
    const FromFeatures features(job, pooling, index);
    gradient_by_windows<T>(job, index, plane.down, plane.across, job.by_features ? &features : nullptr, g);
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
    gradient_by_windows<T>(job, index, plane.down, plane.across, nullptr, g.data);
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
    const int64_t planes = job.images * job.channels, bins = job.bins_down * job.bins_across;
    Scratch<double> sums(planes), alongs(planes);
    each_plane(job, [&](int64_t i) {
        sums[i] = alongs[i] = 0;
        if (job.by_z) {
            if constexpr (K == 1) sums_of_places<T>(job, i, sums[i], alongs[i]);
            else sums_of_windows<T, K>(job, i, sums[i], alongs[i]);
            alongs[i] *= Channel(job, i % job.channels).r;
        }
        if (!job.by_features) return;
        auto dot = [&](const float* kept) __attribute__((always_inline)) {
            return sum_vectors(bins, [&](int64_t k, int64_t n) __attribute__((always_inline)) {
                return load_first(job.by_features + i * bins + k, n, 0.f) * load_first(kept + i * bins + k, n, 0.f);
            });
        };
        sums[i] += dot(job.active), alongs[i] += dot(job.along);
    });
    put_gradients_together(job, job.images, sums.data, alongs.data);
}

template <class T, int K> void forward(const BatchNormReluJob& job) {
    statistics<T>(job);
    const Pooling pooling(job);
    each_plane(job, [&](int64_t plane) {
        if constexpr (K == 1) forward_places<T>(job, pooling, plane);
        else forward_windows<T, K>(job, pooling, plane);
    });
}

template <class T, int K> void backward(const BatchNormReluJob& job) {
    sums_of_gradient<T, K>(job);
    if (!job.grad_x && !job.grad_shortcut) return;
    const Pooling pooling(job);
    each_plane(job, [&](int64_t plane) {
        if constexpr (K == 1) backward_places<T>(job, pooling, plane);
        else backward_windows<T, K>(job, pooling, plane);
    });
}

}  // namespace

void batch_norm_relu(const BatchNormReluJob& job) {
    if (job.channels_last) return batch_norm_relu_channels_last(job);
    with_type(job.dtype, [&](auto type) {
        using T = decltype(type);
        job.window == 1 ? forward<T, 1>(job) : job.window == 2 ? forward<T, 2>(job) : forward<T, 3>(job);
    });
}

void batch_norm_relu_gradient(const BatchNormReluJob& job) {
    if (job.channels_last) return batch_norm_relu_gradient_channels_last(job);
    with_type(job.dtype, [&](auto type) {
        using T = decltype(type);
        job.window == 1 ? backward<T, 1>(job) : job.window == 2 ? backward<T, 2>(job) : backward<T, 3>(job);
    });
}

}  // namespace bllkern::BLLKERN_ISA
