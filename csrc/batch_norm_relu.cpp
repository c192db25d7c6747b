#include "batch_norm_relu.h"

#include "rows.h"
#include "threads.h"

// With d = x - mean, r = 1 / sqrt(variance + eps), normalised d r and t = weight d r + bias, z is max(t, 0) at the place of
// each window where t is largest.  For M values a channel and the gradient g by t (at those places, where t > 0):
//   by bias  sum(g),   by weight  sum(g d r),   by x  weight r (g - by bias / M - d r by weight / M).
// The gradient by z is constant in a bin, so the two sums follow from what each bin has kept, `active` and `along`, and
// the way back reads x once.
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

// One plane as float: d, [rows, stride] with whole windows; places past the edges repeat those at the edge, which are no
// new maximum.
template <int K> struct Plane {
    const int64_t height, width, down, across, stride;  // windows down and across
    const float mean, r, scale, bias;
    Scratch<float> d;

    template <class T> Plane(const BatchNormReluJob& job, const T* x, int64_t channel)
        : height(job.height), width(job.width), down((height + K - 1) / K), across((width + K - 1) / K),
          stride(K * across), mean(job.mean[channel]), r(1 / __builtin_sqrtf(job.variance[channel] + job.eps)),
          scale(job.weight[channel] * r), bias(job.bias[channel]), d(K * down * stride) {
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

template <class T, int K> void forward_plane(const BatchNormReluJob& job, int64_t index) {
    const Plane<K> plane(job, static_cast<const T*>(job.x) + index * job.height * job.width, index % job.channels);
    const int64_t height = job.out_height, width = job.out_width, bins = job.bins_down * job.bins_across;
    Scratch<float> z(height * width), scratch(3 * width);
    float *sums = scratch.data, *counts = sums + width, *totals = counts + width;
    for (int64_t p = 0; p < job.bins_down; p++) {
        const int64_t top = bin_begin(p, job.bins_down, height), bottom = bin_end(p, job.bins_down, height);
        memset(sums, 0, 3 * width * sizeof(float));
        for (int64_t h = top; h < bottom; h++) {
            float* row = z.data + h * width;
            for (int64_t w = 0; w < width; w++) {
                float t, at;
                int32_t place;
                plane.largest(h, w, t, at, place);
                const bool on = t > 0;
                row[w] = t < 0 ? 0.f : t;  // NaN stays NaN
                sums[w] += row[w], counts[w] += on ? 1.f : 0.f, totals[w] += on ? at : 0.f;
            }
        }
        for (int64_t q = 0; q < job.bins_across; q++) {
            const int64_t left = bin_begin(q, job.bins_across, width), right = bin_end(q, job.bins_across, width);
            float sum = 0, count = 0, total = 0;
            for (int64_t w = left; w < right; w++) sum += sums[w], count += counts[w], total += totals[w];
            const float share = 1.f / static_cast<float>((bottom - top) * (right - left));
            const int64_t bin = index * bins + p * job.bins_across + q;
            job.features[bin] = sum * share, job.active[bin] = count * share, job.along[bin] = total * plane.r * share;
        }
    }
    T* out = static_cast<T*>(job.z) + index * height * width;
    each_vector(0, height * width, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
        store_first(out + i, load_first(z.data + i, n, 0.f), n);
    });
}

// Adds the gradient by each place of z, before ReLU, to `out` [windows down, windows across].
BLLKERN_INLINE void spread(const BatchNormReluJob& job, const float* by_bins, int64_t across, float* out) {
    for (int64_t p = 0; p < job.bins_down; p++) {
        const int64_t top = bin_begin(p, job.bins_down, job.out_height), bottom = bin_end(p, job.bins_down, job.out_height);
        for (int64_t q = 0; q < job.bins_across; q++) {
            const int64_t left = bin_begin(q, job.bins_across, job.out_width);
            const int64_t right = bin_end(q, job.bins_across, job.out_width);
            const float g = by_bins[p * job.bins_across + q] / static_cast<float>((bottom - top) * (right - left));
            for (int64_t h = top; h < bottom; h++)
                for (int64_t w = left; w < right; w++) out[h * across + w] += g;
        }
    }
}

template <class T, int K> void backward_plane(const BatchNormReluJob& job, int64_t index) {
    const int64_t channel = index % job.channels, places = job.height * job.width;
    const Plane<K> plane(job, static_cast<const T*>(job.x) + index * places, channel);
    const float values = static_cast<float>(job.images * places);
    const float constant = -plane.scale * job.by_bias[channel] / values;
    const float slope = -plane.scale * plane.r * job.by_weight[channel] / values;
    const int64_t windows = plane.down * plane.across;
    Scratch<float> scratch(windows + K * K * windows);
    Scratch<int32_t> places_in_windows(plane.across);
    float *g = scratch.data, *out = g + windows;
    int32_t* chosen = places_in_windows.data;
    memset(g, 0, windows * sizeof(float));
    spread(job, job.by_features + index * job.bins_down * job.bins_across, plane.across, g);
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
                    out[i] = plane.d.data[i] * slope + constant + through;
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

template <class Body> void each_plane(const BatchNormReluJob& job, Body body) {
    parallel_for(job.images * job.channels, kPiece / (job.height * job.width) + 1, body);
}

template <class T, int K> void forward(const BatchNormReluJob& job) {
    each_plane(job, [&](int64_t plane) { forward_plane<T, K>(job, plane); });
}

template <class T, int K> void backward(const BatchNormReluJob& job) {
    each_plane(job, [&](int64_t plane) { backward_plane<T, K>(job, plane); });
}

}  // namespace

void batch_norm_relu(const BatchNormReluJob& job) {
    with_type(job.dtype, [&](auto type) {
        using T = decltype(type);
        statistics<T>(job);
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
