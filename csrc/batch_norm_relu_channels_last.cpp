#include "batch_norm_channels.h"
#include "bins.h"

// What csrc/batch_norm_relu.cpp derives, for tensors that lie in memory as [images, height, width, channels]: a place is a
// row of channels with vectors along it, so windows are compared lane by lane and a bin is a sum of vectors.
namespace bllkern::BLLKERN_ISA {
namespace {

constexpr int64_t kAhead = 1024;         // elements of a shortcut that are on their way before they are added
constexpr int64_t kNarrow = 3 * kLanes;  // channels up to which a pass takes one vector of them through all places

// n channels from c on.
struct Span {
    int64_t c, n;
};

// body(vector, place) for the places [begin, end) and vectors of all channels, where vector = of(span) is what is known of
// a span.  Few channels stay in registers while places go by; many are taken from place to place, as they lie in memory,
// which prefetchers follow.
template <class Of, class Body>
BLLKERN_INLINE void each_place(int64_t begin, int64_t end, int64_t channels, Of of, Body body) {
    if (channels <= kNarrow)
        return each_vector(0, channels, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
            const auto vector = of(Span{c, n});
            for (int64_t place = begin; place < end; place++) body(vector, place);
        });
    for (int64_t place = begin; place < end; place++)
        each_vector(0, channels, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
            body(of(Span{c, n}), place);
        });
}

// Two sums at once.
struct Both {
    Lanes first, second;

    BLLKERN_MEMBER void operator+=(const Both& other) { first += other.first, second += other.second; }
};

// Sums for all channels, vector by vector.
template <class Sum> struct Sums {
    static constexpr int64_t kRun = 64;  // places that are added up before their sum is
    const int64_t channels, vectors;
    Scratch<Sum> of;

    explicit Sums(int64_t channels)
        : channels(channels), vectors((channels + kLanes - 1) / kLanes), of(vectors) {
        clear();
    }
    BLLKERN_MEMBER void clear() { memset(static_cast<void*>(of.data), 0, vectors * sizeof(Sum)); }
    BLLKERN_MEMBER const Sum& at(Span span) const { return of[span.c / kLanes]; }

    // Adds term(vector, place) of the places [begin, end), as in each_place.
    template <class Of, class Term> BLLKERN_MEMBER void add(int64_t begin, int64_t end, Of vector_of, Term term) {
        if (channels > kNarrow) {
            for (int64_t place = begin; place < end; place++)
                each_vector(0, channels, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
                    of[c / kLanes] += term(vector_of(Span{c, n}), place);
                });
            return;
        }
        each_vector(0, channels, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
            const auto vector = vector_of(Span{c, n});
            for (int64_t run = begin; run < end; run += kRun) {
                Sum sum = {};
                for (int64_t place = run; place < end && place < run + kRun; place++) sum += term(vector, place);
                of[c / kLanes] += sum;
            }
        });
    }
};

constexpr int64_t kFewest = 64;  // places whose sums in float are one part of those in double

// With a first mean m of a part of n values: mean m + sum(x - m) / n, and sum((x - m)^2) - sum(x - m)^2 / n around it.
template <class T> void statistics(const BatchNormReluJob& job) {
    const int64_t channels = job.channels, places = job.images * job.height * job.width;
    const int64_t size = kPiece / channels < kFewest ? kFewest : kPiece / channels;
    const int64_t parts = (places + size - 1) / size;
    auto values = [&](int64_t i) { return (i + 1) * size < places ? size : places - i * size; };
    Scratch<double> means(parts * channels), squares(parts * channels);
    auto part = [&](int64_t i) {
        const T* x = static_cast<const T*>(job.x) + i * size * channels;
        const float share = 1 / static_cast<float>(values(i));
        Sums<Lanes> first(channels);
        first.add(0, values(i), [](Span span) { return span; },
                  [&](Span span, int64_t place) __attribute__((always_inline)) {
                      return load_first(x + place * channels + span.c, span.n, 0.f);
                  });
        Sums<Both> off(channels);
        struct Mean : Span { Lanes mean; };
        off.add(0, values(i), [&](Span span) { return Mean{span, first.at(span) * share}; },
                [&](const Mean& of, int64_t place) __attribute__((always_inline)) {
                    Lanes d = load_first(x + place * channels + of.c, of.n, 0.f) - of.mean;
                    return Both{d, d * d};
                });
        each_vector(0, channels, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
            const Both& sums = off.at({c, n});
            const Lanes mean = first.at({c, n}) * share;
            for (int64_t l = 0; l < n; l++) {
                const double sum = sums.first[l];
                means[i * channels + c + l] = mean[l] + sum * share;
                squares[i * channels + c + l] = sums.second[l] - sum * sum * share;
            }
        });
    };
    parallel_for(parts, 1, part);
    put_statistics_together(job, parts, means.data, squares.data, values);
}

// What normalises all channels, and with `gradient` their slopes: whole vectors, 0 past the last channel.
struct Channels {
    const int64_t stride;
    Scratch<float> values;
    float *const mean = values.data, *const r = mean + stride, *const scale = r + stride, *const bias = scale + stride,
                 *const slope = bias + stride, *const constant = slope + stride;

    explicit Channels(const BatchNormReluJob& job, bool gradient = false)
        : stride(padded(job.channels)), values(6 * stride) {
        memset(values.data, 0, 6 * stride * sizeof(float));
        for (int64_t c = 0; c < job.channels; c++) {
            const Channel channel(job, c);
            mean[c] = channel.mean, r[c] = channel.r, scale[c] = channel.scale, bias[c] = channel.bias;
            if (!gradient) continue;
            const Slopes by(job, channel, c);
            slope[c] = by.slope, constant[c] = by.constant;
        }
    }
};

// What normalises some channels.
struct Norm : Span {
    Lanes mean, r, scale, bias, slope, constant;

    BLLKERN_MEMBER Norm(const Channels& of, Span span)
        : Span(span), mean(load(of.mean + c)), r(load(of.r + c)), scale(load(of.scale + c)), bias(load(of.bias + c)),
          slope(load(of.slope + c)), constant(load(of.constant + c)) {}
};

// Of one window the largest t, d there, and which place that is.
struct Largest {
    Lanes t, d;
    Ints place;
};

// One row of windows of one image.  All by value: what is stored could be what a reference is to.
template <class T, int K> struct Row {
    const int64_t channels, stride, down, across;  // a row of places, and how many are left in the image
    const T *const x, *const shortcut, *const by_z;
    T *const z, *const grad_x, *const grad_shortcut;
    const bool given;  // z is, and not a result

    BLLKERN_MEMBER Row(const BatchNormReluJob& job, int64_t image, int64_t h)
        : Row(job, h, (image * job.height + h * K) * job.width * job.channels,
              (image * job.out_height + h) * job.out_width * job.channels) {}

    // Place k of window w; one that lies past an edge is not there.
    BLLKERN_MEMBER bool has(int k, int64_t w) const { return k / K < down && w * K + k % K < across; }
    BLLKERN_MEMBER int64_t place(int k, int64_t w) const { return k / K * stride + (w * K + k % K) * channels; }
    BLLKERN_MEMBER Lanes d(const Norm& of, int k, int64_t w) const {
        return load_first(x + place(k, w) + of.c, of.n, 0.f) - of.mean;
    }
    // The first of equal ones; the first place of a window is always there.
    BLLKERN_MEMBER Largest largest(const Norm& of, int64_t w) const {
        Largest found = {{}, d(of, 0, w), {}};
        found.t = found.d * of.scale + of.bias;
        for (int k = 1; k < K * K; k++) {
            if (!has(k, w)) continue;
            const Lanes d = this->d(of, k, w), t = d * of.scale + of.bias;
            const Ints more = t > found.t;
            found = {select(more, t, found.t), select(more, d, found.d), more ? Ints{} + k : found.place};
        }
        return found;
    }

    BLLKERN_MEMBER Lanes at(const T* row, const Norm& of, int64_t w) const {
        return load_first(row + w * channels + of.c, of.n, 0.f);
    }
    // Window w of z, and what its bin keeps of it.
    BLLKERN_MEMBER Kept forward(const Norm& of, int64_t w) const {
        const Largest found = largest(of, w);
        if (shortcut) __builtin_prefetch(shortcut + w * channels + of.c + kAhead);
        const Lanes t = shortcut ? found.t + at(shortcut, of, w) : found.t;
        const Lanes y = select(t < 0.f, Lanes{}, t);  // NaN stays NaN
        const Ints on = t > 0.f;
        store_first(z + w * channels + of.c, y, of.n);
        return {y, select(on, Lanes{} + 1.f, Lanes{}), select(on, found.d, Lanes{})};
    }

    // The gradient by z before ReLU; with a shortcut z tells where that was open.
    BLLKERN_MEMBER Lanes through(Lanes by_features, const Largest& found, const Norm& of, int64_t w) const {
        const Lanes by = by_z ? by_features + at(by_z, of, w) : by_features;
        return select((given ? at(z, of, w) : found.t) > 0.f, by, Lanes{});
    }
    // The gradients by x and shortcut from that before ReLU.
    BLLKERN_MEMBER void backward(Lanes g, const Largest& found, const Norm& of, int64_t w) const {
        if (grad_shortcut) store_first(grad_shortcut + w * channels + of.c, g, of.n);
        for (int k = 0; grad_x && k < K * K; k++) {
            if (!has(k, w)) continue;
            const Lanes d = K == 1 ? found.d : this->d(of, k, w);
            const Lanes by_t = K == 1 ? g : select(found.place == k, g, Lanes{});
            store_first(grad_x + place(k, w) + of.c, by_t * of.scale + (d * of.slope + of.constant), of.n);
        }
    }

  private:
    BLLKERN_MEMBER Row(const BatchNormReluJob& job, int64_t h, int64_t in_x, int64_t in_z)
        : channels(job.channels), stride(job.width * job.channels), down(job.height - h * K), across(job.width),
          x(static_cast<const T*>(job.x) + in_x), shortcut(after(static_cast<const T*>(job.shortcut), in_z)),
          by_z(after(static_cast<const T*>(job.by_z), in_z)), z(after(static_cast<T*>(job.z), in_z)),
          grad_x(after(static_cast<T*>(job.grad_x), in_x)), grad_shortcut(after(static_cast<T*>(job.grad_shortcut), in_z)),
          given(job.z) {}
    template <class P> BLLKERN_MEMBER static P* after(P* tensor, int64_t i) { return tensor ? tensor + i : nullptr; }
};

// One row of bins of one image: z, and what the bins keep.  The features, which lie with places last, are turned later.
template <class T, int K>
void forward_bins(const BatchNormReluJob& job, const Channels& channels, const Bins& down, const Bins& across,
                  int64_t index, float* features) {
    const int64_t image = index / down.count, p = index % down.count;
    Sums<Kept> kept(job.channels);
    for (int64_t q = 0; q < across.count; q++) {
        kept.clear();
        for (int64_t h = down.begin[p]; h < down.end[p]; h++) {
            const Row<T, K> row(job, image, h);
            kept.add(across.begin[q], across.end[q], [&](Span span) { return Norm(channels, span); },
                     [&](const Norm& of, int64_t w) __attribute__((always_inline)) { return row.forward(of, w); });
        }
        const Lanes share = Lanes{} + down.share[p] * across.share[q];
        const int64_t bin = index * across.count + q;
        each_vector(0, job.channels, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
            const Kept& sums = kept.at({c, n});
            store(features + bin * channels.stride + c, sums.z * share);
            store_first(job.active + bin * job.channels + c, sums.on * share, n);
            store_first(job.along + bin * job.channels + c, sums.along * share * load(channels.r + c), n);
        });
    }
}

// Rows of bins as rows of channels: [images, bins, stride] from or to [images, channels, bins].
template <bool kToChannels> void turn(const BatchNormReluJob& job, int64_t stride, float* by_bin, float* by_channel) {
    const int64_t bins = job.bins_down * job.bins_across;
    auto image = [&](int64_t i) {
        for (int64_t c = 0; c < job.channels; c++)
            for (int64_t b = 0; b < bins; b++) {
                float &x = by_bin[(i * bins + b) * stride + c], &y = by_channel[(i * job.channels + c) * bins + b];
                kToChannels ? y = x : x = y;
            }
    };
    parallel_for(job.images, kPiece / (bins * stride) + 1, image);
}

template <class T, int K> void forward(const BatchNormReluJob& job) {
    statistics<T>(job);
    const Channels channels(job);
    const int64_t values = job.out_height * job.out_width * job.channels;  // of an image
    if (job.bins_down) {
        const Bins down(job.out_height, job.bins_down), across(job.out_width, job.bins_across);
        Scratch<float> features(job.images * down.count * across.count * channels.stride);
        auto bins = [&](int64_t i) { forward_bins<T, K>(job, channels, down, across, i, features.data); };
        parallel_for(job.images * down.count, kPiece / (values / down.count + 1) + 1, bins);
        return turn<true>(job, channels.stride, features.data, job.features);
    }
    auto each_row = [&](int64_t i) {
        const Row<T, K> row(job, i / job.out_height, i % job.out_height);
        each_place(0, job.out_width, job.channels, [&](Span span) { return Norm(channels, span); },
                   [&](const Norm& of, int64_t w) __attribute__((always_inline)) { row.forward(of, w); });
    };
    parallel_for(job.images * job.out_height, kPiece / (values / job.out_height + 1) + 1, each_row);
}

// The gradient by the features, divided by the places of each bin, as rows of channels.
struct FromFeatures {
    const Bins down, across;
    const int64_t stride, bins;
    Scratch<float> by_places;  // [images, bins, stride]

    explicit FromFeatures(const BatchNormReluJob& job)
        : down(job.out_height, job.bins_down), across(job.out_width, job.bins_across), stride(padded(job.channels)),
          bins(down.count * across.count), by_places(job.images * bins * stride) {
        turn<false>(job, stride, by_places.data, const_cast<float*>(job.by_features));
        auto bin = [&](int64_t i) {
            for (int64_t c = 0; c < stride; c++) by_places[i * stride + c] *= share(i % bins);
        };
        parallel_for(job.images * bins, kPiece / stride + 1, bin);
    }

    float share(int64_t bin) const { return down.share[bin / across.count] * across.share[bin % across.count]; }

    // The first place from w on, before `end`, that is in other bins.
    int64_t same_until(int64_t w, int64_t end) const {
        int64_t i = w + 1;
        while (i < end && across.first[i] == across.first[w] && across.last[i] == across.last[w]) i++;
        return i;
    }
    // What comes to place (h, w) of z.
    BLLKERN_MEMBER Lanes at(int64_t image, int64_t h, int64_t w, int64_t c) const {
        Lanes g = {};
        for (int64_t p = down.first[h]; p < down.last[h]; p++)
            for (int64_t q = across.first[w]; q < across.last[w]; q++)
                g += load(by_places.data + (image * bins + p * across.count + q) * stride + c);
        return g;
    }
};

// The gradients by one row of windows, those without a place in z among them.
template <class T, int K>
void backward_row(const BatchNormReluJob& job, const Channels& channels, const FromFeatures* features, int64_t image,
                  int64_t h) {
    const Row<T, K> row(job, image, h);
    const int64_t windows = (job.width + K - 1) / K, inside = h < job.out_height ? job.out_width : 0;
    struct Fed : Norm { Lanes by_features; };
    for (int64_t begin = 0, end; begin < windows; begin = end) {  // windows of the same bins
        end = begin >= inside ? windows : features ? features->same_until(begin, inside) : inside;
        auto fed = [&](Span span) __attribute__((always_inline)) {
            return Fed{{channels, span}, features && begin < inside ? features->at(image, h, begin, span.c) : Lanes{}};
        };
        auto window = [&](const Fed& of, int64_t w) __attribute__((always_inline)) {
            const Largest found = row.largest(of, w);
            row.backward(begin < inside ? row.through(of.by_features, found, of, w) : Lanes{}, found, of, w);
        };
        each_place(begin, end, job.channels, fed, window);
    }
}

// The sums of g and of g d r over rows [top, bottom) of one image, of what comes through z.
template <class T, int K>
void add_rows(const BatchNormReluJob& job, const Channels& channels, int64_t image, int64_t top, int64_t bottom,
              Sums<Both>& total) {
    for (int64_t h = top; h < bottom; h++) {
        const Row<T, K> row(job, image, h);
        total.add(0, job.out_width, [&](Span span) { return Norm(channels, span); },
                  [&](const Norm& of, int64_t w) __attribute__((always_inline)) {
                      const Largest found = row.largest(of, w);
                      const Lanes g = row.through(Lanes{}, found, of, w);
                      return Both{g, g * found.d * of.r};
                  });
    }
}

// The same over all places of one image, of what comes through the features; d r is what the bins have kept.
static void add_bins(const BatchNormReluJob& job, const FromFeatures& features, int64_t image, Sums<Both>& total) {
    total.add(0, features.bins, [](Span span) { return span; },
              [&](Span span, int64_t bin) __attribute__((always_inline)) {
                  const int64_t i = image * features.bins + bin, first = i * job.channels + span.c;
                  const Lanes g = load(features.by_places.data + i * features.stride + span.c) * (1 / features.share(bin));
                  return Both{g * load_first(job.active + first, span.n, 0.f),
                              g * load_first(job.along + first, span.n, 0.f)};
              });
}

// The gradients by weight and bias, from parts of each image: bands of rows and the features.
template <class T, int K>
void sums_of_gradient(const BatchNormReluJob& job, const Channels& channels, const FromFeatures* features) {
    const int64_t rows = kPiece / (job.out_width * job.channels + 1) + 1;
    const int64_t bands = job.by_z ? (job.out_height + rows - 1) / rows : 0, of_image = bands + (features ? 1 : 0);
    const int64_t parts = job.images * of_image;
    Scratch<double> sums(parts * job.channels), alongs(parts * job.channels);
    auto part = [&](int64_t i) {
        const int64_t image = i / of_image, top = i % of_image * rows;
        Sums<Both> total(job.channels);
        if (i % of_image == bands) add_bins(job, *features, image, total);
        else add_rows<T, K>(job, channels, image, top, top + rows < job.out_height ? top + rows : job.out_height, total);
        each_vector(0, job.channels, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
            const Both& sum = total.at({c, n});
            for (int64_t l = 0; l < n; l++)
                sums[i * job.channels + c + l] = sum.first[l], alongs[i * job.channels + c + l] = sum.second[l];
        });
    };
    parallel_for(parts, kPiece / (rows * job.out_width * job.channels) + 1, part);
    put_gradients_together(job, parts, sums.data, alongs.data);
}

template <class T, int K> void backward(const BatchNormReluJob& job, const FromFeatures* features) {
    sums_of_gradient<T, K>(job, Channels(job), features);
    if (!job.grad_x && !job.grad_shortcut) return;
    const Channels channels(job, true);
    const int64_t down = (job.height + K - 1) / K;
    auto row = [&](int64_t i) { backward_row<T, K>(job, channels, features, i / down, i % down); };
    parallel_for(job.images * down, kPiece / (K * job.width * job.channels) + 1, row);
}

template <class T, int K> void backward(const BatchNormReluJob& job) {
    if (!job.by_features) return backward<T, K>(job, nullptr);
    const FromFeatures features(job);
    backward<T, K>(job, &features);
}

}  // namespace

void batch_norm_relu_channels_last(const BatchNormReluJob& job) {
    with_type(job.dtype, [&](auto type) {
        using T = decltype(type);
        job.window == 1 ? forward<T, 1>(job) : job.window == 2 ? forward<T, 2>(job) : forward<T, 3>(job);
    });
}

void batch_norm_relu_gradient_channels_last(const BatchNormReluJob& job) {
    with_type(job.dtype, [&](auto type) {
        using T = decltype(type);
        job.window == 1 ? backward<T, 1>(job) : job.window == 2 ? backward<T, 2>(job) : backward<T, 3>(job);
    });
}

}  // namespace bllkern::BLLKERN_ISA
