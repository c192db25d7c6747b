// Batch normalisation by channels: what normalises each, and its sums put together from those of parts of the batch.
#pragma once

#include "batch_norm_relu.h"
#include "rows.h"
#include "threads.h"

namespace bllkern::BLLKERN_ISA {

constexpr int64_t kPiece = 16384;  // elements that a thread takes at a time

// What normalises one channel.
struct Channel {
    const float mean, r, scale, bias;

    Channel(const BatchNormReluJob& job, int64_t channel)
        : mean(job.mean[channel]), r(1 / __builtin_sqrtf(job.variance[channel] + job.eps)),
          scale(job.weight[channel] * r), bias(job.bias[channel]) {}
};

// The gradient by x is scale g + slope d + constant.
struct Slopes {
    float slope, constant;

    Slopes(const BatchNormReluJob& job, const Channel& channel, int64_t c) {
        const float values = static_cast<float>(job.images * job.height * job.width);
        slope = -channel.scale * channel.r * job.by_weight[c] / values;
        constant = -channel.scale * job.by_bias[c] / values;
    }
};

// Mean and variance of each channel from `means` and `squares` [parts, channels], the sums of squared differences from
// these means; part i has values(i) of each channel.
template <class Values>
static void put_statistics_together(const BatchNormReluJob& job, int64_t parts, const double* means,
                                    const double* squares, Values values) {
    const double all = static_cast<double>(job.images * job.height * job.width);
    auto channel = [&](int64_t c) {
        double mean = 0, square = 0;
        for (int64_t i = 0; i < parts; i++) mean += means[i * job.channels + c] * static_cast<double>(values(i));
        mean /= all;
        for (int64_t i = 0; i < parts; i++) {
            double off = means[i * job.channels + c] - mean;
            square += squares[i * job.channels + c] + static_cast<double>(values(i)) * off * off;
        }
        job.mean[c] = static_cast<float>(mean);
        job.variance[c] = static_cast<float>(square / all);
    };
    parallel_for(job.channels, kPiece / parts + 1, channel);
}

// The gradients by bias and weight of channel c from the sums of g and of g d r, [parts, channels].
static void put_gradients_together(const BatchNormReluJob& job, int64_t parts, const double* sums,
                                   const double* alongs) {
    auto channel = [&](int64_t c) {
        double by_bias = 0, by_weight = 0;
        for (int64_t i = c; i < parts * job.channels; i += job.channels) by_bias += sums[i], by_weight += alongs[i];
        job.by_bias[c] = static_cast<float>(by_bias), job.by_weight[c] = static_cast<float>(by_weight);
    };
    parallel_for(job.channels, kPiece / (parts + 1) + 1, channel);
}

// What a bin keeps of its places: z, where t > 0, and d there.
struct Kept {
    Lanes z = {}, on = {}, along = {};

    BLLKERN_MEMBER void operator+=(const Kept& other) { z += other.z, on += other.on, along += other.along; }
};

}  // namespace bllkern::BLLKERN_ISA
