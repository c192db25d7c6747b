// Batch normalisation, ReLU, max pooling and the means that a local loss reads, in one pass behind a convolution; and
// the gradient by the convolution's output, in one more.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bllkern {

// Bin p of P over H places has those from floor(p H / P) up to ceil((p + 1) H / P); bins overlap where P does not divide H.
struct BatchNormReluJob {
    const void* x;        // [images, channels, height, width]
    const float* weight;  // [channels]
    const float* bias;    // [channels]
    float* mean;          // [channels]; results of batch_norm_relu
    float* variance;      // [channels], of all images and places, not corrected
    void* z;              // [images, channels, out_height, out_width]
    float* features;      // [images, channels, bins_down, bins_across], means of z over each bin
    float* active;        // [like features], the share of places where z > 0
    float* along;         // [like features], means of normalised x where z > 0, else 0
    const float* by_features;  // the gradient by features
    const float* by_weight;    // [channels]
    const float* by_bias;      // [channels]
    void* grad_x;              // like x; result of batch_norm_relu_gradient
    int64_t images, channels, height, width, out_height, out_width, bins_down, bins_across;
    int window;  // of max pooling: 1, 2 or 3 places a side, side by side; windows may be cut off at the lower and right edge
    float eps;
    DType dtype;  // of x, z and grad_x
};

BLLKERN_DECLARE(void batch_norm_relu(const BatchNormReluJob& job))
BLLKERN_DECLARE(void batch_norm_relu_gradient(const BatchNormReluJob& job))

}  // namespace bllkern
