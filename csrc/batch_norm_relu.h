// Batch normalisation, a shortcut added to it, ReLU, max pooling and the means that a local loss reads, in one pass behind
// a convolution; and the gradients, in one more, or two where the gradient by the activation itself is given.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace bllkern {

// Bin p of P over H places has those from floor(p H / P) up to ceil((p + 1) H / P); bins overlap where P does not divide H.
// What is null is not there, or not wanted.
struct BatchNormReluJob {
    const void* x;         // [images, channels, height, width]
    const float* weight;   // [channels]
    const float* bias;     // [channels]
    const void* shortcut;  // like x, or null; only with windows of 1 place
    float* mean;           // [channels]; results of batch_norm_relu
    float* variance;       // [channels], of all images and places, not corrected
    void* z;               // [images, channels, out_height, out_width]; the gradient reads it where there was a shortcut
    float* features;       // [images, channels, bins_down, bins_across], means of z over each bin
    float* active;         // [like features], the share of places where z > 0
    float* along;          // [like features], means of normalised x where z > 0, else 0
    const void* by_z;          // the gradient by z, or null
    const float* by_features;  // the gradient by features, or null
    float* by_weight;          // [channels]; results of batch_norm_relu_gradient
    float* by_bias;            // [channels]
    void* grad_x;              // like x, or null
    void* grad_shortcut;       // like x, or null
    int64_t images, channels, height, width, out_height, out_width, bins_down, bins_across;
    int window;  // of max pooling: 1, 2 or 3 places a side, side by side; windows may be cut off at the lower and right edge
    float eps;
    DType dtype;  // of x, shortcut, z and their gradients
    bool channels_last;  // these, active and along lie in memory as [images, height, width, channels]
};

BLLKERN_DECLARE(void batch_norm_relu(const BatchNormReluJob& job))
BLLKERN_DECLARE(void batch_norm_relu_gradient(const BatchNormReluJob& job))
BLLKERN_DECLARE(void batch_norm_relu_channels_last(const BatchNormReluJob& job))  // these two only for channels_last
BLLKERN_DECLARE(void batch_norm_relu_gradient_channels_last(const BatchNormReluJob& job))

}  // namespace bllkern
